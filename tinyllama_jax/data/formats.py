"""Readers of the file formats that raw text comes in.

Each streams: what it holds is one document, or one batch of rows. `repaired` counts what could not
be read as it was and is given with U+FFFD in its place; `advance` is told of the bytes read, as the
file stores them.
"""

from __future__ import annotations

import collections
import contextlib
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Repaired = collections.Counter[str]
Advance = Callable[[int], None]


class Keys(NamedTuple):
    """What of a record is wanted: the document, and what tells its subset ("": nothing does)."""

    text: str
    subset: str = ""


class Record(NamedTuple):
    number: int  # within the file or data set, from 0
    text: str
    subset: str = ""


_CHUNK_BYTES = 1 << 20
_ROWS_PER_BATCH = 256
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_UTF8_MARK = b"\xef\xbb\xbf"
_SURROGATE = re.compile("[\ud800-\udfff]")
_INVALID_UTF8 = "documents with bytes that are not UTF-8"


def read_text(path: str, separator: str, repaired: Repaired, advance: Advance) -> Iterator[Record]:
    """Each document of a plain text file, without byte-order mark.

    Line ends become LF. `separator` stands between documents, and one line end on either side of it
    belongs to it, not to them, as does one at the end of the file; "": the file is one document.
    """
    content = _lf_only(_without_mark(path, _chunks(path, advance)))
    if not separator:
        yield Record(0, _decode(b"".join(content), repaired))
        return
    for number, part in enumerate(_split(content, separator.encode())):
        if number:
            part = part.removeprefix(b"\n")
        yield Record(number, _decode(part.removesuffix(b"\n"), repaired))


def read_jsonl(path: str, keys: Keys, repaired: Repaired, advance: Advance) -> Iterator[Record]:
    """Each line that is not blank."""
    for number, line in enumerate(_split(_chunks(path, advance), b"\n")):
        where = f"{path}:{number + 1}"
        if number == 0:
            line = line.removeprefix(_UTF8_MARK)
        if not line.strip():
            continue
        try:
            record = json.loads(_decode(line, repaired))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where}: this line is not JSON ({error}): {line[:60]!r}; a file that was cut "
                f"short while copying ends like this; repair or remove the line, then start again"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a {type(record).__name__}, not a JSON object")
        if keys.text not in record:
            raise _no_such_key(where, keys.text, list(record))
        text = _as_text(record[keys.text], where, keys.text, repaired)
        yield Record(number, text, _subset(record, keys.subset, where))


def read_parquet(path: str, keys: Keys, repaired: Repaired, advance: Advance) -> Iterator[Record]:
    """Each row, one row group after the other."""
    import pyarrow.parquet

    with _telling_of_damage(path, "parquet"), pyarrow.parquet.ParquetFile(path) as file:
        _require_columns(path, file.schema_arrow, keys)
        rows = file.metadata.num_rows
        batches = file.iter_batches(_ROWS_PER_BATCH, columns=_columns(keys))
        yield from _of_batches(path, batches, rows, keys, repaired, advance)


def read_arrow(path: str, keys: Keys, repaired: Repaired, advance: Advance) -> Iterator[Record]:
    """Each row of an Arrow stream, as Hugging Face `datasets` save it, or of an Arrow file."""
    import pyarrow
    import pyarrow.ipc

    with _telling_of_damage(path, "Arrow"), pyarrow.memory_map(path) as file:
        try:
            reader = pyarrow.ipc.open_stream(file)
            batches = iter(reader)
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        _require_columns(path, reader.schema, keys)
        parts = (
            batch.select(_columns(keys)).slice(start, _ROWS_PER_BATCH)
            for batch in batches
            for start in range(0, len(batch), _ROWS_PER_BATCH)
        )
        # How many rows there are is not known before the end.
        yield from _of_batches(path, parts, 0, keys, repaired, lambda count: None)
    advance(pathlib.Path(path).stat().st_size)


def _of_batches(
    path: str, batches: Iterator[Any], rows: int, keys: Keys, repaired: Repaired, advance: Advance
) -> Iterator[Record]:
    """The rows of a file of so many, whose batches hold the columns of `keys` alone."""
    import pyarrow

    size = pathlib.Path(path).stat().st_size
    number = 0
    for batch in batches:
        # As bytes: pyarrow does not check that strings are UTF-8.
        texts = batch.column(keys.text).cast(pyarrow.large_binary()).to_pylist()
        name = keys.subset.split(".")[0]
        subsets = batch.column(name).to_pylist() if name else [None] * len(batch)
        for text, value in zip(texts, subsets, strict=True):
            where = f"{path}, row {number}"
            subset = _subset({name: value}, keys.subset, where)
            yield Record(number, _as_text(text, where, keys.text, repaired), subset)
            number += 1
        advance(size * len(batch) // max(rows, 1))


def _columns(keys: Keys) -> list[str]:
    return [name for name in (keys.text, keys.subset.split(".")[0]) if name]


def _require_columns(path: str, schema: Any, keys: Keys) -> None:
    for name in _columns(keys):
        if name not in schema.names:
            raise _no_such_key(path, name, schema.names)
    kind = schema.field(keys.text).type
    if not _holds_text(kind):
        raise _no_text(path, keys.text, str(kind))


@contextlib.contextmanager
def _telling_of_damage(path: str, what: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the file system's, not the content's
        raise ValueError(f"{path} cannot be read as {what}: {error}") from error


def _subset(record: dict[str, Any], key: str, where: str) -> str:
    """What `key` (names joined by points) leads to; "" where there is no key."""
    if not key:
        return ""
    value: Any = record
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, str):
        raise ValueError(
            f'{where} has no text under subset_key "{key}", but {value!r}: which subset it belongs '
            f"to is not known; set subset_key to the key that tells it"
        )
    return value


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    plain = kind.value_type if types.is_dictionary(kind) else kind
    return any(
        test(plain)
        for test in (
            types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
            types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary, types.is_null,
        )
    )  # fmt: skip


def tfds_size(name: str) -> tuple[str, int, int]:
    """Full name, rows and bytes of the train split of a TFDS data set.

    Args:
      name: a registered name, or the directory of a prepared data set with its version.
    """
    source = _tfds_source(name)
    info = source.dataset_info
    return info.full_name, len(source), info.splits["train"].num_bytes


def read_tfds(
    name: str, rows: tuple[int, int], keys: Keys, repaired: Repaired, advance: Advance
) -> Iterator[Record]:
    """The rows `[first, last)` of the train split."""
    source = _tfds_source(name)
    per_row = source.dataset_info.splits["train"].num_bytes // len(source)
    for start in range(*rows, _ROWS_PER_BATCH):
        numbers = range(start, min(start + _ROWS_PER_BATCH, rows[1]))
        for number, record in zip(numbers, source.__getitems__(list(numbers)), strict=True):
            where = f"tfds:{name}, row {number}"
            if keys.text not in record:
                raise _no_such_key(where, keys.text, list(record))
            text = _as_text(record[keys.text], where, keys.text, repaired)
            yield Record(number, text, _subset(record, keys.subset, where))
        advance(per_row * len(numbers))


def without_surrogates(text: str, repaired: Repaired) -> str:
    """The text with U+FFFD for each lone surrogate, which JSON's escapes can make."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    repaired["documents with lone surrogates"] += 1
    return _SURROGATE.sub("\ufffd", text)


def _tfds_source(name: str) -> Any:
    import tensorflow_datasets as tfds

    if pathlib.Path(name).is_dir():
        return tfds.builder_from_directory(name).as_data_source(split="train")
    return tfds.data_source(name, split="train")


def _as_text(value: Any, where: str, text_key: str, repaired: Repaired) -> str:
    if isinstance(value, bytes):
        return _decode(value, repaired)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _no_text(where, text_key, type(value).__name__)
    return value


def _no_text(where: str, text_key: str, kind: str) -> ValueError:
    return ValueError(
        f'{where}: "{text_key}" is of type {kind}, not a text; '
        f"set text_key of the source to the key that holds the document"
    )


def _decode(content: bytes, repaired: Repaired) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        repaired[_INVALID_UTF8] += 1
        return content.decode(errors="replace")


def _no_such_key(where: str, text_key: str, keys: list[str]) -> ValueError:
    return ValueError(
        f'{where} has no "{text_key}"; it has {", ".join(map(repr, keys)) or "no keys at all"}; '
        f"set text_key of the source to the one that holds the document"
    )


def _split(chunks: Iterator[bytes], separator: bytes) -> Iterator[bytes]:
    """What stands between separators; a part as long as the file costs one copy of it."""
    parts: list[bytes] = []
    held = b""  # may begin a separator that goes on in the next chunk
    for chunk in chunks:
        *ended, rest = (held + chunk).split(separator)
        for part in ended:
            parts.append(part)
            yield b"".join(parts)
            parts.clear()
        keep = _overlap(rest, separator)
        held = rest[len(rest) - keep :]
        parts.append(rest[: len(rest) - keep])
    if last := b"".join([*parts, held]):
        yield last


def _overlap(content: bytes, separator: bytes) -> int:
    """Length of the longest end of content that begins a separator."""
    longest = min(len(content), len(separator) - 1)
    return next((n for n in range(longest, 0, -1) if content.endswith(separator[:n])), 0)


def _lf_only(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same with LF for each CRLF."""
    held = b""  # a CR whose LF may come in the next chunk
    for chunk in chunks:
        content = (held + chunk).replace(b"\r\n", b"\n")
        held = b"\r" if content.endswith(b"\r") else b""
        yield content.removesuffix(held)
    yield held


def _without_mark(path: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    first = b""
    for chunk in chunks:
        first += chunk
        if len(first) >= len(_UTF8_MARK):
            break
    if first.startswith(_UTF16_MARKS):
        raise ValueError(
            f"{path} is UTF-16 text, which would be read as noise; "
            f"convert it with iconv -f UTF-16 -t UTF-8"
        )
    if b"\0" in first:
        raise ValueError(
            f"{path} begins with bytes of value 0 among others, so it is no plain text but a "
            f"binary file, read as noise; leave it out, or name the text files by a glob"
        )
    yield first.removeprefix(_UTF8_MARK)
    yield from chunks


def _chunks(path: str, advance: Advance) -> Iterator[bytes]:
    """The content of a file, decompressed according to its ending."""
    with open(path, "rb") as file:
        stored = iter(lambda: _read_chunk(file, advance), b"")
        ending = pathlib.Path(path).suffix.lower()
        if ending == ".zst":
            yield from _decompressed(path, stored, _new_zstd)
        elif ending == ".gz":
            yield from _decompressed(path, stored, _new_gzip)
        else:
            yield from stored


def _read_chunk(file: Any, advance: Advance) -> bytes:
    chunk = file.read(_CHUNK_BYTES)
    advance(len(chunk))
    return chunk


def _new_zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _new_gzip() -> Any:
    return zlib.decompressobj(wbits=31)


def _decompressed(
    path: str, stored: Iterator[bytes], new_decompressor: Callable[[], Any]
) -> Iterator[bytes]:
    """Decompresses one frame after the other; a frame without its end is an error, not an end."""
    import zstandard

    decompressor = None
    empty = True
    try:
        for chunk in stored:
            empty = False
            while chunk:
                decompressor = decompressor or new_decompressor()
                yield decompressor.decompress(chunk)
                chunk = decompressor.unused_data
                if decompressor.eof:
                    decompressor = None
    except (zstandard.ZstdError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or not what its ending says: {error}") from error
    if decompressor is not None or empty:
        raise ValueError(
            f"{path} ends in the middle of its compressed data: it was cut short; copy it again"
        )
