"""Rows of a parquet file in bounded memory, however large its row groups and pages are.

Two things would otherwise grow with the file: what pyarrow reads ahead (row groups, kept until the
end), and a page, which is unpacked whole. Writers end one after so many rows (pyarrow 1,024, DuckDB
122,880), so one of books can have 2 GiB. How large it will be is told only by its header, a struct
in Thrift's compact protocol (https://parquet.apache.org/docs/file-format/). Where the headers are
is read here too: pyarrow, asked for it, ends the process where the file is damaged or encrypted.
Beside it stand the places of a dictionary's texts, and lengths that are written as differences, of
which a few bytes can stand for any number: how many there are is told only within the page.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from tinyllama_jax.data.formats import MOST_UNPACKED

_BATCH_BYTES, _LARGEST_BATCH = 16 << 20, 64 << 20
_READ_AHEAD = 1 << 20
_HEADER_BYTES = (1 << 12, 16 << 20)  # nearly all; the most that pyarrow takes

# Kinds of values in the compact protocol.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET = range(1, 11)
_STRUCT = 12

# Numbers of fields in parquet.thrift: of the file's metadata and a row group; of a chunk of a
# column, and its metadata; of a page's header, and what that has for each kind of page.
_ROW_GROUPS, _COLUMNS = 4, 1
_META_DATA, _ENCRYPTED = 3, 8
_CODEC, _NUM_VALUES, _DATA_PAGE, _DICTIONARY_PAGE = 4, 5, 9, 11
_KIND, _UNPACKED, _PACKED, _OF_DATA, _OF_DICTIONARY, _OF_DATA_V2 = 1, 2, 3, 5, 7, 8
_VALUES = 1
_ENCODING, _ENCODING_OF_LEVELS = 2, 3  # of data
_ENCODING_V2, _LEVELS, _LEVELS_OF_LISTS, _IS_PACKED = 4, 5, 6, 7  # of data, version 2
# Kinds of pages, with the field that is about each; encodings; codecs, as pyarrow calls them.
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_HEADERS = {_DATA: _OF_DATA, _DICTIONARY: _OF_DICTIONARY, _DATA_V2: _OF_DATA_V2}
_ENCODINGS = {_DATA: _ENCODING, _DATA_V2: _ENCODING_V2}
_RLE, _DELTA_LENGTHS, _DELTA_TEXTS = 3, 6, 7
_LISTS_OF_LENGTHS = {_DELTA_LENGTHS: 1, _DELTA_TEXTS: 2}
# Bytes that pyarrow has beside a page: for a length, and for a text of a dictionary (where it is in
# the page, how long, and where in a copy).
_OF_LENGTH, _OF_TEXT = 4, 20
_NOT_PACKED = 0
_CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}

# Which of them are read, and of what kind each is.
_Fields = Mapping[int, "_Fields | int"]
_OF_CHUNK: _Fields = {
    _META_DATA: {_CODEC: _I32, **dict.fromkeys((_NUM_VALUES, _DATA_PAGE, _DICTIONARY_PAGE), _I64)},
    _ENCRYPTED: {},
}
_OF_PAGE: _Fields = {
    **dict.fromkeys((_KIND, _UNPACKED, _PACKED), _I32),
    _OF_DATA: dict.fromkeys((_VALUES, _ENCODING, _ENCODING_OF_LEVELS), _I32),
    _OF_DICTIONARY: {_VALUES: _I32},
    _OF_DATA_V2: {
        **dict.fromkeys((_VALUES, _ENCODING_V2, _LEVELS, _LEVELS_OF_LISTS), _I32),
        _IS_PACKED: _TRUE,
    },
}

# What comes of reading what is no such thing.
_SENSELESS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class _Chunk(NamedTuple):
    start: int
    values: int
    codec: int
    has_levels: bool  # which tell, before the values, which of them are missing


class _Page(NamedTuple):
    is_dictionary: bool
    unpacked: int  # bytes, with what stands beside it
    values: int
    beginnings_shared: bool  # by its texts


def open_parquet(path: str) -> Any:
    """A `pyarrow.parquet.ParquetFile` that reads ahead by 1 MiB a column, and checks
    the checksums of pages where they are written."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(
        path, pre_buffer=False, buffer_size=_READ_AHEAD, page_checksum_verification=True
    )


def bounded_batches(path: str, file: Any, columns: Sequence[str], rows: int) -> Iterator[Any]:
    """The rows of `file` (`open_parquet(path)`), at most `rows` at a time, of the columns alone.

    Args:
      columns: names, or paths into structs ("meta.set"): then of the struct that field alone.

    Raises ValueError where more than 1 GiB of them would be unpacked at once (of each column a
    dictionary and a page; reading takes about twice as much), where a column has lists, and in the
    end where there are not as many rows as the file says.
    """
    # By their places: what a chunk says of its own name, pyarrow does not read.
    wanted = list[int | None]()
    for leaf in map(file.metadata.schema.column, range(len(file.metadata.schema))):
        is_wanted = f"{leaf.path}.".startswith(tuple(f"{column}." for column in columns))
        wanted.append(leaf.max_definition_level if is_wanted else None)
        if is_wanted and leaf.max_repetition_level:
            raise ValueError(
                f"{path}: column {leaf.path} has lists, of any length, where a text belongs: set "
                "text_key and subset_key of the source to the keys that hold them"
            )
    at_once = list[int]()
    with open(path, "rb") as content:
        for group, chunks in enumerate(_chunks(content, wanted)):
            unpacked, average, shared = 0, 1, 1
            for chunk in chunks:
                pages = list(_pages(content, chunk))
                dictionary = max((p.unpacked for p in pages if p.is_dictionary), default=0)
                largest = max((p.unpacked for p in pages if not p.is_dictionary), default=0)
                unpacked += dictionary + largest
                average = max([average, *(p.unpacked // p.values for p in pages)])
                # What rows share counts once in its page, and in a batch each time.
                beginnings_shared = any(p.beginnings_shared for p in pages)
                shared = max(shared, largest if beginnings_shared else dictionary)
            if unpacked > MOST_UNPACKED:
                raise ValueError(
                    f"{path}: row group {group} has pages of {unpacked:,} bytes, which each worker "
                    f"would unpack whole; more than {MOST_UNPACKED:,} are not read. If the file "
                    "is sound, write it anew with smaller ones: import pyarrow.parquet as p; "
                    f"p.write_table(p.read_table({path!r}), NEW, write_batch_size=1)"
                )
            fitting = min(rows, _BATCH_BYTES // average, _LARGEST_BATCH // shared)
            at_once.append(max(1, fitting))
        if len(at_once) != file.metadata.num_row_groups:
            raise _damaged(content, 0)
    left = file.metadata.num_rows
    for size, groups in itertools.groupby(range(len(at_once)), at_once.__getitem__):
        for batch in file.iter_batches(size, row_groups=list(groups), columns=list(columns)):
            left -= len(batch)
            yield batch
    if left:
        # Where a page seems to have no bytes, pyarrow is done with its column.
        raise ValueError(
            f"{path} cannot be read as parquet: it has {file.metadata.num_rows - left:,} rows, and "
            f"says {file.metadata.num_rows:,}; it is damaged: leave it out, or write it anew"
        )


def _chunks(file: BinaryIO, wanted: Sequence[int | None]) -> Iterator[list[_Chunk]]:
    """Each row group's, but for encrypted ones: pyarrow tells.

    Of the columns that are wanted: those for which there is a number, the greatest of its levels.
    """
    size = file.seek(0, os.SEEK_END)
    try:
        file.seek(size - 8)
        length = int.from_bytes(file.read(4), "little")
        file.seek(size - 8 - length)
        content = _Compact(file.read(length))
        for number, kind in content.fields():
            if number != _ROW_GROUPS:
                content.skip(kind)
                continue
            for _ in content.elements(kind):
                yield list(_chunks_of_group(content, wanted))
    except _SENSELESS as error:
        raise _damaged(file, size - 8) from error


def _chunks_of_group(content: _Compact, wanted: Sequence[int | None]) -> Iterator[_Chunk]:
    for number, kind in content.fields():
        if number != _COLUMNS:
            content.skip(kind)
            continue
        for element, levels in zip(content.elements(kind), wanted, strict=True):
            if levels is None:
                content.skip(element)
                continue
            chunk = content.struct(_OF_CHUNK)
            if _ENCRYPTED not in chunk:
                about = chunk[_META_DATA]
                # 0: there is no such page.
                starts = (about.get(_DICTIONARY_PAGE, 0), about[_DATA_PAGE])
                start = min((start for start in starts if start > 0), default=0)
                yield _Chunk(start, about[_NUM_VALUES], about[_CODEC], levels > 0)


def _pages(file: BinaryIO, chunk: _Chunk) -> Iterator[_Page]:
    """As many as its values take. Of one that is not read, nothing would be known: ValueError."""
    place, left = chunk.start, chunk.values
    end = file.seek(0, os.SEEK_END)
    while left > 0:
        if place >= end:
            raise _damaged(file, place)
        for most in _HEADER_BYTES:
            file.seek(place)
            content = _Compact(file.read(most))
            try:
                header = content.struct(_OF_PAGE)
                kind = header[_KIND]
                # Others, as of an index, are passed over.
                about = header[_HEADERS[kind]] if kind in _HEADERS else {_VALUES: 0}
                if min(header[_PACKED], header[_UNPACKED], about[_VALUES]) < 0:
                    raise ValueError("less than nothing")
                unpacked = max(header[_PACKED], header[_UNPACKED])
                unpacked += _OF_TEXT * about[_VALUES] if kind == _DICTIONARY else 0
                encoding = None if kind == _DICTIONARY else about.get(_ENCODINGS.get(kind))
                if encoding in _LISTS_OF_LENGTHS and unpacked <= MOST_UNPACKED:
                    file.seek(place + content.at)
                    readings = _readings(file.read(header[_PACKED]), header, chunk)
                    lists = _LISTS_OF_LENGTHS[encoding]
                    unpacked += _OF_LENGTH * max(_lengths(values, lists) for values in readings)
                delta = encoding == _DELTA_TEXTS
                page = _Page(kind == _DICTIONARY, unpacked, max(1, about[_VALUES]), delta)
                after = place + content.at + header[_PACKED]
                left -= 0 if kind == _DICTIONARY else about[_VALUES]
                break
            except _SENSELESS as error:
                senseless = error
        else:
            raise _damaged(file, place) from senseless
        yield page
        place = after


def _readings(content: bytes, header: Mapping[int, Any], chunk: _Chunk) -> Iterator[memoryview]:
    """The values of a page, in each way in which it may be read."""
    is_v2 = header[_KIND] == _DATA_V2
    about = header[_OF_DATA_V2 if is_v2 else _OF_DATA]
    before = [about[_LEVELS], about[_LEVELS_OF_LISTS]] if is_v2 else [0]
    if min(before) < 0:
        raise ValueError("less than nothing")
    values = memoryview(content)[sum(before) :]
    is_plain = chunk.codec == _NOT_PACKED or (is_v2 and not about.get(_IS_PACKED, True))
    readings = [values] if is_plain or not values else []
    if chunk.codec != _NOT_PACKED and values:
        # Where its first versions wrote that a page is plain, pyarrow unpacks it all the same.
        with contextlib.suppress(*_SENSELESS if is_plain else ()):
            readings.append(_decompress(values, header[_UNPACKED] - sum(before), chunk.codec))
    for reading in readings:
        if is_v2 or not chunk.has_levels:
            yield reading
        elif about[_ENCODING_OF_LEVELS] == _RLE:
            yield reading[4 + int.from_bytes(reading[:4], "little") :]
        else:
            raise ValueError("levels that do not tell where they end")


def _decompress(content: memoryview, size: int, codec: int) -> memoryview:
    import pyarrow

    try:
        unpacked = pyarrow.Codec(_CODECS[codec]).decompress(content, size)
        return memoryview(unpacked).cast("B")  # pyarrow's are signed
    except OSError as error:
        raise ValueError(str(error)) from error


def _lengths(values: memoryview, lists: int) -> int:
    """How many there are in so many lists, one behind another."""
    if not values:
        return 0
    content = _Compact(values)
    count = 0
    for left in range(lists, 0, -1):
        in_block, parts, length, _ = (content.unsigned() for _ in range(4))
        in_part = in_block // parts
        # What would not fit into 32 bits, others would read as less.
        if max(in_block, parts, length, 32 * in_part) >> 32 or not in_part or in_part % 32:
            raise ValueError(f"no list of {length} has blocks of {in_block} in {parts} parts")
        count += length
        if left == 1 or _OF_LENGTH * count > MOST_UNPACKED:
            break
        length -= 1  # the first stands alone
        while length > 0:
            content.unsigned()
            content.skip_bytes(parts)
            for width in content.content[content.at - parts : content.at]:
                if length > 0:
                    content.skip_bytes(in_part * width // 8)
                length -= in_part
    return count


def _damaged(file: BinaryIO, place: int) -> ValueError:
    return ValueError(
        f"{file.name} cannot be read as parquet: near byte {place:,} it does not tell how large "
        "its pages are; it is damaged, or of an unknown kind: leave it out, or write it anew"
    )


class _Compact:
    """Reads values, or passes over them, one after another."""

    def __init__(self, content: bytes | memoryview) -> None:
        self.content = content
        self.at = 0

    def fields(self) -> Iterator[tuple[int, int]]:
        """Number and kind of a struct's fields; between two of them the value must be read."""
        number = 0
        while head := self.byte():
            step, kind = divmod(head, 16)
            number = number + step if step else self.signed()
            if not 0 <= number < 1 << 15:
                raise ValueError(f"no field has number {number}")  # readers may cut it to 16 bits
            yield number, kind

    def elements(self, of: int) -> Iterator[int]:
        """Their kind, as often as a list has some; between two of them one must be read."""
        if of != _LIST:
            raise ValueError(f"a value of kind {of} where a list belongs")
        length, kind = divmod(self.byte(), 16)
        length = self.unsigned() if length == 15 else length
        return itertools.repeat(kind, length)

    def struct(self, wanted: _Fields) -> dict[int, Any]:
        """By their numbers, the fields that are wanted; and of those that are structs, likewise."""
        found = {}
        for number, kind in self.fields():
            if number in found:
                raise ValueError(f"field {number} is there twice")
            if number in wanted:
                found[number] = self.value(kind, wanted[number])
            else:
                self.skip(kind)
        return found

    def value(self, kind: int, wanted: _Fields | int) -> Any:
        """Only of the kind that is wanted: others would pass over it."""
        if kind == _STRUCT and isinstance(wanted, Mapping):
            return self.struct(wanted)
        if wanted == _TRUE and kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind != wanted:
            raise ValueError(f"a value of kind {kind} where {wanted} belongs")
        value = self.signed()
        if kind == _I32 and not -1 << 31 <= value < 1 << 31:
            raise ValueError(f"{value} where 32 bits belong")
        return value

    def skip(self, kind: int) -> None:
        if kind in (_I16, _I32, _I64):
            self.unsigned()
        elif kind == _BINARY:
            self.skip_bytes(self.unsigned())
        elif kind in (_LIST, _SET):
            for of in self.elements(_LIST):
                # A truth value has its own byte here, and is part of a field's head elsewhere.
                self.skip(_BYTE if of in (_TRUE, _FALSE) else of)
        elif kind == _STRUCT:
            for _, of in self.fields():
                self.skip(of)
        elif kind == _BYTE:
            self.skip_bytes(1)
        elif kind == _DOUBLE:
            self.skip_bytes(8)
        elif kind not in (_TRUE, _FALSE):
            raise ValueError(f"parquet has no values of kind {kind}")

    def skip_bytes(self, length: int) -> None:
        self.at += length
        if self.at > len(self.content):
            raise EOFError

    def signed(self) -> int:
        value = self.unsigned()
        return (value >> 1) ^ -(value & 1)

    def unsigned(self) -> int:
        value = 0
        for shift in range(0, 64, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number of more than 64 bits")

    def byte(self) -> int:
        self.at += 1
        return self.content[self.at - 1]
