"""Which rows each process reads, and what the devices then hold; one of several processes.

    python -m tests.mesh.rows_of_processes OUT DATA FSDP TENSOR

Writes OUT/<process>.json: for each of 200 steps the rows that were read, and a hash of the whole
batch as all processes together hold it.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys

import jax
import numpy as np

from tinyllama_jax.data.dataset import TrainingDataset
from tinyllama_jax.data.order import Change, RowOrder
from tinyllama_jax.parallel import distributed, mesh, rules

ROWS, S, STEPS = 16, 8, 200


class Counting:
    """A stream whose id at each place is the place, and that knows what was read of it."""

    num_tokens = 40_000

    def __init__(self):
        self.read_at: list[int] = []

    def read(self, start: int, count: int) -> np.ndarray:
        self.read_at.append(start // S)
        return np.arange(start, start + count)


def main(out: str, *shape: str) -> None:
    stream = Counting()
    with distributed.in_use(60), mesh.in_use(tuple(map(int, shape))):
        data = TrainingDataset(
            {"a": stream},
            RowOrder([Change(0, ROWS, {"a": 1.0})]),
            seq_len=S,
            seed=3,
            own_rows=rules.own_rows,
        )
        gathered = jax.jit(lambda x: x, out_shardings=replicated())
        steps = []
        for step in range(STEPS):
            stream.read_at.clear()
            batch = rules.place_rows(data.batch_at(step), ROWS)
            tokens = np.asarray(gathered(batch.tokens))
            steps.append([sorted(stream.read_at), hashlib.sha256(tokens.tobytes()).hexdigest()])
        pathlib.Path(out, f"{jax.process_index()}.json").write_text(json.dumps(steps))


def replicated():
    if jax.device_count() == 1:
        return None
    return jax.sharding.NamedSharding(jax.sharding.get_mesh(), mesh.P())


if __name__ == "__main__":
    main(*sys.argv[1:])
