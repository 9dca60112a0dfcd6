"""The model's own invariants; parity with Hugging Face is in tests/conversion."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.config import ModelConfig
from tinyllama_jax.model.cache import KVCache
from tinyllama_jax.model.llama import Llama, parameter_count
from tinyllama_jax.model.presets import PRESETS

TINY = ModelConfig(
    vocab_size=64, num_layers=4, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48,
    max_seq_len=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return Llama(TINY).init(jax.random.key(0))


def apply(config, params, tokens, **arguments):
    """`Llama.apply`, jitted: op by op, compiling would take most of the suite's time."""
    return jax.jit(Llama(config).apply)(params, tokens, **arguments)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (3, 20), 0, TINY.vocab_size)


def test_tinyllama_has_the_published_parameter_count():
    assert parameter_count(PRESETS["tinyllama_1b"]) == 1_100_048_384


def test_tied_embeddings_have_no_output_matrix(params):
    tied = Llama(dataclasses.replace(TINY, tie_embeddings=True))
    fresh = tied.init(jax.random.key(0))
    assert "unembedding" not in fresh
    np.testing.assert_array_equal(tied.unembed(fresh), fresh["embedding"].T)
    assert parameter_count(TINY) - parameter_count(tied.config) == 64 * 32


def test_initialisation_is_tinyllamas():
    """Standard deviations to 3%, means at 0, norms at 1, and layers that differ."""
    config = ModelConfig(
        vocab_size=512, num_layers=3, d_model=128, num_heads=4, num_kv_heads=2, head_dim=32,
        d_ff=384,
    )  # fmt: skip
    params = Llama(config).init(jax.random.key(0))
    weights = math.sqrt(2 / (5 * 128))
    residual = 1 / math.sqrt(128) / 3
    layers = params["layers"]
    expected = {
        "embedding": (params["embedding"], weights),
        "unembedding": (params["unembedding"], weights),
        "output": (layers["attention"]["output"], residual),
        "down": (layers["mlp"]["down"], residual),
        **{n: (layers["attention"][n], weights) for n in ("query", "key", "value")},
        **{n: (layers["mlp"][n], weights) for n in ("gate", "up")},
    }
    for name, (leaf, std) in expected.items():
        assert np.std(leaf) == pytest.approx(std, rel=0.03), name
        assert abs(np.mean(leaf)) < 5 * std / math.sqrt(leaf.size), name
    for norm in (params["final_norm"], layers["attention_norm"], layers["mlp_norm"]):
        assert np.all(np.asarray(norm) == 1)
    query = np.asarray(layers["attention"]["query"])
    assert not np.array_equal(query[0], query[1])


def test_params_are_float32_and_stacked(params):
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert all(leaf.shape[0] == TINY.num_layers for leaf in jax.tree.leaves(params["layers"]))


@pytest.mark.parametrize("implementation", ["reference", "folded"])
def test_later_tokens_do_not_reach_earlier_ones(params, tokens, implementation):
    config = dataclasses.replace(TINY, attention=implementation)
    hidden, _ = apply(config, params, tokens)
    changed, _ = apply(config, params, tokens.at[:, 12:].add(1) % TINY.vocab_size)
    np.testing.assert_array_equal(hidden[:, :12], changed[:, :12])
    assert not np.array_equal(hidden[:, 12:], changed[:, 12:])


@pytest.mark.parametrize("implementation", ["reference", "folded"])
def test_packed_documents_are_as_if_alone(params, tokens, implementation):
    config = dataclasses.replace(TINY, attention=implementation)
    segment_ids = jnp.asarray([[0] * 7 + [1] * 13] * 3)
    positions = jnp.asarray([list(range(7)) + list(range(13))] * 3)
    packed, _ = apply(config, params, tokens, positions=positions, segment_ids=segment_ids)
    alone = [apply(config, params, part)[0] for part in (tokens[:, :7], tokens[:, 7:])]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=1e-5)


def test_the_cache_changes_nothing(params, tokens):
    """Prefill in two pieces and single steps equal one pass without a cache."""
    whole, _ = apply(TINY, params, tokens)
    cache = KVCache.empty(TINY, 3, 24, jnp.float32)
    pieces = []
    for start, stop in [(0, 9), (9, 16), (16, 17), (17, 18), (18, 19), (19, 20)]:
        hidden, cache = apply(TINY, params, tokens[:, start:stop], cache=cache)
        pieces.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, [20, 20, 20])


def test_cache_rows_of_unequal_length(params, tokens):
    """Padded prefill, lengths set back to the true ones, then a step: each row is as if alone."""
    lengths = jnp.array([3, 9, 6])
    cache = KVCache.empty(TINY, 3, 24, jnp.float32)
    _, cache = apply(TINY, params, tokens[:, :9], cache=cache)
    cache = cache.replace(lengths=lengths)
    following = jnp.take_along_axis(tokens, lengths[:, None], axis=1)
    hidden, _ = apply(TINY, params, following, cache=cache)
    for row, length in enumerate([3, 9, 6]):
        alone, _ = apply(TINY, params, tokens[row : row + 1, : length + 1])
        np.testing.assert_allclose(hidden[row, 0], alone[0, -1], atol=1e-5)


def loss_and_gradients(config, params, tokens):
    model = Llama(config)

    def objective(params):
        hidden, _ = model.apply(params, tokens)
        return jnp.sum(jnp.sin(model.logits(params, hidden)))

    return jax.jit(jax.value_and_grad(objective))(params)


@pytest.fixture(scope="module")
def plain(params, tokens):
    return loss_and_gradients(dataclasses.replace(TINY, attention="reference"), params, tokens)


@pytest.mark.parametrize(
    "remat, scan_unroll",
    [("none", 0), ("none", 1), ("dots", 1), ("attention", 2), ("full", 1)],
)
def test_remat_and_unrolling_change_no_gradient(params, tokens, plain, remat, scan_unroll):
    config = dataclasses.replace(TINY, remat=remat, scan_unroll=scan_unroll)
    value, gradients = loss_and_gradients(config, params, tokens)
    assert value == pytest.approx(float(plain[0]), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()),
        gradients,
        plain[1],
    )


@pytest.mark.parametrize(
    "implementation", ["reference", pytest.param("folded", marks=pytest.mark.slow)]
)
def test_remat_saves_what_its_policy_says(params, tokens, implementation):
    """Fewer saved names, less memory kept for the backward pass."""

    def saved_bytes(remat):
        # Wide enough that what is saved outweighs the scratch space of one layer's backward.
        config = dataclasses.replace(TINY, remat=remat, num_layers=16, attention=implementation)
        model = Llama(config)
        batch = jax.ShapeDtypeStruct((8, 32), jnp.int32)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        gradient = jax.grad(lambda p, t: jnp.sum(model.apply(p, t)[0] ** 3))
        compiled = jax.jit(gradient).lower(shapes, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, attention, full = map(saved_bytes, ("none", "dots", "attention", "full"))
    assert none > dots > attention > full


@pytest.mark.parametrize("scan_unroll, barred", [(0, True), (4, True), (1, False), (2, False)])
def test_recomputation_is_barred_from_being_merged_away_outside_a_loop(scan_unroll, barred):
    """Unrolled, both passes stand in one block, and a compiler would compute the layer once."""
    config = dataclasses.replace(TINY, remat="full", num_layers=4, scan_unroll=scan_unroll)
    model = Llama(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda p, t: jnp.sum(model.apply(p, t)[0] ** 3)))
    traced = gradient.trace(shapes, jax.ShapeDtypeStruct((2, 8), jnp.int32))
    found = re.findall(r"prevent_cse=(\w+)", str(traced.jaxpr))
    assert found and set(found) == {str(barred)}


def test_bfloat16_compute_keeps_float32_logits(params, tokens):
    model = Llama(dataclasses.replace(TINY, compute_dtype="bfloat16"))
    hidden, _ = apply(model.config, params, tokens)
    logits = model.logits(params, hidden)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    exact_hidden, _ = apply(TINY, params, tokens)
    exact = Llama(TINY).logits(params, exact_hidden)
    assert np.std(logits - exact) < 0.03 * np.std(exact)


def test_a_cache_refuses_segments(params, tokens):
    cache = KVCache.empty(TINY, 3, 24, jnp.float32)
    with pytest.raises(ValueError, match="one text a row"):
        Llama(TINY).apply(params, tokens, segment_ids=jnp.zeros_like(tokens), cache=cache)
