"""Batches by HTTP: trigger, look, cancel, retry, and the data for trainers of others."""

import itertools
from collections.abc import Iterator
from typing import Annotated, ClassVar

import msgspec
from django.db.models import Count
from django.http import StreamingHttpResponse
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import status
from rest_framework.request import Request
from rest_framework.response import Response

from training import batches, jobs, limits, tasks
from training.api import bodies, pages
from training.models import Mode, TrainedModel, TrainingBatch
from trainingsite.celery import nudge
from trajectories.errors import Unknown
from trajectories.models import ID_LENGTH, Project, Scope
from trajectories.views import ProjectAPIView


class TriggerBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST batches/. What is left out is the policy's."""

    force: bool = False
    limit: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None  # trajectories, in whole groups
    mode: Mode | None = None
    purpose: Annotated[str, msgspec.Meta(max_length=limits.PURPOSE_CHARACTERS)] = ""
    behaviour: Annotated[str, msgspec.Meta(max_length=ID_LENGTH)] = ""
    base_model: Annotated[str, msgspec.Meta(max_length=limits.BASE_MODEL_CHARACTERS)] = ""
    parent: str | msgspec.UnsetType | None = msgspec.UNSET  # a version; null: the bare base; left out: what serves
    shuffle_rewards: bool = False
    hyperparameters: dict[str, object] = {}
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None


class ReasonBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    reason: Annotated[str, msgspec.Meta(max_length=limits.REASON_CHARACTERS)] = ""


class BatchList(ProjectAPIView):
    """POST triggers a batch; 409 with the reasons when not ready, or when no group is fit."""

    scopes: ClassVar = {"GET": (Scope.READ,), "POST": (Scope.OPERATE,)}

    @extend_schema(
        parameters=[OpenApiParameter("cursor", str), OpenApiParameter("limit", int)],
        responses=OpenApiTypes.OBJECT,
    )
    def get(self, request: Request) -> Response:
        page = pages.page(request, TrainingBatch.objects.filter(project=self.project).select_related("model"))
        return Response({"results": [summary(batch) for batch in page.rows], "next": page.next})

    @extend_schema(request=OpenApiTypes.OBJECT, responses={201: OpenApiTypes.OBJECT, 409: OpenApiTypes.OBJECT})
    def post(self, request: Request) -> Response:
        body = bodies.read(request, TriggerBody)
        batch = batches.trigger(self.project, wish(self.project, body), by=self.actor)
        nudge(tasks.tend_batch, batch.pk)
        return Response(summary(batch), status=status.HTTP_201_CREATED)


class BatchDetail(ProjectAPIView):
    @extend_schema(responses=OpenApiTypes.OBJECT)
    def get(self, request: Request, batch_id: str) -> Response:
        return Response(detail(find(self.project, batch_id)))


class BatchCancel(ProjectAPIView):
    scopes: ClassVar = {"POST": (Scope.OPERATE,)}

    @extend_schema(request=OpenApiTypes.OBJECT, responses=OpenApiTypes.OBJECT)
    def post(self, request: Request, batch_id: str) -> Response:
        body = bodies.read(request, ReasonBody)
        batch = find(self.project, batch_id)
        batches.cancel(batch, by=self.actor, reason=body.reason)
        return Response(detail(batch))


class BatchRetry(ProjectAPIView):
    scopes: ClassVar = {"POST": (Scope.OPERATE,)}

    @extend_schema(request=OpenApiTypes.OBJECT, responses=OpenApiTypes.OBJECT)
    def post(self, request: Request, batch_id: str) -> Response:
        body = bodies.read(request, ReasonBody)
        batch = find(self.project, batch_id)
        batches.retry(batch, by=self.actor, reason=body.reason)
        nudge(tasks.tend_batch, batch.pk)
        return Response(detail(batch))


class BatchData(ProjectAPIView):
    """What our trainer reads, for anyone's: NDJSON, a first line with the manifest hash, then a line a group."""

    @extend_schema(responses={(200, "application/x-ndjson"): OpenApiTypes.STR, 409: OpenApiTypes.OBJECT})
    def get(self, request: Request, batch_id: str) -> StreamingHttpResponse:
        batch = find(self.project, batch_id)
        return StreamingHttpResponse(
            _from_the_first(jobs.data(batch)),
            content_type="application/x-ndjson",
            headers={"Trainingsite-Manifest": batch.manifest_hash},
        )


def find(project: Project, batch_id: str) -> TrainingBatch:
    """The project's batch.

    Raises:
        Unknown: there is none of that id, or it is another project's.
    """
    batch = (
        TrainingBatch.objects.filter(project=project, batch_id=batch_id.replace("\0", ""))
        .select_related("project", "parent", "model")
        .first()
    )
    if batch is None:
        raise Unknown(f"There is no batch {batch_id[:ID_LENGTH]} in this project.")
    return batch


def wish(project: Project, body: TriggerBody) -> batches.Wish:
    """Raises Unknown: there is no such parent."""
    parent: TrainedModel | None = None
    if isinstance(body.parent, str):
        parent = TrainedModel.objects.filter(project=project, version=body.parent).first()
        if parent is None:
            raise Unknown(f"There is no version {body.parent[:ID_LENGTH]} in this project.")
    return batches.Wish(
        force=body.force,
        limit=body.limit,
        mode=body.mode,
        purpose=body.purpose,
        behaviour=body.behaviour,
        base_model=body.base_model,
        parent="serving" if body.parent is msgspec.UNSET else parent,
        shuffle_rewards=body.shuffle_rewards,
        hyperparameters=body.hyperparameters,
        seed=body.seed,
    )


def summary(batch: TrainingBatch) -> dict[str, object]:
    model = version_of(batch)
    return {
        "batch_id": batch.batch_id,
        "status": batch.status,
        "mode": batch.mode,
        "purpose": batch.purpose,
        "groups": batch.n_groups,
        "trajectories": batch.n_trajectories,
        "model_version": model.version if model else None,
        "created_at": batch.created_at,
    }


def detail(batch: TrainingBatch) -> dict[str, object]:
    run = batch.runs.order_by("-attempt").first()
    return {
        **summary(batch),
        "progress": batches.progress(batch),
        "eta_seconds": batches.eta_seconds(batch),
        "error": batch.error or None,
        "base_model": batch.base_model,
        "parent": batch.parent.version if batch.parent else None,
        "off_policy": batch.off_policy,
        "forced": batch.forced,
        "manifest_hash": batch.manifest_hash or None,
        "left_out": _left_out(batch),
        "run": None
        if run is None
        else {
            "attempt": run.attempt,
            "status": run.status,
            "phase": run.phase,
            "step": run.step,
            "total_steps": run.total_steps,
            "error": run.error or None,
        },
        "requested_by": batch.requested_by_name,
        "status_since": batch.status_since,
        "completed_at": batch.completed_at,
    }


def version_of(batch: TrainingBatch) -> TrainedModel | None:
    """The batch's model, once training gave it a version."""
    try:
        return batch.model
    except TrainedModel.DoesNotExist:
        return None


def _left_out(batch: TrainingBatch) -> list[dict[str, object]]:
    rows = batch.groups.filter(is_used=False).order_by().values("left_out").annotate(n=Count("pk"))
    return [{"reason": row["left_out"], "groups": row["n"]} for row in rows.order_by("-n", "left_out")]


def _from_the_first(lines: Iterator[bytes]) -> Iterator[bytes]:
    """The same lines, the first already made: what is refused is refused before the answer has begun."""
    first = next(lines)
    return itertools.chain((first,), lines)
