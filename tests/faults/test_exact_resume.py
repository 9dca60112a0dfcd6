"""Real training processes, killed and started again: what they compute is what one process would.

Each run is `python -m tinyllama_jax.train` on tiny_debug's model, 40 steps with a save every 5. The
processes share a compilation cache, as restarts on one machine may, so that a test takes seconds.
"""

import concurrent.futures
import json
import os
import pathlib
import random
import shutil
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
        process = self.start(run_dir)
        while process.poll() is None:
            if saving(run_dir) if moment == MIDDLE_OF_A_SAVE else last_step(run_dir) >= moment:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.001)
        assert process.returncode == -signal.SIGKILL, log_of(run_dir).read_text()

    def kill_within_a_save(self, run_dir: pathlib.Path) -> None:
        """Kills at the next save, and the next, until one is truly cut off."""
        for _ in range(4):
            self.kill(run_dir, MIDDLE_OF_A_SAVE)
            if saving(run_dir):
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


def saving(run_dir: pathlib.Path) -> bool:
    """Whether there is a save that is not sealed, under way or cut off."""
    try:
        return any(".unsealed" in name for name in os.listdir(run_dir / "checkpoints"))
    except FileNotFoundError:
        return False


def logged(run_dir: pathlib.Path) -> list[dict[str, str]]:
    """What was logged but for timing, every number as it is written."""
    records = [
        json.loads(line, parse_float=str, parse_int=str)
        for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    return [{k: v for k, v in record.items() if k not in TIMING} for record in records]


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


def kill_twice_and_finish(trainer, run_dir, moments):
    for moment in moments:
        if moment == MIDDLE_OF_A_SAVE:
            trainer.kill_within_a_save(run_dir)
        else:
            trainer.kill(run_dir, moment)
        print(f"{run_dir.name}: killed at {moment}, after step {last_step(run_dir)} was logged")
    trainer.finish(run_dir)
    return run_dir


def kill_pairs_of_runs(trainer, uninterrupted, name, pairs):
    """Two runs at a time, one for each core."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(kill_twice_and_finish, trainer, trainer.directory / f"{name}-{index}", pair)
            for index, pair in enumerate(pairs)
        ]
        for run in runs:
            assert_same_run(run.result(), uninterrupted)


def chance() -> random.Random:
    seed = int(os.environ.get("TINYLLAMA_KILL_SEED") or random.SystemRandom().randrange(10**6))
    print(f"kill points of TINYLLAMA_KILL_SEED={seed}")
    return random.Random(seed)


def test_four_kills_change_nothing(trainer, uninterrupted):
    """One early, maybe before the first save; one in the middle of a save; two anywhere later."""
    draw = chance()
    pairs = [
        (draw.randrange(1, 15), draw.randrange(20, STEPS)),
        (draw.randrange(1, 15), MIDDLE_OF_A_SAVE),
    ]
    kill_pairs_of_runs(trainer, uninterrupted, "few", pairs)


@pytest.mark.slow
def test_twenty_kills_change_nothing(trainer, uninterrupted):
    draw = chance()
    pairs = [(draw.randrange(1, 20), draw.randrange(20, STEPS)) for _ in range(5)]
    pairs += [(MIDDLE_OF_A_SAVE, draw.randrange(20, STEPS)) for _ in range(3)]
    pairs += [(draw.randrange(1, 20), MIDDLE_OF_A_SAVE) for _ in range(2)]
    kill_pairs_of_runs(trainer, uninterrupted, "many", pairs)


def test_a_flipped_bit_costs_some_steps_and_changes_nothing(trainer, uninterrupted):
    draw = chance()
    run_dir = trainer.directory / "flipped"
    shutil.copytree(uninterrupted, run_dir)
    newest = run_dir / "checkpoints" / str(STEPS)
    data = [p for p in newest.rglob("*") if p.is_file() and p.stat().st_size > 1000]
    path = draw.choice(sorted(data))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)

    output = trainer.finish(run_dir)
    assert f"passing over step {STEPS}: " in output and path.name in output
    assert f"resumed from step {STEPS - SAVE_EVERY}\n" in output
    assert_same_run(run_dir, uninterrupted)
