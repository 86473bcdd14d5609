"""The metrics that a project lists, as rows that a filter can look up.

What comes in is written by the indexing pass. What was there before the project listed a metric is looked through
behind the request, in windows of keys; killed in between, it is begun again, which changes nothing of what is there.
"""

import math
from collections.abc import Sequence

from django.db import connection, transaction
from django.db.models import Max, Min
from django.utils import timezone

from trajectories.errors import Invalid
from trajectories.models import MetricValue, Project, Trajectory

WINDOW = 20_000  # keys that one statement looks at
MOST = 8  # of a project


def declare(project: Project, names: Sequence[str]) -> None:
    """List these metrics from now on. `look_through` then does what is there already."""
    chosen = list(dict.fromkeys(one.strip() for one in names if one.strip()))
    if len(chosen) > MOST:
        raise Invalid(f"{len(chosen)} metrics are too many: at most {MOST} are listed.")
    Project.objects.filter(pk=project.pk).update(listed_metrics=chosen, metrics_since=timezone.now())
    project.refresh_from_db(fields=["listed_metrics", "metrics_since"])


def write(project: Project, rows: Sequence[Trajectory]) -> None:
    """The values of these trajectories."""
    names = Project.objects.values_list("listed_metrics", flat=True).get(pk=project.pk)
    found = [
        MetricValue(project=project, trajectory=row, name=name, value=value)
        for name in names
        for row in rows
        if (value := _number(row.metrics.get(name))) is not None
    ]
    MetricValue.objects.bulk_create(found, ignore_conflicts=True)


def _number(value: object) -> float | None:
    if not isinstance(value, bool | int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def look_through(project: Project) -> int:
    """Write what is missing of older recordings, delete what is not listed any more. Returns how many were written."""
    fresh = Project.objects.get(pk=project.pk)
    since, names = fresh.metrics_since, fresh.listed_metrics
    if since is None:
        return 0
    ends = Trajectory.objects.filter(project=project).aggregate(low=Min("id"), high=Max("id"))
    written = 0
    low = ends["low"]
    while names and low is not None and low <= ends["high"]:
        written += _window(project, names, low)
        low += WINDOW
    while True:
        some = MetricValue.objects.filter(project=project).exclude(name__in=names).values("pk")[:WINDOW]
        if not MetricValue.objects.filter(pk__in=some).delete()[0]:
            break
    Project.objects.filter(pk=project.pk, metrics_since=since).update(metrics_since=None)
    return written


def _window(project: Project, names: list[str], low: int) -> int:
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(
            """insert into metric_values (project_id, trajectory_id, name, value)
            select t.project_id, t.id, listed.name, found.value
            from trajectories t
            cross join unnest(%(names)s::text[]) as listed(name)
            cross join lateral (
                select case jsonb_typeof(t.metrics -> listed.name)
                    when 'number' then
                        case when abs((t.metrics -> listed.name)::numeric) < 1e308
                            then (t.metrics -> listed.name)::float8 end
                    when 'boolean' then (t.metrics -> listed.name)::boolean::int
                end as value
            ) found
            where t.project_id = %(project)s and t.id >= %(low)s and t.id < %(high)s
                and t.state <> 'open'  -- what its end tells may be another value; the indexing pass sees that
                and found.value is not null
            on conflict do nothing""",
            {"names": names, "project": project.pk, "low": low, "high": low + WINDOW},
        )
        written: int = cursor.rowcount
    return written


def unfinished() -> list[Project]:
    """Projects whose older recordings are still to be looked through."""
    return list(Project.objects.filter(metrics_since__isnull=False))
