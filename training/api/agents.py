"""What an agent's program asks before it acts: which model, and where."""

from typing import ClassVar

from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema
from rest_framework import status
from rest_framework.request import Request
from rest_framework.response import Response

from training import routing
from trajectories.errors import Invalid, Refused, Unknown
from trajectories.models import ID_LENGTH, Agent, Project, Scope
from trajectories.views import ProjectAPIView


class AgentDetail(ProjectAPIView):
    """PUT makes an agent known before its first trajectory, which would do so too. Safe to repeat."""

    scopes: ClassVar = {"PUT": (Scope.INGEST,)}

    @extend_schema(request=None, responses={200: OpenApiTypes.OBJECT, 201: OpenApiTypes.OBJECT})
    def put(self, request: Request, agent_id: str) -> Response:
        if len(agent_id) > ID_LENGTH or "\0" in agent_id or not agent_id.strip():
            raise Invalid(f"An agent_id has 1 to {ID_LENGTH} characters.", limit=ID_LENGTH)
        agent, created = Agent.objects.get_or_create(project=self.project, agent_id=agent_id)
        return Response(
            {"agent_id": agent.agent_id, "created": created, "is_active": agent.is_active},
            status=status.HTTP_201_CREATED if created else status.HTTP_200_OK,
        )


class AgentModel(ProjectAPIView):
    """GET with `If-None-Match` costs a 304 as long as nothing was deployed or rolled back."""

    scopes: ClassVar = {"GET": (Scope.READ, Scope.INGEST)}

    @extend_schema(responses={200: OpenApiTypes.OBJECT, 304: None, 404: OpenApiTypes.OBJECT})
    def get(self, request: Request, agent_id: str) -> Response:
        agent = find(self.project, agent_id)
        if not agent.is_active:
            raise Refused(f"Agent {agent.agent_id} is deactivated. Activate it in the admin before it acts again.")
        route = routing.model_for(agent)
        headers = {"ETag": route.etag(), "Cache-Control": "private, no-cache"}
        if _matches(request.headers.get("If-None-Match", ""), route.etag()):
            return Response(status=status.HTTP_304_NOT_MODIFIED, headers=headers)
        return Response(
            {
                "agent_id": route.agent_id,
                "version": route.version,
                "model": route.model,
                "base_url": route.base_url,
                "deployment": route.deployment,
            },
            headers=headers,
        )


def find(project: Project, agent_id: str) -> Agent:
    """The project's agent.

    Raises:
        Unknown: there is none of that id, or it is another project's.
    """
    wanted = agent_id.replace("\0", "\ufffd")
    agent = Agent.objects.select_related("project").filter(project=project, agent_id=wanted).first()
    if agent is None:
        raise Unknown(
            f"There is no agent {agent_id[:ID_LENGTH]} in this project yet. PUT /api/v1/agents/<agent_id>/ makes it "
            "known, and so does its first trajectory."
        )
    return agent


def _matches(header: str, etag: str) -> bool:
    """RFC 9110, 13.1.2: weak comparison, several tags, or * for any."""
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return etag in tags or "*" in tags
