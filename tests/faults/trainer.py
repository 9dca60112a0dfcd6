"""Real training processes for the fault tests, alone or several of one run.

Each run is `python -m tinyllama_jax.train` on tiny_debug's model, 40 steps with a save every 5. The
processes share a compilation cache, as restarts on one machine may, so that a test takes seconds.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

import jax

from tinyllama_jax.data.embedded import library_root
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.runs.checkpoint import Checkpointer
from tinyllama_jax.runs.directory import read_config
from tinyllama_jax.training.optimizer import make_optimizer
from tinyllama_jax.training.step import init_state

ROOT = pathlib.Path(__file__).parents[2]
STEPS, SAVE_EVERY = 40, 5
DOOR = ("-m", "tinyllama_jax.train")
STALL = "checkpoint_stall_seconds"  # in the line after a save
TIMING = {"tokens_per_second", "step_seconds", "data_wait_seconds", "time"}


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

    def start(
        self,
        run_dir: pathlib.Path,
        *flags: str,
        processes: int = 1,
        devices: int = 1,
        program: tuple[str, ...] = DOOR,
        other_program: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        config: str = "configs/tiny_debug.py",
    ) -> "Run":
        """Processes that train in `run_dir`, or go on there, with so many devices each.

        Output goes to `<run>.log`, of all but the first to `<run>.<number>.log`.
        """
        address = f"localhost:{free_port()}"
        started = []
        for number in range(processes):
            variables = self.environment | (environment or {})
            variables["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
            if processes > 1:
                variables |= {
                    "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes),
                    "JAX_PROCESS_ID": str(number),
                }  # fmt: skip
            what = other_program if number and other_program else program
            command = [sys.executable, *what, f"--config={config}"]
            with open(log_of(run_dir, number), "ab") as log:
                started.append(
                    subprocess.Popen(
                        [*command, f"--workdir={run_dir}", *self.flags, *flags],
                        cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip
        return Run(run_dir, started)

    def finish(self, run_dir: pathlib.Path, *flags: str, **options) -> str:
        """Trains to the end, and returns what the first process printed."""
        before = len(log_of(run_dir).read_text()) if log_of(run_dir).exists() else 0
        codes = self.start(run_dir, *flags, **options).wait()
        output = log_of(run_dir).read_text()[before:]
        assert set(codes) == {0}, (codes, output)
        return output


class Run:
    """The processes of one start of a run."""

    def __init__(self, run_dir: pathlib.Path, processes: list[subprocess.Popen]):
        self.run_dir, self.processes = run_dir, processes

    def wait(self, timeout: float = 120) -> list[int]:
        """The exit codes, in order; all are killed where one does not end in time."""
        deadline = time.monotonic() + timeout
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def until_step(self, step: int) -> None:
        """Waits until a step is logged."""
        deadline = time.monotonic() + 120
        while last_step(self.run_dir) < step:
            codes = [process.poll() for process in self.processes]
            assert codes == [None] * len(codes) and time.monotonic() < deadline, self.printed()
            time.sleep(0.005)

    def printed(self) -> str:
        """What all processes of all starts printed."""
        return "\n".join(
            log_of(self.run_dir, number).read_text() for number in range(len(self.processes))
        )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def log_of(run_dir: pathlib.Path, number: int = 0) -> pathlib.Path:
    """Where a process prints to."""
    return run_dir.with_name(f"{run_dir.name}.{number}.log" if number else f"{run_dir.name}.log")


def last_step(run_dir: pathlib.Path) -> int:
    """The last one logged; 0 before."""
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0


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
    with Checkpointer(run_dir, config.checkpoint) as checkpoints:
        states = {step: checkpoints.restore(abstract, step).state for step in checkpoints.steps()}
    return {
        step: [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(state))]
        for step, state in states.items()
    }


def losses(run_dir: pathlib.Path) -> list[float]:
    """Those of steps and evaluations, in order."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record.get("loss", record.get("eval/loss")) for record in records]
