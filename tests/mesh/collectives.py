"""What a compiled program sends between devices, and whether it does so in a loop."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SHAPE = re.compile(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]*)\]")


class Collective(NamedTuple):
    kind: str
    elements: int  # of its largest result
    in_loop: bool


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program, from `compiled.as_text()`."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header:
            name = header[1]
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    called = {
        name: set(re.findall(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)", "\n".join(lines)))
        for name, lines in bodies.items()
    }
    loops = set(re.findall(r"body=%?([\w.\-]+)", text))
    while more := {inner for name in loops for inner in called.get(name, ())} - loops:
        loops |= more
    found = []
    for name, lines in bodies.items():
        for line in lines:
            made = re.search(rf"= (.*?) ({'|'.join(_KINDS)})(?:-start)?\(", line)
            if made:
                sizes = [
                    math.prod(int(n) for n in dims.split(",") if n)
                    for dims in _SHAPE.findall(made[1])
                ]
                found.append(Collective(made[2], max(sizes, default=0), name in loops))
    return found
