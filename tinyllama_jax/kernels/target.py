"""What is compiled for: the devices at hand or, where a plan is made, GPUs that are not there."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
      platform: as jax names it: "cpu", "gpu".
      compute_capability: NVIDIA's, as in (9, 0); (0, 0) for other devices.
    """

    platform: str
    compute_capability: tuple[int, int] = (0, 0)


_STATED: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def current() -> Target:
    """The target of what is traced now."""
    stated = _STATED.get()
    if stated is not None:
        return stated
    platform = jax.default_backend()
    capability = getattr(jax.local_devices()[0], "compute_capability", "") or "0.0"
    major, _, minor = str(capability).partition(".")
    return Target(platform, (int(major), int(minor or 0)))


@contextlib.contextmanager
def compile_for(target: Target) -> Iterator[None]:
    """Within it, what is traced is meant for `target`; trace afresh, since jit remembers traces."""
    token = _STATED.set(target)
    try:
        yield
    finally:
        _STATED.reset(token)
