"""The train step on 8 devices equals the one on one, and keeps the state where the rules say."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import NamedSharding

from tinyllama_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from tinyllama_jax.data.batch import Batch
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.parallel import rules
from tinyllama_jax.parallel.mesh import BATCH, P, make_mesh
from tinyllama_jax.training.losses import NextToken
from tinyllama_jax.training.optimizer import make_optimizer
from tinyllama_jax.training.step import init_state, make_train_step

ROWS, S, V, STEPS = 16, 12, 64, 5


def config_for(devices: int) -> Config:
    """Two micro-batches a step, whatever the number of devices; learning rate 1e-3 throughout."""
    return Config(
        model=ModelConfig(
            vocab_size=V, num_layers=2, d_model=32, num_heads=8, num_kv_heads=8, head_dim=8,
            d_ff=64, max_seq_len=S, compute_dtype="float32",
        ),
        data=DataConfig(seq_len=S),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, min_learning_rate=1e-3, warmup_steps=0, grad_clip_norm=0.0
        ),
        training=TrainingConfig(
            train_tokens=ROWS * S * 100, global_batch_tokens=ROWS * S,
            micro_batch_size=ROWS // 2 // devices,
        ),
    )  # fmt: skip


def batch_at(step: int) -> Batch:
    ids = np.random.default_rng(step).integers(0, V, (ROWS, S + 1)).astype(np.int32)
    weights = np.random.default_rng(step + 100).random((ROWS, S)).astype(np.float32)
    return Batch(ids[:, :-1], ids[:, 1:], weights)


def train(shape):
    """Losses of the steps, the first params and the last, on a mesh or (None) on one device."""
    rows_over = shape[0] * shape[1] if shape else 1
    config = config_for(rows_over)
    model, optimizer = Llama(config.model), make_optimizer(config.optimizer)
    step = make_train_step(model, NextToken(config), optimizer, config)
    losses = []
    if shape is None:
        state = init_state(model, optimizer, seed=0)
        first = jax.device_get(state.params)
        for number in range(STEPS):
            state, metrics = step(state, batch_at(number))
            losses.append(float(metrics["loss"]))
        return losses, first, jax.device_get(state.params)
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, seed=0)
        placed = rules.shardings(state, mesh)
        require_placed(state, placed)
        first = jax.device_get(state.params)
        for number in range(STEPS):
            batch = jax.device_put(batch_at(number), NamedSharding(mesh, P(BATCH)))
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        require_placed(state, placed)
        compiled = step.lower(state, batch).compile()
    state_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= state_bytes  # donated, all of it
    return losses, first, jax.device_get(state.params)


def require_placed(state, placed):
    for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim), (leaf.sharding, where)


def moved(first, last):
    return np.concatenate([
        (np.asarray(b, np.float64) - a).ravel()
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True)
    ])  # fmt: skip


def main() -> None:
    assert len(jax.devices()) == 8
    losses, first, last = train(None)
    expected = moved(first, last)
    for shape in [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2)]:
        found, start, end = train(shape)
        assert np.abs(moved(first, start)).max() < 1e-6, shape  # made in parts, the same params
        assert np.abs(np.subtract(found, losses)).max() < 1e-5, (shape, found, losses)
        error = np.linalg.norm(moved(start, end) - expected) / np.linalg.norm(expected)
        assert error < 1e-3, f"{shape}: {error:.1e}"


if __name__ == "__main__":
    main()
