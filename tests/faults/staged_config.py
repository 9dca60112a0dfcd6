"""tiny_debug in three stages: code alone, text coming in slowly, and batches of twice the size."""

from configs import tiny_debug
from tinyllama_jax.config import stage


def get_config():
    config = tiny_debug.get_config()
    config.stages.stage1 = stage(train_tokens=15 * 512, weights="code:1")
    config.stages.stage2 = stage(
        train_tokens=15 * 512, weights="code:1,text:1", ramp_tokens=8 * 512, schedule="linear",
        learning_rate=5e-3, min_learning_rate=1e-3, warmup_steps=2,
    )  # fmt: skip
    config.stages.stage3 = stage(train_tokens=5 * 1024, global_batch_tokens=1024)
    return config
