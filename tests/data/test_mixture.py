"""The mixture is exact, constant-time and spread evenly."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyllama_jax.data.mixture import PERIOD, Mixture, Ramp, millionths

WEIGHTS = [
    (0.693584, 0.306416),  # TinyLlama: SlimPajama, Starcoderdata
    (7.0, 3.0),
    (1.0,),
    (1.0, 1.0, 1.0),
    (0.999999, 0.000001),
    (0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.02),
    (1 / 3, 1 / 7, 1 / 11, 1 / 13),
]


@pytest.fixture(scope="module", params=WEIGHTS, ids=str)
def weights(request):
    return request.param


@pytest.fixture(scope="module")
def mixture(weights):
    return Mixture(weights)


@pytest.fixture(scope="module")
def period(mixture):
    """Source and index of each row of the first period, asked for row by row."""
    return np.array([mixture[row] for row in range(PERIOD)]).T


@pytest.fixture(scope="module")
def sources(period):
    return period[0]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12))
@example([0.693584, 0.306416])
@example([0.1] * 3)
def test_millionths_sum_to_a_million_and_are_within_one(weights):
    if min(weights) / sum(weights) < 2e-6:
        return
    counts = millionths(weights)
    assert sum(counts) == PERIOD
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - weight / sum(weights) * PERIOD) < 1 + 1e-6


def test_millionths_of_the_published_mixture():
    assert millionths([0.693584, 0.306416]) == (693_584, 306_416)
    assert millionths([7, 3]) == (700_000, 300_000)
    assert millionths([1, 1, 1]) == (333_334, 333_333, 333_333)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_that_are_no_shares_are_refused(wrong):
    with pytest.raises(ValueError, match=r"finite number above 0.*data\.sources"):
        millionths([1.0, wrong])


def test_a_source_that_would_never_be_read_is_refused():
    with pytest.raises(ValueError, match="would never be read"):
        millionths([1.0, 1e-8])


def test_weights_are_realised_within_a_millionth_over_any_ten_million_rows(
    mixture, weights, sources
):
    """Ten million rows are ten whole periods wherever they begin, and the pattern repeats.

    Two facts make the claim: a period holds each source exactly `millionths` times (counted row by
    row), and rows a period apart come from the same source.
    """
    counts = np.bincount(sources, minlength=len(weights))
    share = np.array(weights) / sum(weights)
    assert np.abs(counts / PERIOD - share).max() < 1e-6
    random = np.random.default_rng(0)
    for row in random.integers(0, 2**40, 20_000).tolist():
        source, index = mixture[row]
        assert source == sources[row % PERIOD]
        assert mixture[row + PERIOD] == (source, index + counts[source])
    for start in (0, 1, 123_456, 999_999, 10**12 + 77):
        before, after = mixture.counts(start), mixture.counts(start + 10_000_000)
        realised = (np.array(after) - np.array(before)) / 10_000_000
        assert np.abs(realised - share).max() < 1e-6


def test_each_source_is_read_without_gap_or_repetition(mixture, weights):
    for start in (0, PERIOD - 5_000, 10**9 + 321):
        following = list(mixture.counts(start))
        for row in range(start, start + 10_000):
            source, index = mixture[row]
            assert index == following[source]
            following[source] += 1
        assert tuple(following) == mixture.counts(start + 10_000)


def test_every_stretch_holds_the_mixture_to_within_its_bound(mixture, weights, sources):
    share = np.array(mixture.millionths) / PERIOD
    for source, p in enumerate(share):
        taken = np.cumsum(sources == source)
        surplus = taken - p * np.arange(1, PERIOD + 1)
        assert np.abs(surplus).max() <= 0.5 + p * len(weights) / 2 + 1e-6
        # Any stretch of rows, such as a batch, is the difference of two such prefixes.
        assert surplus.max() - surplus.min() <= 1 + p * len(weights) + 1e-6


def test_the_rows_of_a_period_are_in_the_exact_order_of_their_places(mixture, period):
    sources, index = period
    count = np.array(mixture.millionths)[sources]
    place = 2 * index + 1  # over `count`; compared as fractions, crosswise
    before, after = place[:-1] * count[1:], place[1:] * count[:-1]
    assert (before <= after).all()
    assert (sources[:-1] < sources[1:])[before == after].all()  # equal places by source


def test_the_pattern_of_seven_to_three():
    mixture = Mixture([7, 3])
    assert [mixture[row][0] for row in range(10)] == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    assert [mixture[row][1] for row in range(10)] == [0, 0, 1, 2, 3, 1, 4, 5, 2, 6]


@settings(max_examples=200)
@given(st.integers(0, 2**50))
def test_counts_agree_with_the_rows(row):
    mixture = _TINYLLAMA
    source, index = mixture[row]
    assert mixture.counts(row)[source] == index
    assert sum(mixture.counts(row)) == row


_TINYLLAMA = Mixture(WEIGHTS[0])


# --- ramps

RAMPS = [
    ([1.0, 0.0, 0.0], [0.75, 0.15, 0.1], 30_000),  # TinyLlama v1.1's continual pretraining
    ([0.5, 0.5], [0.5, 0.5], 9_999),
    ([1.0, 0.0], [0.0, 1.0], 20_001),
    ([3.0, 1.0, 1.0], [1.0, 1.0, 8.0], 12_345),
    ([1.0, 0.0], [0.9, 0.1], 1),
]


@pytest.mark.parametrize("before, after, rows", RAMPS)
def test_a_ramp_follows_its_straight_line(before, after, rows):
    ramp = Ramp(before, after, rows)
    sources = np.array([ramp[row][0] for row in range(rows)])
    n = np.arange(1, rows + 1)
    for source in range(len(before)):
        a, b = before[source] / sum(before), after[source] / sum(after)
        wanted = a * n + (b - a) * n**2 / (2 * rows)
        # As a mixture's bound: half a row of its own, and half a row of each other one.
        assert np.abs(np.cumsum(sources == source) - wanted).max() <= 1 + len(before) / 2


@pytest.mark.parametrize("before, after, rows", RAMPS)
def test_a_ramp_reads_each_source_without_gap_or_repetition(before, after, rows):
    ramp = Ramp(before, after, rows)
    following = [0] * len(before)
    for row in range(rows):
        assert ramp.counts(row) == tuple(following) if row % 997 == 0 else True
        source, index = ramp[row]
        assert index == following[source] and ramp.row_of(source, index) == row
        following[source] += 1
    assert ramp.counts(rows) == tuple(following) and sum(following) == rows


def test_a_ramp_of_many_sources_keeps_its_bound():
    before, after, rows = [1.0] + [0.0] * 299, [0.5] + [0.5 / 299] * 299, 50_000
    ramp = Ramp(before, after, rows)
    of_first = np.cumsum([ramp[row][0] == 0 for row in range(rows)])
    n = np.arange(1, rows + 1)
    assert np.abs(of_first - (n - 0.25 * n**2 / rows)).max() <= 151
