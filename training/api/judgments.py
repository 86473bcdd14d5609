"""Feedback on a trajectory by people, code or models. It is kept beside the reward and never touches it."""

import math
from typing import Annotated, ClassVar, Literal

import msgspec
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import status
from rest_framework.request import Request
from rest_framework.response import Response

from training import limits
from training.api import bodies, pages
from training.models import JudgeKind, RewardJudgment
from trajectories import redaction
from trajectories.errors import Invalid, Unknown
from trajectories.models import ID_LENGTH, Project, Scope, Trajectory
from trajectories.views import ProjectAPIView

FEEDBACK = "feedback:"  # before the name: no source of a mix is called so


class FeedbackBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    annotator_kind: Literal["human", "code", "llm"]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=limits.NAME_CHARACTERS)]
    score: float | None = None
    comment: Annotated[str, msgspec.Meta(max_length=limits.COMMENT_CHARACTERS)] = ""
    author: Annotated[str, msgspec.Meta(max_length=limits.AUTHOR_CHARACTERS)] = ""
    step: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None


class TrajectoryJudgments(ProjectAPIView):
    """POST feedback; GET everything that was said, newest first."""

    scopes: ClassVar = {"GET": (Scope.READ,), "POST": (Scope.INGEST,)}

    @extend_schema(
        parameters=[OpenApiParameter("cursor", str), OpenApiParameter("limit", int)], responses=OpenApiTypes.OBJECT
    )
    def get(self, request: Request, trajectory_id: str) -> Response:
        trajectory = find(self.project, trajectory_id)
        page = pages.page(request, RewardJudgment.objects.filter(trajectory=trajectory))
        return Response({"results": [row(one) for one in page.rows], "next": page.next})

    @extend_schema(request=OpenApiTypes.OBJECT, responses={201: OpenApiTypes.OBJECT})
    def post(self, request: Request, trajectory_id: str) -> Response:
        body = bodies.read(request, FeedbackBody)
        trajectory = find(self.project, trajectory_id)
        if body.score is not None and not math.isfinite(body.score):
            raise Invalid("score must be a finite number, or null.", pointer="/score")
        if body.step is not None and body.step >= max(trajectory.n_steps, 1):
            raise Invalid(f"step is {body.step}; the trajectory has {trajectory.n_steps}.", pointer="/step")
        rules = redaction.rules(self.project)
        name = redaction.text(body.name, rules)[: limits.NAME_CHARACTERS]
        said = RewardJudgment.objects.create(
            project=self.project,
            trajectory=trajectory,
            group_id=trajectory.group_id,
            # "llm" is kept for judge calls of this site, which have their call beside them.
            kind=JudgeKind.HUMAN if body.annotator_kind == "human" else JudgeKind.CODE,
            source=f"{FEEDBACK}{name}",
            name=f"{name} ({body.annotator_kind})" if body.annotator_kind == "llm" else name,
            score=body.score,
            reasoning=redaction.text(body.comment, rules),
            step=body.step,
            author=redaction.text(body.author, rules)[:150] or self.actor.name[:150],
            counts=False,
        )
        return Response(row(said), status=status.HTTP_201_CREATED)


def find(project: Project, trajectory_id: str) -> Trajectory:
    """The project's trajectory. Raises Unknown for what never was and for another's alike."""
    found = Trajectory.objects.filter(project=project, trajectory_id=trajectory_id[:ID_LENGTH]).first()
    if found is None or len(trajectory_id) > ID_LENGTH:
        raise Unknown(f"There is no trajectory {trajectory_id[:ID_LENGTH]} in this project.")
    return found


def row(one: RewardJudgment) -> dict[str, object]:
    return {
        "id": one.pk,
        "annotator_kind": "llm" if one.name.endswith("(llm)") else one.kind,
        "name": one.name or one.source,
        "source": one.source,
        "score": one.score,
        "rank": one.rank,
        "comment": one.reasoning,
        "strengths": one.strengths,
        "weaknesses": one.weaknesses,
        "author": one.author,
        "step": one.step,
        "is_current": one.is_current,
        "counts": one.counts,
        "created_at": one.created_at.isoformat(),
    }
