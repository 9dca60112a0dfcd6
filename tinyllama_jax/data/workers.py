"""Processes that work on units.

They are started with this module as their program rather than by multiprocessing, which would have
each import the caller's program, and with it jax, before its first unit. A worker reads pickled
units from its standard input and answers on its standard output; it ends when either is closed, so
none outlives a parent that was killed for longer than a moment.
"""

from __future__ import annotations

import os
import pathlib
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import IO, Any

from tinyllama_jax.data.units import Advance, Unit, write_unit
from tinyllama_jax.text.tokenizer import Tokenizer

# What a worker answers: (_ADVANCE, bytes, tokens) any number of times for each unit, then
# (_DONE,) or (_FAILED, exception).
_ADVANCE, _DONE, _FAILED = "advance", "done", "failed"
_REPORT_SECONDS = 0.3
_PACKAGE_PARENT = pathlib.Path(__file__).parents[2]


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def run_units(units: Sequence[Unit], tokenizer: Tokenizer, workers: int, advance: Advance) -> None:
    """Writes all units, `workers` at a time; `advance` is called from this thread.

    Raises:
      ValueError, OSError: what the first unit that failed raised; the others are stopped.
      RuntimeError: a worker died.
    """
    if min(workers, len(units)) <= 1:
        for unit in units:
            write_unit(unit, tokenizer, advance)
        return
    waiting: queue.SimpleQueue[Unit] = queue.SimpleQueue()
    for unit in units:
        waiting.put(unit)
    answers: queue.SimpleQueue[tuple] = queue.SimpleQueue()
    pool = [
        _Worker(tokenizer.model_proto, waiting, answers) for _ in range(min(workers, len(units)))
    ]
    try:
        finished = 0
        while finished < len(units):
            kind, *content = answers.get()
            if kind == _ADVANCE:
                advance(*content)
            elif kind == _DONE:
                finished += 1
            else:
                raise content[0]
    finally:
        for worker in pool:
            worker.stop()


class _Worker:
    """A process, and the thread that feeds it units and passes its answers on."""

    def __init__(
        self,
        model_proto: bytes,
        waiting: queue.SimpleQueue[Unit],
        answers: queue.SimpleQueue[tuple],
    ):
        path = os.pathsep.join(filter(None, (str(_PACKAGE_PARENT), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._thread = threading.Thread(
            target=self._serve, args=(model_proto, waiting, answers), daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Ends the process, in the middle of a unit too: that is started over another time."""
        self._process.kill()
        self._process.wait()
        self._thread.join()
        assert self._process.stdout is not None  # both ends are pipes
        self._process.stdout.close()

    def _serve(
        self,
        model_proto: bytes,
        waiting: queue.SimpleQueue[Unit],
        answers: queue.SimpleQueue[tuple],
    ) -> None:
        units, answered = self._process.stdin, self._process.stdout
        assert units is not None and answered is not None  # both ends are pipes
        try:
            _send(units, model_proto)
            while True:
                _send(units, waiting.get_nowait())
                kind = _ADVANCE
                while kind == _ADVANCE:
                    answer = pickle.load(answered)
                    kind = answer[0]
                    answers.put(answer)
        except queue.Empty:
            units.close()
        except (EOFError, OSError, pickle.UnpicklingError):
            error = RuntimeError(
                f"a worker process ended with code {self._process.wait()} in the middle of its "
                f"work; -9 is most often the system's answer to too little memory: try fewer "
                f"workers. Finished shards are kept: start again to continue"
            )
            answers.put((_FAILED, error))


def _send(pipe: IO[bytes], value: Any) -> None:
    pickle.dump(value, pipe)
    pipe.flush()


def _work(units: IO[bytes], answers: IO[bytes]) -> None:
    """A worker's life: units in, progress and outcome out."""
    try:
        tokenizer = Tokenizer.from_bytes(pickle.load(units))
        while True:
            report = _Report(answers)
            _send(answers, _outcome(pickle.load(units), tokenizer, report))
    except (EOFError, BrokenPipeError):
        return  # no more units, or nobody who wants them


def _outcome(unit: Unit, tokenizer: Tokenizer, report: _Report) -> tuple:
    try:
        write_unit(unit, tokenizer, report.advance)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        # As plain exceptions: those of libraries need not survive pickling.
        plain = OSError if isinstance(error, OSError) else ValueError
        return _FAILED, plain(str(error))
    except Exception:
        where = f"{unit.inputs[0].path} to {unit.inputs[-1].path}"
        return _FAILED, RuntimeError(f"while preparing {where}:\n{traceback.format_exc()}")
    report.send()
    return (_DONE,)


class _Report:
    """Collects progress, so that an answer is sent a few times a second only."""

    def __init__(self, answers: IO[bytes]):
        self._answers = answers
        self._bytes = self._tokens = 0
        self._sent = time.monotonic()

    def advance(self, count_bytes: int, count_tokens: int) -> None:
        self._bytes += count_bytes
        self._tokens += count_tokens
        if time.monotonic() - self._sent >= _REPORT_SECONDS:
            self.send()

    def send(self) -> None:
        _send(self._answers, (_ADVANCE, self._bytes, self._tokens))
        self._bytes = self._tokens = 0
        self._sent = time.monotonic()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent takes it, and stops its workers
    # What libraries print must not stand between the answers.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _work(sys.stdin.buffer, channel)
