"""What is compiled for: the devices at hand or, where a plan is made, GPUs that are not there."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
      platform: as jax names it: "cpu", "gpu".
      compute_capability: NVIDIA's, as in (9, 0); (0, 0) for other devices.
      device_kind: jax's name of a GPU that is not there; since jax 0.11 kernels need it.
    """

    platform: str
    compute_capability: tuple[int, int] = (0, 0)
    device_kind: str = ""


_STATED: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def current() -> Target:
    """The target of what is traced now."""
    stated = _STATED.get()
    if stated is not None:
        return stated
    platform = jax.default_backend()
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    major, _, minor = capability.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):  # as AMD's "gfx90a"
        return Target(platform)
    return Target(platform, (int(major), int(minor)))


@contextlib.contextmanager
def compile_for(target: Target) -> Iterator[None]:
    """Within it, what is traced is meant for `target`; trace afresh, since jit remembers traces."""
    token = _STATED.set(target)
    try:
        with _abstract_device(target):
            yield
    finally:
        _STATED.reset(token)


def _abstract_device(target: Target) -> contextlib.AbstractContextManager[object]:
    """Tells jax what Pallas would ask a GPU for; before 0.11 it asked for nothing."""
    fields = {field.name for field in dataclasses.fields(AbstractDevice)}
    if not target.device_kind or "platform" not in fields:
        return contextlib.nullcontext()
    known: dict[str, Any] = {"platform": target.platform}
    device = AbstractDevice(device_kind=target.device_kind, num_cores=None, **known)
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
