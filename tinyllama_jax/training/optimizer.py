"""AdamW and the learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from tinyllama_jax.config import OptimizerConfig

Schedule = Callable[[jax.Array | int], jax.Array]


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by global norm, Adam's direction and decoupled weight decay.

    The updates are not yet scaled: the train step multiplies them by `-make_schedule(...)(step)`,
    so that the learning rate follows the run's step and nothing else.
    """
    clip = optax.clip_by_global_norm(config.grad_clip_norm) if config.grad_clip_norm else None
    stages = [
        clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(config.weight_decay_rule)),
    ]
    return optax.chain(*(stage for stage in stages if stage is not None))


def decay_mask(rule: str) -> Callable[[dict], dict] | None:
    """Which params decay: "all" (TinyLlama), or "matrices", which leaves out the norms' scales."""
    if rule == "all":
        return None

    def is_matrix(path: tuple, _: jax.Array) -> bool:
        return not path[-1].key.endswith("norm")

    return lambda params: jax.tree_util.tree_map_with_path(is_matrix, params)


def make_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """The learning rate of each step, counted from 0, as a float32 function of an int32 step.

    Warm-up rises linearly from 0 at step 0 to the peak at `warmup_steps`. Then, towards
    `min_learning_rate`, which holds past the end:

    - cosine: half a cosine (arXiv 1608.03983) over `decay_steps`, or the rest of the run;
    - linear: a straight line over the same;
    - wsd: the peak, and a straight line over the last `decay_steps`, or the last 20% of the run
      (arXiv 2404.06395).
    """
    peak, least, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    if config.schedule == "wsd":
        length = config.decay_steps or max(1, total_steps // 5)
        start = max(total_steps - length, warmup)
        length = total_steps - start
    else:
        start, length = warmup, config.decay_steps or total_steps - warmup

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - start) / length, 0.0, 1.0)
        shape = (
            0.5 * (1 + jnp.cos(jnp.pi * progress)) if config.schedule == "cosine" else 1 - progress
        )
        decayed = least + (peak - least) * shape
        return jnp.where(step < warmup, peak * step / max(warmup, 1), decayed)

    return schedule
