"""The embedded corpus: what is in it, and that no held-out module shows in training."""

import pytest

from tinyllama_jax.config import SourceConfig
from tinyllama_jax.data import embedded
from tinyllama_jax.data.sources import Tally, list_inputs, read_documents
from tinyllama_jax.data.train_tokenizer import train_tokenizer
from tinyllama_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def corpus():
    """Both parts as (module, document)."""
    found = {}
    for kind in embedded.KINDS:
        source = SourceConfig(path=kind, format="embedded")
        found[kind] = [
            (entry.name, document)
            for entry in list_inputs(source)
            for document in read_documents(source, entry, Tally())
        ]
    return found


def test_it_is_the_library_without_its_tests():
    files = embedded.library_files()
    assert files == sorted(files)
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(files)
    for part in ("test", "tests", "idle_test", "site-packages", "__pycache__"):
        assert not any(part in file.split("/") for file in files)


def test_a_held_out_module_is_in_neither_training_part(corpus):
    held_out = {
        kind: {name for name, document in documents if document.validation}
        for kind, documents in corpus.items()
    }
    trained_on = {
        kind: {name for name, document in documents if not document.validation}
        for kind, documents in corpus.items()
    }
    topics = {"pydoc_data/topics.py"}  # split topic by topic, and not part of the code
    assert topics.isdisjoint(held_out["code"] | trained_on["code"])
    for one in embedded.KINDS:
        for other in embedded.KINDS:
            assert (held_out[one] - topics).isdisjoint(trained_on[other] - topics)
    assert held_out["text"] - topics <= held_out["code"]
    for documents in corpus.values():
        # A few modules are the same comment line, or empty but for one.
        long = [document for _, document in documents if len(document.text) > 200]
        training = {document.text for document in long if not document.validation}
        assert training.isdisjoint(document.text for document in long if document.validation)


@pytest.mark.parametrize("kind", embedded.KINDS)
def test_the_held_out_share(corpus, kind):
    chars = [0, 0]
    for _, document in corpus[kind]:
        chars[document.validation] += len(document.text)
    assert 0.02 < chars[1] / sum(chars) < 0.07
    assert chars[0] > {"code": 5_000_000, "text": 1_000_000}[kind]


def test_text_is_docstrings_and_topics(corpus):
    documents = {}
    for name, document in corpus["text"]:
        documents.setdefault(name, []).append(document.text)
    (abc,) = documents["abc.py"]
    assert abc.startswith("Abstract Base Classes (ABCs) according to PEP 3119.\n\n")
    assert "import" not in abc.split()[0]
    assert len(documents["pydoc_data/topics.py"]) > 50


def test_docstrings_are_in_the_order_they_stand(monkeypatch):
    source = '''"""Module."""
if True:
    class A:
        """Class."""
        def f(self):
            """Method.

            More.
            """
else:
    async def g():
        """Other."""
try:
    pass
except ValueError:
    def h():
        """Handler."""
def empty():
    ""
match 1:
    case 1:
        def k(): "Case."
'''
    monkeypatch.setattr(embedded, "read_module", lambda file: source)
    (document,) = embedded.documents("text", "made_up.py")
    assert document.text == (
        "Module.\n\nClass.\n\nMethod.\n\nMore.\n\nOther.\n\nHandler.\n\nCase.\n\n"
    )


def test_a_python_without_source_files_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "library_root", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"no \.py files under"):
        embedded.library_files()


def test_training_a_tokenizer_is_deterministic(corpus):
    texts = [document.text for _, document in corpus["text"][:40]]
    first, second = (train_tokenizer(texts, 600) for _ in range(2))
    assert first == second
    tokenizer = Tokenizer.from_bytes(first)
    assert tokenizer.vocab_size == 600
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
    assert len(tokenizer.encode(texts[0])) < 0.7 * len(texts[0])


def test_a_tokenizer_learns_from_lines_of_any_length():
    """A document in one line, as in most JSONL, is longer than what SentencePiece reads."""
    words = ["llama", "alpaca", "vicuna", "guanaco"]
    text = " ".join(words[i % 4] for i in range(4000))
    tokenizer = Tokenizer.from_bytes(train_tokenizer([text, "ü" * 5000], 300))
    assert len(tokenizer.encode("llama alpaca vicuna guanaco")) == 4
    assert len(tokenizer.encode("ü" * 16)) == 2  # a prefix space, and one piece


def test_a_vocabulary_larger_than_the_text_is_refused():
    with pytest.raises(ValueError, match=r"5000 pieces cannot be trained.*smaller vocab_size"):
        train_tokenizer(["a few words only"], 5000)


def test_the_shipped_tokenizer_fits_the_corpus(corpus):
    tokenizer = Tokenizer()
    texts = [document.text for _, document in corpus["text"][:100]]
    tokens = sum(ids.size for ids in tokenizer.encode_batch(texts))
    assert tokens < sum(map(len, texts)) / 3
