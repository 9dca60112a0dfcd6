"""Generation on a small random model: batches, limits, ends, streams."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tinyllama_jax.config import ModelConfig, SamplingConfig
from tinyllama_jax.inference.engine import Engine
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.text.tokenizer import Tokenizer

CONFIG = ModelConfig(
    vocab_size=4096, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48,
    max_seq_len=100, compute_dtype="float32",
)  # fmt: skip
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=21)
SAMPLED = SamplingConfig(
    temperature=1.5, top_k=40, top_p=0.95, repetition_penalty=1.1, max_new_tokens=21, seed=5
)
PROMPTS = [[1], [1, 7, 300, 12, 9], list(range(1, 12)), [1, 77, 77]]


@pytest.fixture(scope="module")
def engine():
    model = Llama(CONFIG)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    return Engine(model, params, Tokenizer(), start_id=1, eos_ids=())


@functools.partial(jax.jit, static_argnames="model")
def likeliest_next(model, params, tokens, length):
    hidden, _ = model.apply(params, tokens)
    return model.logits(params, hidden[0, length - 1]).argmax()


def greedy_without_cache(engine, prompt, count):
    """Runs the whole text through the model for each token."""
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, CONFIG.max_seq_len), np.int32)  # what follows a token cannot reach it
        padded[0, : len(tokens)] = tokens
        tokens.append(int(likeliest_next(engine.model, engine.params, padded, len(tokens))))
    return tokens[len(prompt) :]


def test_cache_gives_what_the_whole_text_gives(engine):
    found = engine.generate(PROMPTS, GREEDY)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert completion.tokens == greedy_without_cache(engine, prompt, 21)
        assert completion.finish == "length"


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_unequal_prompts_give_together_what_each_gives_alone(engine, settings):
    together = engine.generate(PROMPTS, settings)
    for row, prompt in enumerate(PROMPTS):
        alone = dataclasses.replace(settings, seed=settings.seed + row)
        assert engine.generate([prompt], alone) == [together[row]]


def test_seeds_alone_decide_a_sample(engine):
    first, again, other, _ = engine.generate([[1, 5]] * 4, SAMPLED, seeds=[8, 8, 9, 10])
    assert first == again
    assert first.tokens != other.tokens


@pytest.mark.parametrize("count", [1, 8, 9, 10])
def test_exactly_max_new_tokens(engine, count):
    settings = dataclasses.replace(GREEDY, max_new_tokens=count)
    (completion,) = engine.generate([[1, 2, 3]], settings)
    (longer,) = engine.generate([[1, 2, 3]], GREEDY)
    assert completion.tokens == longer.tokens[:count]


def test_full_context_is_usable_and_one_more_is_refused(engine):
    prompt = list(range(1, 95))
    settings = dataclasses.replace(GREEDY, max_new_tokens=6)
    assert engine.fitted(SamplingConfig(prompt=prompt, max_new_tokens=9)).max_new_tokens == 6
    (completion,) = engine.generate([prompt], settings)
    assert completion.tokens == greedy_without_cache(engine, prompt, 6)
    with pytest.raises(ValueError, match=r"context of 100 tokens.*max_new_tokens to 6 or less"):
        engine.stream([prompt], dataclasses.replace(GREEDY, max_new_tokens=7))
    with pytest.raises(ValueError, match="shorten the prompt"):
        engine.stream([[1] * 100], dataclasses.replace(GREEDY, max_new_tokens=1))


def test_ids_without_a_piece_add_no_text(engine):
    """Of a padded vocabulary, or of tokens that were added beside the SentencePiece model."""
    model = Llama(dataclasses.replace(CONFIG, vocab_size=CONFIG.vocab_size + 4096))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)  # each id alike
    padded = Engine(model, params, Tokenizer(), start_id=1)
    settings = SamplingConfig(temperature=1.0, top_k=0, max_new_tokens=90)
    (completion,) = padded.generate([[1, 4100, 300]], settings)
    known = [token for token in completion.tokens if token < CONFIG.vocab_size]
    assert 0 < len(known) < len(completion.tokens)
    assert Tokenizer().decode([300, *known]) == Tokenizer().decode([300]) + completion.text


def test_rows_end_at_eos_each_for_itself(engine):
    free = engine.generate(PROMPTS, SAMPLED)
    eos = free[1].tokens[4]
    ended = dataclasses.replace(engine, eos_ids=(eos,)).generate(PROMPTS, SAMPLED)
    for before, after in zip(free, ended, strict=True):
        if eos in before.tokens:
            assert after.tokens == before.tokens[: before.tokens.index(eos)]
            assert after.finish == "eos"
        else:
            assert after == before
    assert ended[1].finish == "eos" and len(ended[1].tokens) <= 4


def test_stream_joined_is_the_text(engine):
    parts = {row: [] for row in range(len(PROMPTS))}
    completions = {}
    for update in engine.stream(PROMPTS, SAMPLED):
        assert update.row not in completions
        parts[update.row].append(update.text)
        if update.completion is not None:
            completions[update.row] = update.completion
    for row, prompt in enumerate(PROMPTS):
        completion = completions[row]
        assert "".join(parts[row]) == completion.text
        whole = engine.tokenizer.decode(prompt + completion.tokens)
        assert whole == engine.tokenizer.decode(prompt) + completion.text
    assert sum(map(len, parts.values())) == 4 * 21


def test_stop_string_is_found_wherever_tokens_split_it(engine):
    (free,) = engine.generate([[1, 5]], SAMPLED)
    text = free.text
    for start in range(1, len(text) - 6, 5):
        for length in (1, 3, 6):
            stop = text[start : start + length]
            parts = [u.text for u in engine.stream([[1, 5]], SAMPLED, stop=[stop, "never\x00seen"])]
            (completion,) = engine.generate([[1, 5]], SAMPLED, stop=[stop, "never\x00seen"])
            assert completion.finish == "stop"
            assert completion.text == text[: text.index(stop)]
            assert "".join(parts) == completion.text
            assert completion.tokens == free.tokens[: len(completion.tokens)]
            assert stop in engine.tokenizer.decode([1, 5, *completion.tokens])


def test_what_only_begins_like_a_stop_string_is_text(engine):
    (free,) = engine.generate([[1, 5]], SAMPLED)
    stop = free.text[-3:] + "\x00"
    (completion,) = engine.generate([[1, 5]], SAMPLED, stop=[stop])
    assert completion == free


def test_text_prompts_begin_with_the_start_id(engine):
    assert engine.encode("a b") == [1, *Tokenizer().encode("a b")]
    assert dataclasses.replace(engine, start_id=None).encode("a b") == Tokenizer().encode("a b")
    assert engine.generate(["a b"], GREEDY) == engine.generate([engine.encode("a b")], GREEDY)


def test_without_a_tokenizer_ids_work_and_text_is_refused(engine):
    bare = dataclasses.replace(engine, tokenizer=None)
    (completion,) = bare.generate([[1, 5]], GREEDY)
    (with_text,) = engine.generate([[1, 5]], GREEDY)
    assert (completion.tokens, completion.text) == (with_text.tokens, "")
    with pytest.raises(ValueError, match="came without a tokenizer"):
        bare.generate(["text"], GREEDY)
    with pytest.raises(ValueError, match="stop strings need text"):
        bare.generate([[1]], GREEDY, stop=["x"])


@pytest.mark.parametrize(
    ("prompts", "stop", "message"),
    [
        ([], [], "a prompt is empty"),
        ([[1], []], [], "a prompt is empty"),
        ([[4096]], [], "id 4096 of a prompt is outside the model's vocabulary of 4096"),
        ([[1]], [""], "a stop string is empty"),
    ],
)
def test_prompts_that_cannot_be_continued(engine, prompts, stop, message):
    with pytest.raises(ValueError, match=message):
        engine.stream(prompts, GREEDY, stop=stop)
