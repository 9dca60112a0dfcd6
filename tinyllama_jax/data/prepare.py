"""Raw text to prepared pages: a process per core, resumable, the same bytes every time.

The work is cut into units (`units`), which depend on the inputs alone. Who does which, and where,
changes no byte: processes of this machine (`workers`), machines that share a disk and take a part
each (`prepare_part`, then `finish_sources`), or an engine (`beam`).
"""

from __future__ import annotations

import pathlib
import shutil
import time
from collections.abc import Callable, Sequence

from tinyllama_jax.config import DataConfig, SourceConfig
from tinyllama_jax.data.finish import verify_units, write_manifests
from tinyllama_jax.data.pages import page_dtype
from tinyllama_jax.data.prepared import Plan, is_prepared, plan_of, streams_of
from tinyllama_jax.data.sources import left_out
from tinyllama_jax.data.units import (
    Advance,
    Unit,
    make_directory,
    read_record,
    remove_abandoned_work,
    text_bytes,
)
from tinyllama_jax.data.workers import available_cores, run_units
from tinyllama_jax.durable import write_durably
from tinyllama_jax.progress import Progress
from tinyllama_jax.text.tokenizer import Tokenizer

_BYTES_PER_TOKEN = 3.0  # of text, rather too few: for the disk that is asked for

# Writes units: (units, tokenizer, how many at a time, told of progress).
Runner = Callable[[Sequence[Unit], Tokenizer, int, Advance], None]


def prepare_sources(
    data: DataConfig, *, workers: int = 0, max_bytes: int = 0, runner: Runner = run_units
) -> dict[str, pathlib.Path]:
    """Tokenizes all sources into `data.prepared`, as far as that is not done yet.

    Prints its progress and, in the end, what was skipped or repaired.

    Args:
      data: sources, tokenizer, boundary rule and where to write.
      workers: processes; 0: one per core that this process may use. The bytes do not depend on it.
      max_bytes: raw text that is still to be read at most, for a caller that has other work to do;
        0: any amount.
      runner: who writes the units.

    Returns:
      The directory of each stream by its name; `train/` and `validation/` in it have a manifest. A
      source is a stream, or as many as it has subsets.

    Raises:
      ValueError: a source is missing, empty or malformed, there is none at all, the tokenizer
        cannot mark documents, or there is more to do than `max_bytes`.
      OSError: the disk is full or failed. What was finished stays, and the next call continues.
      RuntimeError: a worker died.
    """
    tokenizer, plans = _plans(data)
    unfinished = _begun(plans)
    units = [unit for plan in unfinished for unit in plan.units]
    waiting = [unit for unit in units if read_record(unit) is None]
    waiting_bytes = sum(unit.bytes for unit in waiting)
    if max_bytes and waiting_bytes > max_bytes:
        raise ValueError(
            f"{waiting_bytes / 1e9:.3g} GB of raw text are not prepared yet, which would hold this "
            f"machine's accelerators up for long; run python -m tinyllama_jax.prepare with the "
            f"same --config first, on a machine with many cores"
        )
    _run(waiting, units, tokenizer, workers or available_cores(), runner)
    for plan in unfinished:
        write_manifests(plan, data, tokenizer)
    return _all_streams(plans)


def prepare_part(data: DataConfig, part: int, parts: int, *, workers: int = 0) -> int:
    """Does every `parts`-th unit, from number `part` (of 0 to parts - 1) on; writes no manifest.

    Any number of machines that share the disk may do so at once, with other parts; when all have
    ended, `finish_sources` makes the whole of it. Raises as `prepare_sources`.

    Returns:
      How many units it has written.
    """
    if not 0 <= part < parts:
        raise ValueError(
            f"there is no part {part} of {parts}: parts are numbered from 0 to one less than how "
            f"many they are"
        )
    tokenizer, plans = _plans(data)
    unfinished = _begun(plans)
    # Numbered over all, so that it does not matter which are finished when a part begins.
    own = [unit for plan in plans for unit in plan.units][part::parts]
    begun = {str(plan.directory) for plan in unfinished}
    own = [unit for unit in own if unit.directory in begun]
    waiting = [unit for unit in own if read_record(unit) is None]
    _run(waiting, own, tokenizer, workers or available_cores(), run_units)
    return len(waiting)


def finish_sources(data: DataConfig, *, workers: int = 0) -> dict[str, pathlib.Path]:
    """Makes the whole of what parts have written, once every shard is seen to be what was written.

    Returns:
      As `prepare_sources`.

    Raises:
      ValueError: units are missing or damaged, with what to do.
    """
    tokenizer, plans = _plans(data)
    for plan in plans:
        verify_units(plan, workers or available_cores())
    for plan in _begun(plans):
        write_manifests(plan, data, tokenizer)
    for plan in plans:
        remove_abandoned_work(plan.directory, of_all_hosts=True)
    return _all_streams(plans)


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
    plan = plan_of(source, data, tokenizer)
    size = sum(entry.bytes for entry in plan.inputs)
    text = (
        f"{len(plan.inputs):,} inputs, {size / 1e6:,.1f} MB" if plan.inputs else "raw text absent"
    )
    return plan.directory, is_prepared(source, plan.directory), text


def _plans(data: DataConfig) -> tuple[Tokenizer, list[Plan]]:
    if not data.sources:
        raise ValueError(
            "data.sources is empty, so there is no text to learn from; add a source to the config "
            'file: config.data.sources.NAME = source(path="FILES")'
        )
    tokenizer = Tokenizer(data.tokenizer)
    _require_boundary_ids(data.boundary, tokenizer)
    plans = [plan_of(source, data, tokenizer) for source in data.sources]
    for plan in plans:
        if not plan.inputs:
            print(
                f"{plan.source.name}: its raw text is not here; taking {plan.directory}", flush=True
            )
    return tokenizer, plans


def _begun(plans: Sequence[Plan]) -> list[Plan]:
    """Those that are not prepared yet, each with a directory to be prepared in."""
    unfinished = [plan for plan in plans if not is_prepared(plan.source, plan.directory)]
    for plan in unfinished:
        if others := left_out(plan.source, plan.inputs):
            print(f"{plan.source.name}: files left out, by ending: {others}", flush=True)
        make_directory(plan.directory)
        write_durably(plan.directory / "source.json", plan.description.encode())
        remove_abandoned_work(plan.directory)
    return unfinished


def _all_streams(plans: Sequence[Plan]) -> dict[str, pathlib.Path]:
    return {
        name: directory
        for plan in plans
        for name, directory in streams_of(plan.source, plan.directory).items()
    }


def _require_boundary_ids(boundary: str, tokenizer: Tokenizer) -> None:
    for name, token_id in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if name in boundary and token_id < 0:
            raise ValueError(
                f'data.boundary = "{boundary}", but the tokenizer has no {name.upper()} piece; '
                f"set data.boundary to the one that it has, or use another tokenizer"
            )


def _run(
    waiting: Sequence[Unit],
    units: Sequence[Unit],
    tokenizer: Tokenizer,
    workers: int,
    runner: Runner,
) -> None:
    """Writes those of the units that wait."""
    if not waiting:
        return
    total = sum(unit.bytes for unit in units)
    done = total - sum(unit.bytes for unit in waiting)
    names = ", ".join(dict.fromkeys(unit.source.name for unit in units))
    print(f"preparing {names}: {total / 1e6:.1f} MB of raw text, {workers} processes", flush=True)
    _tell_disk(waiting, tokenizer)
    tokens = 0
    started = time.monotonic()
    try:
        with Progress(total, "B", initial=done, scale=True) as progress:

            def advance(count_bytes: int, count_tokens: int) -> None:
                nonlocal tokens
                tokens += count_tokens
                rate = tokens / (time.monotonic() - started)
                note = f"{tokens / 1e6:.1f} Mtokens, {rate / 1e6:.2f} Mtokens/s"
                progress.advance(count_bytes, note)

            runner(waiting, tokenizer, workers, advance)
    finally:
        for directory in {unit.directory for unit in units}:  # of workers that were stopped
            remove_abandoned_work(pathlib.Path(directory))
    seconds = time.monotonic() - started
    print(f"{tokens / 1e6:.2f} Mtokens in {seconds:.1f} s, {tokens / 1e6 / seconds:.2f} Mtokens/s")


def _tell_disk(waiting: Sequence[Unit], tokenizer: Tokenizer) -> None:
    text = sum(text_bytes(entry) for unit in waiting for entry in unit.inputs)
    needed = text / _BYTES_PER_TOKEN * page_dtype(tokenizer.vocab_size).itemsize
    free = shutil.disk_usage(waiting[0].directory).free
    print(f"it will take about {needed / 1e9:.2g} GB of disk; {free / 1e9:,.1f} GB are free")
    if needed > free:
        print(
            f"warning: that may not fit in {waiting[0].directory}: set data.prepared to a larger "
            f"disk, or make room; when it is full, what is finished stays, and the next start "
            f"goes on"
        )
