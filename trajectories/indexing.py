"""What is filled behind the write: groups and their counters, late rewards, call rows.

A project's queue is worked off by one process at a time (an advisory lock), so that cohorts are numbered once;
whoever needs the truth calls `drain` first. Killed anywhere, the queue's rows are still there and are done again.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import timedelta

import msgspec
from django.db import connection, transaction
from django.db.models import Count, Max, Min, Q, Sum
from django.utils import timezone

from trajectories import history, payloads, rewards, segments
from trajectories.models import (
    ID_LENGTH,
    FinalStatus,
    Group,
    GroupState,
    IndexingWork,
    Judging,
    KnownVersion,
    LlmCallLog,
    Project,
    State,
    Trajectory,
)

CHUNK = 500  # queue rows taken at once
PAYLOADS = 50  # opened at once for call rows: a payload may have 32 MB
LOCK = 0x7261_696E  # first half of the advisory lock; the second is the project

# Attempts that share a baseline: no superseded tries, no twins, nothing that a person or the environment spoiled.
COUNTING = Q(is_superseded=False, twin_of=None, is_excluded=False, state=State.SEALED, archived_at=None) & ~Q(
    final_status=FinalStatus.ENVIRONMENT_ERROR
)


class Lag(msgspec.Struct, frozen=True):
    """How far the indexes are behind the recordings."""

    waiting: int
    seconds: float  # age of the oldest; 0 when nothing waits


def lag(project: Project | None = None) -> Lag:
    rows = IndexingWork.objects.all() if project is None else IndexingWork.objects.filter(project=project)
    found = rows.aggregate(n=Count("id"), oldest=Min("created_at"))
    age = (timezone.now() - found["oldest"]).total_seconds() if found["oldest"] else 0.0
    return Lag(found["n"], max(0.0, age))


def drain(project: Project) -> int:
    """Do all that waits in the project's queue. Returns how many rows of it were done."""
    done = 0
    while (count := _pass(project)) > 0:
        done += count
    return done


def touch(project: Project, groups: Iterable[int | None]) -> None:
    """Have the counters of these groups computed again: call it where a flag or reward of a member changes."""
    IndexingWork.objects.bulk_create(
        IndexingWork(project=project, group_id=pk) for pk in sorted({pk for pk in groups if pk is not None})
    )


def _pass(project: Project) -> int:
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("select pg_advisory_xact_lock(%s, %s)", [LOCK, project.pk % 2**31])
        work = list(
            IndexingWork.objects.select_for_update(of=("self",), skip_locked=True)
            .filter(project=project)
            .order_by("id")[:CHUNK]
        )
        if not work:
            return 0
        pks = sorted({row.trajectory_id for row in work if row.trajectory_id is not None})
        rows = list(Trajectory.objects.filter(pk__in=pks, state=State.SEALED).select_related("scenario").order_by("id"))
        dirty = {row.group_id for row in work if row.group_id is not None}
        dirty |= _supersede(project, rows)
        _find_twins(rows)
        dirty |= _assign(project, rows)
        if rows:
            rewards.apply_waiting(project, rows)
        recount(project, dirty)
        _close_full(project, dirty)
        for start in range(0, len(rows), PAYLOADS):
            _write_calls(rows[start : start + PAYLOADS])
        IndexingWork.objects.filter(pk__in=[row.pk for row in work]).delete()
    return len(work)


# --- attempts ----------------------------------------------------------------------------------------------------


def _supersede(project: Project, rows: Sequence[Trajectory]) -> set[int]:
    """A later try takes the place of an earlier one, whichever came in first. Returns the groups that lost one."""
    earlier_ids = {row.retry_of for row in rows if row.retry_of}
    replaced = list(Trajectory.objects.filter(project=project, trajectory_id__in=earlier_ids, is_superseded=False))
    scenarios = {row.scenario_id for row in rows if row.scenario_id is not None}
    ids = [row.trajectory_id for row in rows]
    outrun = set(
        Trajectory.objects.filter(scenario__in=scenarios, state=State.SEALED, retry_of__in=ids).values_list(
            "retry_of", flat=True
        )
    )
    outrun |= earlier_ids & set(ids)
    lost = {row.group_id for row in replaced if row.group_id is not None}
    pks = {row.pk for row in replaced} | {row.pk for row in rows if row.trajectory_id in outrun}
    if pks:
        Trajectory.objects.filter(pk__in=pks).update(is_superseded=True)
        for row in rows:
            row.is_superseded = row.is_superseded or row.pk in pks
    return lost


def _find_twins(rows: Sequence[Trajectory]) -> None:
    """Identical content under another id counts once: the first one counts. Times and token ids are content."""
    by_scenario: dict[int, list[Trajectory]] = defaultdict(list)
    for row in rows:
        if row.scenario_id is not None:
            by_scenario[row.scenario_id].append(row)
    twins: list[Trajectory] = []
    for scenario, members in by_scenario.items():
        hashes = {bytes(row.twin_hash) for row in members}
        first: dict[bytes, int] = {}
        for pk, twin_hash in (
            Trajectory.objects.filter(scenario=scenario, twin_hash__in=hashes, state=State.SEALED)
            .order_by("id")
            .values_list("pk", "twin_hash")
        ):
            first.setdefault(bytes(twin_hash), pk)
        for row in members:
            original = first.get(bytes(row.twin_hash), row.pk)
            if original < row.pk and row.twin_of_id is None:
                row.twin_of_id = original
                twins.append(row)
    Trajectory.objects.bulk_update(twins, ["twin_of"])


# --- groups ------------------------------------------------------------------------------------------------------

Key = tuple[int, str, str, bool]  # scenario, role, behaviour, is_evaluation


def _assign(project: Project, rows: Sequence[Trajectory]) -> set[int]:
    """Give each new attempt at a scenario its group. Returns the groups that gained one."""
    new = [row for row in rows if row.scenario_id is not None and row.group_id is None and not row.is_superseded]
    if not new:
        return set()
    cohorts = _Cohorts(project, new)
    for row in new:
        group = cohorts.take(row)
        row.group_id = group.pk
    with connection.cursor() as cursor:  # bulk_update's CASE with a branch a row costs ten times as much
        cursor.execute(
            "update trajectories t set group_id = n.g from unnest(%s::int8[], %s::int8[]) as n(t, g) where t.id = n.t",
            [[row.pk for row in new], [row.group_id for row in new]],
        )
    return {row.group_id for row in new if row.group_id is not None}


class _Cohorts:
    """The open groups of some scenarios, and room in them. One process at a time works on a project."""

    def __init__(self, project: Project, rows: Sequence[Trajectory]) -> None:
        self.project = project
        self.groups: dict[Key, list[Group]] = defaultdict(list)
        scenarios = {row.scenario_id for row in rows}
        for group in Group.objects.select_for_update().filter(scenario__in=scenarios).order_by("id"):
            key = (group.scenario_id, group.role, group.behaviour, group.is_evaluation)
            self.groups[key].append(group)
        members = (
            Trajectory.objects.filter(group__scenario__in=scenarios, group__state=GroupState.OPEN, is_superseded=False)
            .values("group")
            .annotate(n=Count("id"))
        )
        self.filled: dict[int, int] = {row["group"]: row["n"] for row in members}
        self.ordinals = dict(KnownVersion.objects.filter(project=project).values_list("version", "ordinal"))

    def take(self, row: Trajectory) -> Group:
        assert row.scenario_id is not None
        key = (row.scenario_id, row.role, row.behaviour, row.is_evaluation)
        present = self.groups[key]
        if row.declared_group_id:
            cohort = row.declared_group_id
            names = {group.cohort for group in present}
            group = next((one for one in present if one.cohort == cohort and self.has_room(one)), None)
            number = 1
            while group is None and cohort in names:  # the named one is closed: later attempts open the next
                number += 1
                suffix = f" #{number}"
                cohort = row.declared_group_id[: ID_LENGTH - len(suffix)] + suffix
                group = next((one for one in present if one.cohort == cohort and self.has_room(one)), None)
        else:
            group = next(
                (
                    one
                    for one in present
                    if one.cohort.startswith("#")
                    and one.declared_size == row.declared_group_size
                    and self.has_room(one)
                ),
                None,
            )
            cohort = f"#{1 + sum(one.cohort.startswith('#') for one in present)}"
        if group is None:
            group = Group.objects.create(
                project=self.project,
                scenario_id=row.scenario_id,
                role=row.role,
                behaviour=row.behaviour,
                cohort=cohort,
                is_evaluation=row.is_evaluation,
                declared_size=row.declared_group_size,
                policy_minor=self.ordinals.get(row.behaviour),
                last_received_at=row.received_at,
            )
            present.append(group)
        elif group.declared_size is None and row.declared_group_size is not None:
            group.declared_size = row.declared_group_size
            group.save(update_fields=["declared_size"])
        self.filled[group.pk] = self.filled.get(group.pk, 0) + 1
        return group

    def has_room(self, group: Group) -> bool:
        return group.state == GroupState.OPEN and (
            group.declared_size is None or self.filled.get(group.pk, 0) < group.declared_size
        )


def recount(project: Project, groups: Iterable[int]) -> None:
    """The counters of the groups from their members, whatever they were. Judged ones are training's."""
    pks = sorted(set(groups))
    if not pks:
        return
    counted = {
        row["group"]: row
        for row in Trajectory.objects.filter(group__in=pks)
        .values("group")
        .annotate(
            n=Count("id", filter=COUNTING),
            n_trainable=Count("id", filter=COUNTING & Q(n_trainable_calls__gt=0)),
            reward_n=Count("reward", filter=COUNTING),
            reward_min=Min("reward", filter=COUNTING),
            reward_max=Max("reward", filter=COUNTING),
            reward_sum=Sum("reward", filter=COUNTING, default=0.0),
            quality_sum=Sum("quality", filter=COUNTING, default=0.0),
            last_received_at=Max("received_at"),
        )
    }
    rows = list(Group.objects.select_for_update().filter(pk__in=pks, project=project).order_by("id"))
    for row in rows:
        found = counted.get(row.pk)
        row.n = found["n"] if found else 0
        row.n_trainable = found["n_trainable"] if found else 0
        row.reward_n = found["reward_n"] if found else 0
        row.reward_min = found["reward_min"] if found else None
        row.reward_max = found["reward_max"] if found else None
        row.reward_sum = found["reward_sum"] if found else 0.0
        row.quality_sum = found["quality_sum"] if found else 0.0
        row.last_received_at = found["last_received_at"] if found else row.last_received_at
    names = ("n", "n_trainable", "reward_n", "reward_min", "reward_max", "reward_sum", "quality_sum")
    Group.objects.bulk_update(rows, [*names, "last_received_at"], batch_size=200)


def _close_full(project: Project, groups: Iterable[int]) -> None:
    """Close open groups that have their declared size: superseded tries make room, spoiled ones do not."""
    full = [
        group
        for group in Group.objects.filter(pk__in=list(groups), state=GroupState.OPEN, declared_size__isnull=False)
        if Trajectory.objects.filter(group=group, is_superseded=False).count() >= (group.declared_size or 0)
    ]
    _close(project, full, "it has its declared size")


def close_idle(project: Project) -> int:
    """Close open groups without a new attempt for the project's time. Returns how many."""
    before = timezone.now() - timedelta(minutes=project.group_idle_minutes)
    with transaction.atomic():
        idle = list(
            Group.objects.select_for_update(skip_locked=True)
            .filter(project=project, state=GroupState.OPEN, last_received_at__lt=before)
            .order_by("id")[:1000]
        )
        _close(project, idle, f"no new attempt for {project.group_idle_minutes} minutes")
    return len(idle)


def _close(project: Project, groups: Sequence[Group], reason: str) -> None:
    if not groups:
        return
    now = timezone.now()
    Group.objects.filter(pk__in=[group.pk for group in groups], state=GroupState.OPEN).update(
        state=GroupState.CLOSED, state_since=now, judging=Judging.PENDING, judging_since=now
    )
    history.record_many(
        ((group, GroupState.OPEN, GroupState.CLOSED) for group in groups),
        project=project,
        by=history.SYSTEM,
        reason=reason,
        field="state",
    )


# --- calls -------------------------------------------------------------------------------------------------------


def _write_calls(rows: Sequence[Trajectory]) -> None:
    """The call rows of some trajectories, made anew."""
    LlmCallLog.objects.filter(trajectory__in=[row.pk for row in rows]).delete()
    loaded = segments.load_many(rows)
    LlmCallLog.objects.bulk_create((call for row in rows for call in _calls(row, loaded[row.pk])), batch_size=2000)


def _calls(row: Trajectory, payload: segments.LoadedPayload) -> Iterable[LlmCallLog]:
    position = 0
    for number, step in enumerate(payload.steps):
        for call in step.llm_calls:
            origin = payload.origins[position] if position < len(payload.origins) else None
            yield LlmCallLog(
                trajectory=row,
                position=position,
                step=number,
                model=_text(call.model, ID_LENGTH),
                model_version=_text((origin.version if origin else "") or call.model_version, ID_LENGTH),
                origin=origin.origin if origin else "unknown",
                is_trainable=call.trainable is not False and origin is not None and origin.origin == "own",
                purpose=_text(call.purpose, 100),
                finish_reason=_text(call.finish_reason, 100),
                has_error=call.error is not None,
                prompt_tokens=call.prompt_tokens
                if call.prompt_tokens is not None
                else (len(call.prompt_token_ids) if call.prompt_token_ids else None),
                completion_tokens=call.completion_tokens
                if call.completion_tokens is not None
                else (len(call.token_ids) if call.token_ids else None),
                n_token_ids=len(call.token_ids or ()),
                latency_ms=call.latency_ms,
                temperature=call.temperature,
                top_p=call.top_p,
                logprobs_mode=_text(call.logprobs_mode, 12),
                created_at=payloads.utc(step.timestamp) if step.timestamp else None,
            )
            position += 1


def _text(value: str | None, limit: int) -> str:
    return (value or "").replace("\x00", "\ufffd")[:limit]


def reindex(project: Project) -> int:
    """Queue every sealed trajectory again; groups stay, call rows and counters are made anew."""
    pks = list(
        Trajectory.objects.filter(project=project, state=State.SEALED).order_by("id").values_list("pk", flat=True)
    )
    IndexingWork.objects.bulk_create((IndexingWork(project=project, trajectory_id=pk) for pk in pks), batch_size=5000)
    touch(project, Group.objects.filter(project=project).values_list("pk", flat=True))
    return len(pks)
