"""Checkpoints under damage, kills, full disks and read-only directories."""

import errno
import multiprocessing
import os
import pathlib
import random
import resource
import runpy
import shutil
import subprocess
import time

import jax
import numpy as np
import pytest

from tinyllama_jax.config import CheckpointConfig
from tinyllama_jax.runs import checkpoint, integrity
from tinyllama_jax.runs.checkpoint import Checkpointer
from tinyllama_jax.runs.integrity import SEAL
from tinyllama_jax.runs.restore import CHECKPOINTS, restore_params

CHILD = pathlib.Path(__file__).with_name("saving_child.py")
state_at = runpy.run_path(str(CHILD))["state_at"]
KEEP_ALL = CheckpointConfig(keep_last=1000)
ABSTRACT = jax.eval_shape(lambda: state_at(0))


def checkpointer(run_dir, settings=KEEP_ALL) -> Checkpointer:
    return Checkpointer(run_dir, settings)


def assert_state(state, step: int) -> None:
    for found, expected in zip(
        jax.tree.leaves(state), jax.tree.leaves(state_at(step)), strict=True
    ):
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


def names_in(run_dir) -> list[str]:
    return sorted(path.name for path in (run_dir / CHECKPOINTS).iterdir())


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("saved")
    with checkpointer(run_dir) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, state_at(step), {})
    return run_dir


@pytest.fixture
def run_dir(saved_run, tmp_path):
    """A run with the sealed steps 10 and 20."""
    return shutil.copytree(saved_run, tmp_path / "run")


# Damage on disk.


def every_damage(directory):
    """Damages each file of a step in each way, one at a time, and yields what was done."""
    chooser = random.Random(0)
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        raw, name = path.read_bytes(), path.relative_to(directory)
        for index in chooser.sample(range(len(raw)), min(3, len(raw))):
            flipped = bytearray(raw)
            flipped[index] ^= 1 << chooser.randrange(8)
            path.write_bytes(flipped)
            yield f"bit {index} of {name} flipped"
        if raw:
            path.write_bytes(raw[:-1])
            yield f"{name} truncated"
            path.write_bytes(b"")
            yield f"{name} emptied"
        path.write_bytes(raw + b"\0")
        yield f"{name} lengthened"
        path.unlink()
        yield f"{name} deleted"
        path.write_bytes(raw)
    for folder in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
        (folder / "stranger").touch()
        yield f"file added to {folder.relative_to(directory)}"
        (folder / "stranger").unlink()


def test_every_damage_to_every_file_is_found(run_dir):
    directory = run_dir / CHECKPOINTS / "20"
    checkpoints = checkpointer(run_dir)
    kinds = 0
    for damage in every_damage(directory):
        kinds += 1
        try:
            checkpoints.restore(ABSTRACT, step=20)
        except ValueError as error:
            assert "step 20" in str(error) and "[10]" in str(error), damage
        else:
            pytest.fail(f"not found: {damage}")
    assert kinds > 60
    assert_state(checkpoints.restore(ABSTRACT).state, 20)  # and the undamaged step is good


@pytest.mark.parametrize("part", ["params", "training"])
def test_auto_passes_over_a_damaged_step_with_one_line(run_dir, capsys, part):
    data = max((run_dir / CHECKPOINTS / "20" / part).rglob("d/*"), key=os.path.getsize)
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 16
    data.write_bytes(raw)
    restored = checkpointer(run_dir).restore(ABSTRACT)
    assert restored.step == 10
    assert_state(restored.state, 10)
    lines = [line for line in capsys.readouterr().err.splitlines() if "passing over" in line]
    assert len(lines) == 1
    assert "step 20" in lines[0] and data.name in lines[0] and "changed" in lines[0]
    # Params alone do not hang on the optimizer state, which they do not read.
    assert restore_params(run_dir)[0] == (10 if part == "params" else 20)


@pytest.mark.parametrize("case", ["empty", "unsealed", "damaged seal", "file"])
def test_auto_passes_over_what_is_no_sealed_step(run_dir, capsys, case):
    newer = run_dir / CHECKPOINTS / "30"
    if case == "file":
        newer.touch()
    elif case == "empty":
        newer.mkdir()
    else:
        shutil.copytree(run_dir / CHECKPOINTS / "20", newer)
        if case == "unsealed":
            (newer / SEAL).unlink()
        else:
            (newer / SEAL).write_text("{}")
    checkpoints = checkpointer(run_dir)
    assert checkpoints.restore(ABSTRACT).step == 20
    expected = {
        "empty": "passing over step 30: it was never sealed",
        "unsealed": "passing over step 30: it was never sealed",
        "damaged seal": f"passing over step 30: {SEAL} itself is damaged",
        "file": "",
    }
    assert expected[case] in capsys.readouterr().err


def test_only_unsealed_steps_are_as_good_as_none(run_dir, capsys):
    for step in ("10", "20"):
        (run_dir / CHECKPOINTS / step / SEAL).unlink()
    assert checkpointer(run_dir).restore(ABSTRACT) is None
    assert capsys.readouterr().err.count("never sealed") == 2


def test_a_run_whose_steps_are_all_damaged_does_not_start_over_silently(run_dir):
    for step in ("10", "20"):
        (run_dir / CHECKPOINTS / step / "orbax.checkpoint").write_text("x")
    for read in (lambda: checkpointer(run_dir).restore(ABSTRACT), lambda: restore_params(run_dir)):
        with pytest.raises(ValueError, match=r"no checkpoint in .* is whole \(step 20: .*step 10:"):
            read()


def test_a_wrong_restore_of_whole_files_is_found(run_dir, monkeypatch, capsys):
    """The hashes of files cannot see this one; the fingerprints of arrays do."""
    load = checkpoint.ocp.load_checkpointables

    def wrong(directory, abstract):
        found = load(directory, abstract)
        if directory.name == "20":
            found["params"]["w"] = found["params"]["w"].at[3, 7].multiply(1 + 2.0**-23)
        return found

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", wrong)
    assert checkpointer(run_dir).restore(ABSTRACT).step == 10
    assert "params/w was restored with other bits" in capsys.readouterr().err


def test_a_save_after_fallback_replaces_the_damaged_step(run_dir):
    (run_dir / CHECKPOINTS / "20" / "metadata.json").write_text("{")
    with checkpointer(run_dir) as checkpoints:
        assert checkpoints.restore(ABSTRACT).step == 10
        checkpoints.save(20, state_at(20), {})
        assert_state(checkpoints.restore(ABSTRACT, step=20).state, 20)


# Kills.


@pytest.fixture(scope="session")
def processes():
    """Processes that start within milliseconds, as their server has imported all but a backend."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tinyllama_jax.runs.checkpoint"])
    return context


def start(processes, function: str, *arguments):
    given = {"FUNCTION": function, "ARGUMENTS": arguments}
    process = processes.Process(target=runpy.run_path, args=(str(CHILD), given, "child"))
    process.start()
    return process


def assert_whole_after_a_kill(run_dir, expected_step=None) -> None:
    """The newest step restores to its bits, the next save works, and nothing is left behind."""
    with checkpointer(run_dir, CheckpointConfig(keep_last=2)) as checkpoints:
        restored = checkpoints.restore(ABSTRACT)
        assert restored.step == checkpoints.steps()[-1]
        assert expected_step in (None, restored.step)
        assert_state(restored.state, restored.step)
        checkpoints.save(restored.step + 1, state_at(restored.step + 1), {})
        assert checkpoints.wait()
        assert checkpoints.restore(ABSTRACT).step == restored.step + 1
        assert names_in(run_dir) == sorted(map(str, checkpoints.steps()))


@pytest.mark.parametrize(
    ("moment", "steps", "last", "newest"),
    [
        ("after Orbax committed", [10], 20, 10),
        ("while sealing", [10], 20, 10),
        ("after sealing", [10], 20, 10),
        ("while replacing", [10, 20], 20, 20),
        ("while deleting the old", [10], 20, None),
    ],
)
def test_killed_at_a_moment_of_a_save(processes, tmp_path, moment, steps, last, newest):
    process = start(processes, "save_and_die", str(tmp_path), steps, last, moment)
    process.join(60)
    assert process.exitcode == -9
    if moment == "while deleting the old":
        assert names_in(tmp_path) == ["10.removed", "20"]
        assert checkpointer(tmp_path).steps() == [20]
        assert_state(checkpointer(tmp_path).restore(ABSTRACT).state, -20 % 1000)
    else:
        assert_whole_after_a_kill(tmp_path, newest)


def kill_at_random(processes, run_dir, seed: int) -> None:
    process = start(processes, "save_for_ever", str(run_dir))
    deadline = time.monotonic() + 60
    newest = max(checkpointer(run_dir).steps(), default=0)
    while max(checkpointer(run_dir).steps(), default=0) <= newest:
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 0.5))
    process.kill()
    process.join()
    assert_whole_after_a_kill(run_dir)


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_a_random_moment(processes, tmp_path, seed):
    kill_at_random(processes, tmp_path, seed)


@pytest.mark.slow
def test_killed_at_many_random_moments_of_one_run(processes, tmp_path):
    for seed in range(20):
        kill_at_random(processes, tmp_path, seed)


# Disks that refuse.


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB of its own, where this process may mount one."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(directory)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a file system here; the file size limit test stands in for it")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def assert_training_survives(run_dir, refuse, relent, capsys) -> None:
    """Saves 10, fails to save 20 and 25, and saves 30 when there is room again."""
    with checkpointer(run_dir) as checkpoints:
        checkpoints.save(10, state_at(10), {})
        assert checkpoints.wait()
        refuse()
        try:
            for step in (20, 25):
                checkpoints.save(step, state_at(step), {})
                assert not checkpoints.wait()
        finally:
            relent()
        warning, again = [
            line for line in capsys.readouterr().err.splitlines() if "could not be saved" in line
        ]
        assert "step 20 could" in warning and "step 25 could" in again
        assert "step 10 is the newest to resume from" in warning and "next save tries" in warning
        assert checkpoints.steps() == [10]
        assert_state(checkpoints.restore(ABSTRACT).state, 10)
        checkpoints.save(30, state_at(30), {})
        assert checkpoints.wait()
        assert names_in(run_dir) == ["10", "30"]
        assert_state(checkpoints.restore(ABSTRACT).state, 30)


def test_a_full_disk(small_disk, capsys):
    filler = small_disk / "filler"

    def fill() -> None:
        free = shutil.disk_usage(small_disk).free
        filler.write_bytes(bytes(free - 500_000))

    assert_training_survives(small_disk / "run", fill, filler.unlink, capsys)


def test_a_read_only_disk(small_disk, capsys):
    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    assert_training_survives(
        small_disk / "run", lambda: remount("ro"), lambda: remount("rw"), capsys
    )


def test_a_limit_on_file_size(tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert_training_survives(
        tmp_path,
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1])),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        capsys,
    )


def test_a_disk_that_fills_while_sealing(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert_training_survives(
        tmp_path, lambda: monkeypatch.setattr(integrity, "seal", full), monkeypatch.undo, capsys
    )


def test_a_first_save_that_fails(tmp_path, capsys):
    (tmp_path / CHECKPOINTS).write_text("in the way")
    with checkpointer(tmp_path) as checkpoints:
        checkpoints.save(10, state_at(10), {})
        assert not checkpoints.wait()
        assert "no step is saved yet" in capsys.readouterr().err
        (tmp_path / CHECKPOINTS).unlink()
        checkpoints.save(20, state_at(20), {})
        assert checkpoints.wait()
        assert checkpoints.steps() == [20]
