"""Reads prepared storage, or chunks of ids, from end to end: what `audit` judges by.

A part is a shard or a chunk, and the work of one process. What is known of a part is added up; the
one thing that grows with the corpus is the hash of each document, 8 bytes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from tinyllama_jax.data import litpkds
from tinyllama_jax.data.pages import DamagedDataError, verify_shard
from tinyllama_jax.data.stream import Stream
from tinyllama_jax.text.tokenizer import Tokenizer

LENGTH_BINS = 32  # documents of 2**b to 2**(b + 1) - 1 tokens
_SAMPLE_DOCUMENTS = 8  # of a part, encoded again
_SAMPLE_TOKENS = 4096  # and so much of each


@dataclasses.dataclass(frozen=True)
class Part:
    """A shard of a prepared directory, or a chunk of ids.

    Attributes:
      stream: the name that it is counted under.
      path: the file.
      directory: the prepared directory; "": it is a chunk.
      shard: its place in that directory's manifest.
    """

    stream: str
    path: str
    directory: str = ""
    shard: int = 0


@dataclasses.dataclass
class Scan:
    """What was found in parts.

    Attributes:
      bytes, documents, tokens: counts; tokens without filling.
      token_counts: `(vocab,)` int64, how often each id occurs.
      lengths: `(LENGTH_BINS,)` documents by the logarithm of their tokens.
      hashes: uint64 of each whole document's ids, without boundary marks.
      sha256: of each part's file.
      filled, filling: chunks that were filled up with BOS, and ids of it.
      ended: documents of chunks that end with EOS.
      bos_runs: places where BOS stands beside BOS, filling aside.
      encoded, encoded_alike: documents that were decoded and encoded again, and those that gave the
        same ids.
      damage: what is not as it was written.
    """

    bytes: int = 0
    documents: int = 0
    tokens: int = 0
    token_counts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    lengths: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(LENGTH_BINS, np.int64))
    hashes: list[np.ndarray] = dataclasses.field(default_factory=list)
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    filled: int = 0
    filling: int = 0
    bos_runs: int = 0
    ended: int = 0
    encoded: int = 0
    encoded_alike: int = 0
    contaminated: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    damage: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Scan) -> None:
        for name in ("bytes", "documents", "tokens", "filled", "filling", "bos_runs", "ended",
                     "encoded", "encoded_alike"):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        size = max(len(self.token_counts), len(other.token_counts))
        total = np.zeros(size, np.int64)
        for counts in (self.token_counts, other.token_counts):
            total[: len(counts)] += counts
        self.token_counts = total
        self.lengths = self.lengths + other.lengths
        self.hashes += other.hashes
        self.sha256 |= other.sha256
        self.contaminated.update(other.contaminated)
        self.damage += other.damage


@dataclasses.dataclass(frozen=True)
class Grams:
    """Runs of words of texts that must not be trained on, by the file that they are in."""

    size: int
    files: dict[int, str]  # hash of a run -> its file


class Scanner:
    """Scans parts; holds what all of them need.

    Args:
      bos_id, eos_id: of chunks; prepared storage says its own.
      model_proto: a tokenizer, to encode some documents again; b"": none.
      grams: looked for in every document; None: nothing is.
    """

    def __init__(self, bos_id: int, eos_id: int, model_proto: bytes, grams: Grams | None):
        self._bos_id, self._eos_id, self._grams = bos_id, eos_id, grams
        self._tokenizer = Tokenizer.from_bytes(model_proto) if model_proto else None

    def scan(self, part: Part) -> Scan:
        found = Scan(bytes=pathlib.Path(part.path).stat().st_size)
        try:
            if part.directory:
                self._scan_shard(part, found)
            else:
                self._scan_chunk(part, found)
        except (DamagedDataError, ValueError) as error:
            found.damage.append(str(error))
        return found

    def _scan_shard(self, part: Part, found: Scan) -> None:
        stream = Stream(pathlib.Path(part.directory), shard=part.shard)  # whatever others are like
        manifest = stream.manifest
        (entry,) = manifest.shards
        verify_shard(pathlib.Path(part.path), entry)
        found.sha256[part.path] = entry.sha256
        before, after = int("bos" in manifest.boundary), int("eos" in manifest.boundary)
        misplaced = {"BOS": 0, "EOS": 0}
        for ids, documents in stream.document_blocks(0):
            ends = np.cumsum(documents["tokens"], dtype=np.int64)
            starts = ends - documents["tokens"]
            self._count(found, ids)
            for what, token_id, marks in (
                ("BOS", manifest.bos_id, starts if before else starts[:0]),
                ("EOS", manifest.eos_id, ends - 1 if after else ends[:0]),
            ):
                if token_id >= 0:
                    places = np.flatnonzero(ids == token_id)
                    misplaced[what] += len(np.setxor1d(places, marks, assume_unique=True))
            self._look_at(found, ids, starts + before, ends - after)
        for what, count in misplaced.items():
            if count:
                found.damage.append(
                    f"{part.path}: {what} is missing or too much at {count:,} places; it is not "
                    f'where data.boundary = "{manifest.boundary}" puts it'
                )

    def _scan_chunk(self, part: Part, found: Scan) -> None:
        ids = litpkds.read_chunk(part.path)
        with open(part.path, "rb") as file:
            found.sha256[part.path] = hashlib.file_digest(file, "sha256").hexdigest()
        filling = litpkds.filling(ids, self._bos_id)
        found.filled += filling > 0
        found.filling += filling
        kept = np.array(ids[: len(ids) - filling], np.int32)
        starts = np.flatnonzero(kept == self._bos_id)
        found.bos_runs += int((np.diff(starts) == 1).sum())
        self._count(found, kept)
        # The last one may go on in the next chunk, if nothing shows that it ends here.
        ends = np.append(starts[1:], len(kept))
        ended = filling or (len(kept) and kept[-1] == self._eos_id)
        whole = len(starts) - (0 if ended else 1)
        found.ended += int((kept[ends[: max(whole, 0)] - 1] == self._eos_id).sum())
        self._look_at(found, kept, starts[:whole] + 1, ends[:whole])
        found.documents += len(starts) - max(whole, 0)

    def _count(self, found: Scan, ids: np.ndarray) -> None:
        found.tokens += len(ids)
        counts = np.bincount(ids, minlength=len(found.token_counts))
        counts[: len(found.token_counts)] += found.token_counts
        found.token_counts = counts

    def _look_at(self, found: Scan, ids: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        """At whole documents, given without their boundary marks."""
        if not len(starts):
            return
        lengths = np.maximum(ends - starts, 1)
        found.documents += len(starts)
        found.lengths += np.bincount(
            np.minimum(np.log2(lengths).astype(int), LENGTH_BINS - 1), minlength=LENGTH_BINS
        )
        content = ids.astype("<u4").tobytes()
        found.hashes.append(
            np.array([_hash(content[4 * a : 4 * b]) for a, b in zip(starts, ends, strict=True)],
                     np.uint64)
        )  # fmt: skip
        if self._tokenizer is None:
            return
        left = max(0, _SAMPLE_DOCUMENTS - found.encoded)
        for start, end in zip(starts[:left], ends[:left], strict=True):
            sample = ids[start : min(end, start + _SAMPLE_TOKENS)]
            found.encoded += 1
            found.encoded_alike += _encodes_alike(self._tokenizer, sample)
        if self._grams is not None:
            for start, end in zip(starts, ends, strict=True):
                text = self._tokenizer.decode(ids[start:end])
                found.contaminated.update(files_met(text, self._grams))


def scan_parts(
    parts: Sequence[Part], scanner: tuple[int, int, bytes, Grams | None], workers: int
) -> Iterator[tuple[Part, Scan]]:
    """Scans parts in order, `workers` processes at once; `scanner`: arguments of `Scanner`."""
    if min(workers, len(parts)) <= 1:
        one = Scanner(*scanner)
        yield from ((part, one.scan(part)) for part in parts)
        return
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=scanner
    ) as pool:
        yield from zip(parts, pool.map(_scan, parts), strict=True)


def words_of(text: str) -> list[str]:
    """The words that runs are made of: lower case, nothing but letters and digits."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def grams_of(texts: dict[str, str], size: int) -> Grams:
    """The runs of `size` words of texts, by their name."""
    files: dict[int, str] = {}
    for name, text in texts.items():
        for gram in _runs(words_of(text), size):
            files.setdefault(gram, name)
    return Grams(size, files)


def files_met(text: str, grams: Grams) -> set[str]:
    """The files that a document shares a run of words with."""
    met = (grams.files.get(gram) for gram in _runs(words_of(text), grams.size))
    return {name for name in met if name is not None}


def _runs(words: list[str], size: int) -> Iterator[int]:
    for start in range(len(words) - size + 1):
        yield int(_hash(" ".join(words[start : start + size]).encode()))


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _encodes_alike(tokenizer: Tokenizer, ids: np.ndarray) -> bool:
    """Whether the text of ids gives them again, but for what a cut at the end may change."""
    try:
        again = tokenizer.encode(tokenizer.decode(ids))
    except ValueError:
        return False
    whole = max(1, len(ids) - 8)
    return again[:whole] == ids[:whole].tolist()


_scanner: Scanner


def _start(*arguments) -> None:
    global _scanner
    _scanner = Scanner(*arguments)


def _scan(part: Part) -> Scan:
    return _scanner.scan(part)
