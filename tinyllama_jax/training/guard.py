"""Steps that would hurt are skipped: no update from a loss or gradient that is not finite, or far
beyond what steps before it had.

All is decided on the device from values that every device holds alike, so nothing waits for the
host. Sources: PaLM (arXiv 2204.02311, section 5.1) on loss spikes; OLMo 2 (arXiv 2501.00656) on
skipping steps beyond six standard deviations of a window of 128.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from tinyllama_jax.config import GuardConfig

Tree = TypeVar("Tree")

# Steps that the statistics look back on, and that must be in them before they judge.
_WINDOW = 128


@flax.struct.dataclass
class Guard:
    """Running statistics of the steps that were taken; scalars.

    Attributes:
      taken: int32, steps in the statistics; with the first one all before are forgotten.
      loss_mean, loss_variance, norm_mean, norm_variance: float32, exponentially weighted.
      skipped: int32, steps that were skipped since the run began.
      in_a_row: int32, of them the last ones without a taken step between.
    """

    taken: jax.Array
    loss_mean: jax.Array
    loss_variance: jax.Array
    norm_mean: jax.Array
    norm_variance: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array

    @classmethod
    def fresh(cls) -> Guard:
        """Before the first step."""
        # Buffers of their own, each of which a step may be given to overwrite.
        counts = {"taken", "skipped", "in_a_row"}
        return cls(**{
            field.name: jnp.zeros((), jnp.int32 if field.name in counts else jnp.float32)
            for field in dataclasses.fields(cls)
        })  # fmt: skip


def judge(
    guard: Guard, loss: jax.Array, grad_norm: jax.Array, settings: GuardConfig
) -> tuple[jax.Array, Guard]:
    """Whether a step is taken (a bool scalar), and the statistics after it.

    Args:
      guard: before the step.
      loss, grad_norm: of the step, float32 scalars; the norm before clipping.
      settings: `sigmas` 0 skips only what is not finite.
    """
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if settings.sigmas > 0:
        usual = _usual(loss, guard.loss_mean, guard.loss_variance, settings.sigmas)
        usual &= _usual(grad_norm, guard.norm_mean, guard.norm_variance, settings.sigmas)
        good &= usual | (guard.taken < _WINDOW)
    share = 1.0 / jnp.minimum(guard.taken + 1, _WINDOW).astype(jnp.float32)
    loss_mean, loss_variance = _after(loss, guard.loss_mean, guard.loss_variance, share)
    norm_mean, norm_variance = _after(grad_norm, guard.norm_mean, guard.norm_variance, share)
    taken = Guard(
        guard.taken + 1, loss_mean, loss_variance, norm_mean, norm_variance, guard.skipped,
        jnp.zeros_like(guard.in_a_row),
    )  # fmt: skip
    skipped = dataclasses.replace(guard, skipped=guard.skipped + 1, in_a_row=guard.in_a_row + 1)
    return good, choose(good, taken, skipped)


def begun_anew(guard: Guard, now: jax.Array) -> Guard:
    """The guard with its statistics forgotten, where `now` says so; its counts go on."""
    return dataclasses.replace(guard, taken=jnp.where(now, 0, guard.taken))


def choose(good: jax.Array, taken: Tree, skipped: Tree) -> Tree:
    """The one tree or the other, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), taken, skipped)


def _usual(value: jax.Array, mean: jax.Array, variance: jax.Array, sigmas: float) -> jax.Array:
    return value <= mean + sigmas * jnp.sqrt(variance)


def _after(
    value: jax.Array, mean: jax.Array, variance: jax.Array, share: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance with one more value, of weight `share` beside all before it."""
    difference = value - mean
    return mean + share * difference, (1 - share) * (variance + share * difference**2)
