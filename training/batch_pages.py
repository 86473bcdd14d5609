"""What a batch's page and a run's page show: what went in, what it was worth, how the training goes."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from django.db.models import F
from django.utils import timezone

from training import plots, policies, runs, selection, shim
from training.models import (
    LIVE_BATCH,
    LIVE_RUN,
    BatchGroup,
    BatchItem,
    BatchStatus,
    RunMetric,
    TrainedModel,
    TrainingBatch,
    TrainingPolicy,
    TrainingRun,
)
from training.plots import Bar, Plot
from trajectories import history, shown
from trajectories.models import Fidelity

ITEMS = 20_000  # of a batch are looked at; the page says when there are more
GROUPS = 100  # are named
CHANGED = 100
STEPS = 2000  # of a run's curves: of more, every n-th
LOG_LINES = 200
LOG_BYTES = 65_536  # read from the end of a log
LOG_LINE = 2000  # characters of one line of a log that are shown

# The first row is what tells a good run from a bad one; the loss comes late, it tells least.
CURVES = (
    ("reward_mean", "reward of the step's trajectories"),
    ("entropy", "entropy (nats)"),
    ("kl_behaviour", "KL to the behaviour (nats a token)"),
    ("drift", "mean |ratio − 1|"),
    ("share_without_spread", "share of groups without spread"),
    ("grad_norm", "gradient norm"),
    ("clipped_share", "clip fraction"),
    ("tokens_per_second", "tokens a second"),
    ("loss", "loss"),
)


@dataclass(frozen=True)
class Phase:
    """A state that the batch was in, and for how long."""

    name: str
    label: str
    since: datetime
    seconds: float
    is_now: bool
    by: str
    reason: str


@dataclass(frozen=True)
class Attempt:
    """One run, with how long it took."""

    run: TrainingRun
    seconds: float
    is_live: bool
    progress: float
    eta_seconds: float | None


@dataclass(frozen=True)
class RunPage:
    """What changes while a run trains."""

    attempt: Attempt
    curves: Sequence[Plot]
    log: Sequence[str]


@dataclass(frozen=True)
class LivePart:
    is_live: bool
    progress: float
    eta_seconds: float | None
    life: Sequence[Phase]
    attempts: Sequence[Attempt]
    newest: RunPage | None


@dataclass(frozen=True)
class Behaviour:
    """Who played a part of the batch."""

    name: str
    n: int
    reward: float | None  # mean of the mixed ones
    age: int | None  # in versions, against the parent; None: no version of this project


@dataclass(frozen=True)
class Source:
    """A source of the mix, before it."""

    name: str
    weight: float | None
    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Share:
    """A part of a whole, for a bar of parts."""

    name: str
    label: str
    n: int
    x: float  # of 300
    width: float


@dataclass(frozen=True)
class ChangedReward:
    """A trajectory of a frozen batch whose recorded reward is another now: the batch keeps what it learned from."""

    trajectory: int
    trajectory_ref: str
    was: float | None
    now: float | None


@dataclass(frozen=True)
class LeftOut:
    reason: str
    n: int
    is_flat: bool  # every attempt was worth the same: nothing to learn from


@dataclass(frozen=True)
class Composition:
    """What went into a batch, from its items by value."""

    n: int = 0
    n_trained: int = 0
    is_cut: bool = False  # more items than are looked at
    why_not: Sequence[tuple[str, int]] = ()  # without gradient, by reason
    advantages: Sequence[Bar] = ()
    mixed: Sequence[Bar] = ()
    recorded: Sequence[Bar] = ()
    sources: Sequence[Source] = ()
    fidelity: Sequence[Share] = ()
    behaviours: Sequence[Behaviour] = ()
    changed: Sequence[ChangedReward] = ()  # the first hundred
    n_changed: int = 0


@dataclass(frozen=True)
class BatchPage:
    live: LivePart
    model: TrainedModel | None
    hyperparameters: Sequence[tuple[str, object]]
    went_in: Composition
    used: Sequence[BatchGroup]
    n_flat: int  # of those named: no spread
    left_out: Sequence[LeftOut] = field(default_factory=tuple)


def batch_page(batch: TrainingBatch) -> BatchPage:
    rows = list(
        batch.groups.select_related("group")
        .only("group__policy_minor", "scenario_ref", "behaviour", "is_used", "left_out", "n", "mean", "std", "batch")
        .order_by("-is_used", "pk")[:ITEMS]
    )
    used = [one for one in rows if one.is_used]
    why = Counter(one.left_out for one in rows if not one.is_used)
    return BatchPage(
        live=live_part(batch),
        model=model_of(batch),
        hyperparameters=sorted(batch.hyperparameters.items()) if isinstance(batch.hyperparameters, dict) else (),
        went_in=_composition(batch, {one.pk: one for one in used}),
        used=used[:GROUPS],
        n_flat=sum(one.std == 0 for one in used),
        left_out=[LeftOut(reason, n, reason == selection.NO_SPREAD) for reason, n in why.most_common(30)],
    )


def model_of(batch: TrainingBatch) -> TrainedModel | None:
    try:
        return batch.model
    except TrainedModel.DoesNotExist:
        return None


# --- what goes on ----------------------------------------------------------------------------------------------------


def live_part(batch: TrainingBatch) -> LivePart:
    """What is read again and again while the batch is under way."""
    attempts = [attempt_of(one) for one in batch.runs.order_by("-attempt")[:20]]
    newest = attempts[0] if attempts else None
    progress = 1.0 if batch.status in (BatchStatus.UPLOADING, BatchStatus.COMPLETED) else 0.0
    if newest is not None and not progress:
        progress = newest.progress
    training = batch.status == BatchStatus.TRAINING and newest is not None
    return LivePart(
        is_live=batch.status in LIVE_BATCH,
        progress=progress,
        eta_seconds=newest.eta_seconds if training and newest is not None else None,
        life=_life(batch),
        attempts=attempts,
        newest=RunPage(newest, curves(newest.run, _max_drift(batch)), log_of(newest.run)) if newest else None,
    )


def run_page(run: TrainingRun) -> RunPage:
    return RunPage(attempt_of(run), curves(run, _max_drift(run.batch)), log_of(run))


def attempt_of(run: TrainingRun) -> Attempt:
    seconds = ((run.ended_at or timezone.now()) - run.started_at).total_seconds()
    return Attempt(run, max(0.0, seconds), run.status in LIVE_RUN, runs.progress(run), runs.eta_seconds(run))


def _max_drift(batch: TrainingBatch) -> float:
    try:
        return batch.project.policy.max_drift
    except TrainingPolicy.DoesNotExist:
        return policies.of(batch.project).max_drift


def curves(run: TrainingRun, max_drift: float) -> list[Plot]:
    """One plot a measure, of what the trainer wrote so far."""
    metrics = RunMetric.objects.filter(run=run).order_by("step")
    every = -(-(run.step or 1) // STEPS)
    if every > 1:
        metrics = metrics.alias(rest=F("step") % every).filter(rest=0)
    rows = list(metrics.values_list("step", "values")[: 2 * STEPS])
    steps = [float(step) for step, _ in rows]
    found = []
    for name, title in CURVES:
        values = [_number(row.get(name)) if isinstance(row, dict) else None for _, row in rows]
        plot = plots.line(title, steps, values, limit=max_drift if name == "drift" else None)
        if plot is not None:
            found.append(plot)
    return found


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def log_of(run: TrainingRun) -> list[str]:
    """The last lines that the trainer said: from its folder, where that is on this machine, else as kept with the run.

    A trainer prints what it likes: controls become visible, long lines are cut.
    """
    lines = shim.tail(Path(run.folder) / shim.LOG, lines=LOG_LINES, size=LOG_BYTES) or run.log_tail.splitlines()
    return [
        shown.visible(
            line if len(line) <= LOG_LINE else f"{line[:LOG_LINE]} … {len(line) - LOG_LINE:,} more characters"
        )
        for line in lines[-LOG_LINES:]
    ]


def _life(batch: TrainingBatch) -> list[Phase]:
    """Every state since the beginning, oldest first. Tried again, it goes through some of them twice."""
    changes = [one for one in reversed(history.of(batch)) if one.field == "status"]
    labels = dict(BatchStatus.choices)
    found = []
    for number, one in enumerate(changes):
        is_last = number + 1 == len(changes)
        is_over = is_last and batch.status not in LIVE_BATCH
        until = one.created_at if is_over else timezone.now() if is_last else changes[number + 1].created_at
        seconds = (until - one.created_at).total_seconds()
        label = str(labels.get(one.to, one.to))
        found.append(Phase(one.to, label, one.created_at, seconds, is_last, one.by_name, one.reason))
    return found


# --- what went in ----------------------------------------------------------------------------------------------------


def _composition(batch: TrainingBatch, groups: Mapping[int, BatchGroup]) -> Composition:
    """One query for all of it, whatever the batch holds."""
    rows = list(
        BatchItem.objects.filter(batch=batch)
        .order_by("pk")
        .values_list(
            "trajectory_id",
            "trajectory_ref",
            "batch_group_id",
            "advantage",
            "reward",
            "parts",
            "is_trained",
            "why_not",
            "trajectory__reward",
            "trajectory__fidelity",
        )[: ITEMS + 1]
    )
    is_cut, rows = len(rows) > ITEMS, rows[:ITEMS]
    why_not: Counter[str] = Counter()
    raw: defaultdict[str, list[float]] = defaultdict(list)
    fidelity: Counter[str] = Counter()
    changed: list[ChangedReward] = []
    n_changed = 0
    for pk, ref, _, _, _, parts, is_trained, why, now, how in rows:
        if not is_trained:
            why_not[why or "no reason was kept"] += 1
        for source, part in (parts if isinstance(parts, dict) else {}).items():
            value = _number(part.get("raw")) if isinstance(part, dict) else None
            if value is not None:
                raw[source].append(value)
        fidelity[how or "unknown"] += 1
        recorded = parts.get("recorded") if isinstance(parts, dict) else None
        if pk is not None and isinstance(recorded, dict) and recorded.get("raw") != now:
            n_changed += 1
            if len(changed) < CHANGED:
                changed.append(ChangedReward(pk, ref, _number(recorded.get("raw")), now))
    by_group: defaultdict[int, list[float | None]] = defaultdict(list)
    for row in rows:
        by_group[row[2]].append(row[4])
    return Composition(
        n=len(rows),
        n_trained=sum(row[6] for row in rows),
        is_cut=is_cut,
        why_not=why_not.most_common(10),
        advantages=plots.histogram([row[3] for row in rows]),
        mixed=plots.histogram([row[4] for row in rows if row[4] is not None]),
        recorded=plots.histogram(raw["recorded"]) if "recorded" in raw else (),
        sources=_sources(batch, raw),
        fidelity=_shares(fidelity),
        behaviours=_behaviours(batch, groups, by_group),
        changed=changed,
        n_changed=n_changed,
    )


def _sources(batch: TrainingBatch, raw: Mapping[str, Sequence[float]]) -> list[Source]:
    mix = batch.reward_mix if isinstance(batch.reward_mix, dict) else {}
    return [
        Source(name, _number(mix.get(name)), len(values), statistics.fmean(values), min(values), max(values))
        for name, values in sorted(raw.items())
        if values
    ]


def _shares(counts: Mapping[str, int]) -> list[Share]:
    """In the order from the best to the least, 300 wide in all."""
    order = [*Fidelity.values, "unknown"]
    total = sum(counts.values())
    found, x = [], 0.0
    for name in order:
        n = counts.get(name, 0)
        if n:
            width = 300.0 * n / total
            label = str(Fidelity(name).label) if name in Fidelity.values else "unknown: the trajectory is not there"
            found.append(Share(name, label, n, round(x, 2), round(width, 2)))
            x += width
    return found


def _behaviours(
    batch: TrainingBatch, groups: Mapping[int, BatchGroup], rewards: Mapping[int, Sequence[float | None]]
) -> list[Behaviour]:
    """By version, the most first; its age as it counts for `max_policy_age`."""
    found: defaultdict[str, list[float | None]] = defaultdict(list)
    ordinals: dict[str, int | None] = {}
    for pk, values in rewards.items():
        group = groups.get(pk)
        name = group.behaviour if group is not None and group.behaviour else "without a group"
        found[name] += values
        if group is not None and group.group is not None:
            ordinals.setdefault(name, group.group.policy_minor)
    parent = batch.parent.ordinal if batch.parent is not None else None
    told = []
    for name, values in sorted(found.items(), key=lambda one: -len(one[1]))[:20]:
        known = [one for one in values if one is not None]
        ordinal = ordinals.get(name)
        age = max(0, parent - ordinal) if parent is not None and ordinal is not None else None
        told.append(Behaviour(name, len(values), statistics.fmean(known) if known else None, age))
    return told


def changed_rewards(batch: TrainingBatch) -> list[ChangedReward]:
    """What a batch would see otherwise if it were frozen now; the first hundred."""
    return list(_composition(batch, {}).changed)
