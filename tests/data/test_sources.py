"""Documents come out of every format, and bad input is an error or a count, never a silence."""

import gzip
import json
import subprocess
import sys
import textwrap

import pytest

from tinyllama_jax.config import SourceConfig
from tinyllama_jax.data import formats
from tinyllama_jax.data.sources import Tally, left_out, list_inputs, read_documents

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def read(path, tally=None, **settings):
    source = SourceConfig(name="books", path=str(path), validation_fraction=0.0, **settings)
    tally = Tally() if tally is None else tally
    return [
        document
        for entry in list_inputs(source)
        for document in read_documents(source, entry, tally)
    ]


def texts(path, tally=None, **settings):
    return [document.text for document in read(path, tally, **settings)]


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


# --- which files


def test_a_directory_is_read_in_sorted_order_with_names_relative_to_it(tmp_path):
    for name in ("b/2.txt", "a.txt", "b/10.txt", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    inputs = list_inputs(SourceConfig(path=str(tmp_path)))
    assert [entry.name for entry in inputs] == ["a.txt", "b/10.txt", "b/2.txt"]
    assert texts(tmp_path) == ["a.txt", "b/10.txt", "b/2.txt"]


def test_a_glob(tmp_path):
    for name in ("part-1.jsonl", "part-0.jsonl", "other.jsonl"):
        write_jsonl(tmp_path / name, [name])
    assert texts(tmp_path / "part-*.jsonl") == ["part-0.jsonl", "part-1.jsonl"]
    inputs = list_inputs(SourceConfig(path=str(tmp_path / "part-*.jsonl")))
    assert [entry.name for entry in inputs] == ["part-0.jsonl", "part-1.jsonl"]


def test_an_unknown_ending_needs_a_format(tmp_path):
    (tmp_path / "notes.rtf").write_text("hello")
    with pytest.raises(ValueError, match=r"found: \.rtf; known: \.jsonl.*sources\.books\.format"):
        texts(tmp_path)
    assert texts(tmp_path, format="text") == ["hello"]


def test_a_named_format_takes_all_but_endings_of_others(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    write_jsonl(tmp_path / "b.records", ["two"])
    (tmp_path / "README.md").write_text("what this is")
    assert texts(tmp_path, format="jsonl") == ["one", "two"]
    assert texts(tmp_path / "*.records", format="jsonl") == ["two"]
    assert texts(tmp_path / "README.md", format="text") == ["what this is"]
    with pytest.raises(ValueError, match='holds no file of format "parquet"'):
        (tmp_path / "b.records").unlink()
        texts(tmp_path, format="parquet")


def test_what_is_left_out_is_told(tmp_path):
    for name in ("a.txt", "b.rst", "c.rst", "d.xz", ".hidden"):
        (tmp_path / name).write_text(name)
    for settings in ({}, {"format": "text"}):
        source = SourceConfig(path=str(tmp_path), **settings)
        expected = "2 .rst, 1 .xz" if not settings else ""
        assert left_out(source, list_inputs(source)) == expected


def test_directories_are_read_through_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("hello")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "corpus")
    assert texts(tmp_path / "corpus") == ["hello"]


def test_endings_are_read_in_any_case(tmp_path):
    (tmp_path / "A.TXT.GZ").write_bytes(gzip.compress(b"hello"))
    assert texts(tmp_path) == ["hello"]


def test_a_binary_file_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    with pytest.raises(ValueError, match=r"a\.txt begins with bytes of value 0.*no plain text"):
        texts(tmp_path)


def test_a_directory_of_several_formats_is_ambiguous(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["data"])
    (tmp_path / "README.md").write_text("what this is")
    with pytest.raises(ValueError, match=r"several formats.*README.*glob"):
        texts(tmp_path)
    assert texts(tmp_path / "*.jsonl") == ["data"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "does not exist"),
        ("empty", "holds no files"),
        ("empty/*.txt", "matches no files"),
    ],
)
def test_nothing_to_read(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.jsonl.zst"])
def test_a_git_lfs_pointer_in_place_of_data(tmp_path, name):
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a Git-LFS pointer.*git lfs pull"):
        list_inputs(SourceConfig(path=str(tmp_path)))


def test_the_embedded_corpus_has_two_parts(tmp_path):
    with pytest.raises(ValueError, match="set it to code or text"):
        texts("novels", format="embedded")


# --- plain text


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\nsecond\n")
    assert texts(tmp_path) == ["first\n\nsecond\n"]


@pytest.mark.parametrize(
    ("content", "separator", "expected"),
    [
        # As TinyStories comes.
        (
            "one\n<|endoftext|>\ntwo\n\nmore\n<|endoftext|>\n",
            "<|endoftext|>",
            ["one", "two\n\nmore"],
        ),
        ("one<|endoftext|>two", "<|endoftext|>", ["one", "two"]),
        ("one\n\ntwo", "\\n\\n", ["one", "two"]),  # as a command line gives it
        ("one\r\n\r\ntwo\r\nmore\r\n\r\n\r\nthree\r\n", "\n\n", ["one", "two\nmore", "three"]),
        ("  one <|end\n<|endoftext|>two", "<|endoftext|>", ["  one <|end", "two"]),
        ("no separator\n", "<|endoftext|>", ["no separator"]),
    ],
)
def test_a_separator_stands_between_the_documents_of_a_file(
    tmp_path, content, separator, expected, monkeypatch
):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + content.encode())
    for chunk in (1, 2, 3, 5, 1 << 20):  # wherever a separator or a line end is cut
        monkeypatch.setattr(formats, "_CHUNK_BYTES", chunk)
        assert texts(tmp_path, separator=separator) == expected


def test_separated_documents_are_numbered_and_held_out_each_for_itself(tmp_path):
    documents = [f"tale {i} " * 100 for i in range(1000)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join([*documents, "", " "]))
    source = SourceConfig(path=str(tmp_path), separator="<|endoftext|>", validation_fraction=0.1)
    tally = Tally()
    found = list(read_documents(source, list_inputs(source)[0], tally))
    assert [(d.record, d.text) for d in found] == list(enumerate(documents))
    assert 50 < sum(d.validation for d in found) < 200
    assert sum(tally.skipped.values()) == 2


def test_line_ends_and_byte_order_mark_belong_to_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert texts(tmp_path) == ["one\ntwo\rthree\n"]


def test_utf16_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("hello", encoding="utf-16")
    with pytest.raises(ValueError, match=r"a\.txt is UTF-16.*iconv"):
        texts(tmp_path)


def test_bytes_that_are_not_utf8_are_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 and more")
    (tmp_path / "b.txt").write_bytes("café".encode())
    tally = Tally()
    assert texts(tmp_path, tally) == ["caf\ufffd and more", "café"]
    assert tally.repaired == {"documents with bytes that are not UTF-8": 1}
    assert tally.documents == 2


def test_empty_documents_are_skipped_and_counted(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["", "one", " \n\t", "two"])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": null}\n')
    tally = Tally()
    assert texts(tmp_path, tally) == ["one", "two"]
    assert tally.skipped == {"empty documents": 3}


def test_one_document_of_10_mb(tmp_path):
    text = "The same sentence, many times. " * 330_000
    assert len(text) > 10_000_000
    write_jsonl(tmp_path / "a.jsonl", ["before", text, "after"])
    assert texts(tmp_path) == ["before", text, "after"]


# --- JSONL


def test_records_are_line_numbers_from_0_and_blank_lines_none(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}')
    assert [(d.record, d.text) for d in read(tmp_path)] == [(0, "one"), (2, "two")]


def test_jsonl_keeps_what_is_inside_a_document(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\\r\\nb\xe2\x80\xa8c"}\r\n')
    assert texts(tmp_path) == ["a\r\nb\u2028c"]


def test_a_malformed_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "tw\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: this line is not JSON.*'\{\"text\": \"tw'"):
        texts(tmp_path)


def test_a_missing_key_names_those_that_exist(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"content": "x", "id": 7}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2 has no \"text\"; it has 'content', 'id'"):
        texts(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"content": "x", "id": 7}\n')
    assert texts(tmp_path, text_key="content") == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('["one"]', "a list, not a JSON object"),
        ('{"text": 5}', '"text" is of type int, not a text'),
    ],
)
def test_a_line_of_another_shape(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: {message}"):
        texts(tmp_path)


def test_invalid_utf8_and_lone_surrogates_in_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "caf\xe9"}\n{"text": "a\\ud800b \\ud83e\\udd99"}\n'
    )
    tally = Tally()
    assert texts(tmp_path, tally) == ["caf\ufffd", "a\ufffdb 🦙"]
    assert tally.repaired == {
        "documents with bytes that are not UTF-8": 1,
        "documents with lone surrogates": 1,
    }


# --- compressed


def compress(content, ending):
    if ending == ".gz":
        return gzip.compress(content)
    import zstandard

    return zstandard.ZstdCompressor().compress(content)


@pytest.mark.parametrize("ending", [".zst", ".gz"])
def test_compressed_files_of_several_frames(tmp_path, ending):
    parts = [b'{"text": "one"}\n{"te', b'xt": "two"}\n']
    (tmp_path / f"a.jsonl{ending}").write_bytes(b"".join(compress(p, ending) for p in parts))
    (tmp_path / f"b.jsonl{ending}").write_bytes(compress(b'{"text": "three"}\n', ending))
    assert texts(tmp_path) == ["one", "two", "three"]


@pytest.mark.parametrize("ending", [".zst", ".gz"])
def test_a_truncated_compressed_file_is_not_the_end_of_the_data(tmp_path, ending):
    content = compress(b"".join(b'{"text": "%d"}\n' % (i**5) for i in range(50_000)), ending)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"a\.jsonl.*(cut short|damaged)"):
        texts(tmp_path)


@pytest.mark.parametrize("ending", [".zst", ".gz"])
def test_a_file_that_is_not_compressed_as_its_name_says(tmp_path, ending):
    write_jsonl(tmp_path / f"a.jsonl{ending}", ["one"])
    with pytest.raises(ValueError, match="is damaged or not what its ending says"):
        texts(tmp_path)


# --- parquet


@pytest.fixture
def write_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    def write(columns, **options):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", **options)

    return write


def test_parquet_rows(tmp_path, write_parquet):
    documents = [f"document {i}" for i in range(1000)]
    documents[7] = None
    write_parquet({"content": documents, "id": range(1000)}, row_group_size=64)
    tally = Tally()
    found = read(tmp_path, tally, text_key="content")
    assert [(d.record, d.text) for d in found] == [
        (i, text) for i, text in enumerate(documents) if text
    ]
    assert tally.skipped == {"empty documents": 1}


def test_parquet_of_invalid_utf8(tmp_path, write_parquet):
    import pyarrow

    broken = pyarrow.array([b"caf\xe9", b"fine"]).view(pyarrow.string())
    write_parquet({"text": broken})
    tally = Tally()
    assert texts(tmp_path, tally) == ["caf\ufffd", "fine"]
    assert tally.repaired == {"documents with bytes that are not UTF-8": 1}


def test_parquet_without_the_column(tmp_path, write_parquet):
    write_parquet({"content": ["x"], "id": [1]})
    with pytest.raises(ValueError, match=r"a\.parquet has no \"text\"; it has 'content', 'id'"):
        texts(tmp_path)


def test_a_column_of_another_type_is_named(write_parquet, tmp_path):
    write_parquet({"content": ["x"], "text": [1]})
    with pytest.raises(ValueError, match=r'a\.parquet: "text" is of type int64, not a text; set'):
        texts(tmp_path)
    write_parquet({"text": [["x"]]})
    with pytest.raises(ValueError, match=r'"text" is of type list<.*>, not a text'):
        texts(tmp_path)


def test_a_damaged_page_of_a_parquet_file_is_named(write_parquet, tmp_path):
    write_parquet({"text": ["the same words again " * 50 + str(i) for i in range(200)]})
    file = tmp_path / "a.parquet"
    content = bytearray(file.read_bytes())
    content[40:400] = bytes(360)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet"):
        texts(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1" + b"x" * 100 + b"PAR1"])
def test_a_file_that_is_no_parquet(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet"):
        texts(tmp_path)


# --- TFDS


def test_tfds_without_tensorflow(tmp_path):
    """Builds a data set and reads it, in a process of its own: importing tfds takes long."""
    program = textwrap.dedent("""
        import sys
        import numpy as np
        import tensorflow_datasets as tfds
        from tinyllama_jax.config import SourceConfig
        from tinyllama_jax.data import sources

        class Tales(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            def _info(self):
                features = tfds.features.FeaturesDict({"tale": tfds.features.Text()})
                return tfds.core.DatasetInfo(builder=self, features=features)
            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}
            def _generate_examples(self):
                for i in range(10):
                    yield i, {"tale": f"tale {i} of the llama 🦙"}

        builder = Tales(data_dir=sys.argv[1], file_format="array_record")
        builder.download_and_prepare()
        sources._TFDS_ROWS = 4
        source = sources.SourceConfig(path=f"tfds:{builder.data_dir}", text_key="tale")
        inputs = sources.list_inputs(source)
        assert [entry.rows for entry in inputs] == [(0, 4), (4, 8), (8, 10)], inputs
        assert inputs[0].name == "tfds:tales/1.0.0[0:4]", inputs
        tally = sources.Tally()
        found = [d for e in inputs for d in sources.read_documents(source, e, tally)]
        assert sorted(d.text for d in found) == [f"tale {i} of the llama 🦙" for i in range(10)]
        assert [d.record for d in found] == list(range(10))
        try:
            list(sources.read_documents(SourceConfig(path=source.path), inputs[0], tally))
        except ValueError as error:
            assert "row 0 has no \\"text\\"; it has 'tale'" in str(error), error
        else:
            raise AssertionError("a missing key went unnoticed")
        assert "tensorflow" not in sys.modules
    """)
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --- conversations


def test_the_turns_of_a_conversation_are_one_document(tmp_path):
    """As UltraChat's JSONL: `data` is a list of texts, or `messages` one of role and content."""
    turns = ["What is a llama?", "An animal.\nIt hums.", "Thanks!"]
    said = [{"role": "user", "content": text} for text in turns]
    lines = [{"id": "0", "data": turns, "messages": said}, {"data": ["x"], "messages": said[:1]}]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for key in ("data", "messages"):
        source = SourceConfig(path=str(path), text_key=key)
        (entry,) = list_inputs(source)
        found = [document.text for document in read_documents(source, entry, Tally())]
        assert found[0] == "What is a llama?\nAn animal.\nIt hums.\nThanks!"
        assert len(found) == 2
    for wrong in ([1, "a"], [{"role": "user"}], [["a"]], []):
        path.write_text(json.dumps({"data": wrong}) + "\n")
        with pytest.raises(ValueError, match=r'"data" is of type list, not a text; set text_key'):
            source = SourceConfig(path=str(path), text_key="data")
            list(read_documents(source, list_inputs(source)[0], Tally()))


# --- validation


def test_documents_are_held_out_by_a_hash_of_their_text(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [f"document {i % 2000}" for i in range(4000)])
    source = SourceConfig(path=str(tmp_path), validation_fraction=0.1)
    (entry,) = list_inputs(source)
    found = list(read_documents(source, entry, Tally()))
    held_out = {d.text for d in found if d.validation}
    assert 150 < len(held_out) < 250
    assert held_out.isdisjoint(d.text for d in found if not d.validation)


def test_the_end_of_a_long_text_file_is_held_out(tmp_path):
    text = "".join(f"line {i}\n" for i in range(40_000))
    (tmp_path / "a.txt").write_text(text)
    source = SourceConfig(path=str(tmp_path / "a.txt"), validation_fraction=0.01)
    (entry,) = list_inputs(source)
    training, validation = read_documents(source, entry, Tally())
    assert (training.validation, validation.validation) == (False, True)
    assert training.text + validation.text == text
    assert training.text.endswith("\n")
    assert 0.009 < len(validation.text) / len(text) < 0.0101
