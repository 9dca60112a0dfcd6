"""A run that is asked to end: all processes save the same step, and exit with a code that means
"start me again".

SIGTERM is what schedulers send before they take a machine away; SIGUSR1 is what Slurm sends ahead
of a time limit (`--signal=USR1@120`). Of several processes jax's own preemption service picks the
step, whichever process was asked. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

import jax

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h


class Preempted(Exception):
    """The run ended early because it was asked to; the message says where it goes on."""


class Preemption:
    """Listens while it is entered."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._listen(signal.SIGUSR1)
            if jax.process_count() == 1:
                self._listen(signal.SIGTERM)  # of several, jax listens to it
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def reached(self, step: int) -> bool:
        """Whether all processes are to save after this step, and end; each asks after each step."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def _listen(self, number: int) -> None:
        self._before[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
