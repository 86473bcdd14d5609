"""Evaluations by HTTP: start one, fetch its work, read its result. The attempts come in as trajectories."""

from typing import Annotated, ClassVar, Literal

import msgspec
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import status
from rest_framework.request import Request
from rest_framework.response import Response

from training import evaluation as evaluations
from training import limits, reconcile, tasks
from training.api import bodies, pages
from training.api.models import find as find_model
from training.models import Evaluation, EvaluationState
from trainingsite.celery import nudge
from trajectories.errors import Invalid, Unknown
from trajectories.models import Project, Scope
from trajectories.views import ProjectAPIView


class EvaluationBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST evaluations/."""

    version: str
    baseline: str | msgspec.UnsetType | None = msgspec.UNSET  # a version; null: the bare base; left out: what serves
    split: Literal["held_out", "locked"] = "held_out"
    attempts: int | None = None
    scenarios: int | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 0
    reason: Annotated[str, msgspec.Meta(max_length=limits.REASON_CHARACTERS)] = ""


class ReasonBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    reason: Annotated[str, msgspec.Meta(max_length=limits.REASON_CHARACTERS)] = ""


class EvaluationList(ProjectAPIView):
    scopes: ClassVar = {"GET": (Scope.READ,), "POST": (Scope.OPERATE,)}

    @extend_schema(
        parameters=[OpenApiParameter("cursor", str), OpenApiParameter("limit", int)], responses=OpenApiTypes.OBJECT
    )
    def get(self, request: Request) -> Response:
        rows = Evaluation.objects.filter(project=self.project).select_related("candidate", "baseline", "project")
        page = pages.page(request, rows)
        return Response({"results": [summary(one) for one in page.rows], "next": page.next})

    @extend_schema(request=OpenApiTypes.OBJECT, responses={201: OpenApiTypes.OBJECT, 409: OpenApiTypes.OBJECT})
    def post(self, request: Request) -> Response:
        body = bodies.read(request, EvaluationBody)
        against = (
            "serving"
            if body.baseline is msgspec.UNSET
            else find_model(self.project, body.baseline)
            if isinstance(body.baseline, str)
            else None
        )
        evaluation = evaluations.request(
            self.project,
            find_model(self.project, body.version),
            by=self.actor,
            against=against,
            split=body.split,
            attempts=body.attempts,
            scenarios=body.scenarios,
            seed=body.seed,
            reason=body.reason,
        )
        nudge(tasks.advance_evaluation, evaluation.pk)
        return Response(detail(evaluation), status=status.HTTP_201_CREATED)


class EvaluationDetail(ProjectAPIView):
    @extend_schema(responses=OpenApiTypes.OBJECT)
    def get(self, request: Request, evaluation_id: str) -> Response:
        evaluation = find(self.project, evaluation_id)
        if evaluation.state == EvaluationState.RUNNING:  # the last attempts may have come in since anyone looked
            evaluations.advance(evaluation)
        return Response(detail(evaluation))


class EvaluationWorkList(ProjectAPIView):
    """GET takes pieces of work. Answer each with `n` trajectories that carry the `evaluation_id`."""

    scopes: ClassVar = {"GET": (Scope.READ, Scope.INGEST)}

    @extend_schema(parameters=[OpenApiParameter("limit", int)], responses=OpenApiTypes.OBJECT)
    def get(self, request: Request, evaluation_id: str) -> Response:
        evaluation = find(self.project, evaluation_id)
        given = evaluations.hand_out(evaluation, _limit(request.query_params.get("limit", "100")))
        base_url = reconcile.public_url_of(self.project)
        return Response(
            {
                "evaluation_id": evaluation.evaluation_id,
                "state": evaluation.state,
                "results": [
                    {
                        "scenario_id": one.scenario.scenario_id,
                        "scenario": {
                            "id": one.scenario.scenario_id,
                            "description": one.scenario.description,
                            "metadata": _public(one.scenario.metadata),
                        },
                        "side": one.side,
                        "version": one.model.version if one.model else None,
                        "model": one.name,
                        "base_url": base_url,
                        "n": one.n,
                    }
                    for one in given
                ],
            }
        )


class EvaluationRetry(ProjectAPIView):
    scopes: ClassVar = {"POST": (Scope.OPERATE,)}

    @extend_schema(request=OpenApiTypes.OBJECT, responses=OpenApiTypes.OBJECT)
    def post(self, request: Request, evaluation_id: str) -> Response:
        body = bodies.read(request, ReasonBody)
        evaluation = find(self.project, evaluation_id)
        evaluations.retry(evaluation, by=self.actor, reason=body.reason)
        nudge(tasks.advance_evaluation, evaluation.pk)
        return Response(detail(evaluation))


def _public(metadata: object) -> dict[str, object]:
    """A scenario's metadata without the gold answers."""
    return {key: value for key, value in metadata.items() if key != "private"} if isinstance(metadata, dict) else {}


def _limit(text: str) -> int:
    size = int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None
    if size is None or not 1 <= size <= limits.WORK:
        raise Invalid(
            f"limit is {text[:20]!r}; give a whole number from 1 to {limits.WORK}.",
            pointer="?limit",
            limit=limits.WORK,
            size=size,
        )
    return size


def find(project: Project, evaluation_id: str) -> Evaluation:
    """The project's evaluation.

    Raises:
        Unknown: there is none of that id, or it is another project's.
    """
    found = Evaluation.objects.filter(project=project, evaluation_id=evaluation_id)
    evaluation = found.select_related("candidate", "baseline", "project").first()
    if evaluation is None:
        raise Unknown(f"There is no evaluation {evaluation_id[:64]} in this project.")
    return evaluation


def summary(evaluation: Evaluation) -> dict[str, object]:
    return {
        "evaluation_id": evaluation.evaluation_id,
        "version": evaluation.candidate.version,
        "baseline": evaluation.baseline.version if evaluation.baseline else None,
        "state": evaluation.state,
        "split": evaluation.split,
        "sentence": evaluations.sentence(evaluation),
        "error": evaluation.error or None,
        "created_at": evaluation.created_at,
        "finished_at": evaluation.finished_at,
    }


def detail(evaluation: Evaluation) -> dict[str, object]:
    progress = evaluations.progress(evaluation)
    return {
        **summary(evaluation),
        "attempts": evaluation.attempts,
        "seed": evaluation.seed,
        "deadline_at": evaluation.deadline_at,
        "progress": progress.share,
        "attempts_done": progress.done,
        "attempts_wanted": progress.wanted,
        "waiting_for_reward": progress.waiting_for_reward,
        "result": evaluation.result,
        "requested_by": evaluation.requested_by_name,
    }
