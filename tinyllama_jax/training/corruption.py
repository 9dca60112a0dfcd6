"""Silent corruption: bits that flip in a device's memory or arithmetic without an error.

Two checks, made every so many steps where they are asked for. Copies of the params along `data`
must be the same bits. And the gradient, computed twice from the same state, must be: this costs two
steps, and means something only where the program is repeatable (on a CPU it is; on GPUs with
`model.attention=flash` and `DETERMINISTIC=1` in `launch/environment.sh`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.config import Config
from tinyllama_jax.data.batch import Batch
from tinyllama_jax.model.llama import Llama, Params
from tinyllama_jax.parallel import mesh, rules
from tinyllama_jax.parallel.mesh import AXES, P
from tinyllama_jax.runs.integrity import fingerprints
from tinyllama_jax.training.losses import LossFunction
from tinyllama_jax.training.step import summed_gradients


def make_checks(
    model: Llama, loss_fn: LossFunction, config: Config
) -> Callable[[int, Params, Batch], None]:
    """Builds `check(step, params, batch)`, which raises ValueError where bits have flipped."""
    prints = jax.jit(_prints_by_device)

    @jax.jit
    def gradient_prints(params: Params, batch: Batch) -> jax.Array:
        rows = config.training.micro_batch_size * mesh.parts(mesh.BATCH)
        gradients, _ = summed_gradients(model, loss_fn, params, batch, None, rows)
        return _prints_by_device(gradients)

    def check(step: int, params: Params, batch: Batch) -> None:
        require_equal_copies(step, np.asarray(prints(params)))
        once, again = (np.asarray(gradient_prints(params, batch)) for _ in range(2))
        require_equal_gradients(step, once, again)

    return check


def require_equal_copies(step: int, prints: np.ndarray) -> None:
    """Compares the copies of the params along `data`.

    Args:
      step: before which.
      prints: `(data, fsdp, tensor)` uint32, as every process has them.

    Raises:
      ValueError: one differs from most others: which, and on which processes.
    """
    values, copy_of, count = np.unique(
        prints.reshape(len(prints), -1), axis=0, return_inverse=True, return_counts=True
    )
    if len(values) == 1:
        return
    copy_of = copy_of.ravel()
    if (count == count.max()).sum() > 1:
        raise ValueError(
            f"before step {step} copies of the params along data differ, and no majority tells "
            f"which is wrong ({_grouped(copy_of)}): memory or arithmetic of a device is at fault; "
            f"{_REMEDY}"
        )
    wrong = np.flatnonzero(copy_of != count.argmax()).tolist()
    where = "; ".join(_named((copy, ...)) for copy in wrong)
    raise ValueError(
        f"before step {step} the params of copy {', '.join(map(str, wrong))} of {len(prints)} "
        f"along data are not those of the others: memory or arithmetic of a device there is at "
        f"fault ({where}); {_REMEDY}"
    )


def require_equal_gradients(step: int, once: np.ndarray, again: np.ndarray) -> None:
    """Compares two computations of one gradient.

    Args:
      step: before whose update.
      once, again: `(data, fsdp, tensor)` uint32 each.

    Raises:
      ValueError: they differ: on which devices. What is wrong ahead of a sum is wrong in all that
        took part in it.
    """
    differ = once != again
    if not differ.any():
        return
    places = np.argwhere(differ)
    if len(places) == 1:
        where = f"on {_named(tuple(places[0]))}"
    else:
        copies = sorted({int(place[0]) for place in places})
        group = "this replica group" if len(copies) < len(once) else "all that share a sum"
        named = "; ".join(_named((copy, ...)) for copy in copies)
        where = f"in {group}, {len(places)} of {once.size} devices ({named})"
    raise ValueError(
        f"the gradient of step {step}, computed twice from the same state, differs {where}: a "
        f"device there computes wrongly, or the program is not repeatable (GuardConfig says when "
        f"it is); {_REMEDY}"
    )


_REMEDY = (
    "take that machine out, and start again from the last saved step, or an earlier one "
    "(--resume=STEP)"
)


def _prints_by_device(tree: Any) -> jax.Array:
    """A checksum of what each device holds of a tree: `(data, fsdp, tensor)` uint32."""

    def of_this_device(tree: Any) -> jax.Array:
        leaves = {str(n): leaf for n, leaf in enumerate(jax.tree.leaves(tree))}
        total = jnp.uint32(0)
        for name, value in sorted(fingerprints(leaves).items()):
            total = total * jnp.uint32(0x9E3779B1) + value + jnp.uint32(len(name))
        return total.reshape(1, 1, 1)

    parts = mesh.shard(of_this_device, in_specs=(rules.specs(tree),), out_specs=P(*AXES))(tree)
    return mesh.constrain(parts, P())  # to every process


def _named(place: tuple[Any, ...]) -> str:
    """Devices at a place of the mesh, by process."""
    current = jax.sharding.get_mesh()
    if current.empty:
        return str(jax.devices()[0])
    devices = np.atleast_1d(current.devices[place]).ravel()
    processes = sorted({device.process_index for device in devices})
    return f"process {', '.join(map(str, processes))}: {', '.join(map(str, devices[:8]))}"


def _grouped(copy_of: np.ndarray) -> str:
    groups = [np.flatnonzero(copy_of == group).tolist() for group in range(copy_of.max() + 1)]
    return " against ".join(", ".join(map(str, group)) for group in groups)
