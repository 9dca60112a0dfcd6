"""One optimizer step, as a pure jitted function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from tinyllama_jax.config import Config
from tinyllama_jax.data.batch import Batch
from tinyllama_jax.model.llama import Llama, Params
from tinyllama_jax.parallel import mesh, rules
from tinyllama_jax.parallel.mesh import P
from tinyllama_jax.training.guard import Guard, begun_anew, choose, judge
from tinyllama_jax.training.losses import LossFunction, LossSums
from tinyllama_jax.training.optimizer import run_schedule

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """All that the next step depends on, besides the config and the data.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: the trained tree, float32.
      opt_state: optax's, float32 moments.
      guard: statistics by which hurtful steps are skipped.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    guard: Guard


def init_state(
    model: Llama, optimizer: optax.GradientTransformation, seed: int, params: Params | None = None
) -> TrainState:
    """The state before the first step, from fresh params (of `seed`) or from given ones.

    Under a mesh each device makes its own parts only.
    """

    @jax.jit
    def init(params: Params | None) -> TrainState:
        params = model.init(jax.random.key(seed)) if params is None else params
        return _laid_out(TrainState(jnp.int32(0), params, optimizer.init(params), Guard.fresh()))

    return init(params)


def make_train_step(
    model: Llama,
    loss_fn: LossFunction,
    optimizer: optax.GradientTransformation,
    config: Config,
) -> jax.stages.Wrapped:
    """Builds `step(state, batch, frozen=None) -> (state, metrics)`, jitted, with state donated.

    A stage's batch may have more rows than another's: each number of rows is a program of its own.
    The batch is cut into micro-batches of `training.micro_batch_size` rows on each device, whose
    gradients are summed in float32 (over devices, those of layers in the compute dtype). The loss
    is `sum(w * l) / sum(w)` over the whole batch: the denominator is summed before dividing, so
    micro-batches with few weighted tokens do not count for more.

    A step that the guard judges hurtful changes neither params nor moments; it counts in `step`.

    Metrics are scalars: `loss` (nats per weighted token, before this step's update), `grad_norm`
    (before clipping) and `learning_rate`, float32; `skipped_steps` (since the run began) and
    `skipped_in_a_row`, int32.
    """
    schedule = run_schedule(config)
    borders = [stage.first_step for stage in config.timeline[1:]]

    def step(
        state: TrainState, batch: Batch, frozen: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        rows = config.training.micro_batch_size * mesh.parts(mesh.BATCH)
        grads, sums = summed_gradients(model, loss_fn, state.params, batch, frozen, rows)
        grads = jax.tree.map(lambda g: g / sums.weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        learning_rate = schedule(state.step)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        loss, grad_norm = sums.reported / sums.weight, optax.tree.norm(grads)
        guard = state.guard
        for border in borders:  # what is usual in one stage may not be in the next
            guard = begun_anew(guard, state.step == border)
        good, guard = judge(guard, loss, grad_norm, config.guard)
        params, opt_state = choose(good, (params, opt_state), (state.params, state.opt_state))
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "skipped_steps": guard.skipped,
            "skipped_in_a_row": guard.in_a_row,
        }
        return _laid_out(TrainState(state.step + 1, params, opt_state, guard)), metrics

    return jax.jit(step, donate_argnums=0)


def make_eval_step(
    model: Llama, loss_fn: LossFunction
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Builds `evaluate(params, batch, frozen=None) -> (loss sum, weight sum)`, jitted."""

    def evaluate(params: Params, batch: Batch, frozen: Params | None = None):
        sums = loss_fn(model, params, batch, frozen)
        return sums.reported, sums.weight

    return jax.jit(evaluate)


def _laid_out(tree: Any) -> Any:
    """Params, or a tree that holds some, each leaf where the rules say that it lives."""
    return jax.tree.map(mesh.constrain, tree, rules.specs(tree))


def summed_gradients(
    model: Llama,
    loss_fn: LossFunction,
    params: Params,
    batch: Batch,
    frozen: Params | None,
    rows: int,
) -> tuple[Params, LossSums]:
    """Gradient of the summed objective and the sums, over micro-batches of `rows` rows."""

    def objective(params: Params, batch: Batch) -> tuple[jax.Array, LossSums]:
        sums = loss_fn(model, params, batch, frozen)
        return sums.objective, sums

    def gradient(params: Params, batch: Batch) -> tuple[Params, LossSums]:
        grads, sums = jax.grad(objective, has_aux=True)(params, batch)
        return _laid_out(grads), sums

    count = batch.tokens.shape[0] // rows
    assert count * rows == batch.tokens.shape[0], (batch.tokens.shape, rows)
    if count == 1:
        return gradient(params, batch)

    def add(total, micro_batch):
        return jax.tree.map(jnp.add, total, gradient(params, micro_batch)), None

    def cut(x: jax.Array) -> jax.Array:
        return mesh.constrain(x.reshape(count, rows, *x.shape[1:]), P(None, mesh.BATCH))

    micro_batches = jax.tree.map(cut, batch)
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32),
        jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micro_batches)),
    )
    return jax.lax.scan(add, zero, micro_batches)[0]
