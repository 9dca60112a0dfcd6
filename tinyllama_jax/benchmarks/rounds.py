"""Interleaved timing: every contender runs in every round, so that a slow minute hits all alike."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call of one contender, one entry per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int, calls: int
) -> dict[str, Timing]:
    """Times `calls` calls of each contender in turn, `rounds` times over.

    Args:
      contenders: functions that return only when their work is done, warmed up by the caller.
      rounds: how often all take their turn.
      calls: calls in one turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            began = time.perf_counter()
            for _ in range(calls):
                call()
            seconds[name].append((time.perf_counter() - began) / calls)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(ours: Timing, other: Timing) -> float:
    """How many times faster ours is: the median over rounds of the ratio within a round."""
    return statistics.median(b / a for a, b in zip(ours.seconds, other.seconds, strict=True))
