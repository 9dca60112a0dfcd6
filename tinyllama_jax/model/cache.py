"""The key/value cache as an explicit argument and result."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from tinyllama_jax.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far.

    Attributes:
      k, v: `(L, B, T, K, H)` in the compute dtype; entries at and past a row's length are unused.
      lengths: `(B,)` int32, tokens held per row; each row writes at its own.
    """

    k: jax.Array
    v: jax.Array
    lengths: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, B: int, T: int, dtype: jnp.dtype) -> KVCache:
        """A cache for B rows of up to T tokens."""
        shape = (config.num_layers, B, T, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(B, jnp.int32))


def write(entries: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Writes new `(B, S, K, H)` into entries `(B, T, K, H)` at positions `(B, S)`.

    Positions at or past T are dropped.
    """
    rows = jnp.arange(entries.shape[0])[:, None]
    return entries.at[rows, positions].set(new.astype(entries.dtype), mode="drop")
