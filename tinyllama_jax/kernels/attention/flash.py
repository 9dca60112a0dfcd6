"""FlashAttention-2 (arXiv 2307.08691) for GPUs, in Pallas.

The score matrix exists one block at a time. The forward kernel walks over the keys of one block of
queries and saves the log-sum-exp of each row; the backward pass makes the probabilities again from
it, in one kernel that walks over keys for dq and one that walks over queries for dk and dv. Each
output element is written by one program, in a fixed order, so the same inputs give the same bits.

Query heads of a group read the same key/value head where it stands, and dk and dv of a group are
summed within the kernel: nothing is repeated in memory. Under a causal mask, blocks above the
diagonal are not visited and blocks below it not masked; with segments, each block visits only the
range of blocks in which a segment of its own occurs.

Products of float32 inputs are as exact as `jax_default_matmul_precision` asks for, like all others
in jax: TensorFloat-32 by default.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tinyllama_jax.kernels import target
from tinyllama_jax.kernels.attention import flash_kernels as kernels
from tinyllama_jax.kernels.attention.flash_kernels import Blocks, Static, Tuning

HEAD_DIMS = (32, 64, 128)
DTYPES = ("bfloat16", "float16", "float32")

# By compute capability (the first that the GPU reaches) and bytes per element; then by head width.
# Chosen by what the compiler reports for each (registers and spills; no spills allowed), not yet by
# time on a GPU.
_TUNING: dict[tuple[tuple[int, int], int], dict[int, Tuning]] = {
    ((9, 0), 2): {
        32: Tuning(Blocks(128, 64, 4, 3), Blocks(128, 32, 4, 3), Blocks(32, 128, 4, 3)),
        64: Tuning(Blocks(128, 64, 4, 3), Blocks(128, 32, 4, 3), Blocks(32, 128, 4, 3)),
        128: Tuning(Blocks(128, 64, 8, 3), Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
    },
    ((0, 0), 2): {
        32: Tuning(Blocks(128, 64, 4, 3), Blocks(128, 32, 4, 3), Blocks(32, 128, 4, 3)),
        64: Tuning(Blocks(128, 64, 4, 3), Blocks(128, 32, 4, 3), Blocks(64, 64, 4, 3)),
        128: Tuning(Blocks(128, 64, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2)),
    },
    ((0, 0), 4): {
        32: Tuning(Blocks(64, 32, 4, 2), Blocks(64, 32, 8, 2), Blocks(32, 64, 4, 2)),
        64: Tuning(Blocks(64, 32, 8, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2)),
        128: Tuning(Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2)),
    },
}


def tuning(head_dim: int, dtype: Any, compute_capability: tuple[int, int]) -> Tuning:
    """The blocks for a head width and dtype on a GPU."""
    itemsize = jnp.dtype(dtype).itemsize
    rows = [at for at, size in _TUNING if size == itemsize and at <= compute_capability]
    return _TUNING[max(rows), itemsize][head_dim]


def refusal(q: jax.Array, k: jax.Array) -> str:
    """Why these shapes cannot be run; "" where they can."""
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim {q.shape[-1]} is not one of {HEAD_DIMS}"
    if q.dtype != k.dtype or str(q.dtype) not in DTYPES:
        return f"dtypes {q.dtype} and {k.dtype} are not one and the same of {', '.join(DTYPES)}"
    return ""


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    segment_ids: jax.Array | None,
    blocks: Tuning | None = None,
) -> jax.Array:
    """Attention of a training pass; shapes and meaning as in `api.attention`.

    Args:
      q, k, v, causal, segment_ids: as there; `refusal` tells which are not covered.
      blocks: how the kernels are cut; None: as tuned for the target.
    """
    assert not refusal(q, k), refusal(q, k)
    here = target.current()
    blocks = blocks or tuning(q.shape[-1], q.dtype, here.compute_capability)
    S, T = q.shape[1], k.shape[1]
    # Padded rows and keys belong to no segment of the others. On CPU the kernels are interpreted.
    static = Static(causal, T, blocks, interpret=here.platform == "cpu")
    q, k, v = (_pad(x, length) for x, length in zip((q, k, v), static.padded(S), strict=True))
    segments = None
    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)
        rows, keys = q.shape[1], k.shape[1]
        segments = _pad(segment_ids, rows, -1), _pad(segment_ids, keys, -2)
    return _flash(q, k, v, segments, static)[:, :S]


def _pad(x: jax.Array, length: int, value: int = 0) -> jax.Array:
    missing = length - x.shape[1]
    if not missing:
        return x
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), constant_values=value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, segments, static):
    return kernels.forward(q, k, v, segments, static)[0]


def _forward_rule(q, k, v, segments, static):
    out, lse = kernels.forward(q, k, v, segments, static)
    out = checkpoint_name(out, "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segments, out, lse)


def _backward_rule(static, residuals, dout):
    q, k, v, segments, out, lse = residuals
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)  # (B, S, N)
    delta = delta.transpose(0, 2, 1)
    dq = kernels.dq(q, k, v, dout, lse, delta, segments, static)
    dk, dv = kernels.dkv(q, k, v, dout, lse, delta, segments, static)
    return dq, dk, dv, None


_flash.defvjp(_forward_rule, _backward_rule)
