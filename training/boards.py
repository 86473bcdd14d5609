"""How a project stands, for the first page. Taken behind the page and kept; the page reads the newest and its age.

Nothing here reads more than counters, small tables and bounded indexes, so it costs the same at a million recordings.
Killed anywhere, the snapshot before is still there.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timedelta
from typing import TypeVar

import msgspec
from django.db import transaction
from django.db.models import Model, QuerySet
from django.utils import timezone

from training import automation, batches, evaluation, judging, policies, readiness, shared_rewards
from training.models import (
    LIVE_BATCH,
    AgentRoute,
    BatchStatus,
    BoardSnapshot,
    Deployment,
    DeploymentState,
    Evaluation,
    EvaluationState,
    ModelStatus,
    ReadinessSnapshot,
    ServingInterval,
    TrainedModel,
    TrainingBatch,
)
from training.routing import EVERYONE, STABLE
from training.shared_rewards import VersionReward
from trainingsite import health
from trajectories import arrivals, indexing
from trajectories.models import Group, GroupState, Judging, OtelRecord, Project, SpanState

KEPT = timedelta(hours=1)
LATELY = timedelta(days=7)
STALE = timedelta(minutes=1)  # an older one is asked for anew when somebody looks
UP_TO = 1000  # more of one thing than this is "more than 1,000"
SMALL = 20_000  # recordings up to which the checks are made with every snapshot, not with their own schedule alone
TREND = 48  # points
FAILED = 3  # of each kind are named

Row = TypeVar("Row", bound=Model)


class CheckNow(msgspec.Struct, frozen=True, kw_only=True):
    """One readiness check, and how it went there."""

    name: str
    value: float
    threshold: float
    ok: bool
    detail: str
    trend: list[float] = []  # over the last day, oldest first, this one last


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """What the readiness checks said."""

    is_ready: bool | None = None  # None: nobody has looked yet
    reason: str = ""
    mode: str = ""
    forecast: datetime | None = None
    looked_at: datetime | None = None
    checks: list[CheckNow] = []
    usable_groups: int = 0


class Version(msgspec.Struct, frozen=True, kw_only=True):
    pk: int
    name: str
    status: str
    status_label: str


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """Something that went wrong and waits for somebody."""

    pk: int
    name: str
    why: str
    at: datetime


class Coming(msgspec.Struct, frozen=True, kw_only=True):
    """An evaluation under way."""

    pk: int
    name: str
    done: int
    wanted: int


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Whether another server is well; asked by a worker, since one that is away takes its time to say so."""

    name: str
    ok: bool
    detail: str


class Board(msgspec.Struct, frozen=True, kw_only=True):
    """What the first page shows of a project, but for what is under way this minute."""

    per_hour_now: float = 0.0
    last_24h: int = 0
    last_7d: int = 0
    hours: list[int] = []
    recorded: int = 0
    indexing_lag_seconds: float = 0.0

    need: int = 0  # trajectories a batch
    interval_hours: float = 24.0

    ready: Ready = Ready()
    needed_groups: int = 0
    next_due: datetime | None = None
    trains_by_itself: bool = False

    to_judge: int = 0
    judge_errors: int = 0
    held: int = 0
    quarantined: int = 0

    serving: Version | None = None
    agents: int = 0  # that were last given what serves
    versions: list[Version] = []
    not_asked_for: Version | None = None  # ready, newer than what serves, and nobody asked for its deployment
    rewards: list[VersionReward] = []
    shared_scenarios: int = 0
    not_shared: list[str] = []

    evaluations: list[Coming] = []
    failed_batches: list[Failed] = []
    failed_evaluations: list[Failed] = []
    failed_deployments: list[Failed] = []
    parts: list[Part] = []


def take(project: Project) -> BoardSnapshot:
    """Look now, and keep it. Two who look at once keep two, and the newer is read."""
    board = look(project)
    now = timezone.now()
    with transaction.atomic():
        BoardSnapshot.objects.filter(project=project, created_at__lt=now - KEPT).delete()
        return BoardSnapshot.objects.create(project=project, data=msgspec.to_builtins(board), created_at=now)


def take_all() -> None:
    """Of every project; one worker at a time looks."""
    with batches.one_at_a_time("boards") as mine:
        if mine:
            automation.for_each_project("the first page", take)


def newest(projects: Collection[Project]) -> dict[int, tuple[Board, datetime]]:
    """By project, the newest snapshot and when it was taken: one query for all of them."""
    rows = BoardSnapshot.objects.filter(project__in=projects).order_by("project_id", "-pk").distinct("project_id")
    found: dict[int, tuple[Board, datetime]] = {}
    for row in rows:
        try:
            found[row.project_id] = msgspec.convert(row.data, Board, strict=False), row.created_at
        except msgspec.ValidationError:
            continue  # of another version of the site; the next one is of this
    return found


def look(project: Project) -> Board:
    """How the project stands now."""
    policy = policies.of(project)
    came = arrivals.of(project)
    recorded = arrivals.in_all(project)
    groups = Group.objects.filter(project=project)
    due = automation.due_at(project, policy)
    models = list(TrainedModel.objects.filter(project=project).order_by("-ordinal")[:60])
    serving = _serving(project)
    rewards = shared_rewards.of(project, models)
    return Board(
        per_hour_now=came.per_hour_now,
        last_24h=came.last_24h,
        last_7d=came.last_7d,
        hours=list(came.hours),
        recorded=recorded,
        indexing_lag_seconds=indexing.lag(project).seconds,
        need=policy.min_trajectories,
        interval_hours=policy.training_interval_hours,
        next_due=due,
        trains_by_itself=policy.auto_trigger,
        to_judge=_count(groups.filter(state=GroupState.CLOSED, judging=Judging.PENDING, is_evaluation=False))
        if judging.can_judge(policy)  # else nothing of them waits for anybody
        else 0,
        judge_errors=_count(groups.filter(judging=Judging.ERROR).exclude(state=GroupState.EXCLUDED)),
        held=_count(groups.filter(state=GroupState.HELD)),
        quarantined=_count(OtelRecord.objects.filter(project=project, state=SpanState.QUARANTINED)),
        serving=_version(serving) if serving else None,
        agents=AgentRoute.objects.filter(
            agent__project=project, interval__ends_at=None, interval__model=serving, interval__isnull=False
        ).count(),
        versions=[_version(one) for one in models if one.status != ModelStatus.ARCHIVED][:6],
        not_asked_for=_not_asked_for(project, models, serving),
        rewards=rewards.rows,
        shared_scenarios=rewards.scenarios,
        not_shared=rewards.left_out,
        evaluations=list(_coming(project)),
        failed_batches=list(_failed_batches(project)),
        failed_evaluations=list(_failed_evaluations(project)),
        failed_deployments=list(_failed_deployments(project)),
        parts=[Part(name=name, ok=part.ok, detail=part.detail) for name, part in health.far().items()],
        ready=_readiness(project, recorded),
        needed_groups=policy.min_scenario_groups,
    )


def _count(rows: QuerySet[Row]) -> int:
    """Up to one more than `UP_TO`."""
    return rows.order_by()[: UP_TO + 1].count()


def _version(model: TrainedModel) -> Version:
    return Version(pk=model.pk, name=model.version, status=model.status, status_label=model.get_status_display())


def _serving(project: Project) -> TrainedModel | None:
    """What serves everyone; None: the bare base."""
    rows = ServingInterval.objects.filter(project=project, audience=EVERYONE, slot=STABLE, ends_at=None)
    found = rows.select_related("model").first()
    return found.model if found else None


def _not_asked_for(project: Project, models: Sequence[TrainedModel], serving: TrainedModel | None) -> Version | None:
    """The newest version, if it could serve and nobody said anything about it yet."""
    newest = next((one for one in models if one.status == ModelStatus.READY), None)
    if newest is None or (serving is not None and newest.ordinal < serving.ordinal):
        return None
    if Deployment.objects.filter(project=project, model=newest).exclude(state=DeploymentState.WITHDRAWN).exists():
        return None
    return _version(newest)


# --- readiness ------------------------------------------------------------------------------------------------------


def _readiness(project: Project, recorded: int) -> Ready:
    """Of the last look of the checks; of a small project they are made now, which costs little."""
    kept = _kept_checks(project)
    if recorded <= SMALL or not kept:
        data: object = readiness.check(project).body()
    else:
        data = kept[-1].data
    if not isinstance(data, dict):
        return Ready()
    checks = [
        CheckNow(
            name=row["check"],
            value=row["value"],
            threshold=row["threshold"],
            ok=row["ok"],
            detail=row["detail"],
            trend=_trend(kept, row["check"], row["value"]),
        )
        for row in data["reasons"]
    ]
    return Ready(
        is_ready=data["ready"],
        reason=data["reason"],
        mode=data["mode"],
        forecast=_time(data["forecast"]),
        looked_at=_time(data["as_of"]),
        checks=checks,
        usable_groups=data["stats"]["usable_groups"],
    )


def _time(said: object) -> datetime | None:
    return datetime.fromisoformat(said) if isinstance(said, str) else None


def _kept_checks(project: Project) -> list[ReadinessSnapshot]:
    """The last day's, oldest first, as many as a small curve has points."""
    since = timezone.now() - timedelta(days=1)
    rows = ReadinessSnapshot.objects.filter(project=project, created_at__gte=since).order_by("-pk")
    pks = list(rows.values_list("pk", flat=True)[:2000])
    every = max(1, -(-len(pks) // TREND))
    return list(ReadinessSnapshot.objects.filter(pk__in=pks[::every]).order_by("pk"))


def _trend(kept: Iterable[ReadinessSnapshot], name: str, now: float) -> list[float]:
    values = []
    for one in kept:
        rows = one.data.get("reasons", ()) if isinstance(one.data, dict) else ()
        values += [float(row["value"]) for row in rows if row.get("check") == name]
    return [*values, float(now)]


# --- under way, and gone wrong ---------------------------------------------------------------------------------------


def _coming(project: Project) -> Iterable[Coming]:
    live = (EvaluationState.PENDING, EvaluationState.RUNNING)
    rows = Evaluation.objects.filter(project=project, state__in=live).select_related("candidate", "baseline", "project")
    for one in rows.order_by("-pk")[:5]:
        found = evaluation.progress(one)
        name = f"{one.candidate} against {one.baseline or 'the base'}"
        yield Coming(pk=one.pk, name=name, done=found.done, wanted=found.wanted)


def _failed_batches(project: Project) -> Iterable[Failed]:
    """Those since the last one that came to something."""
    mine = TrainingBatch.objects.filter(project=project).order_by("-pk")
    worked = mine.filter(status__in=(BatchStatus.COMPLETED, *LIVE_BATCH)).values_list("pk", flat=True).first()
    rows = mine.filter(status=BatchStatus.FAILED, archived_at=None, pk__gt=worked or 0)
    for one in rows[:FAILED]:
        yield Failed(pk=one.pk, name=str(one), why=one.error[:300], at=one.status_since)


def _failed_evaluations(project: Project) -> Iterable[Failed]:
    rows = Evaluation.objects.filter(project=project).select_related("candidate").order_by("candidate_id", "-pk")
    newest = rows.filter(created_at__gte=timezone.now() - LATELY).distinct("candidate_id")
    failed = sorted((one for one in newest if one.state == EvaluationState.FAILED), key=lambda one: -one.pk)
    for one in failed[:FAILED]:
        yield Failed(pk=one.pk, name=f"evaluation of {one.candidate}", why=one.error[:300], at=one.state_since)


def _failed_deployments(project: Project) -> Iterable[Failed]:
    """Those since the last one that serves or served."""
    mine = Deployment.objects.filter(project=project).select_related("model").order_by("-pk")
    served = (DeploymentState.ACTIVE, DeploymentState.SUPERSEDED)
    worked = mine.filter(state__in=served).values_list("pk", flat=True).first()
    for one in mine.filter(state=DeploymentState.FAILED, pk__gt=worked or 0)[:FAILED]:
        yield Failed(pk=one.pk, name=f"deployment of {one.model}", why=one.error[:300], at=one.state_since)
