"""Parquet files made to fill memory, to end the process, or to hide rows."""

import base64
import collections
import itertools

import numpy as np
import pyarrow
import pyarrow.parquet
import pyarrow.parquet.encryption as encryption
import pytest

from tests.data.reading import megabytes_used, read
from tinyllama_jax.data import formats, parquet_pages, thrift_compact


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
    monkeypatch.setattr(parquet_pages, "MOST_UNPACKED", 10_000_000)
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


def test_many_short_texts_in_a_dictionary(tmp_path, monkeypatch):
    """pyarrow has more bytes for their places than they have themselves."""
    texts = [f"{number:05x}" for number in range(1 << 20)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), path, dictionary_pagesize_limit=1 << 30
    )
    (dictionary, *_) = pages_of(path)[0]
    assert dictionary[:3] == (True, (4 + 5 + 20) << 20, 1 << 20)
    said, used = megabytes_used(path, documents=1)
    assert not said and 25 < used < 90  # 29 MiB, and what pyarrow has of its own
    monkeypatch.setattr(parquet_pages, "MOST_UNPACKED", 20 << 20)
    with pytest.raises(ValueError, match="row group 0 has pages of 3"):
        read(path)


def pages_of(path):
    with open(path, "rb") as file:
        names = pyarrow.parquet.read_schema(path).names
        groups = parquet_pages._chunks(file, [1 if name == "text" else None for name in names])
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
    monkeypatch.setattr(parquet_pages, "MOST_UNPACKED", 10_000)
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
    monkeypatch.setattr(parquet_pages, "MOST_UNPACKED", 1000)
    with pytest.raises(ValueError, match="has pages of 5,"):
        read(tmp_path / "a.parquet", text_key="a.b")


def chunk_of(start, values, codec=0, has_levels=False):
    return parquet_pages._Chunk(start, values, codec, has_levels)


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
        page(0, 2 * 9, 2 * 5, (*OF_DATA, 0x05, 0xFB, 0xFF, 0x07, 2)),  # likewise: -65534
        # Of other kinds than parquet has there: pyarrow passes over them.
        b"\x16" + page(0, 2 * 9, 2 * 5, OF_DATA)[1:],
        page(0, 2 * 9, 2 * 5, (0x25, 2 * 7)),
        page(0, 2 * 9, 2 * 5, (0x2C, 0x16, 2 * 7, 0)),
        page(2 * 1, 0, 0, (0x3C, 0)),  # of an index: nobody writes it, and pyarrow passes over it
        # To who reads 64 bits: 1 << 32.
        page(0, 2 * 9, 2 * 5, OF_DATA)[:1] + b"\x80\x80\x80\x80\x20" + page(0, 18, 10, OF_DATA)[2:],
        b"",
    ],
)
def test_headers_of_pages_that_make_no_sense(tmp_path, refused):

    sound = page(0, 2 * 9, 2 * 5, OF_DATA)
    small = page(0, 2 * 3, 2 * 5, OF_DATA)
    chunk = chunk_of(4, 14)
    path = tmp_path / "a.parquet"
    dictionary = page(2 * 2, 2 * 9, 2 * 5, OF_DICTIONARY)
    path.write_bytes(b"PAR1" + sound + dictionary + small)
    with path.open("rb") as file:
        found = [tuple(page) for page in parquet_pages._pages(file, chunk)]
    # Each text of a dictionary takes 20 bytes beside its page.
    dictionary = (True, 9 + 7 * 20, 7, False)
    assert found == [(False, 9, 7, False), dictionary, (False, 5, 7, False)]
    path.write_bytes(b"PAR1" + sound + refused)
    with path.open("rb") as file, pytest.raises(ValueError, match=f"near byte {4 + len(sound)} it"):
        list(parquet_pages._pages(file, chunk))
    with path.open("rb") as file, pytest.raises(ValueError, match=f"near byte {1 << 63:,} it"):
        list(parquet_pages._pages(file, chunk_of(1 << 63, 14)))
    with path.open("rb") as file, pytest.raises(ValueError, match="near byte 0 it"):
        list(parquet_pages._pages(file, chunk_of(0, 14)))


def test_a_row_group_without_rows_does_not_lift_the_bound(tmp_path, monkeypatch):
    table = pyarrow.table({"text": [f"{number} " * 9 for number in range(100)]})
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for part in (table, table.slice(0, 0), table):
            writer.write_table(part)
    metadata = pyarrow.parquet.read_metadata(tmp_path / "a.parquet")
    assert [metadata.row_group(number).num_rows for number in range(3)] == [100, 0, 100]
    assert len(read(tmp_path / "a.parquet")[0]) == 200
    monkeypatch.setattr(parquet_pages, "MOST_UNPACKED", 1000)
    with pytest.raises(ValueError, match="row group 0 has pages of 5,"):
        read(tmp_path / "a.parquet")


def group_of_one_chunk(*places, columns=0x19, of_columns=0x1C, of_names=0x18, values=0x16):
    """A row group as parquet writes it: 7 values of "text", with the places of its pages."""
    # A list of texts and two numbers; a list of structs with one in the third field.
    about = bytes([0x39, of_names, 4, *b"text", 0x15, 2 * 6, values, 2 * 7, *places, 0])
    return bytes([columns, of_columns, 0x3C, *about, 0, 0])


def test_a_chunk_whose_dictionary_is_nowhere():
    """Some writers say 0, or less, where there is none."""
    for place, start in ((2 * 5, 5), (0, 9), (1, 9)):  # 1: -1
        content = thrift_compact.Compact(group_of_one_chunk(0x46, 2 * 9, 0x26, place))
        assert list(parquet_pages._chunks_of_group(content, [1])) == [(start, 7, 6, True)]
        assert content.at == len(content.content)


@pytest.mark.parametrize(
    "places, kinds, refused",
    [
        ((0x46, 2 * 9, 0x06, 2 * 9, 2 * 9), {}, "field 9 is there twice"),
        # Of other kinds than parquet has there: pyarrow passes over them.
        ((0x46, 2 * 9, 0x25, 2 * 5), {}, "kind 5 where 6 belongs"),
        ((0x46, 2 * 9), {"columns": 0x1A}, "kind 10 where a list belongs"),
        ((0x46, 2 * 9), {"columns": 0x18}, "kind 8 where a list belongs"),
        # Others read what a list should have, whatever it says that it has.
        ((0x46, 2 * 9), {"of_columns": 0x18}, "list of kind 8 where one of 12 belongs"),
        ((0x46, 2 * 9), {"of_names": 0x13}, "list of kind 3 where one of 8 belongs"),
        ((0x46, 2 * 9, 0x49, 0x15), {}, "list of kind 5 where one of 12 belongs"),
        ((0x46, 2 * 9), {"values": 0x15}, "kind 5 where 6 belongs"),
    ],
)
def test_a_chunk_of_which_others_would_read_something_else(places, kinds, refused):
    content = thrift_compact.Compact(group_of_one_chunk(*places, **kinds))
    with pytest.raises(ValueError, match=refused):
        list(parquet_pages._chunks_of_group(content, [1]))
    if "there twice" not in refused and "where 6" not in refused:  # those, pyarrow does not read
        content = thrift_compact.Compact(group_of_one_chunk(*places, **kinds))
        with pytest.raises(ValueError, match=refused):
            list(parquet_pages._chunks_of_group(content, [None]))


def test_a_footer_that_hides_a_row_group(tmp_path, monkeypatch):
    """All that pyarrow reads must have been sized."""
    table = pyarrow.table({"text": [f"{number} " * 9 for number in range(100)]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=50)
    assert len(read(path)[0]) == 100
    chunks = parquet_pages._chunks
    monkeypatch.setattr(parquet_pages, "_chunks", lambda *of: itertools.islice(chunks(*of), 1))
    with pytest.raises(ValueError, match=r"does not tell how large .* \(only of 1 row groups\)"):
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
        list(parquet_pages._chunks(file, [1]))


def test_a_file_of_many_columns_and_row_groups(tmp_path):
    """Its footer is gone through, and not kept."""
    table = pyarrow.table({**{f"c{number}": [number] for number in range(30)}, "text": ["a text"]})
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for _ in range(2000):
            writer.write_table(table)
    said, used = megabytes_used(tmp_path / "a.parquet")
    assert not said and used < 120


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
    "settings",
    [
        {}, {"data_page_version": "2.0"}, {"use_dictionary": False, "compression": "zstd"},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    ],
)  # fmt: skip
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


def test_a_chunk_of_another_name_is_sized_too(tmp_path, monkeypatch):
    """pyarrow goes by its place, whatever the chunk says of its name."""
    monkeypatch.setattr(parquet_pages, "MOST_UNPACKED", 1000)
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{number} " * 9 for number in range(100)]})
    pyarrow.parquet.write_table(table, path, store_schema=False)
    content = path.read_bytes()
    at = content.rindex(b"\x04text")
    path.write_bytes(content[: at + 1] + b"n" + content[at + 2 :])
    with pytest.raises(ValueError, match="has pages of 5,"):
        read(path)


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
        # Each text has two lengths of 4 bytes, and one of a dictionary 20 bytes, beside the page.
        sizes = [
            page.unpacked - page.values * (20 if page.is_dictionary else 8 * delta)
            for page in found[number]
        ]
        headers = metadata.row_group(number).column(1).total_uncompressed_size - sum(sizes)
        assert len(sizes) > 1 and 10 * len(sizes) < headers < 1000 * len(sizes)


@pytest.mark.parametrize(
    "encoding, lists", [("DELTA_LENGTH_BYTE_ARRAY", 1), ("DELTA_BYTE_ARRAY", 2)]
)
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
@pytest.mark.parametrize("kind", ["all there", "some missing", "in a struct", "none can miss"])
def test_lengths_in_a_page(tmp_path, monkeypatch, encoding, lists, version, codec, kind):
    """As many as there are texts, of as many kinds as the encoding has."""
    texts = [f"{number // 7} " * (number % 97) for number in range(2129)]
    if kind != "none can miss":
        texts[0] = ""
    if kind == "some missing":
        texts[5::3] = [None] * len(texts[5::3])
    column, key = pyarrow.array(texts), "text"
    if kind == "in a struct":
        rows = [None if number % 5 == 3 else {"text": text} for number, text in enumerate(texts)]
        column, key = pyarrow.array(rows), "text.text"
    field = pyarrow.field("text", column.type, nullable=kind != "none can miss")
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table([column], schema=pyarrow.schema([field])), path, use_dictionary=False,
        column_encoding={key: encoding}, data_page_version=version, compression=codec,
        data_page_size=5000, row_group_size=2000,
    )  # fmt: skip
    found = []
    monkeypatch.setattr(
        parquet_pages, "_lengths",
        lambda *of, lengths=parquet_pages._lengths: found.append(lengths(*of)) or found[-1],
    )  # fmt: skip
    with parquet_pages.open_parquet(str(path)) as file:
        batches = list(parquet_pages.bounded_batches(str(path), file, ["text"], 16))
    column = pyarrow.Table.from_batches(batches).column("text")
    texts = column.combine_chunks().flatten()[0] if kind == "in a struct" else column
    assert len(found) > 2 and sum(found) == lists * (len(texts) - texts.null_count) > 1300


def number_of(value):
    """As parquet writes it where it is not negative: 7 bits a byte, the last below 128."""
    low, high = value % 128, value // 128
    return bytes([low | 128]) + number_of(high) if high else bytes([low])


def list_of_zeros(length, in_block, blocks):
    """Of differences: blocks with one part, whose numbers have no bits."""
    return b"".join(map(number_of, (in_block, 1, length, 0))) + bytes([0, 0]) * blocks


LENGTHS = 1 << 29
ZEROS = list_of_zeros(LENGTHS, 1 << 20, LENGTHS >> 20)


@pytest.mark.parametrize(
    "encoding, content",
    [
        ("DELTA_LENGTH_BYTE_ARRAY", ZEROS),
        ("DELTA_BYTE_ARRAY", ZEROS),
        ("DELTA_BYTE_ARRAY", list_of_zeros(16, 128, 1) + ZEROS),
        ("DELTA_BYTE_ARRAY", list_of_zeros(LENGTHS // 2, 1 << 20, LENGTHS >> 21) * 2),
    ],
)
def test_lengths_without_end_in_a_page(tmp_path, encoding, content):
    """Of 2 GiB in a page of 3 kB."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [f"{number:x} text " * 100 for number in range(16)]}), path,
        use_dictionary=False,
        compression="none", column_encoding={"text": encoding}, write_statistics=False,
    )  # fmt: skip
    written = path.read_bytes()
    start = written.index(b"\x80\x01\x04\x10")  # a list of 16, in blocks of 128 in 4 parts
    assert start < 100 and len(content) < 3000
    path.write_bytes(written[:start] + content + written[start + len(content) :])
    said, used = megabytes_used(path)
    assert "does not tell how large its pages are" in said and used < 100


def test_a_page_that_its_codec_makes_no_smaller():
    """Some writers leave it plain, which only the second version can tell."""
    plain = list_of_zeros(5, 128, 1)
    packed = pyarrow.Codec("zstd").compress(list_of_zeros(9, 128, 1), asbytes=True)
    levels = b"12"
    about = {parquet_pages._LEVELS: 2, parquet_pages._LEVELS_OF_LISTS: 0}
    for content, is_packed, found in ((plain, False, [5]), (packed, True, [9])):
        header = {
            parquet_pages._KIND: parquet_pages._DATA_V2,
            parquet_pages._UNPACKED: 2 + len(list_of_zeros(9, 128, 1)),
            parquet_pages._OF_DATA_V2: {**about, parquet_pages._IS_PACKED: is_packed},
        }
        readings = parquet_pages._readings(levels + content, header, chunk_of(0, 14, 6, True))
        assert [parquet_pages._lengths(reading, 1, 14) for reading in readings] == found
    chunk = chunk_of(0, 14, 6, True)
    with pytest.raises(ValueError, match="ZSTD"):
        list(parquet_pages._readings(levels + plain, header, chunk))
    (nothing,) = parquet_pages._readings(levels, header, chunk)  # all its texts are missing
    assert parquet_pages._lengths(nothing, 1, 14) == 0
    del header[parquet_pages._OF_DATA_V2][parquet_pages._IS_PACKED]
    (reading,) = parquet_pages._readings(levels + packed, header, chunk)
    assert parquet_pages._lengths(reading, 1, 14) == 9
    header[parquet_pages._OF_DATA_V2][parquet_pages._IS_PACKED] = False
    # Files of long ago say so of packed pages too.
    assert len(list(parquet_pages._readings(levels + packed, header, chunk_of(0, 14, 6)))) == 2


@pytest.mark.parametrize(
    "head", [(0, 4, 9), (128, 0, 9), (128, 8, 9), (128, 256, 9), (1 << 32, 1, 9), (128, 4, 1 << 32),
             (1 << 27, 1, 9)],
)  # fmt: skip
def test_senseless_lists_of_lengths(head):
    behind = bytes(1 + head[1]) + list_of_zeros(9, 128, 1)
    sound = b"".join(map(number_of, (128, head[1] or 1, 9, 0)))
    if 0 < head[1] <= 4:
        assert parquet_pages._lengths(sound + behind, 2, 9) == 18
    content = b"".join(map(number_of, (*head, 0)))
    with pytest.raises((ValueError, ZeroDivisionError)):
        parquet_pages._lengths(content + behind, 2, 1 << 40)


def test_lists_are_no_texts(tmp_path):
    """A row of one may have any number of them, in a few bytes."""
    table = pyarrow.table({"text": ["a text"] * 3, "meta": [{"set": ["wiki"] * 2}] * 3})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert len(read(tmp_path / "a.parquet")[0]) == 3
    for key in ("meta", "meta.set"):
        with pytest.raises(ValueError, match=r"column meta\.set\.list\.element, .* has lists"):
            read(tmp_path / "a.parquet", subset_key=key)


def test_more_lengths_than_texts(tmp_path):
    """They would be gone through for long: a list of zeros packs into next to nothing."""
    content = list_of_zeros(8, 128, 1)
    of_data = (0x2C, 0x15, 2 * 7, 0x15, 2 * parquet_pages._DELTA_LENGTHS, 0)
    (tmp_path / "a").write_bytes(b"PAR1" + page(0, 2 * 9, 2 * len(content), of_data)[:-5] + content)
    with (
        (tmp_path / "a").open("rb") as file,
        pytest.raises(ValueError, match="8 lengths of 7 texts"),
    ):
        list(parquet_pages._pages(file, chunk_of(4, 7)))


def test_missing_values_that_have_a_width(tmp_path, monkeypatch):
    """pyarrow makes each as wide as the others."""
    texts = pyarrow.array([None] * 100, pyarrow.binary(5000))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    with parquet_pages.open_parquet(str(tmp_path / "a.parquet")) as file:
        for most, fitting in ((1 << 24, 16), (12_000, 2)):
            monkeypatch.setattr(parquet_pages, "_BATCH_BYTES", most)
            batches = parquet_pages.bounded_batches(str(tmp_path / "a.parquet"), file, ["text"], 16)
            assert len(next(batches)) == fitting
    monkeypatch.setattr(parquet_pages, "MOST_UNPACKED", 300_000)
    with pytest.raises(ValueError, match="has pages of 320,"):
        read(tmp_path / "a.parquet")


def test_a_dictionary_that_the_schema_tells_of(tmp_path, monkeypatch):
    """pyarrow has it more than once at a time."""
    texts = pyarrow.array([f"{number} " * 9 for number in range(100)])
    path = tmp_path / "a.parquet"
    for column in (texts, texts.dictionary_encode()):
        table = pyarrow.table({"text": column, "meta": [{"set": "wiki"}] * 100})
        pyarrow.parquet.write_table(table, path)
        monkeypatch.setattr(parquet_pages, "MOST_UNPACKED", 7_000)
        if column is texts:
            assert len(read(path, subset_key="meta.set")[0]) == 100
        else:
            with pytest.raises(ValueError, match="has pages of 15,"):
                read(path, subset_key="meta.set")


def test_a_footer_of_many_chunks(tmp_path, monkeypatch):
    """3 bytes tell of one, and pyarrow would make 700 of them."""
    path = tmp_path / "a.parquet"

    def footer(count, groups):
        group = b"\x19\xfc" + number_of(count) + b"\x26\0\0" * count + b"\0"
        content = b"\x49" + bytes([16 * groups + 0x0C]) + group * groups + b"\0"
        path.write_bytes(b"PAR1" + content + len(content).to_bytes(4, "little") + b"PAR1")

    footer(99_999, 14)
    said, used = megabytes_used(path)
    assert "columns of row groups, are not read" in said and used < 100
    monkeypatch.setattr(parquet_pages, "_ANY_FOOTER", 10)
    table = pyarrow.table({"text": [f"{number}" for number in range(100)]})
    pyarrow.parquet.write_table(table, path, row_group_size=10)
    assert len(read(path)[0]) == 100
    monkeypatch.setattr(parquet_pages, "_MOST_CHUNKS", 9)
    with pytest.raises(ValueError, match="or than 9 columns of row groups") as refused:
        read(path)
    *_, mend = str(refused.value).split("there is memory: ")
    exec(mend.replace("NEW", repr(str(path))))
    assert len(read(path)[0]) == 100
    monkeypatch.setattr(parquet_pages, "_LARGEST_FOOTER", 200)
    with pytest.raises(ValueError, match="more than 200 bytes"):
        read(path)


@pytest.mark.parametrize("columns", [(0, 2), (2, 2)])
def test_columns_that_are_there_twice(columns):
    """pyarrow reads the last."""
    lists = [bytes([0x19, 16 * count + 0x0C]) + b"\0" * count for count in columns]
    lists[1] = b"\x09\2" + lists[1][1:]  # the first field once more, by its number
    content = thrift_compact.Compact(b"".join(lists) + b"\0")
    with pytest.raises(ValueError, match="field 1 is there twice"):
        for _ in content.elements_of(1, {1: [{}]}):
            content.skip(thrift_compact.STRUCT)


def test_a_subset_that_is_not_there(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a text"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r'has no "meta"; it has .*set subset_key of the source'):
        read(tmp_path / "a.parquet", subset_key="meta.set")


def test_all_columns_of_a_batch_count(tmp_path, monkeypatch):
    """Each of ten leaves has a text that rows share."""
    monkeypatch.setattr(parquet_pages, "_LARGEST_BATCH", 1_000_000)
    meta = [{f"{leaf}": "a text " * 10_000 for leaf in range(10)}] * 100
    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a text"] * 100, "meta": meta}), path)
    with parquet_pages.open_parquet(path) as file:
        sizes = [
            len(next(parquet_pages.bounded_batches(path, file, columns, 16)))
            for columns in (["text", "meta.0"], ["text", "meta"])
        ]
    assert sizes == [14, 1]


def test_a_column_whose_name_begins_with_anothers(tmp_path):
    """pyarrow reads both."""
    table = pyarrow.table({"text": ["a text"], "text.ids": [[1, 2]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"text\.ids\.list\.element, .* must be renamed"):
        read(tmp_path / "a.parquet")


def test_rows_without_end_in_parquet(tmp_path, monkeypatch):
    """30 million of nothing in 54 kB."""
    texts = pyarrow.array([None] * 10_000, pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[1].skipped["empty documents"] == 10_000
    monkeypatch.setattr(formats, "_ANY_ROWS", 9_000)
    monkeypatch.setattr(formats, "_ROWS_PER_BYTE", 1)
    refused = r"a\.parquet says that it has 10,000 rows, in [1-9]\d\d"
    with pytest.raises(ValueError, match=refused):
        read(tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")  # as the builders of TFDS data sets read it
    with parquet_pages.open_parquet(path) as file, pytest.raises(ValueError, match=refused):
        next(parquet_pages.bounded_batches(path, file, ["text"], 16))
