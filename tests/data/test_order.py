"""The order of a run whose mixture and batch change: exact, without gap, without repetition."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama_jax.data.mixture import Mixture, Ramp
from tinyllama_jax.data.order import Change, RowOrder

STAGED = (
    Change(0, 4, {"web": 1.0}),
    Change(50, 4, {"web": 0.6, "code": 0.3, "math": 0.1}, ramp_batches=20),
    Change(100, 16, {"web": 0.6, "code": 0.4}),
    Change(130, 8, {"code": 0.5, "math": 0.5}, ramp_batches=10),
)
BATCHES, STEPS = 200, 160
SKIPS = ("", "10:12", "49:51", "0:3,55:60", "88:120", "69:70,100:101,125:140")


def left_out(skip):
    """The numbers of the batches that are left out."""
    return {
        batch for part in skip.split(",") if part for batch in range(*map(int, part.split(":")))
    }


def by_hand(skip):
    """What each step reads: all batches in order, counted, and then some of them left out.

    Only which source a row is of comes from the package (`Mixture` and `Ramp`, which have tests of
    their own); where stages begin, and the numbers of rows, are made anew here.
    """
    parts = [
        (50, 4, ["web"], Mixture([1])),
        (20, 4, ["code", "math", "web"], Ramp([0, 0, 1], [0.3, 0.1, 0.6], 80)),
        (30, 4, ["code", "math", "web"], Mixture([0.3, 0.1, 0.6])),
        (30, 16, ["code", "web"], Mixture([0.4, 0.6])),
        (10, 8, ["code", "math", "web"], Ramp([0.4, 0, 0.6], [0.5, 0.5, 0], 80)),
        (BATCHES, 8, ["code", "math"], Mixture([0.5, 0.5])),
    ]
    counters: collections.Counter[str] = collections.Counter()
    batches = []
    for count, rows, names, mixture in parts:
        for row in range(0, count * rows, rows):
            batches.append([])
            for at in range(row, row + rows):
                name = names[mixture[at][0]]
                batches[-1].append((name, counters[name]))
                counters[name] += 1
    return [rows for number, rows in enumerate(batches) if number not in left_out(skip)][:STEPS]


@pytest.mark.parametrize("skip", SKIPS)
def test_each_source_is_read_on_from_where_it_was(skip):
    order = RowOrder(STAGED, skip)
    assert [order.rows_at(step) for step in range(STEPS)] == by_hand(skip)


@pytest.mark.parametrize("skip", SKIPS)
def test_what_is_left_out_is_not_read_and_nothing_is_read_twice(skip):
    plain, order = RowOrder(STAGED), RowOrder(STAGED, skip)
    read = [row for step in range(STEPS) for row in order.rows_at(step)]
    assert len(read) == len(set(read))
    bad = {row for batch in left_out(skip) for row in plain.rows_at(batch)}
    assert bad.isdisjoint(read)


@pytest.mark.parametrize("skip", SKIPS)
def test_the_rows_of_a_source_are_found_from_the_other_side(skip):
    order = RowOrder(STAGED, skip)
    for steps in (0, 1, 49, 50, 51, 70, 71, 115, STEPS):
        for source in order.sources:
            expected = [
                (step, index)
                for step in range(steps)
                for name, index in order.rows_at(step)
                if name == source
            ]
            assert sorted(order.rows_of(source, steps)) == sorted(expected), (steps, source)


@pytest.mark.parametrize("skip", SKIPS)
def test_counts_are_those_of_the_rows_gone_through(skip):
    """Those of the batches left out before the last one read among them."""
    plain, order = RowOrder(STAGED), RowOrder(STAGED, skip)
    counted = dict.fromkeys(order.sources, 0)
    assert order.counts_at(0) == counted
    step = 0
    for batch in range(BATCHES):
        counted.update((name, index + 1) for name, index in plain.rows_at(batch))
        if batch not in left_out(skip):
            step += 1
            assert order.counts_at(step) == counted


def test_shares_are_those_of_each_stage_and_rise_on_a_straight_line():
    changes = (
        Change(0, 100, {"web": 1.0}),
        Change(100, 100, {"web": 0.75, "code": 0.25}, ramp_batches=400),
    )
    order = RowOrder(changes)
    share = [sum(name == "code" for name, _ in order.rows_at(step)) / 100 for step in range(1000)]
    assert share[:100] == [0] * 100
    assert share[500:] == pytest.approx([0.25] * 500, abs=0.011)
    middle = (np.arange(400) + 0.5) / 400 * 0.25
    assert np.abs(np.array(share[100:500]) - middle).max() < 0.02  # two rows of a hundred
    assert order.counts_at(500)["code"] == 40_000 * 0.125
    assert order.shares(changes[1]) == {"code": 0.25, "web": 0.75}


def test_a_border_after_whole_periods_with_nothing_new_changes_nothing():
    """It only begins the pattern of the mixture anew, here after a million rows."""
    whole = RowOrder([Change(0, 8, {"a": 7, "b": 3})])
    cut = RowOrder([Change(0, 8, {"a": 7, "b": 3}), Change(125_000, 8, {"a": 7, "b": 3})])
    for step in (0, 124_999, 125_000, 125_001, 999_999):
        assert cut.rows_at(step) == whole.rows_at(step)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 12),
            st.integers(1, 5),
            st.sampled_from([{"a": 1}, {"a": 2, "b": 1}, {"b": 1, "c": 1}, {"a": 7, "c": 2}]),
            st.integers(0, 6),
        ),
        min_size=1,
        max_size=4,
    ),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=3),
)
def test_any_stages_with_any_batches_left_out_read_nothing_twice(stages, ranges):
    changes, step = [], 0
    for length, rows, weights, ramp in stages:
        changes.append(Change(step, rows, weights, min(ramp, length) if step else 0))
        step += length
    skip = ",".join(f"{first}:{first + length}" for first, length in ranges)
    order = RowOrder(changes, skip)
    read = [row for at in range(step + 5) for row in order.rows_at(at)]
    assert len(read) == len(set(read))
    plain = RowOrder(changes)
    bad = {row for batch in left_out(skip) for row in plain.rows_at(batch)}
    assert bad.isdisjoint(read)
    kept = [batch for batch in range(step + 60) if batch not in left_out(skip)]
    assert [order.rows_at(at) for at in range(step + 5)] == [
        plain.rows_at(batch) for batch in kept[: step + 5]
    ]
    for source in order.sources:
        backwards = sorted(order.rows_of(source, step))
        forwards = [
            (at, i) for at in range(step) for name, i in order.rows_at(at) if name == source
        ]
        assert backwards == sorted(forwards)


def test_a_process_reads_its_own_rows():
    order = RowOrder(STAGED)
    for step in (0, 60, 110, 140):
        rows = order.rows_at(step)
        assert order.rows_at(step, lambda n: range(n // 2, n)) == rows[len(rows) // 2 :]


def test_batches_left_out_after_a_step_change_nothing_before_it():
    plain, rewound = RowOrder(STAGED), RowOrder(STAGED, "52:60")
    rewound.require_same_past(52, "")
    assert [plain.rows_at(step) for step in range(52)] == [
        rewound.rows_at(step) for step in range(52)
    ]
    assert plain.rows_at(52, skip="52:60") == rewound.rows_at(52)
    with pytest.raises(ValueError, match="leaves out other batches before step 53"):
        rewound.require_same_past(53, "")
