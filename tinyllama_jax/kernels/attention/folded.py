"""Causal attention for XLA:CPU: heads folded into the batch, query blocks, one saved output.

XLA:CPU runs a batched matmul well only where each matrix is contiguous, so heads move next to the
batch before anything else: q becomes `(B*K, G, S, H)`, k and v `(B*K, S, H)`. Each of the B*K
entries is one small causal attention, run in query blocks whose key range ends at the block's last
row, so that the masked half of the score matrix is never computed (but for the diagonal blocks).
The backward pass recomputes the scores from the saved output and log-sum-exp, as FlashAttention-2
does (arXiv 2307.08691, algorithm 2).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tinyllama_jax.kernels.attention.reference import MASKED

QUERY_BLOCK = 128


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, segment_ids: jax.Array | None
) -> jax.Array:
    """Causal self-attention; shapes and meaning as in `api.attention`."""
    B, S, N, H = q.shape
    K = k.shape[2]
    G = N // K
    q = q.reshape(B, S, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B * K, G, S, H)
    k = k.transpose(0, 2, 1, 3).reshape(B * K, S, H)
    v = v.transpose(0, 2, 1, 3).reshape(B * K, S, H)
    segments = None if segment_ids is None else jnp.repeat(segment_ids, K, axis=0)  # (B*K, S)
    out = _folded(q * H**-0.5, k, v, segments)
    return out.reshape(B, K, G, S, H).transpose(0, 3, 1, 2, 4).reshape(B, S, N, H)


@jax.custom_vjp
def _folded(q, k, v, segments):
    return _forward(q, k, v, segments)[0]


def _blocks(S: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERY_BLOCK, S)) for start in range(0, S, QUERY_BLOCK)]


def _bias(start: int, stop: int, segments: jax.Array | None) -> jax.Array:
    """0 where a query of rows start:stop sees a key of 0:stop, a large negative elsewhere."""
    seen = jnp.arange(stop)[None, :] <= jnp.arange(start, stop)[:, None]
    if segments is not None:
        seen &= segments[start:stop, None] == segments[None, :stop]
    return jnp.where(seen, 0.0, MASKED).astype(jnp.float32)


def _scores(q, k, bias):
    """`(G, s, H)` x `(t, H)` -> `(G, s, t)` float32; one matmul over the whole group."""
    G, s, H = q.shape
    scores = jnp.matmul(q.reshape(G * s, H), k.T, preferred_element_type=jnp.float32)
    return scores.reshape(G, s, -1) + bias


def _forward(q, k, v, segments):
    S = q.shape[2]

    def one(operands):
        q, k, v, *rest = operands
        segment = rest[0] if rest else None
        outs, lses = [], []
        for start, stop in _blocks(S):
            scores = _scores(q[:, start:stop], k[:stop], _bias(start, stop, segment))
            largest = scores.max(axis=-1, keepdims=True)
            weights = jnp.exp(scores - largest)
            total = weights.sum(axis=-1, keepdims=True)
            G, s, t = weights.shape
            out = jnp.matmul(weights.astype(v.dtype).reshape(G * s, t), v[:stop])
            outs.append(out.reshape(G, s, -1) / total)
            lses.append(largest + jnp.log(total))
        return jnp.concatenate(outs, axis=1).astype(v.dtype), jnp.concatenate(lses, axis=1)

    return jax.lax.map(one, (q, k, v) if segments is None else (q, k, v, segments))


def _forward_rule(q, k, v, segments):
    out, lse = _forward(q, k, v, segments)
    out = checkpoint_name(out, "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segments, out, lse)


def _backward_rule(residuals, dout):
    q, k, v, segments, out, lse = residuals
    S = q.shape[2]

    def one(operands):
        q, k, v, out, lse, dout, *rest = operands
        segment = rest[0] if rest else None
        delta = (out * dout).astype(jnp.float32).sum(axis=-1, keepdims=True)  # (G, S, 1)
        dqs = []
        dk, dv = jnp.zeros_like(k), jnp.zeros_like(v)
        for start, stop in _blocks(S):
            rows = slice(start, stop)
            scores = _scores(q[:, rows], k[:stop], _bias(start, stop, segment))
            G, s, t = scores.shape
            p = jnp.exp(scores - lse[:, rows])
            dout_rows = dout[:, rows].reshape(G * s, -1)
            dp = jnp.matmul(dout_rows, v[:stop].T, preferred_element_type=jnp.float32)
            ds = (p * (dp.reshape(G, s, t) - delta[:, rows])).astype(q.dtype).reshape(G * s, t)
            dv = dv.at[:stop].add(p.astype(v.dtype).reshape(G * s, t).T @ dout_rows)
            dk = dk.at[:stop].add(ds.T @ q[:, rows].reshape(G * s, -1))
            dqs.append((ds @ k[:stop]).reshape(G, s, -1))
        return jnp.concatenate(dqs, axis=1), dk, dv

    operands = (q, k, v, out, lse, dout)
    return *jax.lax.map(one, operands if segments is None else (*operands, segments)), None


_folded.defvjp(_forward_rule, _backward_rule)
