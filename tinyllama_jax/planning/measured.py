"""Estimates beside what was measured: how far off a plan's speed is."""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

from tinyllama_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from tinyllama_jax.parallel.devices import Cluster, find_gpu
from tinyllama_jax.planning.estimate import estimate


class Comparison(NamedTuple):
    """One measured train step.

    Attributes:
      title: card and step.
      measured, estimated: tokens/s.
    """

    title: str
    measured: float
    estimated: float

    @property
    def error(self) -> float:
        """By what share the estimate is above what was measured."""
        return self.estimated / self.measured - 1


def compare_with(results: pathlib.Path) -> list[Comparison]:
    """One for each file of `bench train --json` in a directory that a known GPU, alone, wrote."""
    found = []
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text())
        (kind, count), *others = content["machine"]["devices"].items()
        gpu = find_gpu(kind)
        if content["benchmark"] != "train" or "rows" not in content:
            continue
        if gpu is None or count > 1 or others:
            continue
        model, size = ModelConfig(**content["model"]), content["size"]
        tokens = size["rows"] * size["seq_len"]
        config = Config(
            model=model,
            data=DataConfig(seq_len=size["seq_len"]),
            training=TrainingConfig(
                train_tokens=tokens, global_batch_tokens=tokens, micro_batch_size=size["rows"]
            ),
        )
        speed = estimate(config, Cluster(gpu, 1, 1), (1, 1, 1), ()).tokens_per_second
        title = (
            f"{gpu.title}, {size['rows']} x {size['seq_len']} tokens, {model.num_layers} layers of "
            f"{model.d_model}, attention={model.attention} remat={model.remat}"
        )
        found.append(Comparison(title, content["rows"][0]["tokens_per_second"], speed))
    return found
