"""Real training processes, killed and started again: what they compute is what one process would.

Each run is `python -m tinyllama_jax.train` on tiny_debug's model, 40 steps with a save every 5. The
processes share a compilation cache, as restarts on one machine may, so that a test takes seconds.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import pytest

from tinyllama_jax.data.embedded import library_root
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.runs.checkpoint import Checkpointer
from tinyllama_jax.runs.directory import read_config
from tinyllama_jax.training.optimizer import make_optimizer
from tinyllama_jax.training.step import init_state

ROOT = pathlib.Path(__file__).parents[2]
STEPS, SAVE_EVERY = 40, 5
STALL = "checkpoint_stall_seconds"  # in the line after a save
TIMING = {"tokens_per_second", "step_seconds", "data_wait_seconds"}
MIDDLE_OF_A_SAVE = "the middle of a save"


class Trainer:
    """Starts training processes that share prepared data and compiled programs."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        settings = {
            "model.num_layers": 1,  # compiles sooner
            "data.prepared": directory / "prepared",
            "training.train_tokens": STEPS * 512,
            "checkpoint.every_steps": SAVE_EVERY,
            "evaluation.every_steps": 15,
            "logging.tensorboard": "false",
            "sampling.max_new_tokens": 4,
        }
        # Two packages of the standard library: enough for 40 steps, and prepared within a second.
        for source, package in (("code", "asyncio"), ("text", "email")):
            settings |= {
                f"data.sources.{source}.format": "text",
                f"data.sources.{source}.path": library_root() / package / "*.py",
                f"data.sources.{source}.validation_fraction": 0.1,
            }
        self.flags = [f"--config.{name}={value}" for name, value in settings.items()]
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, run_dir: pathlib.Path) -> subprocess.Popen:
        """A process that trains in `run_dir`, or goes on there; its output goes to `<run>.log`."""
        command = [sys.executable, "-m", "tinyllama_jax.train", "--config=configs/tiny_debug.py"]
        with open(log_of(run_dir), "ab") as log:
            return subprocess.Popen(
                [*command, f"--workdir={run_dir}", *self.flags],
                cwd=ROOT, env=self.environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def finish(self, run_dir: pathlib.Path) -> str:
        """Trains to the end, and returns what this process printed."""
        before = len(log_of(run_dir).read_text()) if log_of(run_dir).exists() else 0
        code = self.start(run_dir).wait(timeout=120)
        output = log_of(run_dir).read_text()[before:]
        assert code == 0, output
        return output

    def kill(self, run_dir: pathlib.Path, moment: int | str) -> None:
        """Trains until a step is logged, or until a save is on its way, and no further."""
        left = unsealed(run_dir)
        process = self.start(run_dir)
        while process.poll() is None:
            saving = moment == MIDDLE_OF_A_SAVE and unsealed(run_dir) - left
            if saving or (moment != MIDDLE_OF_A_SAVE and last_step(run_dir) >= moment):
                process.send_signal(signal.SIGKILL)
            time.sleep(0.001)
        assert process.returncode == -signal.SIGKILL, log_of(run_dir).read_text()

    def kill_within_a_save(self, run_dir: pathlib.Path) -> None:
        """Kills at the next save, and the next, until one is truly cut off."""
        for _ in range(4):
            left = unsealed(run_dir)
            self.kill(run_dir, MIDDLE_OF_A_SAVE)
            if unsealed(run_dir) - left:
                return
        pytest.fail("four kills came too late for the save that they were meant for")


def log_of(run_dir: pathlib.Path) -> pathlib.Path:
    return run_dir.with_name(f"{run_dir.name}.log")


def last_step(run_dir: pathlib.Path) -> int:
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0


def unsealed(run_dir: pathlib.Path) -> set[tuple[str, int]]:
    """The saves that are not sealed, under way or cut off: names, and when they last grew."""
    found = set()
    for path in run_dir.glob("checkpoints/*.unsealed*"):
        with contextlib.suppress(FileNotFoundError):  # sealed in between
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def logged(run_dir: pathlib.Path) -> list[dict[str, str]]:
    """What was logged but for timing, every number as it is written."""
    records = [
        json.loads(line, parse_float=str, parse_int=str)
        for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    return [{k: v for k, v in record.items() if k not in TIMING | {STALL}} for record in records]


def saved(run_dir: pathlib.Path) -> dict[int, list[bytes]]:
    """The bytes of every array of every checkpoint: params, moments and step."""
    config = read_config(run_dir)
    model, optimizer = Llama(config.model), make_optimizer(config.optimizer)
    abstract = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    with Checkpointer(run_dir, config.checkpoint, 512) as checkpoints:
        states = {step: checkpoints.restore(abstract, step).state for step in checkpoints.steps()}
    return {
        step: [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(state))]
        for step, state in states.items()
    }


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def uninterrupted(trainer):
    run_dir = trainer.directory / "uninterrupted"
    trainer.finish(run_dir)
    assert [r["step"] for r in logged(run_dir) if "loss" in r] == [
        str(step) for step in range(1, STEPS + 1)
    ]
    assert saved(run_dir).keys() == {STEPS - SAVE_EVERY, STEPS}
    return run_dir


def assert_same_run(run_dir, uninterrupted):
    assert logged(run_dir) == logged(uninterrupted)
    assert saved(run_dir) == saved(uninterrupted)


def kill_repeatedly(trainer, run_dir, moments):
    for moment in moments:
        if moment == MIDDLE_OF_A_SAVE:
            trainer.kill_within_a_save(run_dir)
        else:
            trainer.kill(run_dir, moment)
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
