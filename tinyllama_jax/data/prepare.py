"""Raw text to prepared pages: a process per core, resumable, the same bytes every time.

    <data.prepared>/<source>-<hash>/source.json              what the hash stands for
                                    train/, validation/      pages and manifest.json
                                    units/                   records of the finished units

A source in subsets (`subset_key`) has `SUBSET/train/` and `SUBSET/validation/` of each instead, and
`subsets.json`, which lists them. Each subset is a stream of its own, named SOURCE.SUBSET.

The hash covers everything that changes the bytes: tokenizer, boundary rule, reading settings, and
the inputs by name and size, up to 64 MiB by content too. So another tokenizer or another file gives
another directory, and the same ones are reused at once.

A machine that trains needs the prepared directory alone: where the raw text is absent, the one that
was prepared with the same settings is taken.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Sequence

from tinyllama_jax.config import DataConfig, SourceConfig
from tinyllama_jax.config_rules import chosen_subsets
from tinyllama_jax.data.pages import (
    DamagedDataError,
    Manifest,
    read_manifest,
    write_manifest,
)
from tinyllama_jax.data.sources import Input, MissingTextError, Tally, left_out, list_inputs
from tinyllama_jax.data.units import (
    SPLITS,
    Unit,
    group_inputs,
    make_directory,
    place_of,
    read_record,
    remove_abandoned_work,
    shard_is_there,
)
from tinyllama_jax.data.workers import available_cores, run_units
from tinyllama_jax.durable import write_durably
from tinyllama_jax.progress import Progress
from tinyllama_jax.text.tokenizer import Tokenizer

_VERSION = 2  # of the way from raw text to bytes
_HASH_CONTENT_BYTES = 64 << 20  # corpora up to this size are known by their content
_SUBSETS = "subsets.json"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One source, and the units that make it; none where its raw text is on another machine."""

    source: SourceConfig
    directory: pathlib.Path
    description: str = ""  # JSON: the identity, whose hash names the directory, and the path
    units: tuple[Unit, ...] = ()
    inputs: tuple[Input, ...] = ()


def prepare_sources(
    data: DataConfig, *, workers: int = 0, max_bytes: int = 0
) -> dict[str, pathlib.Path]:
    """Tokenizes all sources into `data.prepared`, as far as that is not done yet.

    Prints its progress and, in the end, what was skipped or repaired.

    Args:
      data: sources, tokenizer, boundary rule and where to write.
      workers: processes; 0: one per core that this process may use. The bytes do not depend on it.
      max_bytes: raw text that is still to be read at most, for a caller that has other work to do;
        0: any amount.

    Returns:
      The directory of each stream by its name; `train/` and `validation/` in it have a manifest. A
      source is a stream, or as many as it has subsets.

    Raises:
      ValueError: a source is missing, empty or malformed, there is none at all, the tokenizer
        cannot mark documents, or there is more to do than `max_bytes`.
      OSError: the disk is full or failed. What was finished stays, and the next call continues.
      RuntimeError: a worker died.
    """
    if not data.sources:
        raise ValueError(
            "data.sources is empty, so there is no text to learn from; add a source to the config "
            'file: config.data.sources.NAME = source(path="FILES")'
        )
    tokenizer = Tokenizer(data.tokenizer)
    _require_boundary_ids(data.boundary, tokenizer)
    plans = [_plan(source, data, tokenizer) for source in data.sources]
    for plan in plans:
        if not plan.inputs:
            print(
                f"{plan.source.name}: its raw text is not here; taking {plan.directory}", flush=True
            )
    unfinished = [plan for plan in plans if not is_prepared(plan.source, plan.directory)]
    for plan in unfinished:
        if others := left_out(plan.source, plan.inputs):
            print(f"{plan.source.name}: files left out, by ending: {others}", flush=True)
        make_directory(plan.directory)
        write_durably(plan.directory / "source.json", plan.description.encode())
        remove_abandoned_work(plan.directory)
    waiting = [unit for plan in unfinished for unit in plan.units if read_record(unit) is None]
    waiting_bytes = sum(unit.bytes for unit in waiting)
    if max_bytes and waiting_bytes > max_bytes:
        raise ValueError(
            f"{waiting_bytes / 1e9:.3g} GB of raw text are not prepared yet, which would hold this "
            f"machine's accelerators up for long; run python -m tinyllama_jax.prepare with the "
            f"same --config first, on a machine with many cores"
        )
    try:
        if waiting:
            _run(waiting, unfinished, tokenizer, workers or available_cores())
    finally:
        for plan in unfinished:  # of workers that were stopped because another failed
            remove_abandoned_work(plan.directory)
    for plan in unfinished:
        _finish(plan, data, tokenizer)
    return {
        name: directory
        for plan in plans
        for name, directory in _streams(plan.source, plan.directory).items()
    }


def examine_source(
    source: SourceConfig, data: DataConfig, tokenizer: Tokenizer
) -> tuple[pathlib.Path, bool, str]:
    """Looks at a source without doing anything.

    Returns:
      Where it is prepared to (the name holds a hash of all that changes the bytes), whether it is
      prepared already, and what it consists of.

    Raises:
      ValueError: as `prepare_sources`.
    """
    plan = _plan(source, data, tokenizer)
    size = sum(entry.bytes for entry in plan.inputs)
    text = (
        f"{len(plan.inputs):,} inputs, {size / 1e6:,.1f} MB" if plan.inputs else "raw text absent"
    )
    return plan.directory, is_prepared(source, plan.directory), text


def is_prepared(source: SourceConfig, directory: pathlib.Path) -> bool:
    """Whether both splits are there to the end, each shard in the size it was written in."""
    try:
        for stream in _streams(source, directory).values():
            for split in SPLITS:
                shards = read_manifest(stream / split).shards
                if not all(shard_is_there(stream / split, shard) for shard in shards):
                    return False
    except (FileNotFoundError, DamagedDataError):
        return False
    return True


def _streams(source: SourceConfig, directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """The directories of a source's streams; raises FileNotFoundError, DamagedDataError."""
    if not source.subset_key:
        return {source.name: directory}
    try:
        subsets = json.loads((directory / _SUBSETS).read_bytes())
        return {f"{source.name}.{subset}": directory / subset for subset in subsets}
    except (ValueError, TypeError) as error:
        raise DamagedDataError(f"{directory / _SUBSETS} is damaged: {error}") from error


def _require_boundary_ids(boundary: str, tokenizer: Tokenizer) -> None:
    for name, token_id in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if name in boundary and token_id < 0:
            raise ValueError(
                f'data.boundary = "{boundary}", but the tokenizer has no {name.upper()} piece; '
                f"set data.boundary to the one that it has, or use another tokenizer"
            )


def _plan(source: SourceConfig, data: DataConfig, tokenizer: Tokenizer) -> _Plan:
    try:
        inputs = list_inputs(source)
    except MissingTextError as missing:
        return _Plan(source, _prepared_before(source, data, tokenizer, missing))
    identity = _identity(source, inputs, data.boundary, tokenizer)
    digest = hashlib.sha256(json.dumps(identity, indent=1).encode()).hexdigest()
    description = json.dumps(identity | {"path": source.path}, indent=1)
    directory = pathlib.Path(data.prepared).expanduser() / f"{source.name}-{digest[:12]}"
    units = tuple(
        Unit(index, source, group, data.boundary, str(directory))
        for index, group in enumerate(group_inputs(inputs))
    )
    return _Plan(source, directory, description, units, inputs)


def _prepared_before(
    source: SourceConfig, data: DataConfig, tokenizer: Tokenizer, missing: MissingTextError
) -> pathlib.Path:
    """The one directory that was prepared of this path with these settings."""
    expected = _settings_identity(source, data.boundary, tokenizer)
    found: list[pathlib.Path] = []
    of_other_paths: list[str] = []
    for path in sorted(pathlib.Path(data.prepared).expanduser().glob(f"{source.name}-*")):
        try:
            identity = json.loads((path / "source.json").read_bytes())
        except (OSError, ValueError):
            continue
        same = all(identity.get(key) == value for key, value in expected.items())
        same &= source.format in ("auto", identity.get("format"))
        if same and is_prepared(source, path):
            if identity.get("path") == source.path:
                found.append(path)
            else:
                of_other_paths.append(f"{path} of path {identity.get('path')!r}")
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(map(str, found))
        advice = f". Several corpora were prepared of it, {several}: remove all but one"
    elif of_other_paths:
        listed = ", ".join(of_other_paths)
        advice = f". Prepared with the same settings is {listed}: set path to that to take it"
    else:
        advice = f", or bring what was prepared of it to {data.prepared}"
    raise ValueError(f"{missing}{advice}") from missing


def _settings_identity(source: SourceConfig, boundary: str, tokenizer: Tokenizer) -> dict:
    """The settings that change the bytes."""
    return {
        "version": _VERSION,
        "tokenizer_sha256": tokenizer.sha256,
        "boundary": boundary,
        "part": source.path if source.format == "embedded" else "",
        "text_key": source.text_key,
        "separator": source.separator,
        "subset_key": source.subset_key,
        "subsets": source.subsets,
        "validation_fraction": source.validation_fraction,
    }


def _identity(
    source: SourceConfig, inputs: Sequence[Input], boundary: str, tokenizer: Tokenizer
) -> dict:
    """Everything that changes the bytes."""
    names = hashlib.sha256()
    by_content = sum(entry.bytes for entry in inputs) <= _HASH_CONTENT_BYTES
    for entry in inputs:
        names.update(f"{entry.name}\0{entry.bytes}\0".encode())
        if by_content and entry.format != "tfds":
            with open(entry.path, "rb") as file:
                names.update(hashlib.file_digest(file, "sha256").digest())
    return _settings_identity(source, boundary, tokenizer) | {
        "format": inputs[0].format,
        "inputs": len(inputs),
        "inputs_sha256": names.hexdigest(),
    }


def _run(
    waiting: Sequence[Unit], plans: Sequence[_Plan], tokenizer: Tokenizer, workers: int
) -> None:
    total = sum(unit.bytes for plan in plans for unit in plan.units)
    done = total - sum(unit.bytes for unit in waiting)
    names = ", ".join(plan.source.name for plan in plans)
    print(f"preparing {names}: {total / 1e6:.1f} MB of raw text, {workers} processes", flush=True)
    tokens = 0
    started = time.monotonic()
    with Progress(total, "B", initial=done, scale=True) as progress:

        def advance(count_bytes: int, count_tokens: int) -> None:
            nonlocal tokens
            tokens += count_tokens
            rate = tokens / (time.monotonic() - started)
            progress.advance(count_bytes, f"{tokens / 1e6:.1f} Mtokens, {rate / 1e6:.2f} Mtokens/s")

        run_units(waiting, tokenizer, workers, advance)
    seconds = time.monotonic() - started
    print(f"{tokens / 1e6:.2f} Mtokens in {seconds:.1f} s, {tokens / 1e6 / seconds:.2f} Mtokens/s")


def _finish(plan: _Plan, data: DataConfig, tokenizer: Tokenizer) -> None:
    """Writes the manifests from the records of the units, and says what was met."""
    records = [record for unit in plan.units if (record := read_record(unit)) is not None]
    assert len(records) == len(plan.units), plan.directory
    tally = Tally()
    for record in records:
        tally.add(record.tally)
    _report(plan.source, tally)
    if plan.source.separator and tally.documents <= len(plan.inputs):
        print(
            f"data.sources.{plan.source.name}.separator = {plan.source.separator!r} gave no more "
            f"documents than there are files; look at one of them"
        )
    subsets = [""]
    if plan.source.subset_key:
        subsets = sorted({place.rpartition("/")[0] for r in records for place in r.shards})
        _report_unknown_subsets(plan.source, subsets, tally)
    manifests = {
        place_of(subset, split): Manifest(
            source=".".join(filter(None, (plan.source.name, subset))),
            split=split,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            boundary=data.boundary,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            shards=tuple(
                r.shards[place_of(subset, split)]
                for r in records
                if place_of(subset, split) in r.shards
            ),
        )
        for subset in subsets
        for split in SPLITS
    }
    training, validation = (
        sum(m.documents for m in manifests.values() if m.split == split) for split in SPLITS
    )
    name = f"data.sources.{plan.source.name}"
    if not training:
        raise ValueError(
            f'{name}.path = "{plan.source.path}" has no document to train on '
            f"({sum(tally.skipped.values())} skipped, {validation} held out for validation); give "
            f"it text, or lower {name}.validation_fraction"
        )
    if not validation and plan.source.validation_fraction:
        print(
            f"{name}: none of its {tally.documents} documents fell into validation, so it will "
            f"have no validation loss; raise {name}.validation_fraction "
            f"(now {plan.source.validation_fraction}) or give it more documents"
        )
    for place, manifest in manifests.items():
        (plan.directory / place).mkdir(parents=True, exist_ok=True)
        write_manifest(plan.directory / place, manifest)
    if plan.source.subset_key:  # the last: what lists them is there when they are
        write_durably(plan.directory / _SUBSETS, json.dumps(subsets, indent=1).encode())


def _report_unknown_subsets(source: SourceConfig, subsets: Sequence[str], tally: Tally) -> None:
    """Tells of a name that is none: left out by a misspelt one, a subset would be trained on."""
    names, _ = chosen_subsets(source.subsets)
    met = {*subsets, *(kind.rpartition(" ")[2] for kind in tally.skipped)}
    if unknown := sorted(names - met):
        print(
            f"warning: data.sources.{source.name}.subsets names {', '.join(unknown)}, to which no "
            f"document belongs; there are {', '.join(subsets)}"
        )


def _report(source: SourceConfig, tally: Tally) -> None:
    print(f"{source.name}: {tally.documents} documents")
    for what, counts in (("skipped", tally.skipped), ("repaired", tally.repaired)):
        for kind, count in sorted(counts.items()):
            print(f"{source.name}: {what} {count} {kind}")
