"""Where the running code is: in which trajectory and step. Kept apart by threads and tasks, nested as they are."""

from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .step import Step
    from .trajectory import Outlet, Trajectory


@dataclass(frozen=True)
class Place:
    """Where the running code is: inside a trajectory and perhaps a step of it; `outer` is around both."""

    trajectory: "Trajectory"
    step: "Step | None"
    outer: "Place | None"


_here: ContextVar[Place | None] = ContextVar("trainingsite_recorder_here", default=None)


def here(outlet: "Outlet") -> Place | None:
    """The innermost place in a trajectory of this recorder that has not ended."""
    place = _here.get()
    while place is not None and (place.trajectory.ended or not place.trajectory.belongs_to(outlet)):
        place = place.outer
    return place


def enter(trajectory: "Trajectory", step: "Step | None") -> Token[Place | None]:
    return _here.set(Place(trajectory, step, _here.get()))


def leave(token: Token[Place | None] | None) -> None:
    if token is None:
        return
    try:
        _here.reset(token)
    except (ValueError, RuntimeError):  # left in another task than entered, as async generators are: nothing to undo
        return
