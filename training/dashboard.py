"""What the first page shows: each project's last snapshot, with what is under way this minute beside it.

However many projects: one query for the snapshots, two for live batches, one for deployments.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from django.conf import settings
from django.contrib.auth.models import User
from django.db.models import Prefetch
from django.urls import reverse
from django.utils import timezone

from training import boards, plots, runs, tasks
from training.boards import Board, CheckNow
from training.models import LIVE_BATCH, BatchStatus, Deployment, DeploymentState, TrainingBatch, TrainingRun
from training.plots import Forest, Spark
from trainingsite.celery import nudge
from trainingsite.health import Health
from trajectories import rights
from trajectories.models import Project, Role

MOST = 20  # projects on the page
IN_FULL = 3  # with more, each is one line and the chosen one is shown whole
OLD = 180  # seconds: then something is wrong with who takes them


@dataclass(frozen=True)
class Waiting:
    """Something that waits for the person who looks."""

    text: str
    url: str
    more: str = ""
    since: datetime | None = None
    is_bad: bool = False


@dataclass(frozen=True)
class Stage:
    """A station of the loop, and the arrow that leads on from it."""

    name: str
    url: str
    value: str
    note: str
    arrow: str  # the number on it
    arrow_note: str
    is_live: bool = False
    progress: float | None = None


@dataclass(frozen=True)
class Rate:
    """Recordings an hour over some time, and how long one batch takes at that rate."""

    name: str
    per_hour: float
    seconds: float | None  # None: never at this rate
    is_enough: bool


@dataclass(frozen=True)
class CheckRow:
    check: CheckNow
    label: str
    spark: Spark | None
    change: str  # since the beginning of the trend
    share: float  # of the threshold, at most 1


@dataclass(frozen=True)
class Live:
    """Something under way."""

    text: str
    url: str
    state: str
    note: str = ""
    progress: float | None = None
    eta_seconds: float | None = None


@dataclass(frozen=True)
class ProjectView:
    project: Project
    board: Board | None  # None: nobody has looked yet
    taken_at: datetime | None
    is_old: bool
    in_full: bool
    stages: Sequence[Stage]
    rates: Sequence[Rate]
    need_per_hour: float
    arrivals: Spark | None
    checks: Sequence[CheckRow]
    live: Sequence[Live]
    rewards: Forest | None
    is_empty: bool
    may_send: bool  # may make a key: an operator


@dataclass(frozen=True)
class Dashboard:
    projects: Sequence[ProjectView]
    waiting: Sequence[Waiting]
    health: Mapping[str, Health]
    taken_at: datetime | None  # the oldest snapshot on the page
    chosen: str  # slug, "" for none
    has_several: bool
    site_url: str
    gateway_url: str


LABELS = {
    "trajectories": "trajectories in usable groups",
    "scenario_groups": "usable groups",
    "data_quality": "data quality",
    "reward_mix": "reward mix",
}


def of(user: User, held: rights.Held, near: Mapping[str, Health], *, site_url: str, chosen: str = "") -> Dashboard:
    """The page for this person.

    Args:
        near: the parts that this process sees by itself.
        site_url: as the person reaches the site, for the commands they may copy.
        chosen: slug of the one project that is shown whole, where there are many.
    """
    projects = list(rights.projects(user).order_by("-pk")[:MOST])
    looked = boards.newest(projects)
    live = _live_batches(projects)
    asked = _deployments(projects)
    now = timezone.now()
    views: list[ProjectView] = []
    waiting: list[Waiting] = []
    parts: dict[str, Health] = dict(near)
    for project in projects:
        board, taken_at = looked.get(project.pk, (None, None))
        if taken_at is None or now - taken_at > boards.STALE:
            nudge(tasks.take_board, project.pk)
        roles = held.of(project)
        whole = project.slug == chosen or (not chosen and len(projects) <= IN_FULL)
        of_project = asked.get(project.pk, [])
        named = f"{project.slug}: " if len(projects) > 1 else ""
        waiting += _waiting(project, board, of_project, user, roles, named)
        views.append(
            _view(project, board, taken_at, live.get(project.pk), of_project, whole, now, Role.OPERATOR in roles)
        )
        for part in board.parts if board else ():
            if part.name not in parts or not part.ok:
                parts[part.name] = Health(part.ok, part.detail)
    times = [one.taken_at for one in views if one.taken_at is not None]
    return Dashboard(
        projects=views,
        waiting=waiting,
        health=parts,
        taken_at=min(times, default=None),
        chosen=chosen if any(one.project.slug == chosen for one in views) else "",
        has_several=len(projects) > IN_FULL,
        site_url=site_url,
        gateway_url=settings.GATEWAY_URL or f"http://127.0.0.1:{settings.GATEWAY_PORT}",
    )


def _live_batches(projects: Collection[Project]) -> dict[int, tuple[TrainingBatch, TrainingRun | None]]:
    """By project: there is at most one live batch in each."""
    newest = Prefetch("runs", TrainingRun.objects.defer("log_tail", "result").order_by("-attempt"), to_attr="attempts")
    rows = TrainingBatch.objects.filter(project__in=projects, status__in=LIVE_BATCH)
    rows = rows.defer("readiness", "hyperparameters", "reward_mix").prefetch_related(newest)
    found: dict[int, tuple[TrainingBatch, TrainingRun | None]] = {}
    for one in rows:
        attempts: list[TrainingRun] = getattr(one, "attempts", [])
        found[one.project_id] = one, (attempts[0] if attempts else None)
    return found


def _deployments(projects: Collection[Project]) -> dict[int, list[Deployment]]:
    """Those that wait for a decision or are being rolled out."""
    open_ones = (DeploymentState.REQUESTED, DeploymentState.APPROVED, DeploymentState.ROLLING_OUT)
    rows = Deployment.objects.filter(project__in=projects, state__in=open_ones).select_related("model")
    found: defaultdict[int, list[Deployment]] = defaultdict(list)
    for one in rows.defer("evidence", "gates").order_by("-pk")[:100]:
        found[one.project_id].append(one)
    return found


# --- what waits for me -----------------------------------------------------------------------------------------------


def _waiting(
    project: Project,
    board: Board | None,
    asked: Sequence[Deployment],
    user: User,
    roles: Collection[str],
    named: str,
) -> Iterable[Waiting]:
    """Only what this person can act on."""
    if Role.APPROVER in roles:
        for deployment in asked:
            if deployment.state == DeploymentState.REQUESTED and deployment.requested_by_id != user.pk:
                said = f"asked for by {deployment.requested_by_name}"
                url = reverse("admin:training_deployment_change", args=[deployment.pk])
                yield Waiting(f"{named}{deployment.model} waits for your decision", url, said, deployment.created_at)
    if board is None:
        return
    if Role.OPERATOR in roles and board.not_asked_for is not None:
        url = reverse("admin:training_trainedmodel_change", args=[board.not_asked_for.pk])
        yield Waiting(
            f"{named}{board.not_asked_for.name} is ready", url, "ask for its deployment, or let an approver reject it"
        )
    if Role.RESEARCHER in roles:
        groups = reverse("admin:trajectories_group_changelist")
        where = f"project={project.pk}"
        if board.judge_errors:
            said = f"{named}{_many(board.judge_errors, 'group')} could not be judged"
            yield Waiting(said, f"{groups}?{where}&judging__exact=judge_error", is_bad=True)
        if board.held:
            yield Waiting(f"{named}{_many(board.held, 'group')} held for review", f"{groups}?{where}&state__exact=held")
        if board.quarantined:
            url = reverse("admin:trajectories_otelrecord_changelist")
            said = f"{named}{_many(board.quarantined, 'span')} in quarantine"
            yield Waiting(said, f"{url}?{where}&state__exact=quarantined", is_bad=True)
        for failed, name in ((board.failed_batches, "trainingbatch"), (board.failed_evaluations, "evaluation")):
            for one in failed:
                url = reverse(f"admin:training_{name}_change", args=[one.pk])
                yield Waiting(f"{named}{one.name} failed", url, one.why, one.at, True)
    if Role.OPERATOR in roles:
        for one in board.failed_deployments:
            url = reverse("admin:training_deployment_change", args=[one.pk])
            yield Waiting(f"{named}{one.name} failed", url, one.why, one.at, True)


def _many(n: int, noun: str) -> str:
    if n > boards.UP_TO:
        return f"more than {boards.UP_TO:,} {noun}s"
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


# --- one project -----------------------------------------------------------------------------------------------------


def _view(
    project: Project,
    board: Board | None,
    taken_at: datetime | None,
    live: tuple[TrainingBatch, TrainingRun | None] | None,
    asked: Sequence[Deployment],
    in_full: bool,
    now: datetime,
    may_send: bool,
) -> ProjectView:
    need = board.need / board.interval_hours if board and board.interval_hours else 0.0
    return ProjectView(
        project=project,
        board=board,
        taken_at=taken_at,
        is_old=taken_at is not None and (now - taken_at).total_seconds() > OLD,
        in_full=in_full,
        stages=_stages(project, board, live, asked) if board else (),
        rates=_rates(board, need) if board else (),
        need_per_hour=need,
        arrivals=plots.spark(board.hours, limit=need or None, bars=True) if board and any(board.hours) else None,
        checks=[_check(one) for one in board.ready.checks] if board else (),
        live=list(_live(board, live, asked)),
        rewards=_rewards(board) if board else None,
        is_empty=board is not None and not (board.recorded or board.versions or live or asked),
        may_send=may_send,
    )


def _stages(
    project: Project,
    board: Board,
    live: tuple[TrainingBatch, TrainingRun | None] | None,
    asked: Sequence[Deployment],
) -> list[Stage]:
    where = f"?project={project.pk}"
    waits = [one for one in asked if one.state == DeploymentState.REQUESTED]
    missing = max(0, board.needed_groups - board.ready.usable_groups)
    ready = sum(one.status == "ready" for one in board.versions)
    train = _train_stage(board, live)
    return [
        Stage(
            "Record",
            reverse("admin:trajectories_trajectory_changelist") + where,
            f"{board.last_7d:,}",
            "trajectories in 7 days",
            f"{board.last_24h:,}",
            "in 24 h",
        ),
        Stage(
            "Judge",
            reverse("admin:trajectories_group_changelist") + where,
            f"{board.ready.usable_groups:,}",
            "usable groups" + (f", {_many(board.to_judge, 'group')} to judge" if board.to_judge else ""),
            "ready" if board.ready.is_ready else f"{missing:,}" if missing else "not ready",
            "" if board.ready.is_ready else "groups short" if missing else "",
        ),
        Stage(
            "Train",
            train.url,
            train.text,
            train.note,
            f"{ready:,}" if ready else "–",
            "ready" if ready else "no new version",
            live is not None,
            train.progress,
        ),
        Stage(
            "Deploy",
            reverse("admin:training_deployment_changelist") + where,
            board.serving.name if board.serving else "the base",
            f"serves; {len(waits)} waiting for a decision" if waits else "serves",
            f"{board.agents:,}",
            "agent uses it" if board.agents == 1 else "agents use it",
        ),
        Stage(
            "Operate",
            reverse("admin:trajectories_agent_changelist") + where,
            f"{board.per_hour_now:,.0f}",
            "trajectories in the last hour",
            "",
            "",
        ),
    ]


def _train_stage(board: Board, live: tuple[TrainingBatch, TrainingRun | None] | None) -> Live:
    if live is not None:
        batch, run = live
        url = reverse("admin:training_trainingbatch_change", args=[batch.pk])
        return Live(str(batch.get_status_display()), url, batch.status, str(batch), _share(batch, run))
    url = reverse("admin:training_trainingbatch_changelist")
    if not board.trains_by_itself:
        note = "starts when a person says so"
    elif board.ready.is_ready is None:
        note = "not looked at yet"
    elif board.ready.is_ready and board.next_due is not None and board.next_due > timezone.now():
        note = f"next batch {board.next_due:%d %b, %H:%M} UTC"
    else:
        note = "next batch is due" if board.ready.is_ready else "waits for enough to learn from"
    return Live("idle", url, "idle", note)


def _share(batch: TrainingBatch, run: TrainingRun | None) -> float:
    if batch.status == BatchStatus.UPLOADING:
        return 1.0
    return runs.progress(run) if run else 0.0


def _live(
    board: Board | None, live: tuple[TrainingBatch, TrainingRun | None] | None, asked: Sequence[Deployment]
) -> Iterable[Live]:
    if live is not None:
        batch, run = live
        url = reverse("admin:training_trainingbatch_change", args=[batch.pk])
        note = f"step {run.step} of {run.total_steps or '?'}" if run is not None and run.step else batch.error[:200]
        eta = runs.eta_seconds(run) if run is not None and batch.status == BatchStatus.TRAINING else None
        yield Live(str(batch), url, batch.get_status_display(), note, _share(batch, run), eta)
    for one in board.evaluations if board else ():
        url = reverse("admin:training_evaluation_change", args=[one.pk])
        share = one.done / one.wanted if one.wanted else 0.0
        yield Live(one.name, url, "evaluation", f"{one.done} of {one.wanted} attempts", share)
    for deployment in asked:
        if deployment.state != DeploymentState.REQUESTED:
            url = reverse("admin:training_deployment_change", args=[deployment.pk])
            yield Live(f"rollout of {deployment.model}", url, deployment.get_state_display(), deployment.error[:200])


def _rates(board: Board, need: float) -> list[Rate]:
    since = len(board.hours)
    first = next((number for number, n in enumerate(board.hours) if n), since)
    hours = max(1, since - first)  # a project two days old is not held to seven
    found = (
        ("in the last hour", board.per_hour_now),
        ("over 24 h", board.last_24h / min(24, hours)),
        ("over 7 days", board.last_7d / hours),
    )
    return [
        Rate(name, rate, 3600 * board.need / rate if rate else None, bool(need) and rate >= need)
        for name, rate in found
    ]


def _check(one: CheckNow) -> CheckRow:
    return CheckRow(
        check=one,
        label=LABELS.get(one.name, one.name),
        spark=plots.spark(one.trend, limit=one.threshold) if len(one.trend) > 2 else None,
        change=_change(one.value - one.trend[0] if one.trend else 0.0),
        share=min(1.0, one.value / one.threshold) if one.threshold else 1.0,
    )


def _change(difference: float) -> str:
    if abs(difference) < 1e-9:
        return "as it was"
    return f"{'↑' if difference > 0 else '↓'} {plots.number_text(abs(difference))}"


def _rewards(board: Board) -> Forest | None:
    return plots.forest(
        [
            (
                one.name,
                one.mean,
                one.lower,
                one.upper,
                f"{one.attempts:,}",
                reverse("admin:training_trainedmodel_change", args=[one.pk]) if one.pk else "",
            )
            for one in board.rewards
        ]
    )
