"""Chunks that lit-gpt's packer wrote: documents come out as they went in, and no filling does."""

import struct

import numpy as np
import pytest

from tests.data.test_prepare import stream_of
from tinyllama_jax.config import DataConfig, SourceConfig
from tinyllama_jax.data import litpkds
from tinyllama_jax.data.prepare import prepare_sources
from tinyllama_jax.data.stream import Stream

BOS, EOS = 1, 2


class Packer:
    """What lit-gpt's `PackedDatasetBuilder` does with documents, by its published format."""

    def __init__(self, directory, prefix, chunk_size, dtype="<u2", code=8):
        self.chunk_size, self.dtype, self.code = chunk_size, dtype, code
        self.directory, self.prefix, self.number = directory, prefix, 0
        self.chunk = np.full(chunk_size, BOS, dtype)
        self.used = 0

    def add(self, ids):
        while self.used + len(ids) > self.chunk_size:
            fits = self.chunk_size - self.used
            self.chunk[self.used :] = ids[:fits]
            self.write()
            ids = ids[fits:]
        self.chunk[self.used : self.used + len(ids)] = ids
        self.used += len(ids)

    def write(self):
        """Also what TinyLlama called for the rest, with its filling of BOS."""
        path = self.directory / f"{self.prefix}_{self.number:010d}.bin"
        header = b"LITPKDS" + struct.pack("<Q", 1) + struct.pack("<B", self.code)
        path.write_bytes(header + struct.pack("<Q", self.chunk_size) + self.chunk.tobytes())
        self.number += 1
        self.chunk, self.used = np.full(self.chunk_size, BOS, self.dtype), 0


def documents(seed, count):
    random = np.random.default_rng(seed)
    return [random.integers(3, 4096, int(random.integers(1, 70))) for _ in range(count)]


def pack(directory, packed, *, chunk_size=50, eos=False, **settings):
    """`packed`: documents by the prefix of the process that packs them."""
    directory.mkdir(parents=True, exist_ok=True)
    for prefix, parts in packed.items():
        packer = Packer(directory, prefix, chunk_size, **settings)
        for ids in parts:
            packer.add(np.concatenate([[BOS], ids, [EOS] if eos else []]).astype(int))
        packer.write()
    return directory


def read(directory):
    told = []
    paths = sorted(map(str, directory.glob("*.bin")))
    found = list(litpkds.read_documents(paths, BOS, EOS, lambda *chunk: told.append(chunk)))
    return found, dict(told)


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("dtype, code", [("<u2", 8), ("<i4", 4)])
@pytest.mark.parametrize("chunk_size", [7, 50, 64, 10_000])
def test_documents_come_out_as_they_went_in(tmp_path, eos, dtype, code, chunk_size):
    packed = {"train_slim_0": documents(0, 40), "train_slim_1": documents(1, 33)}
    pack(tmp_path, packed, chunk_size=chunk_size, eos=eos, dtype=dtype, code=code)
    found, filled = read(tmp_path)
    expected = packed["train_slim_0"] + packed["train_slim_1"]
    nonempty = [document for document in found if len(document.ids)]
    assert [d.ids.tolist() for d in nonempty] == [ids.tolist() for ids in expected]
    assert all(document.begins for document in nonempty)
    # All filling is accounted for: what is left is BOS and the ids. One BOS alone is no filling.
    total = sum(len(litpkds.read_chunk(path)) for path in tmp_path.glob("*.bin"))
    ids = sum(len(ids) + 1 + eos for ids in expected)
    assert total - sum(filled.values()) - ids in (0, 1, 2)


def test_a_document_is_traced_to_its_chunk(tmp_path):
    pack(tmp_path, {"a": documents(2, 40)}, chunk_size=50)
    for chunk, record, ids, _ in read(tmp_path)[0]:
        held = litpkds.read_chunk(tmp_path / f"a_{chunk:010d}.bin")
        starts = [*([0] if held[0] != BOS else []), *np.flatnonzero(held == BOS)]
        begin = starts[record] + (held[starts[record]] == BOS)
        assert held[begin : begin + 5].tolist() == ids[: len(held) - begin][:5].tolist()


def test_a_run_of_bos_is_filling_and_one_is_a_document(tmp_path):
    assert litpkds.filling(np.array([5, 1, 1, 1]), BOS) == 3
    assert litpkds.filling(np.array([5, 1]), BOS) == 0
    assert litpkds.filling(np.array([1, 1]), BOS) == 2
    assert litpkds.filling(np.array([1, 1, 7]), BOS) == 0
    # A chunk that ends with a document's BOS goes on in the next one.
    pack(tmp_path, {"a": [np.arange(3, 9), np.arange(10, 20)]}, chunk_size=8)
    assert [d.ids.tolist() for d in read(tmp_path)[0]] == [
        list(range(3, 9)), list(range(10, 20))
    ]  # fmt: skip


def test_a_missing_chunk_parts_a_document(tmp_path):
    pack(tmp_path, {"a": [np.arange(3, 90)]}, chunk_size=20)
    (tmp_path / "a_0000000002.bin").unlink()
    first, rest = read(tmp_path)[0]
    assert first.begins and first.ids.tolist() == list(range(3, 42))
    assert not rest.begins and rest.ids.tolist() == list(range(62, 90))


@pytest.mark.parametrize("chunks_each", [1, 2, 3, 7])
@pytest.mark.parametrize("chunk_size", [3, 8, 20, 60])
def test_units_divide_the_chunks_and_not_the_documents(tmp_path, chunks_each, chunk_size):
    """Documents of up to 70 ids: some go on through whole units."""
    expected = documents(5, 200)
    pack(tmp_path, {"a_0": expected[:120], "a_1": expected[120:]}, chunk_size=chunk_size)
    paths = sorted(map(str, tmp_path.glob("*.bin")))
    found = []
    for start in range(0, len(paths), chunks_each):
        end = start + chunks_each
        found += litpkds.read_documents(
            paths[start:end], BOS, EOS, lambda *chunk: None,
            before=paths[start - 1] if start else "", after=paths[end : end + 64],
        )  # fmt: skip
    assert all(document.begins for document in found)
    nonempty = [document.ids.tolist() for document in found if len(document.ids)]
    assert nonempty == [document.tolist() for document in expected]


@pytest.mark.parametrize("chunks_each", [1, 2, 3, 7])
def test_units_around_a_missing_chunk_give_the_same(tmp_path, chunks_each):
    """What is behind the gap is a document without its beginning, wherever units are cut."""
    pack(tmp_path, {"a": [np.arange(3, 90), np.arange(3, 60)]}, chunk_size=20)
    (tmp_path / "a_0000000002.bin").unlink()
    paths = sorted(map(str, tmp_path.glob("*.bin")))

    def found(each):
        documents = []
        for start in range(0, len(paths), each):
            documents += litpkds.read_documents(
                paths[start : start + each], BOS, EOS, lambda *chunk: None,
                before=paths[start - 1] if start else "", after=paths[start + each :],
            )  # fmt: skip
        return [(document.begins, document.ids.tolist()) for document in documents]

    assert found(chunks_each) == found(len(paths))
    assert (False, list(range(62, 90))) in found(chunks_each)


def test_a_document_over_more_chunks_than_are_looked_at_is_told(tmp_path):
    pack(tmp_path, {"a": [np.arange(3, 3 + 70 * 20)]}, chunk_size=20)
    paths = sorted(map(str, tmp_path.glob("*.bin")))
    after = paths[1:][: litpkds.CHUNKS_BEHIND]
    with pytest.raises(ValueError, match=r"goes on for 64 chunks, .*pack larger chunks"):
        list(litpkds.read_documents(paths[:1], BOS, EOS, lambda *chunk: None, after=after))
    (document,) = litpkds.read_documents(paths, BOS, EOS, lambda *chunk: None)
    assert len(document.ids) == 70 * 20


def test_prepared_by_units_of_one_chunk_it_is_the_same(tmp_path, one_file_each):
    expected = documents(5, 150)
    pack(tmp_path / "raw", {"a_0": expected[:90], "a_1": expected[90:]}, chunk_size=60)
    source = SourceConfig(name="slim", path=str(tmp_path / "raw"), validation_fraction=0.0)
    data = DataConfig(sources=(source,), prepared=str(tmp_path / "p"))
    ids = stream_of(prepare_sources(data, workers=1)["slim"], "train")
    parts = np.split(ids, np.flatnonzero(ids == EOS) + 1)[:-1]
    assert [part[1:-1].tolist() for part in parts] == [document.tolist() for document in expected]


def test_chunks_of_another_tokenizer_are_refused(tmp_path, monkeypatch):
    pack(tmp_path, {"a": documents(6, 20)})
    paths = sorted(map(str, tmp_path.glob("*.bin")))
    with pytest.raises(ValueError, match=r"begins with id 1 in place of BOS \(5000\)"):
        list(litpkds.read_documents(paths, 5000, EOS, lambda *chunk: None))
    monkeypatch.setattr(litpkds, "_LONGEST_DOCUMENT", 60)
    pack(tmp_path / "long", {"a": [np.arange(3, 200)]}, chunk_size=50)
    with pytest.raises(ValueError, match="hold 60 ids without BOS"):
        read(tmp_path / "long")


def damaged(content, what):
    if what == "short":
        return content[:-1]
    if what == "long":
        return content + b"\0"
    place, value = {"magic": (0, b"L"), "version": (7, b"\2"), "floats": (15, b"\6")}[what]
    value = b"X" if what == "magic" else value
    return content[:place] + value + content[place + 1 :]


@pytest.mark.parametrize(
    "what, told",
    [
        ("short", "it was cut short while copying"),
        ("long", "where its header tells of 50 ids"),
        ("magic", "is no LITPKDS chunk: it begins with b'XITPKDS"),
        ("version", "of version 2 with values of type 8; known is version 1"),
        ("floats", "of version 1 with values of type 6"),
    ],
)
def test_what_is_no_chunk_is_refused(tmp_path, what, told):
    pack(tmp_path / "raw", {"a": documents(3, 5)})
    path = tmp_path / "raw/a_0000000000.bin"
    path.write_bytes(damaged(path.read_bytes(), what))
    source = SourceConfig(name="slim", path=str(tmp_path / "raw"))
    with pytest.raises(ValueError, match=told):
        prepare_sources(DataConfig(sources=(source,), prepared=str(tmp_path / "p")), workers=1)


def test_prepared_it_has_boundaries_and_no_filling(tmp_path, capsys):
    expected = documents(4, 300)
    pack(tmp_path / "raw", {"train_slim_0": expected[:150], "train_slim_1": expected[150:]})
    source = SourceConfig(name="slim", path=str(tmp_path / "raw"), validation_fraction=0.2)
    data = DataConfig(sources=(source,), prepared=str(tmp_path / "p"))
    directory = prepare_sources(data, workers=1)["slim"]
    found = []
    for split in ("train", "validation"):
        ids = stream_of(directory, split)
        parts = np.split(ids, np.flatnonzero(ids == EOS) + 1)[:-1]
        assert all(part[0] == BOS and (part[1:-1] > EOS).all() for part in parts)
        found += [part[1:-1].tolist() for part in parts]
        assert Stream(directory / split).manifest.boundary == "bos+eos"
    assert sorted(found) == sorted(ids.tolist() for ids in expected)
    printed = capsys.readouterr().out
    assert "slim: 300 documents" in printed and "chunks that were filled up with BOS" in printed
