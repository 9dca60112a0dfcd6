"""Reading of prepared storage: any run of a source's ids, and the windows cut from them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import resource
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from tinyllama_jax.data.pages import (
    DOCUMENT_DTYPE,
    PAGE_TOKENS,
    DamagedDataError,
    Manifest,
    ShardEntry,
    documents_path,
    page_dtype,
    read_manifest,
    verify_shard,
)

# No readahead threads, and a small buffer: access is by page, at random.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER_BYTES = 1 << 15
_CACHED_PAGES = 1024  # 16 MiB of two-byte ids
_CACHED_DOCUMENT_INDEXES = 8

_PREPARE_AGAIN = (
    "restore it from a copy, or delete it and run python -m tinyllama_jax.prepare again"
)


@dataclasses.dataclass(frozen=True)
class Document:
    """One document of a stream, and where it came from."""

    source: str
    input_file: str
    record: int  # number within the input file, counted from 0
    start: int  # offset of its first id in the stream
    tokens: int  # boundary tokens included

    def __str__(self) -> str:
        return f"{self.source}: {self.input_file}, record {self.record}"


class _Open:
    """What `ShardReaders` holds; whoever touches it holds the lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.readers: collections.OrderedDict[pathlib.Path, Any] = collections.OrderedDict()
        self.pages: collections.OrderedDict[tuple[pathlib.Path, int], np.ndarray] = (
            collections.OrderedDict()
        )


class ShardReaders:
    """Open shards and pages read from them, least recently used first to go; thread-safe.

    One instance serves all streams of a process, so that a corpus of any number of shards holds a
    bounded number of descriptors: a quarter of what the process may open, 256 at most.
    """

    def __init__(self) -> None:
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if descriptors == resource.RLIM_INFINITY:
            descriptors = 1024
        self._max_open = min(256, max(1, descriptors // 4))
        self._open = _Open()

    def page(self, path: pathlib.Path, entry: ShardEntry, page: int, dtype: np.dtype) -> np.ndarray:
        """Page `page` of the shard at `path`: `(8192,)` ids, fewer in a shard's last.

        Raises:
          DamagedDataError: the shard is not what `entry` says, or the page's checksum fails.
          OSError: the disk does not give it.
        """
        held = self._open
        with held.lock:
            ids = held.pages.get((path, page))
            if ids is None:
                ids = _read_page(self._reader(held, path, entry), path, entry, page, dtype)
                held.pages[path, page] = ids
                if len(held.pages) > _CACHED_PAGES:
                    held.pages.popitem(last=False)
            else:
                held.pages.move_to_end((path, page))
            return ids

    def reopen(self) -> None:
        """Forgets every open shard and every page; reading again opens them anew.

        It waits for nobody: a thread that reads, or hangs there for ever, keeps what it has.
        """
        held, self._open = self._open, _Open()
        if held.lock.acquire(blocking=False):
            while held.readers:
                _close(held.readers.popitem()[1])
            held.lock.release()

    def _reader(self, held: _Open, path: pathlib.Path, entry: ShardEntry) -> Any:
        reader = held.readers.get(path)
        if reader is None:
            while len(held.readers) >= self._max_open:
                _close(held.readers.popitem(last=False)[1])
            reader = held.readers[path] = _open_shard(path, entry)
        else:
            held.readers.move_to_end(path)
        return reader


def _open_shard(path: pathlib.Path, entry: ShardEntry) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    # ArrayRecord opens a file that is missing, truncated or beyond the descriptor limit as one of
    # 0 records and says nothing, hence an open and two counts of our own.
    # The end is read to see whether the disk answers.
    _check_size(path, entry)
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        file.read()
    try:
        reader = ArrayRecordReader(
            str(path), _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER_BYTES
        )
    except RuntimeError as error:
        raise DamagedDataError(f"{path} cannot be opened: {error}; {_PREPARE_AGAIN}") from error
    pages = reader.num_records()
    if pages != entry.pages:
        _close(reader)
        _sha256(path)  # raises what ArrayRecord passes over: a disk that does not give the file
        raise DamagedDataError(
            f"{path} is damaged: it opens with {pages} pages and the manifest counts "
            f"{entry.pages}; {_PREPARE_AGAIN}"
        )
    return reader


def _close(reader: Any) -> None:
    # A reader that met damage reports it a second time here.
    with contextlib.suppress(RuntimeError):
        reader.close()


def _check_size(path: pathlib.Path, entry: ShardEntry) -> None:
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise DamagedDataError(
            f"{path} is missing, though the manifest beside it lists it; {_PREPARE_AGAIN}"
        ) from None
    if size != entry.bytes:
        raise DamagedDataError(
            f"{path} is damaged: it has {size} bytes and the manifest counts {entry.bytes}; "
            f"{_PREPARE_AGAIN}"
        )


def _read_page(
    reader: Any, path: pathlib.Path, entry: ShardEntry, page: int, dtype: np.dtype
) -> np.ndarray:
    tokens = min(PAGE_TOKENS, entry.tokens - page * PAGE_TOKENS)
    try:
        (record,) = reader.read([page])
    except RuntimeError as error:
        if "() failed: " in str(error):  # so it tells of a system call
            raise OSError(
                f"page {page} of {path} cannot be read: {error}; look whether its disk is there"
            ) from error
        raise DamagedDataError(
            f"page {page} of {path} is damaged: {error}; {_PREPARE_AGAIN}"
        ) from error
    if len(record) != tokens * dtype.itemsize:
        raise DamagedDataError(
            f"page {page} of {path} is damaged: it holds {len(record)} bytes, not the "
            f"{tokens * dtype.itemsize} of its {tokens} ids; {_PREPARE_AGAIN}"
        )
    return np.frombuffer(record, dtype)


class Stream:
    """One prepared directory as one run of token ids, shard after shard.

    Opening it looks at the manifest and at the shards' sizes, and reads none of them.

    Args:
      directory: one split of one source, as `prepare` wrote it.
      readers: the open shards it shares with other streams; none: its own.
      shard: the place of one shard in the manifest, which then is all; None: all of them.

    Raises:
      FileNotFoundError, DamagedDataError, ValueError: from `read_manifest`.
      DamagedDataError: a shard is missing or has another size than the manifest says.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        readers: ShardReaders | None = None,
        *,
        shard: int | None = None,
    ):
        self.directory = pathlib.Path(directory)
        self.manifest: Manifest = read_manifest(self.directory)
        if shard is not None:
            one = (self.manifest.shards[shard],)
            self.manifest = dataclasses.replace(self.manifest, shards=one)
        self._readers = readers or ShardReaders()
        self._dtype = page_dtype(self.manifest.vocab_size)
        self._paths = [self.directory / shard.file for shard in self.manifest.shards]
        counts = [shard.tokens for shard in self.manifest.shards]
        self._offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._document_indexes: collections.OrderedDict[int, tuple[np.ndarray, np.ndarray]] = (
            collections.OrderedDict()
        )
        for path, entry in zip(self._paths, self.manifest.shards, strict=True):
            _check_size(path, entry)

    @property
    def num_tokens(self) -> int:
        return int(self._offsets[-1])

    def reopen(self) -> None:
        """Reads the files anew from now on, those of streams that share its readers too."""
        self._readers.reopen()

    def read(self, start: int, count: int) -> np.ndarray:
        """Ids `[start, start + count)` of the stream: `(count,)` int32.

        Raises:
          DamagedDataError: a page in that range is not what was written.
          OSError: the disk does not give it.
        """
        assert min(start, count) >= 0 and start + count <= self.num_tokens, (start, count)
        ids = np.empty(count, np.int32)
        shard = int(np.searchsorted(self._offsets, start, side="right")) - 1
        filled = 0
        while filled < count:
            page, first = divmod(start + filled - int(self._offsets[shard]), PAGE_TOKENS)
            entry = self.manifest.shards[shard]
            if page * PAGE_TOKENS + first >= entry.tokens:
                shard += 1
                continue
            part = self._readers.page(self._paths[shard], entry, page, self._dtype)[first:]
            part = part[: count - filled]
            ids[filled : filled + part.size] = part
            filled += part.size
        return ids

    def documents(self, start: int, stop: int) -> list[Document]:
        """The documents that ids `[start, stop)` belong to, in the stream's order.

        Raises:
          DamagedDataError: a document index in that range is not what was written.
        """
        assert 0 <= start <= stop <= self.num_tokens, (start, stop)
        documents = []
        shard = int(np.searchsorted(self._offsets, start, side="right")) - 1
        while start < stop and shard < len(self._paths) and self._offsets[shard] < stop:
            entry, offset = self.manifest.shards[shard], int(self._offsets[shard])
            table, starts = self._document_index(shard)
            first = max(0, int(np.searchsorted(starts, start - offset, side="right")) - 1)
            last = int(np.searchsorted(starts, stop - offset, side="left"))
            documents += [
                Document(
                    source=self.manifest.source,
                    input_file=entry.inputs[int(row["input"])],
                    record=int(row["record"]),
                    start=offset + int(begin),
                    tokens=int(row["tokens"]),
                )
                for row, begin in zip(table[first:last], starts[first:last], strict=True)
            ]
            shard += 1
        return documents

    def document_blocks(
        self, shard: int, tokens: int = 1 << 20
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The whole documents of a shard, some at a time.

        Args:
          shard: its place in the manifest.
          tokens: about how many ids are given at a time; at least a document.

        Yields:
          Ids `(n,)` int32, and the entries of the documents that they are, `DOCUMENT_DTYPE`.

        Raises:
          DamagedDataError, OSError: as `read` and `documents`.
        """
        table, starts = self._document_index(shard)
        ends = starts + table["tokens"]
        offset = int(self._offsets[shard])
        first = 0
        while first < len(table):
            begin = int(starts[first])
            last = max(first + 1, int(np.searchsorted(ends, begin + tokens, side="right")))
            yield self.read(offset + begin, int(ends[last - 1]) - begin), table[first:last]
            first = last

    def verify(self) -> None:
        """Hashes every shard and document index again.

        Raises:
          DamagedDataError: the files that are not what was written, all at once.
        """
        damaged = []
        for path, entry in zip(self._paths, self.manifest.shards, strict=True):
            try:
                verify_shard(path, entry)
            except DamagedDataError as error:
                damaged.append(str(error))
        if damaged:
            raise DamagedDataError("; ".join([*damaged, _PREPARE_AGAIN]))

    def _document_index(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """The document table of a shard, and each document's first id within the shard."""
        if shard in self._document_indexes:
            self._document_indexes.move_to_end(shard)
            return self._document_indexes[shard]
        entry, path = self.manifest.shards[shard], documents_path(self._paths[shard])
        if not path.exists() or _sha256(path) != entry.documents_sha256:
            raise DamagedDataError(
                f"{path} is missing or damaged: it does not have the sha256 of the manifest, so "
                f"it cannot tell which documents the shard holds; {_PREPARE_AGAIN}"
            )
        table = np.fromfile(path, DOCUMENT_DTYPE)
        starts = np.cumsum(table["tokens"], dtype=np.int64) - table["tokens"]
        self._document_indexes[shard] = table, starts
        if len(self._document_indexes) > _CACHED_DOCUMENT_INDEXES:
            self._document_indexes.popitem(last=False)
        return table, starts


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Windows:
    """A stream cut into training windows: window i is ids `[i * S, i * S + S]`, S + 1 of them.

    Neighbours share one id, the target of the one and the input of the other, so that each id but
    the stream's first is a target exactly once. Only the last incomplete window is left out.
    """

    def __init__(self, stream: Stream, seq_len: int):
        self.stream = stream
        self.seq_len = seq_len

    def __len__(self) -> int:
        return max(0, self.stream.num_tokens - 1) // self.seq_len

    @property
    def left_out(self) -> int:
        """Length of the last incomplete window: ids that are never a target at this `seq_len`."""
        return max(0, self.stream.num_tokens - 1) % self.seq_len

    def __getitem__(self, window: int) -> np.ndarray:
        assert 0 <= window < len(self), window
        return self.stream.read(window * self.seq_len, self.seq_len + 1)

    def documents(self, window: int) -> list[Document]:
        """The documents that a window shows, the last one perhaps only as a target."""
        start = window * self.seq_len
        return self.stream.documents(start, start + self.seq_len + 1)
