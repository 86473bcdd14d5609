"""The life of a group. Nothing outside this file writes its state.

open → closed → excluded | held        held | excluded → closed, by a person, with a reason
"""

from django.db import transaction
from django.utils import timezone

from trajectories import history
from trajectories.errors import Refused
from trajectories.history import Actor
from trajectories.models import Group, GroupState

NEXT: dict[GroupState, frozenset[GroupState]] = {
    GroupState.OPEN: frozenset({GroupState.CLOSED}),
    GroupState.CLOSED: frozenset({GroupState.EXCLUDED, GroupState.HELD}),
    GroupState.EXCLUDED: frozenset({GroupState.CLOSED}),
    GroupState.HELD: frozenset({GroupState.CLOSED}),
}


def exclude(group: Group, *, by: Actor, reason: str) -> None:
    """Keep a group out of every batch.

    Raises:
        Refused: no reason; or it is not closed.
    """
    _move(group, GroupState.EXCLUDED, by=by, reason=reason)


def hold(group: Group, *, by: Actor, reason: str) -> None:
    """Keep a group out of batches until somebody has looked at it.

    Raises:
        Refused: no reason; or it is not closed.
    """
    _move(group, GroupState.HELD, by=by, reason=reason)


def include(group: Group, *, by: Actor, reason: str) -> None:
    """Let an excluded or held group into batches again.

    Raises:
        Refused: no reason; or it is neither.
    """
    if group.state == GroupState.OPEN:
        raise Refused(f"{group} is open. It closes by itself.")
    _move(group, GroupState.CLOSED, by=by, reason=reason)


def _move(group: Group, to: GroupState, *, by: Actor, reason: str) -> None:
    was = GroupState(group.state)
    if not reason.strip():
        raise Refused("Give a reason: it is kept with the change.")
    if to not in NEXT[was]:
        raise Refused(f"{group} is {was.label}, so it cannot become {to.label}.")
    with transaction.atomic():
        moved = Group.objects.filter(pk=group.pk, state=was).update(state=to, state_since=timezone.now())
        if not moved:
            raise Refused(f"{group} changed while you were looking at it. Reload and try again.")
        history.record(group, was, to, project=group.project, by=by, reason=reason, field="state")
    group.refresh_from_db()
