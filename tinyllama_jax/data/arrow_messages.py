"""Sizes of what an Arrow stream packs, read before anything of it is unpacked.

A batch of rows is unpacked whole, and one of a few kB can hold terabytes. pyarrow gives a stream's
messages, but not what their metadata says of packing: those are tables in the FlatBuffers format
(https://flatbuffers.dev/internals; fields as in Arrow's Message.fbs), which pyarrow has verified.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

# Numbers of fields.
_DICTIONARIES, _BATCHES = 2, 3  # of a file's footer
_VERSION, _HEADER = 0, 2  # of a message
_V5 = 4
_ID, _DATA, _IS_DELTA = 0, 1, 2  # of a dictionary
_BUFFERS, _COMPRESSION, _VIEWED = 2, 3, 4  # of a batch
_COMPRESSION_OF_2020 = b"ARROW:experimental_compression"  # where Arrow 0.17 told of it


def messages_of_file(file: Any) -> Iterator[Any]:
    """Dictionaries and batches of what `pyarrow.ipc.open_file` took, by its footer.

    Between them can be what no reader of streams takes: polars writes the schema in a way of its
    own.
    """
    import pyarrow.ipc

    end = file.size() - 10  # the footer's length, and a mark
    file.seek(end)
    length = int.from_bytes(file.read(4), "little")
    file.seek(end - length)
    footer = _Table.first_of(file.read(length))
    blocks = [b for kind in (_DICTIONARIES, _BATCHES) for b in footer.structs(kind, "<qi4xq")]
    told = len(blocks)
    file.seek(8)
    mark, schema = struct.unpack("<Ii", file.read(8))
    if mark == 0xFFFFFFFF:  # polars has none
        blocks.append((8, 8 + schema, 0))
    for block, (start, *_) in itertools.pairwise(sorted([*blocks, (end - length, 0, 0)])):
        # Between them is padding, and behind the last an end mark too: less than any batch has.
        if not 0 <= start - sum(block) <= 80:
            raise pyarrow.ArrowInvalid("its footer does not tell of all that is in it")
    for start, _, _ in blocks[:told]:
        file.seek(start)
        yield pyarrow.ipc.read_message(file)


def require_end_of_stream(file: Any) -> None:
    """Raises pyarrow.ArrowInvalid where a stream, which was read, ends before the file or nowhere.

    The format has an end mark for who does not know how long a stream is; all writers make it.
    """
    import pyarrow

    end = file.tell()
    if behind := file.size() - end:
        raise pyarrow.ArrowInvalid(f"{behind:,} bytes stand behind its end: another stream?")
    file.seek(0)
    mark = file.read(4)
    # Before 2019, streams began and ended without this.
    if mark == b"\xff" * 4:
        file.seek(end - 8)
        if file.read(8) != mark + b"\0" * 4:
            raise pyarrow.ArrowInvalid("it has no end mark: cut off, or its writer was not closed")


def most_unpacked(messages: Iterable[Any], schema: Any, wanted: Sequence[int]) -> int:
    """Bytes that are unpacked at once, at most, where `pyarrow.ipc.Message`s are read in order.

    These are a batch's columns that are wanted, by number in the schema ([]: all, as in pyarrow's
    IpcReadOptions), and all dictionaries. What is not packed stays in the file, and counts as 0,
    but for dictionaries that grow: each time, they are made anew in memory.

    Raises pyarrow.ArrowInvalid where a message has no content.
    """
    largest, most_held, dictionaries = 0, 0, dict[int, int]()
    layouts = [(_layout(schema, field), _layout(schema, field + 1)) for field in wanted]
    for message in messages:
        content = _Table.first_of(message.metadata.to_pybytes())
        header = content.table(_HEADER)
        if message.type == "record batch":
            # Before, some columns had more buffers: there, all count.
            known = layouts if content.value("<h", _VERSION) >= _V5 else ()
            largest = max(largest, _unpacked(message, header, known))
        elif message.type == "dictionary":
            size, number = _unpacked(message, header.table(_DATA)), header.value("<q", _ID)
            if header.value("<?", _IS_DELTA):
                size = dictionaries.get(number, 0) + max(size, message.body.size)
            dictionaries[number] = size
            most_held = max(most_held, sum(dictionaries.values()))
    return largest + most_held


def _layout(schema: Any, fields: int) -> tuple[int, int]:
    """How many buffers the first fields have; and how many of them have some more in each batch."""
    import pyarrow

    empty = [pyarrow.nulls(0, schema.field(number).type) for number in range(fields)]
    batch = pyarrow.RecordBatch.from_arrays(empty, [str(number) for number in range(fields)])
    content = pyarrow.ipc.read_message(batch.serialize()).metadata.to_pybytes()
    table = _Table.first_of(content).table(_HEADER)
    return len(table.structs(_BUFFERS, "<qq")), len(table.structs(_VIEWED, "<q"))


def _unpacked(
    message: Any, batch: _Table, layouts: Sequence[tuple[tuple[int, int], tuple[int, int]]] = ()
) -> int:
    """What its buffers hold; each begins with that number where the batch is packed, -1: as is."""
    if not batch.place(_COMPRESSION) and _COMPRESSION_OF_2020 not in batch.content:
        return 0
    body = memoryview(message.body)
    starts = [start for start, _ in batch.structs(_BUFFERS, "<qq")]
    if layouts:
        more = [count for (count,) in batch.structs(_VIEWED, "<q")]
        bounds = [[plain + sum(more[:views]) for plain, views in layout] for layout in layouts]
        starts = [start for begin, end in bounds for start in starts[begin:end]]
    lengths = (int.from_bytes(body[at : at + 8], "little", signed=True) for at in starts)
    return sum(max(0, length) for length in lengths)


class _Table(NamedTuple):
    content: bytes
    at: int

    @classmethod
    def first_of(cls, content: bytes) -> _Table:
        return cls(content, *struct.unpack_from("<I", content))

    def place(self, number: int) -> int:
        """Where the field begins; 0: there is none, all being optional."""
        slots = self.at - self._read("<i", self.at)
        slot = 4 + 2 * number
        offset = self._read("<H", slots + slot) if slot < self._read("<H", slots) else 0
        return self.at + offset if offset else 0

    def value(self, kind: str, number: int) -> int:
        """What the field says, by default 0."""
        place = self.place(number)
        return self._read(kind, place) if place else 0

    def table(self, number: int) -> _Table:
        import pyarrow

        place = self.place(number)
        if not place:
            raise pyarrow.ArrowInvalid("a message has no content")
        return _Table(self.content, place + self._read("<I", place))

    def structs(self, number: int, kind: str) -> list[tuple[int, ...]]:
        place = self.place(number)
        if not place:
            return []
        place += self._read("<I", place)
        count = self._read("<I", place)
        content = self.content[place + 4 :][: struct.calcsize(kind) * count]
        return list(struct.iter_unpack(kind, content))

    def _read(self, kind: str, place: int) -> int:
        return struct.unpack_from(kind, self.content, place)[0]
