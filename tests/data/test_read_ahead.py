"""Reading ahead: in order, not too far, and past reads that fail or hang."""

import itertools
import threading
import time

import pytest

from tinyllama_jax.data import read_ahead as module
from tinyllama_jax.data.read_ahead import read_ahead


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(module, "_PAUSES", (0.01, 0.02, 0.03))
    monkeypatch.setattr(module, "_LAST_PAUSE", 0.04)


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def never():
    raise AssertionError("nothing failed, so nothing is to be opened again")


def test_items_come_in_order():
    with read_ahead(lambda n: n * n, range(3, 50), reopen=never) as items:
        assert list(items) == [n * n for n in range(3, 50)]
    assert reading_threads() == []


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_is_read_than_asked(depth):
    asked = []
    with read_ahead(asked.append, range(100), reopen=never, depth=depth) as items:
        next(items)
        deadline = time.monotonic() + 10
        while len(asked) < 1 + depth and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert asked == list(range(1 + depth))
    assert reading_threads() == []


def test_the_thread_ends_with_whoever_consumes():
    with pytest.raises(KeyboardInterrupt), read_ahead(str, range(10**9), reopen=never) as items:
        next(items)
        assert len(reading_threads()) == 1
        raise KeyboardInterrupt
    assert reading_threads() == []


def test_pauses_between_attempts_do_not_count_as_hanging(monkeypatch, capsys):
    """A pause and a read that are each shorter than the patience, but longer together."""
    monkeypatch.setattr(module, "_PAUSES", (0.3,))
    attempts = []

    def read(number):
        attempts.append(number)
        if len(attempts) == 1:
            raise OSError("the disk is away")
        time.sleep(0.3)
        return number

    with read_ahead(read, [7], reopen=lambda: None, patience=0.45) as items:
        assert list(items) == [7]
    assert attempts == [7, 7] and "was not read within" not in capsys.readouterr().err


@pytest.mark.parametrize("error, failures", [(OSError, 6), (ValueError, 3)])
def test_a_read_that_fails_is_tried_again(error, failures, capsys):
    left, reopened = itertools.repeat(None, failures), []

    def read(number):
        if number == 4 and next(left, "none") is None:
            raise error("the disk is away")
        return number

    # Patience is for a read that does not end, not for the pauses between reads that fail.
    with read_ahead(
        read, range(9), reopen=lambda: reopened.append(1), what="page", patience=0.005
    ) as items:
        assert list(items) == list(range(9))
    assert len(reopened) == failures
    told = capsys.readouterr().err.splitlines()
    pauses = ("0.01", "0.02", "0.03", "0.04", "0.04", "0.04")[:failures]
    assert told == [
        f"page 4 could not be read (the disk is away); trying again in {pause} s"
        for pause in pauses
    ]


def test_a_read_that_fails_for_good_raises_in_its_turn():
    attempts, found = [], []

    def read(number):
        if number == 4:
            attempts.append(number)
            raise ValueError("page 7 is damaged")
        return number

    with (
        pytest.raises(ValueError, match="page 7 is damaged"),
        read_ahead(read, range(9), reopen=lambda: None, depth=8) as items,
    ):
        for item in items:
            found.append(item)
    assert found == [0, 1, 2, 3] and len(attempts) == 4
    assert reading_threads() == []


def test_a_slow_read_comes_to_an_end():
    def read(number):
        time.sleep(0.1)
        return number

    with read_ahead(read, range(3), reopen=lambda: None, patience=0.02) as items:
        assert list(items) == [0, 1, 2]


def test_what_does_not_pass_is_raised():
    def read(number):
        raise PermissionError(13, "not yours")

    with (
        pytest.raises(PermissionError),
        read_ahead(read, range(3), reopen=lambda: None) as items,
    ):
        next(items)


def test_leaving_does_not_wait_for_another_attempt(monkeypatch):
    monkeypatch.setattr(module, "_PAUSES", (60.0,))
    failed = threading.Event()

    def read(number):
        failed.set()
        raise OSError

    began = time.monotonic()
    with read_ahead(read, range(9), reopen=never):
        assert failed.wait(10)
        time.sleep(0.01)
    assert time.monotonic() - began < 5 and reading_threads() == []


@pytest.mark.parametrize("hang_at", [0, 4])
def test_a_read_that_hangs_is_left_and_its_lock_too(hang_at, capsys):
    """As an open shard's: who hangs holds it, so that no other could read with it."""
    locks, woken = [threading.Lock()], threading.Event()

    def read(number):
        with locks[-1]:
            if number == hang_at and len(locks) < 3:  # the second reader hangs too
                woken.wait(60)
            return number

    def reopen():
        locks.append(threading.Lock())

    with read_ahead(read, range(9), reopen=reopen, what="page", patience=0.1) as items:
        assert list(items) == list(range(9))
        assert len(locks) == 3
        assert len(reading_threads()) >= 2
    told = capsys.readouterr().err
    for seconds in ("0.1", "0.2"):
        line = f"page {hang_at} was not read within {seconds} s (a disk that does not answer?): "
        assert told.count(line) == 1
    woken.set()  # what it then finds is thrown away, and it ends
    deadline = time.monotonic() + 10
    while reading_threads() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert reading_threads() == []


def test_leaving_does_not_wait_for_a_read_that_hangs(monkeypatch):
    monkeypatch.setattr(module, "_LEAVE_SECONDS", 0.05)
    woken = threading.Event()
    began = time.monotonic()
    with read_ahead(lambda number: woken.wait(60), range(3), reopen=never):
        time.sleep(0.01)
    assert time.monotonic() - began < 5
    woken.set()
