"""One writer per run directory."""

import errno
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from tinyllama_jax.runs import lock
from tinyllama_jax.runs.lock import LOCK, RunLock


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "_WATCH_SECONDS", 0.4)


def entry_of(run_dir) -> dict:
    return json.loads((run_dir / LOCK).read_text())


def write_entry(run_dir, **changes) -> None:
    with RunLock(run_dir):
        entry = entry_of(run_dir)
    (run_dir / LOCK).write_text(json.dumps(entry | changes))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_names_its_holder_and_goes_away(tmp_path):
    run = tmp_path / "run"
    with RunLock(run) as held:
        assert entry_of(run)["pid"] == os.getpid()
        held.require_held()
    assert list(run.iterdir()) == []


def test_a_lock_goes_away_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), RunLock(tmp_path):
        raise RuntimeError
    assert not (tmp_path / LOCK).exists()


def test_a_second_writer_in_the_same_process_is_refused(tmp_path):
    message = rf"process {os.getpid()} on .*wait for it, stop it .*kill {os.getpid()}.*--workdir"
    with RunLock(tmp_path):
        with pytest.raises(ValueError, match=message), RunLock(tmp_path):
            pass
        assert entry_of(tmp_path)["pid"] == os.getpid()  # the refused one removed nothing
    assert not (tmp_path / LOCK).exists()


def test_a_second_process_is_refused_and_may_enter_afterwards(tmp_path):
    enter = "import sys; from tinyllama_jax.runs.lock import RunLock\nwith RunLock(sys.argv[1]): 1"
    command = [sys.executable, "-c", enter, str(tmp_path)]
    with RunLock(tmp_path):
        refused = subprocess.run(command, capture_output=True, text=True)
        assert refused.returncode != 0 and f"process {os.getpid()}" in refused.stderr
    assert subprocess.run(command).returncode == 0


def test_the_counter_moves(tmp_path, quick):
    with RunLock(tmp_path):
        first = entry_of(tmp_path)["counter"]
        time.sleep(0.3)
        assert entry_of(tmp_path)["counter"] > first


def test_a_dead_process_on_this_host_is_taken_over_at_once(tmp_path, capsys):
    write_entry(tmp_path, pid=dead_pid())
    began = time.monotonic()
    with RunLock(tmp_path):
        assert time.monotonic() - began < 5
        assert entry_of(tmp_path)["pid"] == os.getpid()
    assert capsys.readouterr().err.count("taking over") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_pid_that_another_process_got_since_is_taken_over(tmp_path, capsys):
    write_entry(tmp_path, process_start="1")
    with RunLock(tmp_path):
        assert "taking over" in capsys.readouterr().err


def test_a_killed_process_that_nobody_waited_for_is_taken_over(tmp_path, capsys):
    enter = (
        "import sys, time\nfrom tinyllama_jax.runs.lock import RunLock\n"
        "with RunLock(sys.argv[1]): print('in', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", enter, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"in\n"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    with RunLock(tmp_path):
        assert "taking over" in capsys.readouterr().err
    process.wait()
    process.stdout.close()


def test_a_holder_on_a_full_disk_is_refused(tmp_path, quick, monkeypatch):
    with RunLock(tmp_path) as held:
        write_text = pathlib.Path.write_text

        def full(path, text):
            if held._entry["token"] in path.name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write_text(path, text)

        monkeypatch.setattr(pathlib.Path, "write_text", full)
        counter = entry_of(tmp_path)["counter"]
        monkeypatch.setattr(lock, "_machine", lambda: "elsewhere")
        with pytest.raises(ValueError, match="is being written by"), RunLock(tmp_path):
            pass
        assert entry_of(tmp_path)["counter"] <= counter + 1  # it could not be raised


def test_another_host_that_moves_its_counter_is_refused(tmp_path, quick, monkeypatch):
    with RunLock(tmp_path):
        monkeypatch.setattr(lock, "_machine", lambda: "elsewhere")
        with pytest.raises(ValueError, match="is being written by"), RunLock(tmp_path):
            pass


def test_another_host_that_stands_still_is_taken_over(tmp_path, quick, capsys):
    write_entry(tmp_path, machine="elsewhere", host="node7")
    with RunLock(tmp_path):
        assert entry_of(tmp_path)["pid"] == os.getpid()
    errors = capsys.readouterr().err
    assert "on node7" in errors and "watching" in errors and "taking over" in errors


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_lock_that_is_torn_is_taken_over(tmp_path, text, capsys):
    (tmp_path / LOCK).write_text(text)
    with RunLock(tmp_path):
        assert entry_of(tmp_path)["pid"] == os.getpid()
    assert "unknown host" in capsys.readouterr().err


def test_a_holder_that_was_taken_over_learns_of_it_and_leaves_the_new_lock(tmp_path, quick):
    with RunLock(tmp_path) as slept:
        entry = entry_of(tmp_path) | {"token": "another", "host": "node7"}
        slept._stop.set()
        slept._beating.join()
        (tmp_path / LOCK).write_text(json.dumps(entry))
        with pytest.raises(ValueError, match=r"taken over by process .* on node7"):
            slept.require_held()
    assert entry_of(tmp_path)["token"] == "another"


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path):
    write_entry(tmp_path, pid=dead_pid())
    enter = (
        "import sys, time\nfrom tinyllama_jax.runs.lock import RunLock\n"
        "with RunLock(sys.argv[1]): print('in', flush=True); time.sleep(2)"
    )
    command = [sys.executable, "-c", enter, str(tmp_path)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(4)
    ]
    entered = [process.communicate()[0].strip() for process in processes]
    assert entered.count("in") == 1
