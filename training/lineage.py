"""What the versions that matter learned from."""

from collections.abc import Sequence

from django.db import connection

from training.models import BatchItem, ModelStatus, TrainedModel

LIVE = (ModelStatus.TRAINING, ModelStatus.READY, ModelStatus.DEPLOYED, ModelStatus.RETIRED)

# A version stands on its parent's weights, so the parent's batch is a part of it, whatever became of the parent.
_NEEDED = """
    with recursive heirs as (
        select m.id as ancestor, m.id as heir from trained_models m where m.status = any(%s)
        union
        select m.parent_id, h.heir from heirs h join trained_models m on m.id = h.ancestor where m.parent_id is not null
    )
    select i.trajectory_id, max(h.heir)
    from batch_items i join trained_models m on m.batch_id = i.batch_id join heirs h on h.ancestor = m.id
    where i.trajectory_id = any(%s) and i.is_active
    group by i.trajectory_id
"""


def why_needed(trajectories: Sequence[int]) -> dict[int, str]:
    """By pk: the version whose lineage leads to it, or the batch that is being trained on it."""
    pks = list(trajectories)
    with connection.cursor() as cursor:
        cursor.execute(_NEEDED, [list(LIVE), pks])
        heirs = {int(trajectory): int(heir) for trajectory, heir in cursor.fetchall()}
    names = {
        row.pk: f"{row} ({row.get_status_display()})" for row in TrainedModel.objects.filter(pk__in=heirs.values())
    }
    found = {pk: f"{names[heir]} learned from it." for pk, heir in heirs.items()}
    waiting = BatchItem.objects.filter(trajectory__in=pks, is_active=True, batch__model=None).select_related("batch")
    for item in waiting:
        if item.trajectory_id is not None:
            found.setdefault(item.trajectory_id, f"{item.batch} is being trained on it.")
    return found
