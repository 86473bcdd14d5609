"""Judge recordings again, when checks, weights or a tokenizer have changed since they arrived.

Goes through the rows by their number, a chunk at a time, beside running recording: a row is written only where it came
out otherwise and is still what was looked at. Killed and repeated, it finds done what was done.
"""

from collections.abc import Iterator, Mapping

import msgspec
from django.db.models import QuerySet

from trajectories import census, indexing, quality, segments, tokens
from trajectories.errors import Problem
from trajectories.models import Project, State, Trajectory

CHUNK = 100  # payloads open at once


class Change(msgspec.Struct, frozen=True):
    """How one came out otherwise."""

    trajectory_id: str
    was: str
    now: str


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What one chunk came to."""

    looked_at: int
    changes: list[Change]
    unreadable: list[str]  # trajectory_id: why
    last: int  # go on after this row's number


def chosen(project: Project) -> QuerySet[Trajectory]:
    """All that can be judged: a running one is when it ends."""
    return Trajectory.objects.filter(project=project).exclude(state=State.OPEN)


def recompute(
    project: Project, rows: QuerySet[Trajectory] | None = None, *, after: int = 0, dry_run: bool = False
) -> Iterator[Progress]:
    """Quality, fidelity and their findings of `rows`, else of all that can be judged; groups' sums follow behind."""
    weights = quality.weights_of(project.quality_weights)
    bases = tokens.bases(project)
    wanted = chosen(project) if rows is None else rows
    while some := list(wanted.filter(pk__gt=after).order_by("pk")[:CHUNK]):
        after = some[-1].pk
        yield _chunk(project, some, weights, bases, dry_run=dry_run)


def _chunk(
    project: Project,
    rows: list[Trajectory],
    weights: Mapping[str, float],
    bases: Mapping[str, str],
    *,
    dry_run: bool,
) -> Progress:
    changes: list[Change] = []
    unreadable: list[str] = []
    groups: set[int | None] = set()
    for row in rows:
        try:
            payload = segments.load(row)
        except (LookupError, OSError, ValueError, Problem) as exc:
            unreadable.append(f"{row.trajectory_id}: {exc}")
            continue
        judged = judge(row, payload, weights, bases)
        was = (row.quality, row.fidelity, row.findings)
        now = (judged.quality, judged.fidelity, findings(row, judged))
        if abs(was[0] - now[0]) < 1e-9 and was[1:] == now[1:]:
            continue
        if not dry_run:
            # Somebody may have changed it meanwhile: what is not the same any more was judged on its way in.
            same = Trajectory.objects.filter(pk=row.pk, content_hash=bytes(row.content_hash), findings=row.findings)
            if not same.update(quality=now[0], fidelity=now[1], findings=now[2]):
                continue
            groups.add(row.group_id)
        changes.append(Change(row.trajectory_id, f"{was[0]:.3f} {was[1]}", f"{now[0]:.3f} {now[1]}"))
    indexing.touch(project, groups)
    return Progress(looked_at=len(rows), changes=changes, unreadable=unreadable, last=rows[-1].pk)


def judge(
    row: Trajectory, payload: segments.LoadedPayload, weights: Mapping[str, float], bases: Mapping[str, str]
) -> quality.Assessment:
    """As on arrival, and with the tokenizer where it is at hand; what one found earlier stays where it is not."""
    counted = census.of(payload)
    spelling = tokens.spelling(payload, payload.origins, bases, payload.marks)
    if spelling.wrong:
        census.take_misspelt(counted, spelling.wrong)
    elif not spelling.checked:
        for one in row.findings:
            if isinstance(one, dict) and census.MISSPELT in str(one.get("detail")):
                counted.candidates_exact -= 1
                counted.token_faults = (*counted.token_faults, str(one["detail"]))
    return quality.assess(counted, row.final_status, weights)


def findings(row: Trajectory, judged: quality.Assessment) -> list[dict[str, object]]:
    """A row's findings with those of the checks made anew; what others said stays."""
    others = [one for one in row.findings if isinstance(one, dict) and one.get("check") not in quality.OWN]
    return [*({"check": one.check, "ok": one.ok, "detail": one.detail} for one in judged.findings), *others]
