"""The tokenizer gives llama.cpp's ids, keeps control tokens out of text, and decodes as it goes."""

import pickle
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama_jax.text.tokenizer import Tokenizer

SEPARATOR = "\n__ggml_vocab_test__\n"


SHIPPED = Tokenizer()  # hypothesis does not mix with fixtures


@pytest.fixture(scope="module")
def shipped():
    return SHIPPED


@pytest.fixture(scope="module")
def llama(test_data):
    return Tokenizer(str(test_data / "tokenizer" / "tokenizer.model"))


@pytest.fixture(scope="module", params=["shipped", "llama"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_llama_cpp_vectors(llama, test_data):
    base = test_data / "tokvec" / "ggml-vocab-llama-spm.gguf"
    with open(f"{base}.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split(SEPARATOR)
    with open(f"{base}.out", encoding="utf-8") as file:
        expected = [[int(i) for i in line.split()] for line in file.read().split("\n")]
    assert len(texts) == len(expected) == 47
    assert [llama.encode(text) for text in texts] == expected
    assert [ids.tolist() for ids in llama.encode_batch(texts)] == expected


def test_the_shipped_model_has_llamas_settings(shipped, llama):
    from sentencepiece import sentencepiece_model_pb2

    ours, theirs = (
        sentencepiece_model_pb2.ModelProto.FromString(t.model_proto) for t in (shipped, llama)
    )
    about_the_training_run = {
        "input", "input_format", "model_prefix", "vocab_size", "input_sentence_size", "num_threads",
    }  # fmt: skip
    for section in ("trainer_spec", "normalizer_spec"):
        for field in getattr(ours, section).DESCRIPTOR.fields:
            if field.name not in about_the_training_run:
                our_value = getattr(getattr(ours, section), field.name)
                assert our_value == getattr(getattr(theirs, section), field.name), field.name
    assert [(p.piece, p.type) for p in ours.pieces[:259]] == [
        (p.piece, p.type) for p in theirs.pieces[:259]
    ]
    assert not ours.trainer_spec.input  # no path of the machine it was trained on


def test_special_ids_and_size(shipped):
    assert shipped.vocab_size == 4096
    assert (shipped.unk_id, shipped.bos_id, shipped.eos_id) == (0, 1, 2)
    assert len(shipped.sha256) == 64


@pytest.mark.parametrize(
    "text", ["<s>", "</s>", "<unk>", "a</s>b", "<s></s>\n<unk> </s>", "<0x41>"]
)
def test_text_that_looks_like_a_control_token_stays_text(tokenizer, text):
    ids = tokenizer.encode(text)
    control = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id}
    assert control.isdisjoint(ids)
    assert tokenizer.encode_batch([text])[0].tolist() == ids
    assert tokenizer.decode(ids) == text


MIXED_TEXT = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            [" ", "  ", "\n", "\n\n", "\t", "\r\n", " \n ", "def", " the", "\u2581", "\u2581\u2581",
             "12345", "½", "🦙", "é", "</s>", "    return", "日本語", "\0", "\u3000", "\x85"]
        ),
    ),
    max_size=30,
).map("".join)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(MIXED_TEXT, max_size=4))
def test_the_fast_batch_gives_sentencepieces_ids(texts):
    tokenizer = SHIPPED
    assert tokenizer._segments is not None  # else this test compares a thing with itself
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [
        tokenizer.encode(text) for text in texts
    ]


def hostile_texts(seed, count):
    """Strings of what tokenizers stumble over, and of anything at all that is Unicode."""
    random = np.random.default_rng(seed)
    parts = [
        " ", "  ", " " * 17, "\n", "\n\n\n", "\t", "\r\n", " \n ", "\u2581", "\u2581\u2581", "</s>",
        "<s>", "<unk>", "<0x0A>", "\0", "\u3000", "\x85", "\u00a0", "\u200b", "\ufeff", "\ufffd",
        "e\u0301", "🦙", "👩\u200d👩\u200d👧", "½", "日本語", "مرحبا", "def", " the", "the", "The",
        "    return", "0123456789", "...", "''", "->", "http://", "a" * 40, "\U0010ffff", "\ue000",
    ]  # fmt: skip
    for _ in range(count):
        chosen = [parts[n] for n in random.integers(0, len(parts), random.integers(0, 9))]
        points = random.integers(1, 0x110000, random.integers(0, 6))
        chosen += [chr(point) for point in points if not 0xD800 <= point < 0xE000]
        yield "".join(chosen[n] for n in random.permutation(len(chosen)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shipped", "llama"])
def test_the_fast_batch_on_100000_hostile_texts(request, name):
    tokenizer = request.getfixturevalue(name)
    assert tokenizer._segments is not None
    texts = list(hostile_texts(0, 100_000))
    for start in range(0, len(texts), 1000):
        part = texts[start : start + 1000]
        for text, ids in zip(part, tokenizer.encode_batch(part), strict=True):
            assert ids.tolist() == tokenizer.encode(text), repr(text)


def test_the_fast_batch_on_real_text(llama, test_data):
    assert llama._segments is not None
    text = (test_data / "text" / "wikitext-2" / "valid.txt").read_text(encoding="utf-8")
    (ids,) = llama.encode_batch([text])  # many slices long
    assert ids.dtype == np.int32
    assert ids.tolist() == llama.encode(text)
    assert llama.decode(ids) == text


def test_the_fast_batch_forgets_segments_when_there_are_too_many(shipped, monkeypatch):
    from tinyllama_jax.text import segments

    monkeypatch.setattr(segments, "_CACHE_BYTES", 5000)
    monkeypatch.setattr(segments, "_SLICE_CHARS", 100)
    tokenizer = Tokenizer.from_bytes(shipped.model_proto)
    choice = random.Random(0)
    text = " ".join(f"word{choice.randrange(300)}" for _ in range(2000))
    assert tokenizer.encode_batch([text, "", text])[2].tolist() == shipped.encode(text)
    assert tokenizer._segments._cached_bytes < 10_000
    words = [f"word{number}" for number in range(60)]
    for number in range(3000):  # never anything new, but again and again from the older ones
        tokenizer.encode_batch([words[number % 60]])
        held = tokenizer._segments._ids.keys() | tokenizer._segments._older.keys()
        assert len(held) < 120


@pytest.mark.parametrize("first", ["a", "\u4e00"])
def test_the_memory_of_the_fast_batch_is_bounded(first):
    """Ever new words, short and of two-byte characters too, cost what the bound says."""
    program = f"""
        import random
        from tinyllama_jax.text import segments
        from tinyllama_jax.text.tokenizer import Tokenizer
        def megabytes():
            status = open("/proc/self/status").read()
            return int(status.split("VmRSS:")[1].split()[0]) // 1024
        segments._CACHE_BYTES = 20_000_000
        tokenizer, choice = Tokenizer(), random.Random(0)
        tokenizer.encode_batch(["a"])
        letters = [chr({ord(first)} + n) for n in range(26)]
        before = megabytes()
        for _ in range(60):
            words = ("".join(choice.choices(letters, k=5)) for _ in range(10_000))
            tokenizer.encode_batch([" ".join(words)])
        print(megabytes() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 10 < int(done.stdout) < 70  # two generations of 20 MB, and what one batch takes


@pytest.mark.parametrize("kind", ["NORMAL", "USER_DEFINED", "UNUSED"])
@pytest.mark.parametrize("piece", ["of\u2581the", "\nof"])
def test_a_model_whose_pieces_span_spaces_is_encoded_whole(shipped, piece, kind):
    from sentencepiece import sentencepiece_model_pb2

    spec = sentencepiece_model_pb2.ModelProto.FromString(shipped.model_proto)
    kind = getattr(sentencepiece_model_pb2.ModelProto.SentencePiece, kind)
    spec.pieces.add(piece=piece, score=1.0, type=kind)
    tokenizer = Tokenizer.from_bytes(spec.SerializeToString())
    assert tokenizer._segments is None
    assert tokenizer.encode_batch(["one of the"])[0].tolist() == tokenizer.encode("one of the")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(data):
    tokenizer = SHIPPED
    byte_ids = st.integers(3, 258)
    real = st.sampled_from(tokenizer.encode("🦙 日本 héllo ½ \u00ad"))
    anything = st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(st.one_of(byte_ids, real, anything), max_size=24))
    decoder = tokenizer.stream_decoder()
    parts = [decoder.add(token_id) for token_id in ids]
    assert "".join(parts) + decoder.finish() == tokenizer.decode(ids)


def test_a_character_is_streamed_when_it_is_whole(tokenizer):
    ids = tokenizer.encode("a🦙b")
    assert len(ids) > 4  # the emoji is spread over byte pieces
    decoder = tokenizer.stream_decoder()
    parts = [decoder.add(token_id) for token_id in ids]
    assert "".join(parts) == "a🦙b"
    assert "🦙" in parts and not any("\ufffd" in part for part in parts)


def test_real_text_streams_unbroken(tokenizer, test_data):
    text = (test_data / "text" / "tinystories_2MB.txt").read_text(encoding="utf-8")[:50_000]
    decoder = tokenizer.stream_decoder()
    streamed = "".join([decoder.add(i) for i in tokenizer.encode(text)]) + decoder.finish()
    assert streamed == text


def test_it_travels_to_another_process(shipped):
    copy = pickle.loads(pickle.dumps(shipped))
    assert copy.sha256 == shipped.sha256
    assert copy.encode("def f(x):") == shipped.encode("def f(x):")


def test_ids_of_another_vocabulary_are_refused(shipped):
    for bad in (-1, 4096):
        with pytest.raises(ValueError, match=f"id {bad} is not in the vocabulary of 4096"):
            shipped.decode([5, bad])
        with pytest.raises(ValueError, match=f"id {bad} is not in the vocabulary"):
            shipped.stream_decoder().add(bad)


def test_lone_surrogates_are_no_text(shipped):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        shipped.encode("a\ud800")


def test_a_missing_model_file(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the tokenizer .*absent\.model.*data\.token"):
        Tokenizer(str(tmp_path / "absent.model"))


def test_a_git_lfs_pointer(tmp_path):
    pointer = tmp_path / "tokenizer.model"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:9e55\nsize 499723\n")
    with pytest.raises(ValueError, match=r"Git-LFS pointer.*git lfs pull"):
        Tokenizer(str(pointer))


@pytest.mark.parametrize("content", [b"", b'{"version": "1.0"}', b"\x00" * 100])
def test_a_file_that_is_no_model(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(str(path))


def test_a_truncated_model(tmp_path, shipped):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(shipped.model_proto[:-7])
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(str(path))
