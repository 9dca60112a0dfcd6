"""Files made to fill memory, by accident or not: refused, or given in pieces."""

import json

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from tests.data.reading import megabytes_used, read, write_arrow
from tinyllama_jax.data import formats


@pytest.fixture
def short(monkeypatch):
    """Pieces and lines of a few kB in place of many MB."""
    monkeypatch.setattr(formats, "PIECE_BYTES", 5_000)
    monkeypatch.setattr(formats, "LONGEST_TEXT", 5_000)
    monkeypatch.setattr(formats, "_CHUNK_BYTES", 1_000)


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


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_two_columns_of_one_name(tmp_path, format):
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    if format == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        pyarrow.feather.write_feather(table, tmp_path / "a.arrow")
    with pytest.raises(ValueError, match=rf"a\.{format} has several columns 'text'"):
        read(tmp_path / f"a.{format}")


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


def test_a_flood_of_line_ends(tmp_path):
    """16 MiB of nothing in 600 bytes of zstd."""
    packer = zstandard.ZstdCompressor().compressobj()
    packed = [packer.compress(b"\n" * (1 << 20)) for _ in range(16)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join([*packed, packer.flush()]))
    said, used = megabytes_used(tmp_path / "a.jsonl.zst")
    assert not said and used < 120


@pytest.mark.parametrize("value", ["[]", "{}", "1", '""', '"\\\\\\""'])
def test_a_line_of_many_values(tmp_path, monkeypatch, value):
    """Of 2 or 3 bytes each, for which Python has 8 to 64."""
    path = tmp_path / "a.jsonl"
    values = ",".join([value] * 1000)
    text = json.dumps('[1, 2], {"a": 3}, \\ ' * 1000)
    path.write_text(f'{{"text": {text}, "other": [{values}]}}\n')
    assert len(read(path)[0]) == 1
    monkeypatch.setattr(formats, "_ANY_LINE", 1000)
    assert len(read(path)[0]) == 1
    monkeypatch.setattr(formats, "_VALUES_OF_LINE", 990)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: this line has [12],0\d\d values"):
        read(path)
    path.write_text(f'{{"text": {text}}}\n')
    assert len(read(path)[0]) == 1


def test_a_line_of_lists_in_next_to_nothing(tmp_path):
    """99 MB in 9 kB, of which Python would make 2.5 GB."""
    line = b'{"text": "a text", "other": [' + b"[]," * 33_000_000 + b"0]}\n"
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(line))
    del line
    assert (tmp_path / "a.jsonl.zst").stat().st_size < 20_000
    said, used = megabytes_used(tmp_path / "a.jsonl.zst")
    assert "has 66,000," in said and used < 500
