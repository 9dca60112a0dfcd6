"""Memory of the device that torch needs at its fullest moment; ours is the compiler's to tell."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def with_torch_peak_bytes(run: Callable[[], Result]) -> tuple[Result, int | None]:
    """What `run` returns, and what torch's allocator held meanwhile; None where it is on a CPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return run(), None
    torch.cuda.reset_peak_memory_stats()
    result = run()
    return result, torch.cuda.max_memory_allocated()
