"""Rows of a parquet file in bounded memory, however large its row groups and pages are.

Two things would otherwise grow with the file: what pyarrow reads ahead (row groups, kept until the
end), and a page, which is unpacked whole: writers end one after so many rows (pyarrow: 1,024), so
that one of books can have 2 GiB. How large each will be is told only by the page's header, a struct
in Thrift's compact protocol: https://parquet.apache.org/docs/file-format/.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

# Reading takes about twice this: the page, and the values of it. 1,000 books have about 400 MiB.
_LARGEST_PAGE = 512 << 20
_LARGEST_BATCH = 64 << 20
_READ_AHEAD = 1 << 20
_BOOL, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12


def open_parquet(path: str) -> Any:
    """A `pyarrow.parquet.ParquetFile` that reads ahead by 1 MiB a column."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_READ_AHEAD)


def bounded_batches(path: str, file: Any, columns: Sequence[str], rows: int) -> Iterator[Any]:
    """The rows of `file` (`open_parquet(path)`), at most `rows` at a time, of the columns alone.

    Raises ValueError where a page of them holds more than 512 MiB.
    """
    for group in range(file.metadata.num_row_groups):
        largest = max(_page_sizes(path, file.metadata.row_group(group), columns), default=0)
        if largest > _LARGEST_PAGE:
            raise ValueError(
                f"{path}: row group {group} has a page of {largest >> 20:,} MiB, which is unpacked "
                f"whole, in each worker; more than {_LARGEST_PAGE >> 20} MiB are not read. Write "
                "the file anew with smaller ones: import pyarrow.parquet as p; "
                f"p.write_table(p.read_table({path!r}), NEW, write_batch_size=16)"
            )
        # A value that many rows share counts once in its page, and in a batch each time.
        at_once = max(1, min(rows, _LARGEST_BATCH // max(largest, 1)))
        yield from file.iter_batches(at_once, row_groups=[group], columns=list(columns))


def _page_sizes(path: str, group: Any, columns: Sequence[str]) -> Iterator[int]:
    """Bytes, unpacked. Where headers make no sense there is damage, of which pyarrow will tell."""
    with open(path, "rb") as file:
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema.split(".")[0] not in columns:
                continue
            starts = (chunk.dictionary_page_offset, chunk.data_page_offset)
            start = min(offset for offset in starts if offset)  # None or 0: there is no such page
            end = start + chunk.total_compressed_size
            file.seek(start)
            while file.tell() < end:
                try:
                    header = _page_header(file)
                    unpacked, packed = header[2], header[3]
                except (EOFError, KeyError, RecursionError):
                    break
                if unpacked < 0 or packed < 0:
                    break
                yield unpacked
                file.seek(packed, io.SEEK_CUR)


def _page_header(file: BinaryIO) -> dict[int, int]:
    """The whole numbers of a struct by their field's number; what else it holds is passed over."""
    found, number = {}, 0
    while kind := _byte(file):
        step, kind = divmod(kind, 16)
        number = number + step if step else _integer(file)
        if kind in _INTEGERS:
            found[number] = _integer(file)
        elif kind not in _BOOL:  # a field's kind is its value
            _pass_over(file, kind)
    return found


def _pass_over(file: BinaryIO, kind: int) -> None:
    if kind in (*_BOOL, _BYTE):
        _byte(file)
    elif kind in _INTEGERS:
        _unsigned(file)
    elif kind == _DOUBLE:
        file.seek(8, io.SEEK_CUR)
    elif kind == _BINARY:
        file.seek(_unsigned(file), io.SEEK_CUR)
    elif kind in _LISTS:
        length, of = divmod(_byte(file), 16)
        for _ in range(_unsigned(file) if length == 15 else length):
            _pass_over(file, of)
    elif kind == _STRUCT:
        _page_header(file)
    else:  # a map, or no kind at all: no page's header has one
        raise EOFError


def _unsigned(file: BinaryIO) -> int:
    value, shift = 0, 0
    while True:
        byte = _byte(file)
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value
        if shift > 63:
            raise EOFError


def _integer(file: BinaryIO) -> int:
    value = _unsigned(file)
    return (value >> 1) ^ -(value & 1)


def _byte(file: BinaryIO) -> int:
    byte = file.read(1)
    if not byte:
        raise EOFError
    return byte[0]
