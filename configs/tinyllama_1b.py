"""TinyLlama-1.1B as published (arXiv 2401.02385): 3T tokens of SlimPajama and Starcoderdata.

Command:   python -m tinyllama_jax.train --config=configs/tinyllama_1b.py
               --config.data.sources.slimpajama.path=/data/SlimPajama-627B/train
               --config.data.sources.starcoder.path=/data/starcoderdata
               --config.data.tokenizer=/data/llama2/tokenizer.model
Hardware:  the paper: 16 A100-40G, 8 sequences of 2,048 tokens each at a time
Time:      the paper: 90 days at 24,000 tokens/s per GPU; not run with this code
Loss:      not run with this code
"""

import dataclasses

from tinyllama_jax.config import default_config, source
from tinyllama_jax.model.presets import PRESETS


def get_config():
    config = default_config()
    config.model.update(dataclasses.asdict(PRESETS["tinyllama_1b"]))
    # Without a loop over layers: nothing is copied into stacked arrays (launch/TUNING.md).
    config.model.scan_unroll = 0
    config.data.tokenizer = "data/tokenizer.model"  # Llama 2's, 32,000 pieces
    # Each subset, and each language, is a stream of its own, weighed by its tokens as published.
    config.data.sources.slimpajama = source(
        path="data/SlimPajama-627B/train", format="jsonl", weight=0.693584,
        subset_key="meta.redpajama_set_name", subsets="-RedPajamaGithub",
    )  # fmt: skip
    config.data.sources.starcoder = source(
        path="data/starcoderdata", format="parquet", text_key="content", weight=0.306416,
        subset_key="directory",
    )  # fmt: skip
    config.data.seq_len = 2048
    config.optimizer.update(
        learning_rate=4e-4, min_learning_rate=4e-5, schedule="cosine", warmup_steps=2000,
        beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, weight_decay_rule="all",
        grad_clip_norm=1.0,
    )  # fmt: skip
    # 1,430,512 steps of 1024 sequences.
    config.training.update(
        train_tokens=3_000_000_000_000, global_batch_tokens=1024 * 2048, micro_batch_size=8
    )
    config.evaluation.update(every_steps=5000, tokens=10_485_760)
    config.checkpoint.update(every_steps=1000, keep_last=3, milestone_tokens=100_000_000_000)
    return config
