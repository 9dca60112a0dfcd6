"""The matrix product against einsum, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.kernels.linear import linear


@pytest.mark.parametrize(
    "x_shape, weight_shape, contract, formula",
    [
        ((2, 5, 8), (8, 6), 1, "bsd,df->bsf"),
        ((2, 5, 8), (8, 3, 4), 1, "bsd,dnh->bsnh"),
        ((2, 5, 3, 4), (3, 4, 8), 2, "bsnh,nhd->bsd"),
        ((7, 8), (8, 6), 1, "td,df->tf"),
    ],
)
def test_linear_is_the_einsum(x_shape, weight_shape, contract, formula):
    x = jax.random.normal(jax.random.key(0), x_shape)
    weight = jax.random.normal(jax.random.key(1), weight_shape)

    def objective(function):
        return lambda x, weight: jnp.sum(jnp.sin(function(x, weight)))

    ours = jax.value_and_grad(objective(lambda x, w: linear(x, w, contract=contract)), (0, 1))
    plain = jax.value_and_grad(objective(lambda x, w: jnp.einsum(formula, x, w)), (0, 1))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jax.jit(ours)(x, weight),
        jax.jit(plain)(x, weight),
    )


def test_weights_are_cast_to_the_compute_dtype():
    x = jnp.ones((2, 8), jnp.bfloat16)
    gradient = jax.grad(lambda w: linear(x, w).sum().astype(jnp.float32))(
        jnp.ones((8, 4), jnp.float32)
    )
    assert linear(x, jnp.ones((8, 4), jnp.float32)).dtype == jnp.bfloat16
    assert gradient.dtype == jnp.float32
