"""Where a source is prepared to, what names that directory, and whether it is all there.

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
from collections.abc import Sequence

from tinyllama_jax.config import DataConfig, SourceConfig
from tinyllama_jax.data.litpkds import CHUNKS_BEHIND
from tinyllama_jax.data.pages import DamagedDataError, read_manifest
from tinyllama_jax.data.sources import Input, MissingTextError, list_inputs
from tinyllama_jax.data.units import SPLITS, Unit, group_inputs, shard_is_there
from tinyllama_jax.durable import write_durably
from tinyllama_jax.text.tokenizer import Tokenizer

SUBSETS = "subsets.json"
_VERSION = 2  # of the way from raw text to bytes
_HASH_CONTENT_BYTES = 64 << 20  # corpora up to this size are known by their content


@dataclasses.dataclass(frozen=True)
class Plan:
    """One source, and the units that make it; none where its raw text is on another machine."""

    source: SourceConfig
    directory: pathlib.Path
    description: str = ""  # JSON: the identity, whose hash names the directory, and the path
    units: tuple[Unit, ...] = ()
    inputs: tuple[Input, ...] = ()


def plan_of(source: SourceConfig, data: DataConfig, tokenizer: Tokenizer) -> Plan:
    """What is to be done for a source; raises ValueError as `prepare_sources`."""
    try:
        inputs = list_inputs(source)
    except MissingTextError as missing:
        return Plan(source, _prepared_before(source, data, tokenizer, missing))
    identity = _identity(source, inputs, data.boundary, tokenizer)
    digest = hashlib.sha256(json.dumps(identity, indent=1).encode()).hexdigest()
    description = json.dumps(identity | {"path": source.path}, indent=1)
    directory = pathlib.Path(data.prepared).expanduser() / f"{source.name}-{digest[:12]}"
    units = []
    done = 0
    for index, group in enumerate(group_inputs(inputs)):
        end = done + len(group)
        # A document that a unit's last chunk of ids leaves open goes on behind it.
        packed = group[0].format == "litpkds"
        before = inputs[done - 1].path if packed and done else ""
        after = tuple(entry.path for entry in inputs[end : end + CHUNKS_BEHIND] if packed)
        units.append(Unit(index, source, group, data.boundary, str(directory), before, after))
        done = end
    return Plan(source, directory, description, tuple(units), inputs)


def is_prepared(source: SourceConfig, directory: pathlib.Path) -> bool:
    """Whether both splits are there to the end, each shard in the size it was written in."""
    try:
        for stream in streams_of(source, directory).values():
            for split in SPLITS:
                shards = read_manifest(stream / split).shards
                if not all(shard_is_there(stream / split, shard) for shard in shards):
                    return False
    except (FileNotFoundError, DamagedDataError):
        return False
    return True


def streams_of(source: SourceConfig, directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """The directories of a source's streams; raises FileNotFoundError, DamagedDataError."""
    if not source.subset_key:
        return {source.name: directory}
    try:
        subsets = read_subsets(directory)
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedDataError(f"{directory / SUBSETS} is damaged: {error!r}") from error
    return {f"{source.name}.{subset}": directory / subset for subset in subsets}


def write_subsets(directory: pathlib.Path, subsets: Sequence[str]) -> None:
    """Lists the subsets of a source: the last file, as what it lists is there."""
    tree = {"subsets": list(subsets), "checksum": _checksum(subsets)}
    write_durably(directory / SUBSETS, json.dumps(tree, indent=1).encode())


def read_subsets(directory: pathlib.Path) -> list[str]:
    """What `write_subsets` wrote; raises ValueError, KeyError or TypeError where it is not that."""
    tree = json.loads((directory / SUBSETS).read_bytes())
    if tree["checksum"] != _checksum(tree["subsets"]):
        raise ValueError("its checksum does not match")
    return tree["subsets"]


def _checksum(subsets: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(subsets)).encode()).hexdigest()


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
