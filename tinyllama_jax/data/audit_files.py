"""What an audit sees before it reads: which files are there, and what is said of them."""

from __future__ import annotations

import collections
import itertools
import json
import pathlib
import re
from collections.abc import Sequence

from tinyllama_jax.data.pages import MANIFEST_FILE, DamagedDataError, Manifest, read_manifest
from tinyllama_jax.findings import Finding

CHUNK = re.compile(r"(.*)_(\d+)\.bin")
NAMES = 4  # that a line gives of many
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def pointers(directory: pathlib.Path) -> list[Finding]:
    """Git-LFS pointers in place of data."""
    found = []
    for path in directory.rglob("*"):
        if path.is_file() and path.stat().st_size <= 1024:
            with open(path, "rb") as file:
                if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    found.append(str(path))
    if not found:
        return []
    return [
        Finding("files", f"Git-LFS pointers in place of data: {some(found)}; run `git lfs pull` "
                "where they came from", "problem")
    ]  # fmt: skip


def structure(split: pathlib.Path, manifest: Manifest) -> list[Finding]:
    """Manifest and directory say the same, and no input was read twice."""
    subject = f"{manifest.source} {manifest.split}"
    listed = {shard.file for shard in manifest.shards}
    there = {path.name for path in split.glob("*.arrayrecord")}
    findings = []
    if missing := sorted(listed - there):
        findings.append(Finding(subject, f"shards are missing: {some(missing)}", "problem"))
    if strays := sorted(there - listed):
        findings.append(
            Finding(subject, f"shards that the manifest does not list, so that nobody reads them: "
                    f"{some(strays)}", "problem")
        )  # fmt: skip
    counts = collections.Counter(name for shard in manifest.shards for name in shard.inputs)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        findings.append(
            Finding(subject, f"inputs were read into more than one shard: {some(twice)}", "problem")
        )
    return findings


def unfinished(directory: pathlib.Path) -> list[Finding]:
    """Records of units tell of shards that no manifest lists, or are not all there."""
    findings = []
    for units in sorted({path.parent for path in directory.rglob("units/*.json")}):
        source = units.parent
        numbers = sorted(int(path.stem) for path in units.glob("*.json") if path.stem.isdecimal())
        if holes := sorted(set(range(numbers[-1] + 1 if numbers else 0)) - set(numbers)):
            findings.append(
                Finding(source.name, f"units {some(map(str, holes))} have no record: their inputs "
                        "are not in the corpus", "problem")
            )  # fmt: skip
        places = {(place, entry["file"]) for number in numbers for place, entry in
                  _shards_of(units / f"{number:05d}.json").items()}  # fmt: skip
        listed = set()
        for path in source.rglob(MANIFEST_FILE):
            try:
                place = path.parent.relative_to(source).as_posix()
                listed |= {(place, shard.file) for shard in read_manifest(path.parent).shards}
            except (ValueError, DamagedDataError):
                continue  # told already
        if lost := sorted(places - listed):
            names = some("/".join(part) for part in lost)
            findings.append(
                Finding(source.name, f"shards were written but no manifest lists them: {names}; "
                        "prepare to the end", "problem")
            )  # fmt: skip
    return findings


def _shards_of(record: pathlib.Path) -> dict:
    try:
        return dict(json.loads(record.read_bytes())["shards"])
    except (ValueError, KeyError, TypeError):
        return {}


def gaps(chunks: Sequence[pathlib.Path]) -> list[Finding]:
    """Numbers that a sequence of chunks lacks."""
    numbers = collections.defaultdict(set)
    for path in chunks:
        if numbered := CHUNK.fullmatch(str(path)):
            numbers[numbered[1]].add(int(numbered[2]))
    missing = [
        f"{pathlib.Path(prefix).name}_{number:010d}.bin"
        for prefix, found in numbers.items()
        for number in sorted(set(range(max(found))) - found)
    ]
    if not missing:
        return []
    return [Finding("chunks", f"{len(missing)} are missing: {some(missing)}", "problem")]


def some(names) -> str:
    """The first of many names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - NAMES:,} more" if len(names) > NAMES else ""
    return ", ".join(itertools.islice(names, NAMES)) + more
