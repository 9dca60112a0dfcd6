"""Where documents begin inside a window, from its tokens alone; runs inside the train step.

A window is cut without regard to documents, so its first document has usually begun before it.
That piece is segment 0 and its positions count from the window's first token, as they would for a
document of its own: what came before cannot be attended to anyway.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def positions_and_segments(
    tokens: jax.Array, boundary: str, bos_id: int, eos_id: int
) -> tuple[jax.Array, jax.Array]:
    """What `Llama.apply` needs to keep documents apart: `positions` and `segment_ids` of tokens."""
    segments = segment_ids(tokens, boundary, bos_id, eos_id)
    return positions(segments), segments


def segment_ids(tokens: jax.Array, boundary: str, bos_id: int, eos_id: int) -> jax.Array:
    """Numbers the documents of each row.

    Args:
      tokens: `(B, S)` integers.
      boundary: how the stream marks documents (`data.boundary`). With "bos+eos" and "bos" a
        document begins at each BOS; with "eos" it begins after each EOS. EOS belongs to the
        document that it ends.
      bos_id, eos_id: the tokenizer's.

    Returns:
      `(B, S)` int32, not decreasing along S; equal ids are the same document.

    Raises:
      ValueError: an unknown boundary rule.
    """
    if boundary in ("bos+eos", "bos"):
        begins = tokens[:, 1:] == bos_id
    elif boundary == "eos":
        begins = tokens[:, :-1] == eos_id
    else:
        raise ValueError(f'data.boundary = "{boundary}" is not one of bos+eos, bos, eos')
    begins = jnp.pad(begins, ((0, 0), (1, 0)))  # segment 0 begins every row, at a boundary or not
    return jnp.cumsum(begins, axis=1, dtype=jnp.int32)


def positions(segment_ids: jax.Array) -> jax.Array:
    """Counts tokens from the beginning of each segment.

    Args:
      segment_ids: `(B, S)` int32, equal within a segment, segments contiguous.

    Returns:
      `(B, S)` int32, 0 at the first token of each segment.
    """
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    begins = jnp.pad(
        segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True
    )
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
