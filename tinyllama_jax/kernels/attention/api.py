"""One attention function for every implementation."""

from __future__ import annotations

from typing import Any

import jax

from tinyllama_jax.kernels import target
from tinyllama_jax.kernels.attention import cudnn, flash, folded, reference
from tinyllama_jax.parallel import mesh
from tinyllama_jax.parallel.mesh import P

IMPLEMENTATIONS = ("auto", "reference", "folded", "flash", "cudnn")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    q_positions: jax.Array | None = None,
    kv_lengths: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads.

    Args:
      q: `(B, S, N, H)` queries.
      k: `(B, T, K, H)` keys; query head n reads key head `n // (N // K)`.
      v: `(B, T, K, H)` values.
      causal: a query sees keys whose index is at most its position.
      q_positions: `(B, S)` int32 position of each query among the keys; None: `0 .. S-1`.
      kv_lengths: `(B,)` int32 number of valid keys per row; None: all T.
      segment_ids: `(B, S)` int32; a query sees keys of its own segment only (needs S == T).
      implementation: one of `IMPLEMENTATIONS`; `resolve` says what "auto" means.

    Returns:
      `(B, S, N, H)` in v's dtype. A query that sees no key returns finite, meaningless values.

    Raises:
      ValueError: shapes that do not fit, S != T under a causal mask without q_positions, or a case
        that the named implementation does not cover.
    """
    B, S, N, H = q.shape
    T, K = k.shape[1], k.shape[2]
    if k.shape != (B, T, K, H) or v.shape != k.shape or N % K:
        raise ValueError(
            f"attention shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}; "
            "expected (B, S, N, H), (B, T, K, H), (B, T, K, H) with K dividing N"
        )
    if causal and q_positions is None and S != T:
        raise ValueError(
            f"{S} queries against {T} keys under a causal mask: which key does a query stand at? "
            "pass q_positions"
        )
    if segment_ids is not None and not segment_ids.shape == (B, S) == (B, T):
        raise ValueError(
            f"segment_ids {segment_ids.shape} with {S} queries and {T} keys: one id per token of "
            f"rows that attend to themselves, (B, S) = {(B, S)} with S == T"
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f'attention implementation "{implementation}" is not one of '
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    training_pass = q_positions is None and kv_lengths is None
    if implementation == "auto":
        if training_pass and causal:
            implementation = resolve(q.dtype, H, S, segment_ids is not None)
        else:
            implementation = "reference"
    if implementation == "reference":
        return reference.attention(
            q, k, v, causal=causal, q_positions=q_positions, kv_lengths=kv_lengths,
            segment_ids=segment_ids,
        )  # fmt: skip
    reason = _refusal(implementation, q, k, causal, training_pass, segment_ids)
    if reason:
        raise ValueError(
            f'attention implementation "{implementation}" does not cover this: {reason}; '
            f'use "reference"'
        )
    mesh.require_divisible("batch", B, mesh.BATCH)
    mesh.require_divisible("model.num_kv_heads", K, (mesh.TENSOR,))

    def run(q, k, v, segment_ids):
        if implementation == "flash":
            return flash.attention(q, k, v, causal=causal, segment_ids=segment_ids)
        if implementation == "cudnn":
            return cudnn.attention(q, k, v, causal=causal)
        return folded.attention(q, k, v, segment_ids=segment_ids)

    heads, rows = P(mesh.BATCH, None, mesh.TENSOR), P(mesh.BATCH)
    return mesh.shard(run, (heads, heads, heads, rows), heads)(q, k, v, segment_ids)


def _refusal(
    implementation: str,
    q: jax.Array,
    k: jax.Array,
    causal: bool,
    training_pass: bool,
    segment_ids: jax.Array | None,
) -> str:
    """Why an implementation cannot run this; "" where it can."""
    if not training_pass:
        return "q_positions and kv_lengths belong to decoding"
    if implementation == "flash":
        return flash.refusal(q, k)
    if implementation == "cudnn":
        return cudnn.refusal(q, k, segment_ids)
    return "" if causal else "causal=False"


def resolve(dtype: Any, head_dim: int, seq_len: int, has_segments: bool) -> str:
    """What "auto" stands for in a causal training pass.

    On CPU `folded`. On GPUs since Ampere `cudnn`, or `flash` for what that does not cover:
    segments, float32 and odd lengths. Elsewhere, and for head widths that neither has a form for,
    `reference`.
    """
    here = target.current()
    if here.platform == "cpu":
        return "folded"
    if here.compute_capability < (8, 0):
        return "reference"
    covered = str(dtype) in cudnn.DTYPES and seq_len % 2 == 0 and not has_segments
    if covered and cudnn.covers_width(head_dim):
        return "cudnn"
    return "flash" if head_dim in flash.HEAD_DIMS else "reference"
