"""What happened to a run, read from its directory: starts, time lost, skipped steps, stalls."""

from __future__ import annotations

import itertools
import json
import statistics
from datetime import datetime
from pathlib import Path
from typing import Any

from tinyllama_jax.findings import Finding
from tinyllama_jax.runs import integrity, steps
from tinyllama_jax.runs.directory import ENVIRONMENT, read_config
from tinyllama_jax.runs.lock import holder_of
from tinyllama_jax.runs.metrics import read_discarded, read_metrics
from tinyllama_jax.runs.restore import CHECKPOINTS
from tinyllama_jax.training.watchdog import STACKS

# A stretch slower than this share of the median speed is worth a word.
_SLOW = 0.8


def examine_run(run_dir: Path) -> list[Finding]:
    """Looks at a run directory, while it is written to or afterwards.

    Raises:
      ValueError: it is none, or has logged nothing yet.
    """
    config = read_config(run_dir)
    kept, discarded = read_metrics(run_dir), read_discarded(run_dir)
    records, given_up = ([r for r in lines if "loss" in r] for lines in (kept, discarded))
    failed_saves = [record for record in discarded + kept if "save_failed" in record]
    failed_saves.sort(key=lambda record: record["time"])
    if not records:
        raise ValueError(f"{run_dir} has logged no training step yet")
    last = records[-1]["step"]
    writer = holder_of(run_dir)
    done = last >= config.total_steps
    state = "finished" if done else "running" if writer else "stopped"
    share = last / config.total_steps
    findings = [
        Finding("run", f"{state}; step {last:,} of {config.total_steps:,} ({share:.1%}), loss "
                f"{records[-1]['loss']:.4f}" + (f"; {writer} writes to it" if writer else ""))
    ]  # fmt: skip
    every = config.logging.every_steps
    findings += [_starts(run_dir, given_up, every), _goodput(run_dir, records, given_up, every)]
    findings += [_speed(records, every), _data(records), _saves(run_dir, records, failed_saves)]
    findings += [_skipped(records, config), _checkpoints(run_dir, last)]
    if (run_dir / STACKS).exists():
        findings.append(
            Finding("watchdog", f"nothing moved for watchdog.seconds; {run_dir / STACKS} shows "
                    "what each thread was doing", "warning")
        )  # fmt: skip
    return findings


def _starts(run_dir: Path, given_up: list[dict[str, Any]], every: int) -> Finding:
    starts = _started(run_dir)
    lost = sum(_gaps(given_up, every))
    text = f"{len(starts)}"
    if len(starts) > 1:
        text += f", the last on {starts[-1]:%Y-%m-%d %H:%M:%S}"
    return Finding("starts", text + (f"; {lost:,} steps were done again" if lost else ""))


def _goodput(
    run_dir: Path, records: list[dict[str, Any]], given_up: list[dict[str, Any]], every: int
) -> Finding:
    """What share of the time since the first start went into steps that count."""
    starts = _started(run_dir)
    timed = [record for record in records if "time" in record]
    if not starts or not timed:
        return Finding("time", "not known: the run does not tell when it was started")
    total = timed[-1]["time"] - starts[0].timestamp()
    counted, again = _seconds(records, every), _seconds(given_up, every)
    saves = sum(record.get("checkpoint_stall_seconds", 0.0) for record in records)
    rest = max(0.0, total - counted - again - saves)
    goodput = counted / total if total > 0 else 0.0
    return Finding(
        "time", f"{_clock(total)} since the first start: {_clock(counted)} in steps that count "
        f"({goodput:.1%}), {_clock(again)} in steps done again, {_clock(saves)} held up by saves, "
        f"{_clock(rest)} in starting, compiling, evaluating and standing still",
        "ok" if goodput > 0.5 or total < 3600 else "warning",
    )  # fmt: skip


def _speed(records: list[dict[str, Any]], every: int) -> Finding:
    speeds = [record["tokens_per_second"] for record in records]
    usual = statistics.median(speeds)
    slow = [record["step"] for record in records if record["tokens_per_second"] < _SLOW * usual]
    text = f"{usual:,.0f} tokens/s in the median"
    if not slow:
        return Finding("speed", text)
    ranges = _ranges(slow, every)
    longest = sorted(ranges, key=lambda r: r[0] - r[1])[:3]
    shown = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in longest)
    return Finding(
        "speed", f"{text}; slower than {_SLOW:.0%} of it at {len(slow)} of {len(records)} logged "
        f"steps, the longest stretches at {shown}",
        "warning" if len(slow) > len(records) / 20 else "ok",
    )  # fmt: skip


def _data(records: list[dict[str, Any]]) -> Finding:
    share = statistics.median(r["data_wait_seconds"] / r["step_seconds"] for r in records)
    text = f"a step waits {share:.1%} of its time for data"
    if share > 0.05:
        return Finding("data", f"{text}: the disk or the cores are too slow", "warning")
    return Finding("data", text)


def _saves(run_dir: Path, records: list[dict[str, Any]], failed: list[dict[str, Any]]) -> Finding:
    stalls = [r["checkpoint_stall_seconds"] for r in records if "checkpoint_stall_seconds" in r]
    text = "none that a later step was logged after"
    if stalls:
        text = (
            f"{len(stalls)}, which held training up for {statistics.median(stalls):.2f} s in the "
            f"median and {max(stalls):.2f} s at most"
        )
    if not failed:
        return Finding("saves", text)
    last = failed[-1]
    text += f"; {len(failed)} failed, the last at step {last['step']} ({last['save_failed']})"
    directory = Path(run_dir).resolve() / CHECKPOINTS
    seals = [directory / str(step) / integrity.SEAL for step in steps.sealed_steps(directory)]
    if any(seal.stat().st_mtime > last["time"] for seal in seals):
        return Finding("saves", text, "warning")
    return Finding(
        "saves", f"{text}, and none has succeeded since: make room, or make it writable", "problem"
    )


def _skipped(records: list[dict[str, Any]], config) -> Finding:
    grew = [
        b["step"]
        for a, b in itertools.pairwise([{"skipped_steps": 0}, *records])
        if b.get("skipped_steps", 0) > a.get("skipped_steps", 0)
    ]
    left_out = f"; batches left out: {config.data.skip}" if config.data.skip else ""
    if not grew:
        return Finding("skipped", f"no step{left_out}")
    count = records[-1]["skipped_steps"]
    shown = ", ".join(map(str, grew[-6:]))
    return Finding(
        "skipped", f"{count} steps changed nothing, being out of the ordinary (last noticed at "
        f"{shown}){left_out}",
        "warning" if count > records[-1]["step"] / 100 else "ok",
    )  # fmt: skip


def _checkpoints(run_dir: Path, last: int) -> Finding:
    directory = Path(run_dir).resolve() / CHECKPOINTS
    damaged = []
    for path in reversed(steps.step_directories(directory)):
        try:
            integrity.verify_files(path, integrity.read_seal(path))
        except integrity.DamagedError as error:
            damaged.append(f"step {path.name}: {error}")
            continue
        text = f"step {path.name} is the newest that is whole"
        if damaged:
            return Finding("checkpoints", f"{text}; damaged are {'; '.join(damaged)}", "warning")
        return Finding("checkpoints", text)
    if damaged:
        return Finding("checkpoints", f"none is whole: {'; '.join(damaged)}", "problem")
    return Finding("checkpoints", f"none yet; a start begins anew, and does {last} steps again")


def _started(run_dir: Path) -> list[datetime]:
    try:
        entries = json.loads((Path(run_dir) / ENVIRONMENT).read_bytes())
        return [datetime.strptime(entry["started"], "%Y-%m-%dT%H:%M:%S%z") for entry in entries]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _seconds(records: list[dict[str, Any]], every: int) -> float:
    """Of the steps that logged lines stand for: each for those since the one before."""
    return sum(n * r["step_seconds"] for n, r in zip(_gaps(records, every), records, strict=True))


def _gaps(records: list[dict[str, Any]], every: int) -> list[int]:
    numbers = [record["step"] for record in records]
    apart = [b - a for a, b in itertools.pairwise([0, *numbers])]
    # Between lines of different starts, as the discarded ones have them, the usual distance.
    return [
        gap if 0 < gap <= every else min(every, n) for gap, n in zip(apart, numbers, strict=True)
    ]


def _ranges(numbers: list[int], every: int) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and number - ranges[-1][1] <= every:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{days} d {text}" if days else text
