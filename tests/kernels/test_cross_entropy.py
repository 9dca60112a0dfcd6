"""The chunked loss against the plain one, and the plain one against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.kernels import cross_entropy

B, S, D, V = 3, 20, 16, 97


def example(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (B, S, D))
    unembedding = jax.random.normal(keys[1], (D, V)) * 0.5
    targets = jax.random.randint(keys[2], (B, S), 0, V)
    weights = jax.random.uniform(keys[3], (B, S)).at[1, 4:9].set(0)
    return hidden, unembedding, targets, weights


def oracle_nll(hidden, unembedding, targets):
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64)
    largest = logits.max(axis=-1)
    lse = largest + np.log(np.exp(logits - largest[..., None]).sum(axis=-1))
    return lse - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0], lse


def relative(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


def test_reference_is_the_formula():
    hidden, unembedding, targets, weights = example()
    nll, lse = oracle_nll(hidden, unembedding, targets)
    w = np.asarray(weights, np.float64)
    objective, reported = cross_entropy.reference_weighted_sum(
        hidden, unembedding, targets, weights, z_loss=0.01
    )
    np.testing.assert_allclose(objective, np.sum(w * (nll + 0.01 * lse**2)), rtol=1e-6)
    np.testing.assert_allclose(reported, np.sum(w * nll), rtol=1e-6)
    logps = cross_entropy.reference_token_logps(hidden, unembedding, targets)
    np.testing.assert_allclose(logps, -nll, rtol=1e-5)


# 60 tokens: chunks that divide them, that do not, of one token, and larger than all.
@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 20, 59, 60, 1000, 0])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_weighted_sum_equals_reference(chunk_tokens, z_loss):
    hidden, unembedding, targets, weights = example()

    def value_and_gradients(function, **settings):
        def objective(hidden, unembedding):
            return function(hidden, unembedding, targets, weights, z_loss=z_loss, **settings)

        run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
        return run(hidden, unembedding)

    (value, reported), gradients = value_and_gradients(
        cross_entropy.weighted_sum, chunk_tokens=chunk_tokens
    )
    (plain, plain_reported), plain_gradients = value_and_gradients(
        cross_entropy.reference_weighted_sum
    )
    assert relative(value, plain) < 1e-6
    assert relative(reported, plain_reported) < 1e-6
    for gradient, plain_gradient in zip(gradients, plain_gradients, strict=True):
        assert relative(gradient, plain_gradient) < 1e-6
    # Without differentiation another path runs.
    undifferentiated = jax.jit(
        lambda *a: cross_entropy.weighted_sum(*a, z_loss=z_loss, chunk_tokens=chunk_tokens)
    )(hidden, unembedding, targets, weights)
    assert relative(undifferentiated[0], plain) < 1e-6
    assert relative(undifferentiated[1], plain_reported) < 1e-6


def test_weighted_sum_scales_with_its_cotangent():
    hidden, unembedding, targets, weights = example()

    def objective(factor):
        return lambda u: factor * cross_entropy.weighted_sum(hidden, u, targets, weights)[0]

    once, thrice = (jax.grad(objective(f))(unembedding) for f in (1.0, 3.0))
    assert relative(3 * once, thrice) < 1e-6


@pytest.mark.parametrize("chunk_tokens", [7, 20, 60, 0])
def test_token_logps_equal_reference(chunk_tokens):
    hidden, unembedding, targets, weights = example()

    def value_and_gradients(function, **settings):
        def objective(hidden, unembedding):
            logps = function(hidden, unembedding, targets, **settings)
            return jnp.sum(weights * logps**2), logps  # a different factor for each token

        run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
        return run(hidden, unembedding)

    (_, logps), gradients = value_and_gradients(
        cross_entropy.token_logps, chunk_tokens=chunk_tokens
    )
    (_, plain), plain_gradients = value_and_gradients(cross_entropy.reference_token_logps)
    assert logps.shape == (B, S)
    assert relative(logps, plain) < 1e-6
    for gradient, plain_gradient in zip(gradients, plain_gradients, strict=True):
        assert relative(gradient, plain_gradient) < 1e-6


@pytest.mark.parametrize("function", ["weighted_sum", "token_logps"])
def test_bfloat16_weight_gradients_do_not_lose_with_the_number_of_chunks(function):
    """dW is summed over chunks in float32: 128 chunks are as exact as one."""
    keys = jax.random.split(jax.random.key(1), 3)
    hidden = jax.random.normal(keys[0], (4, 512, 32)).astype(jnp.bfloat16)
    unembedding = jax.random.normal(keys[1], (32, 64)) * 0.5
    targets = jax.random.randint(keys[2], (4, 512), 0, 64)
    weights = jnp.ones((4, 512))

    def dmatrix(hidden, chunk_tokens=0, exact=False):
        def objective(unembedding):
            if exact:
                return jnp.sum(-cross_entropy.reference_token_logps(hidden, unembedding, targets))
            if function == "weighted_sum":
                arguments = (hidden, unembedding, targets, weights)
                return cross_entropy.weighted_sum(*arguments, chunk_tokens=chunk_tokens)[0]
            logps = cross_entropy.token_logps(
                hidden, unembedding, targets, chunk_tokens=chunk_tokens
            )
            return -jnp.sum(logps)

        return np.asarray(jax.jit(jax.grad(objective))(unembedding), np.float64)

    exact = dmatrix(hidden.astype(jnp.float32), exact=True)
    one, many = (np.linalg.norm(dmatrix(hidden, chunk) - exact) for chunk in (2048, 16))
    assert many < 1.2 * one
    assert one < 0.01 * np.linalg.norm(exact)


def test_large_logits_do_not_overflow():
    hidden, unembedding, targets, weights = example()
    value, _ = cross_entropy.weighted_sum(hidden * 1000, unembedding, targets, weights)
    nll, _ = oracle_nll(hidden * 1000, unembedding, targets)
    np.testing.assert_allclose(value, np.sum(np.asarray(weights) * nll), rtol=1e-5)


def test_the_logits_of_all_tokens_never_exist():
    """The compiled program's temporaries stay far below tokens x vocabulary."""
    tokens, vocabulary = 4096, 2048
    hidden = jax.ShapeDtypeStruct((1, tokens, 64), jnp.float32)
    unembedding = jax.ShapeDtypeStruct((64, vocabulary), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, tokens), jnp.float32)

    def temporaries(function, **settings):
        gradient = jax.grad(lambda *a: function(*a, **settings)[0], argnums=(0, 1))
        compiled = jax.jit(gradient).lower(hidden, unembedding, targets, weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    all_logits = tokens * vocabulary * 4
    assert temporaries(cross_entropy.reference_weighted_sum) >= all_logits
    assert temporaries(cross_entropy.weighted_sum, chunk_tokens=256) < all_logits / 3
