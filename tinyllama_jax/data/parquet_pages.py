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

from tinyllama_jax.data.formats import MOST_UNPACKED, require_few_rows
from tinyllama_jax.data.thrift_compact import (
    BINARY,
    I32,
    I64,
    LIST,
    SENSELESS,
    TRUE,
    Compact,
    Fields,
)

_BATCH_BYTES, _LARGEST_BATCH = 16 << 20, 64 << 20
_READ_AHEAD = 1 << 20
_HEADER_BYTES = (1 << 12, 16 << 20)  # nearly all; the most that pyarrow takes
# For a column, or its chunk in a row group, of which a footer tells in 3 bytes or more, pyarrow has
# about 700: footers of less than 1 MiB may have any number of them.
_ANY_FOOTER, _LARGEST_FOOTER, _MOST_CHUNKS = 1 << 20, 32 << 20, 1_000_000

# Numbers of fields in parquet.thrift: of the file's metadata and a row group; of a chunk of a
# column, and its metadata; of a page's header, and what that has for each kind of page.
_SCHEMA, _ROW_GROUPS, _COLUMNS = 2, 4, 1
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

# Which of them are read, and of what kind each is; and all lists that there can be.
_OF_CHUNK: Fields = {
    _META_DATA: {
        _CODEC: I32,
        **dict.fromkeys((_NUM_VALUES, _DATA_PAGE, _DICTIONARY_PAGE), I64),
        # Encodings, names, keys, counts of encodings; counts of levels; kinds of shapes.
        **{2: [I32], 3: [BINARY], 8: [{}], 13: [{}], 16: {2: [I64], 3: [I64]}, 17: {2: [I32]}},
    },
    _ENCRYPTED: {},
}
_OF_GROUP: Fields = {_COLUMNS: [_OF_CHUNK], 4: [{}]}  # by which columns it is sorted
_OF_FILE: Fields = {_SCHEMA: [{}], _ROW_GROUPS: [_OF_GROUP], 5: [{}], 7: [{}]}  # keys; orders
_OF_PAGE: Fields = {
    **dict.fromkeys((_KIND, _UNPACKED, _PACKED), I32),
    _OF_DATA: dict.fromkeys((_VALUES, _ENCODING, _ENCODING_OF_LEVELS), I32),
    _OF_DICTIONARY: {_VALUES: I32},
    _OF_DATA_V2: {
        **dict.fromkeys((_VALUES, _ENCODING_V2, _LEVELS, _LEVELS_OF_LISTS), I32),
        _IS_PACKED: TRUE,
    },
}


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

    _require_bounded_footer(path)
    return pyarrow.parquet.ParquetFile(
        path, pre_buffer=False, buffer_size=_READ_AHEAD, page_checksum_verification=True
    )


def bounded_batches(path: str, file: Any, columns: Sequence[str], rows: int) -> Iterator[Any]:
    """The rows of `file` (`open_parquet(path)`), at most `rows` at a time, of the columns alone.

    Args:
      columns: names, or paths into structs ("meta.set"): then of the struct that field alone.

    Raises ValueError where more than 1 GiB of them would be unpacked at once (of each column a
    dictionary and a page; reading takes about twice as much), where a column has lists, where there
    are more rows than the file can have for good, and in the end where there are not as many as it
    says.
    """
    require_few_rows(file.metadata.num_rows, path, os.path.getsize(path))
    # By their places: what a chunk says of its own name, pyarrow does not read.
    wanted = list[int | None]()
    schema = file.schema_arrow
    # Of a dictionary that the schema tells of, pyarrow has the page, a copy, and the last batch's.
    kinds = [schema.field(c if c in schema.names else c.split(".")[0]).type for c in columns]
    times = 3 if any("dictionary<" in str(kind) for kind in kinds) else 1
    width = 0  # of values that always have one, even where they are missing
    for leaf in map(file.metadata.schema.column, range(len(file.metadata.schema))):
        is_wanted = f"{leaf.path}.".startswith(tuple(f"{column}." for column in columns))
        wanted.append(leaf.max_definition_level if is_wanted else None)
        if is_wanted and leaf.physical_type == "FIXED_LEN_BYTE_ARRAY":
            width += leaf.length
        if is_wanted and leaf.max_repetition_level:
            raise ValueError(
                f"{path}: column {leaf.path}, which is read with {', '.join(columns)}, has lists, "
                "of any length: set text_key and subset_key of the source to keys that hold texts; "
                "a column of its own must be renamed, so that it begins otherwise"
            )
    at_once = list[int]()
    with open(path, "rb") as content:
        for group, chunks in enumerate(_chunks(content, wanted)):
            # pyarrow has room for no fewer than 64 of a width.
            unpacked, average, shared = 64 * width, max(1, width), 1
            for chunk in chunks:
                dictionary, largest, a_text, beginnings_shared = 0, 0, 0, False
                for page in _pages(content, chunk):
                    if page.is_dictionary:
                        dictionary = max(dictionary, page.unpacked)
                    else:
                        largest = max(largest, page.unpacked)
                    a_text = max(a_text, page.unpacked // page.values)
                    beginnings_shared |= page.beginnings_shared
                unpacked += times * dictionary + largest
                average += a_text
                # What rows share counts once in its page, and in a batch each time.
                shared += largest if beginnings_shared else dictionary
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
            raise _damaged(content, 0, f"only of {len(at_once)} row groups")
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
    place, content = _footer(file)
    try:
        for _ in content.elements_of(_ROW_GROUPS, _OF_FILE):
            yield list(_chunks_of_group(content, wanted))
    except SENSELESS as error:
        raise _damaged(file, place, error) from error


def _footer(file: BinaryIO) -> tuple[int, Compact]:
    """Its place, and what is there."""
    end = file.seek(0, os.SEEK_END) - 8  # a length, and a mark
    file.seek(max(0, end))
    place = max(0, end - int.from_bytes(file.read(4), "little"))
    file.seek(place)
    return place, Compact(file.read(min(max(0, end - place), _LARGEST_FOOTER + 1)))


def _require_bounded_footer(path: str) -> None:
    with open(path, "rb") as file:
        place, content = _footer(file)
    length = len(content.content)
    if place < 4 or length <= _ANY_FOOTER:
        return  # what is none, pyarrow tells
    chunks = 0
    try:
        for number, kind in content.fields() if length <= _LARGEST_FOOTER else ():
            if number not in (_SCHEMA, _ROW_GROUPS) or kind != LIST:
                content.skip(kind, _OF_FILE.get(number))
                continue
            for element in content.elements(_OF_FILE[number]):
                chunks += 1
                if number == _SCHEMA:
                    content.skip(element)
                    continue
                for chunk in content.elements_of(_COLUMNS, _OF_GROUP):
                    content.skip(chunk, _OF_CHUNK)
                    chunks += 1
    except SENSELESS as error:
        raise _damaged(file, place, error) from error
    if chunks > _MOST_CHUNKS or length > _LARGEST_FOOTER:
        raise ValueError(
            f"{path}: what it tells of its row groups and their columns pyarrow would turn into "
            f"some GB; more than {_LARGEST_FOOTER:,} bytes, or than {_MOST_CHUNKS:,} columns of "
            "row groups, are not read. If the file is sound, write it anew with larger ones, where "
            "there is memory: import pyarrow.parquet as p; "
            f"p.write_table(p.read_table({path!r}), NEW)"
        )


def _chunks_of_group(content: Compact, wanted: Sequence[int | None]) -> Iterator[_Chunk]:
    elements = content.elements_of(_COLUMNS, _OF_GROUP)
    for element, levels in zip(elements, wanted, strict=True):
        if levels is None:
            content.skip(element, _OF_CHUNK)
            continue
        chunk = content.struct(_OF_CHUNK)
        if _ENCRYPTED not in chunk:
            about = chunk[_META_DATA]
            data, dictionary = about[_DATA_PAGE], about.get(_DICTIONARY_PAGE, 0)
            start = dictionary if 0 < dictionary < data else data  # 0: there is none
            yield _Chunk(start, about[_NUM_VALUES], about[_CODEC], levels > 0)


def _pages(file: BinaryIO, chunk: _Chunk) -> Iterator[_Page]:
    """As many as its values take. Of one that is not read, nothing would be known: ValueError."""
    place, left = chunk.start, chunk.values
    end = file.seek(0, os.SEEK_END)
    while left > 0:
        if not 0 < place < end:
            raise _damaged(file, place)
        for most in _HEADER_BYTES:
            file.seek(place)
            content = Compact(file.read(most))
            try:
                header = content.struct(_OF_PAGE)
                kind = header[_KIND]
                about = header[_HEADERS[kind]]  # nobody writes others
                if min(header[_PACKED], header[_UNPACKED], about[_VALUES]) < 0:
                    raise ValueError("less than nothing")
                unpacked = max(header[_PACKED], header[_UNPACKED])
                unpacked += _OF_TEXT * about[_VALUES] if kind == _DICTIONARY else 0
                encoding = None if kind == _DICTIONARY else about.get(_ENCODINGS.get(kind))
                if encoding in _LISTS_OF_LENGTHS and unpacked <= MOST_UNPACKED:
                    file.seek(place + content.at)
                    readings = _readings(file.read(header[_PACKED]), header, chunk)
                    lists = _LISTS_OF_LENGTHS[encoding]
                    unpacked += _OF_LENGTH * max(
                        _lengths(values, lists, about[_VALUES]) for values in readings
                    )
                delta = encoding == _DELTA_TEXTS
                page = _Page(kind == _DICTIONARY, unpacked, max(1, about[_VALUES]), delta)
                after = place + content.at + header[_PACKED]
                left -= 0 if kind == _DICTIONARY else about[_VALUES]
                break
            except SENSELESS as error:
                senseless = error
        else:
            raise _damaged(file, place, senseless) from senseless
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
        with contextlib.suppress(*SENSELESS if is_plain else ()):
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

    if codec not in _CODECS:
        raise ValueError(f"codec {codec} is not known here")  # 5 is LZ4 as Hadoop parts it
    try:
        unpacked = pyarrow.Codec(_CODECS[codec]).decompress(content, size)
        return memoryview(unpacked).cast("B")  # pyarrow's are signed
    except OSError as error:
        raise ValueError(str(error)) from error


def _lengths(values: memoryview, lists: int, most: int) -> int:
    """How many there are in so many lists, one behind another, each of at most so many."""
    if not values:
        return 0
    content = Compact(values)
    count = 0
    for left in range(lists, 0, -1):
        in_block, parts, length, _ = (content.unsigned() for _ in range(4))
        in_part = in_block // parts
        # What would not fit into 32 bits, others would read as less.
        if max(in_block, parts, length, 32 * in_part) >> 32 or not in_part or in_part % 32:
            raise ValueError(f"no list of {length} has blocks of {in_block} in {parts} parts")
        if length > most:
            raise ValueError(f"{length} lengths of {most} texts")
        count += length
        if left == 1:
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


def _damaged(file: BinaryIO, place: int, why: object = "outside of the file") -> ValueError:
    return ValueError(
        f"{file.name} cannot be read as parquet: near byte {place:,} it does not tell how large "
        f"its pages are ({why}); it is damaged, or of an unknown kind: leave it out, or write it "
        "anew"
    )
