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
import itertools
import json
import os
import pathlib
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from tinyllama_jax.config import SourceConfig
from tinyllama_jax.data import litpkds
from tinyllama_jax.data.pages import ShardEntry, ShardWriter, documents_path
from tinyllama_jax.data.sources import Document, Input, Tally, is_held_out, read_documents
from tinyllama_jax.durable import write_durably
from tinyllama_jax.text.tokenizer import Tokenizer

SPLITS = ("train", "validation")

_RECORDS = "units"
_WORK_SUFFIX = ".work"
_BATCH_DOCUMENTS = 512
_BATCH_CHARS = 1 << 20
_PACKING = 3  # SlimPajama's zstd and Starcoderdata's parquet, about
_TEXT_OF_IDS = 2  # bytes of text for a byte of two-byte ids, about

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
    before: str = ""  # of chunks of ids: the path of the input before the first
    after: tuple[str, ...] = ()  # and of some behind the last

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.inputs)

    @property
    def names(self) -> tuple[tuple[str, int], ...]:
        """Its inputs as its record tells of them."""
        return tuple((entry.name, entry.bytes) for entry in self.inputs)


@dataclasses.dataclass(frozen=True)
class UnitRecord:
    """What a finished unit left behind.

    Attributes:
      shards: by the directory that they stand in, as "train" or "C4/train" of a source in subsets;
        one without documents has none.
      inputs: names and bytes of what was read.
      tally: what was met.
    """

    shards: dict[str, ShardEntry]
    inputs: tuple[tuple[str, int], ...]
    tally: Tally

    def to_json(self) -> bytes:
        shards = {place: dataclasses.asdict(entry) for place, entry in self.shards.items()}
        tree = {"shards": shards, "inputs": self.inputs, "tally": vars(self.tally)}
        return json.dumps(tree, indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes) -> UnitRecord:
        tree = json.loads(content)
        shards = {
            place: ShardEntry(**{**entry, "inputs": tuple(entry["inputs"])})
            for place, entry in tree["shards"].items()
        }
        inputs = tuple((str(name), int(size)) for name, size in tree["inputs"])
        tally = tree["tally"]
        for kind in ("skipped", "repaired"):
            tally[kind] = collections.Counter(tally[kind])
        return cls(shards, inputs, Tally(**tally))


def group_inputs(inputs: tuple[Input, ...]) -> Iterator[tuple[Input, ...]]:
    """Cuts the inputs of a source into the groups that are units.

    The groups depend on the inputs alone, not on the number of processes: the shards must not. They
    aim at 64 units, each of 1 MiB to 4 GiB of text, which is about 2**30 tokens.
    """
    total = sum(map(text_bytes, inputs))
    target = min(max(total // 64, 1 << 20), 4 << 30)
    group: list[Input] = []
    size = 0
    for entry in inputs:
        group.append(entry)
        size += text_bytes(entry)
        if size >= target:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def text_bytes(entry: Input) -> int:
    """What an input comes to when it is unpacked, about."""
    if entry.format == "litpkds":
        return entry.bytes * _TEXT_OF_IDS
    packed = entry.format == "parquet" or entry.name.lower().endswith((".zst", ".gz"))
    return entry.bytes * (_PACKING if packed else 1)


def read_record(unit: Unit) -> UnitRecord | None:
    """The record of a finished unit whose shards are still there; None: it is to be done.

    Raises:
      ValueError: it tells of other inputs than the unit's.
    """
    try:
        record = UnitRecord.from_json(_record_path(unit).read_bytes())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a damaged record says nothing: the unit is done again
    if record.inputs != unit.names:
        raise ValueError(
            f"{_record_path(unit)} tells of {len(record.inputs)} inputs, from "
            f"{record.inputs[0][0] if record.inputs else 'none'} on, where the unit has "
            f"{len(unit.inputs)}, from {unit.inputs[0].name} on: it was written for other inputs; "
            f"delete {unit.directory} and start again"
        )
    for place, entry in record.shards.items():
        if not shard_is_there(pathlib.Path(unit.directory, place), entry):
            return None
    return record


def discard(unit: Unit, record: UnitRecord) -> None:
    """Makes a finished unit one that is to be done again."""
    for place, entry in record.shards.items():
        pathlib.Path(unit.directory, place, entry.file).unlink(missing_ok=True)
    _record_path(unit).unlink(missing_ok=True)


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
        if error.errno == errno.EMFILE:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise OSError(
                f"{unit.directory}: a process may have {limit} files open here, and each subset of "
                f"text to train on or to hold out is one that is written ({error}); allow more: "
                "ulimit -n 4096. Finished shards are kept: start again to continue"
            ) from error
        raise


def _write_unit(unit: Unit, tokenizer: Tokenizer, advance: Advance, work: pathlib.Path) -> None:
    tally = Tally()
    writers: dict[str, ShardWriter] = {}
    try:
        _write_documents(unit, tokenizer, writers, work, tally, advance)
        shards = {place: writers[place].close() for place in sorted(writers)}
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    write_durably(work / "record.json", UnitRecord(shards, unit.names, tally).to_json())
    for place, entry in shards.items():
        final = pathlib.Path(unit.directory, place, entry.file)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(documents_path(work / place / entry.file), documents_path(final))
        os.replace(work / place / entry.file, final)
    os.replace(work / "record.json", _record_path(unit))


def place_of(subset: str, split: str) -> str:
    """The directory, below a source's, of one split of one subset; "": of a source without."""
    return f"{subset}/{split}" if subset else split


def shard_is_there(directory: pathlib.Path, entry: ShardEntry) -> bool:
    """Whether both files of a shard stand in `directory`, the pages in the size they had."""
    shard = directory / entry.file
    try:
        return documents_path(shard).exists() and shard.stat().st_size == entry.bytes
    except FileNotFoundError:
        return False


def remove_abandoned_work(directory: pathlib.Path, *, of_all_hosts: bool = False) -> None:
    """Removes what processes of this host that are gone left unfinished.

    `of_all_hosts`: of others too, when nothing is left to be done.
    """
    host = "*" if of_all_hosts else socket.gethostname()
    for work in (directory / _RECORDS).glob(f"*.{host}.*{_WORK_SUFFIX}"):
        with contextlib.suppress(OSError), _locked(work):  # in use, or gone already
            shutil.rmtree(work)


def make_directory(directory: pathlib.Path) -> None:
    """Makes the prepared directory of a source, without anything in it."""
    (directory / _RECORDS).mkdir(parents=True, exist_ok=True)


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
    for batch in _batches(unit, tokenizer, tally):
        tokens = 0
        for document in batch:
            if not document.ids.size:  # a normalisation may leave nothing of a text
                tally.documents -= 1
                tally.skipped["documents without tokens"] += 1
                continue
            place = document.place
            if place not in writers:
                (work / place).mkdir(parents=True)
                shard = work / place / f"{unit.index:05d}.arrayrecord"
                writers[place] = ShardWriter(shard, tokenizer.vocab_size)
            stream = np.concatenate([before, document.ids, after])
            writers[place].add(stream, document.record, document.input)
            tokens += stream.size
        advance(tally.bytes_read - bytes_told, tokens)
        bytes_told = tally.bytes_read
    advance(tally.bytes_read - bytes_told, 0)


class _Encoded(NamedTuple):
    input: str  # the name of the input
    record: int
    place: str
    ids: np.ndarray


def _batches(unit: Unit, tokenizer: Tokenizer, tally: Tally) -> Iterator[list[_Encoded]]:
    """The documents of a unit as ids, a moderate number at a time."""
    if unit.inputs[0].format == "litpkds":
        documents = _packed(unit, tokenizer, tally)
        while batch := list(itertools.islice(documents, _BATCH_DOCUMENTS)):
            yield batch
        return
    batch_of_texts: list[tuple[str, Document]] = []
    chars = 0

    def encoded() -> list[_Encoded]:
        ids = tokenizer.encode_batch([document.text for _, document in batch_of_texts])
        return [
            _Encoded(name, d.record, place_of(d.subset, _split(d.validation)), ids_of_one)
            for (name, d), ids_of_one in zip(batch_of_texts, ids, strict=True)
        ]

    for entry in unit.inputs:
        for document in read_documents(unit.source, entry, tally):
            batch_of_texts.append((entry.name, document))
            chars += len(document.text)
            if len(batch_of_texts) == _BATCH_DOCUMENTS or chars >= _BATCH_CHARS:
                yield encoded()
                batch_of_texts, chars = [], 0
    if batch_of_texts:
        yield encoded()


def _packed(unit: Unit, tokenizer: Tokenizer, tally: Tally) -> Iterator[_Encoded]:
    """The documents of chunks that hold ids already."""

    def chunk_read(place: int, filling: int) -> None:
        tally.bytes_read += unit.inputs[place].bytes
        if filling:
            tally.repaired["chunks that were filled up with BOS"] += 1
            tally.repaired["tokens of filling"] += filling

    paths = [entry.path for entry in unit.inputs]
    for chunk, record, ids, begins in litpkds.read_documents(
        paths, tokenizer.bos_id, tokenizer.eos_id, chunk_read, before=unit.before, after=unit.after
    ):
        tally.documents += 1
        if not begins:
            tally.repaired["documents whose beginning is lost"] += 1
        held_out = is_held_out(ids.astype("<u4").tobytes(), unit.source.validation_fraction)
        yield _Encoded(unit.inputs[chunk].name, record, _split(held_out), ids)


def _split(validation: bool) -> str:
    return "validation" if validation else "train"


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
