"""Which source each row of a run comes from, exactly in the proportions of the config."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fractions import Fraction

import grain
import numpy as np

PERIOD = 1_000_000  # rows after which the pattern repeats; weights are whole multiples of 1/PERIOD


def millionths(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as integers that sum to exactly 1,000,000, each within 1 of its exact share.

    Raises:
      ValueError: a weight is not positive, or too small to get one row in a million.
    """
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(
            f"weights {list(weights)}: each must be a finite number above 0; to leave a source "
            f"out, remove it from data.sources"
        )
    counts = _apportioned(PERIOD, weights)
    if 0 in counts:
        raise ValueError(
            f"weight {weights[counts.index(0)]} is less than a millionth of the sum "
            f"{sum(weights)}: its source would never be read; raise it or remove the source"
        )
    return tuple(counts)


def divided(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """As `millionths`, of another sum; where a share is less than 1, it is 1.

    What is missing is taken from the largest, so that no subset is lost for being small.

    Raises:
      ValueError: there are more weights than there is to divide.
    """
    if len(weights) > total:
        raise ValueError(
            f"{len(weights)} subsets cannot share {total} millionths of the rows; raise the weight "
            f"of their source, or take fewer"
        )
    counts = _apportioned(total, weights)
    for k in range(len(counts)):
        if counts[k] == 0:
            counts[counts.index(max(counts))] -= 1
            counts[k] = 1
    return tuple(counts)


def _apportioned(total: int, weights: Sequence[float]) -> list[int]:
    """The method of largest remainders, in exact arithmetic; of equal ones the first is raised."""
    whole = sum(map(Fraction, weights))
    shares = [Fraction(weight) * total / whole for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k])
    for k in by_remainder[: total - sum(counts)]:
        counts[k] += 1
    return counts


class Mixture(grain.transforms.DatasetSelectionMap):
    """Row -> (source, index within the source): any row in constant time, exact for ever.

    One period of 1,000,000 rows is laid out so that source k has exactly `millionths[k]` rows in
    it, its j-th at the rank of its ideal place (j + 1/2) / millionths[k] among all sources' (the
    order of Webster's and Sainte-Laguë's apportionment). The pattern then repeats. It follows that

    - any whole number of periods in a row, wherever it begins, has exact proportions;
    - of the first n rows, source k's share p_k differs from p_k * n by at most 1/2 + p_k * K / 2
      rows (K sources), so that every batch holds the mixture to within a few rows.

    `grain.MapDataset.mix` is not used: it rounds weights to 1/100 of the smallest one.
    """

    def __init__(self, weights: Sequence[float]):
        self.millionths = millionths(weights)
        # 2 * place in the period, with 20 bits after the point: integers, the same everywhere.
        places = [
            ((2 * np.arange(count, dtype=np.int64) + 1) * PERIOD << 20) // count
            for count in self.millionths
        ]
        order = np.argsort(np.concatenate(places), kind="stable")
        rows = np.empty(PERIOD, np.int32)
        rows[order] = np.arange(PERIOD, dtype=np.int32)
        self._rows = np.split(rows, np.cumsum(self.millionths)[:-1])  # of each source, ascending
        self._source = np.empty(PERIOD, np.min_scalar_type(len(self.millionths)))
        self._index = np.empty(PERIOD, np.int32)
        for source, rows_of_source in enumerate(self._rows):
            self._source[rows_of_source] = source
            self._index[rows_of_source] = np.arange(len(rows_of_source), dtype=np.int32)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int) -> tuple[int, int]:
        period, place = divmod(row, PERIOD)
        source = int(self._source[place])
        return source, period * self.millionths[source] + int(self._index[place])

    def row_of(self, source: int, index: int) -> int:
        """The row that reads `index` of `source`: what `[row]` is the inverse of."""
        period, place = divmod(index, self.millionths[source])
        return period * PERIOD + int(self._rows[source][place])

    def counts(self, rows: int) -> tuple[int, ...]:
        """How many of the first `rows` rows come from each source."""
        periods, rest = divmod(rows, PERIOD)
        return tuple(
            periods * count + int(np.searchsorted(rows_of_source, rest))
            for count, rows_of_source in zip(self.millionths, self._rows, strict=True)
        )
