"""TinyLlama's published data defects at tiny size, beside the same run without them.

Command:   python -m tinyllama_jax.train --config=configs/tiny_history_ablation.py
               after python -m tinyllama_jax.data.history with the same --config;
               with :mended behind the file's name, the run without the defects
Hardware:  1 CPU core; notebooks/history.ipynb does it all and shows the difference
"""

import dataclasses

from tinyllama_jax.config import default_config, source
from tinyllama_jax.model.presets import PRESETS


def get_config(which: str = "published"):
    if which not in ("published", "mended"):
        raise ValueError(f'"{which}" is neither published nor mended')
    config = default_config()
    config.model.update(dataclasses.asdict(PRESETS["tiny_debug"]))
    config.data.sources.text = source(format="embedded", path="text")
    config.data.seq_len = 64
    config.optimizer.update(learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=20)
    config.training.update(train_tokens=1024 * 200, global_batch_tokens=1024, micro_batch_size=16)
    config.evaluation.update(every_steps=50, tokens=16_384)
    config.checkpoint.every_steps = 100
    config.logging.every_steps = 5
    if which == "published":
        # Documents do not end, and the learning rate does not fall; data/history.py does the rest.
        config.data.boundary = "bos"
        config.data.prepared = "prepared/published"
        config.optimizer.min_learning_rate = config.optimizer.learning_rate
    return config
