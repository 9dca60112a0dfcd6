"""Linear output layer and cross-entropy together, without ever holding all logits.

Logits of a batch are tokens x vocabulary (16,384 x 32,000 float32 is 2 GiB), so both functions walk
over chunks of tokens. They differ in what the backward pass needs:

- `weighted_sum` returns one number, so its gradient is known up to a factor during the forward
  pass: dx and dW are made there, chunk by chunk, and the logits are computed once.
- `token_logps` returns one number per token, whose factors only the backward pass knows: it
  computes each chunk's logits again.

Under a mesh each device walks over its own tokens and its own part of the vocabulary. The output
matrix is gathered over `fsdp` once, ahead of the loop and already in the compute dtype, and dW,
summed in float32, is reduce-scattered once behind it; in the loop only numbers per token travel.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from tinyllama_jax.kernels import target
from tinyllama_jax.parallel import mesh
from tinyllama_jax.parallel.mesh import P

_MATRIX = P("fsdp", mesh.TENSOR)  # (D, V)
_ROWS = P(mesh.BATCH)  # (B, S) and (B, S, D)


def default_chunk_tokens() -> int:
    """Tokens per chunk that the target runs well.

    On CPU 512 was the fastest at V = 4096. On GPUs 1024: at 16,384 tokens, D = 2048 and V = 32,000
    the compiler then holds 316 MiB beside dx and dW (4,000 with all logits at once, 508 with 2048);
    a smaller chunk reads and writes the float32 dW more often. Not yet chosen by time.
    """
    return 512 if target.current().platform == "cpu" else 1024


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
      chunk_tokens: tokens whose logits exist at once on a device; 0: `default_chunk_tokens()`.

    Returns:
      Two float32 scalars: `sum(w * (nll + z_loss * lse^2))` in nats, which is differentiable in
      hidden and unembedding, and `sum(w * nll)`, for reporting, which is not.

    Raises:
      ValueError: a mesh is set over which B, D or V do not divide.
    """
    _check(hidden, unembedding)
    chunk = chunk_tokens or default_chunk_tokens()
    return _weighted_sum(hidden, unembedding, targets, weights, z_loss, chunk)


def _check(hidden: jax.Array, unembedding: jax.Array) -> None:
    mesh.require_divisible("batch", hidden.shape[0], mesh.BATCH)
    mesh.require_divisible("model.d_model", unembedding.shape[0], ("fsdp",))
    mesh.require_divisible("model.vocab_size", unembedding.shape[1], (mesh.TENSOR,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _weighted_sum(hidden, unembedding, targets, weights, z_loss, chunk):
    def local(hidden, unembedding, targets, weights):
        matrix = mesh.gather(unembedding.astype(hidden.dtype), 0)

        def add_chunk(sums, rows):
            x, targets, weights = rows
            _, lse, nll = _chunk_losses(x, matrix, targets)
            return _add_losses(sums, lse, nll, weights, z_loss), None

        zero = jnp.float32(0)
        sums, _ = jax.lax.scan(add_chunk, (zero, zero), _split(chunk, hidden, targets, weights))
        return _over_rows(sums)

    run = mesh.shard(local, (_ROWS, _MATRIX, _ROWS, _ROWS), (P(), P()))
    return run(hidden, unembedding, targets, weights)


def _weighted_sum_forward(hidden, unembedding, targets, weights, z_loss, chunk):
    def local(hidden, unembedding, targets, weights):
        matrix = mesh.gather(unembedding.astype(hidden.dtype), 0)

        def add_chunk(carry, rows):
            x, targets, weights = rows
            sums, dmatrix = carry
            logits, lse, nll = _chunk_losses(x, matrix, targets)
            sums = _add_losses(sums, lse, nll, weights, z_loss)
            # d nll / d logits = softmax - onehot;  d lse^2 / d logits = 2 lse softmax
            scale = weights * (1 + 2 * z_loss * lse)
            dx, dchunk = _chunk_gradients(x, matrix, logits, lse, targets, scale, weights)
            return (sums, dmatrix + dchunk), dx

        zero = jnp.float32(0)
        (sums, dmatrix), dx = jax.lax.scan(
            add_chunk,
            ((zero, zero), jnp.zeros(matrix.shape, jnp.float32)),
            _split(chunk, hidden, targets, weights),
        )
        return (
            _over_rows(sums),
            _joined(dx, hidden),
            mesh.sum_and_scatter(dmatrix, 0).astype(unembedding.dtype),
        )

    run = mesh.shard(local, (_ROWS, _MATRIX, _ROWS, _ROWS), ((P(), P()), _ROWS, _MATRIX))
    sums, dx, dmatrix = run(hidden, unembedding, targets, weights)
    return sums, (dx, dmatrix)


def _weighted_sum_backward(z_loss, chunk, residuals, cotangents):
    dx, dmatrix = residuals
    factor = cotangents[0]
    return (dx * factor).astype(dx.dtype), (dmatrix * factor).astype(dmatrix.dtype), None, None


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


def token_logps(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, *, chunk_tokens: int = 0
) -> jax.Array:
    """Log-probability of each token's target: `(B, S)` float32, in nats.

    Args and errors as for `weighted_sum`; differentiable in hidden and unembedding.
    """
    _check(hidden, unembedding)
    return _token_logps(hidden, unembedding, targets, chunk_tokens or default_chunk_tokens())


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_logps(hidden, unembedding, targets, chunk):
    return _token_logps_forward(hidden, unembedding, targets, chunk)[0]


def _token_logps_forward(hidden, unembedding, targets, chunk):
    def local(hidden, unembedding, targets):
        matrix = mesh.gather(unembedding.astype(hidden.dtype), 0)

        def chunk_losses(rows):
            x, targets = rows
            _, lse, nll = _chunk_losses(x, matrix, targets)
            return lse, -nll

        lse, logps = jax.lax.map(chunk_losses, _split(chunk, hidden, targets))
        return _joined(logps, targets), _joined(lse, targets)

    run = mesh.shard(local, (_ROWS, _MATRIX, _ROWS), (_ROWS, _ROWS))
    logps, lse = run(hidden, unembedding, targets)
    return logps, (hidden, unembedding, targets, lse)


def _token_logps_backward(chunk, residuals, dlogps):
    def local(hidden, unembedding, targets, lse, dlogps):
        matrix = mesh.gather(unembedding.astype(hidden.dtype), 0)

        def add_chunk(dmatrix, rows):
            x, targets, lse, dlogps = rows
            logits = jnp.matmul(x, matrix, preferred_element_type=jnp.float32)
            # logp is minus nll, so both weights are minus its cotangent.
            dx, dchunk = _chunk_gradients(x, matrix, logits, lse, targets, -dlogps, -dlogps)
            return dmatrix + dchunk, dx

        dmatrix, dx = jax.lax.scan(
            add_chunk,
            jnp.zeros(matrix.shape, jnp.float32),
            _split(chunk, hidden, targets, lse, dlogps),
        )
        return _joined(dx, hidden), mesh.sum_and_scatter(dmatrix, 0).astype(unembedding.dtype)

    run = mesh.shard(local, (_ROWS, _MATRIX, _ROWS, _ROWS, _ROWS), (_ROWS, _MATRIX))
    return *run(*residuals, dlogps), None


_token_logps.defvjp(_token_logps_forward, _token_logps_backward)


# What follows runs on one device, on its own rows and its own part of the vocabulary.


def _sharded(axis: str) -> bool:
    return mesh.local_size(axis) > 1


def _over_rows(sums):
    axes = tuple(axis for axis in mesh.BATCH if _sharded(axis))
    return jax.lax.psum(sums, axes) if axes else sums


def _joined(chunks, like):
    """Chunks put together again, shaped as `like`; dx is summed over the vocabulary's parts."""
    joined = chunks.reshape(-1, *chunks.shape[2:])[: like.shape[0] * like.shape[1]]
    if joined.ndim == 2 and _sharded(mesh.TENSOR):
        joined = jax.lax.psum(joined, mesh.TENSOR)
    return joined.reshape(like.shape)


def _add_losses(sums, lse, nll, weights, z_loss):
    total, nll_total = sums
    total += jnp.sum(weights * (nll + z_loss * lse**2))
    return total, nll_total + jnp.sum(weights * nll)


def _chunk_losses(x, matrix, targets):
    """logits `(C, V)` float32, log-partition `(C,)` and negative log-likelihood `(C,)`."""
    logits = jnp.matmul(x, matrix, preferred_element_type=jnp.float32)
    if not _sharded(mesh.TENSOR):
        lse = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return logits, lse, lse - picked
    largest = jax.lax.pmax(logits.max(axis=-1), mesh.TENSOR)
    total = jax.lax.psum(jnp.exp(logits - largest[:, None]).sum(axis=-1), mesh.TENSOR)
    lse = largest + jnp.log(total)
    picked = jnp.sum(jnp.where(_hits(targets, logits), logits, 0), axis=-1)
    return logits, lse, lse - jax.lax.psum(picked, mesh.TENSOR)


def _hits(targets, logits):
    """Where the target of each token stands among this device's part of the vocabulary."""
    first = 0
    if _sharded(mesh.TENSOR):
        first = jax.lax.axis_index(mesh.TENSOR) * logits.shape[-1]
    return targets[:, None] - first == jnp.arange(logits.shape[-1])[None, :]


def _chunk_gradients(x, matrix, logits, lse, targets, softmax_weight, target_weight):
    """dx `(C, D)` and dW `(D, V)` float32 of a chunk's loss.

    Its dlogits are `softmax_weight * softmax - target_weight * onehot`; the weights are `(C,)`.
    """
    dlogits = jnp.exp(logits - lse[:, None]) * softmax_weight[:, None]
    onehot = jnp.where(_hits(targets, logits), target_weight[:, None], 0)
    dlogits = (dlogits - onehot).astype(x.dtype)
    dx = jax.lax.dot_general(dlogits, matrix, (((1,), (1,)), ((), ())))
    # Transposed apart: XLA:CPU runs a product that contracts axis 0 of both on one thread here.
    xt = jax.lax.optimization_barrier(x.T) if target.current().platform == "cpu" else x.T
    return dx, jnp.matmul(xt, dlogits, preferred_element_type=jnp.float32)


def _split(chunk, *arrays):
    """Joins B and S, and splits them into chunks filled up with zeros (hence with weight 0)."""
    tokens = arrays[0].shape[0] * arrays[0].shape[1]
    chunk = min(chunk, tokens)
    missing = -tokens % chunk

    def split(array):
        flat = array.reshape(tokens, *array.shape[2:])
        padded = jnp.pad(flat, [(0, missing)] + [(0, 0)] * (flat.ndim - 1))
        return padded.reshape(-1, chunk, *flat.shape[1:])

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
