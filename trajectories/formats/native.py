"""The native trajectory: what the API speaks unless told otherwise."""

from collections.abc import Iterator

from trajectories import payloads
from trajectories.errors import Problem
from trajectories.formats.incoming import Incoming, identity
from trajectories.payloads import TrajectoryPayload

NAME = "native"


def recognises(value: object) -> bool:
    return isinstance(value, dict) and "steps" in value and bool({"trajectory_id", "trajectoryId"} & set(value))


def decode(raw: bytes) -> Incoming:
    """Raises Invalid, TooLarge: with pointer and limit."""
    return _incoming(payloads.decode(raw, TrajectoryPayload))


def from_value(value: object) -> Incoming:
    return _incoming(payloads.from_builtins(value, TrajectoryPayload))


def read(value: object, *, source: str) -> Iterator[Incoming | Problem]:
    try:
        yield from_value(value)
    except Problem as problem:
        yield problem


def _incoming(payload: TrajectoryPayload) -> Incoming:
    payloads.check(payload)
    payloads.check_steps(payload.steps)
    return Incoming(payload=payload, canonical=identity(payload), source_format=NAME)
