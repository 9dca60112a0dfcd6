"""Arrow files made to fill memory, to end the process, or to hide rows."""

import tracemalloc
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.ipc
import pytest

from tests.data.reading import megabytes_used, read, write_arrow
from tinyllama_jax.data import arrow_messages, columnar, formats
from tinyllama_jax.data.arrow_messages import messages_of_file, most_unpacked


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_columns_of_arrow_that_are_not_read(tmp_path, kind):
    """400 MB in 20 kB of zstd are not unpacked."""
    table = pyarrow.table({"other": ["x" * 400_000_000], "text": ["a text"]})
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with new(tmp_path / "a.arrow", table.schema, options=options) as writer:
        writer.write_table(table)
    del table
    assert (tmp_path / "a.arrow").stat().st_size < 50_000
    assert [document.text for document in read(tmp_path / "a.arrow")[0]] == ["a text"]
    said, used = megabytes_used(tmp_path / "a.arrow")
    assert not said and used < 100


def test_one_large_text_in_every_row_of_arrow(tmp_path):
    book = pyarrow.array(["a book " * 14_000_000])
    rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 40_000), book)
    table = pyarrow.table({"text": rows})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    said, used = megabytes_used(tmp_path / "a.arrow", documents=20)
    assert not said and used < 1000


@pytest.mark.parametrize("kind", ["stream", "file"])
@pytest.mark.parametrize("packing", ["zstd", "lz4"])
def test_a_large_batch_of_packed_arrow(tmp_path, monkeypatch, kind, packing):
    """Refused by what it says that it holds, with a line that mends it."""
    monkeypatch.setattr(columnar, "MOST_UNPACKED", 10_000_000)
    table = pyarrow.table({"text": [f"{number:4} " + "a book " * 850 for number in range(2000)]})
    new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    options = pyarrow.ipc.IpcWriteOptions(compression=packing)
    path = tmp_path / "a.arrow"
    with new(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=1000)
    assert len(read(path)[0]) == 2000
    with new(path, table.schema, options=options) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match=r"has 11,9\d\d,\d\d\d bytes in a batch") as refused:
        read(path)
    *_, mend = str(refused.value).split("without packing: ")
    exec(mend.replace("NEW", repr(str(path))))
    assert [d.text for d in read(path)[0]] == table["text"].to_pylist()


def test_a_bomb_of_arrow(tmp_path):
    """3 GB in 100 kB of zstd, of which nothing is unpacked."""
    texts = ["x" * 200_000_000] * 15
    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.large_string())})
    del texts
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema, options=options) as writer:
        writer.write_table(table)
    del table
    assert (tmp_path / "a.arrow").stat().st_size < 400_000
    said, used = megabytes_used(tmp_path / "a.arrow")
    assert "has 3,000,000," in said and used < 100


@pytest.mark.parametrize("packing", [None, "zstd"])
@pytest.mark.parametrize("deltas", [True, False])
def test_dictionaries_of_arrow(tmp_path, packing, deltas):
    """What is unpacked of them is kept; those that grow are copied, packed or not."""
    values = ["x" * 1000, "y" * 3000, "z" * 5000]
    options = pyarrow.ipc.IpcWriteOptions(compression=packing, emit_dictionary_deltas=deltas)
    kind = pyarrow.dictionary(pyarrow.int64(), pyarrow.string())
    schema = pyarrow.schema({"text": kind})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", schema, options=options) as writer:
        for count in (2, 3):
            texts = pyarrow.array(values[:count]).dictionary_encode().cast(kind)
            writer.write(pyarrow.record_batch({"text": texts}))
    with pyarrow.memory_map(str(tmp_path / "a.arrow")) as file:
        unpacked = most_unpacked(pyarrow.ipc.MessageReader.open_stream(file), schema, [0])
    exact = 9000 + 4 * 4 + 3 * 8 if packing else 5000 + 2 * 4 if deltas else 0
    assert exact <= unpacked <= exact + 64
    assert [document.text for document in read(tmp_path / "a.arrow")[0]] == values[:2] + values


def test_two_arrow_streams_in_one_file(tmp_path):
    """They are no half of their rows."""
    table = pyarrow.table({"text": ["a text"] * 9})
    path = tmp_path / "a.arrow"
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match=r"a\.arrow cannot be read .* bytes stand behind its end"):
        read(path)


def test_an_arrow_file_that_is_no_stream(tmp_path):
    """As polars writes them, without the length that stands before the schema in a stream."""
    table = pyarrow.table({"text": ["a text"] * 9})
    path = tmp_path / "a.arrow"
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    content = bytearray(path.read_bytes())
    assert content[8:12] == b"\xff" * 4
    content[8:16] = b"\0" * 8
    path.write_bytes(content)
    assert [document.text for document in read(path)[0]] == ["a text"] * 9


def test_arrow_that_was_cut(tmp_path):
    """Between two messages a stream can be cut, and a footer can tell of fewer batches."""
    table = pyarrow.table({"text": ["a text"] * 100})
    path = tmp_path / "a.arrow"
    write_arrow(path, table, "stream", max_chunksize=10)
    sound = path.read_bytes()
    path.write_bytes(sound[:-8])
    with pytest.raises(ValueError, match=r"a\.arrow cannot be read as Arrow: it has no end mark"):
        read(path)
    write_arrow(path, table, "file", max_chunksize=10)
    sound = path.read_bytes()
    length = int.from_bytes(sound[-10:-6], "little")
    footer = sound[-10 - length :]
    (count,) = (at for at in range(0, length, 4) if footer[at : at + 4] == b"\x0a\0\0\0")
    fewer = footer[:count] + b"\x05" + footer[count + 1 :]
    path.write_bytes(sound[: -len(footer)] + fewer)
    with pytest.raises(ValueError, match=r"a\.arrow cannot .* does not tell of all that is in it"):
        read(path)


def test_what_stands_beside_the_subset_in_arrow(tmp_path):
    """It is neither looked at nor made: here, 100 million nothings in 1 kB, and odd times."""
    nothings = pyarrow.LargeListArray.from_arrays(
        pyarrow.array([0, 10**8], pyarrow.int64()), pyarrow.nulls(10**8)
    )
    times = pyarrow.array([1], pyarrow.int64())
    meta = pyarrow.StructArray.from_arrays(
        [pyarrow.array(["wiki"]), nothings, times.cast(pyarrow.timestamp("ns")),
         times.view(pyarrow.date64())],
        ["set", "nothings", "time", "day"],
    )  # fmt: skip
    write_arrow(tmp_path / "a.arrow", pyarrow.table({"text": ["a text"], "meta": meta}))
    tracemalloc.start()
    (document,), _ = read(tmp_path / "a.arrow", subset_key="meta.set")
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert (document.text, document.subset) == ("a text", "wiki")
    for key, kind in (("meta", "StructType"), ("meta.time", "TimestampType")):
        with pytest.raises(ValueError, match=rf'row 0 has no text under .*"{key}", but {kind}'):
            read(tmp_path / "a.arrow", subset_key=key)


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_packed_columns_of_arrow_count_only_where_they_are_read(tmp_path, monkeypatch, kind):
    """Of columns that are views, each batch has some more buffers."""
    monkeypatch.setattr(columnar, "MOST_UNPACKED", 100_000)
    books = pyarrow.array(["a book " * 9000] * 10)
    columns = {
        "views": books.cast(pyarrow.string_view()), "books": books,
        "nothing": pyarrow.nulls(10), "list": pyarrow.array([[1], []] * 5),
        "text": pyarrow.array(["a text that is no view's own"] * 10).cast(pyarrow.string_view()),
        "more": books.cast(pyarrow.binary_view()),
    }  # fmt: skip
    write_arrow(tmp_path / "a.arrow", pyarrow.table(columns), kind, compression="zstd")
    found, _ = read(tmp_path / "a.arrow")
    assert [document.text for document in found] == ["a text that is no view's own"] * 10
    for key in ("views", "books", "more"):
        with pytest.raises(ValueError, match=r"a\.arrow has 6\d\d,\d\d\d bytes in a batch"):
            read(tmp_path / "a.arrow", text_key=key)


@pytest.mark.parametrize("packing", [None, "zstd"])
@pytest.mark.parametrize("shared", [True, False])
def test_damaged_arrow(tmp_path, packing, shared):
    """Whatever bytes are others: texts, or an error that names the file."""
    texts = pyarrow.array([f"{number} " * 9 for number in range(100)])
    texts = texts.dictionary_encode() if shared else texts
    table = pyarrow.table({"text": texts, "meta": [{"set": "a set"}] * 100})
    options = pyarrow.ipc.IpcWriteOptions(compression=packing)
    path = tmp_path / "a.arrow"
    with pyarrow.ipc.new_file(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=25)
    sound = path.read_bytes()
    place = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(sound)
        for at in place.integers(0, len(sound), place.integers(1, 4)):
            damaged[at] = place.choice([0, 0x7F, 0xFF, place.integers(256)])
        path.write_bytes(damaged)
        try:
            read(path, subset_key="meta.set")
        except ValueError as error:
            assert str(path) in str(error)


def test_a_large_batch_of_arrow_stays_in_the_file(tmp_path):
    """800 MB of texts that are not packed: what is mapped counts, and no copy of it."""
    texts = pyarrow.array(["a text! " * 12_500_000] * 8, pyarrow.large_string())
    write_arrow(tmp_path / "a.arrow", pyarrow.table({"text": texts, "other": range(8)}))
    del texts
    said, used = megabytes_used(tmp_path / "a.arrow")
    assert not said and used < 800 + 400


class Message(NamedTuple):
    """As pyarrow gives them."""

    type: str
    metadata: pyarrow.Buffer
    body: pyarrow.Buffer


def test_what_a_buffer_of_arrow_says_of_its_size(tmp_path):
    """-1: that it is not packed; and Arrow 0.17 told elsewhere that there are sizes."""
    table = pyarrow.table({"text": ["a text " * 500]})
    write_arrow(tmp_path / "a.arrow", table, "stream", compression="lz4")
    write_arrow(tmp_path / "b.arrow", table, "stream")
    with pyarrow.memory_map(str(tmp_path / "a.arrow")) as file:
        _, packed = pyarrow.ipc.MessageReader.open_stream(file)
        before, letters = packed.body.to_pybytes().rsplit((3500).to_bytes(8, "little"), 1)
        offsets = most_unpacked([packed], table.schema, [0]) - 3500
        body = pyarrow.py_buffer(before + b"\xff" * 8 + letters)
        without = Message(packed.type, packed.metadata, body)
        assert most_unpacked([without], table.schema, [0]) == offsets > 0
    with pyarrow.memory_map(str(tmp_path / "b.arrow")) as file:
        _, plain = pyarrow.ipc.MessageReader.open_stream(file)
        assert most_unpacked([plain], table.schema, [0]) == 0
        told = plain.metadata.to_pybytes() + b"ARROW:experimental_compression"
        of_2020 = Message(plain.type, pyarrow.py_buffer(told), plain.body)
        assert most_unpacked([of_2020], table.schema, [0]) > 0


def test_the_largest_batch_of_arrow_counts(tmp_path):
    options = pyarrow.ipc.IpcWriteOptions(compression="lz4")
    schema = pyarrow.schema({"text": pyarrow.string()})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", schema, options=options) as writer:
        for texts in (["a text " * 5000], ["a text"]):
            writer.write(pyarrow.record_batch({"text": texts}))
    with pyarrow.memory_map(str(tmp_path / "a.arrow")) as file:
        unpacked = most_unpacked(pyarrow.ipc.MessageReader.open_stream(file), schema, [0])
    assert 35_000 <= unpacked <= 35_100


def test_a_large_dictionary_that_a_small_one_replaces(tmp_path):
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    schema = pyarrow.schema({"text": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", schema, options=options) as writer:
        for text in ("a text " * 5000, "a text"):
            texts = pyarrow.array([text], schema[0].type)
            writer.write(pyarrow.record_batch([texts], schema=schema))
    with pyarrow.memory_map(str(tmp_path / "a.arrow")) as file:
        unpacked = most_unpacked(pyarrow.ipc.MessageReader.open_stream(file), schema, [0])
    assert 35_000 <= unpacked <= 35_100
    assert len(read(tmp_path / "a.arrow")[0]) == 2


def test_unions_of_long_ago(tmp_path):
    """They had a buffer more than today's."""
    union = pyarrow.UnionArray.from_sparse(pyarrow.array([0], pyarrow.int8()), [pyarrow.array([1])])
    table = pyarrow.table({**{f"{n}": union for n in range(6)}, "text": ["a text " * 5000]})
    options = pyarrow.ipc.IpcWriteOptions(
        compression="zstd", metadata_version=pyarrow.ipc.MetadataVersion.V4
    )
    path = tmp_path / "a.arrow"
    with pyarrow.ipc.new_stream(path, table.schema, options=options) as writer:
        told = {"ARROW:experimental_compression": "zstd"}
        writer.write_batch(*table.to_batches(), custom_metadata=told)
    with pyarrow.memory_map(str(path)) as file:
        unpacked = most_unpacked(pyarrow.ipc.MessageReader.open_stream(file), table.schema, [6])
    assert 35_000 <= unpacked <= 35_500
    assert [document.text for document in read(path)[0]] == ["a text " * 5000]


def test_a_footer_that_tells_of_a_batch_twice(tmp_path):
    """And of another not at all."""
    path = tmp_path / "a.arrow"
    texts = [f"{number:04}" + "x" * 8 * (number // 10) for number in range(100)]
    write_arrow(path, pyarrow.table({"text": texts}), "file", max_chunksize=10)
    sound = path.read_bytes()
    with pyarrow.memory_map(str(path)) as file:
        places = [sound.rindex(m.metadata.to_pybytes()) - 8 for m in messages_of_file(file)]
    told = [place.to_bytes(8, "little") for place in places]
    assert len(set(told)) == 10 and sound.count(told[5]) == 1
    path.write_bytes(sound.replace(told[5], told[3]))
    with pytest.raises(ValueError, match=r"a\.arrow cannot .* does not tell of all that is in it"):
        read(path)


def test_a_footer_that_does_not_tell_of_the_first_batch(tmp_path, monkeypatch):
    path = tmp_path / "a.arrow"
    write_arrow(path, pyarrow.table({"text": ["a text"] * 30}), "file", max_chunksize=10)
    with pyarrow.memory_map(str(path)) as file:
        assert len(list(messages_of_file(file))) == 3
    structs = arrow_messages._Table.structs
    monkeypatch.setattr(
        arrow_messages._Table,
        "structs",
        lambda *of: structs(*of)[of[1] == arrow_messages._BATCHES :],
    )
    with pyarrow.memory_map(str(path)) as file, pytest.raises(ValueError, match="does not tell"):
        list(messages_of_file(file))


def test_batches_without_end(tmp_path, monkeypatch):
    """Of 10 rows each, which have no bytes."""
    monkeypatch.setattr(formats, "_ANY_ROWS", 999)
    monkeypatch.setattr(formats, "_ROWS_PER_BYTE", 0)
    texts = pyarrow.array([b""] * 1000, pyarrow.binary(0))
    for count, refused in ((99, False), (100, True)):
        table = pyarrow.table({"text": texts[: 10 * count]})
        write_arrow(tmp_path / "a.arrow", table, "stream", max_chunksize=10)
        if refused:
            with pytest.raises(ValueError, match="says that it has 1,000 rows"):
                read(tmp_path / "a.arrow")
        else:
            assert read(tmp_path / "a.arrow")[1].skipped["empty documents"] == 990


@pytest.mark.parametrize("values", [["a text", None], [None, None]])
def test_a_dictionary_with_nothing_in_it(tmp_path, values):
    """A row without a text, as where the row itself tells of none."""
    kind = None if any(values) else pyarrow.null()
    texts = pyarrow.DictionaryArray.from_arrays([0, 1, None], pyarrow.array(values, kind))
    write_arrow(tmp_path / "a.arrow", pyarrow.table({"text": texts}))
    found, tally = read(tmp_path / "a.arrow")
    assert [document.text for document in found] == [text for text in values if text]
    assert len(found) + tally.skipped["empty documents"] == 3


def test_rows_without_end(tmp_path):
    """A column without values has as many rows as one says, and takes no bytes."""
    path = tmp_path / "a.arrow"
    write_arrow(path, pyarrow.table({"text": pyarrow.nulls(100)}))
    assert read(path)[1].skipped["empty documents"] == 100
    nothing = pyarrow.null()
    for meta in (
        pyarrow.Array.from_buffers(nothing, 10**15, [None]),
        pyarrow.array([{"set": None}] * 3),
    ):
        texts = pyarrow.Array.from_buffers(nothing, len(meta), [None])
        batch = pyarrow.record_batch({"text": texts, "meta": meta})
        options = pyarrow.ipc.IpcWriteOptions(allow_64bit=True)
        with pyarrow.ipc.new_stream(path, batch.schema, options=options) as writer:
            writer.write(batch)
        match = (
            "says that it has 1,000,000,000,000,000 rows"
            if len(meta) > 3
            else r'no text under subset_key "meta"'
        )
        with pytest.raises(ValueError, match=match):
            read(path, subset_key="meta")


def test_a_dictionary_that_lacks_what_a_row_has(tmp_path):
    """pyarrow would read behind its end."""
    texts = pyarrow.DictionaryArray.from_arrays([0, 9], pyarrow.array(["a text"]), safe=False)
    write_arrow(tmp_path / "a.arrow", pyarrow.table({"text": texts}))
    with pytest.raises(ValueError, match=r"a\.arrow cannot be read as Arrow"):
        read(tmp_path / "a.arrow")


@pytest.mark.parametrize("kind", ["binary", "dictionary"])
def test_which_text_of_arrow_is_too_long(tmp_path, monkeypatch, kind):
    """In a later batch; an empty one before it has no longest text."""
    for module in (columnar, formats):
        monkeypatch.setattr(module, "LONGEST_TEXT", 1 << 20)
    schema = pyarrow.schema({"text": pyarrow.string()})
    texts = ["a text"] * 9 + ["a text" * 200_000]
    if kind == "dictionary":
        schema = pyarrow.schema({"text": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", schema) as writer:
        for part in (texts[:5], [], texts[5:]):
            column = pyarrow.array(part, schema[0].type)
            writer.write(pyarrow.record_batch([column], schema=schema))
    with pytest.raises(ValueError, match=r"a\.arrow, row 9: a text of 1 MiB"):
        read(tmp_path / "a.arrow")


def test_arrow_before_it_had_marks(tmp_path):
    """Streams could end with the file."""
    table = pyarrow.table({"text": ["a text"] * 9})
    path = tmp_path / "a.arrow"
    options = pyarrow.ipc.IpcWriteOptions(use_legacy_format=True)
    with pyarrow.ipc.new_stream(path, table.schema, options=options) as writer:
        writer.write_table(table)
    sound = path.read_bytes()
    assert sound[:4] != b"\xff" * 4 and sound.endswith(bytes(4))
    path.write_bytes(sound[:-4])
    assert len(read(path)[0]) == 9
