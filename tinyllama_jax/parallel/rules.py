"""Where each parameter lives on a mesh: one table.

`fsdp` cuts the model width, so that every device holds a part of each matrix and gathers it when
its layer runs; `tensor` cuts heads, feed-forward width and vocabulary; `data` holds copies.
Optimizer moments and gradients lie as their parameters do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tinyllama_jax.parallel.mesh import BATCH, P, sizes

# Leaves under layers/ are stacked over L first.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embedding", P("tensor", "fsdp")),  # (V, D)
    (r"unembedding", P("fsdp", "tensor")),  # (D, V)
    (r"layers/attention/(query|key|value)", P(None, "fsdp", "tensor")),  # (L, D, N or K, H)
    (r"layers/attention/output", P(None, "tensor", None, "fsdp")),  # (L, N, H, D)
    (r"layers/mlp/(gate|up)", P(None, "fsdp", "tensor")),  # (L, D, F)
    (r"layers/mlp/down", P(None, "tensor", "fsdp")),  # (L, F, D)
    (r"layers/(attention|mlp)_norm", P()),  # (L, D)
    (r"final_norm", P()),  # (D,)
)


def param_spec(path: str) -> PartitionSpec:
    """The spec of a parameter by its path, as "layers/attention/query".

    Raises:
      ValueError: no rule names it, or more than one does.
    """
    found = [spec for pattern, spec in RULES if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} rules of parallel/rules.py name the parameter {path}; a parameter needs "
            f"exactly one, or it would be replicated without a word"
        )
    return found[0]


def layer_spec(path: str) -> PartitionSpec:
    """The spec of one layer's part of a stacked parameter, as "attention/query"."""
    return P(*param_spec(f"layers/{path}")[1:])


def specs(tree: Any) -> Any:
    """The spec of each leaf of a tree in which params may lie at any depth (a state, moments).

    The keys of dicts on the way to a leaf name its parameter; scalars are replicated.
    """
    return jax.tree_util.tree_map_with_path(_spec_of_leaf, tree)


def _spec_of_leaf(path: tuple, leaf: Any) -> PartitionSpec:
    if not leaf.ndim:
        return P()
    keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return param_spec("/".join(keys))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """As `specs`, on a mesh.

    Raises:
      ValueError: axes of a parameter that the mesh does not divide, one line each.
    """
    problems: list[str] = []

    def place(path: tuple, leaf: Any) -> NamedSharding:
        spec = _spec_of_leaf(path, leaf)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                problems.append(
                    f"{name} {leaf.shape}: {size} does not divide over {axis} = {mesh.shape[axis]}"
                )
        return NamedSharding(mesh, spec)

    result = jax.tree_util.tree_map_with_path(place, tree)
    if problems:
        raise ValueError(
            "the model does not divide over the mesh; choose other sizes of its axes:\n"
            + "\n".join(f"  - {problem}" for problem in problems[:12])
        )
    return result


def placed(shapes: Any) -> Any:
    """A tree of `ShapeDtypeStruct`s, each with where it lives on the mesh in use, if there is one.

    Raises:
      ValueError: as `shardings`.
    """
    if not sizes():
        return shapes
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings(shapes, jax.sharding.get_mesh()),
    )


def own_rows(count: int) -> Sequence[int]:
    """The rows of a batch of `count` that live on this process's devices, ascending."""
    if not sizes() or jax.process_count() == 1:
        return range(count)
    parts = batch_sharding(jax.sharding.get_mesh()).addressable_devices_indices_map((count,))
    return sorted({row for rows in parts.values() if rows for row in range(count)[rows[0]]})


def place_rows(batch: Any, count: int) -> Any:
    """A batch's arrays with their rows over the mesh in use; as they are without one.

    Args:
      batch: arrays of this process's rows (`own_rows`).
      count: rows of the whole batch.
    """
    if not sizes():
        return batch
    sharding = batch_sharding(jax.sharding.get_mesh())
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    position = {row: index for index, row in enumerate(own_rows(count))}

    def place(array: Any) -> jax.Array:
        def part(index: Any) -> Any:
            rows = range(count)[index[0]]
            first = position[rows.start]
            return array[first : first + len(rows)]

        return jax.make_array_from_callback((count, *array.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH))
