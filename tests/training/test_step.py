"""The train step: accumulation, donation, determinism, the learning rate, and its losses."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinyllama_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from tinyllama_jax.data.batch import Batch
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.training.guard import Guard
from tinyllama_jax.training.losses import LossSums, NextToken
from tinyllama_jax.training.optimizer import make_optimizer, make_schedule
from tinyllama_jax.training.step import TrainState, init_state, make_eval_step, make_train_step

ROWS, S, V = 8, 16, 61
CONFIG = Config(
    # One layer: what is shown here does not hang on depth, and compiling is what takes time.
    model=ModelConfig(
        vocab_size=V, num_layers=1, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48,
        max_seq_len=S, compute_dtype="float32",
    ),
    data=DataConfig(seq_len=S),
    optimizer=OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=0),
    training=TrainingConfig(
        train_tokens=100 * ROWS * S, global_batch_tokens=ROWS * S, micro_batch_size=ROWS
    ),
)  # fmt: skip
MODEL = Llama(CONFIG.model)


def with_settings(section, **settings):
    changed = dataclasses.replace(getattr(CONFIG, section), **settings)
    return dataclasses.replace(CONFIG, **{section: changed})


@functools.cache
def make_params():
    """Drawn by NumPy, which is quicker than compiling the model's own initialisation."""
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: rng.normal("norm" in path[-1].key, 0.1, leaf.shape).astype(np.float32),
        jax.eval_shape(MODEL.init, jax.random.key(0)),
    )


def make_batch(seed=0, weights=1.0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, V, (ROWS, S + 1)).astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], np.broadcast_to(np.float32(weights), (ROWS, S)))


def recording(optimizer):
    """The optimizer, with the gradient it was given as the first part of its state."""
    record = optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda grads, state, params: (grads, grads),
    )
    return optax.chain(record, optimizer)


@functools.cache
def compiled_step(config):
    """The first state and the compiled step of a config; the state's buffers are made anew."""
    optimizer = recording(make_optimizer(config.optimizer))
    step = make_train_step(MODEL, NextToken(config), optimizer, config)
    state = jax.device_get(init_state(MODEL, optimizer, 0, make_params()))
    return (lambda: jax.device_put(state)), step.lower(state, make_batch()).compile()


def gradient_and_metrics(config, batch):
    first, step = compiled_step(config)
    state, metrics = step(first(), batch)
    return state.opt_state[0], metrics


def assert_close_gradients(found, expected, tolerance=2e-6):
    def check(path, a, b):
        largest = np.abs(b).max()
        assert largest > 0, path
        assert np.abs(a - b).max() <= tolerance * largest, (path, np.abs(a - b).max() / largest)

    jax.tree_util.tree_map_with_path(check, jax.device_get(found), jax.device_get(expected))


@jax.jit
@jax.value_and_grad
def plain_loss(params, batch, z_loss=0.0):
    """The loss over a whole batch, and its gradient, as a textbook writes it."""
    hidden, _ = MODEL.apply(params, batch.tokens)
    logits = MODEL.logits(params, hidden)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    each = normalizer - target + z_loss * normalizer**2
    return jnp.sum(each * batch.loss_weights) / jnp.sum(batch.loss_weights)


# Rows hardly count at first and fully at last, so that micro-batches weigh 1 to 12 times as much as
# each other.
RISING = (
    np.random.default_rng(3).random((ROWS, S)) < np.linspace(0.05, 1, ROWS)[:, None]
) * np.random.default_rng(4).choice([0.25, 1, 3], (ROWS, S))
# Micro-batches without a weighted token must neither count nor divide by zero.
ONE_ROW = np.zeros((ROWS, S))
ONE_ROW[5, 3:9] = 1


@pytest.mark.parametrize("weights", [1.0, RISING, ONE_ROW], ids=["alike", "rising", "one row"])
def test_accumulation_is_one_batch(weights):
    batch = make_batch(weights=weights)
    loss, gradient = plain_loss(make_params(), batch, 0.0)
    movements = {}
    for count in (1, 2, 4):
        first, step = compiled_step(with_settings("training", micro_batch_size=ROWS // count))
        state, metrics = step(first(), batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=2e-6)
        assert_close_gradients(state.opt_state[0], gradient)
        movements[count] = jax.tree.map(np.subtract, jax.device_get(state.params), make_params())

    whole = optax.tree.norm(movements[1])
    assert whole > 0.01
    for count in (2, 4):
        difference = jax.tree.map(np.subtract, movements[count], movements[1])
        assert optax.tree.norm(difference) < 1e-3 * whole


def test_the_mean_of_micro_batch_means_is_another_gradient():
    """What accumulation must not do is far outside its tolerance."""
    _, gradient = plain_loss(make_params(), make_batch(weights=RISING), 0.0)
    is_first = np.arange(ROWS)[:, None] < ROWS // 2
    _, first = plain_loss(make_params(), make_batch(weights=RISING * is_first), 0.0)
    _, second = plain_loss(make_params(), make_batch(weights=RISING * ~is_first), 0.0)
    with pytest.raises(AssertionError):
        assert_close_gradients(
            jax.tree.map(lambda a, b: (a + b) / 2, first, second), gradient, tolerance=1e-2
        )


def test_metrics_are_scalars():
    _, metrics = gradient_and_metrics(CONFIG, make_batch())
    kinds = {name: (m.shape, str(m.dtype)) for name, m in metrics.items()}
    assert kinds == {
        **dict.fromkeys(("loss", "grad_norm", "learning_rate"), ((), "float32")),
        **dict.fromkeys(("skipped_steps", "skipped_in_a_row"), ((), "int32")),
    }


def test_masters_and_moments_stay_float32_under_bfloat16_compute():
    config = with_settings("training", micro_batch_size=4)
    model = Llama(dataclasses.replace(CONFIG.model, compute_dtype="bfloat16"))
    optimizer = make_optimizer(config.optimizer)
    step = make_train_step(model, NextToken(config), optimizer, config)
    state = jax.eval_shape(lambda p: init_state(model, optimizer, 0, p), make_params())
    after, metrics = jax.eval_shape(step, state, make_batch())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(after.params))
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, after)]
    assert kinds[0] == kinds[1]
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == jnp.float32


def test_the_state_is_donated_and_updated_in_place():
    first, step = compiled_step(with_settings("training", micro_batch_size=2))
    state, batch = first(), jax.device_put(make_batch())
    # All of it: where the guard skips the step, everything is as it was.
    read = jax.tree.leaves(state)
    # A step needs no second copy of any part of the state.
    assert step.memory_analysis().alias_size_in_bytes == sum(leaf.nbytes for leaf in read)
    after, metrics = step(state, batch)
    jax.block_until_ready(after)
    assert all(leaf.is_deleted() for leaf in read)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((batch, after, metrics)))
    assert int(after.step) == 1


def test_frozen_params_reach_the_loss_and_are_not_donated():
    def distance(model, params, batch, frozen):
        """Half the squared distance from the frozen params, counted once per weighted token."""
        squared = optax.tree.norm(optax.tree.sub(params, frozen), squared=True) / 2
        weight = jnp.sum(batch.loss_weights)
        return LossSums(squared * weight, squared * weight, weight)

    params = jax.tree.map(np.float32, {"a": [1.0, 2.0], "b_norm": 3.0})
    frozen = jax.device_put(jax.tree.map(lambda p: p - 0.5, params))
    for rows in (ROWS, 2):
        config = with_settings("training", micro_batch_size=rows)
        optimizer = recording(make_optimizer(config.optimizer))
        step = make_train_step(MODEL, distance, optimizer, config)
        state, metrics = step(init_state(MODEL, optimizer, 0, params), make_batch(), frozen)
        assert float(metrics["loss"]) == pytest.approx(3 * 0.5**2 / 2)
        jax.tree.map(lambda g: np.testing.assert_allclose(g, 0.5), state.opt_state[0])
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def test_the_same_steps_give_the_same_bits():
    first, step = compiled_step(with_settings("training", micro_batch_size=2))

    def three_steps():
        state, losses = first(), []
        for seed in range(3):
            state, metrics = step(state, make_batch(seed))
            losses.append(float(metrics["loss"]))
        return [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(state))], losses

    (bits, losses), (bits_again, losses_again) = three_steps(), three_steps()
    assert bits == bits_again and losses == losses_again
    assert len(set(losses)) == 3


def test_the_learning_rate_follows_the_states_step_alone():
    config = with_settings("optimizer", learning_rate=0.5, min_learning_rate=0.125, warmup_steps=4)
    # Every update is 1 whatever the gradient, so that a param falls by the learning rate.
    ones = optax.GradientTransformation(
        init=lambda params: (),
        update=lambda grads, state, params: (jax.tree.map(jnp.ones_like, grads), state),
    )

    def total(model, params, batch, frozen):
        return LossSums(params["w"], params["w"], jnp.sum(batch.loss_weights))

    step = make_train_step(MODEL, total, ones, config)
    schedule = make_schedule(config.optimizer, config.total_steps)
    for number, expected in [(0, 0.0), (2, 0.25), (4, 0.5), (52, 0.3125), (100, 0.125)]:
        state = TrainState(jnp.int32(number), {"w": jnp.float32(1)}, (), Guard.fresh())
        after, metrics = step(state, make_batch())
        assert int(after.step) == number + 1
        assert float(metrics["learning_rate"]) == float(schedule(number))
        assert float(metrics["learning_rate"]) == pytest.approx(expected, abs=1e-6)
        assert 1 - float(after.params["w"]) == pytest.approx(expected, abs=1e-6)


def test_z_loss_moves_the_gradient_and_not_the_reported_loss():
    batch = make_batch(weights=RISING)
    loss, plain = plain_loss(make_params(), batch, 0.0)
    found, metrics = gradient_and_metrics(with_settings("training", z_loss=0.01), batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    _, expected = plain_loss(make_params(), batch, 0.01)
    assert_close_gradients(found, expected)
    with pytest.raises(AssertionError):
        assert_close_gradients(found, plain, tolerance=1e-3)


BOS, EOS = 1, 2  # NextToken's defaults, the ids of every tokenizer that this package trains
WHOLE = np.ones((ROWS, S), np.float32)
# What the documents of a row hold between their marks; the row's last one is cut off by its end.
CONTENTS = ([5, 9, 11, 7], [20], [], [30, 31, 32, 5, 9, 40, 41])
MARKED = {
    "bos+eos": [[BOS, *ids, EOS] for ids in CONTENTS],
    "bos": [[BOS, *ids] for ids in CONTENTS],
    "eos": [[*ids, EOS] for ids in CONTENTS],
}


@pytest.mark.parametrize(
    "boundary",
    [
        "bos+eos",
        pytest.param("bos", marks=pytest.mark.slow),
        pytest.param("eos", marks=pytest.mark.slow),
    ],
)
def test_a_masked_row_is_its_documents_apart(boundary):
    documents = MARKED[boundary]
    row = [*itertools.chain(*documents), BOS, *[50] * S][: S + 1]
    packed = Batch(*np.broadcast_to(np.int32([row[:-1], row[1:]])[:, None], (2, ROWS, S)), WHOLE)
    # One document per row, each with the targets it has in the packed row, the rest uncounted.
    tokens, targets = np.zeros((2, ROWS, S), np.int32)
    weights = np.zeros((ROWS, S), np.float32)
    starts = np.cumsum([0, *map(len, documents)])
    bounds = [*starts[starts < S], S]
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        tokens[index, : end - start] = row[start:end]
        targets[index, : end - start] = row[start + 1 : end + 1]
        weights[index, : end - start] = 1
    assert weights.sum() == S and len(bounds) == 5

    masked = with_settings("data", document_mask=True, boundary=boundary)
    expected, expected_metrics = gradient_and_metrics(CONFIG, Batch(tokens, targets, weights))
    found, metrics = gradient_and_metrics(masked, packed)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-6)
    assert_close_gradients(found, expected, tolerance=5e-6)
    _, unmasked = gradient_and_metrics(CONFIG, packed)
    assert abs(float(unmasked["loss"] - metrics["loss"])) > 1e-4


def test_evaluation_sums_what_training_reports():
    evaluate = make_eval_step(MODEL, NextToken(with_settings("training", z_loss=0.01)))
    is_first = np.arange(ROWS)[:, None] < ROWS // 2
    sums = [
        evaluate(make_params(), make_batch(weights=RISING * rows)) for rows in (is_first, ~is_first)
    ]
    loss, _ = plain_loss(make_params(), make_batch(weights=RISING), 0.0)
    np.testing.assert_allclose(sum(s for s, _ in sums) / sum(w for _, w in sums), loss, rtol=1e-6)
