"""Prepared storage gives back what was written, or refuses and says where."""

import concurrent.futures
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama_jax.data.pages import (
    PAGE_TOKENS,
    DamagedDataError,
    ShardWriter,
    read_manifest,
    write_manifest,
)
from tinyllama_jax.data.stream import ShardReaders, Stream, Windows

# Tokens per shard: ends inside a page, on a page's edge, a shard of one page, one of a single id.
SHARD_TOKENS = (20_000, 2 * PAGE_TOKENS, 777, 1, PAGE_TOKENS, 9_000)


@pytest.fixture(scope="module")
def shards(make_documents):
    return [make_documents(seed, tokens) for seed, tokens in enumerate(SHARD_TOKENS)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory, write_split, shards):
    return write_split(tmp_path_factory.mktemp("pages") / "train", shards)


@pytest.fixture(scope="module")
def flat(shards):
    return np.concatenate([ids for documents in shards for ids in documents])


@pytest.fixture
def copy(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "train")


# --- what is stored


def test_a_shard_is_the_pages_that_the_format_promises(directory, shards):
    reader = ArrayRecordReader(str(directory / "00000.arrayrecord"))
    records = reader.read_all()
    ids = np.concatenate(shards[0])
    assert [len(record) for record in records] == [16384, 16384, 2 * (20_000 - 16384)]
    assert b"".join(records) == ids.astype("<u2").tobytes()
    options = reader.writer_options_string()
    assert "group_size:1" in options and "uncompressed" in options


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path, write_split):
    ids = np.arange(60_000, 75_000)
    for vocab_size, width in ((65_536, 2), (65_537, 4)):
        directory = write_split(
            tmp_path / str(vocab_size), [[ids % vocab_size]], vocab_size=vocab_size
        )
        record = ArrayRecordReader(str(directory / "00000.arrayrecord")).read([0])[0]
        assert len(record) == width * PAGE_TOKENS
        np.testing.assert_array_equal(Stream(directory).read(0, ids.size), ids % vocab_size)


def test_the_manifest_counts_and_hashes_the_files(directory, shards):
    manifest = read_manifest(directory)
    assert manifest.tokens == sum(SHARD_TOKENS)
    assert manifest.documents == sum(map(len, shards))
    for entry, tokens in zip(manifest.shards, SHARD_TOKENS, strict=True):
        content = (directory / entry.file).read_bytes()
        index = (directory / f"{entry.file}.documents").read_bytes()
        assert entry.tokens == tokens
        assert (entry.bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert entry.documents_sha256 == hashlib.sha256(index).hexdigest()
        assert len(index) == 12 * entry.documents


def test_the_same_documents_give_the_same_bytes(directory, tmp_path, write_split, shards):
    again = write_split(tmp_path / "train", shards)
    for file in sorted(directory.iterdir()):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_shard_has_no_name_before_it_is_whole(tmp_path):
    path = tmp_path / "00000.arrayrecord"
    writer = ShardWriter(path, 4096)
    writer.add(np.ones(3 * PAGE_TOKENS, np.int64), 0, "a.txt")
    assert not path.exists()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [-1, 4096])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, wrong):
    writer = ShardWriter(tmp_path / "00000.arrayrecord", 4096)
    with pytest.raises(ValueError, match=r"record 7 of a\.txt .* vocabulary of 4096"):
        writer.add(np.array([1, wrong, 2]), 7, "a.txt")
    writer.discard()


def test_a_full_disk_is_reported_and_leaves_nothing_behind(tmp_path):
    script = """
        import pathlib, resource, signal, sys
        import numpy as np
        from tinyllama_jax.data.pages import ShardWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        writer = ShardWriter(pathlib.Path(sys.argv[1]) / "0.arrayrecord", 4096)
        try:
            for record in range(100):
                writer.add(np.ones(8192, np.int64), record, "a.txt")
            writer.close()
        except OSError as error:
            print(error)
            writer.discard()
    """
    result = _python(script, tmp_path)
    assert "cannot write" in result and "File too large" in result and "data.prepared" in result
    assert list(tmp_path.iterdir()) == []


# --- reading


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_range_is_read_as_from_one_flat_array(directory, flat, data):
    stream = _shared_stream(directory)
    edges = st.sampled_from(
        [edge + off for edge in np.cumsum((0, *SHARD_TOKENS)) for off in (-1, 0, 1)]
        + [PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1]
    ).map(lambda offset: int(np.clip(offset, 0, flat.size)))
    start = data.draw(st.one_of(edges, st.integers(0, flat.size)))
    stop = data.draw(st.one_of(edges, st.integers(0, flat.size)))
    start, stop = min(start, stop), max(start, stop)
    ids = stream.read(start, stop - start)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, flat[start:stop])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_documents_of_a_range_are_named(directory, flat, shards, data):
    expected, start = [], 0
    for number, documents in enumerate(shards):
        for record, ids in enumerate(documents):
            name = f"text-{number}-{record % 2}.txt"
            expected.append((name, record // 2, start, ids.size))
            start += ids.size
    edges = st.sampled_from([document[2] for document in expected])
    first = data.draw(st.one_of(edges, st.integers(0, flat.size)))
    stop = data.draw(st.one_of(edges, st.integers(first, min(flat.size, first + 5000))))
    first, stop = min(first, stop), max(first, stop)
    found = _shared_stream(directory).documents(first, stop)
    assert [dataclasses.astuple(document)[1:] for document in found] == [
        document
        for document in expected
        if max(document[2], first) < min(document[2] + document[3], stop)
    ]
    assert {document.source for document in found} <= {"text"}


@pytest.mark.parametrize("seq_len", [1, 7, 256, 2048, 8192, 54_353, 54_354])
def test_windows_make_each_id_but_the_first_a_target_once(directory, flat, seq_len):
    windows = Windows(Stream(directory), seq_len)
    count = min(len(windows), 300)
    targets = [windows[i][1:] for i in range(count)]
    inputs = [windows[i][:-1] for i in range(count)]
    covered = count * seq_len
    np.testing.assert_array_equal(np.concatenate([[], *targets]), flat[1 : 1 + covered])
    np.testing.assert_array_equal(np.concatenate([[], *inputs]), flat[:covered])
    assert len(windows) * seq_len + windows.left_out == flat.size - 1
    assert windows.left_out < seq_len


def test_few_descriptors_are_enough_for_many_shards(tmp_path, write_split):
    directory = write_split(
        tmp_path / "train", [[np.full(9000, 3 + shard)] for shard in range(150)]
    )
    script = """
        import os, pathlib, resource, sys
        import numpy as np
        from tinyllama_jax.data.stream import Stream
        import array_record.python.array_record_module
        resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
        stream = Stream(pathlib.Path(sys.argv[1]))
        most = 0
        for shard in np.random.default_rng(0).permutation(np.repeat(np.arange(150), 3)):
            ids = stream.read(int(shard) * 9000 + 8000, 1000)
            assert (ids == 3 + shard).all(), shard
            most = max(most, len(os.listdir("/proc/self/fd")))
        print(most)
    """
    assert int(_python(script, directory)) <= 48 // 4 + 8  # a quarter, and what Python itself holds


def test_three_thousand_shards_under_the_usual_limit(tmp_path, write_split):
    """As many as SlimPajama's parts; all but one are links to it."""
    directory = write_split(tmp_path / "train", [[np.arange(3, 4000), np.full(6003, 7)]])
    manifest = read_manifest(directory)
    (first,) = manifest.shards
    entries = []
    for number in range(3000):
        name = f"{number:05d}.arrayrecord"
        if number:
            for suffix in ("", ".documents"):
                (directory / f"{name}{suffix}").hardlink_to(directory / f"{first.file}{suffix}")
        entries.append(dataclasses.replace(first, file=name))
    write_manifest(directory, dataclasses.replace(manifest, shards=tuple(entries)))
    script = """
        import os, pathlib, resource, sys
        import numpy as np
        from tinyllama_jax.data.stream import Stream, Windows
        import array_record.python.array_record_module
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        stream = Stream(pathlib.Path(sys.argv[1]))
        whole = np.concatenate([np.arange(3, 4000), np.full(6003, 7)])
        windows = Windows(stream, 2048)
        assert stream.num_tokens == 3000 * 10_000
        for window in np.random.default_rng(0).integers(0, len(windows), 3000):
            expected = whole[(window * 2048 + np.arange(2049)) % 10_000]
            assert np.array_equal(windows[int(window)], expected), window
        print(len(os.listdir("/proc/self/fd")))
    """
    assert int(_python(script, directory)) <= 256 // 4 + 8


def test_threads_may_share_open_shards(directory, flat, monkeypatch):
    monkeypatch.setattr("tinyllama_jax.data.stream._CACHED_PAGES", 2)
    monkeypatch.setattr("resource.getrlimit", lambda _: (8, 8))  # two shards open at once
    stream = Stream(directory, ShardReaders())
    starts = np.random.default_rng(0).integers(0, flat.size - 3000, 400)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for start, ids in zip(
            starts, threads.map(lambda start: stream.read(int(start), 3000), starts), strict=True
        ):
            np.testing.assert_array_equal(ids, flat[start : start + 3000])


def test_a_damaged_shard_does_not_stand_in_the_way_of_others(copy, flat):
    shard = copy / "00000.arrayrecord"
    content = bytearray(shard.read_bytes())
    content[20_000] ^= 1
    shard.write_bytes(content)
    readers = ShardReaders()
    stream = Stream(copy, readers)
    with pytest.raises(DamagedDataError):
        stream.read(0, 20_000)
    np.testing.assert_array_equal(stream.read(20_000, 9), flat[20_000:20_009])
    readers.reopen()


def test_reopened_readers_read_anew(directory, flat):
    readers = ShardReaders()
    stream = Stream(directory, readers)
    stream.read(0, 10)
    readers.reopen()
    np.testing.assert_array_equal(stream.read(0, 10), flat[:10])


# --- damage


def test_verify_passes_what_was_written(directory):
    Stream(directory).verify()


@pytest.mark.parametrize("length", [0, 1, 1000, 65_536, -1])
def test_a_truncated_shard_is_refused(copy, length):
    shard = copy / "00000.arrayrecord"
    content = shard.read_bytes()
    shard.write_bytes(content[:length])
    with pytest.raises(DamagedDataError, match=r"00000\.arrayrecord is damaged: it has \d+ bytes"):
        Stream(copy)


def test_a_shard_truncated_after_opening_is_refused(copy):
    stream = Stream(copy)
    (copy / "00001.arrayrecord").write_bytes(b"")
    with pytest.raises(DamagedDataError, match=r"00001\.arrayrecord is damaged: it has 0 bytes"):
        stream.read(20_000, 5)


def test_a_missing_shard_is_refused(copy):
    (copy / "00001.arrayrecord").unlink()
    with pytest.raises(DamagedDataError, match=r"00001\.arrayrecord is missing"):
        Stream(copy)


def test_zeros_in_place_of_a_shard_are_refused(copy):
    shard = copy / "00000.arrayrecord"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DamagedDataError, match=r"opens with 0 pages and the manifest counts 3"):
        Stream(copy).read(0, 5)


def test_a_page_of_another_length_is_refused(copy):
    manifest = read_manifest(copy)
    shards = (
        dataclasses.replace(manifest.shards[0], tokens=manifest.shards[0].tokens + 1),
        *manifest.shards[1:],
    )
    write_manifest(copy, dataclasses.replace(manifest, shards=shards))
    with pytest.raises(DamagedDataError, match=r"page 2 of .*00000\.arrayrecord is damaged"):
        Stream(copy).read(17_000, 5)


def test_a_flipped_bit_in_a_page_is_named(copy, flat):
    shard = copy / "00000.arrayrecord"
    content = shard.read_bytes()
    for page in range(3):
        ids = flat[page * PAGE_TOKENS :][:40].astype("<u2").tobytes()
        damaged = bytearray(content)
        damaged[content.index(ids) + 33] ^= 8
        shard.write_bytes(damaged)
        stream = Stream(copy)
        with pytest.raises(DamagedDataError, match=rf"page {page} of .*00000\.arrayrecord"):
            stream.read(page * PAGE_TOKENS + 500, 10)
        other = (page + 1) % 3 * PAGE_TOKENS
        np.testing.assert_array_equal(stream.read(other, 10), flat[other : other + 10])


def test_a_flipped_bit_anywhere_is_refused_or_harmless(copy, flat):
    """Refused while reading wherever it could change an id, and by `verify` in any case."""
    shard = copy / "00000.arrayrecord"
    content = shard.read_bytes()
    random = np.random.default_rng(0)
    places = {*range(200), *range(len(content) - 200, len(content))}
    for block in range(0, len(content), 4096):
        places.update(random.integers(block, min(block + 4096, len(content)), 10).tolist())
    refused = 0
    for place in sorted(places):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(random.integers(8))
        shard.write_bytes(damaged)
        stream = Stream(copy)
        try:
            ids = stream.read(0, 20_000)
        except DamagedDataError as error:
            assert "00000.arrayrecord" in str(error)
            refused += 1
        else:
            np.testing.assert_array_equal(ids, flat[:20_000], err_msg=f"byte {place}")
        if place % 50 == 0:
            with pytest.raises(DamagedDataError, match=r"00000\.arrayrecord has another sha256"):
                stream.verify()
    assert refused > 100  # pages are 40 KB of the file; the rest is padding


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing"])
def test_a_damaged_document_index_is_refused_and_only_it(copy, flat, damage):
    index = copy / "00000.arrayrecord.documents"
    content = bytearray(index.read_bytes())
    if damage == "flip":
        content[5] ^= 1
    index.write_bytes({"flip": content, "truncate": content[:-12]}.get(damage, b""))
    if damage == "missing":
        index.unlink()
    stream = Stream(copy)
    with pytest.raises(DamagedDataError, match=r"00000\.arrayrecord\.documents is missing or dam"):
        stream.documents(0, 10)
    with pytest.raises(DamagedDataError, match=r"00000\.arrayrecord\.documents"):
        stream.verify()
    np.testing.assert_array_equal(stream.read(0, 10), flat[:10])
    assert stream.documents(20_000, 20_001)[0].input_file == "text-1-0.txt"


def test_a_flipped_bit_in_the_manifest_is_refused(copy):
    path = copy / "manifest.json"
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedDataError, match=r"manifest\.json is damaged.*prepare again"):
            read_manifest(copy)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{}", b'{"format": 1', b"\xff\xfe"])
def test_a_manifest_that_is_none_is_refused(copy, content):
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedDataError, match=r"manifest\.json is damaged"):
        read_manifest(copy)


def test_a_missing_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m tinyllama_jax\.prepare"):
        read_manifest(tmp_path)


def test_a_manifest_of_another_version_is_refused(copy):
    path = copy / "manifest.json"
    tree = json.loads(path.read_bytes())
    del tree["checksum"]
    tree["format"] = 2
    tree["checksum"] = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"has format 2 .* this version reads format 1"):
        read_manifest(copy)


_streams = {}


def _shared_stream(directory):
    """One open stream for all the examples of a property."""
    return _streams.setdefault(directory, Stream(directory))


def _python(script, argument):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(argument)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
