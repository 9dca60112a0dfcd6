"""Tokenized corpora in lit-gpt's packed format, as TinyLlama's were published.

A chunk is a file of 24 bytes of header (magic, version, code of the type, ids per chunk; all little
endian) and so many ids. Each process of the packer wrote a sequence of chunks,
`<prefix>_0000000000.bin` and on; a document goes on in the next chunk where one is full. Documents
begin with BOS and end without a mark; what the last chunk of a process had left was filled with BOS
(TinyLlama's issue 83: such rows were trained on). Here that filling is cut off, and documents are
put together again.
"""

from __future__ import annotations

import pathlib
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

MAGIC = b"LITPKDS"
_HEADER = struct.Struct("<7sQBQ")  # magic, version, code of the type, ids per chunk
_VERSION = 1
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CHUNKS_BEHIND = 64  # that a unit's last document may go on in
_LONGEST_DOCUMENT = 1 << 26  # ids; four bytes of text each
_NUMBERED = re.compile(r"(.*_)(\d+)\.bin")


class PackedDocument(NamedTuple):
    """A document's ids, without the marks of its boundaries.

    Attributes:
      chunk: place of the chunk that it begins in, in the sequence that was given.
      record: its number within that chunk, counted from 0; a rest from before counts as one.
      ids: `(tokens,)` integers.
      begins: whether its first token is here; else it is the rest of a document that another
        sequence holds the beginning of.
    """

    chunk: int
    record: int
    ids: np.ndarray
    begins: bool


def read_chunk(path: str | pathlib.Path) -> np.ndarray:
    """The ids of a chunk, filling included, as a map of the file.

    Raises:
      ValueError: it is no such chunk, of another version, not of integers, or cut short.
    """
    path = pathlib.Path(path)
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise ValueError(
            f"{path} is no LITPKDS chunk: it begins with {header[:8]!r}; set the source's path to "
            f"the .bin files that lit-gpt's packer wrote"
        )
    _, version, code, count = _HEADER.unpack(header)
    if version != _VERSION or code not in _TYPES:
        raise ValueError(
            f"{path} is a LITPKDS chunk of version {version} with values of type {code}; known is "
            f"version {_VERSION} with the types {', '.join(map(str, _TYPES))} (integers)"
        )
    dtype = np.dtype(_TYPES[code])
    size, expected = path.stat().st_size, _HEADER.size + count * dtype.itemsize
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes where its header tells of {count} ids, which take "
            f"{expected}: it was cut short while copying; copy it again"
        )
    if not count:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=_HEADER.size, shape=(count,))


def filling(ids: np.ndarray, bos_id: int) -> int:
    """How many ids at the end of a chunk are filling: a run of two BOS or more."""
    others = np.flatnonzero(ids != bos_id)
    run = len(ids) - (int(others[-1]) + 1 if len(others) else 0)
    return run if run > 1 else 0


def read_documents(
    paths: Sequence[str],
    bos_id: int,
    eos_id: int,
    chunk_read: Callable[[int, int], None],
    *,
    before: str = "",
    after: Sequence[str] = (),
) -> Iterator[PackedDocument]:
    """Yields the documents that begin in chunks, in order, without boundary marks and filling.

    An empty document, two BOS in a row, is given with no ids.

    Args:
      paths: the chunks; those that follow each other in number are one sequence.
      bos_id, eos_id: of the tokenizer that packed them.
      chunk_read: told of each chunk's place in `paths` and of the filling that was cut off.
      before: the chunk before the first: what goes on from there is left to whoever reads that.
      after: chunks behind the last, in which its last document may go on.

    Raises:
      ValueError: from `read_chunk`; or there is no BOS where one must be, so that they were packed
        with another tokenizer.
    """
    open_document: PackedDocument | None = None  # goes on in the next chunk
    left = False  # the rest belongs to a document that whoever reads `before` gives
    parts: list[np.ndarray] = []  # of it

    def close() -> Iterator[PackedDocument]:
        nonlocal open_document
        if open_document is not None:
            ids = np.concatenate(parts)
            if len(ids) and ids[-1] == eos_id:  # some packers wrote EOS too
                ids = ids[:-1]
            yield open_document._replace(ids=ids)
        open_document = None
        parts.clear()

    for place, path in enumerate(paths):
        ids = read_chunk(path)
        filled = filling(ids, bos_id)
        ids = np.array(ids[: len(ids) - filled])
        starts = np.flatnonzero(ids == bos_id)
        previous = paths[place - 1] if place else before
        goes_on = bool(previous) and _follows(previous, path)
        if not place:
            # A chunk that was filled up ends its last document, as within a sequence.
            left = goes_on and not filling(read_chunk(before), bos_id)
        if not goes_on:
            left = False
            yield from close()
            _require_beginning(path, ids, bos_id)
        rest = ids[: starts[0] if len(starts) else len(ids)]
        if open_document is None and len(rest) and not left:
            open_document = PackedDocument(place, 0, rest, begins=False)
        if open_document is not None:
            parts.append(rest)
            if sum(map(len, parts)) > _LONGEST_DOCUMENT:
                raise _no_such_document(path, bos_id)
        records = range(int(len(rest) > 0), len(starts) + 1)
        for record, start, end in zip(records, starts, [*starts[1:], len(ids)], strict=False):
            yield from close()
            open_document = PackedDocument(place, record, ids[:0], begins=True)
            parts.append(ids[start + 1 : end])
        left = left and goes_on and not len(starts) and not filled
        if filled:
            yield from close()
        chunk_read(place, filled)
    last = paths[-1]
    for path in after:
        if open_document is None or not _follows(last, path):
            break
        ids, last = read_chunk(path), path
        filled = filling(ids, bos_id)
        ids = np.array(ids[: len(ids) - filled])
        starts = np.flatnonzero(ids == bos_id)
        parts.append(ids[: starts[0] if len(starts) else len(ids)])
        if sum(map(len, parts)) > _LONGEST_DOCUMENT:
            raise _no_such_document(path, bos_id)
        if len(starts) or filled:
            break
    else:
        if open_document is not None and len(after) >= CHUNKS_BEHIND:
            raise ValueError(
                f"a document goes on for {CHUNKS_BEHIND} chunks, up to {last} and maybe beyond, "
                f"which is as far as is looked behind a unit: pack larger chunks, or make it a "
                f"source of its own; without BOS ({bos_id}) at all, the chunks were packed with "
                f"another tokenizer than data.tokenizer"
            )
    yield from close()


def _require_beginning(path: str, ids: np.ndarray, bos_id: int) -> None:
    numbered = _NUMBERED.fullmatch(path)
    if numbered and not int(numbered[2]) and len(ids) and ids[0] != bos_id:
        raise ValueError(
            f"{path} is the first chunk of its packer, but begins with id {ids[0]} in place of BOS "
            f"({bos_id}): it was packed with another tokenizer than data.tokenizer, or without BOS"
        )


def _no_such_document(path: str, bos_id: int) -> ValueError:
    return ValueError(
        f"{path} and the chunks before it hold {_LONGEST_DOCUMENT:,} ids without BOS ({bos_id}), "
        f"which no document has: they were packed with another tokenizer than data.tokenizer"
    )


def _follows(path: str, next_path: str) -> bool:
    first, second = _NUMBERED.fullmatch(path), _NUMBERED.fullmatch(next_path)
    if first is None or second is None:
        return False
    return first[1] == second[1] and int(first[2]) + 1 == int(second[2])
