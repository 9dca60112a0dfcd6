"""Kernels under a mesh: each device works on its own rows and heads.

The partitioner cannot look into a kernel, and would gather its operands on every device. So where a
mesh is set (`jax.set_mesh`) a kernel runs in a `shard_map`: batch over the axes `data` and `fsdp`,
heads or vocabulary over `tensor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")
TENSOR = "tensor"


def sizes() -> dict[str, int]:
    """Sizes of the axes of the mesh in use, by name; empty without one."""
    mesh = jax.sharding.get_abstract_mesh()
    # Within another shard_map the axes are taken already.
    manual = jax.sharding.AxisType.Manual
    if mesh.empty or any(kind == manual for kind in mesh.axis_types):
        return {}
    if not {*BATCH, TENSOR} <= set(mesh.axis_names):
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names}; kernels need {', '.join((*BATCH, TENSOR))} "
            f"(of size 1 where they are not used) to know which of them to run along"
        )
    return dict(mesh.shape)


def local_size(axis: str) -> int:
    """Size of an axis that the code at hand runs along: within `shard`, of the mesh; else 1."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[axis] if manual.get(axis) == jax.sharding.AxisType.Manual else 1


def require_divisible(what: str, size: int, axes: tuple[str, ...]) -> None:
    """Raises ValueError where `size` does not divide over the axes of the mesh."""
    parts = math.prod(sizes().get(axis, 1) for axis in axes)
    if size % parts:
        raise ValueError(
            f"{what} = {size} does not divide over the {parts} devices of the mesh axes "
            f"{', '.join(axes)}: some would have nothing to do; choose a mesh that divides it"
        )


def shard(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` per device under the mesh in use, or as it is without one."""
    if math.prod(sizes().values()) == 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


__all__ = ["BATCH", "TENSOR", "P", "require_divisible", "shard", "sizes"]
