"""A 125M-parameter Llama in TinyLlama's proportions, to try a corpus or a change on one GPU.

Command:   python -m tinyllama_jax.train --config=configs/tinyllama_120m.py
               --config.data.sources.text.path="corpus/*.jsonl"
               --config.data.tokenizer=/data/llama2/tokenizer.model
Hardware:  meant for one GPU of 24 GB or more
Time:      not measured
Loss:      not measured
"""

import dataclasses

from tinyllama_jax.config import default_config, source
from tinyllama_jax.model.presets import PRESETS


def get_config():
    config = default_config()
    config.model.update(dataclasses.asdict(PRESETS["tinyllama_120m"]))
    config.data.tokenizer = "data/tokenizer.model"  # Llama 2's, 32,000 pieces
    config.data.sources.text = source(path="data/text")
    config.data.seq_len = 2048
    config.optimizer.update(learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=500)
    # 2.5B tokens: 20 per parameter (arXiv 2203.15556).
    config.training.update(
        train_tokens=2_500_000_000, global_batch_tokens=128 * 2048, micro_batch_size=8
    )
    config.evaluation.update(every_steps=500, tokens=2_097_152)
    config.checkpoint.update(every_steps=500, keep_last=2)
    return config
