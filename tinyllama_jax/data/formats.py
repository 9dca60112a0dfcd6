"""Readers of the file formats that raw text comes in.

Each streams: what it holds is one document, or one batch of rows. `repaired` counts what could not
be read as it was and is given with U+FFFD in its place; `advance` is told of the bytes read, as the
file stores them.
"""

from __future__ import annotations

import collections
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
ROWS_PER_BATCH = 16  # of whatever size: a batch of books is not to fill the memory
MOST_UNPACKED = 1 << 30  # bytes at once, of what can only be unpacked whole
_PACKED_BYTES = 1 << 12
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_UTF8_MARK = b"\xef\xbb\xbf"
_SURROGATE = re.compile("[\ud800-\udfff]")
PIECE_BYTES = 64 << 20
LONGEST_TEXT = 256 << 20  # bytes; SlimPajama's longest document is far below
# Of a line of JSON, lists and objects take up to 32 times their bytes.
_ANY_LINE, _VALUES_OF_LINE = 32 << 20, 16_000_000
_ANY_ROWS, _ROWS_PER_BYTE = 10_000_000, 1000
_IN_PIECES = "documents given in pieces of 64 MiB"
_INVALID_UTF8 = "documents with bytes that are not UTF-8"


def read_text(path: str, separator: str, repaired: Repaired, advance: Advance) -> Iterator[Record]:
    """Each document of a plain text file, without byte-order mark.

    Line ends become LF. `separator` stands between documents, and one line end on either side of it
    belongs to it, not to them, as does one at the end of the file; "": the file is one document.
    One of more than 64 MiB is given in pieces, each a whole number of lines where there are any.
    """
    content = _lf_only(_without_mark(path, _chunks(path, advance)))
    if not separator:
        yield from (Record(0, _decode(piece, repaired)) for piece in _pieces(content, repaired))
        return
    number, begins = 0, True
    for part, ends in _split(content, separator.encode(), PIECE_BYTES):
        if number and begins:
            part = part.removeprefix(b"\n")
        if ends:
            part = part.removesuffix(b"\n")
        if part or begins:  # else the line end of the separator is all that was left
            yield Record(number, _decode(part, repaired))
        if begins and not ends:
            repaired[_IN_PIECES] += 1
        number, begins = number + ends, ends


def read_jsonl(path: str, keys: Keys, repaired: Repaired, advance: Advance) -> Iterator[Record]:
    """Each line that is not blank."""
    lines = _split(_chunks(path, advance), b"\n", LONGEST_TEXT)
    for number, (line, ends) in enumerate(lines):
        where = f"{path}:{number + 1}"
        if not ends:
            raise ValueError(
                f"{where}: this line has more than {LONGEST_TEXT >> 20} MiB, which no document "
                f"has: {line[:60]!r}; the file is damaged, or made to fill memory: leave it out"
            )
        if number == 0:
            line = line.removeprefix(_UTF8_MARK)
        if not line.strip():
            continue
        if len(line) > _ANY_LINE and (values := _values_of(line)) > _VALUES_OF_LINE:
            raise ValueError(
                f"{where}: this line has {values:,} values, for which memory may not suffice: "
                f"{line[:60]!r}; leave out all but {keys.text!r}, or the file if it is hostile"
            )
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
            raise no_such_key(where, keys.text, list(record))
        text = as_text(record[keys.text], where, keys.text, repaired)
        yield Record(number, text, subset_of(record, keys.subset, where))


def _values_of(line: bytes) -> int:
    """About how many a line of JSON has, texts and what is in lists included."""
    plain = line.replace(b"\\\\", b"").replace(b'\\"', b"")
    if (marks := plain.count(b'"')) > _VALUES_OF_LINE:
        return marks
    outside = b"".join(plain.split(b'"')[::2])
    return marks // 2 + sum(map(outside.count, (b",", b"[", b"{")))


def subset_of(record: dict[str, Any], key: str, where: str) -> str:
    """What `key` (names joined by points) leads to; "" where there is no key."""
    if not key:
        return ""
    value: Any = record
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if not isinstance(value, str):
        raise ValueError(
            f'{where} has no text under subset_key "{key}", but {value!r}: which subset it belongs '
            f"to is not known; set subset_key to the key that tells it"
        )
    return value


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
    for start in range(*rows, ROWS_PER_BATCH):
        numbers = range(start, min(start + ROWS_PER_BATCH, rows[1]))
        for number, record in zip(numbers, source.__getitems__(list(numbers)), strict=True):
            where = f"tfds:{name}, row {number}"
            if keys.text not in record:
                raise no_such_key(where, keys.text, list(record))
            text = as_text(record[keys.text], where, keys.text, repaired)
            yield Record(number, text, subset_of(record, keys.subset, where))
        advance(per_row * len(numbers))


def without_surrogates(text: str, repaired: Repaired) -> str:
    """The text with U+FFFD for each lone surrogate, which JSON's escapes can make."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    repaired["documents with lone surrogates"] += 1
    return _SURROGATE.sub("\ufffd", text)


def _tfds_source(name: str) -> Any:
    import tensorflow_datasets as tfds

    from tinyllama_jax.data import tfds_builders  # noqa: F401 - which registers their names

    if pathlib.Path(name).is_dir():
        return tfds.builder_from_directory(name).as_data_source(split="train")
    return tfds.data_source(name, split="train")


def as_text(value: Any, where: str, text_key: str, repaired: Repaired) -> str:
    """The document that a record's value is; a conversation's turns are lines of one.

    A conversation is a list of texts (UltraChat) or of objects with a `content`. Roles are not
    written: chat templates are for tuning.
    """
    if value is None:
        return ""
    if isinstance(value, list) and value:
        turns = [turn.get("content") if isinstance(turn, dict) else turn for turn in value]
        texts = [turn for turn in turns if isinstance(turn, str)]
        if len(texts) == len(turns):
            value = "\n".join(texts)
    if not isinstance(value, str | bytes):
        raise no_text(where, text_key, type(value).__name__)
    require_short(len(value), where)
    return _decode(value, repaired) if isinstance(value, bytes) else value


def require_short(size: int, where: str) -> None:
    if size > LONGEST_TEXT:
        raise ValueError(
            f"{where}: a text of {size >> 20} MiB, which no document has; leave it out"
        )


def require_few_rows(rows: int, path: str, size: int) -> None:
    """Without a text, or with one that they share, rows take next to no bytes."""
    if rows > max(_ANY_ROWS, _ROWS_PER_BYTE * size):
        raise ValueError(
            f"{path} says that it has {rows:,} rows, in {size:,} bytes: it is damaged, or made to "
            "be read for ever; leave it out"
        )


def no_text(where: str, text_key: str, kind: str) -> ValueError:
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


def no_such_key(where: str, key: str, keys: list[str], setting: str = "text_key") -> ValueError:
    holds = {"text_key": "holds the document", "subset_key": "tells the subset"}
    return ValueError(
        f'{where} has no "{key}"; it has {", ".join(map(repr, keys)) or "no keys at all"}; '
        f"set {setting} of the source to the one that {holds[setting]}"
    )


def _split(chunks: Iterator[bytes], separator: bytes, longest: int) -> Iterator[tuple[bytes, bool]]:
    """What stands between separators, and whether it ends there.

    Of what is longer than `longest` (and a chunk) a first piece is given, ahead of its last line
    end if it has one; then the rest.
    """
    parts: list[bytes] = []
    size = 0
    held = b""  # may begin a separator that goes on in the next chunk
    for chunk in chunks:
        *ended, rest = (held + chunk).split(separator)
        for part in ended:
            parts.append(part)
            yield b"".join(parts), True
            parts.clear()
            size = 0
        keep = _overlap(rest, separator)
        held = rest[len(rest) - keep :]
        parts.append(rest[: len(rest) - keep])
        size += len(parts[-1])
        if size > longest:
            piece, rest = _cut(parts)
            # A line end may belong to the separator behind it, which is not here yet.
            if piece.endswith(b"\n"):
                piece, rest = piece[:-1], b"\n" + rest
            if piece:
                yield piece, False
            parts, size = [rest], len(rest)
    if last := b"".join([*parts, held]):
        yield last, True


def _pieces(chunks: Iterator[bytes], repaired: Repaired) -> Iterator[bytes]:
    """All of a file, in pieces where it is large."""
    parts: list[bytes] = []
    cut_before = False
    for chunk in chunks:
        parts.append(chunk)
        if sum(map(len, parts)) > PIECE_BYTES:
            if not cut_before:
                repaired[_IN_PIECES] += 1
            cut_before = True
            piece, rest = _cut(parts)
            yield piece
            parts = [rest]
    yield b"".join(parts)


def _cut(parts: list[bytes]) -> tuple[bytes, bytes]:
    """What goes up to the last line end, or else the last whole character; and the rest."""
    whole = b"".join(parts)
    place = whole.rfind(b"\n", 1) + 1  # one at the beginning would leave all to the rest
    if not place:
        place = len(whole)
        for back in range(1, min(4, len(whole)) + 1):  # a character has 4 bytes at most
            byte = whole[-back]
            if byte >= 0xC0 and back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4):
                place = len(whole) - back
            if not 0x80 <= byte < 0xC0:  # the first byte of the last character
                break
    return whole[:place], whole[place:]


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
            yield from _in_chunks(_decompressed(path, stored, _new_zstd))
        elif ending == ".gz":
            yield from _in_chunks(_decompressed(path, stored, _new_gzip))
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


def _in_chunks(unpacked: Iterator[bytes]) -> Iterator[bytes]:
    """What was unpacked, no more at a time than is read of a plain file."""
    for content in unpacked:
        yield from (content[at : at + _CHUNK_BYTES] for at in range(0, len(content), _CHUNK_BYTES))


def _small(stored: Iterator[bytes]) -> Iterator[bytes]:
    """So little at a time that what it unpacks to has a bound: 128 KiB for each 4 bytes of zstd."""
    for chunk in stored:
        yield from (chunk[at : at + _PACKED_BYTES] for at in range(0, len(chunk), _PACKED_BYTES))


def _decompressed(
    path: str, stored: Iterator[bytes], new_decompressor: Callable[[], Any]
) -> Iterator[bytes]:
    """Decompresses one frame after the other; a frame without its end is an error, not an end."""
    import zstandard

    decompressor = None
    empty = True
    try:
        for chunk in _small(stored):
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
