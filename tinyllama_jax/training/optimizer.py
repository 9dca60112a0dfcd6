"""AdamW and the learning-rate schedules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from tinyllama_jax.config import Config, OptimizerConfig, Stage

Schedule = Callable[[jax.Array | float], jax.Array]


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by global norm, Adam's direction and decoupled weight decay.

    The updates are not yet scaled: the train step multiplies them by `-run_schedule(...)(step)`,
    so that the learning rate follows the run's step and nothing else.
    """
    clip = optax.clip_by_global_norm(config.grad_clip_norm) if config.grad_clip_norm else None
    chained = [
        clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(config.weight_decay_rule)),
    ]
    return optax.chain(*(each for each in chained if each is not None))


def decay_mask(rule: str) -> Callable[[dict], dict] | None:
    """Which params decay: "all" (TinyLlama), or "matrices", which leaves out the norms' scales."""
    if rule == "all":
        return None

    def is_matrix(path: tuple, _: jax.Array) -> bool:
        return not path[-1].key.endswith("norm")

    return lambda params: jax.tree_util.tree_map_with_path(is_matrix, params)


def run_schedule(config: Config) -> Schedule:
    """The learning rate of each step of a run, as `make_schedule`.

    The run's schedule goes by tokens: in a stage of larger batches it moves on by as many of the
    run's steps as a batch there is larger. A stage with a schedule of its own follows that from
    its first step on.
    """
    training = config.training
    whole = make_schedule(
        config.optimizer, -(-training.train_tokens // training.global_batch_tokens)
    )

    def of_stage(stage: Stage) -> Schedule:
        settings = stage.settings
        if settings.schedule:
            own = dataclasses.replace(
                config.optimizer, schedule=settings.schedule, decay_steps=0,
                learning_rate=settings.learning_rate, warmup_steps=settings.warmup_steps,
                min_learning_rate=settings.min_learning_rate,
            )  # fmt: skip
            schedule = make_schedule(own, stage.end_batch - stage.first_batch)
            return lambda step: schedule(step - stage.first_step)
        begun = stage.first_token / training.global_batch_tokens
        pace = stage.batch_tokens / training.global_batch_tokens
        return lambda step: whole(begun + pace * (step - stage.first_step))

    schedules = [of_stage(stage) for stage in config.timeline]

    def schedule(step: jax.Array | float) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        rate = schedules[0](step)
        for stage, of_step in zip(config.timeline[1:], schedules[1:], strict=True):
            rate = jnp.where(step >= stage.first_step, of_step(step), rate)
        return rate

    return schedule


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

    def schedule(step: jax.Array | float) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - start) / length, 0.0, 1.0)
        shape = (
            0.5 * (1 + jnp.cos(jnp.pi * progress)) if config.schedule == "cosine" else 1 - progress
        )
        decayed = least + (peak - least) * shape
        return jnp.where(step < warmup, peak * step / max(warmup, 1), decayed)

    return schedule
