"""What the admin's pages show, as typed objects. Only rows are read here, never a payload."""

from collections.abc import Sequence
from dataclasses import dataclass

from django.db import connection
from django.db.models import Avg, Count, Q, QuerySet, Sum
from django.utils import timezone

from training import batches, evaluation, plots, policies, readiness, routing, status
from training.models import (
    LIVE_BATCH,
    LIVE_RUN,
    BatchGroup,
    BatchItem,
    Deployment,
    DeploymentState,
    Evaluation,
    ModelStatus,
    RunMetric,
    ServingInterval,
    TrainedModel,
    TrainingBatch,
    TrainingRun,
)
from training.plots import Bar, Plot
from trainingsite.health import Health
from trajectories.models import Group, Judging, Project

# The first row is what tells a good run from a bad one; the loss comes last, it tells least.
CURVES = (
    ("entropy", "entropy (nats)"),
    ("kl_behaviour", "KL to the behaviour (nats a token)"),
    ("drift", "mean |ratio − 1|"),
    ("share_without_spread", "share of groups without spread"),
    ("reward_mean", "reward of the batch"),
    ("grad_norm", "gradient norm"),
    ("clipped_share", "clipped share"),
    ("tokens_per_second", "tokens a second"),
    ("loss", "loss"),
)


def curves(run: TrainingRun) -> list[Plot]:
    """One plot a measure, of what the trainer wrote so far."""
    rows = list(RunMetric.objects.filter(run=run).order_by("step").values_list("step", "values"))
    steps = [float(step) for step, _ in rows]
    found = []
    for name, title in CURVES:
        values = [_number(row.get(name)) if isinstance(row, dict) else None for _, row in rows]
        limit = policies.of(run.batch.project).max_drift if name == "drift" else None
        plot = plots.line(title, steps, values, limit=limit)
        if plot is not None:
            found.append(plot)
    return found


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


# --- batches and runs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Behaviour:
    """Who played a part of a batch."""

    name: str
    n: int
    reward: float | None  # mean of the mixed ones


def _behaviours(items: QuerySet[BatchItem]) -> list[Behaviour]:
    rows = items.values_list("batch_group__behaviour").annotate(n=Count("pk"), mean=Avg("reward")).order_by("-n")[:20]
    return [Behaviour(name or "without a group", n, mean) for name, n, mean in rows]


@dataclass(frozen=True)
class BatchPage:
    model: TrainedModel | None
    progress: float
    eta_seconds: float | None
    is_live: bool
    runs: Sequence[TrainingRun]
    curves: Sequence[Plot]
    used: Sequence[BatchGroup]
    left_out: Sequence[dict[str, object]]
    advantages: Sequence[Bar]
    rewards: Sequence[Bar]
    behaviours: Sequence[Behaviour]
    n_trained: int
    held_out: Plot | None  # reward on held-out scenarios by version, up to this batch's
    without_spread: float | None
    changed: Sequence["ChangedReward"]  # of the recorded rewards, since they were frozen; the first hundred
    n_changed: int


@dataclass(frozen=True)
class ChangedReward:
    """A trajectory of a frozen batch whose recorded reward is another now: the batch keeps what it learned from."""

    trajectory: int
    trajectory_ref: str
    was: float | None
    now: float | None


_CHANGED = """
    select t.id, i.trajectory_ref, (i.parts->'recorded'->>'raw')::float8, t.reward
    from batch_items i join trajectories t on t.id = i.trajectory_id
    where i.batch_id = %s and i.parts ? 'recorded' and (i.parts->'recorded'->>'raw')::float8 is distinct from t.reward
    order by i.id
"""


def changed_rewards(batch: TrainingBatch) -> list[ChangedReward]:
    """What a batch would see otherwise if it were frozen now."""
    with connection.cursor() as cursor:
        cursor.execute(_CHANGED, [batch.pk])
        return [ChangedReward(*row) for row in cursor.fetchall()]


def batch_page(batch: TrainingBatch) -> BatchPage:
    attempts = list(batch.runs.order_by("-attempt"))
    items = BatchItem.objects.filter(batch=batch)
    values = list(items.values_list("advantage", "reward")[:20_000])
    model = TrainedModel.objects.filter(batch=batch).first()
    groups = batch.groups.select_related("group", "group__scenario")
    used = list(groups.filter(is_used=True).order_by("pk")[:100])
    flat = [one for one in used if one.std == 0]
    changed = changed_rewards(batch)
    left_out = batch.groups.filter(is_used=False).order_by().values("left_out").annotate(n=Count("pk")).order_by("-n")
    return BatchPage(
        model=model,
        progress=batches.progress(batch),
        eta_seconds=batches.eta_seconds(batch),
        is_live=batch.status in LIVE_BATCH,
        runs=attempts,
        curves=curves(attempts[0]) if attempts else (),
        used=used,
        left_out=[{"reason": row["left_out"], "n": row["n"]} for row in left_out],
        advantages=plots.histogram([advantage for advantage, _ in values]),
        rewards=plots.histogram([reward for _, reward in values if reward is not None]),
        behaviours=_behaviours(items),
        n_trained=items.filter(is_trained=True).count(),
        held_out=reward_by_version(batch.project, until=model.ordinal if model else None),
        without_spread=len(flat) / len(used) if used else None,
        changed=changed[:100],
        n_changed=len(changed),
    )


def reward_by_version(project: Project, until: int | None = None) -> Plot | None:
    """Mean reward of each version on held-out scenarios, with the intervals of its newest evaluation."""
    done = Evaluation.objects.filter(project=project, state="done").select_related("candidate").order_by("pk")
    newest = {one.candidate_id: one for one in done}
    rows = sorted(newest.values(), key=lambda one: one.candidate.ordinal)
    if until is not None:
        rows = [one for one in rows if one.candidate.ordinal <= until]
    told = [(one.candidate, one.result["candidate"]) for one in rows if isinstance(one.result, dict)]
    return plots.line(
        "reward on scenarios kept apart, by version",
        [float(model.ordinal) for model, _ in told],
        [float(side["mean"]) for _, side in told],
        labels=[f"{model}: {side['mean']:.3f} [{side['lower']:.3f}, {side['upper']:.3f}]" for model, side in told],
        bounds=[(float(side["lower"]), float(side["upper"])) for _, side in told],
    )


def reward_by_player(project: Project) -> Plot | None:
    """Mean recorded reward of what agents really did, evaluations aside, by the version that played it."""
    rows = (
        Group.objects.filter(project=project, is_evaluation=False, policy_minor__isnull=False, reward_n__gt=0)
        .values_list("policy_minor", "behaviour")
        .annotate(total=Sum("reward_sum"), n=Sum("reward_n"))
        .order_by("policy_minor")
    )
    told = [(float(ordinal or 0), name, total / n, n) for ordinal, name, total, n in rows]
    return plots.line(
        "reward of agents' own runs, by the version they were given",
        [ordinal for ordinal, _, _, _ in told],
        [mean for _, _, mean, _ in told],
        labels=[f"{name}: {mean:.3f}, {n} runs" for _, name, mean, n in told],
    )


# --- versions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelPage:
    sentence: str
    verdict: str  # "better", "not shown", "" when not evaluated
    evaluations: Sequence[tuple[Evaluation, str]]
    deployments: Sequence[Deployment]
    intervals: Sequence[ServingInterval]
    parents: Sequence[TrainedModel]  # up to the base, nearest first
    children: Sequence[TrainedModel]
    agents: int
    is_placebo: bool
    behaviours: Sequence[Behaviour]
    groups: Sequence[BatchGroup]
    run: TrainingRun | None


def model_page(model: TrainedModel) -> ModelPage:
    evaluations = list(model.evaluations.select_related("candidate", "baseline").order_by("-pk")[:10])
    told = [(one, evaluation.sentence(one)) for one in evaluations]
    newest = next((one for one in evaluations if isinstance(one.result, dict)), None)
    sentence, verdict = _verdict(newest)
    parents: list[TrainedModel] = []
    parent = model.parent
    while parent is not None and len(parents) < 50:
        parents.append(parent)
        parent = parent.parent
    items = BatchItem.objects.filter(batch=model.batch_id) if model.batch_id else BatchItem.objects.none()
    return ModelPage(
        sentence=sentence,
        verdict=verdict,
        evaluations=told,
        deployments=list(model.deployments.order_by("-pk")[:10]),
        intervals=list(model.serving_intervals.order_by("-starts_at")[:20]),
        parents=parents,
        children=list(model.children.order_by("ordinal")[:50]),
        agents=routing.agents_of(model),
        is_placebo=bool(model.batch and model.batch.shuffle_rewards),
        behaviours=_behaviours(items),
        groups=list(model.batch.groups.filter(is_used=True).select_related("group__scenario").order_by("pk")[:40])
        if model.batch
        else (),
        run=model.run,
    )


def _verdict(newest: Evaluation | None) -> tuple[str, str]:
    """One sentence first: what the evaluation says of the version."""
    if newest is None or not isinstance(newest.result, dict):
        return "Not evaluated yet: nobody knows whether it is better.", ""
    result, gain = newest.result, newest.result["gain"]
    better = gain["lower"] > 0
    other = newest.baseline or "the base"
    words = "shown to be better" if better else "not shown to be better"
    return (
        f"Against {other}: better on {result['better']}, worse on {result['worse']} of {result['scenarios']}, "
        f"{gain['mean']:+.3f} [{gain['lower']:+.3f}, {gain['upper']:+.3f}]: {words}.",
        "better" if better else "not shown",
    )


@dataclass(frozen=True)
class EvaluationPage:
    sentence: str
    progress: evaluation.Progress
    regressions: Sequence[dict[str, object]]


def evaluation_page(one: Evaluation) -> EvaluationPage:
    result = one.result if isinstance(one.result, dict) else {}
    return EvaluationPage(evaluation.sentence(one), evaluation.progress(one), list(result.get("regressions", [])))


@dataclass(frozen=True)
class DeploymentPage:
    sentence: str
    gates: Sequence[object]
    model: ModelPage
    why_not_me: str  # why this person may not decide; "" when they may
    approval: object | None
    is_open: bool


# --- the first page ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProjectView:
    """One project on the first page."""

    project: Project
    readiness: dict[str, object] | None
    age_seconds: float | None
    collection: dict[str, object]
    batch: TrainingBatch | None
    progress: float
    eta_seconds: float | None
    serving: TrainedModel | None
    versions: Sequence[TrainedModel]
    rewards: Plot | None
    played: Plot | None
    waiting: Sequence[Deployment]
    judge_errors: int
    to_judge: int
    n_trajectories_7d: int


def project_view(project: Project) -> ProjectView:
    snapshot = readiness.latest(project)
    live = TrainingBatch.objects.filter(project=project, status__in=LIVE_BATCH).order_by("-pk").first()
    collected = status.collection(project)
    groups = Group.objects.filter(project=project).aggregate(
        errors=Count("pk", filter=Q(judging=Judging.ERROR)),
        pending=Count("pk", filter=Q(judging=Judging.PENDING, state="closed")),
    )
    return ProjectView(
        project=project,
        readiness=snapshot.data if snapshot and isinstance(snapshot.data, dict) else None,
        age_seconds=(timezone.now() - snapshot.created_at).total_seconds() if snapshot else None,
        collection=collected,
        batch=live,
        progress=batches.progress(live) if live else 0.0,
        eta_seconds=batches.eta_seconds(live) if live else None,
        serving=routing.serving_now(project),
        versions=list(
            TrainedModel.objects.filter(project=project).exclude(status=ModelStatus.ARCHIVED).order_by("-ordinal")[:6]
        ),
        rewards=reward_by_version(project),
        played=reward_by_player(project),
        waiting=list(
            Deployment.objects.filter(project=project, state=DeploymentState.REQUESTED)
            .select_related("model")
            .order_by("-pk")[:10]
        ),
        judge_errors=groups["errors"],
        to_judge=groups["pending"],
        n_trajectories_7d=int(str(collected["last_7d"])),
    )


@dataclass(frozen=True)
class Dashboard:
    projects: Sequence[ProjectView]
    health: dict[str, Health]
    runs: Sequence[TrainingRun]


def dashboard(projects: Sequence[Project], health: dict[str, Health]) -> Dashboard:
    live = TrainingRun.objects.filter(status__in=LIVE_RUN, batch__project__in=projects).select_related("batch__project")
    return Dashboard([project_view(one) for one in projects], health, list(live[:20]))
