"""Raw text: which files a source consists of, and the documents in them.

What happens to bad input, and nothing else is ever left out:

    stops, with file and line    malformed JSON, a missing text key or column, a value that is no
                                 text, a truncated or foreign file, a binary file or UTF-16 in place
                                 of text, a Git-LFS pointer, a directory without data
    skipped and counted          a document that is empty, all white space, or without tokens; one
                                 of a subset that data.sources.NAME.subsets leaves out
    repaired and counted         bytes that are no UTF-8, and lone surrogates: each becomes U+FFFD,
                                 since one bad byte is no reason to lose a long document

In plain text files CRLF becomes LF and a byte-order mark is dropped: they belong to the file.
Inside JSON and parquet values they belong to the document, and stay.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator

from tinyllama_jax.config import SourceConfig
from tinyllama_jax.config_text import chosen_subsets
from tinyllama_jax.data import columnar, embedded, formats
from tinyllama_jax.data.formats import Keys, Record

_ENDINGS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".bin": "litpkds",
    ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
_COMPRESSED = (".zst", ".gz")
_NEVER_COMPRESSED = ("parquet", "arrow", "litpkds")
_READERS = {
    "jsonl": formats.read_jsonl, "parquet": columnar.read_parquet, "arrow": columnar.read_arrow,
}  # fmt: skip
DIRECTORY = "directory"  # the subset_key of subsets that are directories
_TFDS = "tfds:"
_TFDS_ROWS = 1 << 16  # rows of a TFDS data set that count as one input
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

# A subset's name becomes a directory and a metric.
_SUBSET_NAME = re.compile(r"[\w+#][\w+#.-]*")

# Without a separator a plain text file is one document, so a source of few files might have none to
# hold out. From this size on, the last part of each file is held out instead.
_TAIL_HOLDOUT_CHARS = 1 << 18


class MissingTextError(ValueError):
    """The raw text of a source is not on this machine; the message names the path."""


@dataclasses.dataclass(frozen=True)
class Input:
    """What is read in one go: a file, a module of the library, some rows of a TFDS data set."""

    name: str  # as the manifest gives it: relative to the source, the same wherever that stands
    path: str
    format: str  # text, jsonl, parquet, arrow, litpkds, tfds, embedded
    bytes: int
    rows: tuple[int, int] = (0, 0)  # first and past the last, for tfds


@dataclasses.dataclass(frozen=True)
class Document:
    text: str
    record: int  # number within its input, counted from 0: line, row, topic
    validation: bool
    subset: str = ""


@dataclasses.dataclass
class Tally:
    """What reading has met so far."""

    documents: int = 0
    bytes_read: int = 0  # of the inputs as they are stored
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    repaired: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: Tally) -> None:
        self.documents += other.documents
        self.bytes_read += other.bytes_read
        self.skipped.update(other.skipped)
        self.repaired.update(other.repaired)


def list_inputs(source: SourceConfig) -> tuple[Input, ...]:
    """The inputs of a source, sorted by name.

    With format "auto", a directory gives the files whose ending is known; with a named format all
    but those whose ending tells of another. Hidden files are left out; `left_out` tells of others.

    Raises:
      MissingTextError: nothing is there.
      ValueError: there is no data, or of several formats, or a file is a Git-LFS pointer.
    """
    if source.format == "embedded":
        if source.subset_key:
            raise ValueError(f"data.sources.{source.name}: the embedded corpus has no subsets")
        return _embedded_inputs(source)
    if source.format == "tfds" or source.path.startswith(_TFDS):
        return _tfds_inputs(source)
    root, files = _find_files(source)
    if source.format == "auto":
        inputs = _of_known_format(source, root, files)
    else:
        # Of a directory; a glob or a file says itself what is meant.
        given = not pathlib.Path(source.path).expanduser().is_dir()
        inputs = [
            _file_input(root, file, source.format)
            for file in files
            if given or _format_of(file) in ("", source.format)
        ]
        if not inputs:
            raise ValueError(
                f'data.sources.{source.name}.path = "{source.path}" holds no file of format '
                f'"{source.format}"; set data.sources.{source.name}.format to what is there'
            )
    for entry in inputs:
        _refuse_lfs_pointer(entry)
    if source.subset_key not in ("", DIRECTORY) and inputs[0].format in ("litpkds", "text"):
        raise ValueError(
            f'data.sources.{source.name}.subset_key = "{source.subset_key}", but files of format '
            f'{inputs[0].format} have no keys: set it to "{DIRECTORY}", or make each subset a '
            f"source of its own, by a glob"
        )
    if source.subset_key and inputs[0].format == "litpkds":
        raise ValueError(
            f'data.sources.{source.name}.subset_key = "{source.subset_key}", but chunks of ids '
            f"tell of no subsets; make each set of chunks a source of its own, by a glob"
        )
    if source.subset_key == DIRECTORY:
        inputs = _of_chosen_directories(source, inputs)
    return tuple(inputs)


def left_out(source: SourceConfig, inputs: tuple[Input, ...]) -> str:
    """The files of a source's path that are no inputs, by their endings: "2 .json, 1 .xz"."""
    if inputs[0].format in ("embedded", "tfds"):
        return ""
    read = {entry.path for entry in inputs}
    others = [file for file in _find_files(source)[1] if str(file) not in read]
    endings = collections.Counter(file.suffix or file.name for file in others)
    return ", ".join(f"{count} {ending}" for ending, count in endings.most_common(8))


def read_documents(source: SourceConfig, entry: Input, tally: Tally) -> Iterator[Document]:
    """Yields the documents of an input and counts in `tally` what was read, skipped and repaired.

    Memory is a few times the largest document.

    Raises:
      ValueError: the input is malformed; the message names file and line. Or it holds ids.
    """
    if entry.format == "litpkds":
        raise ValueError(f"{entry.path} holds ids of a tokenizer, not text")
    directory = _directory_of(source, entry) if source.subset_key == DIRECTORY else ""
    names, left_out = chosen_subsets(source.subsets)
    for (record, text, subset), validation in _read(source, entry, tally):
        subset = directory or subset
        if (subset in names) == left_out:
            tally.skipped[f"documents of the subset {subset}"] += 1
            continue
        if source.subset_key and not _SUBSET_NAME.fullmatch(subset):
            raise ValueError(
                f"{entry.path}, record {record}: {source.subset_key} is {subset!r}, which cannot "
                f"name a directory and a metric; set subset_key to what tells subsets apart"
            )
        text = formats.without_surrogates(text, tally.repaired)
        if not text or text.isspace():
            tally.skipped["empty documents"] += 1
            continue
        tally.documents += 1
        if validation is None:
            validation = is_held_out(text.encode(), source.validation_fraction)
        yield Document(text, record, validation, subset)


def _read(source: SourceConfig, entry: Input, tally: Tally) -> Iterator[tuple[Record, bool | None]]:
    """Records, and whether each is for validation where the source decides that."""

    def advance(count: int) -> None:
        tally.bytes_read += count

    if entry.format == "embedded":
        for number, document in enumerate(embedded.documents(source.path, entry.name)):
            yield Record(number, document.text), document.validation
        advance(entry.bytes)
    elif entry.format == "text":
        separator = source.separator.replace("\\n", "\n")  # a command line has no line ends
        for record in formats.read_text(entry.path, separator, tally.repaired, advance):
            text = record.text
            tail = 0 if source.separator else _tail_start(text, source.validation_fraction)
            if tail:
                yield record._replace(text=text[:tail]), False
                yield record._replace(text=text[tail:]), True
            else:
                yield record, None
    else:
        by_key = source.subset_key != DIRECTORY
        keys = Keys(source.text_key, source.subset_key if by_key else "")
        if entry.format == "tfds":
            records = formats.read_tfds(entry.path, entry.rows, keys, tally.repaired, advance)
        else:
            read = _READERS[entry.format]
            records = read(entry.path, keys, tally.repaired, advance)
        for record in records:
            yield record, None


def _of_chosen_directories(source: SourceConfig, inputs: list[Input]) -> list[Input]:
    names, left_out = chosen_subsets(source.subsets)
    found = {_directory_of(source, entry) for entry in inputs}
    if unknown := names - found:
        raise ValueError(
            f'data.sources.{source.name}.subsets = "{source.subsets}" names '
            f"{', '.join(sorted(unknown))}, but {source.path} has the directories "
            f"{', '.join(sorted(found))}"
        )
    chosen = [e for e in inputs if (_directory_of(source, e) in names) != left_out]
    if not chosen:
        raise ValueError(
            f'data.sources.{source.name}.subsets = "{source.subsets}" leaves nothing of the '
            f"directories {', '.join(sorted(found))}"
        )
    return chosen


def _directory_of(source: SourceConfig, entry: Input) -> str:
    """The first directory below the source's path that an input lies in."""
    directory, slash, _ = entry.name.partition("/")
    if not slash:
        raise ValueError(
            f"{entry.path} lies in no directory below {source.path}, so it is of no subset; "
            f'data.sources.{source.name}.subset_key = "{DIRECTORY}" needs a directory for each'
        )
    return directory


def is_held_out(content: bytes, fraction: float) -> bool:
    """By a hash of the document, so that copies of it fall on one side."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64


def _tail_start(text: str, fraction: float) -> int:
    """Where the held-out end of a long text begins, at the start of a line; 0: nowhere."""
    if len(text) < _TAIL_HOLDOUT_CHARS or not fraction:
        return 0
    newline = text.find("\n", int(len(text) * (1 - fraction)))
    return newline + 1 if 0 <= newline < len(text) - 1 else 0


def _find_files(source: SourceConfig) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """The directory that names are relative to, and the sorted files of `source.path`."""
    path = pathlib.Path(source.path).expanduser()
    where = f'data.sources.{source.name}.path = "{source.path}"'
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        _refuse_several_splits(path, where)
        root, found = path, list(_files_below(path, {os.path.realpath(path)}))
    elif glob.has_magic(source.path):
        fixed = [part for part in path.parts if not glob.has_magic(part)]
        root = pathlib.Path(*path.parts[: len(fixed)]) if path.parts else path
        while not root.is_dir():
            root = root.parent
        found = [pathlib.Path(name) for name in glob.glob(str(path), recursive=True)]
    else:
        raise MissingTextError(f"{where} does not exist; set it to a file, a directory or a glob")
    files = [f for f in found if f.is_file() and not _hidden(f.relative_to(root))]
    # What Hugging Face's `map` and `shuffle` leave beside the data they were made from.
    files = [f for f in files if not (f.name.startswith("cache-") and f.suffix == ".arrow")]
    if not files:
        kind = "holds no files" if path.is_dir() else "matches no files"
        raise MissingTextError(f"{where} {kind}: there is nothing to read")
    return root, sorted(files, key=lambda f: f.relative_to(root).as_posix())


def _refuse_several_splits(path: pathlib.Path, where: str) -> None:
    """What Hugging Face's `DatasetDict.save_to_disk` writes holds test sets beside the rest."""
    try:
        splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    raise ValueError(f"{where} holds the splits {', '.join(splits)}; set it to one, {path}/train")


def _files_below(directory: pathlib.Path, seen: set[str]) -> Iterator[pathlib.Path]:
    """Files of a directory, links followed, but no directory entered twice: links may lead around.

    Hidden directories are left out.
    """
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        path = directory / entry.name
        if not entry.is_dir():
            yield path
        elif not entry.name.startswith(".") and (real := os.path.realpath(path)) not in seen:
            seen.add(real)
            yield from _files_below(path, seen)


def _hidden(path: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _of_known_format(
    source: SourceConfig, root: pathlib.Path, files: list[pathlib.Path]
) -> list[Input]:
    inputs = [_file_input(root, f, _format_of(f)) for f in files if _format_of(f)]
    where = f'data.sources.{source.name}.path = "{source.path}"'
    if not inputs:
        endings = ", ".join(sorted({f.suffix or f.name for f in files})[:8])
        raise ValueError(
            f"{where}: no file has an ending that tells its format (found: {endings}; known: "
            f"{', '.join(_ENDINGS)}, text and JSON also with .zst or .gz); "
            f"set data.sources.{source.name}.format"
        )
    counts = collections.Counter(entry.format for entry in inputs)
    if len(counts) > 1:
        raise ValueError(
            f"{where} holds files of several formats ({dict(counts)}), one of which may be no data "
            f"at all, like a README; set data.sources.{source.name}.format or a glob that "
            f"matches one kind"
        )
    return inputs


def _format_of(path: pathlib.Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        inner = _ENDINGS.get(suffixes[-2], "") if len(suffixes) > 1 else ""
        return inner if inner not in _NEVER_COMPRESSED else ""
    return _ENDINGS.get(suffixes[-1], "") if suffixes else ""


def _file_input(root: pathlib.Path, file: pathlib.Path, file_format: str) -> Input:
    name = file.relative_to(root).as_posix()
    return Input(name, str(file), file_format, file.stat().st_size)


def _refuse_lfs_pointer(entry: Input) -> None:
    if entry.bytes > 1024:
        return
    with open(entry.path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(
                f"{entry.path} is a Git-LFS pointer of {entry.bytes} bytes, not the data itself; "
                f"run `git lfs pull` in the repository that it came from"
            )


def _embedded_inputs(source: SourceConfig) -> tuple[Input, ...]:
    if source.path not in embedded.KINDS:
        raise ValueError(
            f'data.sources.{source.name}.path = "{source.path}" is no part of the embedded corpus; '
            f"set it to {' or '.join(embedded.KINDS)}"
        )
    root = embedded.library_root()
    return tuple(
        Input(name, str(root / name), "embedded", (root / name).stat().st_size)
        for name in embedded.library_files()
    )


def _tfds_inputs(source: SourceConfig) -> tuple[Input, ...]:
    path = source.path.removeprefix(_TFDS)
    full_name, rows, size = formats.tfds_size(path)
    if not rows:
        raise ValueError(f"{source.path}: its train split is empty, there is nothing to read")
    return tuple(
        Input(
            f"{_TFDS}{full_name}[{first}:{min(first + _TFDS_ROWS, rows)}]", path, "tfds",
            size * min(_TFDS_ROWS, rows - first) // rows, (first, min(first + _TFDS_ROWS, rows)),
        )
        for first in range(0, rows, _TFDS_ROWS)
    )  # fmt: skip
