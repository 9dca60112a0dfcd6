"""Training processes, killed and started again: what they compute is what one would."""

import concurrent.futures
import contextlib
import os
import pathlib
import random
import signal
import time

import pytest

from tests.faults.trainer import SAVE_EVERY, STEPS, last_step, log_of, logged, saved

MIDDLE_OF_A_SAVE = "the middle of a save"


def kill(trainer, run_dir: pathlib.Path, moment: int | str) -> None:
    """Trains until a step is logged, or until a save is on its way, and no further."""
    left = unsealed(run_dir)
    (process,) = trainer.start(run_dir).processes
    while process.poll() is None:
        saving = moment == MIDDLE_OF_A_SAVE and unsealed(run_dir) - left
        if saving or (moment != MIDDLE_OF_A_SAVE and last_step(run_dir) >= moment):
            process.send_signal(signal.SIGKILL)
        time.sleep(0.001)
    assert process.returncode == -signal.SIGKILL, log_of(run_dir).read_text()


def kill_within_a_save(trainer, run_dir: pathlib.Path) -> None:
    """Kills at the next save, and the next, until one is truly cut off."""
    for _ in range(4):
        left = unsealed(run_dir)
        kill(trainer, run_dir, MIDDLE_OF_A_SAVE)
        if unsealed(run_dir) - left:
            return
    pytest.fail("four kills came too late for the save that they were meant for")


def unsealed(run_dir: pathlib.Path) -> set[tuple[str, int]]:
    """The saves that are not sealed, under way or cut off: names, and when they last grew."""
    found = set()
    for path in run_dir.glob("checkpoints/*.unsealed*"):
        with contextlib.suppress(FileNotFoundError):  # sealed in between
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def assert_same_run(run_dir, uninterrupted):
    assert logged(run_dir) == logged(uninterrupted)
    assert saved(run_dir) == saved(uninterrupted)


def kill_repeatedly(trainer, run_dir, moments):
    for moment in moments:
        if moment == MIDDLE_OF_A_SAVE:
            kill_within_a_save(trainer, run_dir)
        else:
            kill(trainer, run_dir, moment)
        print(f"{run_dir.name}: killed at {moment}, after step {last_step(run_dir)} was logged")


def kill_and_finish(trainer, run_dir, moments):
    kill_repeatedly(trainer, run_dir, moments)
    trainer.finish(run_dir)


def flip_a_bit(draw, run_dir):
    """Damages the newest sealed step, and returns its number and the file."""
    step = max(int(path.parent.name) for path in run_dir.glob("checkpoints/*/integrity.json")
               if path.parent.name.isdecimal())  # fmt: skip
    files = [path for path in (run_dir / f"checkpoints/{step}").rglob("*") if path.is_file()]
    path = draw.choice(sorted(path for path in files if path.stat().st_size > 1000))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return step, path


def chance() -> random.Random:
    seed = int(os.environ.get("TINYLLAMA_KILL_SEED") or random.SystemRandom().randrange(10**6))
    print(f"kill points of TINYLLAMA_KILL_SEED={seed}")
    return random.Random(seed)


def test_four_kills_and_a_flipped_bit_change_nothing(trainer, uninterrupted):
    """Two runs at a time, one for each core.

    One is killed early, maybe before its first save, and in the middle of a save. The other is
    killed early and late; then its newest checkpoint is damaged, and the one before must do.
    """
    draw = chance()
    saves, damage = trainer.directory / "saves", trainer.directory / "damage"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        moments = [draw.randrange(1, 15), MIDDLE_OF_A_SAVE]
        beside = pool.submit(kill_and_finish, trainer, saves, moments)

        kill_repeatedly(trainer, damage, [draw.randrange(1, 15), draw.randrange(25, STEPS)])
        step, path = flip_a_bit(draw, damage)
        output = trainer.finish(damage)
        beside.result()
    assert f"passing over step {step}: " in output and path.name in output
    assert f"resumed from step {step - SAVE_EVERY}\n" in output
    assert_same_run(damage, uninterrupted)
    assert_same_run(saves, uninterrupted)


@pytest.mark.slow
def test_twenty_kills_change_nothing(trainer, uninterrupted):
    draw = chance()
    pairs = [(draw.randrange(1, 20), draw.randrange(20, STEPS)) for _ in range(5)]
    pairs += [(MIDDLE_OF_A_SAVE, draw.randrange(20, STEPS)) for _ in range(3)]
    pairs += [(draw.randrange(1, 20), MIDDLE_OF_A_SAVE) for _ in range(2)]
    runs = {trainer.directory / f"many-{index}": pair for index, pair in enumerate(pairs)}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run: kill_and_finish(trainer, run, runs[run]), runs))
    for run in runs:
        assert_same_run(run, uninterrupted)
