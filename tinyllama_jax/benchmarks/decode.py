"""Greedy decoding with a key/value cache: ours beside Hugging Face's `generate` under torch.

Random weights of a preset, the same for all, in the compute dtype; every row decodes the same
number of tokens and none ends early. Before anything is timed, each token that a contender chose
must be the likeliest, or within rounding of it, after all tokens before it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.benchmarks.memory import with_torch_peak_bytes
from tinyllama_jax.benchmarks.rounds import attempt, interleave, ratio
from tinyllama_jax.benchmarks.torch_llama import torch_llama
from tinyllama_jax.config import ModelConfig, SamplingConfig
from tinyllama_jax.inference import decoding
from tinyllama_jax.model.llama import Llama, Params, parameter_count
from tinyllama_jax.planning.compile import peak_bytes_of

OURS = "ours"
# What rounding may do to the likeliest tokens' logits, in standard deviations of all logits.
_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}


def compare(
    model: ModelConfig, *, rows: int, prompt_tokens: int, new_tokens: int, rounds: int,
    against_torch: bool, bandwidth: float = 0.0,
) -> tuple[list[dict[str, Any]], dict[str, str]]:  # fmt: skip
    """Times `new_tokens` of each of `rows` rows, the prompt's prefill included.

    Args:
      model: the shape.
      rows, prompt_tokens, new_tokens: of the batch.
      rounds: how often all take their turn.
      against_torch: Hugging Face's Llama takes part.
      bandwidth: of the device's memory in bytes/s; 0: not known, and no bound is given.

    Returns:
      A row per contender: tokens/s of all rows (median, least, most), how many times faster ours
      is, bytes of memory at its fullest moment (None: nothing tells), and where the bandwidth is
      known the share of the bound that it sets; and by name, why a contender is absent.

    Raises:
      ValueError: a contender chose tokens that are not the likeliest.
    """
    llama = Llama(model)
    params = jax.jit(llama.init)(jax.random.key(0))
    weights = jax.device_get(params) if against_torch else {}
    dtype = llama.compute_dtype
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    prompts = np.random.default_rng(0).integers(3, model.vocab_size, (rows, prompt_tokens))
    contenders: dict[str, Callable[[], np.ndarray]] = {
        OURS: functools.partial(_ours, llama, params, prompts.tolist(), new_tokens)
    }
    absent: dict[str, str] = {}
    if against_torch:
        in_torch = functools.partial(_in_torch, model, weights, prompts, new_tokens, str(dtype))
        call = attempt("Hugging Face", in_torch, absent)
        if call is not None:
            contenders["Hugging Face"] = call
    peak_bytes = {OURS: _peak_bytes(llama, params, rows, prompt_tokens, new_tokens)}
    for name, call in list(contenders.items()):
        measured = functools.partial(with_torch_peak_bytes, call)
        found = measured() if name == OURS else attempt(name, measured, absent)
        if found is None:
            del contenders[name]
            continue
        tokens, counted = found
        peak_bytes.setdefault(name, counted)
        shortfall = _shortfall(llama, params, prompts, tokens)
        if not shortfall < _TOLERANCES[str(dtype)]:
            raise ValueError(
                f"{name} chose a token whose logit is {shortfall:.2g} standard deviations below "
                f"the best; a speed would mean nothing"
            )
    timings = interleave(contenders, rounds=rounds, calls=1)
    bound = _bound(model, rows, prompt_tokens + new_tokens / 2, dtype.itemsize, bandwidth)
    result_rows = [
        {
            "contender": name,
            "tokens_per_second": rows * new_tokens / timing.median,
            "least": rows * new_tokens / max(timing.seconds),
            "most": rows * new_tokens / min(timing.seconds),
            "ours_is_faster_by": ratio(timings[OURS], timing),
            "peak_bytes": peak_bytes[name],
        }
        | ({"share_of_bound": rows * new_tokens / timing.median / bound} if bound else {})
        for name, timing in timings.items()
    ]
    return result_rows, absent


def _shortfall(llama: Llama, params: Params, prompts: np.ndarray, tokens: np.ndarray) -> float:
    """By how many standard deviations of its logits a chosen token is below the best, at most."""

    ids = jnp.asarray(np.concatenate([prompts, tokens], axis=1), jnp.int32)
    formula = Llama(dataclasses.replace(llama.config, attention="reference"))
    return float(_largest_shortfall(formula, params, ids, prompts.shape[1]))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _largest_shortfall(
    llama: Llama, params: Params, ids: jax.Array, prompt_tokens: int
) -> jax.Array:
    hidden, _ = llama.apply(params, ids)
    logits = llama.logits(params, hidden[:, prompt_tokens - 1 : -1])
    chosen = jnp.take_along_axis(logits, ids[:, prompt_tokens:, None], axis=-1)[..., 0]
    return jnp.max((logits.max(axis=-1) - chosen) / logits.std(axis=-1))


def _bound(model: ModelConfig, rows: int, context: float, itemsize: int, bandwidth: float) -> float:
    """Tokens/s at which reading weights and cache takes all of the memory's bandwidth."""
    # Of an embedding table only single rows are read, unless it is the output matrix too.
    table = 0 if model.tie_embeddings else model.vocab_size * model.d_model
    weights = (parameter_count(model) - table) * itemsize
    cache = 2 * model.num_layers * model.num_kv_heads * model.head_dim * itemsize * context
    return rows * bandwidth / (weights + rows * cache)


def _peak_bytes(
    llama: Llama, params: Params, rows: int, prompt_tokens: int, new_tokens: int
) -> int | None:
    settings = SamplingConfig(temperature=0.0, max_new_tokens=new_tokens)
    programs = decoding.compile_for(llama, params, rows, prompt_tokens, settings)
    peaks = [peak for peak in map(peak_bytes_of, programs) if peak is not None]
    return max(peaks, default=None)


def _ours(llama: Llama, params: Params, prompts: list, new_tokens: int) -> np.ndarray:
    settings = SamplingConfig(temperature=0.0, max_new_tokens=new_tokens)
    steps = decoding.draw(llama, params, prompts, settings, range(len(prompts)))
    return np.stack(list(steps), axis=1)


def _in_torch(
    model: ModelConfig, weights: dict[str, Any], prompts: np.ndarray, new_tokens: int, dtype: str
) -> Callable[[], np.ndarray]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    llama = torch_llama(model, weights).to(device, getattr(torch, dtype)).eval()
    ids = torch.from_numpy(prompts.astype(np.int64)).to(device)

    def run() -> np.ndarray:
        with torch.inference_mode():
            out = llama.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                min_new_tokens=new_tokens, max_new_tokens=new_tokens, eos_token_id=None,
            )  # fmt: skip
        return out[:, ids.shape[1] :].cpu().numpy()

    return run
