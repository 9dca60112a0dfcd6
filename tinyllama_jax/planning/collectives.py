"""What a compiled program sends between devices: kinds, bytes, and how often."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
_BITS = {"pred": 8}


class Collective(NamedTuple):
    """One instruction.

    Attributes:
      kind: as XLA names it.
      elements: of its largest operand or result.
      bytes: of all operands or all results, whichever is more: what a device holds of the whole
        before or after it.
      in_loop: it stands in the body of a loop.
      times: how often it runs; 1 where a loop does not tell.
      group: numbers of the devices of the first group that take part together; (): all.
    """

    kind: str
    elements: int
    bytes: int
    in_loop: bool
    times: int = 1
    group: tuple[int, ...] = ()


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program, from `compiled.as_text()`."""
    bodies = _computations(text)
    called = {
        name: set(re.findall(r"(?:condition|to_apply|calls)=%?([\w.\-]+)", "\n".join(lines)))
        for name, lines in bodies.items()
    }
    times = _times(bodies, called)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            made = re.search(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\((.*)", line)
            if made:
                elements, size = _elements_and_bytes(made)
                runs = times.get(name)
                group = _group(line)
                if made[2] == "reduce-scatter" and not made[3] and not _sizes(_operands(made)):
                    size *= len(group) or 1  # operands are written without their shapes
                found.append(
                    Collective(made[2], elements, size, runs is not None, runs or 1, group)
                )
    return found


def _computations(text: str) -> dict[str, list[str]]:
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header:
            name = header[1]
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return bodies


def _times(bodies: dict[str, list[str]], called: dict[str, set[str]]) -> dict[str, int]:
    """How often each computation that stands in a loop runs in one step."""
    times: dict[str, int] = {}

    def visit(name: str, count: int, in_loop: bool) -> None:
        if in_loop:
            times[name] = times.get(name, 0) + count
        for line in bodies.get(name, ()):
            loop = re.search(r"body=%?([\w.\-]+)", line)
            if loop:
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                visit(loop[1], count * (int(trips[1]) if trips else 1), True)
        for inner in called.get(name, ()):
            visit(inner, count, in_loop)

    entered = set().union(*called.values()) if called else set()
    for lines in bodies.values():
        entered.update(re.findall(r"body=%?([\w.\-]+)", "\n".join(lines)))
    for name in bodies.keys() - entered:
        visit(name, 1, False)
    return times


def _sizes(text: str) -> list[tuple[int, int]]:
    sizes = []
    for kind, dims in _SHAPE.findall(text):
        elements = math.prod(int(n) for n in dims.split(",") if n)
        bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind))
        sizes.append((elements, elements * bits // 8))
    return sizes


def _elements_and_bytes(made: re.Match[str]) -> tuple[int, int]:
    """Of the largest array, and of all operands or all results together."""
    results, operands = _sizes(made[1]), _sizes(_operands(made))
    sides = [operands, results]
    # An asynchronous start gives operands and results; an all-reduce's only since jax 0.11, nested.
    if made[3] and (made[2] != "all-reduce" or made[1].startswith("((")):
        half = len(results) // 2
        sides = [operands, results[:half], results[half:]]
    elements = max((n for n, _ in results + operands), default=0)
    return elements, max(sum(size for _, size in side) for side in sides)


def _operands(made: re.Match[str]) -> str:
    return made[4].split("channel_id")[0]


def _group(line: str) -> tuple[int, ...]:
    """The first group of devices: {{0,1},{2,3}}, [2,8]<=[16], or axes of a mesh."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return tuple(sorted(int(n) for n in listed[1].split(",") if n))
    tiled = re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_TILES}", line)
    if tiled:
        first = _tiles(tiled[3], tiled[4]).reshape(int(tiled[1]), int(tiled[2]))[0]
        return tuple(sorted(first.tolist()))
    axes = re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_TILES}\))? \{{([^}}]*)\}}", line
    )
    if axes:
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes[1])}
        ids = _tiles(axes[2] or str(math.prod(sizes.values())), axes[3]).ravel()
        named = re.findall(r"'([^']+)'", axes[4])
        # The first device, and those that differ from it along the named axes only.
        at = tuple(slice(None) if axis in named else 0 for axis in sizes)
        return tuple(sorted(ids.reshape(list(sizes.values()))[at].ravel().tolist()))
    return ()


_TILES = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _tiles(dims: str, order: str | None) -> np.ndarray:
    """Device numbers as `[2,8]T(1,0)` writes them: counted up in that shape, then transposed."""
    shape = [int(n) for n in dims.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids
