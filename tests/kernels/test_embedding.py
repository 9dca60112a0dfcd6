"""Rows of the table, and the sums of gradients that come back to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.kernels import target
from tinyllama_jax.kernels.embedding import embed

V, D = 50, 8
TARGETS = [target.Target("cpu"), target.Target("gpu", (9, 0))]


def test_rows_are_taken_and_cast():
    table = jnp.arange(12.0).reshape(4, 3)
    out = embed(table, jnp.array([[3, 0]]), jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), [[[9, 10, 11], [0, 1, 2]]])


# All alike, all different, one alone, many of few; in blocks of 128: runs over several, runs that
# end where a block does, and lengths that no block divides.
CASES = {
    "alike": [7] * 500, "different": range(V), "one": [0], "few": [V - 1, 0, 0, V - 1, 3] * 90,
    "blocks": [1] * 128 + [2] * 256 + [3] * 100 + [4] * 28 + [5], "most one": [6] * 300 + [9, 2],
    "random": np.random.default_rng(0).integers(0, V, 1000),
}  # fmt: skip


@pytest.mark.parametrize("tokens", CASES.values(), ids=CASES)
@pytest.mark.parametrize("device", TARGETS, ids=lambda device: device.platform)
def test_gradients_are_summed_by_token(tokens, device):
    tokens = jnp.asarray(tokens, jnp.int32)[None]
    dx = jax.random.normal(jax.random.key(0), (*tokens.shape, D)).astype(jnp.bfloat16)
    table = jnp.zeros((V, D))
    with target.compile_for(device):
        _, vjp = jax.vjp(lambda table: embed(table, tokens, jnp.bfloat16), table)
        (found,) = jax.jit(vjp)(dx)
    expected = np.zeros((V, D))
    np.add.at(expected, np.asarray(tokens).ravel(), np.asarray(dx, np.float64).reshape(-1, D))
    assert found.dtype == table.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_nothing_is_added_in_an_order_of_the_moment_on_a_gpu():
    """What XLA may write by atomics is a scatter whose indices are not known to be unique."""
    tokens = jnp.zeros((2, 64), jnp.int32)

    def gradient(table):
        return jax.grad(lambda table: embed(table, tokens, jnp.bfloat16).sum())(table)

    table = jax.ShapeDtypeStruct((V, D), jnp.float32)
    with target.compile_for(TARGETS[1]):
        text = jax.jit(gradient).trace(table).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('"stablehlo.scatter"(') == text.count("unique_indices = true") == 1
