"""What the pages of a version, an evaluation and a deployment show: first what is known of it, then what it is made of.

Rows alone are read, never a payload; each page asks the same few questions however much a version learned from.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from django.contrib.auth.models import User
from django.db import connection
from django.db.models import Q
from django.urls import reverse
from django.utils import timezone

from training import deployments, evaluation, family, plots
from training.family import Family
from training.models import (
    BatchItem,
    Deployment,
    DeploymentState,
    Evaluation,
    EvaluationState,
    ModelStatus,
    RewardJudgment,
    ServingInterval,
    Side,
    TrainedModel,
)
from training.plots import Forest
from training.routing import EVERYONE, STABLE
from trajectories.models import Project, Role, Trajectory

AGENTS = 24  # are named
GROUPS = 60  # of a batch are opened down to their judgments, at most
CONFIG_BYTES = 65_536


@dataclass(frozen=True)
class Transcript:
    pk: int
    reward: float | None


@dataclass(frozen=True)
class Regression:
    """A scenario on which the candidate got worse, with what both sides did there."""

    scenario: str
    candidate: float
    baseline: float
    gain: float
    ours: Sequence[Transcript]
    theirs: Sequence[Transcript]


@dataclass(frozen=True)
class Verdict:
    """What an evaluation says, in one sentence and its conclusion."""

    sentence: str
    conclusion: str
    kind: str  # "good", "bad" or "": a CSS class
    evaluation: Evaluation | None


@dataclass(frozen=True)
class Decision:
    """Something that may be done about a deployment, on the version's own page."""

    label: str
    url: str
    is_first: bool


@dataclass(frozen=True)
class Cost:
    prompt_tokens: int | None  # of the recorded trajectories
    completion_tokens: int | None
    judge_tokens: int | None
    judge_cost: float | None
    runs: int
    run_seconds: float
    trained_tokens: int | None


@dataclass(frozen=True)
class Adapter:
    rank: int | None
    alpha: float | None
    is_here: bool  # its folder is on this machine


@dataclass(frozen=True)
class ModelPage:
    verdict: Verdict
    if_nothing: str
    decisions: Sequence[Decision]
    why_not_me: str
    comparisons: Forest | None  # gains, one an evaluation that is done
    evaluations: Sequence[tuple[Evaluation, str]]  # with what the other side is: "parent", "serves now"
    missing: Sequence[str]  # comparisons that nobody made
    regressions: Sequence[Regression]
    deployments: Sequence[Deployment]
    intervals: Sequence[ServingInterval]
    family: Family
    n_judgments: int
    n_judge_calls: int
    agents: Sequence[str]
    n_agents: int
    cost: Cost
    adapter: Adapter
    is_placebo: bool


def model_page(model: TrainedModel, user: User | None, roles: Collection[str]) -> ModelPage:
    project = model.project
    done = list(model.evaluations.select_related("candidate", "baseline", "project").order_by("-pk")[:20])
    open_intervals = Q(ends_at=None, audience=EVERYONE, slot=STABLE)
    intervals = list(
        ServingInterval.objects.filter(Q(model=model) | open_intervals, project=project)
        .select_related("model")
        .order_by("-starts_at")[:60]
    )
    now = next((one for one in intervals if (one.ends_at, one.audience, one.slot) == (None, EVERYONE, STABLE)), None)
    serving = now.model if now else None
    asked = list(model.deployments.select_related("approval", "replaces").order_by("-pk")[:20])
    counted = _counted(model)
    verdict = _verdict(_telling(done, serving))
    why_not, decisions = _decisions(asked, user, roles)
    return ModelPage(
        verdict=verdict,
        if_nothing=_if_nothing(model, asked, serving, counted.n_agents),
        decisions=decisions,
        why_not_me=why_not,
        comparisons=_comparisons(done, model, serving),
        evaluations=[(one, _what_is(one.baseline, model, serving)) for one in done],
        missing=list(_missing(model, done, serving)),
        regressions=regressions(verdict.evaluation) if verdict.evaluation else (),
        deployments=asked,
        intervals=[one for one in intervals if one.model_id == model.pk],
        family=family.of(model),
        n_judgments=counted.n_judgments,
        n_judge_calls=counted.n_judge_calls,
        agents=counted.agents,
        n_agents=counted.n_agents,
        cost=counted.cost,
        adapter=_adapter(model),
        is_placebo=bool(model.batch and model.batch.shuffle_rewards),
    )


# --- what is known ---------------------------------------------------------------------------------------------------


def _telling(done: Sequence[Evaluation], serving: TrainedModel | None) -> Evaluation | None:
    """Against what serves now, else the newest that came to an end."""
    finished = [one for one in done if one.state == EvaluationState.DONE and isinstance(one.result, dict)]
    now = [one for one in finished if one.baseline_id == (serving.pk if serving else None)]
    return next(iter(now or finished), None)


def _verdict(one: Evaluation | None) -> Verdict:
    if one is None or not isinstance(one.result, dict):
        return Verdict("Not evaluated yet", "nobody knows whether it is better", "", None)
    result, gain = one.result, one.result["gain"]
    if gain["lower"] > 0:
        conclusion, kind = "shown to be better", "good"
    elif gain["upper"] < 0:
        conclusion, kind = "shown to be worse", "bad"
    else:
        conclusion, kind = "not shown to be better", "bad"
    other = one.baseline.version if one.baseline else "the base"
    sentence = (
        f"Against {other}: better on {result['better']}, worse on {result['worse']} of {result['scenarios']}, "
        f"{gain['mean']:+.3f} [{gain['lower']:+.3f}, {gain['upper']:+.3f}]"
    )
    return Verdict(sentence, conclusion, kind, one)


def _what_is(other: TrainedModel | None, model: TrainedModel, serving: TrainedModel | None) -> str:
    said = []
    if (other.pk if other else None) == model.parent_id:
        said.append("its parent")
    if (other.pk if other else None) == (serving.pk if serving else None):
        said.append("serves now")
    return ", ".join(said)


def _comparisons(done: Iterable[Evaluation], model: TrainedModel, serving: TrainedModel | None) -> Forest | None:
    """The gain over each version it was tried against, the newest of each."""
    rows: dict[int | None, tuple[str, float, float, float, str, str]] = {}
    for one in done:
        if one.baseline_id in rows or not isinstance(one.result, dict):
            continue
        gain, what = one.result["gain"], _what_is(one.baseline, model, serving)
        name = f"{one.baseline or 'the base'}" + (f" ({what})" if what else "")
        url = reverse("admin:training_evaluation_change", args=[one.pk])
        counts = f"{one.result['better']} / {one.result['worse']} / {one.result['ties']}"
        rows[one.baseline_id] = (name, gain["mean"], gain["lower"], gain["upper"], counts, url)
    return plots.forest(list(rows.values()), signed=True)


def _missing(model: TrainedModel, done: Iterable[Evaluation], serving: TrainedModel | None) -> Iterable[str]:
    tried = {one.baseline_id for one in done if one.state == EvaluationState.DONE}
    if (serving.pk if serving else None) not in tried and serving != model:
        yield f"{serving or 'the base'}, which serves now"
    if model.parent_id not in tried and model.parent_id != (serving.pk if serving else None):
        yield f"{model.parent or 'the base'}, its parent"


def _if_nothing(model: TrainedModel, asked: Sequence[Deployment], serving: TrainedModel | None, n_agents: int) -> str:
    other = serving.version if serving else "the base"
    agents = "1 agent uses" if n_agents == 1 else f"{n_agents:,} agents use"
    if model.status == ModelStatus.DEPLOYED:
        return f"If nothing is done, {model} keeps serving; {agents} it."
    if any(one.state in (DeploymentState.APPROVED, DeploymentState.ROLLING_OUT) for one in asked):
        return f"If nothing is done, {model} takes over from {other} as soon as it is loaded and answers."
    if any(one.state == DeploymentState.REQUESTED for one in asked):
        return f"If nothing is done, agents stay on {other}, and the request goes on waiting."
    if model.status == ModelStatus.READY:
        return f"If nothing is done, agents stay on {other}; nobody has asked for {model} to serve."
    if model.status == ModelStatus.TRAINING:
        return f"It is in training. If nothing is done, it becomes ready or fails by itself; agents stay on {other}."
    return f"If nothing is done, agents stay on {other}."


def _decisions(
    asked: Sequence[Deployment], user: User | None, roles: Collection[str]
) -> tuple[str, Sequence[Decision]]:
    """What this person may do about its deployment, and why they may not decide where one waits."""
    found: list[Decision] = []
    why_not = ""
    for one in asked:
        wanted: list[tuple[str, str]] = []
        if one.state == DeploymentState.REQUESTED:
            if Role.APPROVER in roles and user is not None and one.requested_by_id != user.pk:
                wanted += [("approve", "Approve its deployment"), ("reject", "Reject its deployment")]
            elif Role.APPROVER in roles:
                why_not = "You asked for its deployment; a second person decides on it."
            if Role.OPERATOR in roles:
                wanted.append(("withdraw", "Withdraw the request"))
        elif one.state in (DeploymentState.ACTIVE, DeploymentState.ROLLING_OUT) and Role.OPERATOR in roles:
            wanted.append(("roll-back", "Roll back"))
        for verb, label in wanted:
            url = reverse("admin:training_deployment_do", args=[one.pk, verb])
            found.append(Decision(label, url, verb == "approve"))
    return why_not, found


def regressions(one: Evaluation) -> list[Regression]:
    """The worst ones, with links to what either side did: one query."""
    told = one.result.get("regressions", []) if isinstance(one.result, dict) else []
    names = [row["scenario"] for row in told]
    if not names:
        return []
    played: defaultdict[tuple[str, Side], list[Transcript]] = defaultdict(list)
    rows = (
        Trajectory.objects.filter(
            project=one.project_id, scenario__scenario_id__in=names, evaluation_id=one.evaluation_id
        )
        .order_by("pk")
        .values_list("scenario__scenario_id", "behaviour", "pk", "reward")[:200]
    )
    for scenario, behaviour, pk, reward in rows:
        side = evaluation.side_of(one, behaviour)
        if side is not None and scenario is not None:
            played[scenario, side].append(Transcript(pk, reward))
    return [
        Regression(
            row["scenario"],
            row["candidate"],
            row["baseline"],
            row["gain"],
            played[row["scenario"], Side.CANDIDATE],
            played[row["scenario"], Side.BASELINE],
        )
        for row in told
    ]


# --- what it is made of ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Counted:
    agents: Sequence[str]
    n_agents: int
    n_judgments: int
    n_judge_calls: int
    cost: Cost


_COUNT = """
    with mine as (select trajectory_id, judgments from batch_items where batch_id = %(batch)s),
    calls as (
        select distinct j.judge_call_id as id from reward_judgments j
        where j.id in (select unnest(judgments) from mine) and j.judge_call_id is not null),
    users as (
        select a.agent_id from agent_routes r join serving_intervals i on i.id = r.interval_id
        join agents a on a.id = r.agent_id where i.model_id = %(model)s and i.ends_at is null)
    select
        (select sum(t.prompt_tokens) from trajectories t where t.id in (select trajectory_id from mine)),
        (select sum(t.completion_tokens) from trajectories t where t.id in (select trajectory_id from mine)),
        (select coalesce(sum(cardinality(judgments)), 0) from mine),
        (select count(*) from calls),
        (select sum(coalesce(c.prompt_tokens, 0) + coalesce(c.completion_tokens, 0)) from judge_calls c
            where c.id in (select id from calls)),
        (select sum(c.cost) from judge_calls c where c.id in (select id from calls)),
        (select count(*) from training_runs where batch_id = %(batch)s),
        (select coalesce(sum(extract(epoch from coalesce(ended_at, now()) - started_at)), 0)::float8
            from training_runs where batch_id = %(batch)s),
        (select count(*) from users),
        (select array_agg(agent_id) from (select agent_id from users order by agent_id limit %(agents)s) u)
"""


def _counted(model: TrainedModel) -> _Counted:
    """Tokens, hours, judges and agents: sums in one statement."""
    with connection.cursor() as cursor:
        cursor.execute(_COUNT, {"batch": model.batch_id, "model": model.pk, "agents": AGENTS})
        row = cursor.fetchone()
    assert row is not None
    prompt, completion, judgments, calls, judge_tokens, judge_cost, n_runs, seconds, n_agents, agents = row
    trained = model.summary.get("trained_tokens") if isinstance(model.summary, dict) else None
    cost = Cost(
        prompt_tokens=_whole(prompt),
        completion_tokens=_whole(completion),
        judge_tokens=_whole(judge_tokens),
        judge_cost=judge_cost,
        runs=n_runs,
        run_seconds=seconds,
        trained_tokens=trained if isinstance(trained, int) else None,
    )
    return _Counted(agents or (), n_agents, int(judgments), calls, cost)


def _whole(value: object) -> int | None:
    return None if value is None else int(str(value))


def _adapter(model: TrainedModel) -> Adapter:
    """Rank and alpha as its own configuration has them, where its folder is on this machine."""
    folder = Path(model.adapter_path) if model.adapter_path else None
    if folder is None or not folder.is_dir():
        return Adapter(None, None, False)
    try:
        with (folder / "adapter_config.json").open("rb") as file:
            said = json.loads(file.read(CONFIG_BYTES))
    except (OSError, ValueError):
        return Adapter(None, None, True)
    rank, alpha = (said.get("r"), said.get("lora_alpha")) if isinstance(said, dict) else (None, None)
    return Adapter(
        rank if isinstance(rank, int) else None, float(alpha) if isinstance(alpha, int | float) else None, True
    )


@dataclass(frozen=True)
class Member:
    """One trajectory of the batch, and every judgment that counted in it."""

    item: BatchItem
    judgments: Sequence[RewardJudgment]


@dataclass(frozen=True)
class Part:
    name: str
    group: int | None
    members: Sequence[Member]


@dataclass(frozen=True)
class Origins:
    parts: Sequence[Part]
    n_groups: int
    is_cut: bool


def origins(model: TrainedModel) -> Origins:
    """Down from the version to each judgment: three queries, the first groups of a large batch."""
    if model.batch is None:
        return Origins((), 0, False)
    groups = list(model.batch.groups.filter(is_used=True).order_by("pk")[: GROUPS + 1])
    is_cut, groups = len(groups) > GROUPS, groups[:GROUPS]
    items = list(
        BatchItem.objects.filter(batch=model.batch, batch_group__in=groups)
        .defer("parts", "content_hash")
        .order_by("batch_group_id", "-advantage")
    )
    wanted = {pk for item in items for pk in item.judgments}
    rows = RewardJudgment.objects.filter(pk__in=wanted, project=model.project).order_by("source")
    judgments = {one.pk: one for one in rows.defer("reasoning", "strengths", "weaknesses")}
    members: defaultdict[int, list[Member]] = defaultdict(list)
    for item in items:
        members[item.batch_group_id].append(Member(item, [judgments[pk] for pk in item.judgments if pk in judgments]))
    parts = [Part(one.scenario_ref or "without a scenario", one.group_id, members[one.pk]) for one in groups]
    return Origins(parts, model.batch.n_groups, is_cut)


# --- evaluations and deployments -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationPage:
    verdict: Verdict
    progress: evaluation.Progress
    sides: Forest | None  # the means of both
    regressions: Sequence[Regression]
    is_live: bool


def evaluation_page(one: Evaluation) -> EvaluationPage:
    sides = None
    if isinstance(one.result, dict):
        rows = []
        for side, model in (("candidate", one.candidate), ("baseline", one.baseline)):
            said = one.result[side]
            url = reverse("admin:training_trainedmodel_change", args=[model.pk]) if model else ""
            attempts = str(one.result.get("attempts", 0) // 2)
            rows.append((str(model or "the base"), said["mean"], said["lower"], said["upper"], attempts, url))
        sides = plots.forest(rows)
    live = (EvaluationState.PENDING, EvaluationState.RUNNING)
    verdict = _verdict(one if one.state == EvaluationState.DONE else None)
    if verdict.evaluation is None:
        other = one.baseline or "the base"
        verdict = Verdict(f"{one.candidate} against {other}", str(one.get_state_display()), "", None)
    return EvaluationPage(verdict, evaluation.progress(one), sides, regressions(one), one.state in live)


@dataclass(frozen=True)
class DeploymentPage:
    verdict: Verdict
    regressions: Sequence[Regression]
    gates: Sequence[Mapping[str, object]]
    n_unmet: int
    why_not_me: str  # why this person may not decide; "" when they may
    approval: object | None
    is_open: bool
    if_nothing: str
    timeline: "Timeline | None"


def deployment_page(one: Deployment, user: User | None) -> DeploymentPage:
    gates = one.gates if isinstance(one.gates, list) else []
    is_open = one.state == DeploymentState.REQUESTED
    other = one.replaces.version if one.replaces else "the base"
    rows = list(one.intervals.select_related("model").order_by("-starts_at")[:50])
    return DeploymentPage(
        verdict=_verdict(one.evaluation),
        regressions=regressions(one.evaluation) if one.evaluation else (),
        gates=gates,
        n_unmet=sum(not gate.get("ok") for gate in gates if isinstance(gate, dict)),
        why_not_me=deployments.may_decide(one, user) if is_open else "",
        approval=getattr(one, "approval", None),
        is_open=is_open,
        if_nothing=f"If nothing is done, agents stay on {other}." if is_open else "",
        timeline=timeline_of(rows),
    )


# --- what served when ------------------------------------------------------------------------------------------------

LANES, SPANS = 12, 400
LANE_WIDTH, LANE_HEIGHT, LANE_LEFT = 1000.0, 26.0, 150.0


@dataclass(frozen=True)
class Span:
    x: float
    width: float
    y: float
    label: str  # "" where there is no room for one
    title: str
    url: str
    kind: str  # "base", "even", "odd" or "canary"
    text_x: float


@dataclass(frozen=True)
class Lane:
    audience: str
    text_y: float
    spans: Sequence[Span]


@dataclass(frozen=True)
class Tick:
    x: float
    label: str


@dataclass(frozen=True)
class Timeline:
    """What served whom: an audience a lane, time to the right."""

    width: float
    height: float
    left: float
    lanes: Sequence[Lane]
    ticks: Sequence[Tick]
    more: int  # audiences that have no lane here


def timeline(project: Project) -> Timeline | None:
    """The newest intervals of a project: one query."""
    rows = ServingInterval.objects.filter(project=project).select_related("model").order_by("-starts_at")
    return timeline_of(list(rows[:SPANS]))


def timeline_of(rows: Sequence[ServingInterval]) -> Timeline | None:
    if not rows:
        return None
    now = timezone.now()
    start = min(one.starts_at for one in rows)
    end = max(max(one.ends_at or now for one in rows), start)
    seconds = max((end - start).total_seconds(), 1.0)

    def across(at: datetime) -> float:
        return round(LANE_LEFT + (LANE_WIDTH - LANE_LEFT) * (at - start).total_seconds() / seconds, 2)

    by_lane: defaultdict[tuple[str, str], list[ServingInterval]] = defaultdict(list)
    for one in rows:
        by_lane[one.audience, one.slot].append(one)
    # Everyone first, then those with a version of their own, by name.
    keys = sorted(by_lane, key=lambda key: (key[0] != EVERYONE, key[0], key[1] != STABLE))
    lanes = []
    for number, key in enumerate(keys[:LANES]):
        audience, slot = key
        y = 4.0 + number * LANE_HEIGHT
        name = ("every agent" if audience == EVERYONE else audience) + ("" if slot == STABLE else ", a share")
        spans = [_span(one, across, now, y) for one in by_lane[key]]
        lanes.append(Lane(name, y + 14.5, spans))
    step = seconds / 4
    form = "%d %b" if seconds > 3 * 86_400 else "%d %b %H:%M"
    stops = [datetime.fromtimestamp(start.timestamp() + step * number, start.tzinfo) for number in range(5)]
    ticks = [Tick(across(at), f"{at:{form}}") for at in stops]
    return Timeline(LANE_WIDTH, 4 + len(lanes) * LANE_HEIGHT + 18, LANE_LEFT, lanes, ticks, max(0, len(keys) - LANES))


def _span(one: ServingInterval, across: Callable[[datetime], float], now: datetime, y: float) -> Span:
    x = across(one.starts_at)
    width = max(2.0, across(one.ends_at or now) - x)
    name = one.model.version if one.model else "the base"
    share = f", {one.weight:.0%} of agents" if one.weight < 1 else ""
    until = f"{one.ends_at:%Y-%m-%d %H:%M}" if one.ends_at else "now"
    kind = "base" if one.model is None else "canary" if one.slot != STABLE else ("even", "odd")[one.model.ordinal % 2]
    url = reverse("admin:training_trainedmodel_change", args=[one.model_id]) if one.model_id else ""
    title = f"{name}{share}: {one.starts_at:%Y-%m-%d %H:%M} to {until} UTC, by {one.by_name}"
    return Span(x, round(width, 2), y, name if width > 9 * len(name) else "", title, url, kind, x + 6)
