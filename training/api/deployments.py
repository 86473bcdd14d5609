"""Deployments by HTTP: request, a second person's decision, rollback."""

from typing import Annotated, ClassVar

import msgspec
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import status
from rest_framework.request import Request
from rest_framework.response import Response

from training import deployments, limits, tasks
from training.api import bodies, pages
from training.api.evaluations import find as find_evaluation
from training.api.models import find as find_model
from training.models import Approval, Deployment
from training.routing import EVERYONE
from trainingsite.celery import nudge
from trajectories import history
from trajectories.errors import Unknown
from trajectories.models import ID_LENGTH, Project, Scope
from trajectories.views import ProjectAPIView


class DeploymentBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST deployments/."""

    version: str
    strategy: str = "immediate"
    weight: float | None = None  # of gradual: share of agents
    audience: Annotated[str, msgspec.Meta(max_length=ID_LENGTH)] = EVERYONE  # of test: one agent_id
    evaluation_id: str | None = None  # the evidence; left out: the newest against what serves
    reason: Annotated[str, msgspec.Meta(max_length=limits.REASON_CHARACTERS)] = ""


class DecisionBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    reason: Annotated[str, msgspec.Meta(max_length=limits.REASON_CHARACTERS)] = ""
    override: bool = False  # approve although waivable checks are not met; takes a reason


class ReasonBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    reason: Annotated[str, msgspec.Meta(max_length=limits.REASON_CHARACTERS)] = ""


class DeploymentList(ProjectAPIView):
    """POST asks for a version to serve. It is kept with its gate's rows, met or not; a person decides."""

    scopes: ClassVar = {"GET": (Scope.READ,), "POST": (Scope.OPERATE,)}

    @extend_schema(
        parameters=[OpenApiParameter("cursor", str), OpenApiParameter("limit", int)], responses=OpenApiTypes.OBJECT
    )
    def get(self, request: Request) -> Response:
        rows = Deployment.objects.filter(project=self.project).select_related("model", "replaces", "evaluation")
        page = pages.page(request, rows)
        return Response({"results": [summary(one) for one in page.rows], "next": page.next})

    @extend_schema(request=OpenApiTypes.OBJECT, responses={201: OpenApiTypes.OBJECT, 409: OpenApiTypes.OBJECT})
    def post(self, request: Request) -> Response:
        body = bodies.read(request, DeploymentBody)
        deployment = deployments.request(
            find_model(self.project, body.version),
            by=self.actor,
            strategy=body.strategy,
            weight=body.weight,
            audience=body.audience,
            evaluation=find_evaluation(self.project, body.evaluation_id) if body.evaluation_id else None,
            reason=body.reason,
        )
        return Response(detail(deployment), status=status.HTTP_201_CREATED)


class DeploymentDetail(ProjectAPIView):
    @extend_schema(responses=OpenApiTypes.OBJECT)
    def get(self, request: Request, pk: int) -> Response:
        return Response(detail(find(self.project, pk)))


class DeploymentApprove(ProjectAPIView):
    """In the name of the key's owner, who is an approver of the project and not the requester."""

    scopes: ClassVar = {"POST": (Scope.APPROVE,)}

    @extend_schema(request=OpenApiTypes.OBJECT, responses={200: OpenApiTypes.OBJECT, 409: OpenApiTypes.OBJECT})
    def post(self, request: Request, pk: int) -> Response:
        body = bodies.read(request, DecisionBody)
        deployment = find(self.project, pk)
        deployments.approve(deployment, by=self.actor, reason=body.reason, override=body.override)
        nudge(tasks.roll_out, deployment.pk)
        return Response(detail(deployment))


class DeploymentReject(ProjectAPIView):
    scopes: ClassVar = {"POST": (Scope.APPROVE,)}

    @extend_schema(request=OpenApiTypes.OBJECT, responses={200: OpenApiTypes.OBJECT, 409: OpenApiTypes.OBJECT})
    def post(self, request: Request, pk: int) -> Response:
        body = bodies.read(request, ReasonBody)
        deployment = find(self.project, pk)
        deployments.reject(deployment, by=self.actor, reason=body.reason)
        return Response(detail(deployment))


class DeploymentWithdraw(ProjectAPIView):
    scopes: ClassVar = {"POST": (Scope.OPERATE,)}

    @extend_schema(request=OpenApiTypes.OBJECT, responses={200: OpenApiTypes.OBJECT, 409: OpenApiTypes.OBJECT})
    def post(self, request: Request, pk: int) -> Response:
        body = bodies.read(request, ReasonBody)
        deployment = find(self.project, pk)
        deployments.withdraw(deployment, by=self.actor, reason=body.reason)
        return Response(detail(deployment))


class DeploymentRollback(ProjectAPIView):
    """Agents go back to what served before, in this one call."""

    scopes: ClassVar = {"POST": (Scope.OPERATE, Scope.APPROVE)}

    @extend_schema(request=OpenApiTypes.OBJECT, responses={200: OpenApiTypes.OBJECT, 409: OpenApiTypes.OBJECT})
    def post(self, request: Request, pk: int) -> Response:
        body = bodies.read(request, ReasonBody)
        deployment = find(self.project, pk)
        deployments.roll_back(deployment, by=self.actor, reason=body.reason)
        return Response(detail(deployment))


def find(project: Project, pk: int) -> Deployment:
    """The project's deployment.

    Raises:
        Unknown: there is none of that id, or it is another project's.
    """
    rows = Deployment.objects.filter(project=project, pk=pk) if pk < 2**63 else Deployment.objects.none()
    found = rows.select_related("project", "model", "model__project", "replaces", "evaluation__baseline").first()
    if found is None:
        raise Unknown(f"There is no deployment {str(pk)[:20]} in this project.")
    return found


def summary(deployment: Deployment) -> dict[str, object]:
    return {
        "id": deployment.pk,
        "version": deployment.model.version,
        "strategy": deployment.strategy,
        "state": deployment.state,
        "weight": deployment.weight,
        "audience": deployment.audience,
        "replaces": deployment.replaces.version if deployment.replaces else None,
        "evaluation_id": deployment.evaluation.evaluation_id if deployment.evaluation else None,
        "requested_by": deployment.requested_by_name,
        "created_at": deployment.created_at,
        "state_since": deployment.state_since,
        "error": deployment.error or None,
    }


def detail(deployment: Deployment) -> dict[str, object]:
    approval = Approval.objects.filter(deployment=deployment).first()
    return {
        **summary(deployment),
        "gates": deployment.gates,
        "evidence": deployment.evidence,
        "reason": deployment.reason,
        "decision": None
        if approval is None
        else {
            "approved": approval.approved,
            "by": approval.by_name,
            "reason": approval.reason,
            "at": approval.created_at,
        },
        "history": [
            {"was": one.was, "to": one.to, "by": one.by_name, "reason": one.reason, "at": one.created_at}
            for one in history.of(deployment)
        ],
    }
