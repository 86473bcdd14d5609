"""Who lets a version serve: request with evidence, a second person's decision, rollout, rollback.

    requested → approved | rejected | withdrawn        approved → rolling_out → active → superseded | rolled_back
    rolling_out → failed | rolled_back

Nothing outside this file writes a deployment's state or a serving interval. The gate's checks are rows, frozen with
the request and made again at the approval: what was true then may be so no more.
"""

import logging
import secrets
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from django.contrib.auth.models import User
from django.db import IntegrityError, transaction
from django.utils import timezone

from training import model_life, policies, reconcile, routing
from training.models import (
    Approval,
    Deployment,
    DeploymentState,
    Evaluation,
    EvaluationState,
    ModelStatus,
    ServingInterval,
    Strategy,
    TrainedModel,
)
from training.routing import CANARY, EVERYONE, STABLE
from training.serving import ServingRefused, ServingUnavailable
from trajectories import history, rights
from trajectories.errors import Invalid, Refused
from trajectories.history import SYSTEM, Actor
from trajectories.models import ID_LENGTH, Project, Role, Split

logger = logging.getLogger(__name__)

PATIENCE = timedelta(minutes=10)  # a rollout that finds the model server away for so long has failed
PENDING = (DeploymentState.REQUESTED, DeploymentState.APPROVED, DeploymentState.ROLLING_OUT)

NEXT: dict[DeploymentState, frozenset[DeploymentState]] = {
    DeploymentState.REQUESTED: frozenset(
        {DeploymentState.APPROVED, DeploymentState.REJECTED, DeploymentState.WITHDRAWN}
    ),
    DeploymentState.APPROVED: frozenset({DeploymentState.ROLLING_OUT}),
    DeploymentState.ROLLING_OUT: frozenset(
        {DeploymentState.ACTIVE, DeploymentState.FAILED, DeploymentState.ROLLED_BACK}
    ),
    DeploymentState.ACTIVE: frozenset({DeploymentState.SUPERSEDED, DeploymentState.ROLLED_BACK}),
    DeploymentState.REJECTED: frozenset(),
    DeploymentState.WITHDRAWN: frozenset(),
    DeploymentState.SUPERSEDED: frozenset(),
    DeploymentState.ROLLED_BACK: frozenset(),
    DeploymentState.FAILED: frozenset(),
}

NOT_BUILT = {
    Strategy.AB: "A/B deployments are not built. `gradual` with weight 0.5 gives half of the agents the new version, "
    "and their trajectories carry its name.",
    Strategy.SHADOW: "Shadow deployments are not built. An evaluation runs the candidate without any agent using it.",
}


@dataclass(frozen=True)
class Check:
    """One check of the gate. `waivable`: an approver may approve all the same, with a reason."""

    name: str
    ok: bool
    value: float | str | None
    threshold: float | str | None
    detail: str
    waivable: bool = False

    def row(self) -> dict[str, object]:
        return asdict(self)


# --- the gate -----------------------------------------------------------------------------------------------------


def checks(model: TrainedModel, evaluation: Evaluation | None) -> list[Check]:
    """What must hold before the version may serve, in the order in which people ask for it.

    Too little evidence may be waived by an approver with a reason. Evidence against the version may not: one that
    was shown to be worse, or that is no working adapter.
    """
    policy = policies.of(model.project)
    serving = routing.serving_now(model.project)
    may_serve = model.status in (ModelStatus.READY, ModelStatus.RETIRED, ModelStatus.DEPLOYED)
    rows = [
        Check("ready", may_serve, model.status, ModelStatus.READY.value, f"{model} is {model.get_status_display()}."),
        _adapter_is_there(model),
        _learned(model),
    ]
    other = serving.version if serving else "the base"
    if evaluation is None:
        why = f"{model} was not evaluated against {other}, which serves now. POST /api/v1/evaluations/ starts that."
        return [*rows, Check("evaluated", False, None, EvaluationState.DONE.value, why, waivable=True)]
    state = evaluation.state
    same = evaluation.baseline_id == (serving.pk if serving else None)
    against = evaluation.baseline.version if evaluation.baseline else "the base"
    done = state == EvaluationState.DONE and isinstance(evaluation.result, dict)
    rows.append(
        Check(
            "evaluated",
            done and same,
            against if done else state,
            other,
            f"Evaluated against {against}{'' if same else f', while {other} serves now'}."
            if done
            else f"The evaluation is {evaluation.get_state_display()}.",
            waivable=True,
        )
    )
    if done:
        assert isinstance(evaluation.result, dict)
        rows += _evidence(model, against, evaluation.result, policy.gate_min_scenarios, policy.gate_min_gain)
    return rows


def _adapter_is_there(model: TrainedModel) -> Check:
    there = bool(model.adapter_path) and Path(model.adapter_path).is_dir()
    detail = (
        f"The adapter lies at {model.adapter_path}." if there else f"There is no adapter at {model.adapter_path!r}."
    )
    return Check("adapter", there, model.adapter_path or None, None, detail)


def _learned(model: TrainedModel) -> Check:
    """The run came to something: updates were made and the weights differ. An external adapter tells neither."""
    done, change = model.summary.get("steps_done"), model.summary.get("weight_change")
    if not isinstance(done, int | float) or not isinstance(change, int | float):
        return Check("learned", True, None, None, "The trainer reported no steps, so there is nothing to hold it to.")
    ok = done > 0 and change > 0
    stopped = " It was stopped by drift." if model.summary.get("drift_stopped") else ""
    planned = model.summary.get("steps_planned", done)
    detail = f"{done:g} of {planned:g} steps were done and the weights moved by {change:.3g}.{stopped}"
    return Check("learned", ok, float(change), 0.0, detail)


def _evidence(
    model: TrainedModel, against: str, result: dict[str, object], scenarios_needed: int, gain_needed: float
) -> list[Check]:
    gain = result.get("gain")
    assert isinstance(gain, dict)
    scenarios, lower, upper = result.get("scenarios"), gain["lower"], gain["upper"]
    assert isinstance(scenarios, int) and isinstance(lower, float | int) and isinstance(upper, float | int)
    means = f"gain {gain['mean']:+.3f}, interval {lower:+.3f} to {upper:+.3f}"
    better, worse = lower > gain_needed, upper < 0
    return [
        Check(
            "enough_scenarios",
            scenarios >= scenarios_needed,
            float(scenarios),
            float(scenarios_needed),
            f"{scenarios} shared scenarios, {scenarios_needed} are needed.",
            waivable=True,
        ),
        Check(
            "better",
            better,
            lower,
            gain_needed,
            f"{model} is shown to be better than {against} ({means})."
            if better
            else f"{model} is not shown to be better than {against} ({means}).",
            waivable=True,
        ),
        Check(
            "not_worse",
            not worse,
            upper,
            0.0,
            f"{model} is worse than {against} ({means})." if worse else f"{model} is not shown to be worse ({means}).",
        ),
    ]


def evidence_of(model: TrainedModel) -> Evaluation | None:
    """The newest evaluation of the version against what serves now; else the newest at all."""
    serving = routing.serving_now(model.project)
    found = Evaluation.objects.filter(candidate=model, split__in=(Split.HELD_OUT, Split.LOCKED)).order_by("-pk")
    found = found.select_related("baseline", "candidate")
    return found.filter(baseline=serving, state=EvaluationState.DONE).first() or found.first()


def unmet(rows: list[Check]) -> list[dict[str, object]]:
    """The checks that do not hold, as the reasons of a refusal."""
    return [
        {"check": one.name, "value": one.value, "threshold": one.threshold, "ok": one.ok, "detail": one.detail}
        for one in rows
        if not one.ok
    ]


# --- request and decision -----------------------------------------------------------------------------------------


def request(
    model: TrainedModel,
    *,
    by: Actor,
    strategy: str = Strategy.IMMEDIATE,
    weight: float | None = None,
    audience: str = EVERYONE,
    evaluation: Evaluation | None = None,
    reason: str = "",
) -> Deployment:
    """Ask for a version to serve. The request keeps its evidence and the gate's checks as they stand now.

    A request whose gate is not met is kept too: the person who decides sees why it cannot be approved.

    Raises:
        Refused: the strategy is not built, the version cannot serve, or it waits for a decision already.
        Invalid: weight or audience make no sense for the strategy.
    """
    if strategy not in Strategy.values:
        raise Invalid(f"strategy is {strategy[:20]!r}; there are {', '.join(Strategy.values)}.", pointer="/strategy")
    if (why := NOT_BUILT.get(Strategy(strategy))) is not None:
        raise Refused(why)
    weight, audience = _reach(Strategy(strategy), weight, audience)
    if model.status not in (ModelStatus.READY, ModelStatus.RETIRED, ModelStatus.DEPLOYED):
        raise Refused(f"{model} is {model.get_status_display()}; only a version that is ready can be deployed.")
    evaluation = evaluation or evidence_of(model)
    serving = routing.serving_now(model.project)
    if serving == model and audience == EVERYONE:
        raise Refused(f"{model} serves already.")
    try:
        with transaction.atomic():
            deployment = Deployment.objects.create(
                project=model.project,
                model=model,
                replaces=serving,
                evaluation=evaluation,
                strategy=strategy,
                weight=weight,
                audience=audience,
                gates=[one.row() for one in checks(model, evaluation)],
                evidence=_evidence_by_value(model, evaluation),
                reason=reason,
                requested_by=by.user,
                requested_by_name=by.name[:150],
            )
            history.record(
                deployment, "", DeploymentState.REQUESTED, project=model.project, by=by, reason=reason, field="state"
            )
    except IntegrityError as exc:
        raise Refused(f"{model} waits for a decision already. Decide on that request, or withdraw it.") from exc
    deployment.refresh_from_db()
    return deployment


def _reach(strategy: Strategy, weight: float | None, audience: str) -> tuple[float, str]:
    """Share of agents and audience as the strategy has them."""
    if strategy == Strategy.TEST:
        if audience in ("", EVERYONE) or len(audience) > ID_LENGTH:
            raise Invalid("strategy `test` serves one agent: give its agent_id as `audience`.", pointer="/audience")
        return 1.0, audience
    if audience != EVERYONE:
        raise Invalid("An audience goes with the strategy `test`; the others are for every agent.", pointer="/audience")
    if strategy == Strategy.IMMEDIATE:
        if weight not in (None, 1.0):
            raise Invalid("strategy `immediate` is for all agents; a weight goes with `gradual`.", pointer="/weight")
        return 1.0, audience
    weight = 0.1 if weight is None else weight
    if not 0 < weight < 1:
        raise Invalid(f"weight is {weight}; give a share of agents above 0 and below 1.", pointer="/weight")
    return weight, audience


def _evidence_by_value(model: TrainedModel, evaluation: Evaluation | None) -> dict[str, object]:
    """What the decision rests on, by value: it is still here when everything else has changed."""
    return {
        "version": model.version,
        "adapter_hash": model.adapter_hash,
        "mode": model.mode,
        "off_policy": model.off_policy,
        "parent": model.parent.version if model.parent else None,
        "batch": model.batch.batch_id if model.batch else None,
        "training": {
            key: model.summary[key]
            for key in ("steps_done", "steps_planned", "drift_stopped", "drift_detail", "final_drift", "weight_change")
            if key in model.summary
        },
        "evaluation": evaluation.evaluation_id if evaluation else None,
        "result": evaluation.result if evaluation else None,
    }


def may_decide(deployment: Deployment, user: User | None) -> str:
    """Why this person may not decide on it; empty when they may."""
    if user is None:
        return "Deployments are decided on by people: this key has no owner. Use the key of an approver."
    if not rights.may(user, deployment.project, Role.APPROVER):
        return f"{user.get_username()} is no approver of {deployment.project}."
    if deployment.requested_by_id == user.pk:  # superusers too: it is about a second pair of eyes, not about rank
        return f"{user.get_username()} asked for this deployment; a second person decides on it."
    return ""


def approve(deployment: Deployment, *, by: Actor, reason: str = "", override: bool = False) -> None:
    """A second person lets the version serve. The rollout is the caller's to start (`roll_out`).

    Args:
        override: approve although waivable checks are not met; takes a reason.

    Raises:
        Refused: not theirs to decide, decided already, or the gate is not met, with its rows as reasons.
    """
    _refuse_unless(may_decide(deployment, by.user))
    _refuse_decided(deployment)
    rows = checks(deployment.model, deployment.evaluation)
    failing = [one for one in rows if not one.ok]
    if failing:
        final = [one for one in failing if not one.waivable]
        details = " ".join(one.detail for one in final or failing)
        if final or not override:
            way_out = "" if final else " An approver may override this with a reason (`override`)."
            raise Refused(f"The gate refuses {deployment.model}: {details}{way_out}", reasons=unmet(rows))
        if not reason.strip():
            raise Refused("Overriding the gate takes a reason.", reasons=unmet(rows))
    _decide(deployment, DeploymentState.APPROVED, by=by, reason=reason)


def reject(deployment: Deployment, *, by: Actor, reason: str) -> None:
    """A second person turns the version down. It is rejected with its request, until someone takes that back.

    Raises:
        Refused: no reason, not theirs to decide, or decided already.
    """
    _refuse_unless(may_decide(deployment, by.user))
    if not reason.strip():
        raise Refused("A rejection takes a reason.")
    _refuse_decided(deployment)
    with transaction.atomic():
        _decide(deployment, DeploymentState.REJECTED, by=by, reason=reason)
        model = TrainedModel.objects.select_for_update().get(pk=deployment.model_id)
        if model.status == ModelStatus.READY:
            model_life.reject(model, by=by, reason=reason)


def withdraw(deployment: Deployment, *, by: Actor, reason: str = "") -> None:
    """Whoever runs the project takes the request back."""
    _move(deployment, DeploymentState.WITHDRAWN, by=by, reason=reason)


def _refuse_unless(why: str) -> None:
    if why:
        raise Refused(why)


def _refuse_decided(deployment: Deployment) -> None:
    if deployment.state != DeploymentState.REQUESTED:
        approval = Approval.objects.filter(deployment=deployment).first()
        was = str(approval) if approval else deployment.get_state_display()
        raise Refused(f"{deployment} is decided already: {was}.")


def _decide(deployment: Deployment, to: DeploymentState, *, by: Actor, reason: str) -> None:
    assert by.user is not None
    try:
        with transaction.atomic():
            _move(deployment, to, by=by, reason=reason)
            Approval.objects.create(
                deployment=deployment,
                approved=to == DeploymentState.APPROVED,
                by_user=by.user,
                by_name=by.name[:150],
                reason=reason,
            )
    except (Refused, IntegrityError):  # of two who click at once the second comes here
        deployment.refresh_from_db()
        _refuse_decided(deployment)
        raise


# --- rollout and rollback -----------------------------------------------------------------------------------------


def roll_out(deployment: Deployment) -> None:
    """Load the approved version, see it answer, then switch agents over. Safe to run twice and to be killed anywhere.

    Raises:
        ServingUnavailable: the model server is away; try again. After PATIENCE the deployment has failed instead.
    """
    if deployment.state == DeploymentState.APPROVED:
        try:
            _move(deployment, DeploymentState.ROLLING_OUT, by=SYSTEM)
        except Refused:  # another worker has begun
            deployment.refresh_from_db()
    if deployment.state != DeploymentState.ROLLING_OUT:
        return
    try:
        reconcile.ensure((deployment.model,), deployment.project)
    except ServingUnavailable as exc:
        if timezone.now() - deployment.state_since < PATIENCE:
            raise
        _fail(deployment, f"The model server was away for {PATIENCE.total_seconds() / 60:.0f} minutes: {exc}")
        return
    except (ServingRefused, Refused) as exc:
        _fail(deployment, f"The model server does not serve {deployment.model}: {exc}")
        return
    try:
        _switch(deployment)
    except Refused as refusal:
        deployment.refresh_from_db()
        if deployment.state == DeploymentState.ROLLING_OUT:  # not a colleague who was faster
            _fail(deployment, str(refusal))


def roll_out_if_possible(deployment: Deployment) -> None:
    """The same; a model server that is away is left for the next turn."""
    try:
        roll_out(deployment)
    except ServingUnavailable as exc:
        logger.warning("%s waits for the model server: %s", deployment, exc)


def roll_out_waiting() -> None:
    """The sweep: every approved deployment that does not serve yet."""
    waiting = Deployment.objects.filter(state__in=(DeploymentState.APPROVED, DeploymentState.ROLLING_OUT))
    for deployment in waiting.select_related("project", "model").order_by("pk"):
        roll_out_if_possible(deployment)


def _fail(deployment: Deployment, why: str) -> None:
    logger.error("%s of %s failed: %s", deployment, deployment.model, why)
    try:
        _move(deployment, DeploymentState.FAILED, by=SYSTEM, reason=why, error=why)
    except Refused:
        deployment.refresh_from_db()


def _switch(deployment: Deployment) -> None:
    """End what served this audience, open the new interval, and move all rows with it: one transaction."""
    slot = CANARY if deployment.strategy == Strategy.GRADUAL else STABLE
    with transaction.atomic():
        Project.objects.select_for_update().get(pk=deployment.project_id)  # one switch at a time in a project
        model = TrainedModel.objects.get(pk=deployment.model_id)
        if model.status != ModelStatus.DEPLOYED:
            model_life.deploy(model, by=SYSTEM, reason=f"{deployment}")
        # A new version for everyone also ends the share of an older newcomer.
        slots = (STABLE, CANARY) if slot == STABLE and deployment.audience == EVERYONE else (slot,)
        salt = secrets.token_hex(8)
        ended = _end(deployment.project, deployment.audience, slots)
        for interval in ended:
            if slot == CANARY and interval.model_id == model.pk:
                salt = interval.salt  # a larger share of the same version keeps the agents it has
        _open(deployment, model, slot=slot, salt=salt, by=_decider(deployment), reason=deployment.reason)
        replaced = next((one.model for one in ended if one.slot == STABLE), None)
        if slot == STABLE:  # may be another than when it was asked for
            _move(deployment, DeploymentState.ACTIVE, by=SYSTEM, replaces=replaced)
        else:
            _move(deployment, DeploymentState.ACTIVE, by=SYSTEM)
        for interval in ended:
            _supersede(interval, deployment)


def _decider(deployment: Deployment) -> str:
    approval = Approval.objects.filter(deployment=deployment).first()
    return approval.by_name if approval else SYSTEM.name


def _end(project: Project, audience: str, slots: tuple[str, ...]) -> list[ServingInterval]:
    """Close the open intervals of an audience; those that were."""
    rows = ServingInterval.objects.select_for_update(of=("self",)).select_related("model", "deployment")
    found = list(rows.filter(project=project, audience=audience, slot__in=slots, ends_at=None))
    now = timezone.now()
    for interval in found:
        interval.ends_at = max(now, interval.starts_at)
        interval.save(update_fields=("ends_at",))
    return found


def _open(
    deployment: Deployment | None,
    model: TrainedModel | None,
    *,
    slot: str,
    salt: str = "",
    by: str,
    reason: str,
    of: Deployment | None = None,
) -> None:
    """Open an interval; `of` names the deployment whose place it takes, where that is not the same."""
    place = of or deployment
    assert place is not None
    latest = ServingInterval.objects.filter(project=place.project, audience=place.audience, slot=slot)
    last = latest.order_by("-ends_at").values_list("ends_at", flat=True).first()
    now = timezone.now()
    ServingInterval.objects.create(
        project=place.project,
        model=model,
        deployment=deployment,
        audience=place.audience,
        slot=slot,
        weight=place.weight if slot == CANARY else 1.0,
        salt=salt if slot == CANARY else "",
        starts_at=max(now, last) if last else now,  # clocks of two machines differ; intervals of one slot never overlap
        by_name=by[:150],
        reason=reason,
    )


def _supersede(interval: ServingInterval, by: Deployment) -> None:
    """What an ended interval leaves behind: its deployment is history, its version retires when nobody has it."""
    old = interval.deployment
    if old is not None and old.pk != by.pk and old.state == DeploymentState.ACTIVE:
        _move(old, DeploymentState.SUPERSEDED, by=SYSTEM, reason=f"{by} of {by.model}")
    _retire_if_unused(interval.model, reason=f"{by} of {by.model}")


def _retire_if_unused(model: TrainedModel | None, *, reason: str) -> None:
    if model is None:
        return
    model.refresh_from_db()
    if model.status == ModelStatus.DEPLOYED and not model.serving_intervals.filter(ends_at=None).exists():
        model_life.retire(model, by=SYSTEM, reason=reason)


def roll_back(deployment: Deployment, *, by: Actor, reason: str = "") -> None:
    """Agents go back to what served before, at once.

    The earlier version is loaded first; when the model server is away the switch is made all the same, since what
    serves now is what someone wants gone, and the adapter is loaded when the server is back.

    Raises:
        Refused: it does not serve, or something newer does.
    """
    if deployment.state == DeploymentState.ROLLING_OUT:
        _move(deployment, DeploymentState.ROLLED_BACK, by=by, reason=reason)
        return
    if deployment.state != DeploymentState.ACTIVE:
        raise Refused(f"{deployment} is {deployment.get_state_display()}; only what serves can be rolled back.")
    earlier = deployment.replaces if deployment.strategy == Strategy.IMMEDIATE else None
    if earlier is not None:
        try:
            reconcile.ensure((earlier,), deployment.project)
        except (ServingUnavailable, ServingRefused, Refused) as exc:
            logger.warning("rolling back %s although %s was not seen to answer: %s", deployment, earlier, exc)
    slot = CANARY if deployment.strategy == Strategy.GRADUAL else STABLE
    with transaction.atomic():
        Project.objects.select_for_update().get(pk=deployment.project_id)
        _move(deployment, DeploymentState.ROLLED_BACK, by=by, reason=reason)
        ended = _end(deployment.project, deployment.audience, (slot,))
        if deployment.strategy == Strategy.IMMEDIATE:
            _restore(deployment, earlier, by=by, reason=reason)
        for interval in ended:
            _retire_if_unused(interval.model, reason=f"{deployment} was rolled back: {reason}")


def _restore(deployment: Deployment, earlier: TrainedModel | None, *, by: Actor, reason: str) -> None:
    """Let what served before serve again; None: the bare base, under an interval of its own."""
    of = None
    if earlier is not None:
        earlier.refresh_from_db()
        if earlier.status == ModelStatus.ARCHIVED:
            model_life.restore(earlier, by=by, reason=f"{deployment} was rolled back")
        if earlier.status == ModelStatus.RETIRED:
            model_life.deploy(earlier, by=by, reason=f"{deployment} was rolled back")
        of = earlier.deployments.filter(state=DeploymentState.SUPERSEDED).order_by("-pk").first()
    _open(
        of,
        earlier,
        slot=STABLE,
        by=by.name,
        reason=f"rolled back: {reason}" if reason else "rolled back",
        of=deployment,
    )


def _move(deployment: Deployment, to: DeploymentState, *, by: Actor, reason: str = "", **also: object) -> None:
    was = DeploymentState(deployment.state)
    if to not in NEXT[was]:
        raise Refused(f"{deployment} is {was.label}, so it cannot become {to.label}.")
    with transaction.atomic():
        # The WHERE repeats the state we read: of two people who decide at once, the database lets one through.
        moved = Deployment.objects.filter(pk=deployment.pk, state=was).update(
            state=to, state_since=timezone.now(), **also
        )
        if not moved:
            raise Refused(f"{deployment} changed while you were looking at it. Reload and try again.")
        history.record(deployment, was, to, project=deployment.project, by=by, reason=reason, field="state")
    deployment.refresh_from_db()
