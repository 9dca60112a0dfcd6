"""What the checkpoint fault tests run in another process, to be killed (not a test itself)."""

import os
import shutil
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tinyllama_jax.config import CheckpointConfig
from tinyllama_jax.runs import integrity
from tinyllama_jax.runs.checkpoint import Checkpointer


def state_at(step: int) -> dict:
    """About 1 MB that follows from the step alone."""
    normal = np.random.default_rng(step).normal
    return {
        "step": jnp.int32(step),
        "params": {"w": jnp.asarray(normal(size=(100, 1000)), jnp.float32)},
        "opt_state": [jnp.asarray(normal(size=(100, 1000)), jnp.float32), jnp.array(True)],
    }


def kill_self(*arguments: object, **named: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str) -> None:
    """Arranges for this process to be killed at a moment of its next save."""
    seal, rename, rmtree = integrity.seal, Path.rename, shutil.rmtree
    if moment == "after Orbax committed":
        integrity.seal = kill_self
    elif moment == "while sealing":
        os.replace = kill_self
    elif moment == "after sealing":
        integrity.seal = lambda *arguments: (seal(*arguments), kill_self())
    elif moment == "while replacing":
        Path.rename = lambda path, to: (
            kill_self() if path.suffix.startswith(".unsealed") else rename(path, to)
        )
    elif moment == "while deleting the old":

        def half(path, *arguments, **named):
            if path.suffix == ".removed":
                rmtree(path / "params")
                kill_self()
            rmtree(path, *arguments, **named)

        shutil.rmtree = half
    else:
        raise ValueError(moment)


def save_and_die(run_dir: str, steps: list[int], last: int, moment: str) -> None:
    checkpoints = Checkpointer(Path(run_dir), CheckpointConfig(keep_last=len(steps)))
    for step in steps:
        checkpoints.save(step, state_at(step), {})
    checkpoints.wait()
    die_at(moment)
    checkpoints.save(last, state_at(-last % 1000), {})
    checkpoints.wait()
    raise AssertionError("survived")


def save_for_ever(run_dir: str) -> None:
    checkpoints = Checkpointer(Path(run_dir), CheckpointConfig(keep_last=2))
    step = max(checkpoints.steps(), default=0)
    while True:
        step += 1
        checkpoints.save(step, state_at(step), {"step": step})


if __name__ == "child":
    globals()[FUNCTION](*ARGUMENTS)  # noqa: F821 - given by whoever runs this file
