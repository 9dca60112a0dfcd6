"""The defects of the published data, built: that many BOS, and chunks read twice or never."""

import collections
import dataclasses

import numpy as np
import pytest

from tests.data.test_prepare import config as data_config
from tests.data.test_prepare import stream_of, write_corpus
from tinyllama_jax.data.audit import audit
from tinyllama_jax.data.history import Defects, build, handed_out, packed
from tinyllama_jax.data.prepare import prepare_sources

BOS = 1
DEFECTS = Defects(packers=3, chunk_tokens=1000, nodes=2, seed=5)


def documents(seed, count):
    random = np.random.default_rng(seed)
    sizes = random.integers(2, 2500, count)
    return [np.concatenate([[BOS], random.integers(3, 4096, size)]) for size in sizes]


def test_packers_lose_nothing_and_fill_their_last_chunk():
    given = documents(0, 60)
    chunks = packed(given, BOS, DEFECTS)
    assert all(sum(map(len, chunk)) == 1000 for chunk in chunks)
    whole = np.concatenate([np.concatenate(chunk) for chunk in chunks])
    total = sum(map(len, given))
    assert 0 < len(whole) - total < 3 * 1000
    expected = np.concatenate([*given, np.full(len(whole) - total, BOS)])
    assert np.array_equal(np.sort(whole), np.sort(expected))
    # A packer takes every third document, and writes them one behind the other.
    own = np.concatenate(given[::3])
    assert np.array_equal(whole[: len(own)], own)


def test_nodes_read_some_chunks_twice_and_some_never():
    read = handed_out(100, DEFECTS)
    assert len(read) == 100
    counts = collections.Counter(read)
    assert max(counts.values()) == 2 and 15 < 100 - len(counts) < 35
    assert sorted(handed_out(100, Defects(nodes=1))) == list(range(100))


def test_a_run_reads_the_corpus_with_the_defects_and_audit_finds_them(tmp_path):
    raw = write_corpus(tmp_path / "books", files=2, documents=300)
    data = data_config(raw, tmp_path / "prepared", boundary="bos")
    directories = build(data, DEFECTS)
    assert prepare_sources(data) == directories  # nothing is left to prepare: a run takes it
    ids = stream_of(directories["books"], "train")
    (sound,) = (tmp_path / "prepared/sound").glob("books-*")
    assert abs(ids.size - stream_of(sound, "train").size) < 3000
    runs = np.flatnonzero((ids[:-1] == BOS) & (ids[1:] == BOS)).size
    assert 0 < runs < 6000
    held_out = stream_of(directories["books"], "validation")
    assert np.array_equal(held_out, stream_of(sound, "validation"))
    found = [f.text for f in audit(directories["books"]).findings if f.level == "problem"]
    assert any("BOS is missing or too much at" in text for text in found), found
    assert any("are copies of another" in text for text in found), found
    assert [f for f in audit(sound).findings if f.level == "problem"] == []


def test_subsets_were_not_published(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/text.txt").write_text("some text " * 99)
    data = data_config(tmp_path / "a", tmp_path / "prepared", boundary="bos")
    source = dataclasses.replace(
        data.sources[0], path=str(tmp_path), subset_key="directory", validation_fraction=0.0,
        format="text",
    )  # fmt: skip
    with pytest.raises(ValueError, match="has subsets, which the published had not"):
        build(dataclasses.replace(data, sources=(source,)), DEFECTS)
