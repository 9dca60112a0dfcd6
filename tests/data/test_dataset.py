"""The data order is a function, covers everything once an epoch, and stops at damage."""

import dataclasses
import hashlib

import numpy as np
import pytest

from tinyllama_jax.config import Config, DataConfig, EvaluationConfig, SourceConfig, TrainingConfig
from tinyllama_jax.data import read_ahead
from tinyllama_jax.data.corpus import open_datasets
from tinyllama_jax.data.dataset import TrainingDataset, ValidationDataset
from tinyllama_jax.data.order import Change, RowOrder
from tinyllama_jax.data.pages import DamagedDataError
from tinyllama_jax.data.stream import Stream

S, R = 32, 8
TOKENIZER = "a" * 64
WEIGHTS = {"text": 0.7, "code": 0.3}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, write_split, make_documents):
    """Two prepared sources: code of two shards, text of three."""
    root = tmp_path_factory.mktemp("prepared")
    for source, shards in (("code", (9_000, 4_100)), ("text", (8_192, 11_000, 5_001))):
        documents = [make_documents(tokens, tokens) for tokens in shards]
        write_split(root / source / "train", documents, source=source)
        write_split(root / source / "validation", [make_documents(5, 1_001)], source=source)
    return {source: root / source for source in ("text", "code")}


@pytest.fixture
def config():
    sources = tuple(SourceConfig(name, path="x", weight=WEIGHTS[name]) for name in WEIGHTS)
    return dataclasses.replace(
        Config(),
        data=DataConfig(sources=sources, seq_len=S),
        training=TrainingConfig(global_batch_tokens=R * S),
        evaluation=EvaluationConfig(tokens=0),
    )


def make(prepared, *, weights=WEIGHTS, rows=R, seed=0, seq_len=S):
    streams = {source: Stream(prepared[source] / "train") for source in weights}
    return TrainingDataset(streams, order_of(weights, rows), seq_len=seq_len, seed=seed)


def order_of(weights, rows):
    return RowOrder([Change(0, rows, weights)])


def rows_of(dataset, steps):
    return [row for step in range(steps) for row in dataset.rows_at(step)]


# --- the order

GOLDEN_ROWS = [
    ("text", 348),
    ("code", 256),
    ("text", 556),
    ("text", 599),
    ("code", 31),
    ("text", 425),
    ("text", 308),
    ("text", 290),
]
GOLDEN_SHA256 = "7de32ccaccb4996fa7147cdd2112efdebc65117a6ba0d0463de4d7ff7a04b6cf"


def test_the_first_thousand_rows_are_the_golden_ones(prepared):
    """A change of these values changes the data of every run that is resumed."""
    rows = rows_of(make(prepared), 125)
    assert [tuple(row) for row in rows[:8]] == GOLDEN_ROWS
    text = "".join(f"{source} {window}\n" for source, window in rows)
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN_SHA256


def test_the_order_is_the_same_for_any_access_and_any_number_of_hosts(prepared):
    expected = rows_of(make(prepared), 60)
    shuffled = make(prepared)
    by_step = {step: shuffled.rows_at(step) for step in np.random.default_rng(0).permutation(60)}
    assert [row for step in range(60) for row in by_step[step]] == expected
    # Hosts, or smaller batches, see the same rows: row numbers count from the start of the run.
    for rows in (1, 2, 16):
        assert rows_of(make(prepared, rows=rows), 60 * R // rows) == expected
    turned = make(prepared, weights=dict(reversed(WEIGHTS.items())))
    assert rows_of(turned, 60) == expected


def test_batches_are_the_windows_of_their_rows(prepared):
    dataset = make(prepared)
    streams = {source: Stream(prepared[source] / "train") for source in WEIGHTS}
    for step in (0, 3, 1_000, 10**9):
        batch, rows = dataset.batch_at(step), dataset.rows_at(step)
        assert batch.tokens.shape == batch.targets.shape == (R, S)
        assert batch.tokens.dtype == batch.targets.dtype == np.int32
        assert batch.loss_weights.dtype == np.float32
        assert (batch.loss_weights == 1).all()
        for i, (source, window) in enumerate(rows):
            ids = streams[source].read(window * S, S + 1)
            np.testing.assert_array_equal(batch.tokens[i], ids[:-1])
            np.testing.assert_array_equal(batch.targets[i], ids[1:])


def test_an_epoch_has_each_id_but_the_first_as_a_target_once(tmp_path, write_split):
    ids = np.arange(3, 20_003)  # each id is its own place in the stream
    directory = write_split(
        tmp_path / "a" / "train", [[ids[:9_000]], [ids[9_000:]]], vocab_size=100_000
    )
    dataset = TrainingDataset({"a": Stream(directory)}, order_of({"a": 1}, 1), seq_len=S, seed=0)
    windows = dataset.windows["a"]
    covered = len(windows) * S
    assert windows.left_out == 19_999 - covered == 31
    for epoch in range(2):
        steps = range(epoch * len(windows), (epoch + 1) * len(windows))
        batches = [dataset.batch_at(step) for step in steps]
        targets = np.sort(np.concatenate([batch.targets[0] for batch in batches]))
        np.testing.assert_array_equal(targets, ids[1 : 1 + covered])
        inputs = np.sort(np.concatenate([batch.tokens[0] for batch in batches]))
        np.testing.assert_array_equal(inputs, ids[:covered])


def test_each_epoch_is_another_permutation_and_each_source_has_its_own(prepared):
    dataset = make(prepared)
    order = {source: [] for source in WEIGHTS}
    for source, window in rows_of(dataset, 400):
        order[source].append(window)
    epochs = []
    for source, windows in dataset.windows.items():
        count = len(windows)
        assert len(order[source]) >= 2 * count
        for epoch in range(2):
            epochs.append(order[source][epoch * count : (epoch + 1) * count])
            assert sorted(epochs[-1]) == list(range(count))
            assert epochs[-1] != sorted(epochs[-1])
    assert epochs[0] != epochs[1] and epochs[2] != epochs[3]


def test_sources_of_one_size_are_shuffled_differently(tmp_path, write_split, make_documents):
    names = ("one", "two")
    streams = {
        name: Stream(write_split(tmp_path / name / "train", [make_documents(0, 3_300)]))
        for name in names
    }
    order = order_of(dict.fromkeys(names, 1), 206)
    dataset = TrainingDataset(streams, order, seq_len=S, seed=0)
    epoch = {
        name: [row.window for row in dataset.rows_at(0) if row.source == name] for name in names
    }
    assert sorted(epoch["one"]) == sorted(epoch["two"]) == list(range(103))
    assert epoch["one"] != epoch["two"]


def test_the_seed_changes_the_order_within_the_sources_only(prepared):
    first, second = (rows_of(make(prepared, seed=seed), 20) for seed in (0, 1))
    assert [row.source for row in first] == [row.source for row in second]
    assert first != second


def test_weights_are_exact(prepared):
    rows = rows_of(make(prepared), 125)
    assert sum(row.source == "text" for row in rows) == 700
    dataset = make(prepared)
    assert dataset.tokens_at(125) == {"code": 300 * S, "text": 700 * S}
    assert dataset.epochs_at(125) == {
        "code": 300 / len(dataset.windows["code"]),
        "text": 700 / len(dataset.windows["text"]),
    }
    seen = rows_of(dataset, 37)
    assert dataset.tokens_at(37) == {
        source: S * sum(row.source == source for row in seen) for source in ("code", "text")
    }


def test_the_documents_of_a_step_are_those_in_its_batch(prepared):
    dataset = make(prepared)
    batch = dataset.batch_at(5)
    for i, (row, documents) in enumerate(
        zip(dataset.rows_at(5), dataset.documents_at(5), strict=True)
    ):
        shown = np.append(batch.tokens[i], batch.targets[i][-1])
        begins = [document.start - row.window * S for document in documents]
        assert begins[0] <= 0
        assert begins[1:] == [place for place in np.flatnonzero(shown == 1) if place > 0]
        assert {document.source for document in documents} == {row.source}
        assert all(document.input_file.startswith(row.source) for document in documents)


def test_the_fingerprint_covers_order_and_content(prepared, tmp_path, write_split, make_documents):
    dataset = make(prepared)
    known = dataset.fingerprint(10)
    assert make(prepared).fingerprint(10) == known
    assert len(known) == 64
    contents = [make_documents(8, 9_000), make_documents(9, 4_100)]  # other ids, as many
    changed = write_split(tmp_path / "code" / "train", contents, source="code")
    others = [
        dataset.fingerprint(11),
        dataset.fingerprint(10, steps=63),
        make(prepared, seed=1).fingerprint(10),
        make(prepared, weights={"text": 0.71, "code": 0.29}).fingerprint(10),
        make(prepared, seq_len=S + 1).fingerprint(10),
        make(prepared | {"code": changed.parent}).fingerprint(10),
    ]
    assert len({known, *others}) == 1 + len(others)


# --- prefetch


def test_prefetch_gives_the_batches_in_order(prepared):
    dataset = make(prepared)
    with dataset.prefetch(3, 20) as batches:
        found = list(batches)
    assert len(found) == 17
    for step, batch in enumerate(found, start=3):
        np.testing.assert_array_equal(batch.tokens, dataset.batch_at(step).tokens)
    with dataset.prefetch(5, 5) as batches:
        assert list(batches) == []


# --- validation


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_validation_has_each_id_but_the_first_as_a_target_once(prepared, rows):
    stream = Stream(prepared["code"] / "validation")
    dataset = ValidationDataset(stream, seq_len=S, max_tokens=0)
    batches = list(dataset.batches(rows))
    assert {batch.tokens.shape for batch in batches} == {(rows, S)}
    tokens, targets, weights = (
        np.concatenate([getattr(batch, name) for batch in batches]).ravel()
        for name in ("tokens", "targets", "loss_weights")
    )
    ids = stream.read(0, stream.num_tokens)
    np.testing.assert_array_equal(targets[weights == 1], ids[1:])
    np.testing.assert_array_equal(tokens[weights == 1], ids[:-1])
    assert set(np.unique(weights)) <= {0, 1}
    assert weights.sum() == dataset.num_targets == 1_000


def test_validation_stops_at_its_cap(prepared):
    stream = Stream(prepared["code"] / "validation")
    dataset = ValidationDataset(stream, seq_len=S, max_tokens=3 * S - 1)
    (batch,) = dataset.batches(4)
    assert batch.loss_weights.sum() == dataset.num_targets == 3 * S
    # 1,001 ids are 32 windows: three of them at even distances, so that every part has a say.
    starts = [0, 10 * S, 21 * S]
    expected = np.stack([stream.read(start + 1, S) for start in starts])
    np.testing.assert_array_equal(batch.targets[:3], expected)
    assert not batch.tokens[3].any() and not batch.loss_weights[3].any()


# --- opening


def test_a_config_opens_what_was_prepared_for_it(prepared, config):
    datasets = open_datasets(config, prepared, TOKENIZER)
    assert rows_of(datasets.training, 5) == rows_of(make(prepared), 5)
    assert {name: data.num_targets for name, data in datasets.validation.items()} == {
        "text": 1_000,
        "code": 1_000,
    }
    described = datasets.training.describe(5)
    assert "code: 13,100 tokens" in described
    assert "409 windows of 32 (11 tokens of the last, incomplete one left out)" in described
    assert "70% of the rows" in described
    epochs = datasets.training.epochs_at(5)["code"]
    assert f"30% of the rows, {epochs:.3g} epochs" in described


def test_nothing_held_out_is_nothing_to_validate(prepared, config):
    sources = tuple(
        dataclasses.replace(source, validation_fraction=0.0) for source in config.data.sources
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    assert open_datasets(config, prepared, TOKENIZER).validation == {}


def test_a_wrong_tokenizer_is_refused_by_name(prepared, config):
    with pytest.raises(ValueError) as raised:
        open_datasets(config, prepared, "b" * 64)
    message = str(raised.value)
    assert "a" * 64 in message and "b" * 64 in message
    assert "set data.tokenizer" in message and "tinyllama_jax.prepare" in message


def test_all_that_does_not_fit_is_said_at_once(prepared, config):
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=4_095),
        data=dataclasses.replace(config.data, boundary="eos", seq_len=20_000),
    )
    with pytest.raises(ValueError) as raised:
        open_datasets(config, prepared, TOKENIZER)
    message = str(raised.value)
    assert message.count("set model.vocab_size = 4096") == 4  # both splits of both sources
    assert message.count('set data.boundary = "bos+eos"') == 4
    assert "code/train holds 13100 tokens: 0 windows" in message
    assert "text/train holds" not in message


def test_what_was_not_prepared_says_how_to(config, tmp_path):
    missing = dict.fromkeys(WEIGHTS, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"python -m tinyllama_jax\.prepare"):
        open_datasets(config, missing, TOKENIZER)


def test_a_damaged_page_stops_the_run_and_is_named(
    config, tmp_path, write_split, make_documents, monkeypatch
):
    monkeypatch.setattr(read_ahead, "_PAUSES", (0.01,))
    for source in WEIGHTS:
        write_split(tmp_path / source / "train", [make_documents(0, 9_000)], source=source)
        write_split(tmp_path / source / "validation", [make_documents(0, 40)], source=source)
    shard = tmp_path / "code" / "train" / "00000.arrayrecord"
    content = bytearray(shard.read_bytes())
    content[5_000] ^= 1
    shard.write_bytes(content)
    prepared = {source: tmp_path / source for source in WEIGHTS}
    training = open_datasets(config, prepared, TOKENIZER).training
    with (
        pytest.raises(DamagedDataError, match=r"page 0 of .*code/train/00000\.arrayrecord"),
        training.prefetch(0, 100) as batches,
    ):
        for _ in batches:
            pass
    shard.write_bytes(content[:-1])
    with pytest.raises(DamagedDataError, match=r"code/train/00000\.arrayrecord is damaged"):
        open_datasets(config, prepared, TOKENIZER)
