"""Values in Thrift's compact protocol, in which parquet tells of itself.

(https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md.) Strict where
readers differ: what one takes for a page's size, and another passes over, would hide the page.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

# Kinds of values.
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET = range(1, 11)
STRUCT = 12

# What is known of a struct: numbers of fields, and of what kind each is; [] around that of a list's
# elements.
Fields = Mapping[int, "Kind"]
Kind = int | Fields | list["int | Fields"]

# What comes of reading what is no such thing.
SENSELESS = (ArithmeticError, EOFError, LookupError, RecursionError, ValueError)
_INTEGERS = (I16, I32, I64)


class Compact:
    """Reads values, or passes over them, one after another."""

    def __init__(self, content: bytes | memoryview) -> None:
        self.content = content
        self.at = 0

    def fields(self) -> Iterator[tuple[int, int]]:
        """Number and kind of a struct's fields; between two of them the value must be read."""
        number = 0
        while head := self.byte():
            step, kind = divmod(head, 16)
            number = number + step if step else self.signed()
            if not 0 <= number < 1 << 15:
                raise ValueError(f"no field has number {number}")  # readers may cut it to 16 bits
            yield number, kind

    def elements(self, known: Kind | None = None) -> Iterator[int]:
        """Their kind, as often as a list has some; between two of them one must be read.

        Others read what they know as what it should be, whatever the list says that it has.
        """
        length, kind = divmod(self.byte(), 16)
        length = self.unsigned() if length == 15 else length
        if length and isinstance(known, list):
            (of,) = known
            belongs = STRUCT if isinstance(of, Mapping) else of
            if kind != belongs and not (kind in _INTEGERS and belongs in _INTEGERS):
                raise ValueError(f"a list of kind {kind} where one of {belongs} belongs")
        return itertools.repeat(kind, length)

    def elements_of(self, wanted: int, known: Fields) -> Iterator[int]:
        """The elements of a struct's field, likewise."""
        found = False
        for number, kind in self.fields():
            if number != wanted:
                self.skip(kind, known.get(number))
                continue
            if found:
                raise ValueError(f"field {number} is there twice")
            if kind != LIST:
                raise ValueError(f"a value of kind {kind} where a list belongs")
            found = True
            yield from self.elements(known[number])

    def struct(self, known: Fields) -> dict[int, Any]:
        """By their numbers, the fields that are known, but for lists; in structs likewise."""
        found = dict[int, Any]()
        for number, kind in self.fields():
            if number in found:
                raise ValueError(f"field {number} is there twice")
            of = known.get(number)
            if of is None or isinstance(of, list):
                self.skip(kind, of)
            else:
                found[number] = self.value(kind, of)
        return found

    def value(self, kind: int, wanted: Fields | int) -> Any:
        """Only of the kind that is wanted: others would pass over it."""
        if kind == STRUCT and isinstance(wanted, Mapping):
            return self.struct(wanted)
        if wanted == TRUE and kind in (TRUE, FALSE):
            return kind == TRUE
        if kind != wanted:
            raise ValueError(f"a value of kind {kind} where {wanted} belongs")
        value = self.signed()
        if kind == I32 and not -1 << 31 <= value < 1 << 31:
            raise ValueError(f"{value} where 32 bits belong")
        return value

    def skip(self, kind: int, known: Kind | None = None) -> None:
        if kind in _INTEGERS:
            self.unsigned()
        elif kind == BINARY:
            self.skip_bytes(self.unsigned())
        elif kind in (LIST, SET):
            element = known[0] if isinstance(known, list) else None
            for of in self.elements(known):
                # A truth value has its own byte here, and is part of a field's head elsewhere.
                self.skip(BYTE if of in (TRUE, FALSE) else of, element)
        elif kind == STRUCT:
            fields = known if isinstance(known, Mapping) else {}
            for number, of in self.fields():
                self.skip(of, fields.get(number))
        elif kind == BYTE:
            self.skip_bytes(1)
        elif kind == DOUBLE:
            self.skip_bytes(8)
        elif kind not in (TRUE, FALSE):
            raise ValueError(f"parquet has no values of kind {kind}")

    def skip_bytes(self, length: int) -> None:
        self.at += length
        if self.at > len(self.content):
            raise EOFError

    def signed(self) -> int:
        value = self.unsigned()
        return (value >> 1) ^ -(value & 1)

    def unsigned(self) -> int:
        value = 0
        for shift in range(0, 64, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number of more than 64 bits")

    def byte(self) -> int:
        self.at += 1
        return self.content[self.at - 1]
