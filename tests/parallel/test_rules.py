"""Every parameter has one rule, every rule a parameter, and every cut divides."""

import re

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from tinyllama_jax.config import Config, OptimizerConfig
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.model.presets import PRESETS
from tinyllama_jax.parallel import rules
from tinyllama_jax.parallel.mesh import AXES, P
from tinyllama_jax.training.optimizer import make_optimizer
from tinyllama_jax.training.step import init_state


def paths_of(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def shapes_of(config):
    return jax.eval_shape(Llama(config).init, jax.random.key(0))


@pytest.mark.parametrize("preset", PRESETS)
def test_each_parameter_has_one_rule_and_divides(preset):
    shapes = shapes_of(PRESETS[preset])
    for path in paths_of(shapes):
        assert isinstance(rules.param_spec(path), P)
    mesh = AbstractMesh((2, 8, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    rules.shardings(shapes, mesh)


def test_each_rule_names_a_parameter():
    paths = paths_of(shapes_of(PRESETS["tiny_debug"]))
    for pattern, _ in rules.RULES:
        assert any(re.fullmatch(pattern, path) for path in paths), pattern


@pytest.mark.parametrize("path", ["layers/attention/bias", "embeddings", "layers/query", ""])
def test_a_parameter_without_a_rule_is_named(path):
    with pytest.raises(ValueError, match=f"0 rules .* name the parameter {path}; a parameter"):
        rules.param_spec(path)


def test_what_a_mesh_does_not_divide_is_named():
    mesh = AbstractMesh((1, 7, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    with pytest.raises(ValueError, match=r"embedding \(32000, 2048\): 2048 does not"):
        rules.shardings(shapes_of(PRESETS["tinyllama_1b"]), mesh)


def test_moments_lie_as_their_parameters():
    config = Config(model=PRESETS["tiny_debug"], optimizer=OptimizerConfig())
    optimizer = make_optimizer(config.optimizer)
    state = jax.eval_shape(lambda: init_state(Llama(config.model), optimizer, 0))
    specs = rules.specs(state)
    adam = next(part for part in specs.opt_state if hasattr(part, "mu"))
    assert specs.params == adam.mu == adam.nu
    assert specs.step == adam.count == P()
    assert specs.params["layers"]["mlp"]["down"] == P(None, "tensor", "fsdp")
