"""A candidate against what serves, on scenarios that no batch ever saw. Nothing outside this file writes its state.

    pending → running → done | failed        failed → pending, when a person tries again

Work goes out as (scenario, side, model name, n) and comes back as trajectories with `evaluation_id`; which side one
answers is told by the version that played. The candidate is loaded on the model server for the evaluation only: no
agent is routed to it.
"""

import logging
import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db import transaction
from django.db.models import F
from django.utils import timezone

from training import limits, policies, reconcile, routing
from training.models import (
    Evaluation,
    EvaluationState,
    EvaluationWork,
    LockedSetOpening,
    ModelStatus,
    Side,
    TrainedModel,
)
from training.serving import ServingRefused, ServingUnavailable
from trajectories import history
from trajectories.errors import Invalid, Refused
from trajectories.history import SYSTEM, Actor
from trajectories.models import FinalStatus, Project, Scenario, Split, State, Trajectory
from trajectories.origins import FOREIGN

logger = logging.getLogger(__name__)

RESAMPLES = 2000
CONFIDENCE = 0.95
HAND_OUT_AGAIN = timedelta(minutes=5)  # work that was fetched and did not come back goes to the next who asks
REGRESSIONS = 5

NEXT: dict[EvaluationState, frozenset[EvaluationState]] = {
    EvaluationState.PENDING: frozenset({EvaluationState.RUNNING, EvaluationState.FAILED}),
    EvaluationState.RUNNING: frozenset({EvaluationState.DONE, EvaluationState.FAILED}),
    EvaluationState.DONE: frozenset(),
    EvaluationState.FAILED: frozenset({EvaluationState.PENDING}),
}


@dataclass(frozen=True)
class Assignment:
    """`n` attempts wanted of one side at one scenario."""

    scenario: Scenario
    side: Side
    model: TrainedModel | None  # None: the bare base
    name: str  # the OpenAI `model`
    n: int


@dataclass(frozen=True)
class Progress:
    """How much has come back: attempts with a known reward, up to those wanted."""

    done: int
    wanted: int
    waiting_for_reward: int  # came back without one

    @property
    def share(self) -> float:
        return self.done / self.wanted if self.wanted else 0.0


# --- its life -----------------------------------------------------------------------------------------------------


def request(
    project: Project,
    candidate: TrainedModel,
    *,
    by: Actor,
    against: TrainedModel | str | None = "serving",
    split: str = Split.HELD_OUT,
    attempts: int | None = None,
    scenarios: int | None = None,
    seed: int = 0,
    reason: str = "",
) -> Evaluation:
    """Ask for an evaluation.

    Args:
        against: the other side: a version, None for the bare base, "serving" for what serves now.
        split: held_out; or locked, which only a person may open, with a reason, and which is counted.
        attempts: a side at each scenario; None: the policy's.
        scenarios: at most so many, drawn by `seed`; None: all of the split.

    Raises:
        Refused: the candidate cannot be evaluated, or there is no scenario to do it on.
        Invalid: a number out of range.
    """
    if candidate.status not in (ModelStatus.READY, ModelStatus.DEPLOYED, ModelStatus.RETIRED):
        raise Refused(f"{candidate} is {candidate.get_status_display()}; only a version that is ready is evaluated.")
    baseline = routing.serving_now(project) if isinstance(against, str) else against
    if baseline == candidate:
        raise Refused(f"{candidate} serves already. Name another version to compare it with (`baseline`).")
    attempts = policies.of(project).gate_attempts if attempts is None else attempts
    if not 1 <= attempts <= limits.ATTEMPTS:
        raise Invalid(
            f"attempts is {attempts}; give 1 to {limits.ATTEMPTS}.",
            pointer="/attempts",
            limit=limits.ATTEMPTS,
            size=attempts,
        )
    if split not in (Split.HELD_OUT, Split.LOCKED):
        raise Invalid(f"split is {split!r}; candidates are evaluated on held_out or locked.", pointer="/split")
    chosen = _choose(project, split, scenarios, seed)
    if split == Split.LOCKED and (by.user is None or not reason.strip()):
        raise Refused("The locked test set is opened by a person, with a reason: each opening costs some of its worth.")
    with transaction.atomic():
        evaluation = Evaluation.objects.create(
            project=project,
            candidate=candidate,
            baseline=baseline,
            split=split,
            attempts=attempts,
            seed=seed,
            deadline_at=_deadline(project),
            requested_by_name=by.name[:150],
        )
        EvaluationWork.objects.bulk_create(
            EvaluationWork(evaluation=evaluation, scenario=scenario, side=side, n=attempts)
            for scenario in chosen
            for side in (Side.CANDIDATE, Side.BASELINE)
        )
        if split == Split.LOCKED:
            LockedSetOpening.objects.create(
                project=project, evaluation=evaluation, by_user=by.user, by_name=by.name[:150], reason=reason
            )
        history.record(evaluation, "", EvaluationState.PENDING, project=project, by=by, reason=reason, field="state")
    evaluation.refresh_from_db()
    return evaluation


def _choose(project: Project, split: str, most: int | None, seed: int) -> list[Scenario]:
    found = list(Scenario.objects.filter(project=project, split=split).order_by("pk"))
    if not found:
        raise Refused(
            f"There is no {split.replace('_', '-')} scenario in this project. A share of new scenarios is kept apart "
            'by itself; or send some with `"split": "held_out"`.'
        )
    most = limits.SCENARIOS if most is None else most
    if not 1 <= most <= limits.SCENARIOS:
        raise Invalid(
            f"scenarios is {most}; give 1 to {limits.SCENARIOS}.",
            pointer="/scenarios",
            limit=limits.SCENARIOS,
            size=most,
        )
    return found if len(found) <= most else random.Random(seed).sample(found, most)


def _deadline(project: Project) -> datetime:
    return timezone.now() + timedelta(hours=policies.of(project).evaluation_timeout_hours)


def begin(evaluation: Evaluation) -> bool:
    """Have both sides loaded and answering, and let work go out. False: the model server is away; try again later."""
    if evaluation.state != EvaluationState.PENDING:
        return evaluation.state == EvaluationState.RUNNING
    try:
        reconcile.ensure(
            (evaluation.candidate, evaluation.baseline), evaluation.project, base=evaluation.candidate.base_model
        )
    except ServingUnavailable as exc:
        logger.warning("%s waits for the model server: %s", evaluation, exc)
        return False
    except (ServingRefused, Refused) as exc:
        fail(evaluation, by=SYSTEM, reason=f"The model server does not take both sides: {exc}")
        return False
    try:
        _move(evaluation, EvaluationState.RUNNING, by=SYSTEM)
    except Refused:  # someone else began it while we were loading
        evaluation.refresh_from_db()
    return evaluation.state == EvaluationState.RUNNING


def advance(evaluation: Evaluation) -> None:
    """Take it as far as it can go now: begin, finish when all has come back, fail when the time is up."""
    if evaluation.state == EvaluationState.PENDING:
        begin(evaluation)
    if evaluation.state == EvaluationState.RUNNING:
        rewards = _rewards(evaluation)
        wanted = _wanted(evaluation)
        if all(len(rewards.get(key, ())) >= n for key, n in wanted.items()):
            _finish(evaluation, rewards)
            return
    if evaluation.state in (EvaluationState.PENDING, EvaluationState.RUNNING) and _is_late(evaluation):
        found = progress(evaluation)
        waiting = f"; {found.waiting_for_reward} came back without a reward" if found.waiting_for_reward else ""
        fail(
            evaluation,
            by=SYSTEM,
            reason=f"Only {found.done} of {found.wanted} attempts came back by {evaluation.deadline_at:%Y-%m-%d %H:%M}"
            f" UTC{waiting}. Fetch the work and run it, or retry with more time (evaluation_timeout_hours).",
        )


def _is_late(evaluation: Evaluation) -> bool:
    return evaluation.deadline_at is not None and evaluation.deadline_at <= timezone.now()


def fail(evaluation: Evaluation, *, by: Actor, reason: str) -> None:
    _move(evaluation, EvaluationState.FAILED, by=by, reason=reason, error=reason, finished_at=timezone.now())


def retry(evaluation: Evaluation, *, by: Actor, reason: str = "") -> None:
    """Try again. What came back already counts; the time runs anew."""
    deadline = _deadline(evaluation.project)
    with transaction.atomic():
        _move(
            evaluation, EvaluationState.PENDING, by=by, reason=reason, error="", finished_at=None, deadline_at=deadline
        )
        evaluation.work.update(handed_out_at=None)


def advance_all() -> None:
    """The sweep over evaluations under way."""
    live = (EvaluationState.PENDING, EvaluationState.RUNNING)
    rows = Evaluation.objects.filter(state__in=live).select_related("project", "candidate", "baseline").order_by("pk")
    for evaluation in rows:
        try:
            advance(evaluation)
        except Refused as refusal:  # someone else took it further
            logger.info("%s: %s", evaluation, refusal)


def _move(evaluation: Evaluation, to: EvaluationState, *, by: Actor, reason: str = "", **also: object) -> None:
    was = EvaluationState(evaluation.state)
    if to not in NEXT[was]:
        raise Refused(f"{evaluation} is {was.label}, so it cannot become {to.label}.")
    with transaction.atomic():
        moved = Evaluation.objects.filter(pk=evaluation.pk, state=was).update(
            state=to, state_since=timezone.now(), **also
        )
        if not moved:
            raise Refused(f"{evaluation} changed while you were looking at it. Reload and try again.")
        history.record(evaluation, was, to, project=evaluation.project, by=by, reason=reason, field="state")
    evaluation.refresh_from_db()


# --- work out, attempts in ----------------------------------------------------------------------------------------


def hand_out(evaluation: Evaluation, limit: int) -> list[Assignment]:
    """Up to `limit` pieces of work that nobody is at; the same piece goes out again when it does not come back."""
    advance(evaluation)
    if evaluation.state != EvaluationState.RUNNING:
        return []
    came = _attempts(evaluation)
    now = timezone.now()
    given: list[Assignment] = []
    base = evaluation.candidate.base_model
    with transaction.atomic():
        free = (
            evaluation.work.select_related("scenario")
            .exclude(handed_out_at__gt=now - HAND_OUT_AGAIN)
            .order_by(F("handed_out_at").asc(nulls_first=True), "pk")
            .select_for_update(of=("self",), skip_locked=True)
        )
        rows: list[EvaluationWork] = []
        for row in free:
            side = Side(row.side)
            missing = row.n - len(came.get((row.scenario_id, side), ()))
            if missing <= 0:
                continue
            model = evaluation.candidate if side == Side.CANDIDATE else evaluation.baseline
            given.append(Assignment(row.scenario, side, model, model.serving_name if model else base, missing))
            rows.append(row)
            if len(rows) >= limit:
                break
        EvaluationWork.objects.filter(pk__in=[row.pk for row in rows]).update(handed_out_at=now)
    return given


def progress(evaluation: Evaluation) -> Progress:
    came, wanted = _attempts(evaluation), _wanted(evaluation)
    return Progress(
        done=sum(min(n, sum(reward is not None for reward in came.get(key, ()))) for key, n in wanted.items()),
        wanted=sum(wanted.values()),
        waiting_for_reward=sum(reward is None for rewards in came.values() for reward in rewards),
    )


Key = tuple[int, Side]  # scenario's pk and side


def _wanted(evaluation: Evaluation) -> dict[Key, int]:
    return {(scenario, Side(side)): n for scenario, side, n in evaluation.work.values_list("scenario__pk", "side", "n")}


def _attempts(evaluation: Evaluation) -> dict[Key, list[float | None]]:
    """Rewards of the attempts that count, in the order in which they came; None: not known yet.

    Out of count: still open, an environment's failure, a try that was made again, a copy of another one, and what
    was played by neither side.
    """
    rows = (
        Trajectory.objects.filter(
            project=evaluation.project,
            scenario__in=evaluation.work.values("scenario"),
            received_at__gte=evaluation.created_at,  # the index that has the scenario goes on with this
            evaluation_id=evaluation.evaluation_id,
            is_excluded=False,
            is_superseded=False,
            twin_of__isnull=True,
        )
        .exclude(state=State.OPEN)
        .exclude(final_status=FinalStatus.ENVIRONMENT_ERROR)
        .order_by("pk")
        .values_list("scenario__pk", "behaviour", "reward")
    )
    found: defaultdict[Key, list[float | None]] = defaultdict(list)
    for scenario, behaviour, reward in rows:
        side = side_of(evaluation, behaviour)
        if side is not None and scenario is not None:
            found[scenario, side].append(reward)
    return found


def side_of(evaluation: Evaluation, behaviour: str) -> Side | None:
    """Which side played; None: neither. The bare base is no version of this project."""
    if behaviour == evaluation.candidate.version:
        return Side.CANDIDATE
    if evaluation.baseline is not None:
        return Side.BASELINE if behaviour == evaluation.baseline.version else None
    return Side.BASELINE if behaviour == f"{FOREIGN}{evaluation.candidate.base_model}" else None


def _rewards(evaluation: Evaluation) -> dict[Key, list[float]]:
    """The first n known rewards of each piece of work: more attempts than asked for change nothing."""
    wanted = _wanted(evaluation)
    came = _attempts(evaluation)
    return {key: [reward for reward in came.get(key, ()) if reward is not None][:n] for key, n in wanted.items()}


# --- the result ---------------------------------------------------------------------------------------------------


def _finish(evaluation: Evaluation, rewards: Mapping[Key, Sequence[float]]) -> None:
    names = dict(evaluation.work.values_list("scenario__pk", "scenario__scenario_id"))
    pairs = {
        names[scenario]: (rewards[scenario, Side.CANDIDATE], rewards[scenario, Side.BASELINE])
        for scenario, side in rewards
        if side == Side.CANDIDATE
    }
    result: dict[str, object] = {
        **compare(pairs, seed=evaluation.seed),
        "split": evaluation.split,
        "candidate_version": evaluation.candidate.version,
        "baseline_version": evaluation.baseline.version if evaluation.baseline else None,
        "locked_openings": LockedSetOpening.objects.filter(project=evaluation.project).count(),
    }
    try:
        _move(evaluation, EvaluationState.DONE, by=SYSTEM, result=result, error="", finished_at=timezone.now())
    except Refused:  # another worker had the same answer a moment earlier
        evaluation.refresh_from_db()


def compare(pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, seed: int) -> dict[str, object]:
    """Candidate against baseline over shared scenarios: means, and the gain with its interval.

    Each scenario counts once, by the mean of its attempts; the gain is the mean over scenarios of candidate less
    baseline. The interval is a percentile bootstrap over scenarios, which keeps the pairs together: what differs
    between scenarios is no noise of the comparison, and attempts at one scenario are not independent.

    Args:
        pairs: by scenario id, rewards of the candidate and of the baseline, at least one each.
        seed: of the resampling, so that the same attempts give the same interval.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    ids = sorted(pairs)
    candidate = [statistics.fmean(pairs[one][0]) for one in ids]
    baseline = [statistics.fmean(pairs[one][1]) for one in ids]
    gains = [ours - theirs for ours, theirs in zip(candidate, baseline, strict=True)]
    draws = random.Random(seed)
    worst = sorted((gain, one) for gain, one in zip(gains, ids, strict=True) if gain < 0)[:REGRESSIONS]
    by_id = {one: (ours, theirs) for one, ours, theirs in zip(ids, candidate, baseline, strict=True)}
    return {
        "scenarios": len(ids),
        "attempts": sum(len(ours) + len(theirs) for ours, theirs in pairs.values()),
        "candidate": {"mean": statistics.fmean(candidate), **_interval(candidate, draws)},
        "baseline": {"mean": statistics.fmean(baseline), **_interval(baseline, draws)},
        "gain": {"mean": statistics.fmean(gains), **_interval(gains, draws)},
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "better": sum(gain > 0 for gain in gains),
        "worse": sum(gain < 0 for gain in gains),
        "ties": sum(gain == 0 for gain in gains),
        "regressions": [
            {"scenario": one, "candidate": by_id[one][0], "baseline": by_id[one][1], "gain": gain}
            for gain, one in worst
        ],
    }


def _interval(values: Sequence[float], draws: random.Random) -> dict[str, float]:
    """Lower and upper end of the mean's interval, resampling the values."""
    n = len(values)
    means = sorted(sum(draws.choices(values, k=n)) / n for _ in range(RESAMPLES))
    tail = (1 - CONFIDENCE) / 2
    return {"lower": means[int(tail * RESAMPLES)], "upper": means[int((1 - tail) * RESAMPLES) - 1]}


def sentence(evaluation: Evaluation) -> str:
    """What an evaluation says, for people."""
    result = evaluation.result
    other = evaluation.baseline.version if evaluation.baseline else "the base"
    if not isinstance(result, dict):
        return f"{evaluation.candidate} against {other}: {evaluation.get_state_display()}"
    gain = result["gain"]
    return (
        f"{evaluation.candidate} has {result['candidate']['mean']:.3f} against {result['baseline']['mean']:.3f} of "
        f"{other} on {result['scenarios']} scenarios: {gain['mean']:+.3f} ({CONFIDENCE:.0%} interval "
        f"{gain['lower']:+.3f} to {gain['upper']:+.3f}; better on {result['better']}, worse on {result['worse']}, "
        f"equal on {result['ties']})"
    )
