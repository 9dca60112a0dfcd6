"""The parts of a checkpoint: a state as `params` and, by name, everything else (`training`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

PyTree = Any


def named_leaves(tree: PyTree, prefix: str) -> dict[str, Any]:
    """The leaves of a tree by their path: `params/layers/query`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    assert len(set(names)) == len(names), names
    return {f"{prefix}/{name}": leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def split_state(state: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """A state's params, and all its other leaves by name."""
    params = state["params"] if isinstance(state, Mapping) else state.params
    return params, {
        name: leaf
        for name, leaf in named_leaves(state, "training").items()
        if not name.startswith("training/params/")
    }


def join_state(state: PyTree, params: PyTree, training: Mapping[str, Any]) -> PyTree:
    """The inverse of `split_state`, in the structure of `state`."""
    found = {**training, **named_leaves(params, "training/params")}
    return jax.tree.unflatten(
        jax.tree.structure(state), [found[name] for name in named_leaves(state, "training")]
    )


def abstract_array(leaf: Any) -> jax.ShapeDtypeStruct:
    """What to restore a leaf as: on its own sharding, or on the first device if it has none."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def abstract_numpy(leaf: Any) -> np.ndarray:
    """What to restore a leaf as, in host memory."""
    return np.empty(leaf.shape, leaf.dtype)  # never touched, so it takes no memory


def abstract_params(content: Mapping[str, Any]) -> PyTree:
    """The nested dict of params that a seal lists, as `ShapeDtypeStruct`s."""
    params: dict[str, Any] = {}
    for name, array in content["arrays"].items():
        part, *parents, key = name.split("/")
        if part == "params":
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[key] = jax.ShapeDtypeStruct(array["shape"], np.dtype(array["dtype"]))
    return params


def require_same_arrays(
    directory: Path, content: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    """Compares the arrays that a seal lists with those a state has, by name, dtype and shape.

    Raises:
      ValueError: they differ; one line each.
    """
    saved = {name: (a["dtype"], tuple(a["shape"])) for name, a in content["arrays"].items()}
    now = {name: (str(np.dtype(a.dtype)), tuple(a.shape)) for name, a in expected.items()}
    problems = [
        f"{name}: saved {_kind(saved.get(name))}, expected {_kind(now.get(name))}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    resumes = any(name.startswith("training/") for name in expected)
    if resumes and not any(name.startswith("training/") for name in saved):
        raise ValueError(
            f"step {directory.name} of {directory.parent} holds params only, which training starts "
            f"from but does not resume from; use --resume=auto"
        )
    if problems:
        shown = "".join(f"\n  - {problem}" for problem in problems[:12])
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(
            f"step {directory.name} of {directory.parent} holds other arrays than this config "
            f"makes, so training cannot go on from it; use the run's own config.json, or another "
            f"run directory:{shown}{more}"
        )


def _kind(array: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{array[0]}{list(array[1])}" if array else "nothing"
