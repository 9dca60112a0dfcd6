"""From the records of finished units to manifests, once all is there as it was written."""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Sequence

from tinyllama_jax.config import DataConfig, SourceConfig
from tinyllama_jax.config_text import chosen_subsets
from tinyllama_jax.data.pages import DamagedDataError, Manifest, verify_shard, write_manifest
from tinyllama_jax.data.prepared import Plan, write_subsets
from tinyllama_jax.data.sources import Tally
from tinyllama_jax.data.units import SPLITS, UnitRecord, discard, place_of, read_record
from tinyllama_jax.text.tokenizer import Tokenizer


def verify_units(plan: Plan, workers: int) -> None:
    """Checks that the units of a source read every input once, and wrote what is there.

    Counts and hashes of every shard are compared with the records; `workers` shards at a time.

    Raises:
      ValueError: units are missing, or shards are not what was written, all at once; those are
        forgotten, so that the next preparation writes them again.
    """
    records = [record for unit in plan.units if (record := read_record(unit)) is not None]
    if len(records) < len(plan.units):
        missing = [unit for unit in plan.units if read_record(unit) is None]
        raise ValueError(
            f"{plan.source.name}: {len(missing)} of {len(plan.units)} units are not prepared, the "
            f"first from {missing[0].inputs[0].name} on; start the parts again that did not end, "
            f"or prepare without --part, which does what is left"
        )
    # Each input once, and in order.
    read = [name for record in records for name, _ in record.inputs]
    assert read == [entry.name for entry in plan.inputs], plan.directory

    def damage(record: UnitRecord) -> list[str]:
        found = []
        for place, entry in record.shards.items():
            try:
                verify_shard(plan.directory / place / entry.file, entry)
            except DamagedDataError as error:
                found.append(str(error))
        return found

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:  # hashing lets go of the GIL
        damages = list(pool.map(damage, records))
    for unit, record, damaged in zip(plan.units, records, damages, strict=True):
        if damaged:
            discard(unit, record)
    if any(damages):
        raise ValueError(
            f"{plan.source.name}: {'; '.join(itertools.chain(*damages))}. Prepare again: those "
            f"{sum(map(bool, damages))} of {len(plan.units)} units are written anew"
        )


def write_manifests(plan: Plan, data: DataConfig, tokenizer: Tokenizer) -> None:
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
    if plan.source.subset_key:
        write_subsets(plan.directory, subsets)


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
