"""Model shapes with names."""

from __future__ import annotations

from tinyllama_jax.config import ModelConfig

PRESETS: dict[str, ModelConfig] = {
    # The paper's model: 1,100,048,384 parameters.
    "tinyllama_1b": ModelConfig(),
    "tinyllama_120m": ModelConfig(num_layers=12, d_model=768, num_heads=12, d_ff=2048),
    "quickstart": ModelConfig(
        vocab_size=4096,
        num_layers=4,
        d_model=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        d_ff=352,
        max_seq_len=256,
        scan_unroll=0,
    ),
    "tiny_debug": ModelConfig(
        vocab_size=4096,
        num_layers=2,
        d_model=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        d_ff=176,
        max_seq_len=64,
        scan_unroll=0,
    ),
}
