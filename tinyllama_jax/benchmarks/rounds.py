"""Interleaved timing: every contender runs in every round, so that a slow minute hits all alike."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call of one contender, one entry per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    calls: int,
    wait: Callable[[Any], object] = lambda result: None,
) -> dict[str, Timing]:
    """Times `calls` calls of each contender in turn, `rounds` times over.

    Args:
      contenders: functions, warmed up by the caller.
      rounds: how often all take their turn.
      calls: calls in one turn, one behind the other.
      wait: returns when the work behind a result is done; once a turn, so that launching and
        waiting do not hide how long a short kernel takes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            began = time.perf_counter()
            for _ in range(calls):
                result = call()
            wait(result)
            seconds[name].append((time.perf_counter() - began) / calls)
            del result
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def wait_for(result: Any) -> Any:
    """The result, when the device has made it; jax's or torch's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    return jax.block_until_ready(result)


def attempt(name: str, run: Callable[[], Result], absent: dict[str, str]) -> Result | None:
    """What `run` returns; None, and the reason in `absent`, where it cannot run here.

    A contender that needs more memory than there is, or that does not compile, is to cost no other
    its figures.
    """
    try:
        return run()
    except Exception as error:  # each library has its own for a shape that it does not cover
        reason = str(error).strip().splitlines() or [""]
        absent[name] = f"{type(error).__name__}: {reason[0][:200]}"
    # Out of the handler, which holds on to what the contender had made.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def ratio(ours: Timing, other: Timing) -> float:
    """How many times faster ours is: the median over rounds of the ratio within a round."""
    return statistics.median(b / a for a, b in zip(ours.seconds, other.seconds, strict=True))
