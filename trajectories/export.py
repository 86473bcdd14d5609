"""Trajectories going out: the native format, a line each, streamed."""

from collections.abc import Iterator

from django.db.models import QuerySet

from trajectories import payloads, scenarios, segments
from trajectories.models import Trajectory
from trajectories.payloads import TrajectoryPayload

FORMATS = ("native",)
CHUNK = 100  # rows whose payloads are open at once


def native(row: Trajectory, loaded: segments.LoadedPayload) -> TrajectoryPayload:
    """The trajectory as it may be sent to another site: its scenario inline, without gold answers."""
    fields = {name: getattr(loaded, name) for name in TrajectoryPayload.__struct_fields__}
    if row.scenario is not None and (row.scenario.description or row.scenario.metadata):
        fields["scenario"] = scenarios.public_payload(row.scenario)
        fields["scenario_id"] = None
    return TrajectoryPayload(**fields)


def lines(rows: "QuerySet[Trajectory]", *, after: int = 0) -> Iterator[bytes]:
    """NDJSON in the order of recording; open ones are left out until they are sealed."""
    while True:
        page = list(
            rows.filter(pk__gt=after).exclude(state="open").select_related("scenario", "agent").order_by("id")[:CHUNK]
        )
        if not page:
            return
        loaded = segments.load_many(page)
        for row in page:
            yield payloads.encode(native(row, loaded[row.pk])) + b"\n"
        after = page[-1].pk
