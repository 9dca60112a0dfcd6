"""One writer per run directory.

LOCK names its holder (host, pid) and a counter that the holder raises every 15 seconds; on a full
disk it only touches the file. On the same machine the pid decides whether the holder lives; from
another machine the counter does, since clocks differ. There is no `flock`: network disks do not
keep it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

LOCK = "LOCK"
_BEAT_SECONDS = 15.0
_WATCH_SECONDS = 40.0  # two beats, and room for a slow network disk


class RunLock:
    """Holds a run directory for writing while it is entered.

    Raises on entering:
      ValueError: another process writes to the run: who, and what to do.
    """

    def __init__(self, run_dir: Path):
        self._path = Path(run_dir) / LOCK
        self._entry: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "machine": _machine(),
            "command": shlex.join(sys.argv),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "token": secrets.token_hex(8),
            "counter": 0,
        }
        self._temporary = self._path.with_name(f"{LOCK}.{self._entry['token']}")
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            holder = _read(self._path)
            if holder is None:  # removed, or being written, between the two calls
                continue
            self._refuse_or_take_over(holder)
        self._beating = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._beating.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._beating is not None:
            self._beating.join()
        if self._is_ours():
            self._path.unlink(missing_ok=True)
        self._temporary.unlink(missing_ok=True)  # of a last beat on a full disk

    def require_held(self) -> None:
        """Checks that nobody has taken the run over, as happens to a process that slept for long.

        Raises:
          ValueError: somebody has, and this process must not write any more.
        """
        holder = _read(self._path)
        if holder is None or holder["token"] != self._entry["token"]:
            by = f"by {_described(holder)}" if holder else "and then released"
            raise ValueError(
                f"{self._path} was taken over {by}: this process did not raise its counter for "
                f"{_WATCH_SECONDS:.0f} s and was believed dead. Two writers would mix their "
                "metrics and checkpoints, so this one must stop"
            )

    def _create(self) -> bool:
        """Puts the whole LOCK in place, unless there is one; a link is atomic on network disks."""
        self._temporary.write_text(json.dumps(self._entry))
        try:
            os.link(self._temporary, self._path)
        except FileExistsError:
            return False
        finally:
            self._temporary.unlink()
        return True

    def _refuse_or_take_over(self, holder: dict[str, Any]) -> None:
        if holder["machine"] == self._entry["machine"]:
            alive = _is_running(holder["pid"], holder["process_start"])
        else:
            _say(f"{self._path} is held by {_described(holder)}; watching for "
                 f"{_WATCH_SECONDS:.0f} s whether it lives")  # fmt: skip
            alive = self._beats(holder)
        if alive:
            raise ValueError(
                f"{self._path.parent} is being written by {_described(holder)}. Two writers would "
                "mix their metrics and checkpoints: wait for it, stop it "
                f"(on {holder['host']}: kill {holder['pid']}), or name another --workdir"
            )
        # Whoever renames it has it: of two that find it stale, one fails here and looks again.
        stale = self._path.with_name(f"{LOCK}.stale.{self._entry['token']}")
        try:
            os.rename(self._path, stale)
        except FileNotFoundError:
            return
        taken = _read(stale)
        if taken is not None and taken["token"] != holder["token"]:
            os.link(stale, self._path)  # the other one was faster: give it back its LOCK
        else:
            _say(f"taking over {self._path} from {_described(holder)}, which no longer runs")
        stale.unlink()

    def _beats(self, holder: dict[str, Any]) -> bool:
        """Whether the holder raises its counter or, its disk being full, touches the LOCK."""
        deadline = time.monotonic() + _WATCH_SECONDS
        touched = self._touched()
        while time.monotonic() < deadline:
            time.sleep(min(1.0, _BEAT_SECONDS))
            now = _read(self._path)
            if now is None:
                return False
            if (now["token"], now["counter"]) != (holder["token"], holder["counter"]):
                return True
            if self._touched() != touched:
                return True
        return False

    def _touched(self) -> int:
        try:
            return self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _is_ours(self) -> bool:
        holder = _read(self._path)
        return holder is not None and holder["token"] == self._entry["token"]

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT_SECONDS):
            try:
                if not self._is_ours():
                    return  # taken over; `require_held` says so
                self._entry["counter"] += 1
                self._temporary.write_text(json.dumps(self._entry))
                os.replace(self._temporary, self._path)
            except OSError:  # a full disk or a slow server: the next beat tries again
                with contextlib.suppress(OSError):
                    os.utime(self._path)


def holder_of(run_dir: Path) -> str:
    """Who writes to a run, as a reader can tell; "" where nobody does, or a process that ended."""
    holder = _read(Path(run_dir) / LOCK)
    if holder is None:
        return ""
    alive = False
    if holder["machine"] == _machine():
        alive = _is_running(holder["pid"], holder["process_start"])
    else:  # touched at each beat; clocks of machines differ by less than this
        with contextlib.suppress(FileNotFoundError):
            alive = time.time() - (Path(run_dir) / LOCK).stat().st_mtime < 300
    return _described(holder) if alive else ""


def _read(path: Path) -> dict[str, Any] | None:
    """The holder's entry; None if there is no LOCK. One that is no entry reads as a dead holder."""
    try:
        entry = json.loads(path.read_text())
        return {key: entry[key] for key in _NOBODY} | {"token": entry["token"]}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return {**_NOBODY, "machine": _machine(), "token": ""}


_NOBODY = {"host": "an unknown host", "pid": 0, "process_start": "", "machine": "", "command": "",
           "since": "an unknown time", "counter": 0}  # fmt: skip


def _described(holder: dict[str, Any]) -> str:
    return (f"process {holder['pid']} on {holder['host']} since {holder['since']} "
            f"({holder['command']})")  # fmt: skip


def _machine() -> str:
    """What makes a pid mean the same process: host, boot and pid namespace (a container's own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = namespace = ""
    return f"{socket.gethostname()} {boot} {namespace}"


def _process_start(pid: int) -> str:
    """When a process started, in clock ticks since boot, as pids are used again; "" if unknown."""
    return _stat_field(pid, 22)


def _has_ended(pid: int) -> bool:
    """Whether a process waits only for its parent to notice its end, as in containers for ever."""
    return _stat_field(pid, 3) in ("Z", "X")


def _stat_field(pid: int, number: int) -> str:
    """A field of stat(5), counted from 1 as there; "" if unknown."""
    try:
        # The second field, the name, may itself hold spaces and brackets.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[number - 3]
    except (OSError, IndexError):
        return ""


def _is_running(pid: int, process_start: str) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's process
    return _process_start(pid) == process_start and not _has_ended(pid)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
