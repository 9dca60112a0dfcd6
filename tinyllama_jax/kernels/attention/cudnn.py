"""Attention by NVIDIA's cuDNN, through jax."""

from __future__ import annotations

from typing import Any

import jax

DTYPES = ("bfloat16", "float16")


def is_forward(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint` that saves what the forward pass computes.

    jax gives its results no names, so the operation itself is recognised; what this does not find
    is computed twice.
    """
    return primitive.name == "dot_product_attention_fwd_wrapper"


def covers_width(head_dim: int) -> bool:
    """Whether it has a form for heads of that width."""
    return head_dim <= 128 and head_dim % 8 == 0


def refusal(q: jax.Array, k: jax.Array, segment_ids: jax.Array | None) -> str:
    """Why these shapes cannot be run; "" where they can."""
    if q.dtype != k.dtype or str(q.dtype) not in DTYPES:
        return f"dtypes {q.dtype} and {k.dtype} are not one and the same of {', '.join(DTYPES)}"
    H = q.shape[-1]
    if not covers_width(H):
        return f"head_dim {H} is not a multiple of 8 up to 128"
    if q.shape[1] % 2 or k.shape[1] % 2:
        return f"of {q.shape[1]} queries and {k.shape[1]} keys neither number may be odd"
    if segment_ids is not None:
        return "segment_ids would become a bias of the size of the score matrix"
    return ""


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    """Attention of a training pass; shapes and meaning as in `api.attention`."""
    assert not refusal(q, k, None), refusal(q, k, None)
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
