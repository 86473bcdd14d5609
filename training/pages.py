"""What the admin's pages show, as typed objects. Only rows are read here, never a payload."""

from collections.abc import Sequence
from dataclasses import dataclass

from django.db.models import Count, QuerySet

from training import evaluation, routing
from training.models import (
    BatchGroup,
    BatchItem,
    Deployment,
    Evaluation,
    ServingInterval,
    TrainedModel,
    TrainingRun,
)

# --- versions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Behaviour:
    """Who played a part of a batch."""

    name: str
    n: int


def _behaviours(items: QuerySet[BatchItem]) -> list[Behaviour]:
    rows = items.values_list("batch_group__behaviour").annotate(n=Count("pk")).order_by("-n")[:20]
    return [Behaviour(name or "without a group", n) for name, n in rows]


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
