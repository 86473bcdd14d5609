"""Groups by HTTP: the list, and one with its attempts and what was said of them."""

from collections.abc import Iterable, Mapping
from typing import ClassVar

from django.db.models import QuerySet
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from training.api import judgments, pages
from training.models import RewardJudgment
from trajectories import api as recordings
from trajectories import indexing
from trajectories.errors import Invalid, Unknown
from trajectories.models import Group, GroupState, Judging, Project, Scope, Trajectory
from trajectories.views import ProjectAPIView

FILTERS = {
    "scenario": "scenario__scenario_id",
    "role": "role",
    "behaviour": "behaviour",
    "state": "state",
    "judging": "judging",
    "evaluation": "is_evaluation",
}
CHOICES = {"state": GroupState.values, "judging": Judging.values, "evaluation": ["true", "false"]}


class GroupList(ProjectAPIView):
    scopes: ClassVar = {"GET": (Scope.READ,)}

    @extend_schema(
        operation_id="list_groups",
        parameters=[OpenApiParameter(name, str) for name in ("cursor", "limit", *FILTERS)],
        responses=OpenApiTypes.OBJECT,
    )
    def get(self, request: Request) -> Response:
        indexing.drain(self.project)
        rows = Group.objects.filter(project=self.project).select_related("scenario")
        page = pages.page(request, filtered(rows, request.query_params))
        return Response({"results": [summary(group) for group in page.rows], "next": page.next})


class GroupDetail(ProjectAPIView):
    """One group: its attempts in order of arrival, and their numbers as lists of the same order."""

    scopes: ClassVar = {"GET": (Scope.READ,)}

    @extend_schema(operation_id="get_group", responses=OpenApiTypes.OBJECT)
    def get(self, request: Request, pk: int) -> Response:
        indexing.drain(self.project)
        return Response(detail(find(self.project, pk)))


def filtered(rows: QuerySet[Group], arguments: Mapping[str, str]) -> QuerySet[Group]:
    """Raises Invalid: an unknown filter, or a value that it cannot have."""
    for name in set(arguments) - {"cursor", "limit"}:
        value = arguments[name]
        if name not in FILTERS:
            raise Invalid(f"There is no filter {name[:50]!r}. There are: {', '.join(FILTERS)}.")
        if name in CHOICES and value not in CHOICES[name]:
            raise Invalid(f"{name} is {value[:50]!r}. There are: {', '.join(CHOICES[name])}.")
        rows = rows.filter(
            **{FILTERS[name]: value == "true" if name == "evaluation" else value.replace("\0", "\ufffd")}
        )
    return rows


def find(project: Project, pk: int) -> Group:
    """The project's group.

    Raises:
        Unknown: there is none of that id, or it is another project's.
    """
    rows = Group.objects.filter(project=project, pk=pk) if pk < 2**63 else Group.objects.none()
    group = rows.select_related("scenario").first()
    if group is None:
        raise Unknown(f"There is no group {str(pk)[:20]} in this project.")
    return group


def summary(group: Group) -> dict[str, object]:
    return {
        "id": group.pk,
        "scenario_id": group.scenario.scenario_id,
        "role": group.role,
        "behaviour": group.behaviour,
        "cohort": group.cohort,
        "is_evaluation": group.is_evaluation,
        "by_window": group.by_window,
        "declared_size": group.declared_size,
        "state": group.state,
        "judging": group.judging,
        "judge_error": group.judge_error or None,
        "n": group.n,
        "n_trainable": group.n_trainable,
        "reward_n": group.reward_n,
        "reward_min": group.reward_min,
        "reward_max": group.reward_max,
        "reward_mean": group.reward_sum / group.reward_n if group.reward_n else None,
        "judged_n": group.judged_n,
        "judged_min": group.judged_min,
        "judged_max": group.judged_max,
        "judged_mean": group.judged_sum / group.judged_n if group.judged_n else None,
        "last_received_at": group.last_received_at,
        "created_at": group.created_at,
    }


def detail(group: Group) -> dict[str, object]:
    """The group with every attempt, those that do not count (superseded, twins, excluded) marked as such."""
    members = list(
        Trajectory.objects.filter(group=group).select_related("agent", "scenario").order_by("received_at", "pk")
    )
    said: dict[int, list[RewardJudgment]] = {member.pk: [] for member in members}
    for judgment in RewardJudgment.objects.filter(trajectory__in=said, is_current=True).order_by("pk"):
        said[judgment.trajectory_id].append(judgment)
    sources = sorted({one.source for found in said.values() for one in found})
    return {
        **summary(group),
        "scenario_description": group.scenario.description,
        "trajectories": [
            {**recordings.summary(member), "judgments": [judgments.row(one) for one in said[member.pk]]}
            for member in members
        ],
        "trajectory_ids": [member.trajectory_id for member in members],
        "rewards": [member.reward for member in members],
        "scores": {source: [_score(said[member.pk], source) for member in members] for source in sources},
    }


def _score(said: Iterable[RewardJudgment], source: str) -> float | None:
    """The newest current score of a source; None: it gave none."""
    return next((one.score for one in reversed(list(said)) if one.source == source), None)
