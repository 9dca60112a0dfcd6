"""Rows of the embedding table, with a gradient that is the same to the bit every time.

A token that stands in a batch more than once gets the sum of its rows' gradients. A scatter on a
GPU adds them by atomics, in any order; told to be deterministic, XLA instead sorts every element of
them (33.5 million for 16,384 tokens of 2,048). Here the tokens are sorted, rows of equal tokens
summed by matrix products, and each row of the result written once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from tinyllama_jax.kernels import target
from tinyllama_jax.parallel import mesh
from tinyllama_jax.parallel.mesh import P

_TABLE = P(mesh.TENSOR, "fsdp")  # (V, D)
_ROWS = P(mesh.BATCH)  # (B, S) and (B, S, D)
_BLOCK = 128  # sorted rows that one product sums


def embed(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of table `(V, D)` at tokens `(B, S)` int32: `(B, S, D)` in dtype.

    Raises:
      ValueError: a mesh is set over which B, V or D do not divide.
    """
    mesh.require_divisible("batch", tokens.shape[0], mesh.BATCH)
    mesh.require_divisible("model.vocab_size", table.shape[0], (mesh.TENSOR,))
    mesh.require_divisible("model.d_model", table.shape[1], ("fsdp",))
    return _embed(table, tokens, jnp.dtype(dtype), table.dtype, table.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _embed(table, tokens, dtype, table_dtype, vocab_size):
    def local(table, tokens):
        if mesh.local_size("fsdp") > 1:
            table = mesh.gather(table.astype(dtype), 1)  # (V / tensor, D), half the bytes
        if mesh.local_size(mesh.TENSOR) == 1:
            return jnp.take(table, tokens, axis=0, mode="clip").astype(dtype)
        rows = _own_rows(tokens, table.shape[0])
        x = jnp.take(table, rows, axis=0, mode="fill", fill_value=0).astype(dtype)
        return jax.lax.psum(x, mesh.TENSOR)  # all but one of its terms are 0

    return mesh.shard(local, (_TABLE, _ROWS), _ROWS)(table, tokens)


def _forward(table, tokens, *static):
    return _embed(table, tokens, *static), tokens


def _backward(dtype, table_dtype, vocab_size, tokens, dx):
    def local(tokens, dx):
        own = vocab_size // mesh.local_size(mesh.TENSOR)
        rows = tokens.reshape(-1)
        if mesh.local_size(mesh.TENSOR) > 1:
            rows = _own_rows(rows, own)
        dx = dx.reshape(-1, dx.shape[-1])
        add = _scattered if target.current().platform == "cpu" else _sorted
        return mesh.sum_and_scatter(add(rows, dx, own), 1).astype(table_dtype)

    return mesh.shard(local, (_ROWS, _ROWS), _TABLE)(tokens, dx), None


_embed.defvjp(_forward, _backward)


def _own_rows(tokens: jax.Array, own: int) -> jax.Array:
    """Numbers of rows among the `own` of this device; `own` for those of others."""
    rows = tokens - jax.lax.axis_index(mesh.TENSOR) * own
    return jnp.where((rows >= 0) & (rows < own), rows, own)


def _scattered(rows: jax.Array, dx: jax.Array, count: int) -> jax.Array:
    """Sums of dx `(M, D)` by the numbers `(M,)` of their rows: `(count, D)` float32."""
    zero = jnp.zeros((count, dx.shape[1]), jnp.float32)
    return zero.at[rows].add(dx.astype(jnp.float32), mode="drop")


def _sorted(rows: jax.Array, dx: jax.Array, count: int) -> jax.Array:
    """As `_scattered`, in an order that only the tokens decide.

    Sorted, equal numbers stand in runs. Within a block a product with a matrix of 0 and 1 sums each
    run up to each place (exactly, but for the float32 sum); a run that goes on over blocks takes
    along what it had at the end of the block before.
    """
    missing = -rows.size % _BLOCK
    rows = jnp.pad(rows, (0, missing), constant_values=count)  # after all others
    rows, order = jax.lax.sort_key_val(rows, jnp.arange(rows.size))  # stable
    dx = jnp.take(dx, order, axis=0, mode="fill", fill_value=0).reshape(-1, _BLOCK, dx.shape[1])
    rows = rows.reshape(-1, _BLOCK)
    earlier = jnp.tril(rows[:, :, None] == rows[:, None, :])  # (blocks, at, of)
    sums = jnp.einsum(
        "cij,cjd->cid", earlier.astype(dx.dtype), dx, preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip
    last = jnp.concatenate([jnp.full(1, -1), rows[:-1, -1]])  # of the block before
    goes_on = rows == last[:, None]  # (blocks, _BLOCK)

    def join(before, after):
        """Blocks whose last run is theirs alone, or began in a block before."""
        (began_before, sums_before), (through, sums) = before, after
        return began_before & through, sums + jnp.where(through[:, None], sums_before, 0)

    _, ends = jax.lax.associative_scan(join, (goes_on[:, -1], sums[:, -1]))  # (blocks, D)
    carried = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    sums += jnp.where(goes_on[:, :, None], carried[:, None, :], 0)

    rows, sums = rows.reshape(-1), sums.reshape(-1, dx.shape[-1])
    is_whole = jnp.append(rows[1:] != rows[:-1], True)
    # The last of a run has its whole sum; the others go nowhere, each to a place of its own.
    nowhere = count + 1 + jnp.arange(rows.size)
    zero = jnp.zeros((count, dx.shape[-1]), jnp.float32)
    return zero.at[jnp.where(is_whole, rows, nowhere)].set(sums, mode="drop", unique_indices=True)
