"""The life of a group. Nothing outside this file writes its state.

open → closed → excluded | held        held | excluded → closed, by a person, with a reason

A person may set a group apart for evaluation, and give it back: then it is another kind of group, not in another state.
"""

from django.db import transaction
from django.utils import timezone

from trajectories import history, indexing
from trajectories.errors import Refused
from trajectories.history import Actor
from trajectories.models import ID_LENGTH, Group, GroupState

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


def mark_evaluation(group: Group, wanted: bool, *, by: Actor, reason: str) -> None:
    """Make a group and its attempts measure versions and train none, or the reverse. What batches think of it is
    asked before (training/setting_apart.py); call it in that transaction.

    Raises:
        Refused: no reason; it is open, or is that already; or attempts of it answer an evaluation.
    """
    if not reason.strip():
        raise Refused("Give a reason: it is kept with the change.")
    words = ("training", "evaluation")
    with transaction.atomic():
        locked = Group.objects.select_for_update(no_key=True).get(pk=group.pk)
        if locked.state == GroupState.OPEN:
            raise Refused(f"{group} is open, so attempts may still come in. Wait until it closes.")
        if locked.is_evaluation == wanted:
            raise Refused(f"{group} is for {words[wanted]} already. Reload the page.")
        if not wanted and locked.trajectories.exclude(evaluation_id="").exists():
            raise Refused(f"Attempts of {group} answer an evaluation: they measure versions and never train one.")
        locked.is_evaluation, locked.cohort = wanted, _free_cohort(locked, wanted)
        locked.save(update_fields=["is_evaluation", "cohort"])
        locked.trajectories.update(is_evaluation=wanted)
        indexing.touch(group.project, [group.pk])
        history.record(
            group, words[not wanted], words[wanted], project=group.project, by=by, reason=reason, field="is_evaluation"
        )
    group.refresh_from_db()


def _free_cohort(group: Group, wanted: bool) -> str:
    """The cohort's name, or one beside it where the other kind has a group of that name."""
    others = Group.objects.filter(
        project=group.project_id,
        scenario=group.scenario_id,
        role=group.role,
        behaviour=group.behaviour,
        is_evaluation=wanted,
    )
    names = set(others.values_list("cohort", flat=True))
    name, number = group.cohort, 1
    while name in names:
        number += 1
        suffix = f" ({number})"
        name = group.cohort[: ID_LENGTH - len(suffix)] + suffix
    return name


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
