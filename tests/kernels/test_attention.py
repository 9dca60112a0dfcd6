"""The attention implementations: the suite for each, and what only one of them does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.attention_suite import AttentionSuite, inputs, mask_of, oracle, random_segments
from tinyllama_jax.kernels import target
from tinyllama_jax.kernels.attention import api, flash, folded
from tinyllama_jax.kernels.attention.flash_kernels import Blocks, Tuning
from tinyllama_jax.model.presets import PRESETS

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
# The kernels' interpreter compiles slowly: the default suite has a part of its cases.
SMALL = Tuning(Blocks(32, 16, 4, 2), Blocks(16, 32, 4, 2), Blocks(32, 16, 4, 2))
GPUS = {
    "a100": target.Target("gpu", (8, 0), "NVIDIA A100-SXM4-40GB"),
    "h200": target.Target("gpu", (9, 0), "NVIDIA H200"),
}


class TestReference(AttentionSuite):
    implementation = "reference"


class TestFolded(AttentionSuite):
    implementation = "folded"
    low_precision = ("float32",)  # it is for CPU, where that is what is computed in
    full = False

    def test_the_cases_need_several_blocks(self):
        assert len(folded._blocks(300)) == 3


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="interpreted on CPU only")
class TestFlashInterpreted(AttentionSuite):
    """The kernels' own code, run by Pallas's interpreter, in the blocks that GPUs use."""

    implementation = "flash"


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="interpreted on CPU only")
class TestFlashInterpretedInSmallBlocks(AttentionSuite):
    """Many blocks of unequal sizes, so that every kind of block is met in every loop."""

    implementation = "flash"

    def run(self, q, k, v, dout, causal=True, segment_ids=None):
        def values_and_gradients(q, k, v, dout):
            out, vjp = jax.vjp(
                lambda *x: flash.attention(
                    *x, causal=causal, segment_ids=segment_ids, blocks=SMALL
                ), q, k, v,
            )  # fmt: skip
            return (out, *vjp(dout))

        return jax.jit(values_and_gradients)(q, k, v, dout)

    @pytest.mark.parametrize("seed", range(8))
    def test_random_shapes(self, seed):
        rng = np.random.default_rng(seed)
        S, K, G = int(rng.integers(1, 150)), int(rng.integers(1, 3)), int(rng.integers(1, 6))
        causal = bool(rng.integers(2))
        T = S if causal else int(rng.integers(1, 150))
        segment_ids = random_segments(seed, 2, S, 0.1) if S == T and rng.integers(2) else None
        self.check(
            (2, S, T, K * G, K, int(rng.choice(flash.HEAD_DIMS))), jnp.dtype("float32"),
            causal=causal, segment_ids=segment_ids, seed=seed,
        )  # fmt: skip


@on_gpu
class TestFlashCompiled(AttentionSuite):
    implementation = "flash"
    dtypes = ("bfloat16", "float16", "float32")

    def test_tensorfloat32_is_the_default_of_float32(self):
        with jax.default_matmul_precision("default"):
            arrays = inputs(0, 1, 200, 200, 4, 2, 64)
            out = jax.jit(lambda q, k, v: api.attention(q, k, v, implementation="flash"))(
                *arrays[:3]
            )
        expected = oracle(*arrays, mask_of(1, 200, 200, True))[0]
        assert np.abs(np.asarray(out) - expected).max() < 3e-3 * np.abs(expected).max()


@on_gpu
class TestCudnn(AttentionSuite):
    implementation = "cudnn"
    dtypes = low_precision = ("bfloat16", "float16")
    segments = False

    def check(self, case, dtype, **arguments):
        S, T = case[1:3]
        if S % 2 or T % 2:
            with pytest.raises(ValueError, match="neither number may be odd"):
                super().check(case, dtype, **arguments)
        else:
            super().check(case, dtype, **arguments)

    def test_the_same_inputs_give_the_same_bits(self):
        pytest.skip("cuDNN's backward pass adds with atomics")


# What is made for GPUs, on any machine.


def variants():
    """Each preset's heads in each dtype and mask that a training pass of it can have."""
    heads = {(c.num_heads, c.num_kv_heads, c.head_dim): name for name, c in sorted(PRESETS.items())}
    shapes = [*heads, (3, 1, 128), (4, 4, 32)]
    return [
        (shape, dtype, packed)
        for shape in shapes
        if shape[2] in flash.HEAD_DIMS
        for dtype in flash.DTYPES
        for packed in (False, True)
    ]


def trace_for_gpu(shape, dtype, packed, gpu, S=1100, causal=True):
    """A pass forward and backward, traced for a GPU; S is no multiple of any block, and what it is
    padded to no power of two."""
    N, K, H = shape
    q, k = (jax.ShapeDtypeStruct((2, S, heads, H), dtype) for heads in (N, K))
    segment_ids = jax.ShapeDtypeStruct((2, S), jnp.int32)

    def values_and_gradients(q, k, v, dout, segment_ids):
        segment_ids = segment_ids if packed else None
        out, vjp = jax.vjp(
            lambda *x: api.attention(
                *x, causal=causal, segment_ids=segment_ids, implementation="flash"
            ), q, k, v,
        )  # fmt: skip
        return (out, *vjp(dout))

    with target.compile_for(gpu):
        return jax.jit(values_and_gradients).trace(q, k, k, q, segment_ids)


@pytest.mark.parametrize("gpu", GPUS)
def test_flash_lowers_for_cuda(gpu):
    """Every variant of every preset becomes three Triton kernels."""
    full = ((32, 4, 64), "bfloat16", False)
    for (shape, dtype, packed), causal in [*((v, True) for v in variants()), (full, False)]:
        traced = trace_for_gpu(shape, dtype, packed, GPUS[gpu], causal=causal)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        for kernel in ("forward", "dq", "dkv"):
            assert f"flash_attention_{kernel}" in text, (shape, dtype, packed)
        assert text.count("__gpu$xla.gpu.triton") == 3, (shape, dtype, packed)


def test_blocks_divide_one_another():
    """Padding to the largest block is padding to all."""
    for (capability, itemsize), by_head_dim in flash._TUNING.items():
        assert set(by_head_dim) == set(flash.HEAD_DIMS), (capability, itemsize)
        for blocks in by_head_dim.values():
            for one in blocks:
                assert one.queries & (one.queries - 1) == one.keys & (one.keys - 1) == 0
                # Triton's matrix products need 16 at least.
                assert min(one.queries, one.keys) >= 16


def test_flash_keeps_no_score_matrix():
    """A row of 4,096 tokens: the scores would take 512 MiB, what is kept beside in and out 0.5."""
    residuals = jax.eval_shape(
        lambda q, k, v: jax.vjp(lambda *x: api.attention(*x, implementation="flash"), q, k, v)[1],
        *[jax.ShapeDtypeStruct((1, 4096, heads, 64), jnp.bfloat16) for heads in (8, 2, 2)],
    )
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals)]
    inputs_and_output = 4096 * 64 * 2 * (8 + 2 + 2 + 8)
    assert sum(sizes) <= inputs_and_output + 8 * 4096 * 4


# Decoding, and what is refused.


def test_decoding_rows_at_their_own_positions():
    B, S, T, N, K, H = 3, 2, 10, 4, 2, 16
    q, k, v, _ = inputs(5, B, S, T, N, K, H)
    lengths = jnp.array([2, 7, 10])
    q_positions = lengths[:, None] - S + jnp.arange(S)
    out = api.attention(q, k, v, q_positions=q_positions, kv_lengths=lengths)
    mask = np.arange(T)[None, None] <= np.asarray(q_positions)[:, :, None]
    np.testing.assert_allclose(np.asarray(out), oracle(q, k, v, q, mask)[0], atol=3e-6)


def test_kv_lengths_hide_unused_keys():
    q, k, v, _ = inputs(6, 2, 3, 8, 2, 2, 16)
    out = api.attention(q, k, v, causal=False, kv_lengths=jnp.array([5, 8]))
    mask = mask_of(2, 3, 8, False) & (np.arange(8) < np.array([[5], [8]]))[:, None]
    np.testing.assert_allclose(np.asarray(out), oracle(q, k, v, q, mask)[0], atol=3e-6)


def test_a_query_without_keys_is_finite():
    q, k, v, _ = inputs(7, 1, 2, 4, 2, 2, 16)

    def total(q, k, v):
        return jnp.sum(api.attention(q, k, v, causal=False, kv_lengths=jnp.array([0])))

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)


def test_rows_without_a_block_to_look_at_are_finite():
    """Flash's padding is such; here whole blocks of rows are, among documents of their own."""
    q, k, v, dout = inputs(7, 1, 64, 64, 2, 1, 32)
    segments = jnp.where(jnp.arange(64) < 32, 7, 0)[None], jnp.zeros((1, 64), jnp.int32)
    static = flash.Static(False, 64, SMALL, interpret=True)

    def run(q, k, v):
        return flash._flash(q, k, v, segments, static)

    out, vjp = jax.vjp(run, q, k, v)
    found = (out, *vjp(dout))
    assert all(np.isfinite(np.asarray(x)).all() for x in found)
    assert not np.asarray(found[1][:, :32]).any()  # what sees nothing has no gradient
    mask = np.ones((1, 64, 64), bool)
    np.testing.assert_allclose(out[:, 32:], oracle(q, k, v, dout, mask)[0][:, 32:], atol=3e-6)


def test_refusals_say_what_to_do():
    q, k, v, _ = inputs(9, 1, 3, 5, 4, 2, 16)
    with pytest.raises(ValueError, match="pass q_positions"):
        api.attention(q, k, v)
    with pytest.raises(ValueError, match=r'"folded" does not cover this: causal=False; use "refer'):
        api.attention(q, k, v, causal=False, implementation="folded")
    with pytest.raises(ValueError, match=r"head_dim 16 is not one of \(32, 64, 128\)"):
        api.attention(q, k, v, causal=False, implementation="flash")
    with pytest.raises(ValueError, match="dtypes float32 and float32 are not one and the same of"):
        api.attention(q, k, v, causal=False, implementation="cudnn")
    half = jnp.zeros((1, 3, 2, 32), jnp.bfloat16)
    with pytest.raises(ValueError, match="of 3 queries and 3 keys neither number may be odd"):
        api.attention(half, half, half, implementation="cudnn")
    with pytest.raises(ValueError, match="head_dim 36 is not a multiple of 8"):
        api.attention(*[jnp.zeros((1, 4, 2, 36), jnp.bfloat16)] * 3, implementation="cudnn")
    with pytest.raises(ValueError, match=r"segment_ids \(1, 5\) with 3 queries and 5 keys"):
        api.attention(q, k, v, causal=False, segment_ids=jnp.zeros((1, 5), jnp.int32))
    with pytest.raises(ValueError, match="belong to decoding"):
        api.attention(q, k, v, kv_lengths=jnp.array([2]), causal=False, implementation="flash")
    with pytest.raises(ValueError, match=r"not one of auto, reference, folded, flash, cudnn"):
        api.attention(q, k, v, causal=False, implementation="fast")
    with pytest.raises(ValueError, match="do not fit"):
        api.attention(q, k[..., :8], v, causal=False)
    with pytest.raises(ValueError, match="do not fit"):
        api.attention(q[:, :, :3], k, v, causal=False)


def test_auto_by_device():
    gpu = GPUS["a100"]
    cases = {
        (target.Target("cpu"), "float32", 64, False): "folded",
        (gpu, "bfloat16", 64, False): "cudnn",
        (gpu, "bfloat16", 64, True): "flash",
        (gpu, "float32", 64, False): "flash",
        (gpu, "bfloat16", 80, False): "cudnn",
        (gpu, "bfloat16", 80, True): "reference",
        (gpu, "float32", 80, False): "reference",
        (dataclasses.replace(gpu, compute_capability=(7, 5)), "bfloat16", 64, False): "reference",
        (target.Target("tpu"), "bfloat16", 64, False): "reference",
    }
    for (device, dtype, head_dim, packed), expected in cases.items():
        with target.compile_for(device):
            assert api.resolve(jnp.dtype(dtype), head_dim, 2048, packed) == expected
    with target.compile_for(gpu):
        assert api.resolve(jnp.dtype("bfloat16"), 64, 2047, False) == "flash"
