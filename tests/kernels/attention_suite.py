"""What every attention implementation must do: one suite, inherited by each.

Values and gradients are compared with a NumPy oracle in float64, which knows the formula and
nothing of blocks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.kernels.attention import api


def oracle(q, k, v, dout, mask):
    """softmax(q k^T / sqrt(H)) v and its gradients for dout; mask (B, S, T); float64."""
    q, k, v, dout = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v, dout))
    B, _, N, H = q.shape
    groups = N // k.shape[2]
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b in range(B):
        for n in range(N):
            keys, values = k[b, :, n // groups], v[b, :, n // groups]
            scores = np.where(mask[b], q[b, :, n] @ keys.T / np.sqrt(H), -np.inf)
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
            out[b, :, n] = p @ values
            dp = dout[b, :, n] @ values.T
            ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) / np.sqrt(H)
            dq[b, :, n] = ds @ keys
            dk[b, :, n // groups] += ds.T @ q[b, :, n]
            dv[b, :, n // groups] += p.T @ dout[b, :, n]
    return out, dq, dk, dv


def inputs(seed, B, S, T, N, K, H, dtype=jnp.float32):
    """q, k, v and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = ((B, S, N, H), (B, T, K, H), (B, T, K, H), (B, S, N, H))
    return [
        jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
    ]


def random_segments(seed, B, S, share=0.03):
    """Document numbers of packed rows; a share of the tokens begin one."""
    starts = np.random.default_rng(seed).random((B, S)) < share
    return jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)


def mask_of(B, S, T, causal, segment_ids=None):
    mask = np.ones((B, S, T), bool)
    if causal:
        mask &= np.arange(T)[None, None] <= np.arange(S)[:, None]
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        mask &= ids[:, :, None] == ids[:, None, :]
    return mask


# B, S, T, N, K, H: groups 1, 2, 4 and 8, one row, lengths around and off the blocks.
CAUSAL = [
    (2, 1, 1, 4, 4, 32),
    (1, 127, 127, 4, 1, 64),
    (2, 128, 128, 4, 2, 32),
    (1, 300, 300, 8, 1, 32),
    (1, 257, 257, 2, 2, 128),
]
FULL = [(1, 70, 200, 4, 2, 32), (2, 130, 64, 2, 1, 64)]
# Largest error of an output or gradient over the largest value of it, by dtype.
TOLERANCES = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1.5e-2}


class AttentionSuite:
    """The tests; a subclass names the implementation and what it covers."""

    implementation: str
    dtypes: tuple[str, ...] = ("float32",)
    low_precision: tuple[str, ...] = ("bfloat16", "float16")
    segments = True
    full = True

    def run(self, q, k, v, dout, **arguments):
        """out, dq, dk, dv, jitted: op by op, compiling would take most of the suite's time."""

        def values_and_gradients(q, k, v, dout):
            out, vjp = jax.vjp(
                lambda *x: api.attention(*x, implementation=self.implementation, **arguments),
                q, k, v,
            )  # fmt: skip
            return (out, *vjp(dout))

        # On GPUs products of float32 would be TensorFloat-32 otherwise.
        with jax.default_matmul_precision("highest"):
            return jax.jit(values_and_gradients)(q, k, v, dout)

    def check(self, case, dtype, *, causal=True, segment_ids=None, seed=0):
        B, S, T = case[:3]
        arrays = inputs(seed, *case, dtype)
        found = self.run(*arrays, causal=causal, segment_ids=segment_ids)
        expected = oracle(*arrays, mask_of(B, S, T, causal, segment_ids))
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            assert a.dtype == dtype and a.shape == b.shape, name
            a = np.asarray(a.astype(jnp.float32), np.float64)
            # One row alone has no gradient but dv: then the errors are compared with 1.
            error = np.abs(a - b).max() / max(np.abs(b).max(), 1)
            assert error < TOLERANCES[jnp.dtype(dtype).name], f"{name}: {error:.1e}"

    @pytest.mark.parametrize("case", CAUSAL, ids=str)
    def test_causal(self, case):
        for dtype in self.dtypes:
            self.check(case, jnp.dtype(dtype))

    @pytest.mark.parametrize("case", FULL, ids=str)
    def test_not_causal(self, case):
        if not self.full:
            pytest.skip("causal passes only")
        for dtype in self.dtypes:
            self.check(case, jnp.dtype(dtype), causal=False)

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
    def test_packed_documents(self, causal):
        if not self.segments or not (causal or self.full):
            pytest.skip("not covered")
        B, S = 2, 300
        segment_ids = random_segments(S, B, S).at[1].set(0)  # one row is one document
        for dtype in self.dtypes:
            self.check((B, S, S, 4, 2, 32), jnp.dtype(dtype), causal=causal,
                       segment_ids=segment_ids)  # fmt: skip

    def test_documents_in_any_order(self):
        """Nothing says that ids ascend, or that a document stands in one piece."""
        if not self.segments:
            pytest.skip("not covered")
        segment_ids = jax.random.randint(jax.random.key(3), (1, 280), 0, 3)
        for dtype in self.dtypes:
            self.check((1, 280, 280, 2, 1, 32), jnp.dtype(dtype), segment_ids=segment_ids)

    def test_low_precision(self):
        for dtype in self.low_precision:
            self.check((1, 200, 200, 4, 2, 64), jnp.dtype(dtype))

    def test_large_scores_do_not_overflow(self):
        q, k, v, dout = inputs(5, 1, 160, 160, 2, 1, 32, self.low_precision[-1])
        found = self.run(q * 30, k * 30, v, dout)
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in found)

    def test_the_same_inputs_give_the_same_bits(self):
        arrays = inputs(8, 2, 200, 200, 4, 2, 32, jnp.dtype(self.dtypes[0]))
        first, second = self.run(*arrays), self.run(*arrays)
        for a, b in zip(first, second, strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
