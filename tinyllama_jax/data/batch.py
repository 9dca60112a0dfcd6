"""What one optimizer step is fed."""

from __future__ import annotations

from typing import Any

import flax.struct

Array = Any  # np.ndarray on the host, jax.Array in the step


@flax.struct.dataclass
class Batch:
    """One batch of sequences; rows are in the order of the run's data.

    Attributes:
      tokens: `(B, S)` int32, the ids the model reads.
      targets: `(B, S)` int32, the id it should predict at each position.
      loss_weights: `(B, S)` float32; the loss is `sum(weight * loss) / sum(weight)`.
      positions: `(B, S)` int32 or None, for `0 .. S-1` in every row.
      segment_ids: `(B, S)` int32 or None; attention stays inside equal ids.
      reference_logps: `(B,)` float32 or None, log-probabilities under DPO's reference model.
    """

    tokens: Array
    targets: Array
    loss_weights: Array
    positions: Array | None = None
    segment_ids: Array | None = None
    reference_logps: Array | None = None
