"""What an audit sees before it reads: which files are there, and what is said of them."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import pathlib
import re
from collections.abc import Sequence

from tinyllama_jax.data.pages import MANIFEST_FILE, DamagedDataError, Manifest, read_manifest
from tinyllama_jax.data.prepared import SUBSETS, read_subsets
from tinyllama_jax.findings import Finding

CHUNK = re.compile(r"(.*)_(\d+)\.bin")
_MOST_NUMBERS = 1_000_000
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


def corpus_of(split: pathlib.Path) -> pathlib.Path:
    """The prepared directory of a source that a split belongs to; itself, where there is none."""
    for directory in (split.parent, split.parent.parent):
        if (directory / "source.json").is_file():
            return directory
    return split.parent


def unfinished(corpus: pathlib.Path) -> list[Finding]:
    """What records of units, manifests and the list of subsets say of each other."""
    records = {int(path.stem): _record(path) for path in sorted(corpus.glob("units/*.json"))}
    findings = []

    def wrong(text: str) -> None:
        findings.append(Finding(corpus.name, text, "problem"))

    if holes := sorted(set(range(max(records, default=-1) + 1)) - records.keys()):
        wrong(f"units {some(map(str, holes))} have no record: prepare to the end, or again")
    read = sum(len(record.get("inputs", ())) for record in records.values())
    there = _source(corpus).get("inputs")
    if records and there is not None and read != there:
        wrong(f"records tell of {read:,} inputs of {there:,}: units are missing, or there twice")
    written = {
        (place, entry["file"])
        for record in records.values()
        for place, entry in record.get("shards", {}).items()
    }
    listed = set()
    for path in corpus.rglob(MANIFEST_FILE):
        place = path.parent.relative_to(corpus).as_posix()
        with contextlib.suppress(ValueError, DamagedDataError):  # told already
            listed |= {(place, shard.file) for shard in read_manifest(path.parent).shards}
    for shards, text in (
        (written - listed, "shards were written but no manifest lists them"),
        (
            listed - written if records else set(),
            "manifests list shards that no unit has a record of",
        ),
    ):
        if shards:
            wrong(f"{text}: {some(sorted('/'.join(part) for part in shards))}; prepare to the end")
    if _source(corpus).get("subset_key"):
        subsets = {path.parent.parent.name for path in corpus.glob(f"*/train/{MANIFEST_FILE}")}
        try:
            told = set(read_subsets(corpus))
        except (OSError, ValueError, KeyError, TypeError) as error:
            wrong(f"{SUBSETS} is missing or damaged ({error!r}): prepare to the end")
        else:
            if told != subsets:
                wrong(
                    f"{SUBSETS} lists {some(sorted(told))}, but there are {some(sorted(subsets))}"
                )
    if left := sorted(path.name for path in corpus.glob("units/*.work")):
        findings.append(
            Finding(corpus.name, f"work that was begun and not ended lies in units/: {some(left)}; "
                    "remove it when nobody prepares", "warning")
        )  # fmt: skip
    return findings


def _record(path: pathlib.Path) -> dict:
    try:
        tree = json.loads(path.read_bytes())
        return tree if isinstance(tree, dict) else {}
    except ValueError:
        return {}


def _source(corpus: pathlib.Path) -> dict:
    try:
        return dict(json.loads((corpus / "source.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def gaps(chunks: Sequence[pathlib.Path]) -> list[Finding]:
    """Numbers that a sequence of chunks lacks."""
    numbers = collections.defaultdict(set)
    for path in chunks:
        if numbered := CHUNK.fullmatch(str(path)):
            numbers[numbered[1]].add(int(numbered[2]))
    missing = []
    for prefix, found in numbers.items():
        if (
            max(found) >= 2 * len(found) + _MOST_NUMBERS
        ):  # a date, or something else that counts not
            continue
        name = pathlib.Path(prefix).name
        lost = sorted(set(range(max(found))) - found)
        missing += [f"{name}_{number:010d}.bin" for number in lost]
    if not missing:
        return []
    return [Finding("chunks", f"{len(missing)} are missing: {some(missing)}", "problem")]


def some(names) -> str:
    """The first of many names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - NAMES:,} more" if len(names) > NAMES else ""
    return ", ".join(itertools.islice(names, NAMES)) + more
