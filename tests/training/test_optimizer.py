"""The schedule against written tables, and AdamW against its formula."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.config import (
    Config,
    DataConfig,
    OptimizerConfig,
    StageConfig,
    TrainingConfig,
)
from tinyllama_jax.training.optimizer import decay_mask, make_optimizer, make_schedule, run_schedule

# TinyLlama's run: 2,000 warm-up steps to 4e-4, cosine to 4e-5 over 1,430,512 steps.
TINYLLAMA = OptimizerConfig()
TOTAL = 1_430_512
MIDDLE = 2000 + (TOTAL - 2000) // 2


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.0),
        (1, 2e-7),
        (1000, 2e-4),
        (1999, 3.998e-4),
        (2000, 4e-4),
        (2001, 4e-4 - 4.353e-16),  # 1.8e-4 * (1 - cos(pi / 1428512)) below the peak
        (2000 + (TOTAL - 2000) // 4, 3.4727922e-4),  # 4e-5 + 3.6e-4 * (2 + sqrt 2) / 4
        (MIDDLE, 2.2e-4),
        (TOTAL - 1, 4e-5),
        (TOTAL, 4e-5),
        (TOTAL + 1, 4e-5),
        (2 * TOTAL, 4e-5),
    ],
)
def test_cosine_is_tinyllamas(step, expected):
    value = jax.jit(make_schedule(TINYLLAMA, TOTAL))(jnp.int32(step))
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def staged(*stages, **optimizer):
    """A run of stages of batches of 10 tokens, unless they say otherwise."""
    return Config(
        data=DataConfig(seq_len=10),
        optimizer=OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, **optimizer),
        training=TrainingConfig(
            train_tokens=sum(stage.train_tokens for stage in stages), global_batch_tokens=10
        ),
        stages=stages,
    )


def rates(config, steps):
    schedule = jax.jit(run_schedule(config))
    return [float(schedule(jnp.int32(step))) for step in steps]


def test_a_run_without_stages_has_its_schedule():
    config = Config(training=TrainingConfig(train_tokens=TOTAL * 2048, global_batch_tokens=2048))
    plain = jax.jit(make_schedule(config.optimizer, TOTAL))
    steps = [0, 1, 1999, 2000, 2001, MIDDLE, TOTAL - 1, TOTAL]
    assert rates(config, steps) == [float(plain(jnp.int32(step))) for step in steps]


def test_the_runs_schedule_goes_on_by_tokens_where_batches_grow():
    """The published cooldown: batches of four times the size, and the cosine goes on."""
    config = staged(
        StageConfig("a", 800), StageConfig("b", 400, global_batch_tokens=40), warmup_steps=10
    )
    plain = make_schedule(config.optimizer, 120)
    assert config.total_steps == 80 + 10
    expected = [float(plain(step)) for step in [*range(80), *range(80, 121, 4)]]
    assert rates(config, range(91)) == pytest.approx(expected, rel=1e-6)


def test_a_stage_may_have_a_schedule_of_its_own():
    config = staged(
        StageConfig("a", 200),
        StageConfig("b", 300, schedule="linear", learning_rate=0.5, warmup_steps=5),
        StageConfig("c", 100),
        schedule="wsd", warmup_steps=10,
    )  # fmt: skip
    found = rates(config, range(61))
    assert found[:20] == pytest.approx([min(1, step / 10) for step in range(20)])
    assert found[20:26] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert found[49] == pytest.approx(0.5 * (1 - 24 / 25))  # towards 0, within its 30 steps
    plain = make_schedule(config.optimizer, 60)  # the run's, where it has come to by then
    assert found[50:] == pytest.approx([float(plain(step)) for step in range(50, 61)])


@pytest.mark.parametrize(
    "step, expected", [(0, 0), (5, 0.5), (10, 1), (11, 0.991), (60, 0.55), (110, 0.1), (200, 0.1)]
)
def test_linear(step, expected):
    config = OptimizerConfig(
        learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10, schedule="linear"
    )
    assert float(make_schedule(config, 110)(step)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "decay_steps, step, expected",
    [
        (0, 10, 1), (0, 80, 1), (0, 90, 0.55), (0, 100, 0.1), (0, 300, 0.1),
        (50, 50, 1), (50, 51, 0.982), (50, 75, 0.55), (50, 99, 0.118), (50, 100, 0.1),
    ],
)  # fmt: skip
def test_wsd_decays_at_the_end(decay_steps, step, expected):
    config = OptimizerConfig(
        learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10, schedule="wsd",
        decay_steps=decay_steps,
    )  # fmt: skip
    assert float(make_schedule(config, 100)(step)) == pytest.approx(expected, rel=1e-6)


def test_decay_steps_end_a_cosine_early():
    config = OptimizerConfig(
        learning_rate=1.0, min_learning_rate=0.0, warmup_steps=0, decay_steps=50
    )
    schedule = make_schedule(config, 100)
    assert [round(float(schedule(s)), 6) for s in (0, 25, 50, 99)] == [1.0, 0.5, 0.0, 0.0]


def test_against_a_public_table(test_data):
    """Stanford CS336's expected cosine schedule (its table starts at step 0)."""
    table = json.loads((test_data / "refnum/lr_and_dpo.json").read_text())
    config = OptimizerConfig(
        learning_rate=table["max_lr"], min_learning_rate=table["min_lr"],
        warmup_steps=table["warmup_iters"],
        decay_steps=table["cosine_cycle_iters"] - table["warmup_iters"],
    )  # fmt: skip
    schedule = make_schedule(config, 1000)
    values = [float(schedule(step)) for step in range(len(table["lrs"]))]
    np.testing.assert_allclose(values, table["lrs"], rtol=1e-6, atol=1e-7)


def test_adamw_is_its_formula():
    """Three steps by hand in float64, clipping and decay included."""
    config = OptimizerConfig(grad_clip_norm=1.0, weight_decay=0.1, eps=1e-8)
    optimizer = make_optimizer(config)
    params = {"w": jnp.array([1.0, -2.0, 3.0])}
    state = optimizer.init(params)
    w, m, v = np.array([1.0, -2.0, 3.0]), np.zeros(3), np.zeros(3)
    for step, gradient in enumerate([[3.0, 4.0, 0.0], [0.1, -0.2, 0.3], [0.0, 0.0, 1e-4]], 1):
        updates, state = optimizer.update({"w": jnp.array(gradient)}, state, params)
        params = {"w": params["w"] - 1e-2 * updates["w"]}
        g = np.array(gradient) / max(1.0, np.linalg.norm(gradient))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        direction = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        w = w - 1e-2 * (direction + 0.1 * w)
        np.testing.assert_allclose(params["w"], w, rtol=1e-6)


def test_the_decay_rule_may_leave_norms_out():
    params = {
        "embedding": 0, "final_norm": 0,
        "layers": {"attention_norm": 0, "attention": {"query": 0}, "mlp_norm": 0},
    }  # fmt: skip
    assert decay_mask("all") is None
    assert decay_mask("matrices")(params) == {
        "embedding": True, "final_norm": False,
        "layers": {"attention_norm": False, "attention": {"query": True}, "mlp_norm": False},
    }  # fmt: skip
