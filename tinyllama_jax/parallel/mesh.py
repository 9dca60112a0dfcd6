"""The mesh: its axes, and how code runs along them.

`data` holds copies of the model, `fsdp` parts of each matrix, `tensor` heads and vocabulary; rows
of a batch lie over `data` and `fsdp`. Whoever makes a mesh sets it with `jax.set_mesh`; without one
everything here does nothing.

The partitioner cannot look into a kernel, and would gather its operands on every device. So a
kernel runs in a `shard_map`: each device works on its own rows and heads.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import MeshConfig

BATCH = ("data", "fsdp")
TENSOR = "tensor"
AXES = (*BATCH, TENSOR)


def make_mesh(shape: tuple[int, int, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` x `fsdp` x `tensor` devices; None: of all."""
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def shape_of(settings: MeshConfig, device_count: int) -> tuple[int, int, int]:
    """Sizes of `data`, `fsdp` and `tensor` for so many devices.

    Raises:
      ValueError: sizes that do not make up the number of devices.
    """
    asked = {axis: getattr(settings, axis) for axis in AXES}
    known = math.prod(size for size in asked.values() if size != -1)
    rest = [axis for axis, size in asked.items() if size == -1]
    written = ", ".join(f"mesh.{axis} = {size}" for axis, size in asked.items())
    if len(rest) > 1 or any(size < 1 and size != -1 for size in asked.values()):
        raise ValueError(f"{written}: sizes are 1 or more, and -1 (all that are left) for one axis")
    if device_count % known or (not rest and known != device_count):
        raise ValueError(
            f"{written}: a mesh of {'a multiple of ' * bool(rest)}{known} devices, but there are "
            f"{device_count}, and all are to work; set one axis to -1, or give the run "
            f"another number of devices"
        )
    data, fsdp, tensor = (device_count // known if size == -1 else size for size in asked.values())
    return data, fsdp, tensor


def in_use(shape: tuple[int, int, int]) -> AbstractContextManager[Any]:
    """Sets a mesh of that shape over all devices; nothing where one device is all."""
    return contextlib.nullcontext() if math.prod(shape) == 1 else jax.set_mesh(make_mesh(shape))


def sizes() -> dict[str, int]:
    """Sizes of the axes of the mesh in use, by name; empty without one."""
    mesh = jax.sharding.get_abstract_mesh()
    # Within another shard_map the axes are taken already.
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return {}
    if not set(AXES) <= set(mesh.axis_names):
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names}, not {', '.join(AXES)} (of size 1 where they "
            f"are not used), so nothing tells what to run along which; use parallel.mesh.make_mesh"
        )
    return dict(mesh.shape)


def local_size(axis: str) -> int:
    """Size of an axis that the code at hand runs along: within `shard`, of the mesh; else 1."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[axis] if manual.get(axis) == AxisType.Manual else 1


def gather(x: jax.Array, axis: int) -> jax.Array:
    """Within `shard`: a matrix from all of `fsdp`, which cuts it along `axis`."""
    if local_size("fsdp") > 1:
        x = jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True)
    return x


def sum_and_scatter(x: jax.Array, axis: int) -> jax.Array:
    """Within `shard`: the sum over all rows of the batch, cut over `fsdp` along `axis`."""
    if local_size("fsdp") > 1:
        x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True)
    if local_size("data") > 1:
        x = jax.lax.psum(x, "data")
    return x


def parts(axes: tuple[str, ...]) -> int:
    """Into how many parts the mesh in use cuts what lies along these axes."""
    return math.prod(sizes().get(axis, 1) for axis in axes)


def require_divisible(what: str, size: int, axes: tuple[str, ...]) -> None:
    """Raises ValueError where `size` does not divide over the axes of the mesh."""
    if size % parts(axes):
        raise ValueError(
            f"{what} = {size} does not divide over the {parts(axes)} devices of the mesh axes "
            f"{', '.join(axes)}: some would have nothing to do; choose a mesh that divides it"
        )


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """x, laid out over the mesh in use by `spec`; as it is without one."""
    if math.prod(sizes().values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def shard(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` per device under the mesh in use, or as it is without one."""
    if math.prod(sizes().values()) == 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
