"""Versions by HTTP: the list, one with its lineage, and adapters that others trained."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from django.conf import settings
from django.core.files.uploadedfile import UploadedFile
from django.db.models import Count, Max, Min, Q
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import parsers, status
from rest_framework.exceptions import UnsupportedMediaType
from rest_framework.request import Request
from rest_framework.response import Response

from training import adapters, batches, limits
from training.api import pages
from training.api.batches import find as find_batch
from training.models import Evaluation, Mode, ModelStatus, TrainedModel
from trajectories import history
from trajectories.errors import Invalid, TooLarge, Unknown
from trajectories.models import Project, Scope
from trajectories.views import ProjectAPIView


class ModelList(ProjectAPIView):
    """GET lists versions, newest first. POST takes an adapter that was trained elsewhere from a batch's data."""

    scopes: ClassVar = {"GET": (Scope.READ,), "POST": (Scope.OPERATE,)}
    parser_classes = (parsers.MultiPartParser,)

    @extend_schema(
        parameters=[
            OpenApiParameter("cursor", str),
            OpenApiParameter("limit", int),
            OpenApiParameter("status", str, enum=ModelStatus.values),
        ],
        responses=OpenApiTypes.OBJECT,
    )
    def get(self, request: Request) -> Response:
        rows = TrainedModel.objects.filter(project=self.project).select_related("parent", "batch")
        wanted = request.query_params.get("status")
        if wanted is not None:
            if wanted not in ModelStatus.values:
                raise Invalid(f"status is {wanted[:20]!r}; there are {', '.join(ModelStatus.values)}.")
            rows = rows.filter(status=wanted)
        page = pages.page(request, rows)
        latest = latest_evaluations(page.rows)
        return Response({"results": [row(model, latest.get(model.pk)) for model in page.rows], "next": page.next})

    @extend_schema(
        request={"multipart/form-data": OpenApiTypes.OBJECT},
        responses={201: OpenApiTypes.OBJECT, 409: OpenApiTypes.OBJECT},
    )
    def post(self, request: Request) -> Response:
        """Fields of the form: `batch_id`, `config` (adapter_config.json), `adapter` (adapter_model.safetensors)."""
        announced = int(request.META.get("CONTENT_LENGTH") or 0)
        if announced > limits.ADAPTER_BYTES + limits.ADAPTER_CONFIG_BYTES:
            raise too_large("adapter", limits.ADAPTER_BYTES, announced)
        if not (request.content_type or "").startswith("multipart/form-data"):
            raise UnsupportedMediaType(request.content_type or "nothing")
        batch_id = request.POST.get("batch_id")
        if not batch_id:
            raise Invalid("batch_id is missing: the batch whose data the adapter was trained on.", pointer="/batch_id")
        batch = find_batch(self.project, batch_id)
        config, weights = _file(request, "config"), _file(request, "adapter")
        for name, sent, limit in (
            ("config", config, limits.ADAPTER_CONFIG_BYTES),
            ("adapter", weights, limits.ADAPTER_BYTES),
        ):
            if sent.size is None or sent.size > limit:
                raise too_large(name, limit, sent.size)
        Path(settings.ADAPTERS_DIR).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".sent-", dir=settings.ADAPTERS_DIR) as folder:
            for name, sent in ((adapters.CONFIG, config), (adapters.WEIGHTS, weights)):
                with (Path(folder) / name).open("wb") as kept:
                    shutil.copyfileobj(sent, kept)
            model = batches.accept_external(batch, Path(folder), by=self.actor)
        return Response(detail(model), status=status.HTTP_201_CREATED)


class ModelDetail(ProjectAPIView):
    @extend_schema(responses=OpenApiTypes.OBJECT)
    def get(self, request: Request, version: str) -> Response:
        return Response(detail(find(self.project, version)))


def too_large(name: str, limit: int, size: int | None) -> TooLarge:
    return TooLarge(f"{name} may have up to {limit} bytes.", limit=limit, size=size, pointer=f"/{name}")


def _file(request: Request, name: str) -> "UploadedFile[bytes]":
    sent: UploadedFile[bytes] | None = request.FILES.get(name)
    if sent is None:
        raise Invalid(
            f"{name} is missing. Send batch_id, config and adapter, the last two as files.", pointer=f"/{name}"
        )
    return sent


def find(project: Project, version: str) -> TrainedModel:
    """The project's version.

    Raises:
        Unknown: there is none of that name, or it is another project's.
    """
    model = (
        TrainedModel.objects.filter(project=project, version=version).select_related("parent", "batch", "run").first()
    )
    if model is None:
        raise Unknown(f"There is no version {version[:32]} in this project.")
    return model


def latest_evaluations(models: Sequence[TrainedModel]) -> dict[int, Evaluation]:
    """The newest evaluation of each version, by the version's pk."""
    found = Evaluation.objects.filter(candidate__in=[model.pk for model in models])
    return {one.candidate_id: one for one in found.select_related("baseline").order_by("candidate_id", "pk")}


def row(model: TrainedModel, evaluation: Evaluation | None) -> dict[str, object]:
    return {
        "version": model.version,
        "status": model.status,
        "parent": model.parent.version if model.parent else None,
        "batch_id": model.batch.batch_id if model.batch else None,
        "base_model": model.base_model,
        "evaluation": None if evaluation is None else _evaluation(evaluation),
        "created_at": model.created_at,
        "mode": model.mode,
        "origin": model.origin,
        "off_policy": model.off_policy,
        "serving_name": model.serving_name,
    }


def _evaluation(evaluation: Evaluation) -> dict[str, object]:
    return {
        "evaluation_id": evaluation.evaluation_id,
        "state": evaluation.state,
        "baseline": evaluation.baseline.version if evaluation.baseline else None,
        "result": evaluation.result,
    }


def detail(model: TrainedModel) -> dict[str, object]:
    """A version with where it comes from and what came of it."""
    return {
        **row(model, latest_evaluations([model]).get(model.pk)),
        "status_since": model.status_since,
        "ready_at": model.ready_at,
        "notes": model.notes,
        "adapter": {"sha256": model.adapter_hash, "bytes": model.adapter_bytes} if model.adapter_hash else None,
        "summary": model.summary,
        "lineage": {"ancestors": _ancestors(model), "children": _children(model), "data": _data(model)},
        "history": [
            {"was": one.was, "to": one.to, "by": one.by_name, "reason": one.reason, "at": one.created_at}
            for one in history.of(model)
        ],
    }


def _ancestors(model: TrainedModel) -> list[str]:
    """From the parent down to the first version; the bare base stands below."""
    chain: list[str] = []
    parents = dict(TrainedModel.objects.filter(project=model.project).values_list("pk", "parent"))
    names = dict(TrainedModel.objects.filter(project=model.project).values_list("pk", "version"))
    at = model.parent_id
    while at is not None and names[at] not in chain:
        chain.append(names[at])
        at = parents[at]
    return chain


def _children(model: TrainedModel) -> list[str]:
    return list(model.children.order_by("ordinal").values_list("version", flat=True))


def _data(model: TrainedModel) -> dict[str, object] | None:
    """What it learned from: whose behaviour, how much of it, how old."""
    if model.batch is None:
        return None
    items = model.batch.items.all()
    by_behaviour = (
        items.order_by()
        .values("batch_group__behaviour")
        .annotate(trajectories=Count("pk"), trained=Count("pk", filter=Q(is_trained=True)))
        .order_by("-trajectories", "batch_group__behaviour")
    )
    span = items.aggregate(first=Min("trajectory__started_at"), last=Max("trajectory__started_at"))
    return {
        "manifest_hash": model.batch.manifest_hash,
        "groups": model.batch.n_groups,
        "trajectories": model.batch.n_trajectories,
        "first": span["first"],
        "last": span["last"],
        "behaviours": [
            {
                "behaviour": one["batch_group__behaviour"] or None,
                "trajectories": one["trajectories"],
                "trained": one["trained"],
                "off_policy": model.mode != Mode.GRPO
                and one["batch_group__behaviour"] != (model.parent.version if model.parent else None),
            }
            for one in by_behaviour
        ],
    }
