"""From logits to one token per row.

Each filter takes logits `(B, V)` and returns them with what it excludes at -inf, with the meaning
that Hugging Face's `generate` gives the same setting. `sample` applies them in its order: penalty,
temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tinyllama_jax.config import SamplingConfig
from tinyllama_jax.config_rules import sampling_problems


def check(settings: SamplingConfig) -> None:
    """Raises ValueError, with every setting that is out of range."""
    if problems := sampling_problems(settings):
        raise ValueError("sampling settings out of range: " + "; ".join(problems))


def row_keys(seeds: Sequence[int]) -> jax.Array:
    """One key per row `(B,)`, from the row's own seed."""
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def sample(
    logits: jax.Array,
    config: SamplingConfig,
    keys: jax.Array,
    index: jax.Array,
    seen: jax.Array | None = None,
) -> jax.Array:
    """Draws one token per row; a row's draw depends on its own logits, key and index only.

    Args:
      logits: `(B, V)` float32.
      config: the settings; temperature 0 takes the likeliest token.
      keys: `(B,)`, of `row_keys`.
      index: `(B,)` int32, how many tokens each row has drawn before.
      seen: `(B, V)` bool, the tokens of each row's text so far; needed for a repetition penalty.

    Returns:
      `(B,)` int32.
    """
    if config.repetition_penalty != 1:
        assert seen is not None, "a repetition penalty needs the tokens seen so far"
        logits = penalize_repetition(logits, seen, config.repetition_penalty)
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / config.temperature
    if config.top_k:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p > 0:
        logits = keep_min_p(logits, config.min_p)
    drawn = jax.vmap(lambda key, i, row: jax.random.categorical(jax.random.fold_in(key, i), row))
    return drawn(keys, index, logits).astype(jnp.int32)


def penalize_repetition(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Makes seen tokens less likely, for a penalty above 1 (arXiv 1909.05858, section 4.1).

    Positive logits are divided by the penalty and negative ones multiplied.
    """
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Keeps the k likeliest tokens, and those that equal the last of them."""
    lowest_kept = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return _exclude(logits, logits < lowest_kept)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Keeps the fewest likeliest tokens that reach probability p together (arXiv 1904.09751).

    Tokens that equal the last of them are kept too.
    """
    ranked = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # 0 for the likeliest
    lowest_kept = jnp.where(before < p, ranked, jnp.inf).min(axis=-1, keepdims=True)
    return _exclude(logits, logits < lowest_kept)


def keep_min_p(logits: jax.Array, min_p: float) -> jax.Array:
    """Keeps tokens at least min_p times as likely as the likeliest (arXiv 2407.01082)."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    return _exclude(logits, probabilities < min_p * probabilities.max(axis=-1, keepdims=True))


def _exclude(logits: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, -jnp.inf, logits)
