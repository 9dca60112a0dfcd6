"""The loss on held-out text, now and then during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import jax

from tinyllama_jax.config import Config
from tinyllama_jax.data.batch import Batch
from tinyllama_jax.model.llama import Llama, Params
from tinyllama_jax.parallel import mesh, rules
from tinyllama_jax.training.losses import LossFunction
from tinyllama_jax.training.step import make_eval_step
from tinyllama_jax.training.watchdog import Watchdog


class ValidationData(Protocol):
    """What is asked of a stream's held-out text; `data.dataset.ValidationDataset`."""

    @property
    def weight(self) -> float: ...

    def batches(self, rows: int) -> Iterator[Batch]: ...


class Interrupted(Exception):
    """The process is to end before the loss is known."""


def make_validation(
    config: Config,
    model: Llama,
    loss_fn: LossFunction,
    validation: Mapping[str, ValidationData],
    interrupted: Callable[[], bool],
    watchdog: Watchdog,
) -> Callable[[Params], dict[str, float]]:
    """A function of params that gives the losses on held-out text, in nats per token.

    Of several processes all call it alike.

    Args:
      config: the run's settings.
      model, loss_fn: as in training.
      validation: held-out text by name; may be empty.
      interrupted: asked before every batch, in all processes alike.
      watchdog: hears of every batch.

    Returns:
      `params -> record`, which raises `Interrupted` where it is. The record has `eval/NAME/loss`
      for every name, and in `eval/loss` their mean by weight; it is empty where nothing is held
      out.
    """
    eval_step = make_eval_step(model, loss_fn)

    def source_loss(params: Params, source: ValidationData) -> float:
        rows = config.training.micro_batch_size * mesh.parts(mesh.BATCH)
        sums: list[tuple[jax.Array, jax.Array]] = []
        for batch in source.batches(rows):
            # The host stays one batch ahead of the device: else all would be queued at once, and
            # nobody would listen until the last is done.
            jax.block_until_ready(sums[-2:-1])
            if interrupted():
                raise Interrupted
            with watchdog.paused():  # the first call compiles; the end of each counts as a beat
                sums.append(eval_step(params, rules.place_rows(batch, rows)))
        losses, counts = jax.device_get(tuple(zip(*sums, strict=True)))
        return math.fsum(losses) / math.fsum(counts)

    def validate(params: Params) -> dict[str, float]:
        losses = {name: source_loss(params, source) for name, source in validation.items()}
        if not losses:
            return {}
        share = {name: source.weight for name, source in validation.items()}
        mean = sum(share[n] * loss for n, loss in losses.items()) / sum(share.values())
        return {f"eval/{name}/loss": loss for name, loss in losses.items()} | {"eval/loss": mean}

    return validate


def describe(losses: Mapping[str, float]) -> str:
    """A record of `make_validation` in words."""
    each = ", ".join(
        f"{name.split('/')[1]} {loss:.4f}" for name, loss in losses.items() if name != "eval/loss"
    )
    return f"validation loss {losses['eval/loss']:.4f} ({each})"
