"""Judges a prepared corpus, or chunks that lit-gpt's packer wrote: is it what it should be?

Every defect that TinyLlama's data had is looked for: BOS as filling, documents without EOS, shards
that are there twice or not at all, files of another tokenizer.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tinyllama_jax.config import Config
from tinyllama_jax.data.audit_files import (
    CHUNK,
    NAMES,
    corpus_of,
    gaps,
    pointers,
    some,
    structure,
    unfinished,
)
from tinyllama_jax.data.corpus import open_prepared
from tinyllama_jax.data.near_copies import near_copies
from tinyllama_jax.data.pages import MANIFEST_FILE, DamagedDataError, Manifest, read_manifest
from tinyllama_jax.data.prepared import plan_of
from tinyllama_jax.data.scan import Grams, Part, Scan, grams_of, scan_parts
from tinyllama_jax.data.stream import Stream
from tinyllama_jax.data.units import SPLITS
from tinyllama_jax.findings import Finding
from tinyllama_jax.text.tokenizer import Tokenizer

GRAM_WORDS = 13  # as GPT-3 (arXiv 2005.14165, appendix C) and most reports since
_MANY_COPIES = 0.01  # copies among the documents that are no longer a detail
_ALIKE = 0.8  # documents that must encode to the same ids again; one that was cut may not
_ENDED = 0.95  # documents of chunks that must end with EOS


@dataclasses.dataclass(frozen=True)
class StreamAudit:
    """One split of one stream, or one sequence of chunks.

    Attributes:
      name: the stream, and its split.
      directory: where it stands.
      corpus: the prepared directory of its source, or the chunks' directory.
      scan: what it holds.
      boundary: what marks its documents.
      text_bytes: of text that its ids stand for; 0: no tokenizer was at hand.
    """

    name: str
    directory: str
    corpus: pathlib.Path
    scan: Scan
    boundary: str
    text_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Audit:
    findings: list[Finding]
    streams: list[StreamAudit]


def audit(
    directory: pathlib.Path,
    *,
    config: Config | None = None,
    tokenizer: Tokenizer | None = None,
    evaluation_files: Sequence[pathlib.Path] = (),
    near_copies_among: int = 0,
    workers: int = 1,
    advance: Callable[[int], None] = lambda count: None,
) -> Audit:
    """Reads a corpus from end to end.

    Args:
      directory: what `data.prepared` names, a part of it, or a directory of LITPKDS chunks.
      config: of the run that it is for; its mixture is compared.
      tokenizer: that it should be of; None: the shipped one where it is.
      evaluation_files: texts that must not be in it, by runs of 13 words.
      near_copies_among: so many documents to train on, the first of each stream, are compared with
        each other; 0: none.
      workers: processes.
      advance: told of bytes read.

    Raises:
      ValueError: there is neither, or texts are looked for without a tokenizer.
    """
    splits = sorted(path.parent for path in directory.rglob(MANIFEST_FILE))
    chunks = sorted(directory.rglob("*.bin")) if not splits else []
    if not splits and not chunks:
        raise ValueError(
            f"{directory} holds no prepared corpus and no LITPKDS chunks (*.bin); name what "
            f"data.prepared is set to, or a directory of chunks"
        )
    if config is not None and splits:
        splits = _of_config(directory, splits, config, tokenizer)
    findings = [*pointers(directory)]
    manifests: dict[pathlib.Path, Manifest] = {}
    for split in splits:
        try:
            manifests[split] = read_manifest(split)
        except (ValueError, DamagedDataError) as error:
            findings.append(Finding(str(split), str(error), "problem"))
    if tokenizer is None and manifests:
        shipped = Tokenizer()
        if all(m.tokenizer_sha256 == shipped.sha256 for m in manifests.values()):
            tokenizer = shipped
    if chunks and tokenizer is None:
        raise ValueError(
            f"{directory} holds chunks of ids, which say nothing of their tokenizer; name it with "
            f"--tokenizer, or a --config"
        )
    grams = _grams(evaluation_files, tokenizer)
    parts = _parts_of(manifests) if manifests else _parts_of_chunks(directory, chunks)
    streams = _scanned(parts, manifests, tokenizer, grams, workers, advance)

    for split, manifest in manifests.items():
        findings += structure(split, manifest)
    for corpus in sorted(set(map(corpus_of, splits))):
        findings += unfinished(corpus)
    findings += gaps(chunks)
    for stream in streams:
        findings += _contents(stream, chunks=bool(chunks))
    findings.append(_repeated_parts(streams))
    # What was prepared of the same text in several ways may lie side by side.
    corpora = sorted({stream.corpus for stream in streams})
    for corpus in corpora:
        own = [stream for stream in streams if stream.corpus == corpus]
        findings += _copies(own, f" ({corpus.name})" if len(corpora) > 1 else "")
    findings += _tokenizer(streams, manifests, tokenizer)
    if grams is not None:
        findings.append(_contamination(streams, grams))
    if near_copies_among:
        findings.append(_near_copies(manifests, tokenizer, near_copies_among))
    if config is not None and manifests:
        findings += _mixture(config, tokenizer)
    return Audit(findings, streams)


def _of_config(
    directory: pathlib.Path,
    splits: Sequence[pathlib.Path],
    config: Config,
    tokenizer: Tokenizer | None,
) -> list[pathlib.Path]:
    """The splits that a run of a config reads, of all that are there."""
    tokenizer = tokenizer or Tokenizer(config.data.tokenizer)
    read = {plan_of(s, config.data, tokenizer).directory.resolve() for s in config.data.sources}
    chosen = [split for split in splits if corpus_of(split).resolve() in read]
    if not chosen:
        raise ValueError(
            f"{directory} holds nothing that a run of the config reads, which would be in "
            f"{some(sorted(map(str, read)))}; leave --config out to look at what is there"
        )
    return chosen


def _parts_of(manifests: Mapping[pathlib.Path, Manifest]) -> list[Part]:
    return [
        Part(f"{manifest.source} {manifest.split}", str(split / shard.file), str(split), number)
        for split, manifest in manifests.items()
        for number, shard in enumerate(manifest.shards)
        if (split / shard.file).is_file()  # else `_structure` tells
    ]


def _parts_of_chunks(directory: pathlib.Path, chunks: Sequence[pathlib.Path]) -> list[Part]:
    def name(path: pathlib.Path) -> str:
        numbered = CHUNK.fullmatch(path.relative_to(directory).as_posix())
        return numbered[1] if numbered else path.stem

    return [Part(name(path), str(path)) for path in chunks]


def _scanned(
    parts: Sequence[Part],
    manifests: Mapping[pathlib.Path, Manifest],
    tokenizer: Tokenizer | None,
    grams: Grams | None,
    workers: int,
    advance: Callable[[int], None],
) -> list[StreamAudit]:
    boundaries = {str(split): manifest.boundary for split, manifest in manifests.items()}
    scans: dict[tuple[str, str], Scan] = collections.defaultdict(Scan)
    bos, eos, proto = -1, -1, b""
    if tokenizer is not None:
        bos, eos, proto = tokenizer.bos_id, tokenizer.eos_id, tokenizer.model_proto
    for part, scan in scan_parts(parts, (bos, eos, proto, grams), workers):
        directory = part.directory or str(pathlib.Path(part.path).parent)
        scans[part.stream, directory].add(scan)
        advance(scan.bytes)
    sizes = np.array(tokenizer.piece_bytes(), np.int64) if tokenizer is not None else None
    result = []
    for (name, directory), scan in scans.items():
        text = 0
        if sizes is not None and len(scan.token_counts) <= len(sizes):
            text = int(scan.token_counts @ sizes[: len(scan.token_counts)])
        path = pathlib.Path(directory)
        corpus = corpus_of(path) if manifests else path
        boundary = boundaries.get(directory, "")
        result.append(StreamAudit(name, directory, corpus, scan, boundary, text))
    return result


def _contents(stream: StreamAudit, chunks: bool) -> list[Finding]:
    scan, findings = stream.scan, []
    text = (
        f"{scan.documents:,} documents, {scan.tokens:,} tokens, {scan.bytes / 1e6:,.1f} MB in "
        f"{len(scan.sha256):,} {'chunks' if chunks else 'shards'}"
    )
    if scan.documents:
        text += f", {scan.tokens / scan.documents:,.0f} tokens a document"
    if stream.text_bytes:
        text += f", {stream.text_bytes / max(1, scan.tokens):.2f} bytes a token"
    findings.append(Finding(stream.name, text))
    findings += [Finding(stream.name, damage, "problem") for damage in scan.damage[:NAMES]]
    if len(scan.damage) > NAMES:
        more = f"{len(scan.damage) - NAMES:,} more files are damaged"
        findings.append(Finding(stream.name, more, "problem"))
    if scan.tokens and not scan.documents:
        findings.append(
            Finding(stream.name, "no BOS of the tokenizer is in it: it is of another one, or was "
                    "packed without", "problem")
        )  # fmt: skip
    if scan.filled:
        share = scan.filling / (scan.filling + scan.tokens)
        findings.append(
            Finding(stream.name, f"{scan.filled} chunks were filled up with {scan.filling:,} BOS "
                    f"({share:.1%} of all): a model that reads them as they are learns BOS after "
                    f"BOS; prepared by this package they are cut off", "problem")
        )  # fmt: skip
    if scan.bos_runs:
        findings.append(
            Finding(stream.name, f"{scan.bos_runs} documents are empty (BOS beside BOS)", "warning")
        )
    if chunks and scan.ended < _ENDED * scan.lengths.sum():
        findings.append(
            Finding(stream.name, f"{int(scan.lengths.sum()) - scan.ended:,} documents do not end "
                    "with EOS: a model learns no end; prepared with data.boundary = bos+eos each "
                    "has one", "problem")
        )  # fmt: skip
    elif stream.boundary == "bos":
        findings.append(
            Finding(stream.name, 'data.boundary = "bos": no document ends with EOS, so a model '
                    "learns no end", "warning")
        )  # fmt: skip
    return findings


def _repeated_parts(streams: Sequence[StreamAudit]) -> Finding:
    paths = collections.defaultdict(list)
    for stream in streams:
        for path, sha256 in stream.scan.sha256.items():
            paths[sha256].append(path)
    groups = [group for group in paths.values() if len(group) > 1]
    if groups:
        shown = some(" = ".join(group) for group in groups)
        return Finding("hashes", f"the same bytes are there more than once: {shown}", "problem")
    return Finding("hashes", f"{len(paths):,} files were hashed, each is there once")


def _copies(streams: Sequence[StreamAudit], where: str) -> list[Finding]:
    """Documents that are there more than once, and those that are both trained on and held out."""
    train, held_out = (
        np.concatenate(
            [np.zeros(0, np.uint64)]
            + [hashes for s in streams for hashes in s.scan.hashes if is_held_out(s) == split]
        )
        for split in (False, True)
    )
    distinct = np.unique(train)
    copies = len(train) - len(distinct)
    level = "ok"
    if copies:
        level = "problem" if copies > _MANY_COPIES * len(train) else "warning"
    text = f"{copies:,} of {len(train):,} documents to train on are copies of another, to the token"
    findings = [Finding(f"copies{where}", text, level)]
    if len(held_out):
        both = int(np.isin(np.unique(held_out), distinct).sum())
        text = f"{both:,} of {len(held_out):,} documents are trained on too"
        findings.append(Finding(f"held out{where}", text, "problem" if both else "ok"))
    return findings


def is_held_out(stream: StreamAudit) -> bool:
    """Whether it is for validation."""
    return stream.name.endswith(f" {SPLITS[1]}")


def _tokenizer(
    streams: Sequence[StreamAudit],
    manifests: Mapping[pathlib.Path, Manifest],
    tokenizer: Tokenizer | None,
) -> list[Finding]:
    hashes = {manifest.tokenizer_sha256 for manifest in manifests.values()}
    if tokenizer is None:
        named = some(sorted(value[:12] for value in hashes))
        return [
            Finding("tokenizer", f"of sha256 {named}; name it with --tokenizer, or a --config, to "
                    "see whether the ids are its own", "ok" if len(hashes) == 1 else "warning")
        ]  # fmt: skip
    if others := sorted(hashes - {tokenizer.sha256}):
        return [
            Finding("tokenizer", f"prepared with the one of sha256 {some(others)}, but given is "
                    f"{tokenizer.sha256}: ids would mean other text", "problem")
        ]  # fmt: skip
    encoded = sum(stream.scan.encoded for stream in streams)
    alike = sum(stream.scan.encoded_alike for stream in streams)
    text = f"{alike} of {encoded} documents, decoded and encoded again, give the same ids"
    if alike < _ALIKE * encoded or (not encoded and any(s.scan.tokens for s in streams)):
        return [Finding("tokenizer", f"{text}: they are of another tokenizer", "problem")]
    return [Finding("tokenizer", text)]


def _contamination(streams: Sequence[StreamAudit], grams: Grams) -> Finding:
    met: collections.Counter[str] = collections.Counter()
    for stream in streams:
        met.update(stream.scan.contaminated)
    looked = f"runs of {grams.size} words of {len(set(grams.files.values()))} files"
    if not met:
        return Finding("evaluation", f"no document has any of the {looked}")
    shown = some(f"{name}: {count} documents" for name, count in met.most_common())
    return Finding("evaluation", f"documents share {looked}: {shown}", "problem")


def _near_copies(
    manifests: Mapping[pathlib.Path, Manifest], tokenizer: Tokenizer | None, among: int
) -> Finding:
    if tokenizer is None:
        raise ValueError("near copies are looked for in text: name --tokenizer or --config")
    if not manifests:
        raise ValueError("near copies are looked for in what is prepared: prepare the chunks first")
    training = [split for split, manifest in manifests.items() if manifest.split == SPLITS[0]]

    def texts() -> Iterator[tuple[str, str]]:
        for split in training:
            stream, left, offset = Stream(split), -(-among // len(training)), 0
            for shard, entry in enumerate(stream.manifest.shards):
                for ids, table in stream.document_blocks(shard):
                    ends = np.cumsum(table["tokens"], dtype=np.int64)[:left]
                    for row, end in zip(table, ends, strict=False):
                        start = end - row["tokens"]
                        place = f"{entry.inputs[row['input']]}, record {row['record']}"
                        name = f"{stream.manifest.source}: {place}, token {offset + start}"
                        yield name, tokenizer.decode(ids[start:end])
                    left -= len(ends)
                    offset += len(ids)

    count = 0

    def counted(number: int) -> None:
        nonlocal count
        count += number

    pairs = near_copies(texts(), counted)
    text = f"{len(pairs):,} of {count:,} documents are nearly a copy of another"
    if pairs:
        text += ": " + some(f"{name} of {other}" for name, other in pairs)
    return Finding("near copies", text, "warning" if len(pairs) > _MANY_COPIES * count else "ok")


def _mixture(config: Config, tokenizer: Tokenizer | None) -> list[Finding]:
    """What the run of a config reads of it."""
    try:
        tokenizer = tokenizer or Tokenizer(config.data.tokenizer)
        training = open_prepared(config, tokenizer).training
    except (ValueError, OSError) as error:
        return [Finding("mixture", str(error), "problem")]
    return [
        Finding("mixture", line)
        for line in training.describe(config.total_steps).splitlines()
    ]  # fmt: skip


def _grams(files: Sequence[pathlib.Path], tokenizer: Tokenizer | None) -> Grams | None:
    if not files:
        return None
    if tokenizer is None:
        raise ValueError("texts are looked for in decoded documents: name --tokenizer or --config")
    texts = {str(path): path.read_text(errors="replace") for path in files}
    grams = grams_of(texts, GRAM_WORDS)
    if not grams.files:
        raise ValueError(
            f"{some(map(str, files))}: none has a run of {GRAM_WORDS} words to look for"
        )
    return grams
