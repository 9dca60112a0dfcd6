"""Every filter against a few lines of NumPy and against transformers, and the draw itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.config import SamplingConfig
from tinyllama_jax.inference import sampling

B, V = 6, 97
KEPT_ALL = SamplingConfig(temperature=1.0, top_k=0)


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 3, (B, V)).astype(np.float32)


def softmax(row):
    e = np.exp(row.astype(np.float64) - row.max())
    return e / e.sum()


def kept(filtered, logits):
    """The ids that a filter left, one set per row, after checking that it left them unchanged."""
    filtered = np.asarray(filtered)
    left = np.isfinite(filtered)
    np.testing.assert_array_equal(filtered[left], logits[left])
    assert (filtered[~left] == -np.inf).all()
    return [set(np.flatnonzero(row)) for row in left]


@pytest.mark.parametrize("k", [1, 2, 50, V, V + 10])
def test_top_k(logits, k):
    expected = [set(np.argsort(-row)[:k]) for row in logits]
    assert kept(sampling.keep_top_k(logits, k), logits) == expected


def test_top_k_keeps_ties():
    logits = np.array([[1.0, 2, 2, 2, 0]], np.float32)
    assert kept(sampling.keep_top_k(logits, 2), logits) == [{1, 2, 3}]


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p(logits, p):
    expected = []
    for row in logits:
        probabilities, chosen, total = softmax(row), set(), 0.0
        for i in np.argsort(-row):
            if total >= p and chosen:
                break
            chosen.add(i)
            total += probabilities[i]
        expected.append(chosen)
    assert kept(sampling.keep_top_p(logits, p), logits) == expected


@pytest.mark.parametrize("min_p", [1e-4, 0.1, 0.5, 1.0])
def test_min_p(logits, min_p):
    expected = [
        set(np.flatnonzero(softmax(row) >= min_p * softmax(row).max() * (1 - 1e-9)))
        for row in logits
    ]
    assert kept(sampling.keep_min_p(logits, min_p), logits) == expected


def test_repetition_penalty(logits):
    seen = np.random.default_rng(1).random((B, V)) < 0.3
    expected = logits.copy()
    for b, v in np.argwhere(seen):
        expected[b, v] = expected[b, v] / 1.3 if expected[b, v] > 0 else expected[b, v] * 1.3
    found = sampling.penalize_repetition(logits, seen, 1.3)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_filters_against_transformers(logits):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    theirs = pytest.importorskip(
        "transformers.generation.logits_process", reason="needs the [parity] extra"
    )
    ids = np.random.default_rng(2).integers(0, V, (B, 20))
    seen = np.zeros((B, V), bool)
    seen[np.arange(B)[:, None], ids] = True
    pairs = [
        (theirs.TopKLogitsWarper(5), lambda x: sampling.keep_top_k(x, 5)),
        (theirs.TopPLogitsWarper(0.8), lambda x: sampling.keep_top_p(x, 0.8)),
        (theirs.TopPLogitsWarper(0.05), lambda x: sampling.keep_top_p(x, 0.05)),
        (theirs.MinPLogitsWarper(0.05), lambda x: sampling.keep_min_p(x, 0.05)),
        (
            theirs.RepetitionPenaltyLogitsProcessor(1.7),
            lambda x: sampling.penalize_repetition(x, seen, 1.7),
        ),
    ]
    for warper, ours in pairs:
        expected = warper(torch.from_numpy(ids), torch.from_numpy(logits.copy())).numpy()
        np.testing.assert_allclose(ours(logits), expected, rtol=1e-6, err_msg=str(warper))


def draws(logits, settings, count=20000, seen=None):
    """How often each id is drawn from the one row of logits `(1, V)`."""
    many = np.repeat(logits, count, axis=0)
    keys = jnp.repeat(sampling.row_keys([0]), count)
    drawn = sampling.sample(many, settings, keys, jnp.arange(count), seen)
    return np.bincount(drawn, minlength=logits.shape[1]) / count


def test_draws_follow_the_distribution_of_all_filters_in_order():
    logits = np.array([[3.0, 2.5, 2.0, 1.0, 0.0, -1.0]], np.float32)
    settings = SamplingConfig(
        temperature=0.7, top_k=5, top_p=0.97, min_p=0.15, repetition_penalty=1.2
    )
    seen = np.array([[True, False, False, False, False, True]])
    row = logits[0].astype(np.float64)
    row[0], row[5] = row[0] / 1.2, row[5] * 1.2
    probabilities = softmax(row / 0.7)
    probabilities[5] = 0  # top-k
    probabilities[4] = 0  # top-p: 0, 1, 2 and 3 already have more than 0.97 of what top-k left
    probabilities[probabilities < 0.15 * probabilities.max()] = 0  # min-p: 3 goes too
    assert (probabilities > 0).tolist() == [True, True, True, False, False, False]
    frequencies = draws(logits, settings, seen=seen)
    np.testing.assert_allclose(frequencies, probabilities / probabilities.sum(), atol=0.015)


def test_temperature_zero_is_greedy(logits):
    settings = SamplingConfig(temperature=0.0, top_k=3)
    keys = sampling.row_keys(range(B))
    found = sampling.sample(logits, settings, keys, jnp.zeros(B, int))
    np.testing.assert_array_equal(found, logits.argmax(axis=1))


def test_a_row_draws_the_same_in_any_batch(logits):
    index = jnp.arange(B)
    together = sampling.sample(logits, KEPT_ALL, sampling.row_keys(range(10, 10 + B)), index)
    for b in range(B):
        alone = sampling.sample(
            logits[b : b + 1], KEPT_ALL, sampling.row_keys([10 + b]), index[b : b + 1]
        )
        assert alone[0] == together[b]


def test_draws_differ_by_seed_and_by_index():
    logits = np.zeros((64, V), np.float32)
    zeros, steps = jnp.zeros(64, int), jnp.arange(64)
    by_seed = sampling.sample(logits, KEPT_ALL, sampling.row_keys(range(64)), zeros)
    by_index = sampling.sample(logits, KEPT_ALL, sampling.row_keys([0] * 64), steps)
    assert len(set(by_seed.tolist())) > 30
    assert len(set(by_index.tolist())) > 30


def test_settings_out_of_range_are_told_at_once():
    with pytest.raises(ValueError, match=r"temperature = -1.*top_p = 0"):
        sampling.check(SamplingConfig(temperature=-1.0, top_p=0.0))
    sampling.check(SamplingConfig())
