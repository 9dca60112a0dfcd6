"""Hugging Face's Llama under torch, with our weights: what others are measured by."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax

from tinyllama_jax.config import ModelConfig
from tinyllama_jax.conversion.names import entries
from tinyllama_jax.data.workers import available_cores


def torch_llama(model: ModelConfig, weights: dict[str, Any]) -> Any:
    """A `LlamaForCausalLM` in float32 on the CPU.

    Args:
      model: the shape.
      weights: our params, as numpy arrays.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(available_cores())
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size, hidden_size=model.d_model, intermediate_size=model.d_ff,
            num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads, head_dim=model.head_dim,
            max_position_embeddings=model.max_seq_len, rms_norm_eps=model.norm_eps,
            tie_word_embeddings=model.tie_embeddings, attn_implementation="sdpa",
        )
    )  # fmt: skip
    tensors = {}
    for entry in entries(model):
        leaf: Any = weights
        for key in entry.row.path.split("/"):
            leaf = leaf[key]
        tensors[entry.name] = torch.from_numpy(entry.take(leaf, model).copy())
    llama.load_state_dict(tensors, strict=not model.tie_embeddings)
    return llama


def require_torch(against: str) -> None:
    """Raises ValueError where there is no torch to compare with, or none for the same device."""
    for package in ("torch", "transformers")[: 2 if against == "hf" else 1]:
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"--against={against} needs {package}, which is not installed; run "
                f"pip install -e '.[parity]', or leave --against out"
            )
    import torch

    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise ValueError(
            f"jax runs on a GPU here but torch {torch.__version__} has none: a comparison would "
            f"mean nothing; install torch for CUDA, or leave --against out"
        )
