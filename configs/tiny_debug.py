"""A 0.6M-parameter Llama for tests and for trying things: 50 steps, seconds.

Command:   python -m tinyllama_jax.train --config=configs/tiny_debug.py
Hardware:  1 CPU core
"""

import dataclasses

from tinyllama_jax.config import default_config, source
from tinyllama_jax.model.presets import PRESETS


def get_config():
    config = default_config()
    config.model.update(dataclasses.asdict(PRESETS["tiny_debug"]))
    config.data.sources.text = source(format="embedded", path="text", weight=0.7)
    config.data.sources.code = source(format="embedded", path="code", weight=0.3)
    config.data.seq_len = 64
    config.optimizer.update(learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=5)
    # Two micro-batches a step, so that accumulation is part of whatever is tried.
    config.training.update(train_tokens=512 * 50, global_batch_tokens=512, micro_batch_size=4)
    config.evaluation.update(every_steps=25, tokens=4096)
    config.checkpoint.update(every_steps=10, keep_last=2)
    config.logging.every_steps = 1
    config.sampling.update(prompt="def ", max_new_tokens=32)
    return config
