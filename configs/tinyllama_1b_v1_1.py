"""TinyLlama v1.1, Math&Code, after its model card: 2T tokens in three stages.

Command:   python -m tinyllama_jax.train --config=configs/tinyllama_1b_v1_1.py
               --config.data.sources.slimpajama.path=/data/SlimPajama-627B/train
               --config.data.sources.starcoder.path=/data/starcoderdata
               '--config.data.sources.proof_pile.path=/data/proof-pile-2/*/train/*.jsonl.zst'
               --config.data.tokenizer=/data/llama2/tokenizer.model
Hardware:  the card: A100-40G, 4 to a node; not how many
Time:      not run with this code
Loss:      not run with this code

The card tells of 1.5T tokens of SlimPajama alone; of 350B with text of a domain, whose share rises
on a straight line over the first 6B or so, to 75, 15 and 10%; of a cooldown of 150B in which the
batch grows from about 1.8M to 7.2M tokens while the cosine goes on. It does not give the exact
batch: those here are what passes of 8 sequences on 4, 8, 16, 28 or 56 GPUs divide.
"""

import dataclasses

from tinyllama_jax.config import default_config, source, stage
from tinyllama_jax.model.presets import PRESETS


def get_config():
    config = default_config()
    config.model.update(dataclasses.asdict(PRESETS["tinyllama_1b"]))
    # Without a loop over layers: nothing is copied into stacked arrays (launch/TUNING.md).
    config.model.scan_unroll = 0
    config.data.tokenizer = "data/tokenizer.model"  # Llama 2's, 32,000 pieces
    config.data.sources.slimpajama = source(
        path="data/SlimPajama-627B/train", format="jsonl", weight=75,
        subset_key="meta.redpajama_set_name",  # whole, GitHub included: the card leaves none out
    )  # fmt: skip
    config.data.sources.starcoder = source(
        path="data/starcoderdata", format="parquet", text_key="content", weight=15,
        subset_key="directory",
    )  # fmt: skip
    config.data.sources.proof_pile = source(
        path="data/proof-pile-2/*/train/*.jsonl.zst",  # without its validation and test files
        format="jsonl",
        weight=10,
        subset_key="directory",
    )
    config.data.seq_len = 2048
    config.optimizer.update(
        learning_rate=4e-4, min_learning_rate=4e-5, schedule="cosine", warmup_steps=2000,
        beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, weight_decay_rule="all",
        grad_clip_norm=1.0,
    )  # fmt: skip
    config.training.update(
        train_tokens=2_000_000_000_000, global_batch_tokens=896 * 2048, micro_batch_size=8
    )
    config.stages.stage1_basic = stage(train_tokens=1_500_000_000_000, weights="slimpajama:1")
    config.stages.stage2_domain = stage(train_tokens=350_000_000_000, ramp_tokens=6_000_000_000)
    config.stages.stage3_cooldown = stage(
        train_tokens=150_000_000_000, global_batch_tokens=4 * 896 * 2048
    )
    config.evaluation.update(every_steps=5000, tokens=10_485_760)
    config.checkpoint.update(every_steps=1000, keep_last=3, milestone_tokens=100_000_000_000)
    return config
