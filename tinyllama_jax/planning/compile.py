"""The train step compiled for GPUs that are not there: the real code, by the real compiler.

XLA's CUDA plugin compiles for a description of a card (`devices.Gpu.target_config`); neither card
nor driver is needed. Where a step would not fit, XLA recomputes on its own account what it can.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from tinyllama_jax.config import Config
from tinyllama_jax.data.batch import Batch
from tinyllama_jax.kernels import target
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.parallel import rules
from tinyllama_jax.parallel.devices import Cluster
from tinyllama_jax.parallel.mesh import AXES, make_mesh
from tinyllama_jax.planning.collectives import Collective, collectives
from tinyllama_jax.training.losses import NextToken
from tinyllama_jax.training.optimizer import make_optimizer
from tinyllama_jax.training.step import TrainState, init_state, make_train_step

_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of one optimizer step, per GPU.

    Attributes:
      params_bytes, optimizer_bytes: of the state, which lives between steps.
      temporary_bytes: of everything else at the fullest moment: gradients, activations, gathered
        weights.
      peak_bytes: of all together, the batch included.
      collectives: what is sent, counted as often as it is sent.
      recomputed_products: that XLA computes twice on its own account, to fit.
      seconds: that compiling took.
    """

    params_bytes: int
    optimizer_bytes: int
    temporary_bytes: int
    peak_bytes: int
    collectives: tuple[Collective, ...]
    recomputed_products: int
    seconds: float


def require_plugin() -> None:
    """Raises ValueError where the CUDA plugin is not installed."""
    if not any(importlib.util.find_spec(name) for name in _PLUGINS):
        raise ValueError(
            "a plan compiles for GPUs with XLA's CUDA plugin, which is not installed (it needs "
            "neither GPU nor driver); run pip install -e '.[cuda13]'"
        )


def make_topology(cluster: Cluster) -> Any:
    """The compile-only devices of a cluster; needs the plugin."""
    from jax.experimental import topologies

    # Else the plugin looks for a driver when it is loaded.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    require_plugin()
    return topologies.get_topology_desc(
        platform="cuda",
        topology=f"{cluster.hosts}x{cluster.gpus_per_host}x1",
        target_config=cluster.gpu.target_config(),
    )


def compile_step(config: Config, cluster: Cluster, shape: tuple[int, int, int]) -> CompiledStep:
    """Compiles the train step of a config for a mesh of data x fsdp x tensor GPUs.

    Args:
      config: validated for `shape[0] * shape[1]` devices that share a batch.
      cluster: the machines; their number of GPUs is the mesh's.
      shape: of the mesh.

    Raises:
      ValueError: no plugin, or a mesh that the cluster or the model does not fit.
    """
    began = time.perf_counter()
    lowered, state = lower_step(config, cluster, shape)
    compiled = lowered.compile()
    memory, peak = compiled.memory_analysis(), peak_bytes_of(compiled)
    assert memory is not None and peak is not None
    params = _bytes_per_device(state.params)
    text = compiled.as_text() or ""
    return CompiledStep(
        params_bytes=params,
        optimizer_bytes=_bytes_per_device(state) - params,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=peak,
        collectives=tuple(collectives(text)),
        recomputed_products=len(re.findall(r"^ *%?gemm_fusion\S*\.remat\S* = ", text, re.M)),
        seconds=time.perf_counter() - began,
    )


def peak_bytes_of(compiled: jax.stages.Compiled) -> int | None:
    """Of a program with its arguments, at its fullest moment; None where the compiler won't say."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return (
        memory.argument_size_in_bytes + memory.temp_size_in_bytes
        + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )  # fmt: skip


def lower_step(
    config: Config, cluster: Cluster, shape: tuple[int, int, int]
) -> tuple[jax.stages.Lowered, TrainState]:
    """What `compile_step` compiles, and the shapes of the state that it takes."""
    if np.prod(shape) != cluster.size:
        raise ValueError(
            f"a mesh of {'x'.join(map(str, shape))} ({' x '.join(AXES)}) has {np.prod(shape)} "
            f"GPUs, but the machines have {cluster.size}"
        )
    mesh = make_mesh(shape, make_topology(cluster).devices)
    model, optimizer = Llama(config.model), make_optimizer(config.optimizer)
    here = target.Target("gpu", cluster.gpu.compute_capability, cluster.gpu.title)
    with target.compile_for(here), jax.set_mesh(mesh):
        step = make_train_step(model, NextToken(config), optimizer, config)
        state = jax.eval_shape(lambda: init_state(model, optimizer, seed=0))
        state = jax.tree.map(_placed, state, rules.shardings(state, mesh))
        traced = step.trace(state, _batch(config, mesh))
        return traced.lower(lowering_platforms=("cuda",)), state


def _placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _batch(config: Config, mesh: Mesh) -> Batch:
    rows = rules.batch_sharding(mesh)
    shape = (config.batch_rows, config.data.seq_len)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    return Batch(ids, ids, jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows))


def _bytes_per_device(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
