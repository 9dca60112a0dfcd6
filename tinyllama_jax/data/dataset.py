"""From prepared pages to batches: which windows each step reads, as a pure function.

Row of a step -> (source, window) is a function of the manifests, the data config and its seed
alone. Nothing iterates, so there is no iterator state to save: any step can be read at any time, by
any number of hosts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import grain
import numpy as np

from tinyllama_jax.data.batch import Batch
from tinyllama_jax.data.order import RowOrder
from tinyllama_jax.data.read_ahead import read_ahead
from tinyllama_jax.data.stream import Document, Stream, Windows

OwnRows = Callable[[int], Sequence[int]]


class Row(NamedTuple):
    """One row of a run: a window of a source."""

    source: str
    window: int


class _Rows:
    """The rows of one source in the order of its stream, for Grain to shuffle."""

    def __init__(self, source: str, num_windows: int):
        self._source = source
        self._num_windows = num_windows

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, window: int) -> Row:
        return Row(self._source, int(window))


class TrainingDataset:
    """The batches of a pretraining run.

    Each source is shuffled anew in each of its epochs.

    Args:
      streams: the training split of each source, by name; each holds at least one window.
      order: which rows of which source each step reads.
      seq_len: S, tokens per row.
      seed: of the shuffles.
      own_rows: which rows of a batch of so many this process reads; all, unless it is one of
        several.
      patience: seconds until a read counts as hanging, as `read_ahead`; None: never.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        order: RowOrder,
        *,
        seq_len: int,
        seed: int,
        own_rows: OwnRows = range,
        patience: float | None = None,
    ):
        assert order.sources == tuple(sorted(streams)), (order.sources, sorted(streams))
        self.order = order
        self.seq_len = seq_len
        self._patience = patience
        # Asked here: the mesh that decides is not in use in the thread that reads ahead.
        self._own_rows = {rows: own_rows(rows) for rows in {c.batch_rows for c in order.changes}}
        self.windows = {name: Windows(streams[name], seq_len) for name in order.sources}
        self._shuffled = {
            name: grain.MapDataset.source(_Rows(name, len(windows)))
            .shuffle(seed=_source_seed(seed, name))
            .repeat()
            for name, windows in self.windows.items()
        }

    def rows_at(self, step: int, chosen: OwnRows = range, skip: str | None = None) -> list[Row]:
        """The rows of a step, as `RowOrder.rows_at`."""
        return [
            self._shuffled[name][index] for name, index in self.order.rows_at(step, chosen, skip)
        ]

    def windows_of(self, source: str, steps: int) -> Iterator[tuple[int, int]]:
        """The windows of one source that the first `steps` steps read: step and window."""
        for step, index in self.order.rows_of(source, steps):
            yield step, self._shuffled[source][index].window

    def batch_number(self, step: int) -> int:
        """As `RowOrder.batch_number`."""
        return self.order.batch_number(step)

    def require_same_past(self, step: int, skip: str) -> None:
        """As `RowOrder.require_same_past`."""
        self.order.require_same_past(step, skip)

    def batch_at(self, step: int) -> Batch:
        """This process's rows of a step: tokens and targets int32, every loss weight 1.

        All R rows, `(R, S)`, unless `own_rows` says otherwise.

        Raises:
          DamagedDataError: a page that the step needs is damaged.
          OSError: the disk does not give it.
        """
        rows = self.rows_at(step, self._own_rows.__getitem__)
        ids = np.stack([self.windows[row.source][row.window] for row in rows])
        return _batch(ids, np.ones((len(rows), self.seq_len), np.float32))

    def documents_at(self, step: int) -> list[list[Document]]:
        """The documents that a step sees, row by row."""
        return [self.windows[row.source].documents(row.window) for row in self.rows_at(step)]

    def tokens_at(self, step: int) -> dict[str, int]:
        """Tokens of each source that the steps before `step` have gone through."""
        return {name: n * self.seq_len for name, n in self.order.counts_at(step).items()}

    def epochs_at(self, step: int) -> dict[str, float]:
        """How often the steps before `step` have gone through each source."""
        counts = self.order.counts_at(step)
        return {name: counts[name] / len(windows) for name, windows in self.windows.items()}

    def fingerprint(self, step: int, steps: int = 64, skip: str | None = None) -> str:
        """A sha256 of what the steps `[step, step + steps)` read.

        `skip` stands in for the batches that are left out now.

        It covers the rows and the hashes of the shards they are cut from: a run that finds another
        value than its checkpoint holds would go on with other data than it began with.
        """
        digest = hashlib.sha256(f"{self.seq_len} {self.order.changes[0].batch_rows}\n".encode())
        for name, windows in self.windows.items():
            shards = windows.stream.manifest.shards
            digest.update(f"{name} {' '.join(shard.sha256 for shard in shards)}\n".encode())
        for at in range(step, step + steps):
            rows = self.rows_at(at, skip=skip)
            digest.update("".join(f"{name} {window}\n" for name, window in rows).encode())
        return digest.hexdigest()

    def prefetch(
        self, start: int, stop: int, depth: int = 2
    ) -> AbstractContextManager[Iterator[Batch]]:
        """A context whose iterator gives the batches of steps `[start, stop)`: `read_ahead`."""
        return read_ahead(
            self.batch_at, range(start, stop), reopen=self._reopen, what="the batch after step",
            depth=depth, patience=self._patience,
        )  # fmt: skip

    def _reopen(self) -> None:
        for windows in self.windows.values():
            windows.stream.reopen()

    def describe(self, steps: int) -> str:
        """One line per source: its size, what is left out of it, its share of the rows, and how
        often a run of so many steps goes through it. A line per change, of the shares then."""
        changes = self.order.changes
        epochs, shares = self.epochs_at(steps), self.order.shares(changes[0])
        if len(changes) > 1:
            counts = self.order.counts_at(steps)
            shares = {name: n / sum(counts.values()) for name, n in counts.items()}
        lines = [
            f"{name}: {windows.stream.num_tokens:,} tokens in "
            f"{windows.stream.manifest.documents:,} documents, {len(windows):,} windows of "
            f"{self.seq_len} ({windows.left_out} tokens of the last, incomplete one left out), "
            f"{100 * shares[name]:.6g}% of the rows, {epochs[name]:.3g} epochs"
            for name, windows in self.windows.items()
        ]
        for change in changes if len(changes) > 1 else ():
            mixed = ", ".join(f"{n} {100 * s:.6g}%" for n, s in self.order.shares(change).items())
            lines.append(
                f"{change.name}, from batch {change.batch:,} on: {change.batch_rows:,} rows each, "
                f"{mixed}"
                + (f", reached over {change.ramp_batches:,}" if change.ramp_batches else "")
            )
        return "\n".join(lines)


def _source_seed(seed: int, source: str) -> int:
    """A seed of its own for each source.

    Grain shuffles epoch e with `seed + e`, so neighbouring seeds would walk through the same
    permutations one epoch apart.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {source}".encode()).digest()[:4], "little")


def _batch(ids: np.ndarray, loss_weights: np.ndarray) -> Batch:
    return Batch(
        tokens=np.ascontiguousarray(ids[:, :-1]),
        targets=np.ascontiguousarray(ids[:, 1:]),
        loss_weights=loss_weights,
    )


class ValidationDataset:
    """The held-out split of one source: windows spread evenly over it, the same every time.

    Args:
      stream: the validation split; at least two ids.
      seq_len: S, tokens per row.
      max_tokens: how many targets are enough; 0: all. Rounded up to a whole window.
      weight: what its loss counts for in the mean over all sources.
      own_rows, patience: as `TrainingDataset`.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        seq_len: int,
        max_tokens: int,
        weight: float = 1.0,
        own_rows: OwnRows = range,
        patience: float | None = None,
    ):
        self.stream = stream
        self.weight = weight
        self._patience = patience
        self._own_rows = own_rows
        self.seq_len = seq_len
        targets = stream.num_tokens - 1
        self._num_windows = -(-targets // seq_len)
        self.num_rows = -(-min(targets, max_tokens or targets) // seq_len)

    @property
    def num_targets(self) -> int:
        """Targets with loss weight 1 in all batches together."""
        return sum(
            min(self.seq_len, self.stream.num_tokens - 1 - self._start(row))
            for row in range(self.num_rows)
        )

    def _start(self, row: int) -> int:
        """Where a row begins in the stream: all windows in order, or as many at even distances."""
        return row * self._num_windows // self.num_rows * self.seq_len

    def batches(self, rows: int) -> Iterator[Batch]:
        """Yields batches `(rows, S)` of windows, or this process's rows of them.

        Unlike training it also reads the stream's last, incomplete window. The rest of that row,
        and the rows that fill up the last batch, hold zeros of loss weight 0.
        """
        own = self._own_rows(rows)

        def batch_at(number: int) -> Batch:
            ids = np.zeros((len(own), self.seq_len + 1), np.int32)
            loss_weights = np.zeros((len(own), self.seq_len), np.float32)
            for place, own_row in enumerate(own):
                row = number * rows + own_row
                if row >= self.num_rows:
                    break
                start = self._start(row)
                count = min(self.seq_len + 1, self.stream.num_tokens - start)
                ids[place, :count] = self.stream.read(start, count)
                loss_weights[place, : count - 1] = 1
            return _batch(ids, loss_weights)

        with read_ahead(
            batch_at, range(-(-self.num_rows // rows)), reopen=self.stream.reopen,
            what=f"{self.stream.manifest.source}: validation batch", patience=self._patience,
        ) as batches:  # fmt: skip
            yield from batches
