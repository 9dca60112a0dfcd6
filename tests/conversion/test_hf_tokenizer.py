"""The exported tokenizer.json against SentencePiece and against llama.cpp's vectors."""

import json
import random

import pytest
from sentencepiece import sentencepiece_model_pb2

from tinyllama_jax.conversion import hf_tokenizer
from tinyllama_jax.text.tokenizer import Tokenizer

# The second file's texts hold literal special tokens, which become their ids in tokenizer.json.
VECTORS = {"ggml-vocab-llama-spm": 47, "ggml-vocab-tinyllama": 12}


def vectors(test_data, name):
    stem = test_data / "tokvec" / f"{name}.gguf"
    texts = stem.with_suffix(".gguf.inp").read_bytes().decode()
    texts = texts.split("\n__ggml_vocab_test__\n")
    ids = stem.with_suffix(".gguf.out").read_text().split("\n")
    assert len(texts) == len(ids) == VECTORS[name]
    return texts, [[int(i) for i in line.split()] for line in ids]


def exported(model_proto):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the [parity] extra")
    return tokenizers.Tokenizer.from_str(json.dumps(hf_tokenizer.tokenizer_json(model_proto)))


@pytest.fixture(scope="module")
def llama2(test_data):
    return Tokenizer(str(test_data / "tokenizer" / "tokenizer.model"))


@pytest.mark.parametrize("name", VECTORS)
def test_llama_cpp_vectors_through_tokenizer_json(test_data, llama2, name):
    tokenizer = exported(llama2.model_proto)
    texts, expected = vectors(test_data, name)
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, repr(text)


@pytest.mark.parametrize("name", VECTORS)
def test_llama_cpp_vectors_through_transformers(test_data, llama2, name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    hf_tokenizer.write(tmp_path, llama2.model_proto, 2048)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts, expected = vectors(test_data, name)
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)
        assert tokenizer.encode(text) == [1, *ids]


def test_transformers_knows_the_special_tokens(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    hf_tokenizer.write(tmp_path, Tokenizer().model_proto, 77)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.model_max_length == 77
    assert tokenizer.decode(tokenizer.encode("  two spaces"), skip_special_tokens=True) == (
        "  two spaces"
    )


def test_same_merges_as_the_published_tokenizer_json(test_data, llama2):
    published = json.loads(
        (test_data / "tokenizer" / "TinyLlama-1.1B-Chat-v1.0" / "tokenizer.json").read_text()
    )
    ours = hf_tokenizer.tokenizer_json(llama2.model_proto)
    merges = {" ".join(pair) for pair in ours["model"].pop("merges")}
    assert merges == set(published["model"].pop("merges"))
    assert ours["model"].pop("ignore_merges") is False  # younger than the published file
    assert ours == published


def hostile_texts(count, seed):
    rng = random.Random(seed)
    alphabet = [chr(c) for c in range(1, 0x250)]
    alphabet += [chr(c) for c in (0x2581, 0x200D, 0xFE0F, 0x1F600, 0x4E2D, 0x301, 0xA0, 0x2028,
                                  0x3000, 0xFFFF, 0xFEFF, 0x10FFFF)]  # fmt: skip
    words = [
        "the",
        "def",
        "return",
        " self",
        "\n    ",
        "Größe",
        "日本",
        "🙂",
        "1234",
        "==",
        "<0x0A>",
    ]
    for _ in range(count):
        yield "".join(rng.choice(alphabet) for _ in range(rng.randrange(60)))
        yield "".join(rng.choice("  \n\t a") for _ in range(rng.randrange(80)))
        yield "".join(rng.choice("ab= -_.01▁") * rng.randrange(40) for _ in range(5))
        yield "".join(rng.choice(words) for _ in range(20))
        yield "".join(
            chr(rng.choice([rng.randrange(32, 0xD800), rng.randrange(0xE000, 0x110000)]))
            for _ in range(20)
        )


def assert_equal_to_sentencepiece(tokenizer, count, seed):
    theirs = exported(tokenizer.model_proto)
    for text in hostile_texts(count, seed):
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, repr(text)
        if tokenizer.unk_id not in ids:  # SentencePiece shows it as " ⁇ ", tokenizers leaves it out
            assert theirs.decode(ids) == tokenizer.decode(ids), repr(text)


def test_hostile_texts_with_the_shipped_model():
    assert_equal_to_sentencepiece(Tokenizer(), 300, seed=0)


@pytest.mark.slow
def test_hostile_texts_with_llama2(llama2):
    assert_equal_to_sentencepiece(llama2, 4000, seed=1)


def proto():
    return sentencepiece_model_pb2.ModelProto.FromString(Tokenizer().model_proto)


def test_model_without_byte_fallback_or_dummy_prefix():
    model = proto()
    kept = [piece for piece in model.pieces if piece.type != 6]
    del model.pieces[:]
    model.pieces.extend(kept)
    model.trainer_spec.byte_fallback = False
    model.normalizer_spec.add_dummy_prefix = False
    assert_equal_to_sentencepiece(Tokenizer.from_bytes(model.SerializeToString()), 100, seed=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.trainer_spec, "model_type", 1), "not a BPE model"),
        (lambda m: setattr(m.normalizer_spec, "remove_extra_whitespaces", True), "repeated spaces"),
        (lambda m: setattr(m.normalizer_spec, "precompiled_charsmap", b"x"), "normalises"),
        (lambda m: setattr(m.pieces[300], "type", 4), "user-defined pieces"),
        (lambda m: setattr(m.pieces[300], "type", 5), "unused pieces"),
    ],
)
def test_what_tokenizer_json_could_not_reproduce_is_refused(change, message):
    model = proto()
    change(model)
    with pytest.raises(ValueError, match=message):
        hf_tokenizer.tokenizer_json(model.SerializeToString())
