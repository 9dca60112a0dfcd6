"""A source in subsets: routed to a stream each, weighed by tokens or by hand, chosen by name."""

import io
import json
import shutil

import numpy as np
import pytest
import zstandard

from tinyllama_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, SourceConfig
from tinyllama_jax.config_rules import validate
from tinyllama_jax.config_text import chosen_subsets, named_weights
from tinyllama_jax.data.corpus import open_datasets
from tinyllama_jax.data.mixture import divided
from tinyllama_jax.data.prepare import prepare_sources
from tinyllama_jax.data.prepared import is_prepared
from tinyllama_jax.data.sources import Tally, list_inputs, read_documents
from tinyllama_jax.data.stream import Stream
from tinyllama_jax.text.tokenizer import Tokenizer

S = 16
SETS = ("RedPajamaC4", "RedPajamaBook", "RedPajamaGithub")
KEY = "meta.redpajama_set_name"


def document(number):
    """The text and the subset of a document; one of four is a book's, one of four is GitHub's."""
    subset = SETS[(0, 1, 0, 2)[number % 4]]
    return f"{subset} number {number} " + "word " * (number % 7 * 5), subset


@pytest.fixture(scope="module")
def slim_pajama(tmp_path_factory):
    """Three files in SlimPajama's shape, 240 documents."""
    root = tmp_path_factory.mktemp("SlimPajama") / "train"
    for part in range(3):
        file = root / f"chunk{part + 1}/example_train_{part}.jsonl.zst"
        file.parent.mkdir(parents=True)
        lines = []
        for number in range(80 * part, 80 * (part + 1)):
            text, subset = document(number)
            lines.append(json.dumps({"text": text, "meta": {"redpajama_set_name": subset}}))
        file.write_bytes(zstandard.compress("\n".join(lines).encode()))
    return root


@pytest.fixture(scope="module")
def starcoder(tmp_path_factory):
    """A directory of parquet per language, in Starcoderdata's columns."""
    import pyarrow
    import pyarrow.parquet

    root = tmp_path_factory.mktemp("starcoderdata")
    for language, count in (("python", 60), ("c-sharp", 30), ("agda", 3)):
        (root / language).mkdir()
        table = pyarrow.table(
            {
                "max_stars_repo_name": ["someone/something"] * count,
                "content": [f"<reponame>{language} {n}</s> " + "x = 1\n" * 5 for n in range(count)],
                "id": [str(n) for n in range(count)],
            }
        )
        pyarrow.parquet.write_table(table, root / language / "train-00000-of-00001.parquet")
    (root / "README.md").write_text("as at its root on the Hub")
    return root


def of_slim_pajama(path, **settings):
    return SourceConfig(
        name="slimpajama", path=str(path), subset_key=KEY, validation_fraction=0.2, **settings
    )


def prepared(source, tmp_path, **settings):
    return prepare_sources(
        DataConfig(sources=(source,), prepared=str(tmp_path), **settings), workers=1
    )


def opened(sources, tmp_path, **settings):
    data = DataConfig(sources=sources, prepared=str(tmp_path), seq_len=S)
    model = ModelConfig(vocab_size=4096, max_seq_len=S)
    config = Config(data=data, model=model, **settings)
    return open_datasets(config, prepare_sources(data, workers=1), Tokenizer().sha256)


def texts_of(directory, split):
    stream = Stream(directory / split)
    ids = stream.read(0, stream.num_tokens)
    ends = np.flatnonzero(ids == 2)
    return [Tokenizer().decode(part) for part in np.split(ids, ends + 1)[:-1]]


# --- routing


def test_each_subset_holds_its_documents_and_no_others(slim_pajama, tmp_path):
    directories = prepared(of_slim_pajama(slim_pajama, subsets="-RedPajamaGithub"), tmp_path)
    assert list(directories) == ["slimpajama.RedPajamaBook", "slimpajama.RedPajamaC4"]
    for name, directory in directories.items():
        subset = name.removeprefix("slimpajama.")
        assert directory.name == subset
        expected = [text for text, of in map(document, range(240)) if of == subset]
        train, held_out = texts_of(directory, "train"), texts_of(directory, "validation")
        assert train and held_out and sorted(train + held_out) == sorted(expected)
        assert train == [text for text in expected if text in set(train)]  # in their order
        assert Stream(directory / "train").manifest.source == name


def test_what_is_left_out_is_counted_and_what_is_not_there_told(slim_pajama, tmp_path, capsys):
    prepared(of_slim_pajama(slim_pajama, subsets="-RedPajamaGithub,-RedpajamaBook"), tmp_path)
    printed = capsys.readouterr().out
    assert "slimpajama: skipped 60 documents of the subset RedPajamaGithub" in printed
    assert (
        "warning: data.sources.slimpajama.subsets names RedpajamaBook, to which no document "
        "belongs; there are RedPajamaBook, RedPajamaC4" in printed
    )


def test_directories_are_subsets(starcoder, tmp_path):
    source = SourceConfig(
        name="starcoder",
        path=str(starcoder),
        text_key="content",
        subset_key="directory",
        format="parquet",
    )
    directories = prepared(source, tmp_path)
    assert list(directories) == ["starcoder.agda", "starcoder.c-sharp", "starcoder.python"]
    # Markers of the data set, and what looks like a control token, are text.
    assert texts_of(directories["starcoder.agda"], "train")[0].startswith("<reponame>agda 0</s> x")
    chosen = SourceConfig(**{**vars(source), "subsets": "python,agda"})
    assert [entry.name.split("/")[0] for entry in list_inputs(chosen)] == ["agda", "python"]
    with pytest.raises(ValueError, match=r"names rust, but .* has the directories agda, c-sharp"):
        list_inputs(SourceConfig(**{**vars(source), "subsets": "-rust"}))
    with pytest.raises(ValueError, match="lies in no directory below"):
        list_inputs(SourceConfig(**{**vars(source), "path": str(starcoder / "agda")}))


@pytest.mark.parametrize(
    "record, told",
    [
        (
            {"text": "a", "meta": {}},
            r'under subset_key "meta.redpajama_set_name", but None',
        ),
        ({"text": "a"}, r"part.jsonl:2 has no text under subset_key"),
        ({"text": "a", "meta": {"redpajama_set_name": 3}}, "but 3"),
        ({"text": "a", "meta": {"redpajama_set_name": "../x"}}, "cannot name a directory"),
        ({"text": "a", "meta": {"redpajama_set_name": ""}}, "cannot name a directory"),
    ],
)
def test_a_record_of_no_subset_ends_it(tmp_path, record, told):
    good = {"text": "a", "meta": {"redpajama_set_name": "C4"}}
    path = tmp_path / "part.jsonl"
    path.write_text(f"{json.dumps(good)}\n{json.dumps(record)}\n")
    source = of_slim_pajama(path)
    with pytest.raises(ValueError, match=told):
        list(read_documents(source, list_inputs(source)[0], Tally()))


def test_a_lost_shard_of_a_subset_is_written_again(slim_pajama, tmp_path):
    source = of_slim_pajama(slim_pajama)
    directories = prepared(source, tmp_path)
    directory = directories["slimpajama.RedPajamaC4"].parent
    assert is_prepared(source, directory)
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    (directory / "RedPajamaBook/train/00000.arrayrecord").unlink()
    assert not is_prepared(source, directory)
    assert prepared(source, tmp_path) == directories
    assert {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == before
    told = (directory / "subsets.json").read_text()
    for damaged in ("{", told.replace('"RedPajamaBook",', "")):
        (directory / "subsets.json").write_text(damaged)
        assert not is_prepared(source, directory)


def test_it_is_found_where_the_raw_text_is_not(slim_pajama, tmp_path):
    raw = tmp_path / "raw"
    shutil.copytree(slim_pajama, raw)
    directories = prepared(of_slim_pajama(raw), tmp_path / "prepared")
    shutil.rmtree(raw)
    assert prepared(of_slim_pajama(raw), tmp_path / "prepared") == directories
    with pytest.raises(ValueError, match="does not exist"):
        prepared(of_slim_pajama(raw, subsets="-RedPajamaGithub"), tmp_path / "prepared")


# --- weights


def shares_of(training):
    """Millionths by stream."""
    (change,) = training.order.changes
    return {name: round(1e6 * share) for name, share in training.order.shares(change).items()}


def test_subsets_are_weighed_by_their_tokens_within_their_source(slim_pajama, starcoder, tmp_path):
    slim = of_slim_pajama(slim_pajama, weight=0.693584)
    code = SourceConfig(
        name="starcoder", path=str(starcoder), text_key="content", subset_key="directory",
        format="parquet",
        weight=0.306416, validation_fraction=0.2,
    )  # fmt: skip
    datasets = opened((slim, code), tmp_path, evaluation=EvaluationConfig(tokens=100 * S))
    windows = datasets.training.windows
    shares = shares_of(datasets.training)
    for source, millionths in (("slimpajama", 693_584), ("starcoder", 306_416)):
        of = {name: share for name, share in shares.items() if name.startswith(f"{source}.")}
        assert sum(of.values()) == millionths
        tokens = {name: windows[name].stream.num_tokens for name in of}
        for name, share in of.items():
            assert abs(share - millionths * tokens[name] / sum(tokens.values())) < 1
            if name == "starcoder.agda":  # its three documents are all for training
                assert name not in datasets.validation
                continue
            # Held-out text is weighed alike, and what is evaluated of a source is shared out.
            assert datasets.validation[name].weight == share
            enough = -(-100 * share // millionths)
            assert 0 < datasets.validation[name].num_rows <= enough


def test_weights_by_hand(slim_pajama, tmp_path):
    weights = "RedPajamaC4:1,RedPajamaBook:3"
    source = of_slim_pajama(slim_pajama, subsets="-RedPajamaGithub", subset_weights=weights)
    training = opened((source,), tmp_path).training
    assert list(shares_of(training).values()) == [750_000, 250_000]
    assert "slimpajama.RedPajamaBook: " in training.describe(10)
    with pytest.raises(ValueError, match=r"gives weights to slimpajama\.RedPajamaC4, but"):
        source = of_slim_pajama(slim_pajama, subset_weights="RedPajamaC4:1")
        opened((source,), tmp_path)


def test_a_subset_of_less_than_a_window_is_told(tmp_path, capsys):
    raw = io.StringIO()
    for number in range(40):
        subset = "tiny" if number == 7 else "C4"
        text = "a" if number == 7 else f"some longer text {number} " * 4
        raw.write(json.dumps({"text": text, "meta": {"redpajama_set_name": subset}}) + "\n")
    (tmp_path / "raw.jsonl").write_text(raw.getvalue())
    datasets = opened((of_slim_pajama(tmp_path / "raw.jsonl"),), tmp_path / "prepared")
    assert list(datasets.training.windows) == ["slimpajama.C4"]
    assert "left out, being less than a window: slimpajama.tiny (" in capsys.readouterr().out


def test_shares_are_divided_exactly_and_none_is_lost():
    assert divided(1000, [3, 1]) == (750, 250)
    assert divided(1000, [10**9, 1, 1]) == (998, 1, 1)
    assert divided(3, [5, 1, 1]) == (1, 1, 1)
    random = np.random.default_rng(0)
    for _ in range(50):
        weights = random.integers(1, 10**12, 86).tolist()
        parts = divided(306_416, weights)
        assert sum(parts) == 306_416 and min(parts) >= 1
        for part, weight in zip(parts, weights, strict=True):
            assert abs(part - 306_416 * weight / sum(weights)) <= 1
    with pytest.raises(ValueError, match="3 subsets cannot share 2 millionths"):
        divided(2, [1, 1, 1])


# --- settings


def test_what_is_chosen():
    assert chosen_subsets("") == (frozenset(), True)
    assert chosen_subsets("a, b") == (frozenset({"a", "b"}), False)
    assert chosen_subsets("-a,-b") == (frozenset({"a", "b"}), True)
    assert named_weights("a:2,b:0.5") == {"a": 2.0, "b": 0.5}


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"subsets": "a,-b", "subset_key": "k"}, '"a,-b" must name the subsets that are taken'),
        ({"subsets": "a,,b", "subset_key": "k"}, "must name the subsets"),
        ({"subsets": "a"}, "subset_key is empty: nothing tells the subsets apart"),
        ({"subset_weights": "a:0", "subset_key": "k"}, '"a:0" is not NAME:WEIGHT'),
        ({"subset_weights": "a", "subset_key": "k"}, '"a" is not NAME:WEIGHT'),
    ],
)
def test_settings_that_say_nothing_clear(settings, told):
    source = SourceConfig(name="books", path="x", **settings)
    with pytest.raises(ValueError, match=told):
        validate(Config(data=DataConfig(sources=(source,))))
