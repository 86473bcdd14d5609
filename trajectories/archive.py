"""Archive and restore: a payload moves to the archive storage, its row and page stay and open it on demand.

The storage is `STORAGES["archive"]`: a folder, or S3 by django-storages. The object is written before the row lets go
of its bytes, and deleted only after the row has them back, so a kill in between leaves a copy too many, never one too
few. An archived segment is self-contained but for texts that many trajectories share.
"""

from collections.abc import Callable, Mapping, Sequence

from django.core.files.base import ContentFile
from django.core.files.storage import storages
from django.db import transaction
from django.utils import timezone

from trajectories import codec, history, segments
from trajectories.errors import Refused
from trajectories.history import SYSTEM, Actor
from trajectories.models import State, Trajectory, TrajectorySegment

Need = Callable[[Sequence[int]], Mapping[int, str]]  # pks → those that somebody needs where they are, and why
_needs: list[Need] = []


def also_asks(need: Need) -> None:
    """Ask this too before something is archived: `training` knows what its versions learned from."""
    if need not in _needs:
        _needs.append(need)


def needed(pks: Sequence[int]) -> dict[int, str]:
    """Those of the trajectories that should stay, and why."""
    found: dict[int, str] = {}
    for need in _needs:
        found.update(need(pks))
    return found


def archive(trajectory: Trajectory, *, by: Actor = SYSTEM, reason: str = "", even_if_needed: bool = False) -> None:
    """Move the payload out of the database.

    Raises:
        Refused: it is open, or archived already; or something live needs it, and nobody said that this does not matter.
    """
    if not even_if_needed and (why := needed([trajectory.pk])):
        raise Refused(f"{trajectory} stays: {why[trajectory.pk]} It can be archived all the same if you say so.")
    if trajectory.state == State.OPEN:
        raise Refused(f"{trajectory} is still running. Archive it when it has ended.")
    storage = storages["archive"]
    with transaction.atomic():
        row = Trajectory.objects.select_for_update(no_key=True, of=("self",)).get(pk=trajectory.pk)
        if row.archived_at is not None:
            raise Refused(f"{trajectory} is in the archive already.")
        for segment in TrajectorySegment.objects.filter(trajectory=row, data__isnull=False):
            data = bytes(segment.data or b"")
            if segment.dictionary is not None:  # what lies elsewhere must need nothing of ours: any zstd can open it
                data = codec.compress(segments.raw_of(segment))
            name = storage.save(f"{row.project_id}/{row.pk}/{segment.seq}.zst", ContentFile(data))
            TrajectorySegment.objects.filter(pk=segment.pk).update(data=None, dictionary=None, location=name)
        Trajectory.objects.filter(pk=row.pk).update(archived_at=timezone.now())
        history.record(row, "stored", "archived", project=row.project, by=by, reason=reason, field="archived_at")
    trajectory.refresh_from_db()


def restore(trajectory: Trajectory, *, by: Actor = SYSTEM, reason: str = "") -> None:
    """Bring the payload back into the database.

    Raises:
        Refused: it is not archived; or its object is not where it was put.
    """
    storage = storages["archive"]
    names = []
    with transaction.atomic():
        row = Trajectory.objects.select_for_update(no_key=True, of=("self",)).get(pk=trajectory.pk)
        if row.archived_at is None:
            raise Refused(f"{trajectory} is not in the archive.")
        for segment in TrajectorySegment.objects.filter(trajectory=row, data__isnull=True):
            try:
                with storage.open(segment.location) as file:
                    data = file.read()
            except OSError as exc:
                raise Refused(f"{segment.location} is not in the archive storage: {exc}") from exc
            names.append(segment.location)
            TrajectorySegment.objects.filter(pk=segment.pk).update(data=data, location="")
        Trajectory.objects.filter(pk=row.pk).update(archived_at=None)
        history.record(row, "archived", "stored", project=row.project, by=by, reason=reason, field="archived_at")
        transaction.on_commit(lambda: _delete(names), robust=True)
    trajectory.refresh_from_db()


def _delete(names: list[str]) -> None:
    for name in names:
        storages["archive"].delete(name)
