"""Linear output layer and cross-entropy together, without ever holding all logits.

Logits of a batch are tokens x vocabulary (16,384 x 32,000 float32 is 2 GiB), so both functions walk
over chunks of tokens. They differ in what the backward pass needs:

- `weighted_sum` returns one number, so its gradient is known up to a factor during the forward
  pass: dx and dW are made there, chunk by chunk, and the logits are computed once.
- `token_logps` returns one number per token, whose factors only the backward pass knows: it
  computes each chunk's logits again.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def default_chunk_tokens(platform: str | None = None) -> int:
    """Tokens per chunk that each backend runs well (512 was the fastest on CPU at V = 4096)."""
    return 512 if (platform or jax.default_backend()) == "cpu" else 4096


def weighted_sum(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum over tokens of the cross-entropy with each token's target.

    Args:
      hidden: `(B, S, D)`.
      unembedding: `(D, V)`; cast to hidden's dtype.
      targets: `(B, S)` int32.
      weights: `(B, S)` float32.
      z_loss: weight of the squared log-partition (arXiv 2204.02311, section 5).
      chunk_tokens: tokens whose logits exist at once; 0: `default_chunk_tokens()`.

    Returns:
      Two float32 scalars: `sum(w * (nll + z_loss * lse^2))` in nats, which is differentiable in
      hidden and unembedding, and `sum(w * nll)`, for reporting, which is not.
    """
    chunk = chunk_tokens or default_chunk_tokens()
    D = hidden.shape[-1]
    return _weighted_sum(
        hidden.reshape(-1, D), unembedding, targets.reshape(-1), weights.reshape(-1), z_loss, chunk
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _weighted_sum(x, unembedding, targets, weights, z_loss, chunk):
    matrix = unembedding.astype(x.dtype)

    def add_chunk(sums, rows):
        x, targets, weights = rows
        _, lse, nll = _chunk_losses(x, matrix, targets)
        total, nll_total = sums
        return (
            total + jnp.sum(weights * (nll + z_loss * lse**2)),
            nll_total + jnp.sum(weights * nll),
        ), None

    sums, _ = jax.lax.scan(add_chunk, (jnp.float32(0), jnp.float32(0)),
                           _split(chunk, x, targets, weights))  # fmt: skip
    return sums


def _weighted_sum_forward(x, unembedding, targets, weights, z_loss, chunk):
    matrix = unembedding.astype(x.dtype)

    def add_chunk(carry, rows):
        x, targets, weights = rows
        total, nll_total, dmatrix = carry
        logits, lse, nll = _chunk_losses(x, matrix, targets)
        total += jnp.sum(weights * (nll + z_loss * lse**2))
        nll_total += jnp.sum(weights * nll)
        # d nll / d logits = softmax - onehot;  d lse^2 / d logits = 2 lse softmax
        scale = weights * (1 + 2 * z_loss * lse)
        dx, dchunk = _chunk_gradients(x, matrix, logits, lse, targets, scale, weights)
        dmatrix += dchunk
        return (total, nll_total, dmatrix), dx

    zero = jnp.float32(0)
    (total, nll_total, dmatrix), dx = jax.lax.scan(
        add_chunk,
        (zero, zero, jnp.zeros(unembedding.shape, jnp.float32)),
        _split(chunk, x, targets, weights),
    )
    dx = dx.reshape(-1, x.shape[-1])[: x.shape[0]]
    return (total, nll_total), (dx, dmatrix.astype(unembedding.dtype))


def _weighted_sum_backward(z_loss, chunk, residuals, cotangents):
    dx, dmatrix = residuals
    factor = cotangents[0]
    return (dx * factor).astype(dx.dtype), (dmatrix * factor).astype(dmatrix.dtype), None, None


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


def token_logps(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, *, chunk_tokens: int = 0
) -> jax.Array:
    """Log-probability of each token's target: `(B, S)` float32, in nats.

    Args as for `weighted_sum`; differentiable in hidden and unembedding.
    """
    chunk = chunk_tokens or default_chunk_tokens()
    B, S, D = hidden.shape
    flat = _token_logps(hidden.reshape(-1, D), unembedding, targets.reshape(-1), chunk)
    return flat.reshape(B, S)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_logps(x, unembedding, targets, chunk):
    return _token_logps_forward(x, unembedding, targets, chunk)[0]


def _token_logps_forward(x, unembedding, targets, chunk):
    matrix = unembedding.astype(x.dtype)

    def chunk_losses(rows):
        x, targets = rows
        _, lse, nll = _chunk_losses(x, matrix, targets)
        return lse, -nll

    lse, logps = jax.lax.map(chunk_losses, _split(chunk, x, targets))
    count = x.shape[0]
    lse, logps = lse.reshape(-1)[:count], logps.reshape(-1)[:count]
    return logps, (x, unembedding, targets, lse)


def _token_logps_backward(chunk, residuals, dlogps):
    x, unembedding, targets, lse = residuals
    matrix = unembedding.astype(x.dtype)

    def add_chunk(dmatrix, rows):
        x, targets, lse, dlogps = rows
        logits = jnp.matmul(x, matrix, preferred_element_type=jnp.float32)
        # logp is minus nll, so both weights are minus its cotangent.
        dx, dchunk = _chunk_gradients(x, matrix, logits, lse, targets, -dlogps, -dlogps)
        return dmatrix + dchunk, dx

    dmatrix, dx = jax.lax.scan(
        add_chunk,
        jnp.zeros(unembedding.shape, jnp.float32),
        _split(chunk, x, targets, lse, dlogps),
    )
    dx = dx.reshape(-1, x.shape[-1])[: x.shape[0]]
    return dx, dmatrix.astype(unembedding.dtype), None


_token_logps.defvjp(_token_logps_forward, _token_logps_backward)


def _chunk_losses(x, matrix, targets):
    """logits `(C, V)` float32, log-partition `(C,)` and negative log-likelihood `(C,)`."""
    logits = jnp.matmul(x, matrix, preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return logits, lse, lse - picked


def _chunk_gradients(x, matrix, logits, lse, targets, softmax_weight, target_weight):
    """dx `(C, D)` and dW `(D, V)` float32 of a chunk's loss.

    Its dlogits are `softmax_weight * softmax - target_weight * onehot`; the weights are `(C,)`.
    """
    hit = targets[:, None] == jnp.arange(logits.shape[-1])[None, :]
    dlogits = jnp.exp(logits - lse[:, None]) * softmax_weight[:, None]
    dlogits = (dlogits - jnp.where(hit, target_weight[:, None], 0)).astype(x.dtype)
    dx = jax.lax.dot_general(dlogits, matrix, (((1,), (1,)), ((), ())))
    # Transposed apart: XLA:CPU runs a product that contracts axis 0 of both on one thread here.
    xt = jax.lax.optimization_barrier(x.T)
    return dx, jnp.matmul(xt, dlogits, preferred_element_type=jnp.float32)


def _split(chunk, *arrays):
    """Splits axis 0 into chunks, filled up with zeros (hence with weight 0)."""
    tokens = arrays[0].shape[0]
    chunk = min(chunk, tokens)
    missing = -tokens % chunk

    def split(array):
        padded = jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(-1, chunk, *array.shape[1:])

    return tuple(split(array) for array in arrays)


def reference_token_logps(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array
) -> jax.Array:
    """`token_logps` as the formula reads, with all logits at once."""
    logits = jnp.matmul(
        hidden, unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    logps = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]


def reference_weighted_sum(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """`weighted_sum` as the formula reads, with all logits at once."""
    logits = jnp.matmul(
        hidden, unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    lse = jax.nn.logsumexp(logits, axis=-1)
    nll = lse - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (nll + z_loss * lse**2)), jnp.sum(weights * nll)
