"""One attention function for every implementation."""

from __future__ import annotations

import jax

from tinyllama_jax.kernels.attention import folded, reference

IMPLEMENTATIONS = ("auto", "reference", "folded")


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
    if segment_ids is not None and segment_ids.shape != (B, T):
        raise ValueError(f"segment_ids {segment_ids.shape} must be (B, S) = {(B, S)} with S == T")
    if implementation == "auto":
        implementation = resolve(q_positions is None and kv_lengths is None and causal)
    if implementation == "reference":
        return reference.attention(
            q, k, v, causal=causal, q_positions=q_positions, kv_lengths=kv_lengths,
            segment_ids=segment_ids,
        )  # fmt: skip
    if implementation == "folded":
        if q_positions is not None or kv_lengths is not None or not causal:
            raise ValueError(
                'attention implementation "folded" covers causal training passes only, not '
                'q_positions, kv_lengths or causal=False; use "reference"'
            )
        return folded.attention(q, k, v, segment_ids=segment_ids)
    raise ValueError(
        f'attention implementation "{implementation}" is not one of {", ".join(IMPLEMENTATIONS)}'
    )


def resolve(training_pass: bool, platform: str | None = None) -> str:
    """What "auto" stands for: `folded` for causal training passes on CPU, else `reference`."""
    platform = platform or jax.default_backend()
    return "folded" if training_pass and platform == "cpu" else "reference"
