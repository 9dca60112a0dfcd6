"""Which row of which source each row of a run is: the order of the data, without the data.

Batches are numbered from 0, those that are left out included; a step reads the next batch that is
not. What a batch holds depends on its number alone. Where the mixture or the rows per batch change
within a run, each source goes on where it was: a stretch of batches begins at the row of each
source that the stretches before have come to.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from tinyllama_jax.config_text import skipped_ranges
from tinyllama_jax.data.mixture import PERIOD, Mixture, Ramp


class Change(NamedTuple):
    """What a run reads from a batch on.

    Attributes:
      batch: the first one, counted from 0.
      batch_rows: R, rows per batch.
      weights: shares of the rows, in any unit, of the sources that are read.
      ramp_batches: in which the shares go there from the earlier ones on a straight line; 0: at
        once.
      name: for those who read of it.
    """

    batch: int
    batch_rows: int
    weights: Mapping[str, float]
    ramp_batches: int = 0
    name: str = ""


class _Stretch(NamedTuple):
    """Batches in a row that are made alike.

    Attributes:
      first_batch: where it begins.
      batch_rows: R.
      sources: those that are read, as the mixture numbers them.
      mixture: (row of the stretch) -> (source, how-manieth).
      begins: how many rows of each source of the run were read before.
    """

    first_batch: int
    batch_rows: int
    sources: tuple[str, ...]
    mixture: Mixture | Ramp
    begins: Mapping[str, int]

    def counts(self, end_batch: int) -> dict[str, int]:
        """How many rows of each source lie before a batch of the stretch."""
        counts = self.mixture.counts((end_batch - self.first_batch) * self.batch_rows)
        return dict(self.begins) | {
            name: self.begins[name] + count
            for name, count in zip(self.sources, counts, strict=True)
        }


def _mixture(weights: Mapping[str, float]) -> Mixture:
    """The sources in the order of their names."""
    return _mixture_of(tuple(weights[name] for name in sorted(weights)))


_mixture_of = functools.lru_cache(maxsize=16)(Mixture)  # 10 MB each


class RowOrder:
    """Row of a step -> (source, how-manieth of its rows): a function, in constant time.

    Args:
      changes: what is read from which batch on, in order, the first from batch 0.
      skip: batches that are left out, as `data.skip`.

    Raises:
      ValueError: a mixture that cannot be, as `Mixture`.
    """

    def __init__(self, changes: Sequence[Change], skip: str = ""):
        assert changes[0].batch == changes[0].ramp_batches == 0, changes[0]
        for change, later in itertools.pairwise(changes):
            assert change.batch + change.ramp_batches <= later.batch, (change, later)
        self.changes = tuple(changes)
        self.skip = skip
        # In order of name, so that the order of the config's entries does not matter.
        self.sources = tuple(sorted(set().union(*(change.weights for change in changes))))
        self._stretches = self._laid_out()

    def _laid_out(self) -> list[_Stretch]:
        stretches: list[_Stretch] = []

        def begin(batch: int, rows: int, sources: Sequence[str], mixture: Mixture | Ramp) -> None:
            begins = stretches[-1].counts(batch) if stretches else dict.fromkeys(self.sources, 0)
            stretches.append(_Stretch(batch, rows, tuple(sources), mixture, begins))

        before: Mapping[str, float] = {}
        for first, batch_rows, weights, ramp_batches, _ in self.changes:
            if ramp_batches:
                both = sorted(before.keys() | weights.keys())
                old, new = ([of.get(name, 0.0) for name in both] for of in (before, weights))
                begin(first, batch_rows, both, Ramp(old, new, ramp_batches * batch_rows))
            begin(first + ramp_batches, batch_rows, sorted(weights), _mixture(weights))
            before = weights
        return stretches

    def _stretch_of(self, batch: int) -> _Stretch:
        at = bisect.bisect_right(self._stretches, batch, key=lambda s: s.first_batch) - 1
        return self._stretches[at]

    def rows_at(
        self,
        step: int,
        chosen: Callable[[int], Sequence[int]] = range,
        skip: str | None = None,
    ) -> list[tuple[str, int]]:
        """The rows of a step: source, and which of its rows.

        Args:
          step: counted from 0.
          chosen: which of so many rows; all.
          skip: stands in for the batches that are left out.
        """
        batch = self.batch_number(step, skip)
        stretch = self._stretch_of(batch)
        first = (batch - stretch.first_batch) * stretch.batch_rows
        found = (stretch.mixture[first + row] for row in chosen(stretch.batch_rows))
        named = ((stretch.sources[number], index) for number, index in found)
        return [(name, stretch.begins[name] + index) for name, index in named]

    def rows_of(self, source: str, steps: int) -> Iterator[tuple[int, int]]:
        """The rows of one source that the first `steps` steps read: step, and which row."""
        left_out = skipped_ranges(self.skip)
        stretches, last_batch = self._stretches, self._batches_before(steps)
        ends = [s.first_batch for s in stretches[1:]] + [last_batch]
        for stretch, end_batch in zip(stretches, ends, strict=True):
            end_batch = min(end_batch, last_batch)
            if source not in stretch.sources or end_batch <= stretch.first_batch:
                continue
            number, begin = stretch.sources.index(source), stretch.begins[source]
            for index in range(stretch.counts(end_batch)[source] - begin):
                row = stretch.mixture.row_of(number, index)
                batch = stretch.first_batch + row // stretch.batch_rows
                if not any(first <= batch < end for first, end in left_out):
                    yield batch - sum(b - a for a, b in left_out if b <= batch), begin + index

    def counts_at(self, step: int) -> dict[str, int]:
        """How many rows of each source the steps before `step` have gone through."""
        end = self._batches_before(step)
        return self._stretch_of(max(0, end - 1)).counts(end)

    def shares(self, change: Change) -> dict[str, float]:
        """The shares of the rows once a change is complete, in whole millionths."""
        counts = _mixture(change.weights).millionths
        return {name: n / PERIOD for name, n in zip(sorted(change.weights), counts, strict=True)}

    def batch_number(self, step: int, skip: str | None = None) -> int:
        """Which batch a step reads: all in order but those left out."""
        assert step >= 0, step
        for first, end in skipped_ranges(self.skip if skip is None else skip):
            if step >= first:
                step += end - first
        return step

    def _batches_before(self, step: int) -> int:
        """How many batches the steps before `step` have gone through, left-out ones included."""
        return self.batch_number(step - 1) + 1 if step else 0

    def require_same_past(self, step: int, skip: str) -> None:
        """Checks that a run that left out `skip` saw before `step` what this one sees.

        Raises:
          ValueError: batches are left out that lie before it.
        """
        there = self.batch_number(step, skip)

        def past(text: str) -> list[tuple[int, int]]:
            return [(a, min(b, there)) for a, b in skipped_ranges(text) if a < there]

        if past(skip) != past(self.skip):
            raise ValueError(
                f'data.skip = "{self.skip}" leaves out other batches before step {step}, where the '
                f'run goes on, than the run did ("{skip}"); name an earlier step with --resume, or '
                f"leave out batches from {there} on"
            )
