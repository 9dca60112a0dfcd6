"""A real trained model, imported, against another implementation's logits and text."""

import struct

import jax
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

import tinyllama_jax
from tinyllama_jax import convert, generate
from tinyllama_jax.config import SamplingConfig
from tinyllama_jax.inference.engine import Engine
from tinyllama_jax.text.tokenizer import Tokenizer

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=200)


def tokenizer_of(path):
    """llama2.c's tokenizer file as a SentencePiece model."""
    content, offset = path.read_bytes(), 4
    model = sentencepiece_model_pb2.ModelProto()
    kinds = model.SentencePiece
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    while offset < len(content):
        score, length = struct.unpack_from("<fi", content, offset)
        text = content[offset + 8 : offset + 8 + length].decode()
        offset += 8 + length
        i = len(model.pieces)
        kind = kinds.UNKNOWN if i == 0 else kinds.CONTROL if i < 3 else kinds.BYTE
        if i > 258:
            kind = kinds.NORMAL
        model.pieces.add(piece=text.strip("\n").replace(" ", "▁"), score=score, type=kind)
    return Tokenizer.from_bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def stories(test_data, tmp_path_factory):
    """The model as `from-hf` makes a run of it, its tokenizer put beside it as the door says."""
    run = tmp_path_factory.mktemp("stories") / "run"
    source = test_data / "model" / "stories260K"
    convert.main(["from-hf", str(source / "hf_untied"), "--out", str(run)])
    assert tinyllama_jax.load(run).tokenizer is None
    (run / "tokenizer.model").write_bytes(tokenizer_of(source / "tok512.bin").model_proto)
    return run


@pytest.fixture(scope="module")
def loaded(stories):
    return tinyllama_jax.load(stories)


@pytest.fixture(scope="module")
def expected_text(test_data):
    return (test_data / "model" / "stories260K" / "expected_stdout_200.txt").read_text().rstrip()


def test_logits(loaded, test_data):
    reference = np.load(test_data / "refnum" / "stories260K" / "logits_4x128.npz")
    hidden, _ = loaded.model.apply(loaded.params, reference["input_ids"])
    logits = np.asarray(loaded.model.logits(loaded.params, hidden))
    assert np.abs(logits - reference["logits_hf_fp32"]).max() < 1e-4


def test_greedy_text_alone_and_in_a_batch(loaded, expected_text):
    engine = Engine(loaded.model, loaded.params, loaded.tokenizer, loaded.start_id, loaded.end_ids)
    (alone,) = engine.generate([[1]], GREEDY)
    assert (alone.text, len(alone.tokens), alone.finish) == (expected_text, 200, "length")
    batch = engine.generate(["", "Tom and his dog went to the park.", "She said", ""], GREEDY)
    assert batch[0] == batch[3] == alone


def test_greedy_text_without_the_cache(loaded, expected_text):
    def next_token(params, tokens, length):
        hidden, _ = loaded.model.apply(params, tokens)
        return loaded.model.logits(params, hidden[0, length - 1]).argmax()

    step = jax.jit(next_token)
    tokens = np.zeros((1, 201), np.int32)
    tokens[0, 0] = 1
    for length in range(1, 201):
        tokens[0, length] = step(loaded.params, tokens, length)
    assert loaded.tokenizer.decode(tokens[0]) == expected_text


def test_generate_door_prints_the_same_text(stories, expected_text, capsys):
    arguments = [str(stories), "--temperature", "0", "--max-new-tokens", "200", "--prompt", ""]
    generate.main(arguments)
    printed = capsys.readouterr().out
    assert printed.startswith(expected_text)
    assert "200 tokens" in printed and "tokens/s" in printed
    assert f"next: python -m tinyllama_jax.generate {stories}" in printed
