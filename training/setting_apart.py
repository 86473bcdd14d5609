"""Groups that a person sets apart for evaluation: they measure versions and never train one.

What a version has learned from cannot measure it, so a group that a live or completed batch holds stays where it is.
"""

from django.db import transaction

from training import selection
from training.models import BatchGroup, BatchItem
from trajectories import group_life
from trajectories.errors import Refused
from trajectories.history import Actor
from trajectories.models import Group


def set_apart(group: Group, *, by: Actor, reason: str) -> None:
    """Make a group evaluation-only, with its attempts.

    Raises:
        Refused: a live or completed batch holds it or some of its attempts; no reason; or it is open, or evaluation
            already.
    """
    with transaction.atomic():
        Group.objects.select_for_update(no_key=True).get(pk=group.pk)
        held = (
            BatchGroup.objects.filter(group=group, is_used=True, batch__status__in=selection.HOLDS)
            .order_by("batch")
            .values_list("batch", flat=True)
            .first()
        )
        if held is None:
            of_attempts = BatchItem.objects.filter(trajectory__group=group, is_active=True)
            held = of_attempts.order_by("batch").values_list("batch", flat=True).first()
        if held is not None:
            raise Refused(
                f"Batch {held} has {group}: what a version learned from cannot measure it. "
                "A failed or cancelled batch lets it go."
            )
        group_life.mark_evaluation(group, True, by=by, reason=reason)


def give_back(group: Group, *, by: Actor, reason: str) -> None:
    """Let a group that was set apart train again.

    Raises:
        Refused: no reason; it is not for evaluation; or attempts of it answer an evaluation.
    """
    group_life.mark_evaluation(group, False, by=by, reason=reason)
