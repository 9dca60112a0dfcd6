"""The compiled half of generation: prompts into the cache, then one token per row at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.config import SamplingConfig
from tinyllama_jax.inference.sampling import row_keys, sample
from tinyllama_jax.model.cache import KVCache
from tinyllama_jax.model.llama import Llama, Params

# Steps per round trip to the device. More hide the host's part better, and are wasted where a text
# ends inside them.
_STEPS = 8
# Prompts are padded to a power of two from here on, so that few shapes are compiled.
_SHORTEST_BUCKET = 16


@flax.struct.dataclass
class _State:
    """What one decode step hands to the next.

    Attributes:
      cache: keys and values of each row's text but its last token.
      tokens: `(B,)` int32, each row's last token.
      keys: `(B,)`, each row's random key.
      drawn: `(B,)` int32, tokens drawn so far.
      seen: `(B, V)` bool, the tokens of each row's text; None without a repetition penalty.
    """

    cache: KVCache
    tokens: jax.Array
    keys: jax.Array
    drawn: jax.Array
    seen: jax.Array | None


def draw(
    model: Llama,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    seeds: Sequence[int],
) -> Iterator[np.ndarray]:
    """Continues prompts of any lengths together; a row's tokens do not depend on the others.

    Args:
      model, params: the model.
      prompts: B lists of ids, none empty.
      sampling: the settings; at most `max_new_tokens` are drawn per row.
      seeds: B seeds, one per row.

    Yields:
      `(B,)` int32, the next token of every row. Rows know no end: the caller stops listening.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), _bucket(lengths.max())), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    limit = sampling.max_new_tokens
    traced = _traced(sampling)
    state, steps = _prefill(
        model, params, tokens, lengths, row_keys(seeds), traced, _bucket(lengths.max() + limit)
    )
    while limit > 0:
        ready, limit = steps, limit - len(steps)
        if limit > 0:  # the device goes on while the caller reads what is ready
            state, steps = _decode(model, params, state, traced)
        yield from np.asarray(ready)[: len(ready) + min(limit, 0)]


def compile_for(
    model: Llama, params: Params, rows: int, prompt_tokens: int, sampling: SamplingConfig
) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """The two programs that `draw` runs for `rows` prompts of a length: prefill and decoding."""
    lengths = np.full(rows, prompt_tokens, np.int32)
    tokens = np.zeros((rows, _bucket(prompt_tokens)), np.int32)
    traced = _traced(sampling)
    capacity = _bucket(prompt_tokens + sampling.max_new_tokens)
    prefill = _prefill.lower(
        model, params, tokens, lengths, row_keys(range(rows)), traced, capacity
    )
    state, _ = prefill.out_info
    return prefill.compile(), _decode.lower(model, params, state, traced).compile()


def _traced(sampling: SamplingConfig) -> SamplingConfig:
    """What of the settings the compiled program depends on; the rest must not compile it anew."""
    if sampling.temperature == 0:
        penalty = sampling.repetition_penalty
        sampling = SamplingConfig(temperature=0.0, repetition_penalty=penalty)
    return dataclasses.replace(sampling, prompt="", max_new_tokens=0, seed=0)


@functools.partial(jax.jit, static_argnames=("model", "sampling", "capacity"))
def _prefill(
    model: Llama,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    sampling: SamplingConfig,
    capacity: int,
) -> tuple[_State, jax.Array]:
    """Reads right-padded prompts `(B, S)` into a cache of that capacity; draws one token per row.

    Padding writes keys too, but lengths are set to the true ones, and what lies past a row's length
    is never attended to and later overwritten.
    """
    B, S = tokens.shape
    empty = KVCache.empty(model.config, B, capacity, model.compute_dtype)
    hidden, cache = model.apply(params, tokens, cache=empty)
    assert cache is not None  # since one was given
    last = hidden[jnp.arange(B), lengths - 1]  # (B, D)
    seen = None
    if sampling.repetition_penalty != 1:
        padding = jnp.arange(S) >= lengths[:, None]
        seen = _mark(jnp.zeros((B, model.config.vocab_size), bool),
                     jnp.where(padding, model.config.vocab_size, tokens))  # fmt: skip
    cache = dataclasses.replace(cache, lengths=lengths)
    state = _State(cache, tokens[:, 0], keys, jnp.zeros(B, int), seen)
    state = _next(model, params, state, last, sampling)
    return state, state.tokens[None]


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames=("state",))
def _decode(
    model: Llama, params: Params, state: _State, sampling: SamplingConfig
) -> tuple[_State, jax.Array]:
    """Draws `_STEPS` more tokens per row: the new state and `(_STEPS, B)` int32."""

    def step(state: _State, _):
        hidden, cache = model.apply(params, state.tokens[:, None], cache=state.cache)
        assert cache is not None  # since one was given
        state = dataclasses.replace(state, cache=cache)
        state = _next(model, params, state, hidden[:, 0], sampling)
        return state, state.tokens

    return jax.lax.scan(step, state, length=_STEPS)


def _next(
    model: Llama, params: Params, state: _State, hidden: jax.Array, sampling: SamplingConfig
) -> _State:
    """The state after drawing one token per row from the last hidden `(B, D)`."""
    logits = model.logits(params, hidden)
    tokens = sample(logits, sampling, state.keys, state.drawn, state.seen)
    seen = None if state.seen is None else _mark(state.seen, tokens[:, None])
    return dataclasses.replace(state, tokens=tokens, drawn=state.drawn + 1, seen=seen)


def _mark(seen: jax.Array, tokens: jax.Array) -> jax.Array:
    """Sets seen `(B, V)` at tokens `(B, S)`; ids past V are passed over."""
    return seen.at[jnp.arange(seen.shape[0])[:, None], tokens].set(True, mode="drop")


def _bucket(length: int) -> int:
    return max(_SHORTEST_BUCKET, 1 << (int(length) - 1).bit_length())
