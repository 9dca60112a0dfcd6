"""A run that is asked to end: all processes save the same step, and exit with a code that means
"start me again".

SIGTERM is what schedulers send before they take a machine away; SIGUSR1 is what Slurm sends ahead
of a time limit (`--signal=USR1@120`). Of several processes jax's own preemption service picks the
step, whichever process was asked. A second signal ends the process at once, unless it follows the
first within seconds: whoever stops a whole group of processes reaches one twice.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

import jax

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h
_SAME_REQUEST_SECONDS = 5.0


class Preempted(Exception):
    """The run ended early because it was asked to; the message says where it goes on."""


class Preemption:
    """Listens while it is entered, by the main thread; a request waits until it is asked for."""

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._calls = 0
        self._reached = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._listen(signal.SIGUSR1)
            if jax.process_count() == 1:
                self._listen(signal.SIGTERM)  # of several, jax listens to it
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def reached(self) -> bool:
        """Whether all processes are to save now, and end.

        All ask alike: after each step, and before each batch that is evaluated.
        """
        self._calls += 1
        if jax.process_count() == 1:
            return self._asked_at is not None
        from jax.experimental import multihost_utils

        # Counted from this start on: jax tells it at the one call that it has chosen, which, asked
        # before the first step, is the first.
        if not self._reached:
            self._reached = multihost_utils.reached_preemption_sync_point(self._calls)
        return self._reached

    def _listen(self, number: int) -> None:
        self._before[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is not None:
            if now - self._asked_at > _SAME_REQUEST_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._asked_at = now
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
