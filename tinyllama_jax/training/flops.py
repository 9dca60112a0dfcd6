"""Floating-point operations per token by the two conventions of MFU."""

from __future__ import annotations

from tinyllama_jax.config import ModelConfig
from tinyllama_jax.model.llama import parameter_count


def palm_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs per token by PaLM's count: `6 * params + 12 * L * N * H * S`.

    It counts the embedding table and the masked half of attention (arXiv 2204.02311, appendix B);
    TinyLlama's own figures use it.
    """
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * seq_len
    return 6 * parameter_count(config) + attention


def causal_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs per token that the mathematics needs: matmul params and half of attention."""
    c = config
    per_layer = (
        2 * c.d_model * c.num_heads * c.head_dim
        + 2 * c.d_model * c.num_kv_heads * c.head_dim
        + 3 * c.d_model * c.d_ff
    )
    matmul_params = c.num_layers * per_layer + c.d_model * c.vocab_size
    return 6 * matmul_params + 6 * c.num_layers * c.num_heads * c.head_dim * seq_len
