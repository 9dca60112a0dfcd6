"""A 1.6M-parameter Llama on the text this machine already holds; nothing is downloaded.

Command:   python -m tinyllama_jax.train --config=configs/quickstart.py
Hardware:  2 CPU cores
"""

from tinyllama_jax.config import default_config, source


def get_config():
    config = default_config()
    config.model.update(
        vocab_size=4096, num_layers=4, d_model=128, num_heads=4, num_kv_heads=2, head_dim=32,
        d_ff=352, max_seq_len=256, scan_unroll=0,
    )  # fmt: skip
    # TinyLlama's mixture: 7 tokens of text to 3 of code.
    config.data.sources.text = source(format="embedded", path="text", weight=0.7)
    config.data.sources.code = source(format="embedded", path="code", weight=0.3)
    config.data.seq_len = 256
    config.optimizer.update(learning_rate=8e-3, min_learning_rate=8e-4, warmup_steps=50)
    config.training.update(train_tokens=1024 * 900, global_batch_tokens=1024, micro_batch_size=4)
    config.evaluation.update(every_steps=150, tokens=65536)
    config.checkpoint.update(every_steps=300, keep_last=2)
    config.sampling.prompt = "def "
    return config
