"""Anything an agent has in its hands, as JSON: copied at once, since agents go on to change their lists.

Bounded in depth, items and characters, whatever is given: what goes beyond is cut, and the recording says so.
"""

import base64
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from datetime import date, datetime
from enum import Enum
from itertools import islice
from typing import TypeVar, cast

DEEPEST = 100  # levels; what lies deeper is kept as text. The site refuses JSON of some hundred levels.
MOST_NOTES = 20
LONGEST_INT = 2**63  # beyond, numbers are kept as text: JSON readers differ on them
DECIMAL_BITS = 10_000  # beyond, in hexadecimal: Python refuses thousands of digits, and needs quadratic time for them

_SURROGATES = re.compile("[\ud800-\udfff]")

Instead = TypeVar("Instead")
Notes = list[str]  # what had to be changed, for the recording to say so


@dataclass(frozen=True)
class Size:
    """How much of one value is kept."""

    items: int
    characters: int


WHOLE = Size(items=200_000, characters=24 * 1024 * 1024)  # of what is logged; the site takes 32 MiB a trajectory
PREVIEW = Size(items=10_000, characters=64 * 1024)  # of arguments and results that decorators see


def plain(value: object, notes: Notes, place: str = "", size: Size = WHOLE) -> object:
    """A deep copy of JSON's own types. What JSON cannot say, or is too much, is changed and noted, never refused."""
    return _Copying(notes, size).copy(value, place, 0)


def text(value: str, notes: Notes, place: str = "") -> str:
    """Lone surrogates are no text: UTF-8 cannot say them."""
    if value.isascii():
        return str(value)
    try:
        value.encode()
    except UnicodeEncodeError:
        return _noted(notes, place, "lone surrogates, replaced by U+FFFD", _SURROGATES.sub("\ufffd", value))
    return str(value)


class _Copying:
    """One copy: what may still be kept, and the containers that we are inside of."""

    def __init__(self, notes: Notes, size: Size) -> None:
        self._notes = notes
        self._items = size.items
        self._characters = size.characters
        self._inside: set[int] = set()

    def copy(self, value: object, place: str, depth: int) -> object:
        kind = type(value)
        if value is None or kind is bool:
            return value
        try:
            return self._copy(value, place, depth)
        except Exception as exc:  # of their code, not ours: it costs this one value
            return _noted(self._notes, place, f"a {_name(value)} that cannot be read ({type(exc).__name__})", None)

    def _copy(self, value: object, place: str, depth: int) -> object:
        if isinstance(value, Enum):
            return self.copy(value.value, place, depth + 1) if depth < DEEPEST else str(value)
        if isinstance(value, str):
            return self._text(str.__str__(value), place)
        if isinstance(value, int):
            return self._int(int(value), place)
        if isinstance(value, float):
            number = float(value)
            return number if math.isfinite(number) else self._note(place, f"{number}, recorded as unknown", None)
        if isinstance(value, bytes | bytearray | memoryview):
            return self._bytes(value, place)
        if isinstance(value, datetime | date):
            return value.isoformat()
        if depth >= DEEPEST:
            kept = self._text(_name(value), place)
            return self._note(place, f"nested deeper than {DEEPEST} levels, kept as the name of its type", kept)
        if id(value) in self._inside:
            return self._note(place, "inside itself, and cut there", None)
        self._inside.add(id(value))
        try:
            return self._container(value, place, depth)
        finally:
            self._inside.discard(id(value))

    def _container(self, value: object, place: str, depth: int) -> object:
        if isinstance(value, Mapping):
            return self._mapping(value, place, depth)
        if isinstance(value, list | tuple):
            return self._sequence(value, len(value), place, depth)
        if isinstance(value, set | frozenset):
            return self._sequence(_sorted(value), len(value), place, depth)
        if isinstance(value, type):
            return self._text(repr(value), place)
        for name in ("model_dump", "tolist"):  # pydantic; NumPy and torch
            convert: object = getattr(value, name, None)
            if callable(convert):
                size: object = getattr(value, "nbytes", 0)
                if isinstance(size, int) and size > self._characters:
                    return self._note(place, f"a {_name(value)} of {size} bytes, left out", None)
                return self.copy(convert(), place, depth + 1)
        if dataclasses.is_dataclass(value):
            fields: dict[object, object] = {}
            for field in dataclasses.fields(value):
                fields[field.name] = getattr(value, field.name, None)
            return self._mapping(fields, place, depth)
        if isinstance(value, Iterable) and isinstance(value, Sized):
            return self._sequence(value, len(value), place, depth)
        return self._text(str(value), place)

    def _mapping(self, value: Mapping[object, object], place: str, depth: int) -> dict[str, object]:
        copied: dict[str, object] = {}
        # Another thread may be writing: `list` takes a dictionary's items at one moment, a loop over it would fail.
        pairs: Iterable[tuple[object, object]] = list(value.items()) if isinstance(value, dict) else value.items()
        for key, one in islice(pairs, max(self._items, 0)):
            name = key if type(key) is str and key.isascii() else self._text(str(key), place)
            if name in copied:
                self._note(place, f"with two keys that read {name[:50]!r}; the last is kept", None)
            if type(one) is str and one.isascii() and len(one) <= self._characters:
                self._characters -= len(one)  # most of all values are texts like this
                copied[name] = one
            elif one is None:
                copied[name] = None
            else:
                copied[name] = self.copy(one, f"{place}/{name[:50]}", depth + 1)
            self._items -= 1
            self._characters -= len(name)
        self._missed(len(value) - len(copied), place)
        return copied

    def _sequence(self, value: Iterable[object], length: int, place: str, depth: int) -> list[object]:
        if isinstance(value, list | tuple) and length // 8 <= self._items and _numbers(value):
            self._items -= length // 8
            return list(value)  # token ids, log-probabilities: a hundred thousand at once
        copied: list[object] = []
        for at, one in enumerate(value):
            if self._items <= 0:
                break
            self._items -= 1
            copied.append(self.copy(one, f"{place}/{at}", depth + 1))
        self._missed(length - len(copied), place)
        return copied

    def _missed(self, n: int, place: str) -> None:
        if n > 0 and self._items <= 0:
            self._note(place, f"too much to record: its last {n} items are left out", None)

    def _text(self, value: str, place: str) -> str:
        if len(value) > max(self._characters, 0):
            kept = value[: max(self._characters, 0)]
            self._characters = 0
            left = len(value) - len(kept)
            cut = text(kept, self._notes, place) + f"… ({left} characters more)"
            return self._note(place, f"too long to record: {left} of {len(value)} characters are left out", cut)
        self._characters -= len(value)
        return text(value, self._notes, place)

    def _bytes(self, value: bytes | bytearray | memoryview, place: str) -> object:
        size = value.nbytes if isinstance(value, memoryview) else len(value)
        if size * 4 // 3 > self._characters:
            return self._note(place, f"{size} bytes, left out", None)
        packed = base64.b64encode(value).decode("ascii")
        self._characters -= len(packed)
        return self._note(place, "bytes, kept in base64", packed)

    def _int(self, value: int, place: str) -> object:
        if -LONGEST_INT <= value < LONGEST_INT:
            return value
        written = str(value) if value.bit_length() < DECIMAL_BITS else hex(value)
        return self._note(place, "an integer beyond 64 bits, kept as text", self._text(written, place))

    def _note(self, place: str, what: str, instead: Instead) -> Instead:
        return _noted(self._notes, place, what, instead)


def _numbers(value: list[object] | tuple[object, ...]) -> bool:
    """All integers, or all floats, that JSON can say as they are."""
    kinds = set(map(type, value))
    if kinds == {int}:
        whole = cast(list[int], value)
        return min(whole) >= -LONGEST_INT and max(whole) < LONGEST_INT
    return kinds == {float} and all(map(math.isfinite, cast(list[float], value)))


def _sorted(value: set[object] | frozenset[object]) -> list[object]:
    """In an order that is the same each time, where their texts can be had."""
    try:
        return sorted(value, key=repr)
    except Exception:  # of their __repr__
        return list(value)


def _name(value: object) -> str:
    """Of its type. A class may lie about its name, even by raising."""
    return str(type.__dict__["__name__"].__get__(type(value)))[:100]


def _noted(notes: Notes, place: str, what: str, instead: Instead) -> Instead:
    if len(notes) < MOST_NOTES:
        notes.append(text(f"{place or '/'} was {what}"[:300], []))
    return instead


def mapping(
    value: Mapping[str, object] | None, notes: Notes, place: str, size: Size = WHOLE
) -> dict[str, object] | None:
    """The same for what must be an object."""
    if value is None:
        return None
    copied = plain(value, notes, place, size)
    return copied if isinstance(copied, dict) else {"value": copied}


def encode(value: Mapping[str, object]) -> bytes:
    """One line of JSON; `value` has been through `plain`."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
