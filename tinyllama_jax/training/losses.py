"""What a run minimises: functions `(model, params, batch, frozen) -> LossSums`."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from tinyllama_jax.config import Config
from tinyllama_jax.data.batch import Batch
from tinyllama_jax.data.documents import positions_and_segments
from tinyllama_jax.kernels import cross_entropy
from tinyllama_jax.model.llama import Llama, Params


class LossSums(NamedTuple):
    """Sums over a micro-batch; the train step divides once, over the whole global batch.

    Attributes:
      objective: float32 scalar, the weighted sum that is differentiated.
      reported: float32 scalar, the weighted sum that is logged as `loss` (nats, without penalties).
      weight: float32 scalar, the sum of the weights.
    """

    objective: jax.Array
    reported: jax.Array
    weight: jax.Array


class LossFunction(Protocol):
    def __call__(
        self, model: Llama, params: Params, batch: Batch, frozen: Params | None
    ) -> LossSums: ...


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross-entropy of each position's target, with the optional z-loss of the config.

    Attributes:
      config: the run's.
      bos_id, eos_id: the tokenizer's, which mark documents where `data.document_mask` is on.
    """

    config: Config
    bos_id: int = 1
    eos_id: int = 2

    def __call__(
        self, model: Llama, params: Params, batch: Batch, frozen: Params | None = None
    ) -> LossSums:
        positions, segment_ids = batch.positions, batch.segment_ids
        if self.config.data.document_mask and segment_ids is None:
            positions, segment_ids = positions_and_segments(
                batch.tokens, self.config.data.boundary, self.bos_id, self.eos_id
            )
        hidden, _ = model.apply(
            params, batch.tokens, positions=positions, segment_ids=segment_ids
        )  # (B, S, D)
        objective, reported = cross_entropy.weighted_sum(
            hidden,
            model.unembed(params),
            batch.targets,
            batch.loss_weights,
            z_loss=self.config.training.z_loss,
            chunk_tokens=self.config.training.loss_chunk_tokens,
        )
        return LossSums(objective, reported, jnp.sum(batch.loss_weights))
