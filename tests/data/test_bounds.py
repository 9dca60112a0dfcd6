"""Files made to fill memory, by accident or not: refused, or given in pieces."""

import base64
import collections
import io
import itertools
import json
import subprocess
import sys
import textwrap
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pyarrow.parquet.encryption as encryption
import pytest
import zstandard

from tinyllama_jax.config import SourceConfig
from tinyllama_jax.data import columnar, formats, parquet_pages
from tinyllama_jax.data.arrow_messages import most_unpacked
from tinyllama_jax.data.sources import Tally, list_inputs, read_documents


@pytest.fixture
def short(monkeypatch):
    """Pieces and lines of a few kB in place of many MB."""
    monkeypatch.setattr(formats, "PIECE_BYTES", 5_000)
    monkeypatch.setattr(formats, "_LONGEST_LINE", 5_000)
    monkeypatch.setattr(formats, "_CHUNK_BYTES", 1_000)


def read(path, **settings):
    source = SourceConfig(name="books", path=str(path), validation_fraction=0.0, **settings)
    tally = Tally()
    (entry,) = list_inputs(source)
    return list(read_documents(source, entry, tally)), tally


@pytest.mark.parametrize(
    "text", ["a line\n" * 4000, "no line end 🦙" * 2000, "🦙" * 7000, "x" * 9000]
)
def test_a_long_text_comes_in_pieces(tmp_path, short, text):
    (tmp_path / "a.txt").write_text(text)
    found, tally = read(tmp_path / "a.txt")
    assert len(found) > 1 and {document.record for document in found} == {0}
    assert "".join(document.text for document in found) == text
    assert all(len(document.text.encode()) <= 6_000 for document in found)
    if "\n" in text:
        assert all(document.text.endswith("\n") for document in found)
    assert tally.repaired == {"documents given in pieces of 64 MiB": 1}


def test_a_short_text_is_whole(tmp_path, short):
    (tmp_path / "a.txt").write_text("word " * 900)
    found, tally = read(tmp_path / "a.txt")
    assert len(found) == 1 and not tally.repaired


def test_a_long_one_among_separated_documents(tmp_path, short):
    long = "a line of it\n" * 900
    (tmp_path / "a.txt").write_text(f"first\n<|end|>\n{long}<|end|>\nlast\n")
    found, tally = read(tmp_path / "a.txt", separator="<|end|>")
    assert [found[0].text, found[-1].text] == ["first", "last"]
    assert [d.record for d in found] == [0] + [1] * (len(found) - 2) + [2]
    assert "".join(document.text for document in found[1:-1]) == long.removesuffix("\n")
    assert tally.repaired == {"documents given in pieces of 64 MiB": 1}


@pytest.mark.parametrize("begin", ["a\n", "\n", ""])
def test_a_long_stretch_without_a_line_end_comes_in_pieces_too(tmp_path, short, begin):
    """Also behind a line end, which is kept back: it may belong to the separator."""
    text = begin + "x" * 20_000
    (tmp_path / "a.txt").write_text(text)
    found, _ = read(tmp_path / "a.txt", separator="<|end|>")
    assert "".join(document.text for document in found) == text
    assert (
        len(found) > 3 and max(len(document.text) for document in found) <= 7_000
    )  # and two chunks


def test_a_line_that_no_document_has(tmp_path, short):
    good, long = json.dumps({"text": "good"}), json.dumps({"text": "x" * 9000})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{long}\n{good}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: this line has more than .*leave it out"):
        read(tmp_path / "a.jsonl")


MEASURED = """
    import itertools, sys
    from tinyllama_jax.config import SourceConfig
    from tinyllama_jax.data.sources import Tally, list_inputs, read_documents
    import pyarrow.parquet, zstandard
    def status(name):
        lines = open("/proc/self/status").read().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) // 1024
    source = SourceConfig(path=sys.argv[1])
    (entry,) = list_inputs(source)
    # The peak that getrusage tells of begins with what the parent had.
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    try:
        for document in itertools.islice(read_documents(source, entry, Tally()), int(sys.argv[2])):
            pass
    except ValueError as error:
        print(error)
    print(status("VmHWM") - before)
"""


def megabytes_used(path, documents=10**9):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURED), str(path), str(documents)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    *said, used = done.stdout.splitlines()
    return "\n".join(said), int(used)


@pytest.mark.parametrize("lines", [1, 200_000])
def test_memory_follows_the_document_not_the_file(tmp_path, lines):
    """60 MB of JSONL, as one line or as 200,000, cost a few times the longest line."""
    size = 60_000_000
    with open(tmp_path / "a.jsonl", "w") as file:
        for _ in range(lines):
            file.write('{"text": "' + "sixteen letters " * (size // 16 // lines) + '"}\n')
    said, used = megabytes_used(tmp_path / "a.jsonl")
    assert said == ""
    assert used < 5 * size / lines / 1e6 + 20


def test_a_bomb(tmp_path):
    """1 GB of one letter in 33 kB of zstd."""
    packer = zstandard.ZstdCompressor().compressobj()
    packed = [packer.compress(b'{"text": "')]
    packed += [packer.compress(b"x" * (1 << 20)) for _ in range(1024)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join([*packed, packer.flush()]))
    said, used = megabytes_used(tmp_path / "a.jsonl.zst")
    assert "this line has more than 256 MiB" in said
    assert used < 1200


@pytest.mark.parametrize("rows", ["books", "the same book", "letters, then books"])
def test_books_in_parquet(tmp_path, rows):
    """Rows of 4 MB are not read by the hundred, whatever the file says of their sizes."""
    book = "a book " * 600_000
    texts = {
        "books": [f"{number} {book}" for number in range(100)],
        "the same book": [book] * 300,
        "letters, then books": ["a"] * 60_000 + [f"{number} {book}" for number in range(100)],
    }[rows]
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", write_batch_size=4)
    said, used = megabytes_used(tmp_path / "a.parquet")
    assert not said and used < 200


def test_a_large_row_group_in_parquet(tmp_path):
    """400 MB in one, which packs badly: what was read is not kept."""
    letters = np.random.default_rng(0).integers(97, 123, 400_000_000, dtype=np.uint8).tobytes()
    books = [letters[start : start + 4_000_000] for start in range(0, len(letters), 4_000_000)]
    table = pyarrow.table({"text": pyarrow.array(books, pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", write_batch_size=4)
    assert pyarrow.parquet.read_metadata(tmp_path / "a.parquet").num_row_groups == 1
    said, used = megabytes_used(tmp_path / "a.parquet")
    assert not said and used < 200


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_large_page_in_parquet(tmp_path, dictionary):
    """420 MB in one page, as pyarrow writes by default, and as others do."""
    table = pyarrow.table({"text": [f"{number} " + "a book " * 600_000 for number in range(100)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=dictionary)
    said, used = megabytes_used(tmp_path / "a.parquet")
    assert not said and used < 1100


@pytest.mark.parametrize("rows", [1000, 2000])
def test_too_large_a_page_in_parquet(tmp_path, monkeypatch, rows):
    """What 1,000 rows have in common, and 1,000 more that go without, are unpacked at once."""
    monkeypatch.setattr(parquet_pages, "_MOST_UNPACKED", 10_000_000)
    table = pyarrow.table({"text": [f"{number:4} " + "a book " * 850 for number in range(rows)]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, dictionary_pagesize_limit=1)
    if rows == 1000:
        assert len(read(path)[0]) == rows
        return
    with pytest.raises(ValueError, match="row group 0 has pages of 11,") as refused:
        read(path)
    *_, mend = str(refused.value).split("smaller ones: ")
    exec(mend.replace("NEW", repr(str(path))))
    assert [d.text for d in read(path)[0]] == table["text"].to_pylist()


def pages_of(path):
    with open(path, "rb") as file:
        names = pyarrow.parquet.read_schema(path).names
        groups = parquet_pages._chunks(file, [name == "text" for name in names])
        return [list(parquet_pages._pages(file, chunk)) for (chunk,) in groups]


def test_small_texts_in_a_large_page_are_read_many_at_once(tmp_path):
    """DuckDB writes all of 122,880 rows into one: they are not read one by one."""
    texts = [f"{number} " + "a page " * 60 for number in range(200_000)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False,
        data_page_size=1 << 30, write_batch_size=200_000, max_rows_per_page=200_000,
    )  # fmt: skip
    (page,) = pages_of(tmp_path / "a.parquet")[0]
    assert page.unpacked > 80_000_000
    with parquet_pages.open_parquet(str(tmp_path / "a.parquet")) as file:
        batches = parquet_pages.bounded_batches(str(tmp_path / "a.parquet"), file, ["text"], 16)
        assert len(next(batches)) == 16


def test_only_the_subset_of_a_struct_is_read(tmp_path, monkeypatch):
    """What else is in it may be large."""
    monkeypatch.setattr(parquet_pages, "_MOST_UNPACKED", 10_000)
    meta = [{"set": "wiki", "page": f"{number} " * 100} for number in range(300)]
    table = pyarrow.table({"text": ["a text"] * 300, "meta": meta})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found, _ = read(tmp_path / "a.parquet", subset_key="meta.set")
    assert [(d.text, d.subset) for d in found] == [("a text", "wiki")] * 300
    with pytest.raises(ValueError, match=r"has pages of 1\d\d,"):
        read(tmp_path / "a.parquet", subset_key="meta")


def test_a_name_with_a_point(tmp_path, monkeypatch):
    table = pyarrow.table({"a.b": [f"{number} " * 9 for number in range(100)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert len(read(tmp_path / "a.parquet", text_key="a.b")[0]) == 100
    monkeypatch.setattr(parquet_pages, "_MOST_UNPACKED", 1000)
    with pytest.raises(ValueError, match="has pages of 3,"):
        read(tmp_path / "a.parquet", text_key="a.b")


def test_a_page_of_another_kind_does_not_lift_the_bound(tmp_path, monkeypatch):
    """An index page (kind 1, of 0 bytes) before the others, which pyarrow passes over."""
    table = pyarrow.table({"text": [f"{number} " * 9 for number in range(100)]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path)
    sound = path.read_bytes()
    (pages,) = pages_of(path)
    index = bytes([0x15, 2, 0x15, 0, 0x15, 0, 0x3C, 0, 0])
    start = pyarrow.parquet.read_metadata(path).row_group(0).column(0).dictionary_page_offset
    assert start == 4
    whole = io.BytesIO(index + sound[start:])
    chunk = parquet_pages._Chunk(0, 100)
    assert list(parquet_pages._pages(whole, chunk))[1:] == pages


def page(*fields):
    """A header of 7 values in 9 bytes, packed in 5, with fields changed, and those bytes."""
    kind, unpacked, packed, rest = fields
    return bytes([0x15, kind, 0x15, unpacked, 0x15, packed, *rest, 0]) + b"12345"


OF_DATA, OF_DICTIONARY = (0x2C, 0x15, 2 * 7, 0), (0x4C, 0x15, 2 * 7, 0)


@pytest.mark.parametrize(
    "refused",
    [
        page(0, 2 * 9 + 1, 2 * 5, OF_DATA),  # -10 bytes: 4 GB, to who reads 32 bits
        page(0, 2 * 9, 1, OF_DATA),
        page(0, 2 * 9, 2 * 5, (0x2C, 0x15, 1, 0)),
        page(0, 2 * 9, 2 * 5, OF_DICTIONARY),
        page(0, 2 * 9, 2 * 5, (*OF_DATA, 0x05, 0x84, 0x80, 0x08, 2)),  # the second field once more
        b"",
    ],
)
def test_headers_of_pages_that_make_no_sense(tmp_path, refused):

    sound = page(0, 2 * 9, 2 * 5, OF_DATA)
    passed_over = page(2, 2 * 9, 2 * 5, OF_DATA)
    chunk = parquet_pages._Chunk(0, 14)
    path = tmp_path / "a.parquet"
    path.write_bytes(sound + passed_over + sound)
    with path.open("rb") as file:
        found = [tuple(page) for page in parquet_pages._pages(file, chunk)]
    assert found == [(False, 9, 7, False), (False, 9, 1, False), (False, 9, 7, False)]
    path.write_bytes(sound + refused)
    with path.open("rb") as file, pytest.raises(ValueError, match=f"near byte {len(sound)} it"):
        list(parquet_pages._pages(file, chunk))
    with path.open("rb") as file, pytest.raises(ValueError, match=f"near byte {1 << 63:,} it"):
        list(parquet_pages._pages(file, parquet_pages._Chunk(1 << 63, 14)))


def test_a_row_group_without_rows_does_not_lift_the_bound(tmp_path, monkeypatch):
    table = pyarrow.table({"text": [f"{number} " * 9 for number in range(100)]})
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for part in (table, table.slice(0, 0), table):
            writer.write_table(part)
    metadata = pyarrow.parquet.read_metadata(tmp_path / "a.parquet")
    assert [metadata.row_group(number).num_rows for number in range(3)] == [100, 0, 100]
    assert len(read(tmp_path / "a.parquet")[0]) == 200
    monkeypatch.setattr(parquet_pages, "_MOST_UNPACKED", 1000)
    with pytest.raises(ValueError, match="row group 0 has pages of 3,"):
        read(tmp_path / "a.parquet")


def group_of_one_chunk(*places):
    """A row group as parquet writes it: 7 values of "text", with the places of its pages."""
    about = bytes([0x39, 0x18, 4, *b"text", 0x26, 2 * 7, *places, 0])  # a list of texts, a number
    return bytes([0x19, 0x1C, 0x3C, *about, 0, 0])  # a list of structs with one in the third field


def test_a_chunk_whose_dictionary_is_nowhere():
    """Some writers say 0, or less, where there is none."""
    for place, start in ((2 * 5, 5), (0, 9), (1, 9)):  # 1: -1
        content = parquet_pages._Compact(group_of_one_chunk(0x46, 2 * 9, 0x26, place))
        assert list(parquet_pages._chunks_of_group(content, [True])) == [(start, 7)]
        assert content.at == len(content.content)
    content = parquet_pages._Compact(group_of_one_chunk(0x46, 2 * 9, 0x06, 2 * 9, 2 * 9))
    with pytest.raises(ValueError, match="field 9 is there twice"):
        list(parquet_pages._chunks_of_group(content, [True]))


def test_a_footer_that_hides_a_row_group(tmp_path, monkeypatch):
    """All that pyarrow reads must have been sized."""
    table = pyarrow.table({"text": [f"{number} " * 9 for number in range(100)]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=50)
    assert len(read(path)[0]) == 100
    chunks = parquet_pages._chunks
    monkeypatch.setattr(parquet_pages, "_chunks", lambda *of: itertools.islice(chunks(*of), 1))
    with pytest.raises(ValueError, match="does not tell how large its pages are"):
        read(path)


LONG = b"\xff" * 8 + b"\x7f"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x4c", b"\x49\xfc", b"\x1c" * 5000, b"\x49\x1c\x1d", b"\x18" + LONG,
        # Lists of more than the footer has: of bytes, numbers, truth values; a number too large.
        b"\x19\xf3" + LONG, b"\x19\xf7" + LONG, b"\x19\xf1" + LONG, b"\x05\x88\x80\x08\0\0",
    ],
)  # fmt: skip
def test_a_senseless_footer(tmp_path, content):
    path = tmp_path / "a.parquet"
    path.write_bytes(content + len(content).to_bytes(4, "little") + b"PAR1")
    with path.open("rb") as file, pytest.raises(ValueError, match=r"a\.parquet cannot be read"):
        list(parquet_pages._chunks(file, [True]))


def test_a_file_of_many_columns_and_row_groups(tmp_path):
    """Its footer is gone through, and not kept."""
    table = pyarrow.table({**{f"c{number}": [number] for number in range(30)}, "text": ["a text"]})
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for _ in range(2000):
            writer.write_table(table)
    said, used = megabytes_used(tmp_path / "a.parquet")
    assert not said and used < 120


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_two_columns_of_one_name(tmp_path, format):
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    if format == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        pyarrow.feather.write_feather(table, tmp_path / "a.arrow")
    with pytest.raises(ValueError, match=rf"a\.{format} has several columns 'text'"):
        read(tmp_path / f"a.{format}")


@pytest.mark.parametrize("key", ["text", "other"])
def test_an_encrypted_column(tmp_path, key):
    """Whichever column pyarrow is asked of, it ends the process where one is encrypted."""
    factory = encryption.CryptoFactory(lambda _: Plain())
    settings = encryption.EncryptionConfiguration(
        footer_key="k", column_keys={"k": [key]}, plaintext_footer=True
    )
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), settings)
    table = pyarrow.table({"text": ["a text"] * 9, "other": ["another"] * 9})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, encryption_properties=properties)
    if key == "other":
        assert [document.text for document in read(path)[0]] == ["a text"] * 9
    else:
        with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet: .*decrypt"):
            read(path)


class Plain(encryption.KmsClient):
    """Keeps keys as they are."""

    def wrap_key(self, key_bytes, master_key_identifier):
        return base64.b64encode(key_bytes)

    def unwrap_key(self, wrapped_key, master_key_identifier):
        return base64.b64decode(wrapped_key)


@pytest.mark.parametrize(
    "settings", [{}, {"data_page_version": "2.0"}, {"use_dictionary": False, "compression": "zstd"}]
)
def test_damaged_parquet(tmp_path, settings):
    """Whatever bytes of a file are others: its texts, or an error that names it."""
    texts = [f"{number} " * 9 for number in range(100)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), path, write_page_checksum=True, **settings
    )
    sound = path.read_bytes()
    place = np.random.default_rng(0)
    outcomes = collections.Counter()
    for _ in range(1500):
        damaged = bytearray(sound)
        for at in place.integers(0, len(sound), place.integers(1, 4)):
            damaged[at] = place.choice([0, 0x18, 0x7F, 0xFF, place.integers(256)])
        path.write_bytes(damaged)
        try:
            found = [document.text for document in read(path)[0]]
        except ValueError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
        else:
            assert found == texts
            outcomes["read"] += 1
    assert min(outcomes["refused"], outcomes["read"]) > 20


def test_one_large_text_in_every_row_of_parquet(tmp_path):
    """40,000 times 100 MB, in a file of 100 MB: a page's value that rows share."""
    book = pyarrow.array(["a book " * 14_000_000])
    rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 40_000), book)
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    said, used = megabytes_used(tmp_path / "a.parquet", documents=20)
    assert not said and used < 1400


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


def write_arrow(path, table, kind="file", **options):
    new = {"file": pyarrow.ipc.new_file, "stream": pyarrow.ipc.new_stream}[kind]
    packing = pyarrow.ipc.IpcWriteOptions(compression=options.pop("compression", None))
    with new(path, table.schema, options=packing) as writer:
        writer.write_table(table, **options)


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


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_a_text_that_no_document_has(tmp_path, short, format):
    table = pyarrow.table({"text": ["a text", "x" * 9000]})
    path = tmp_path / f"a.{format}"
    if format == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        write_arrow(path, table)
    with pytest.raises(ValueError, match=rf"a\.{format}, row 1: a text of 0 MiB, which no docum"):
        read(path)


def test_a_chunk_of_another_name_is_sized_too(tmp_path, monkeypatch):
    """pyarrow goes by its place, whatever the chunk says of its name."""
    monkeypatch.setattr(parquet_pages, "_MOST_UNPACKED", 1000)
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{number} " * 9 for number in range(100)]})
    pyarrow.parquet.write_table(table, path, store_schema=False)
    content = path.read_bytes()
    at = content.rindex(b"\x04text")
    path.write_bytes(content[: at + 1] + b"n" + content[at + 2 :])
    with pytest.raises(ValueError, match="has pages of 3,"):
        read(path)


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


def test_the_largest_batch_of_arrow_counts(tmp_path):
    options = pyarrow.ipc.IpcWriteOptions(compression="lz4")
    schema = pyarrow.schema({"text": pyarrow.string()})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", schema, options=options) as writer:
        for texts in (["a text " * 5000], ["a text"]):
            writer.write(pyarrow.record_batch({"text": texts}))
    with pyarrow.memory_map(str(tmp_path / "a.arrow")) as file:
        unpacked = most_unpacked(pyarrow.ipc.MessageReader.open_stream(file), schema, [0])
    assert 35_000 <= unpacked <= 35_100


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"data_page_version": "2.0"}, {"compression": "zstd"}, {"compression": "none"},
        {"use_dictionary": False}, {"write_page_checksum": True}, {"write_statistics": False},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"},
         "data_page_version": "2.0"},
        {"write_page_index": True},
    ],
)  # fmt: skip
def test_the_sizes_of_pages(tmp_path, settings):
    """All that a column has, but for the headers, in which the least and the greatest value are."""
    texts = [f"{number} " * (number % 97) for number in range(20_000)]
    table = pyarrow.table({"other": range(len(texts)), "text": texts})
    pyarrow.parquet.write_table(
        table, tmp_path / "a.parquet", data_page_size=10_000, row_group_size=9_000, **settings
    )
    metadata = pyarrow.parquet.read_metadata(tmp_path / "a.parquet")
    found = pages_of(tmp_path / "a.parquet")
    assert metadata.num_row_groups == len(found) == 3
    delta = "column_encoding" in settings
    assert {page.beginnings_shared for page in found[0]} == {delta}
    for number in range(3):
        sizes = [page.unpacked for page in found[number]]
        headers = metadata.row_group(number).column(1).total_uncompressed_size - sum(sizes)
        assert len(sizes) > 1 and 10 * len(sizes) < headers < 1000 * len(sizes)


def test_a_flood_of_line_ends(tmp_path):
    """16 MiB of nothing in 600 bytes of zstd."""
    packer = zstandard.ZstdCompressor().compressobj()
    packed = [packer.compress(b"\n" * (1 << 20)) for _ in range(16)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join([*packed, packer.flush()]))
    said, used = megabytes_used(tmp_path / "a.jsonl.zst")
    assert not said and used < 120
