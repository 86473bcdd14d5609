"""The pages of judgments and judge calls: what was asked, what was answered, what it came to."""

import pytest
from django.test import Client

from tests import builders
from tests.admin.test_walk_admin import ESCAPED, HOSTILE
from training import judge_pages
from training.models import JudgeCall, JudgeKind, RewardJudgment
from trajectories.models import Project

pytestmark = pytest.mark.django_db


def asked(project: Project, words: str, **fields: object) -> JudgeCall:
    group = builders.make_group(project, (0.0, 1.0))
    values: dict[str, object] = {"state": "done", "prompt": words, "raw_answer": words, "model": "m", **fields}
    call = JudgeCall.objects.create(project=project, group=group, kind=JudgeKind.LLM, source="ruler", **values)
    for rank, row in enumerate(group.trajectories.order_by("-reward"), 1):
        RewardJudgment.objects.create(
            project=project, trajectory=row, group=group, judge_call=call, kind=JudgeKind.LLM, source="ruler",
            score=1 - rank / 4, rank=rank, reasoning=words, strengths=[words], weaknesses=[words],
        )  # fmt: skip
    return call


def read(project: Project, page: str) -> str:
    client = Client()
    client.force_login(builders.make_member(project))
    response = client.get(page)
    assert response.status_code == 200
    return response.content.decode()


def test_a_call_shows_its_scores_the_best_first_and_leads_to_each_attempt() -> None:
    project = builders.make_project()
    call = asked(project, "prefer the polite one")
    text = read(project, f"/admin/training/judgecall/{call.pk}/change/")
    for row in call.judgments.all():
        assert f"/admin/trajectories/trajectory/{row.trajectory_id}/change/" in text
    assert text.index("0.750") < text.index("0.500")
    assert "prefer the polite one" in text


def test_a_failed_call_says_why() -> None:
    project = builders.make_project()
    group = builders.make_group(project)
    call = JudgeCall.objects.create(
        project=project,
        group=group,
        kind="llm",
        source="ruler",
        state="error",
        error_kind="unreadable",
        error="no JSON",
    )
    text = read(project, f"/admin/training/judgecall/{call.pk}/change/")
    for words in ("unreadable", "no JSON", "No attempt was scored", "No answer was kept"):
        assert words in text


def test_an_answer_is_a_strangers_text() -> None:
    project = builders.make_project()
    call = asked(project, HOSTILE)
    judgment = call.judgments.all()[0]
    for page in (f"judgecall/{call.pk}", f"rewardjudgment/{judgment.pk}"):
        text = read(project, f"/admin/training/{page}/change/")
        assert ESCAPED in text
        assert "<script>alert" not in text
        assert "␛[31m" in text


def test_a_very_long_answer_is_cut_and_said_to_be() -> None:
    found = judge_pages.said("x" * (judge_pages.TEXT + 7))
    assert (len(found.text), found.left_out) == (judge_pages.TEXT, 7)
    project = builders.make_project()
    call = asked(project, "short", raw_answer="y" * (judge_pages.TEXT + 12))
    assert "12 more characters are not shown" in read(project, f"/admin/training/judgecall/{call.pk}/change/")


def test_a_judgment_stands_beside_its_siblings() -> None:
    project = builders.make_project()
    call = asked(project, "fine")
    first, second = call.judgments.order_by("rank")
    text = read(project, f"/admin/training/rewardjudgment/{first.pk}/change/")
    assert f"/admin/training/rewardjudgment/{second.pk}/change/" in text
    assert "rank 1 by" in text
