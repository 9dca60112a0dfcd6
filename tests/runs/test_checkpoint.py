"""Saving and restoring: bits, fallback, what is kept, params alone."""

import dataclasses
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinyllama_jax.config import CheckpointConfig
from tinyllama_jax.runs import checkpoint
from tinyllama_jax.runs.checkpoint import Checkpointer, save_params
from tinyllama_jax.runs.integrity import SEAL
from tinyllama_jax.runs.restore import CHECKPOINTS, restore_params
from tinyllama_jax.runs.steps import steps_to_keep

KEEP_ALL = CheckpointConfig(keep_last=1000)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """Like a train state: every dtype and kind of node that one may hold."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    guard: dict


def state_at(step: int) -> State:
    normal = np.random.default_rng(step).normal
    params = {
        "embedding": jnp.asarray(normal(size=(32, 8)), jnp.float32),
        "layers": {"query": jnp.asarray(normal(size=(2, 8, 8)), jnp.bfloat16)},
        "norm": {"scale": jnp.asarray(normal(size=8), jnp.float32)},
    }
    moments = jax.tree.map(lambda x: jnp.asarray(normal(size=x.shape), x.dtype), params)
    opt_state = optax.tree.map_params(OPTIMIZER, lambda _, m: m, OPTIMIZER.init(params), moments)
    guard = {
        "skipped": jnp.uint32(2**32 - 1 - step),
        "on": jnp.array(True),
        "nan": jnp.float32(np.nan),
    }
    return State(jnp.int32(step), params, opt_state, guard)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def tens(step):
    """Tokens that so many steps of ten see."""
    return 10 * step


def save_steps(run_dir, *steps, settings=KEEP_ALL, tokens_per_step=10):
    with Checkpointer(run_dir, settings, lambda step: step * tokens_per_step) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step), {"tokens_seen": step * tokens_per_step})
        assert checkpoints.wait()
        return checkpoints.steps()


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("saved")
    save_steps(run_dir, 10, 20)
    return run_dir


@pytest.fixture
def run_dir(saved_run, tmp_path):
    """A run with the sealed steps 10 and 20."""
    return shutil.copytree(saved_run, tmp_path / "run")


def test_restores_the_same_bits_and_metadata(run_dir):
    abstract = jax.eval_shape(lambda: state_at(0))
    restored = Checkpointer(run_dir, KEEP_ALL).restore(abstract)
    assert restored.step == 20
    assert restored.metadata == {"tokens_seen": 200}
    assert_same_bits(restored.state, state_at(20))
    named = Checkpointer(run_dir, KEEP_ALL).restore(state_at(0), step=10)
    assert_same_bits(named.state, state_at(10))


def test_a_dict_is_a_state_too(tmp_path):
    state = {"params": {"w": jnp.arange(4.0)}, "step": jnp.int32(1)}
    with Checkpointer(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.save(1, state, {})
        assert_same_bits(checkpoints.restore(state).state, state)


def test_nothing_saved_is_none(tmp_path):
    assert Checkpointer(tmp_path, KEEP_ALL).restore(state_at(0)) is None
    (tmp_path / CHECKPOINTS).mkdir()
    assert Checkpointer(tmp_path, KEEP_ALL).restore(state_at(0)) is None


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    """A big state, overwritten in place many times while the save is still writing."""
    scramble = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    state = {"params": {"w": jnp.arange(4_000_000, dtype=jnp.float32)}, "step": jnp.int32(3)}
    expected = jax.tree.map(np.array, state)
    compiled = scramble.lower(state).compile()
    with Checkpointer(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.save(3, state, {})
        for _ in range(10):
            state = compiled(state)
        assert_same_bits(checkpoints.restore(state).state, expected)


def test_the_next_save_waits_for_the_last(tmp_path):
    assert save_steps(tmp_path, 1, 2, 3, 4) == [1, 2, 3, 4]


def test_saving_an_existing_step_replaces_it(run_dir):
    replacement = dataclasses.replace(state_at(20), guard=state_at(99).guard)
    with Checkpointer(run_dir, KEEP_ALL) as checkpoints:
        checkpoints.restore(state_at(0), step=10)
        checkpoints.save(20, replacement, {"second": True})
        restored = checkpoints.restore(state_at(0))
    assert restored.step == 20 and restored.metadata == {"second": True}
    assert_same_bits(restored.state, replacement)
    assert sorted(path.name for path in (run_dir / CHECKPOINTS).iterdir()) == ["10", "20"]


def test_steps_beyond_a_rewind_go_when_the_next_step_is_sealed(run_dir, capsys):
    with Checkpointer(run_dir, KEEP_ALL) as checkpoints:
        checkpoints.restore(state_at(0), step=10)
        assert checkpoints.steps() == [10, 20]
        checkpoints.rewind(10)
        assert "steps [20] lie beyond step 10; they are kept as" in capsys.readouterr().err
    # Not even a start that ends before it saves finds them again.
    with Checkpointer(run_dir, KEEP_ALL) as checkpoints:
        assert checkpoints.steps() == [10]
        assert checkpoints.restore(state_at(0)).step == 10
        assert (run_dir / CHECKPOINTS / "20.superseded").is_dir()
        checkpoints.save(15, state_at(15), {})
        checkpoints.wait()
        assert checkpoints.steps() == [10, 15]
        assert not (run_dir / CHECKPOINTS / "20.superseded").exists()


def test_keeps_the_last_and_milestones(tmp_path):
    settings = CheckpointConfig(keep_last=2, milestone_tokens=100)
    steps = range(4, 40, 4)  # milestones of 100 tokens, 10 a step: 12 (120 tokens), 20, 32
    assert save_steps(tmp_path, *steps, settings=settings) == [12, 20, 32, 36]


@pytest.mark.parametrize(
    ("steps", "keep_last", "milestone", "expected"),
    [
        ([], 3, 0, set()),
        ([5], 3, 0, {5}),
        ([1, 2, 3, 4, 5], 2, 0, {4, 5}),
        ([1, 2, 3, 4, 5], 1, 20, {2, 4, 5}),  # exactly at a multiple
        ([3, 6, 9, 12], 1, 50, {6, 12}),  # the first past one
        ([3, 30], 1, 50, {30}),  # several multiples passed at once
        ([3, 30, 31], 1, 50, {30, 31}),
    ],
)
def test_steps_to_keep(steps, keep_last, milestone, expected):
    assert steps_to_keep(steps, keep_last, milestone, tens) == expected


def test_milestones_do_not_depend_on_when_the_rule_is_applied():
    """Applying the rule after every save keeps what applying it once at the end would keep."""
    kept: list[int] = []
    for step in range(7, 1000, 7):
        kept = sorted(steps_to_keep([*kept, step], 3, 640, tens))
    assert set(kept) == steps_to_keep(range(7, 1000, 7), 3, 640, tens)


def test_an_old_step_is_deleted_only_once_a_newer_one_is_sealed(tmp_path, monkeypatch):
    settings = CheckpointConfig(keep_last=1)
    save_steps(tmp_path, 1, settings=settings)
    seen = []
    publish = checkpoint._seal_and_publish

    def watched(unsealed, *arguments):
        directory = unsealed.parent
        seen.append((directory / "1" / SEAL).is_file())
        publish(unsealed, *arguments)
        seen.append((directory / "1" / SEAL).is_file() and (directory / "2" / SEAL).is_file())

    monkeypatch.setattr(checkpoint, "_seal_and_publish", watched)
    assert save_steps(tmp_path, 2, settings=settings) == [2]
    assert seen == [True, True]


def test_other_arrays_are_listed_not_taken_for_damage(run_dir):
    state = state_at(0)
    state.params["norm"]["scale"] = jnp.zeros(9)
    state.params["norm"]["bias"] = jnp.zeros(8)
    del state.guard["on"]
    with pytest.raises(ValueError, match="holds other arrays than this config makes") as error:
        Checkpointer(run_dir, KEEP_ALL).restore(state)
    text = str(error.value)
    assert "params/norm/scale: saved float32[8], expected float32[9]" in text
    assert "params/norm/bias: saved nothing, expected float32[8]" in text
    assert "training/guard/on: saved bool[], expected nothing" in text


def test_params_alone(run_dir):
    step, params = restore_params(run_dir)
    assert step == 20
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert_same_bits(params, state_at(20).params)
    step, params = restore_params(run_dir, step=10)
    assert_same_bits(params, state_at(10).params)


def test_params_are_found_though_training_deletes_the_step_that_is_read(run_dir, monkeypatch):
    load = checkpoint.ocp.load_checkpointables

    def overtaken(path, abstract):
        if path.name == "20":
            save_steps(run_dir, 30, settings=CheckpointConfig(keep_last=1))
            assert not path.exists()
        return load(path, abstract)

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", overtaken)
    step, params = restore_params(run_dir)
    assert step == 30
    assert_same_bits(params, state_at(30).params)


def test_params_alone_do_not_read_the_optimizer_state(run_dir, monkeypatch):
    opened = []
    load = checkpoint.ocp.load_checkpointables
    monkeypatch.setattr(
        checkpoint.ocp,
        "load_checkpointables",
        lambda path, abstract: opened.append(set(abstract)) or load(path, abstract),
    )
    restore_params(run_dir)
    assert opened == [{"params"}]


@pytest.mark.parametrize("step", [None, 30])
def test_params_of_no_step(run_dir, tmp_path, step):
    with pytest.raises(ValueError, match="no sealed checkpoint" if step is None else r"\[10, 20\]"):
        restore_params(tmp_path if step is None else run_dir, step)


def test_imported_params_are_read_and_trained_from(tmp_path):
    state = state_at(5)
    save_params(tmp_path, jax.tree.map(np.asarray, state.params), {"source": "elsewhere"})
    step, params = restore_params(tmp_path)
    assert step == 0
    assert_same_bits(params, state.params)

    settings = CheckpointConfig(keep_last=1)
    with Checkpointer(tmp_path, settings) as checkpoints:
        assert checkpoints.restore(state) is None  # no optimizer state to go on from
        initial = checkpoints.restore_initial_params(jax.eval_shape(lambda: state.params))
        assert_same_bits(initial, state.params)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(initial))
        for later in (7, 8):
            checkpoints.save(later, state_at(later), {})
        checkpoints.wait()
        assert checkpoints.steps() == [0, 8]  # where the run came from stays
        assert checkpoints.restore(state).step == 8
    assert restore_params(tmp_path)[0] == 8


def test_imported_params_do_not_go_into_a_run_that_has_steps(run_dir):
    with pytest.raises(ValueError, match=r"already holds the steps \[10, 20\]"):
        save_params(run_dir, state_at(1).params, {})


def test_a_trained_run_has_no_initial_params(run_dir):
    checkpoints = Checkpointer(run_dir, KEEP_ALL)
    assert checkpoints.restore_initial_params(state_at(0).params) is None


def test_strangers_in_the_directory_are_left_alone(run_dir):
    (run_dir / CHECKPOINTS / "notes.txt").write_text("mine")
    (run_dir / CHECKPOINTS / "20.backup").mkdir()
    assert save_steps(run_dir, 30) == [10, 20, 30]
    assert (run_dir / CHECKPOINTS / "notes.txt").exists()
    assert (run_dir / CHECKPOINTS / "20.backup").exists()


@pytest.mark.slow
def test_a_sharded_state_is_restored_on_another_mesh(tmp_path):
    program = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tinyllama_jax.config import CheckpointConfig
from tinyllama_jax.runs.checkpoint import Checkpointer
from tinyllama_jax.runs.restore import restore_params

def state_on(shape, spec):
    mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    w = jax.random.normal(jax.random.key(0), (16, 24))
    sharded = jax.device_put(w, NamedSharding(mesh, spec))
    step = jax.device_put(jnp.int32(4), NamedSharding(mesh, P()))
    return {"params": {"w": sharded}, "step": step}

checkpoints = Checkpointer(sys.argv[1], CheckpointConfig())
saved = state_on((2, 4), P("fsdp", "data"))
checkpoints.save(4, saved, {})
for other in (state_on((8, 1), P(None, "data")), state_on((1, 8), P("fsdp"))):
    found = checkpoints.restore(other).state
    assert found["params"]["w"].sharding == other["params"]["w"].sharding
    np.testing.assert_array_equal(found["params"]["w"], saved["params"]["w"])
np.testing.assert_array_equal(restore_params(sys.argv[1])[1]["w"], saved["params"]["w"])
"""
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
