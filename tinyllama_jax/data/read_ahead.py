"""Reading ahead of whoever consumes, by a thread that is replaced where it hangs or fails.

What is read is a function of a number, so another thread goes on where one was given up, with the
same stream; nothing of the first is needed.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

# What does not pass by itself, though the system says it.
_LASTING = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
# Seconds before a failed read is tried again; where the system says that the disk does not answer,
# every `_LAST_PAUSE` from then on.
_PAUSES = (1.0, 4.0, 16.0)
_LAST_PAUSE = 60.0
_LEAVE_SECONDS = 5.0  # that a reader is waited for in the end; one that hangs is left to itself


@contextlib.contextmanager
def read_ahead(
    read: Callable[[int], T],
    numbers: Sequence[int],
    *,
    reopen: Callable[[], None],
    what: str = "batch",
    depth: int = 2,
    patience: float | None = None,
) -> Iterator[Iterator[T]]:
    """A context whose iterator gives `read(number)` for each number in order.

    A thread reads up to `depth` of them ahead, from the moment the context is entered until it is
    left. A read that fails is tried again: with an OSError that may pass for as long as it takes,
    with another error three times; then it is raised where its turn comes. A read that
    takes more than `patience` seconds is left to its thread, and another one reads instead, for
    twice as long. All is told on standard error.

    Args:
      read: called by the threads; the same for the same number.
      numbers: what is read.
      reopen: called before another attempt; after it, `read` needs nothing (no lock, no open file)
        that an earlier one may hold.
      what: names a number in what is told.
      depth: at least 1.
      patience: seconds; None: without end.
    """
    reader = _Reader(read, numbers, reopen, what, depth)

    def items() -> Iterator[T]:
        nonlocal reader
        for place, number in enumerate(numbers):
            seconds = patience
            while True:
                try:
                    item = reader.take(seconds)
                    break
                except queue.Empty:
                    _tell(
                        f"{what} {number} was not read within {seconds:g} s (a disk that does not "
                        "answer?): its reader is left, and another one reads instead"
                    )
                # Longer each time: a disk that is merely slow must come to an end.
                seconds = seconds and 2 * seconds
                reader.stop()
                reopen()
                reader = _Reader(read, numbers[place:], reopen, what, depth)
            yield item

    try:
        yield items()
    finally:
        reader.stop()
        reader.join()


class _Reader(Generic[T]):
    """A thread that reads until it is stopped or fails."""

    def __init__(
        self,
        read: Callable[[int], T],
        numbers: Sequence[int],
        reopen: Callable[[], None],
        what: str,
        depth: int,
    ):
        self._read, self._numbers, self._reopen, self._what = read, numbers, reopen, what
        self._items: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._stopped = threading.Event()
        self._reading_since: float | None = None
        # A daemon, as a process must be able to end while one hangs.
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def take(self, patience: float | None) -> T:
        """The next item; raises the reader's error, or queue.Empty where a read takes too long."""
        while True:
            try:
                left = None if patience is None else max(0.01, patience - self._reading_seconds())
                item, error = self._items.get(timeout=left)
                break
            except queue.Empty:
                if patience is not None and self._reading_seconds() >= patience:
                    raise
        self._room.release()
        if error is not None:
            raise error
        return item  # type: ignore[return-value]

    def _reading_seconds(self) -> float:
        """How long the read under way has taken; 0 between reads."""
        since = self._reading_since
        return 0.0 if since is None else time.monotonic() - since

    def stop(self) -> None:
        self._stopped.set()
        self._room.release()

    def join(self) -> None:
        self._thread.join(_LEAVE_SECONDS)

    def _run(self) -> None:
        for number in self._numbers:
            self._room.acquire()
            if self._stopped.is_set():
                return
            try:
                self._items.put((self._persistently(number), None))
            except Exception as error:
                self._items.put((None, error))
                return

    def _persistently(self, number: int) -> T:
        for attempt in itertools.count():
            self._reading_since = time.monotonic()
            try:
                if attempt:
                    self._reopen()
                return self._read(number)
            except Exception as error:
                spent = attempt >= len(_PAUSES)
                may_pass = isinstance(error, OSError) and not isinstance(error, _LASTING)
                if self._stopped.is_set() or (spent and not may_pass):
                    raise
                pause = _LAST_PAUSE if spent else _PAUSES[attempt]
                self._reading_since = None
                _tell(
                    f"{self._what} {number} could not be read ({str(error) or repr(error)}); "
                    f"trying again in {pause:g} s"
                )
                if self._stopped.wait(pause):
                    raise
            finally:
                self._reading_since = None
        raise AssertionError


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
