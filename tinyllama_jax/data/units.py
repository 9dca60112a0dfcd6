"""The unit of preparation: some consecutive inputs in, one shard per split out.

A unit is finished when its record stands in the prepared directory. Until then all it writes is in
a directory of its own, so that a killed process leaves nothing that looks finished and the next one
starts the unit over, to the same bytes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from tinyllama_jax.config import SourceConfig
from tinyllama_jax.data.pages import ShardEntry, ShardWriter, documents_path
from tinyllama_jax.data.sources import Document, Input, Tally, read_documents
from tinyllama_jax.durable import write_durably
from tinyllama_jax.text.tokenizer import Tokenizer

SPLITS = ("train", "validation")

_RECORDS = "units"
_WORK_SUFFIX = ".work"
_BATCH_DOCUMENTS = 512
_BATCH_CHARS = 1 << 20

# Told of bytes read and tokens written since the last call.
Advance = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of work for one process."""

    index: int
    source: SourceConfig
    inputs: tuple[Input, ...]
    boundary: str  # bos+eos, bos, eos
    directory: str  # the prepared directory of the source

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.inputs)


@dataclasses.dataclass(frozen=True)
class UnitRecord:
    """What a finished unit left behind."""

    shards: dict[str, ShardEntry]  # by split; a split without documents has none
    tally: Tally

    def to_json(self) -> bytes:
        shards = {split: dataclasses.asdict(entry) for split, entry in self.shards.items()}
        return json.dumps({"shards": shards, "tally": vars(self.tally)}, indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes) -> UnitRecord:
        tree = json.loads(content)
        shards = {
            split: ShardEntry(**{**entry, "inputs": tuple(entry["inputs"])})
            for split, entry in tree["shards"].items()
        }
        tally = tree["tally"]
        for kind in ("skipped", "repaired"):
            tally[kind] = collections.Counter(tally[kind])
        return cls(shards, Tally(**tally))


def group_inputs(inputs: tuple[Input, ...]) -> Iterator[tuple[Input, ...]]:
    """Cuts the inputs of a source into the groups that are units.

    The groups depend on the inputs alone, not on the number of processes: the shards must not. They
    aim at 64 units, each between 1 MiB and 256 MiB of input.
    """
    total = sum(entry.bytes for entry in inputs)
    target = min(max(total // 64, 1 << 20), 256 << 20)
    group: list[Input] = []
    size = 0
    for entry in inputs:
        group.append(entry)
        size += entry.bytes
        if size >= target:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def read_record(unit: Unit) -> UnitRecord | None:
    """The record of a finished unit whose shards are still there; None: it is to be done."""
    try:
        record = UnitRecord.from_json(_record_path(unit).read_bytes())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a damaged record says nothing: the unit is done again
    for split, entry in record.shards.items():
        if not shard_is_there(pathlib.Path(unit.directory, split), entry):
            return None
    return record


def write_unit(unit: Unit, tokenizer: Tokenizer, advance: Advance) -> None:
    """Tokenizes the inputs of a unit into its shards, and leaves its record.

    Raises:
      ValueError: an input is malformed.
      OSError: the disk does not take the data; nothing of the unit is left.
    """
    try:
        with _work_directory(unit) as work:
            _write_unit(unit, tokenizer, advance, work)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                f"there is no room left on the disk of {unit.directory} ({error}); free some, or "
                f"set data.prepared to a directory on a larger disk. Finished shards are kept: "
                f"start again to continue"
            ) from error
        raise


def _write_unit(unit: Unit, tokenizer: Tokenizer, advance: Advance, work: pathlib.Path) -> None:
    tally = Tally()
    writers: dict[str, ShardWriter] = {}
    try:
        _write_documents(unit, tokenizer, writers, work, tally, advance)
        shards = {split: writers[split].close() for split in sorted(writers)}
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    write_durably(work / "record.json", UnitRecord(shards, tally).to_json())
    for split, entry in shards.items():
        final = pathlib.Path(unit.directory, split, entry.file)
        os.replace(documents_path(work / split / entry.file), documents_path(final))
        os.replace(work / split / entry.file, final)
    os.replace(work / "record.json", _record_path(unit))


def shard_is_there(directory: pathlib.Path, entry: ShardEntry) -> bool:
    """Whether both files of a shard stand in `directory`, the pages in the size they had."""
    shard = directory / entry.file
    try:
        return documents_path(shard).exists() and shard.stat().st_size == entry.bytes
    except FileNotFoundError:
        return False


def remove_abandoned_work(directory: pathlib.Path) -> None:
    """Removes what processes of this host that are gone left unfinished."""
    for work in (directory / _RECORDS).glob(f"*.{socket.gethostname()}.*{_WORK_SUFFIX}"):
        with contextlib.suppress(OSError), _locked(work):  # in use, or gone already
            shutil.rmtree(work)


def make_directories(directory: pathlib.Path) -> None:
    for name in (*SPLITS, _RECORDS):
        (directory / name).mkdir(parents=True, exist_ok=True)


def _write_documents(
    unit: Unit,
    tokenizer: Tokenizer,
    writers: dict[str, ShardWriter],
    work: pathlib.Path,
    tally: Tally,
    advance: Advance,
) -> None:
    before = np.array([tokenizer.bos_id] if "bos" in unit.boundary else [], np.int32)
    after = np.array([tokenizer.eos_id] if "eos" in unit.boundary else [], np.int32)
    bytes_told = 0
    for batch in _batches(unit, tally):
        tokens = 0
        encoded = tokenizer.encode_batch([document.text for _, document in batch])
        for (input_name, document), ids in zip(batch, encoded, strict=True):
            if not ids.size:  # a normalisation may leave nothing of a text
                tally.documents -= 1
                tally.skipped["documents without tokens"] += 1
                continue
            split = "validation" if document.validation else "train"
            if split not in writers:
                (work / split).mkdir()
                shard = work / split / f"{unit.index:05d}.arrayrecord"
                writers[split] = ShardWriter(shard, tokenizer.vocab_size)
            stream = np.concatenate([before, ids, after])
            writers[split].add(stream, document.record, input_name)
            tokens += stream.size
        advance(tally.bytes_read - bytes_told, tokens)
        bytes_told = tally.bytes_read
    advance(tally.bytes_read - bytes_told, 0)


def _batches(unit: Unit, tally: Tally) -> Iterator[list[tuple[str, Document]]]:
    """Documents with the names of their inputs, as many as are encoded in one call."""
    batch: list[tuple[str, Document]] = []
    chars = 0
    for entry in unit.inputs:
        for document in read_documents(unit.source, entry, tally):
            batch.append((entry.name, document))
            chars += len(document.text)
            if len(batch) == _BATCH_DOCUMENTS or chars >= _BATCH_CHARS:
                yield batch
                batch, chars = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _work_directory(unit: Unit) -> Iterator[pathlib.Path]:
    while True:
        path = pathlib.Path(
            tempfile.mkdtemp(
                prefix=f"{unit.index:05d}.{socket.gethostname()}.",
                suffix=_WORK_SUFFIX,
                dir=pathlib.Path(unit.directory, _RECORDS),
            )
        )
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, path, ignore_errors=True)
            try:
                stack.enter_context(_locked(path))
            except (BlockingIOError, FileNotFoundError):
                continue  # another start took it for abandoned before it was locked
            except OSError:
                pass  # a disk without locks, where nothing is removed either
            if path.exists():
                yield path
                return


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock that ends with this process; raises OSError where another holds it.

    A process id would not do: one may be a zombie or, in a restarted container, used again.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _record_path(unit: Unit) -> pathlib.Path:
    return pathlib.Path(unit.directory, _RECORDS, f"{unit.index:05d}.json")
