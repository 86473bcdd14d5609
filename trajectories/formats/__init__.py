"""Formats at the edge: each is one small file, and all end in the one native payload.

`incoming(raw, name)` reads what was posted; files are read by `trajectories/importing.py`.
"""

import json
from collections.abc import Callable, Mapping

import msgspec

from trajectories import payloads
from trajectories.errors import Invalid
from trajectories.formats import messages, native
from trajectories.formats.incoming import Incoming

POSTED: Mapping[str, Callable[[bytes], Incoming]] = {"native": native.read, "messages": messages.read}
POSTED_VALUES: Mapping[str, Callable[[object], Incoming]] = {
    "native": native.from_value,
    "messages": messages.from_value,
}


def check_name(name: str) -> str:
    """Raises Invalid: no such format can be posted."""
    if name not in POSTED:
        raise Invalid(f"There is no format {name[:50]!r} to post. There are: {', '.join(POSTED)}.")
    return name


def incoming(raw: bytes, name: str = "native") -> Incoming:
    """One posted trajectory.

    Raises:
        Invalid, TooLarge: with pointer and limit.
    """
    return POSTED[check_name(name)](raw)


def incoming_value(value: object, name: str = "native") -> Incoming:
    """The same of JSON that is already decoded."""
    return POSTED_VALUES[check_name(name)](value)


def batch(raw: bytes) -> list[msgspec.Raw]:
    """The items of {"batch": […]}, each still as bytes, so that a bad one costs no neighbour.

    Raises:
        Invalid: the body as a whole is no such object.
    """
    try:
        return _batch.decode(raw).batch
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    try:  # the standard library also reads NaN and lone surrogates: they are refused item by item then
        value: object = json.loads(raw.decode())
    except (ValueError, RecursionError):
        value = payloads.loads(raw)
    if not isinstance(value, dict) or not isinstance(value.get("batch"), list):
        raise Invalid('The body must be {"batch": […]}, or NDJSON.', pointer="/batch")
    return [msgspec.Raw(json.dumps(item).encode()) for item in value["batch"]]


class _Batch(msgspec.Struct):
    batch: list[msgspec.Raw]


_batch = msgspec.json.Decoder(_Batch)
