"""Anything an agent has in its hands, as JSON: copied at once, since agents go on to change their lists."""

import base64
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from datetime import date, datetime
from enum import Enum
from typing import TypeVar

DEEPEST = 100  # levels; what lies deeper is kept as text. The site refuses JSON of some hundred levels.
MOST_NOTES = 20
LONGEST_INT = 2**63  # beyond, numbers are kept as text: JSON readers differ on them

_SURROGATES = re.compile("[\ud800-\udfff]")

Instead = TypeVar("Instead")
Notes = list[str]  # what had to be changed, for the recording to say so


def plain(value: object, notes: Notes, place: str = "", depth: int = 0) -> object:
    """A deep copy of JSON's own types. What JSON cannot say is changed and noted, never refused."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return plain(value.value, notes, place, depth)
    if isinstance(value, str):
        return text(value, notes, place)
    if isinstance(value, int):
        if -LONGEST_INT <= value < LONGEST_INT:
            return int(value)
        return _noted(notes, place, "an integer beyond 64 bits, kept as text", str(value))
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return _noted(notes, place, f"{value}, recorded as unknown", None)
    if depth >= DEEPEST:
        return _noted(notes, place, f"nested deeper than {DEEPEST} levels, kept as text", text(repr(value), notes))
    if isinstance(value, Mapping):
        return {
            text(key if isinstance(key, str) else str(key), notes, place): plain(
                one, notes, f"{place}/{key}", depth + 1
            )
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(one, notes, f"{place}/{at}", depth + 1) for at, one in enumerate(value)]
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, bytes | bytearray):
        return _noted(notes, place, "bytes, kept in base64", base64.b64encode(value).decode("ascii"))
    return _foreign(value, notes, place, depth)


def _foreign(value: object, notes: Notes, place: str, depth: int) -> object:
    """Objects of others: pydantic's, NumPy's, dataclasses, sets; the rest as the text it prints."""
    try:
        return plain(_opened(value), notes, place, depth + 1)
    except Exception as exc:  # of their code, not ours: it costs this one value
        return _noted(notes, place, f"a {type(value).__name__} that cannot be read ({type(exc).__name__})", None)


def _opened(value: object) -> object:
    """One level of it in JSON's own types, or its text."""
    if isinstance(value, type):
        return repr(value)
    for name in ("model_dump", "tolist"):  # pydantic; NumPy and torch
        convert: object = getattr(value, name, None)
        if callable(convert):
            return convert()
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, Iterable) and hasattr(value, "__len__"):
        return list(value)
    return str(value)


def text(value: str, notes: Notes, place: str = "") -> str:
    """Lone surrogates are no text: UTF-8 cannot say them."""
    if value.isascii():
        return str(value)
    try:
        value.encode()
    except UnicodeEncodeError:
        return _noted(notes, place, "lone surrogates, replaced by U+FFFD", _SURROGATES.sub("\ufffd", value))
    return str(value)


def _noted(notes: Notes, place: str, what: str, instead: Instead) -> Instead:
    if len(notes) < MOST_NOTES:
        notes.append(f"{place or '/'} was {what}"[:300])
    return instead


def mapping(value: Mapping[str, object] | None, notes: Notes, place: str) -> dict[str, object] | None:
    """The same for what must be an object."""
    if value is None:
        return None
    copied = plain(value, notes, place)
    return copied if isinstance(copied, dict) else {"value": copied}


def encode(value: Mapping[str, object]) -> bytes:
    """One line of JSON; `value` has been through `plain`."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
