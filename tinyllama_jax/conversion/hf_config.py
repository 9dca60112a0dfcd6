"""Hugging Face's config.json and our `ModelConfig`, each from the other."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from tinyllama_jax.config import ModelConfig

# Their name of each of our fields; what they mean when absent stands in `_DEFAULTS`.
_FIELDS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_REQUIRED = ("vocab_size", "num_layers", "d_model", "num_heads", "d_ff")
# transformers' LlamaConfig, version 5.23.
_DEFAULTS = {"max_seq_len": 2048, "norm_eps": 1e-6, "tie_embeddings": False}
_DEFAULT_ROPE_THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """The ids that begin and end a text, as a checkpoint declares them (none: empty, or None)."""

    bos: int | None
    eos: tuple[int, ...]


def read(directory: pathlib.Path) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face directory."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{directory} has no config.json: it is not a model directory") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object; download it again")
    return config


def to_model_config(theirs: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face Llama.

    Raises:
      ValueError: with everything in it that this package does not compute, or that is missing.
    """
    problems = _refusals(theirs)
    values: dict[str, Any] = {}
    for ours, name in _FIELDS.items():
        if theirs.get(name) is not None:
            values[ours] = theirs[name]
        elif ours in _DEFAULTS:
            values[ours] = _DEFAULTS[ours]
        elif ours in _REQUIRED:
            problems.append(f"{name} is missing")
    values["rope_theta"] = float(_rope_theta(theirs, problems))
    if problems:
        raise ValueError(
            "config.json describes a model that this package cannot load:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )
    values.setdefault("num_kv_heads", values["num_heads"])
    values.setdefault("head_dim", values["d_model"] // values["num_heads"])
    values["norm_eps"] = float(values["norm_eps"])
    return ModelConfig(**values)


def special_ids(theirs: Mapping[str, Any]) -> SpecialIds:
    """The BOS and EOS ids of a config.json."""
    eos = theirs.get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    return SpecialIds(bos=theirs.get("bos_token_id"), eos=tuple(eos))


def from_model_config(model: ModelConfig, dtype: str, ids: SpecialIds) -> dict[str, Any]:
    """The config.json of a model, as transformers writes it for a Llama.

    Raises:
      ValueError: transformers could not load such a model.
    """
    if model.d_model % model.num_heads:
        raise ValueError(
            f"model.d_model = {model.d_model} is not a multiple of model.num_heads = "
            f"{model.num_heads}: transformers refuses to load such a Llama"
        )
    theirs = {name: getattr(model, ours) for ours, name in _FIELDS.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **theirs,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        # transformers 5 reads rope_parameters, everything older the other two.
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "bos_token_id": ids.bos,
        "eos_token_id": _one_or_list(ids.eos),
        "torch_dtype": dtype,
        "use_cache": True,
    }


def generation_config(model: ModelConfig, ids: SpecialIds) -> dict[str, Any]:
    """The generation_config.json of a model."""
    return {
        "bos_token_id": ids.bos,
        "eos_token_id": _one_or_list(ids.eos),
        "max_length": model.max_seq_len,
    }


def _one_or_list(eos: tuple[int, ...]) -> int | list[int] | None:
    return list(eos) if len(eos) > 1 else eos[0] if eos else None


def _refusals(theirs: Mapping[str, Any]) -> list[str]:
    """What a config.json asks for that our Llama does not compute."""
    model_type, activation = theirs.get("model_type"), theirs.get("hidden_act", "silu")
    problems = []
    if model_type != "llama":
        problems.append(f'model_type is "{model_type}": only "llama" is implemented')
    if activation not in ("silu", "swish"):
        problems.append(f'hidden_act is "{activation}": only "silu" is implemented')
    for name in ("attention_bias", "mlp_bias"):
        if theirs.get(name):
            problems.append(f"{name} is true: our projections have no biases")
    if theirs.get("quantization_config"):
        method = theirs["quantization_config"].get("quant_method", "of an unnamed method")
        problems.append(
            f"quantization_config ({method}): the weights are quantised; take the float checkpoint"
        )
    for name in ("rope_scaling", "rope_parameters"):
        rope = theirs.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            problems.append(f'{name} is of type "{kind}": only unscaled rotary embedding is done')
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            problems.append(f"{name}.partial_rotary_factor: our rotary embedding turns whole heads")
    return problems


def _rope_theta(theirs: Mapping[str, Any], problems: list[str]) -> float:
    inside = (theirs.get("rope_parameters") or {}).get("rope_theta")
    outside = theirs.get("rope_theta")
    if inside is not None and outside is not None and inside != outside:
        problems.append(f"rope_theta is {outside}, but {inside} inside rope_parameters")
    found = inside if inside is not None else outside
    return _DEFAULT_ROPE_THETA if found is None else found
