"""Prepared storage: one source's token stream, as pages of consecutive ids.

A prepared directory holds one split of one source, `<source>/train` or `<source>/validation`:

    manifest.json       what the stream is and which shards it consists of, in order
    <shard>             ArrayRecord; record i holds ids [i * 8192, (i + 1) * 8192) of the shard
    <shard>.documents   one 12-byte entry per document: tokens, input record, input file

Pages are little-endian uint16 where the vocabulary fits, else uint32, one page per checksummed
chunk and uncompressed, so that any id is one seek away. Only a shard's last page may be short.
Nothing here knows of sequence lengths: the same prepared corpus serves any.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from tinyllama_jax.durable import sync_directory, write_durably

PAGE_TOKENS = 8192
MANIFEST_FILE = "manifest.json"
DOCUMENTS_SUFFIX = ".documents"

# A document's length in tokens, its record number within its input file (line, row or index), and
# that file's place in the shard's list of inputs.
DOCUMENT_DTYPE = np.dtype([("tokens", "<u4"), ("record", "<u4"), ("input", "<u4")])

_FORMAT_VERSION = 1
_PARTIAL_SUFFIX = ".partial"
_WRITER_OPTIONS = "group_size:1,uncompressed,max_parallelism:1"


class DamagedDataError(ValueError):
    """Prepared data on disk is not what its manifest says; the message names file and page."""


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """What the manifest knows of a shard."""

    file: str  # name within the prepared directory
    inputs: tuple[str, ...]  # input files, in the order that the document index refers to them
    documents: int
    tokens: int
    bytes: int
    sha256: str
    documents_sha256: str  # of `<file>.documents`

    @property
    def pages(self) -> int:
        return -(-self.tokens // PAGE_TOKENS)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a prepared directory holds: one split of one source, tokenized."""

    source: str
    split: str  # train, validation
    tokenizer_sha256: str
    vocab_size: int  # of the tokenizer
    boundary: str  # bos+eos, bos, eos: what marks each document in the stream
    bos_id: int
    eos_id: int
    shards: tuple[ShardEntry, ...]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)


def page_dtype(vocab_size: int) -> np.dtype:
    """The type that a page's ids are stored in."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class ShardWriter:
    """Writes one shard and its document index; nothing has its final name before `close`.

    The same documents in the same order give the same bytes.

    Args:
      path: the shard's final name; its directory exists.
      vocab_size: of the tokenizer; decides the width of the stored ids.

    Raises:
      OSError: from `add` and `close`, when the disk does not take the data.
    """

    def __init__(self, path: pathlib.Path, vocab_size: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path = path
        self.tokens = 0
        self._vocab_size = vocab_size
        self._page = np.empty(PAGE_TOKENS, page_dtype(vocab_size))
        self._filled = 0
        self._inputs: dict[str, int] = {}
        # The entries as they are stored: a shard made of one huge file has millions of them.
        self._documents = bytearray()
        self._partial = path.with_name(path.name + _PARTIAL_SUFFIX)
        self._writer = ArrayRecordWriter(str(self._partial), _WRITER_OPTIONS)

    def add(self, ids: np.ndarray, record: int, input_file: str) -> None:
        """Appends one document.

        Args:
          ids: `(tokens,)` integers in `[0, vocab_size)`, boundary tokens included.
          record: the document's number within its input file, counted from 0.
          input_file: the name of that file, as the manifest shall give it.
        """
        assert ids.ndim == 1 and ids.size > 0, f"a document of shape {ids.shape}"
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise ValueError(
                f"record {record} of {input_file} has ids from {ids.min()} to {ids.max()}, outside "
                f"the vocabulary of {self._vocab_size}: the model would have no embedding for "
                f"them; the tokenizer that encoded it is not the one that was announced"
            )
        input_index = self._inputs.setdefault(input_file, len(self._inputs))
        entry = np.array((ids.size, record, input_index), DOCUMENT_DTYPE)
        self._documents += entry.tobytes()
        self.tokens += ids.size
        taken = 0
        while taken < ids.size:
            part = ids[taken : taken + PAGE_TOKENS - self._filled]
            self._page[self._filled : self._filled + part.size] = part
            self._filled += part.size
            taken += part.size
            if self._filled == PAGE_TOKENS:
                self._write_page()

    def close(self) -> ShardEntry:
        """Writes what is left, makes both files durable and gives them their names."""
        if self._filled:
            self._write_page()
        try:
            self._writer.close()
        except RuntimeError as error:
            raise self._write_error(error) from error
        documents = bytes(self._documents)
        # The index first: a shard that has its name is complete.
        write_durably(documents_path(self.path), documents)
        with open(self._partial, "rb") as file:
            os.fsync(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
        os.replace(self._partial, self.path)
        sync_directory(self.path.parent)
        return ShardEntry(
            file=self.path.name,
            inputs=tuple(self._inputs),
            documents=len(documents) // DOCUMENT_DTYPE.itemsize,
            tokens=self.tokens,
            bytes=size,
            sha256=sha256,
            documents_sha256=hashlib.sha256(documents).hexdigest(),
        )

    def discard(self) -> None:
        """Gives the shard up and removes what was written of it."""
        try:
            self._writer.close()
        except RuntimeError:
            pass  # it is thrown away; a full disk is likely why
        finally:
            self._partial.unlink(missing_ok=True)

    def _write_page(self) -> None:
        try:
            self._writer.write(self._page[: self._filled].tobytes())
        except RuntimeError as error:
            raise self._write_error(error) from error
        self._filled = 0

    def _write_error(self, error: RuntimeError) -> OSError:
        too_many = os.strerror(errno.EMFILE)
        if too_many in str(error):  # opening fails without a word: the first page tells of it
            return OSError(errno.EMFILE, too_many, str(self._partial))
        return OSError(
            f"cannot write {self._partial}: {error}; make room on the disk, or set data.prepared "
            f"to a directory on a larger one, and start again: finished shards are kept"
        )


def documents_path(shard: pathlib.Path) -> pathlib.Path:
    """Where the document index of a shard stands."""
    return shard.with_name(shard.name + DOCUMENTS_SUFFIX)


def verify_shard(path: pathlib.Path, entry: ShardEntry) -> None:
    """Hashes a shard and its document index, and counts the documents.

    Raises:
      DamagedDataError: one of the two files is missing, or not what was written.
      OSError: the disk does not give them.
    """
    index = documents_path(path)
    for file, expected in ((path, entry.sha256), (index, entry.documents_sha256)):
        if not file.exists():
            raise DamagedDataError(f"{file} is missing")
        with open(file, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != expected:
            raise DamagedDataError(f"{file} has another sha256 than was written")
    table = np.fromfile(index, DOCUMENT_DTYPE)
    counts = (len(table), int(table["tokens"].sum(dtype=np.int64)))
    if counts != (entry.documents, entry.tokens) or table["input"].max() >= len(entry.inputs):
        raise DamagedDataError(
            f"{index} tells of {counts[0]} documents with {counts[1]} tokens, where "
            f"{entry.documents} with {entry.tokens} were counted"
        )


def write_manifest(directory: pathlib.Path, manifest: Manifest) -> None:
    """Writes `manifest.json`, the last file of a prepared directory, atomically."""
    tree = {"format": _FORMAT_VERSION, "page_tokens": PAGE_TOKENS, **dataclasses.asdict(manifest)}
    tree["checksum"] = _checksum(tree)
    content = json.dumps(tree, indent=1) + "\n"
    write_durably(directory / MANIFEST_FILE, content.encode())


def read_manifest(directory: pathlib.Path) -> Manifest:
    """Reads the manifest of a prepared directory.

    Raises:
      FileNotFoundError: there is none: nothing was prepared here, or not to the end.
      DamagedDataError: it is not the file that `write_manifest` wrote.
      ValueError: another version of this package wrote it.
    """
    path = pathlib.Path(directory) / MANIFEST_FILE
    again = "delete the directory and run python -m tinyllama_jax.prepare again"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist, so nothing was prepared there, or not to the end; "
            f"run python -m tinyllama_jax.prepare with the same config: it continues where it was"
        ) from None
    try:
        tree = json.loads(content)
        checksum = tree.pop("checksum")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedDataError(f"{path} is damaged ({error!r}); {again}") from error
    if checksum != _checksum(tree):
        raise DamagedDataError(
            f"{path} is damaged: its content does not match its checksum, so no count in it can "
            f"be trusted; {again}"
        )
    version, page_tokens = tree.pop("format"), tree.pop("page_tokens")
    if (version, page_tokens) != (_FORMAT_VERSION, PAGE_TOKENS):
        raise ValueError(
            f"{path} has format {version} with pages of {page_tokens} ids; this version reads "
            f"format {_FORMAT_VERSION} with pages of {PAGE_TOKENS}; {again}"
        )
    shards = tuple(ShardEntry(**{**s, "inputs": tuple(s["inputs"])}) for s in tree.pop("shards"))
    return Manifest(**tree, shards=shards)


def _checksum(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
