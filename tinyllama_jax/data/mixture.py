"""Which source each row of a run comes from, exactly in the proportions of the config."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

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


class _Table:
    """Rows laid out once: each row of a source goes where its place is among all sources' places.

    Attributes:
      rows: of each source, its rows, ascending.
      source, index: of each row, whose it is and its how-manieth.
    """

    def __init__(self, places: Sequence[np.ndarray]):
        counts = [len(of_source) for of_source in places]
        total = sum(counts)
        order = np.argsort(np.concatenate(places), kind="stable")
        rows = np.empty(total, np.int32)
        rows[order] = np.arange(total, dtype=np.int32)
        self.rows = np.split(rows, np.cumsum(counts)[:-1])
        self.source = np.empty(total, np.min_scalar_type(len(counts)))
        self.index = np.empty(total, np.int32)
        for source, rows_of_source in enumerate(self.rows):
            self.source[rows_of_source] = source
            self.index[rows_of_source] = np.arange(len(rows_of_source), dtype=np.int32)


class Mixture:
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
        self._table = _Table(places)

    def __getitem__(self, row: int) -> tuple[int, int]:
        period, place = divmod(row, PERIOD)
        source = int(self._table.source[place])
        return source, period * self.millionths[source] + int(self._table.index[place])

    def row_of(self, source: int, index: int) -> int:
        """The row that reads `index` of `source`: what `[row]` is the inverse of."""
        period, place = divmod(index, self.millionths[source])
        return period * PERIOD + int(self._table.rows[source][place])

    def counts(self, rows: int) -> tuple[int, ...]:
        """How many of the first `rows` rows come from each source."""
        periods, rest = divmod(rows, PERIOD)
        return tuple(
            periods * count + int(np.searchsorted(rows_of_source, rest))
            for count, rows_of_source in zip(self.millionths, self._table.rows, strict=True)
        )


class Ramp:
    """As `Mixture`, of so many rows, whose proportions go from one to another on a straight line.

    Of the first n of N rows, source k is to have a_k n + (b_k - a_k) n^2 / 2N, where a_k and b_k
    are its shares at the beginning and at the end; its j-th row lies where that is j + 1/2.

    All are laid out: 16 million rows (34 billion tokens in rows of 2,048) take 0.5 GB while that is
    done, and 0.15 GB from then on.
    """

    def __init__(self, before: Sequence[float], after: Sequence[float], rows: int):
        a, b = (np.array(shares, np.float64) / sum(shares) for shares in (before, after))
        counts = _apportioned(rows, [float(mean) for mean in (a + b) / 2])
        places = []
        for share, slope, count in zip(a, b - a, counts, strict=True):
            # In proportion, so that the whole count lies within the ramp.
            wanted = (np.arange(count) + 0.5) * ((share + slope / 2) / max(count, 1))
            places.append(2 * wanted / (share + np.sqrt(share * share + 2 * slope * wanted)))
        self._table = _Table(places)

    def __getitem__(self, row: int) -> tuple[int, int]:
        return int(self._table.source[row]), int(self._table.index[row])

    def row_of(self, source: int, index: int) -> int:
        """As `Mixture.row_of`."""
        return int(self._table.rows[source][index])

    def counts(self, rows: int) -> tuple[int, ...]:
        """As `Mixture.counts`."""
        return tuple(int(np.searchsorted(of_source, rows)) for of_source in self._table.rows)
