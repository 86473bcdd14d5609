"""The native trajectory: what the API speaks unless told otherwise."""

from trajectories import payloads
from trajectories.formats.incoming import Incoming, identity
from trajectories.payloads import TrajectoryPayload


def read(raw: bytes) -> Incoming:
    """Raises Invalid, TooLarge: with pointer and limit."""
    return _incoming(payloads.decode(raw, TrajectoryPayload))


def from_value(value: object) -> Incoming:
    return _incoming(payloads.from_builtins(value, TrajectoryPayload))


def _incoming(payload: TrajectoryPayload) -> Incoming:
    payloads.check(payload)
    payloads.check_steps(payload.steps)
    return Incoming(payload=payload, canonical=identity(payload), source_format="native")
