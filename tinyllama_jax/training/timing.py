"""Where the time of a run goes: steps, waiting for data, and all that is not training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax

from tinyllama_jax.config import Config
from tinyllama_jax.parallel.devices import peak_flops
from tinyllama_jax.training import flops


class StepTimer:
    """Averages over the steps between two reads; time inside `paused()` does not count."""

    def __init__(self, config: Config):
        device = jax.local_devices()[0]
        self._device = device
        self._flops_per_token: dict[str, float] = {}
        peak = peak_flops(device.device_kind)
        if peak:
            peak *= jax.device_count()
            model, seq_len = config.model, config.data.seq_len
            self._flops_per_token = {
                "mfu_causal": flops.causal_flops_per_token(model, seq_len) / peak,
                "mfu_palm": flops.palm_flops_per_token(model, seq_len) / peak,
            }
        self._reset()

    def _reset(self) -> None:
        self._began, self._paused, self._data_wait = time.perf_counter(), 0.0, 0.0
        self._steps = self._tokens = 0
        self._stall: float | None = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluation, saving, compiling: not part of a step."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """The host holds no batch to hand on."""
        began = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - began

    def count_step(self, tokens: int) -> None:
        """A step of so many tokens has finished on the device."""
        self._steps += 1
        self._tokens += tokens

    def count_stall(self, seconds: float) -> None:
        """A save has held training up."""
        self._stall = (self._stall or 0.0) + seconds

    def read(self) -> dict[str, float]:
        """The averages since the last read, as metrics.jsonl names them; starts anew."""
        seconds = time.perf_counter() - self._began - self._paused
        step_seconds, tokens_per_second = seconds / self._steps, self._tokens / seconds
        result = {
            "tokens_per_second": tokens_per_second,
            "step_seconds": step_seconds,
            "data_wait_seconds": self._data_wait / self._steps,
            "time": time.time(),
        }
        result |= {name: f * tokens_per_second for name, f in self._flops_per_token.items()}
        if self._stall is not None:  # in the line after the save
            result["checkpoint_stall_seconds"] = self._stall
        memory = self._device.memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            result["peak_memory_bytes"] = memory["peak_bytes_in_use"]
        self._reset()
        return result
