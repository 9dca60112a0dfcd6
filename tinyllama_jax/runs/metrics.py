"""The numbers of a run: one JSON object per line in metrics.jsonl, and TensorBoard events.

Floats are written so that reading gives back the same bits; NaN and the infinities, which JSON does
not have, as the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
DISCARDED = "metrics.discarded.jsonl"
EVENTS = "events"
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Appends records to a run's metrics; the caller holds the run's lock.

    Args:
      run_dir: the run directory.
      tensorboard: write scalars to `events/` too.
    """

    def __init__(self, run_dir: Path, tensorboard: bool):
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._path = self._run_dir / METRICS
        self._events = _Events(self._run_dir / EVENTS) if tensorboard else None
        self._unwritten: list[bytes] = []
        self._failing = False
        _move_lines(self._run_dir, lambda record: True)  # a torn last line would tear the next
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record, in one system call: a kill loses at most a torn last line.

        A full disk is printed once and never raised; the record follows when there is room again.

        Args:
          record: `step` and scalars by name; numpy and jax scalars are taken too.
        """
        plain = {name: _plain(value) for name, value in record.items()}
        assert isinstance(plain.get("step"), int), record
        line = json.dumps({name: _encoded(value) for name, value in plain.items()}, allow_nan=False)
        self._unwritten.append(line.encode() + b"\n")
        self._tolerating_failure(self._flush)
        if self._events is not None:
            events = self._events
            self._tolerating_failure(lambda: events.write(plain))

    def rewind(self, step: int) -> None:
        """Moves the lines past a restored step, and a torn last one, to metrics.discarded.jsonl.

        Args:
          step: the restored step; 0 means that the run starts over, so that every line moves.
        """
        assert not self._unwritten, "rewind comes before the first write"
        os.close(self._file)
        _move_lines(self._run_dir, lambda record: step > 0 and record["step"] <= step)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if self._events is not None:
            self._events.purge_step = step + 1 if step > 0 else 0

    def has_evaluation(self, step: int) -> bool:
        """Whether the losses on held-out text were written at a step."""
        records = (_decoded(line) for line in self._path.read_bytes().split(b"\n"))
        return any(r is not None and r["step"] == step and "eval/loss" in r for r in records)

    def close(self) -> None:
        self._tolerating_failure(self._flush)
        os.close(self._file)
        if self._events is not None:
            self._tolerating_failure(self._events.close)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _flush(self) -> None:
        while self._unwritten:
            line = self._unwritten[0]
            size = os.fstat(self._file).st_size
            try:
                written = os.write(self._file, line)
            except OSError:
                written = -1
                raise
            finally:
                if written != len(line):  # a full disk may take half a line
                    os.truncate(self._path, size)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes could be written")
            del self._unwritten[0]

    def _tolerating_failure(self, write: Callable[[], None]) -> None:
        try:
            write()
            self._failing = False
        except OSError as error:
            if not self._failing:
                text = (
                    f"metrics cannot be written to {self._run_dir}: {error}; training goes on, and "
                    "they follow when there is room"
                )
                print(text, file=sys.stderr, flush=True)
            self._failing = True


class NoMetrics:
    """The writer of a process that writes none."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def rewind(self, step: int) -> None: ...

    def has_evaluation(self, step: int) -> bool:
        return False  # of the file that it does not write

    def __enter__(self) -> NoMetrics:
        return self

    def __exit__(self, *exception: object) -> None: ...


class _Events:
    """TensorBoard scalars.

    tensorboardX's own SummaryWriter hands events to a thread that dies on a full disk and then
    blocks whoever writes; its event file underneath is used directly.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._writer: Any = None
        self.purge_step = -1  # TensorBoard drops what older files say from this step on

    def write(self, record: Mapping[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if name != "step" and isinstance(value, (int, float))
        ]
        event = Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values))
        writer = self._open()
        writer.write_event(event)
        writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> Any:
        if self._writer is None:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog

            self._directory.mkdir(exist_ok=True)
            writer = EventsWriter(str(self._directory / "events"), f".{os.getpid()}")
            if self.purge_step >= 0:
                start = SessionLog(status=SessionLog.START)
                writer.write_event(
                    Event(wall_time=time.time(), step=self.purge_step, session_log=start)
                )
            self._writer = writer
        return self._writer


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run in the order they were written; a torn last line is left out.

    Raises:
      ValueError: the run has no metrics, or a line within the file is not a record.
    """
    path = Path(run_dir) / METRICS
    if not path.is_file():
        raise ValueError(f"{path} does not exist: no training step of this run was logged yet")
    lines = path.read_bytes().split(b"\n")[:-1]
    if not lines:
        raise ValueError(f"{path} is empty: no training step of this run was logged yet")
    records = [_decoded(line) for line in lines]
    for number, record in enumerate(records, start=1):
        if record is None:
            raise ValueError(
                f"{path}:{number} is not a metrics record: {lines[number - 1][:80]!r}; the file "
                "was edited or damaged; remove that line"
            )
    return [record for record in records if record is not None]


def read_discarded(run_dir: Path) -> list[dict[str, Any]]:
    """The records that a start had written beyond the step that a later one went on from."""
    path = Path(run_dir) / DISCARDED
    records = (_decoded(line) for line in path.read_bytes().split(b"\n")) if path.exists() else ()
    return [record for record in records if record is not None]


def _move_lines(run_dir: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Moves the lines that are not kept, or are no records, to the discarded ones."""
    path, discarded_path = run_dir / METRICS, run_dir / DISCARDED
    if not path.is_file():
        return
    *lines, torn = path.read_bytes().split(b"\n")
    kept: list[bytes] = []
    discarded: list[bytes] = []
    for line in lines:
        record = _decoded(line)
        (kept if record is not None and keep(record) else discarded).append(line)
    discarded += [torn] if torn else []
    if not discarded:
        return
    with open(discarded_path, "ab") as file:
        file.write(b"".join(line + b"\n" for line in discarded))
        file.flush()
        os.fsync(file.fileno())
    # Only now, so that a kill between the two leaves a line twice rather than nowhere.
    temporary = path.with_name(f"{METRICS}.tmp")
    with open(temporary, "wb") as file:
        file.write(b"".join(line + b"\n" for line in kept))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _encoded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decoded(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return {
        name: _SPECIAL.get(value, value) if isinstance(value, str) else value
        for name, value in record.items()
    }
