"""Ends a process whose steps have stopped, so that a launcher can start it again."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from tinyllama_jax.parallel.distributed import LOST_PEER

STACKS = "stacks.txt"
_TICK_SECONDS = 1.0


class Watchdog:
    """Watches while it is entered: without a `beat` for `seconds`, the process exits with 76.

    What every thread was doing is appended to RUN/stacks.txt before.

    Args:
      run_dir: the run directory.
      seconds: longer than any step; 0: never.
    """

    def __init__(self, run_dir: Path, seconds: float):
        self._path, self._seconds = Path(run_dir) / STACKS, seconds
        self._silent = 0.0
        self._pauses = 0
        self._left = threading.Event()

    def beat(self) -> None:
        """A step, or a batch of an evaluation, has finished."""
        self._silent = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Restoring, compiling, saving: may take what they take."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            self.beat()

    def __enter__(self) -> Watchdog:
        if self._seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()

    def _watch(self) -> None:
        tick = min(_TICK_SECONDS, self._seconds / 4)
        while not self._left.wait(tick):
            if self._pauses:
                continue
            # Counted in ticks: a machine that slept did not hang.
            self._silent += tick
            if self._silent >= self._seconds:
                self._end()

    def _end(self) -> None:
        where = f"process {jax.process_index()} of {jax.process_count()}"
        try:
            with open(self._path, "a") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {where}, pid {os.getpid()}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
            told = f"what each thread was doing is in {self._path}"
        except OSError as error:
            faulthandler.dump_traceback(all_threads=True)
            told = f"{self._path} cannot be written ({error})"
        print(
            f"\nno step, and no batch of an evaluation, has finished for {self._seconds:g} s "
            f"(watchdog.seconds); {told}. {where} ends with exit code {LOST_PEER}: start the same "
            f"command again, and it goes on from its last saved step",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(LOST_PEER)
