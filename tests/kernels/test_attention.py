"""Every attention implementation against a float64 NumPy oracle, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.kernels.attention import api, folded


def oracle(q, k, v, mask):
    """softmax(q k^T / sqrt(H)) v in float64, one head and row at a time; mask (B, S, T)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, _, N, H = q.shape
    groups = N // k.shape[2]
    out = np.zeros_like(q)
    for b in range(B):
        for n in range(N):
            scores = q[b, :, n] @ k[b, :, n // groups].T / np.sqrt(H)
            scores = np.where(mask[b], scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[b, :, n] = weights @ v[b, :, n // groups]
    return out


def attention(q, k, v, **arguments):
    """`api.attention`, jitted: op by op, compiling would take most of the suite's time."""
    return jax.jit(lambda q, k, v: api.attention(q, k, v, **arguments))(q, k, v)


def inputs(seed, B, S, T, N, K, H, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (B, S, N, H)).astype(dtype)
    k = jax.random.normal(keys[1], (B, T, K, H)).astype(dtype)
    v = jax.random.normal(keys[2], (B, T, K, H)).astype(dtype)
    return q, k, v


def causal_mask(B, S, T, segment_ids=None):
    mask = np.broadcast_to(np.arange(T)[None] <= np.arange(S)[:, None], (B, S, T))
    if segment_ids is not None:
        segment_ids = np.asarray(segment_ids)
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return mask


TRAINING_CASES = [  # B, S, N, K, H: groups 1, 4, 8, lengths around and off the block of 128
    (2, 1, 4, 4, 32),
    (1, 127, 4, 1, 64),
    (2, 128, 8, 2, 32),
    (1, 300, 8, 1, 16),
    (2, 257, 2, 2, 128),
]


@pytest.mark.parametrize("implementation", ["reference", "folded"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", TRAINING_CASES, ids=str)
def test_causal_matches_float64(case, packed, implementation):
    B, S, N, K, H = case
    q, k, v = inputs(0, B, S, S, N, K, H)
    segment_ids = None
    if packed:
        starts = np.random.default_rng(S).random((B, S)) < 0.05
        segment_ids = jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)
    out = attention(q, k, v, segment_ids=segment_ids, implementation=implementation)
    expected = oracle(q, k, v, causal_mask(B, S, S, segment_ids))
    np.testing.assert_allclose(np.asarray(out), expected, atol=3e-6)


@pytest.mark.parametrize("implementation", ["reference", "folded"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_match_finite_differences_in_float64(packed, implementation):
    """The vjp along random directions equals the oracle's central difference."""
    B, S, N, K, H = 1, 140, 4, 2, 16
    q, k, v = inputs(1, B, S, S, N, K, H)
    segment_ids = jnp.asarray(np.arange(S)[None] // 50, jnp.int32) if packed else None
    mask = causal_mask(B, S, S, segment_ids)
    weight = np.random.default_rng(2).normal(size=q.shape)

    def objective(q, k, v):
        out = api.attention(q, k, v, segment_ids=segment_ids, implementation=implementation)
        return jnp.sum(out * weight)

    gradients = jax.jit(jax.grad(objective, argnums=(0, 1, 2)))(q, k, v)
    rng = np.random.default_rng(3)
    for index, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = [np.asarray(x, np.float64) for x in (q, k, v)]
            moved[index] = moved[index] + sign * 1e-5 * direction
            ends.append(np.sum(oracle(*moved, mask) * weight))
        expected = (ends[0] - ends[1]) / 2e-5
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(np.sum(np.asarray(gradient, np.float64) * direction) - expected) < 1e-6 * scale


def test_folded_covers_several_query_blocks():
    """The cases above would not test the block loop if the block outgrew them."""
    assert len(folded._blocks(300)) == 3


@pytest.mark.parametrize("dtype, tolerance", [(jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)])
def test_low_precision_inputs(dtype, tolerance):
    q, k, v = inputs(4, 2, 64, 64, 4, 2, 32, dtype)
    out = attention(q, k, v, implementation="reference")
    assert out.dtype == dtype
    expected = oracle(q, k, v, causal_mask(2, 64, 64))
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=tolerance)


def test_decoding_rows_at_their_own_positions():
    B, S, T, N, K, H = 3, 2, 10, 4, 2, 16
    q, k, v = inputs(5, B, S, T, N, K, H)
    lengths = jnp.array([2, 7, 10])
    q_positions = lengths[:, None] - S + jnp.arange(S)
    out = attention(q, k, v, q_positions=q_positions, kv_lengths=lengths)
    mask = np.arange(T)[None, None] <= np.asarray(q_positions)[:, :, None]
    np.testing.assert_allclose(np.asarray(out), oracle(q, k, v, mask), atol=3e-6)


def test_kv_lengths_hide_unused_keys():
    q, k, v = inputs(6, 2, 3, 8, 2, 2, 16)
    out = attention(q, k, v, causal=False, kv_lengths=jnp.array([5, 8]))
    mask = np.broadcast_to(np.arange(8) < np.array([[5], [8]]), (2, 8))[:, None]
    np.testing.assert_allclose(
        np.asarray(out), oracle(q, k, v, np.broadcast_to(mask, (2, 3, 8))), atol=3e-6
    )


def test_a_query_without_keys_is_finite():
    q, k, v = inputs(7, 1, 2, 4, 2, 2, 16)

    def total(q, k, v):
        return jnp.sum(api.attention(q, k, v, causal=False, kv_lengths=jnp.array([0])))

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)


def test_the_same_inputs_give_the_same_bits():
    q, k, v = inputs(8, 2, 200, 200, 4, 2, 32)
    run = jax.jit(jax.grad(lambda q, k, v: jnp.sum(api.attention(q, k, v) ** 2), argnums=(0, 1, 2)))
    for first, second in zip(run(q, k, v), run(q, k, v), strict=True):
        assert np.asarray(first).tobytes() == np.asarray(second).tobytes()


def test_refusals_say_what_to_do():
    q, k, v = inputs(9, 1, 3, 5, 4, 2, 16)
    with pytest.raises(ValueError, match="pass q_positions"):
        api.attention(q, k, v)
    with pytest.raises(ValueError, match='use "reference"'):
        api.attention(q, k, v, causal=False, implementation="folded")
    with pytest.raises(ValueError, match="not one of auto, reference, folded"):
        api.attention(q, k, v, causal=False, implementation="fast")
    with pytest.raises(ValueError, match="do not fit"):
        api.attention(q, k[..., :8], v, causal=False)
    with pytest.raises(ValueError, match="do not fit"):
        api.attention(q[:, :, :3], k, v, causal=False)
