"""Attention as the formula reads (arXiv 1706.03762, equation 1; grouped as in arXiv 2305.13245)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Large and finite: a row whose keys are all masked gives a mean of values, never NaN, and so do
# its gradients.
MASKED = -1e30


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    q_positions: jax.Array | None,
    kv_lengths: jax.Array | None,
    segment_ids: jax.Array | None,
) -> jax.Array:
    """See `api.attention`; the whole (S, T) score matrix is held in float32."""
    groups = q.shape[2] // k.shape[2]
    B, S, N, H = q.shape
    T = k.shape[1]
    q = q.reshape(B, S, N // groups, groups, H)
    scores = jnp.einsum("bskgh,btkh->bkgst", q, k, preferred_element_type=jnp.float32)
    scores = scores * H**-0.5
    mask = attention_mask(
        B, S, T, causal=causal, q_positions=q_positions, kv_lengths=kv_lengths,
        segment_ids=segment_ids,
    )  # fmt: skip
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, MASKED)
    lse = checkpoint_name(jax.nn.logsumexp(scores, axis=-1, keepdims=True), "attention_lse")
    probabilities = jnp.exp(scores - lse).astype(v.dtype)
    out = jnp.einsum("bkgst,btkh->bskgh", probabilities, v)  # (B, S, K, G, H)
    return checkpoint_name(out.reshape(B, S, N, H), "attention_out")


def attention_mask(
    B: int,
    S: int,
    T: int,
    *,
    causal: bool,
    q_positions: jax.Array | None,
    kv_lengths: jax.Array | None,
    segment_ids: jax.Array | None,
) -> jax.Array | None:
    """Which keys each query sees: bool `(B or 1, S, T)`, or None for all."""
    keys = jnp.arange(T)
    mask = None

    def both(a, b):
        return b if a is None else a & b

    if causal:
        queries = jnp.arange(S)[None] if q_positions is None else q_positions
        mask = both(mask, keys <= queries[:, :, None])
    if kv_lengths is not None:
        mask = both(mask, (keys < kv_lengths[:, None])[:, None, :])
    if segment_ids is not None:
        mask = both(mask, segment_ids[:, :, None] == segment_ids[:, None, :])
    return mask
