"""The train step on 8 devices equals the one on one, and keeps the state where it belongs.

    python -m tests.mesh.step_on_mesh [faults]

With "faults" each of `FAULTS` is planted in turn, and how the comparison fails is printed.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
from tinyllama_jax.parallel import mesh as mesh_module
from tinyllama_jax.parallel import rules
from tinyllama_jax.parallel.mesh import BATCH, P, make_mesh
from tinyllama_jax.training.losses import NextToken
from tinyllama_jax.training.optimizer import make_optimizer
from tinyllama_jax.training.step import init_state, make_train_step

ROWS, S, V, STEPS = 16, 12, 64, 5


# What a device holds on 1 x 4 x 2 devices, written out: it does not come from the rules.
PARTS = {
    "embedding": (32, 8),
    "unembedding": (8, 32),
    "layers/attention/query": (2, 8, 4, 8),
    "layers/attention/key": (2, 8, 4, 8),
    "layers/attention/value": (2, 8, 4, 8),
    "layers/attention/output": (2, 4, 8, 8),
    "layers/mlp/gate": (2, 8, 32),
    "layers/mlp/up": (2, 8, 32),
    "layers/mlp/down": (2, 32, 8),
    "layers/attention_norm": (2, 32),
    "layers/mlp_norm": (2, 32),
    "final_norm": (32,),
}


def config_for(devices: int, kv_heads: int) -> Config:
    """Two micro-batches a step, whatever the number of devices; learning rate 1e-3 throughout."""
    return Config(
        model=ModelConfig(
            vocab_size=V, num_layers=2, d_model=32, num_heads=8, num_kv_heads=kv_heads, head_dim=8,
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


def recording(optimizer):
    """The optimizer, with the gradient it was given as the first part of its state."""
    record = optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda grads, state, params: (grads, grads),
    )
    return optax.chain(record, optimizer)


class Run(NamedTuple):
    """Of each step the state before it, the loss and the gradient; and the params in the end."""

    states: list
    losses: list
    gradients: list
    params: dict


def train(shape, kv_heads, states=()):
    """The run on a mesh, or (None) on one device; of gradients those at given states, if any: small
    differences of params grow from step to step."""
    rows_over = shape[0] * shape[1] if shape else 1
    config = config_for(rows_over, kv_heads)
    model, optimizer = Llama(config.model), recording(make_optimizer(config.optimizer))
    step = make_train_step(model, NextToken(config), optimizer, config)
    run = Run([], [], [], {})
    if shape is None:
        state = init_state(model, optimizer, seed=0)
        for number in range(STEPS):
            run.states.append(jax.device_get(state))
            state, metrics = step(state, batch_at(number))
            run.losses.append(float(metrics["loss"]))
            run.gradients.append(jax.device_get(state.opt_state[0]))
        return run._replace(params=jax.device_get(state.params))
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, seed=0)
        placed = rules.shardings(state, mesh)
        require_placed(state, placed)
        for number in range(STEPS):
            run.states.append(jax.device_get(state))
            batch = jax.device_put(batch_at(number), NamedSharding(mesh, P(BATCH)))
            state, metrics = step(state, batch)
            run.losses.append(float(metrics["loss"]))
            there, _ = step(jax.device_put(states[number], placed), batch)
            run.gradients.append(jax.device_get(there.opt_state[0]))
        require_placed(state, placed)
        if shape == (1, 4, 2) and kv_heads == 8:
            wrong = parts_of(state.params).items() - PARTS.items()
            assert not wrong, wrong
        compiled = step.lower(state, batch).compile()
    state_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= state_bytes  # donated, all of it
    return run._replace(params=jax.device_get(state.params))


def parts_of(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.addressable_shards[
            0
        ].data.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }


def require_placed(state, placed):
    for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim), (leaf.sharding, where)


def moved(first, last):
    return np.concatenate([
        (np.asarray(b, np.float64) - a).ravel()
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True)
    ])  # fmt: skip


def compare(shape, kv_heads, one) -> None:
    here = train(shape, kv_heads, one.states)
    where = f"{shape} with {kv_heads} key/value heads"
    first, start = one.states[0].params, here.states[0].params
    assert np.abs(moved(first, start)).max() < 1e-6, where  # made in parts, the same params
    for number, pair in enumerate(zip(one.gradients, here.gradients, strict=True)):
        for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
            error = np.abs(a - b).max() / np.abs(a).max()
            assert error < 1e-5, f"{where}: gradient of step {number} off by {error:.1e}"
    assert np.abs(np.subtract(here.losses, one.losses)).max() < 1e-5, (where, here.losses)
    expected = moved(first, one.params)
    error = np.linalg.norm(moved(start, here.params) - expected) / np.linalg.norm(expected)
    assert error < 1e-3, f"{where}: {error:.1e}"


def leave_out(axis):
    """The sum over an axis is not made; parts of each matrix are cut as they were."""

    def fault():
        def sum_and_scatter(x, dimension):
            for name in ("fsdp", "data"):
                size = mesh_module.local_size(name)
                if size == 1:
                    continue
                if name == "fsdp" and axis == "fsdp":
                    length = x.shape[dimension] // size
                    start = jax.lax.axis_index("fsdp") * length
                    x = jax.lax.dynamic_slice_in_dim(x, start, length, dimension)
                elif name == "fsdp":
                    x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=dimension, tiled=True)
                elif axis != "data":
                    x = jax.lax.psum(x, "data")
            return x

        mesh_module.sum_and_scatter = sum_and_scatter

    return fault


def transpose_a_rule():
    rules.RULES = tuple(
        (pattern, P(None, "fsdp", "tensor") if pattern == r"layers/mlp/down" else spec)
        for pattern, spec in rules.RULES
    )


FAULTS = {
    "data": (leave_out("data"), (2, 2, 2)),
    "fsdp": (leave_out("fsdp"), (2, 2, 2)),
    "rule": (transpose_a_rule, (1, 4, 2)),
}


def main(what: str = "") -> None:
    assert len(jax.devices()) == 8
    one = train(None, kv_heads=8)
    if what == "faults":
        sound = mesh_module.sum_and_scatter, rules.RULES
        for name, (plant, shape) in FAULTS.items():
            plant()
            try:
                compare(shape, 8, one)
                print(f"{name}: not found")
            except AssertionError as error:
                print(f"{name}: {str(error)[:300]}")
            mesh_module.sum_and_scatter, rules.RULES = sound
        return
    for shape in [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2)]:
        compare(shape, 8, one)
    one = train(None, kv_heads=4)
    for shape in [(2, 2, 2), (1, 2, 4)]:
        compare(shape, 4, one)


if __name__ == "__main__":
    main(*sys.argv[1:])
