"""Steps that would hurt change nothing, and cost no memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_step import CONFIG, MODEL, make_batch
from tinyllama_jax.config import GuardConfig
from tinyllama_jax.training import guard
from tinyllama_jax.training.losses import NextToken
from tinyllama_jax.training.optimizer import make_optimizer
from tinyllama_jax.training.step import init_state, make_train_step

OPTIMIZER = make_optimizer(CONFIG.optimizer)
judge = jax.jit(guard.judge, static_argnames="settings")


def judged(values, settings=GuardConfig(sigmas=6.0)):  # noqa: B008
    """Whether each (loss, norm) is taken, one after another, and the statistics in the end."""
    state, taken = guard.Guard.fresh(), []
    for loss, norm in values:
        good, state = judge(state, jnp.float32(loss), jnp.float32(norm), settings=settings)
        taken.append(bool(good))
    return taken, jax.device_get(state)


def ordinary(count, seed=0):
    draw = np.random.default_rng(seed)
    return [(2.5 + 0.02 * draw.standard_normal(), 0.4 + 0.05 * draw.random()) for _ in range(count)]


@pytest.mark.parametrize(
    "value", [(np.nan, 0.4), (np.inf, 0.4), (2.5, np.nan), (2.5, np.inf), (-np.inf, 0.4)]
)
def test_what_is_not_finite_is_skipped_from_the_first_step_on(value):
    for before in (0, 3, 300):
        taken, state = judged([*ordinary(before), value], GuardConfig(sigmas=0.0))
        assert taken == [True] * before + [False]
        assert state.skipped == state.in_a_row == 1 and state.taken == before
        assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("spike", [(3.0, 0.4), (2.5, 2.0)])
def test_what_is_far_beyond_the_last_steps_is_skipped(spike):
    usual = ordinary(200)
    taken, state = judged([*usual, spike, spike, *ordinary(3, seed=1)])
    assert taken == [True] * 200 + [False] * 2 + [True] * 3
    assert state.skipped == 2 and state.in_a_row == 0 and state.taken == 203
    # A skipped step leaves no trace in the statistics.
    for name in ("loss_mean", "loss_variance", "norm_mean", "norm_variance"):
        without = getattr(judged([*usual, *ordinary(3, seed=1)])[1], name)
        assert getattr(state, name) == without
    # As a harder text is at which a stage begins: the statistics are begun anew there.
    state = judged(usual)[1]
    anew = dataclasses.replace(
        guard.begun_anew(jax.tree.map(jnp.asarray, state), jnp.bool(True)), skipped=jnp.int32(7)
    )
    good, after = judge(anew, *map(jnp.float32, spike), settings=GuardConfig(sigmas=6.0))
    assert good and after.taken == 1 and after.skipped == 7
    assert (after.loss_mean, after.loss_variance) == (np.float32(spike[0]), 0)
    # No rule, or too little seen: taken.
    assert all(judged([*usual, spike], GuardConfig(sigmas=0.0))[0])
    assert all(judged([*usual[:100], spike])[0])


def test_statistics_are_those_of_the_last_steps():
    values = ordinary(128)
    state = judged(values)[1]
    losses = np.array([loss for loss, _ in values])
    np.testing.assert_allclose(state.loss_mean, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(state.loss_variance, losses.var(), rtol=1e-2)
    # A loss that falls for long is followed: no later value is out of the ordinary.
    falling = [(8 - 5 * step / 2000 + 0.02 * (-1) ** step, 0.4) for step in range(2000)]
    taken, state = judged(falling)
    assert all(taken) and state.loss_mean == pytest.approx(3.0, abs=0.4)


def test_a_skipped_step_changes_nothing_but_the_count_of_steps():
    step = make_train_step(MODEL, NextToken(CONFIG), OPTIMIZER, CONFIG)
    state = init_state(MODEL, OPTIMIZER, seed=0)
    for number in range(3):
        state, metrics = step(state, make_batch(number))
    before = jax.device_get(state)
    state, metrics = step(state, make_batch(3, weights=np.nan))
    after = jax.device_get(state)
    assert np.isnan(metrics["loss"]) and int(metrics["skipped_steps"]) == 1
    for name in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))
    assert after.step == before.step + 1
    assert dataclasses.replace(after.guard, skipped=0, in_a_row=0) == before.guard
    state, metrics = step(state, make_batch(4))
    assert int(metrics["skipped_in_a_row"]) == 0 and np.isfinite(metrics["loss"])
    # As if the skipped step had been left out, but for the learning rate, which follows the step.
    other = jax.device_put(dataclasses.replace(before, step=before.step + 1))
    other, _ = step(other, make_batch(4))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(other.params),
                 jax.device_get(state.params))  # fmt: skip
