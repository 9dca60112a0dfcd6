"""Rows of a parquet file in bounded memory, however large its row groups and pages are.

Two things would otherwise grow with the file: what pyarrow reads ahead (row groups, kept until the
end), and a page, which is unpacked whole. Writers end one after so many rows (pyarrow 1,024, DuckDB
122,880), so one of books can have 2 GiB. How large it will be is told only by its header, a struct
in Thrift's compact protocol (https://parquet.apache.org/docs/file-format/). Where the headers are
is read here too: pyarrow, asked for it, ends the process where the file is damaged or encrypted.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

# Bytes unpacked at once: of each column a dictionary and a page. Reading takes about twice as much.
_MOST_UNPACKED = 1 << 30
_BATCH_BYTES, _LARGEST_BATCH = 16 << 20, 64 << 20
_READ_AHEAD = 1 << 20
_HEADER_BYTES = (1 << 12, 16 << 20)  # nearly all; the most that pyarrow takes

# Numbers of fields, and values, of parquet.thrift.
_ROW_GROUPS, _COLUMNS, _META_DATA, _ENCRYPTED = 4, 1, 3, 8
_PATH, _NUM_VALUES, _DATA_PAGE, _DICTIONARY_PAGE = 3, 5, 9, 11
_UNPACKED, _PACKED, _OF_DATA, _OF_DICTIONARY, _OF_DATA_V2, _VALUES = 2, 3, 5, 7, 8, 1
_DELTA_BYTE_ARRAY = 7

# Kinds of values in the compact protocol.
_BOOLS, _INTEGERS, _LISTS = (1, 2), (4, 5, 6), (9, 10)
_BYTE, _DOUBLE, _BINARY, _STRUCT = 3, 7, 8, 12
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


class _Page(NamedTuple):
    is_dictionary: bool
    unpacked: int  # bytes
    values: int
    beginnings_shared: bool  # by its texts


def open_parquet(path: str) -> Any:
    """A `pyarrow.parquet.ParquetFile` that reads ahead by 1 MiB a column."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_READ_AHEAD)


def bounded_batches(path: str, file: Any, columns: Sequence[str], rows: int) -> Iterator[Any]:
    """The rows of `file` (`open_parquet(path)`), at most `rows` at a time, of the columns alone.

    Args:
      columns: names, or paths into structs ("meta.set"): then of the struct that field alone.

    Raises ValueError where more than 1 GiB of them would be unpacked at once.
    """
    at_once = [rows] * file.metadata.num_row_groups
    with open(path, "rb") as content:
        for group, chunks in enumerate(_chunks(content, columns)):
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
            if unpacked > _MOST_UNPACKED:
                raise ValueError(
                    f"{path}: row group {group} has pages of {unpacked:,} bytes, which each worker "
                    f"would unpack whole; more than {_MOST_UNPACKED:,} are not read. If the file "
                    "is sound, write it anew with smaller ones: import pyarrow.parquet as p; "
                    f"p.write_table(p.read_table({path!r}), NEW, write_batch_size=1)"
                )
            fitting = min(rows, _BATCH_BYTES // average, _LARGEST_BATCH // shared)
            at_once[group] = max(1, fitting)
    for size, groups in itertools.groupby(range(len(at_once)), at_once.__getitem__):
        yield from file.iter_batches(size, row_groups=list(groups), columns=list(columns))


def _chunks(file: BinaryIO, columns: Sequence[str]) -> list[list[_Chunk]]:
    """What each row group has of the columns, but for what is encrypted: pyarrow tells of that."""
    wanted = tuple(f"{column}." for column in columns)
    size = file.seek(0, os.SEEK_END)
    try:
        file.seek(size - 8)
        length = int.from_bytes(file.read(4), "little")
        file.seek(size - 8 - length)
        groups = _struct(io.BytesIO(file.read(length)))[_ROW_GROUPS]
        parts = [
            [of[_META_DATA] for of in group[_COLUMNS] if _ENCRYPTED not in of] for group in groups
        ]
        return [
            [
                _chunk(part)
                for part in of
                if f"{b'.'.join(part[_PATH]).decode()}.".startswith(wanted)
            ]
            for of in parts
        ]
    except _SENSELESS as error:
        raise _damaged(file, size - 8) from error


def _chunk(part: dict[int, Any]) -> _Chunk:
    starts = (part.get(_DICTIONARY_PAGE) or 0, part[_DATA_PAGE])  # 0: there is no such page
    return _Chunk(min((start for start in starts if start > 0), default=0), part[_NUM_VALUES])


def _pages(file: BinaryIO, chunk: _Chunk) -> Iterator[_Page]:
    """As many as its values take. Of one that is not read, nothing would be known: ValueError."""
    place, left = chunk.start, chunk.values
    while left > 0:
        for most in _HEADER_BYTES:
            file.seek(place)
            content = io.BytesIO(file.read(most))
            try:
                header = _struct(content)
                data = header.get(_OF_DATA) or header.get(_OF_DATA_V2) or {_VALUES: 0}
                values = header.get(_OF_DICTIONARY, data)[_VALUES]
                delta = data.get(4 if _OF_DATA_V2 in header else 2) == _DELTA_BYTE_ARRAY
                unpacked = max(header[_PACKED], header[_UNPACKED])
                page = _Page(_OF_DICTIONARY in header, unpacked, max(1, values), delta)
                after = place + content.tell() + header[_PACKED]
                left -= data[_VALUES]
                break
            except _SENSELESS as error:
                senseless = error
        else:
            raise _damaged(file, place) from senseless
        if after <= place or data[_VALUES] < 0:
            raise _damaged(file, place)
        yield page
        place = after


def _damaged(file: BinaryIO, place: int) -> ValueError:
    return ValueError(
        f"{file.name} cannot be read as parquet: near byte {place:,} it does not tell how large "
        "its pages are; it is damaged, or of an unknown kind: leave it out, or write it anew"
    )


def _struct(file: io.BytesIO) -> dict[int, Any]:
    """What a struct holds, by the numbers of its fields."""
    fields, number = {}, 0
    while head := _byte(file):
        step, kind = divmod(head, 16)
        number = number + step if step else _signed(file)
        fields[number] = kind == _BOOLS[0] if kind in _BOOLS else _value(file, kind)
    return fields


def _value(file: io.BytesIO, kind: int) -> Any:
    if kind in (*_BOOLS, _BYTE):
        return _byte(file)
    if kind in _INTEGERS:
        return _signed(file)
    if kind == _DOUBLE:
        return file.read(8)
    if kind == _BINARY:
        return file.read(_unsigned(file))
    if kind in _LISTS:
        length, of = divmod(_byte(file), 16)
        return [_value(file, of) for _ in range(_unsigned(file) if length == 15 else length)]
    if kind == _STRUCT:
        return _struct(file)
    raise ValueError(f"parquet has no values of kind {kind}")


def _signed(file: io.BytesIO) -> int:
    value = _unsigned(file)
    return (value >> 1) ^ -(value & 1)


def _unsigned(file: io.BytesIO) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = _byte(file)
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise ValueError("a number of more than 64 bits")


def _byte(file: io.BytesIO) -> int:
    byte = file.read(1)
    if not byte:
        raise EOFError
    return byte[0]
