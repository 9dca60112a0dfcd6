"""What a checkpoint costs: how long a save holds training up, and a restart from it takes.

The state of a preset, in parts over all devices, is saved, dropped and restored, as training does
it, files and arrays verified; then one small step runs.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tinyllama_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from tinyllama_jax.data.batch import Batch
from tinyllama_jax.model.llama import Llama, parameter_count
from tinyllama_jax.parallel import mesh, rules
from tinyllama_jax.training.losses import NextToken
from tinyllama_jax.training.optimizer import make_optimizer
from tinyllama_jax.training.step import init_state, make_train_step

_SEQ_LEN = 32  # of the first step, which is there to be compiled and run, not to be fast
# Of the state, at the fullest moment: 4.2 GB of it took 23.7 GB (8 devices that a CPU pretended to
# be, where "host" copies lie in the same memory).
_COPIES = 6
_BYTES_PER_PARAM = 12


def fitted(model: ModelConfig) -> ModelConfig:
    """The model, or with as many layers as this machine's memory holds a run of."""
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 0.8
    while _COPIES * _BYTES_PER_PARAM * parameter_count(model) > room and model.num_layers > 1:
        model = dataclasses.replace(model, num_layers=model.num_layers // 2, scan_unroll=1)
    return model


def measure(model: ModelConfig, directory: Path | None, *, rounds: int) -> list[dict[str, Any]]:
    """Saves and restores the state of a model, over all devices along `fsdp`.

    Args:
      model: the shape; it must divide over the devices.
      directory: where it is written, and read back from what the system still holds of it in
        memory; None: where temporary files go.
      rounds: how often.

    Returns:
      A row per round: bytes of the state, seconds that the save held the caller up, until it was
      sealed, of the restore, of compiling the step (none where that was cached) and of the first.

    Raises:
      ValueError: what was restored is not what was saved.
    """
    from tinyllama_jax.runs.checkpoint import Checkpointer

    shape = (1, jax.device_count(), 1)
    with mesh.in_use(shape), tempfile.TemporaryDirectory(dir=directory) as run_dir:
        config = _config(model, rows=shape[1])
        llama, optimizer = Llama(model), make_optimizer(config.optimizer)
        rows = []
        for _ in range(rounds):
            state = init_state(llama, optimizer, seed=0)
            jax.block_until_ready(state)
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            with Checkpointer(Path(run_dir), CheckpointConfig(keep_last=1)) as checkpoints:
                began = time.perf_counter()
                stall = checkpoints.save(1, state, {})
                if not checkpoints.wait():
                    raise ValueError("the state could not be saved, for the reason above")
                saved = time.perf_counter() - began
                abstract = rules.placed(jax.eval_shape(lambda: init_state(llama, optimizer, 0)))
                del state
                began = time.perf_counter()
                restored = checkpoints.restore(abstract)  # fingerprints and all
                assert restored is not None
                jax.block_until_ready(restored.state)
                read = time.perf_counter() - began
            batch = rules.place_rows(_batch(shape[1]), shape[1])
            step = make_train_step(llama, NextToken(config), optimizer, config)
            began = time.perf_counter()
            compiled = step.lower(restored.state, batch).compile()
            ready = time.perf_counter()
            float(compiled(restored.state, batch)[1]["loss"])
            rows.append({
                "bytes": size,
                "stall_seconds": stall,
                "save_seconds": saved,
                "restore_seconds": read,
                "compile_seconds": ready - began,
                "first_step_seconds": time.perf_counter() - ready,
            })  # fmt: skip
            del restored, compiled
        return rows


def _config(model: ModelConfig, rows: int) -> Config:
    tokens = rows * _SEQ_LEN
    return Config(
        model=model,
        data=DataConfig(seq_len=_SEQ_LEN),
        optimizer=OptimizerConfig(warmup_steps=0),
        training=TrainingConfig(
            train_tokens=10 * tokens, global_batch_tokens=tokens, micro_batch_size=1
        ),
    )


def _batch(rows: int) -> Batch:
    ids = np.zeros((rows, _SEQ_LEN), np.int32)
    return Batch(ids, ids, np.ones(ids.shape, np.float32))
