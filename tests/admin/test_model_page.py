"""A version's page, and those of its evaluations and deployments: the sentence first, then where it comes from."""

from datetime import timedelta
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from tests import builders
from tests.admin.test_walk_admin import ESCAPED, HOSTILE, furnish
from tests.training.candidates import attempt, evaluated, held_out
from training import family, model_pages, policies
from training.models import (
    AgentRoute,
    Deployment,
    Evaluation,
    RewardJudgment,
    ServingInterval,
    TrainedModel,
    TrainingBatch,
)
from trajectories.models import Project, Role

pytestmark = pytest.mark.django_db
MOST_QUERIES = 12


def sign_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def read(user: User, page: str) -> str:
    response = sign_in(user).get(page)
    assert response.status_code == 200
    return response.content.decode()


def address(row: TrainedModel | Evaluation | Deployment, what: str = "change") -> str:
    return f"/admin/training/{row._meta.model_name}/{row.pk}/{what}/"


def serve(model: TrainedModel | None, project: Project, **fields: object) -> ServingInterval:
    values: dict[str, object] = {"starts_at": timezone.now() - timedelta(hours=1), "by_name": "x", **fields}
    return ServingInterval.objects.create(project=project, model=model, **values)


def page_of(model: TrainedModel, user: User | None = None, *roles: str) -> model_pages.ModelPage:
    return model_pages.model_page(TrainedModel.objects.get(pk=model.pk), user, roles)


# --- the sentence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ((1.0,) * 12, (0.0,) * 12, "shown to be better"),
        ((0.0,) * 12, (1.0,) * 12, "shown to be worse"),
        ((1.0, 0.0) * 6, (0.0, 1.0) * 6, "not shown to be better"),
    ],
)
def test_the_page_begins_with_what_is_known(ours: tuple[float, ...], theirs: tuple[float, ...], said: str) -> None:
    model = builders.make_model()
    evaluated(model, None, (ours, theirs))
    verdict = page_of(model).verdict
    assert verdict.conclusion == said
    assert verdict.sentence.startswith("Against the base: better on ")
    page = read(builders.make_member(model.project), address(model))
    assert page.index(f"<strong>{said}</strong>") < page.index('<dl class="facts">')


def test_what_serves_now_is_the_measure_and_what_was_not_tried_is_named() -> None:
    project = builders.make_project()
    parent, serving = builders.make_model(project), builders.make_model(project, status="deployed")
    serve(serving, project)
    model = builders.make_model(project, parent=parent)
    evaluated(model, serving)
    evaluated(model, None)
    page = page_of(model)
    assert "Against v1.0.1" in page.verdict.sentence
    assert list(page.missing) == ["v1.0.0, its parent"]
    assert page.comparisons is not None
    assert [row.name for row in page.comparisons.rows] == ["the base", "v1.0.1 (serves now)"]


def test_regressions_lead_to_what_both_sides_did() -> None:
    project = builders.make_project()
    base = builders.make_model(project)
    model = builders.make_model(project, parent=base)
    (scenario,) = held_out(project, 1)
    result = {
        "scenarios": 1, "attempts": 2, "better": 0, "worse": 1, "ties": 0,
        "candidate": {"mean": 0, "lower": 0, "upper": 0}, "baseline": {"mean": 1, "lower": 1, "upper": 1},
        "gain": {"mean": -1.0, "lower": -1.0, "upper": -1.0},
        "regressions": [{"scenario": scenario.scenario_id, "candidate": 0.0, "baseline": 1.0, "gain": -1.0}],
    }  # fmt: skip
    one = builders.make_evaluation(model, base, state="done", result=result)
    attempt(one, scenario, model.version, 0.0)
    attempt(one, scenario, base.version, 1.0)
    attempt(one, scenario, "foreign:other", 0.5)
    (row,) = model_pages.regressions(one)
    assert [one.reward for one in row.ours] == [0.0]
    assert [one.reward for one in row.theirs] == [1.0]
    user = builders.make_member(project)
    for page in (address(model), address(one)):
        text = read(user, page)
        for transcript in (*row.ours, *row.theirs):
            assert f"/admin/trajectories/trajectory/{transcript.pk}/change/" in text


@pytest.mark.parametrize(
    ("status", "state", "said"),
    [
        ("ready", "", "nobody has asked for v1.0.0 to serve"),
        ("ready", "requested", "agents stay on the base, and the request goes on waiting"),
        ("ready", "approved", "takes over from the base"),
        ("deployed", "active", "keeps serving; 0 agents use it"),
        ("rejected", "rejected", "agents stay on the base."),
    ],
)
def test_it_says_what_happens_if_nothing_is_done(status: str, state: str, said: str) -> None:
    model = builders.make_model(status=status)
    if state:
        builders.make_deployment(model, state=state)
    assert said in page_of(model).if_nothing


# --- where it comes from, where it went ------------------------------------------------------------------------------


def test_the_family_goes_back_to_the_base_and_on_to_every_descendant() -> None:
    project = builders.make_project()
    first = builders.make_model(project)
    second = builders.make_model(project, parent=first)
    third = builders.make_model(project, parent=second)
    builders.make_model(project, parent=second)
    aunt = builders.make_model(project, parent=first)
    found = family.of(second)
    assert [one.name for one in found.nodes] == ["the base", "v1.0.0", "v1.0.1", "v1.0.2", "v1.0.3"]
    assert aunt.version not in {one.name for one in found.nodes}
    assert len(found.edges) == 4
    assert len({(one.x, one.y) for one in found.nodes}) == 5
    assert next(one for one in found.nodes if one.is_here).name == second.version
    assert address(third) in read(builders.make_member(project), address(second))


def test_it_leads_down_to_each_judgment() -> None:
    project = builders.make_project()
    group = builders.make_group(project, (0.0, 1.0))
    batch = builders.make_batch(project, status="completed", groups=(group,))
    item = batch.items.all()[0]
    judgment = RewardJudgment.objects.create(
        project=project, trajectory_id=item.trajectory_id or 0, kind="code", source=f"rule:{HOSTILE}", score=0.5
    )
    item.judgments = [judgment.pk]
    item.save()
    model = builders.make_model(project, batch=batch)
    user = builders.make_member(project)
    assert page_of(model).n_judgments == 1
    whole = read(user, address(model, "made-of"))
    part = sign_in(user).get(address(model, "made-of"), headers={"HX-Request": "true"}).content.decode()
    for text in (whole, part):
        assert f"/admin/training/rewardjudgment/{judgment.pk}/change/" in text
        assert f"/admin/trajectories/group/{group.pk}/change/" in text
        assert ESCAPED in text
    assert "<html" in whole
    assert "<html" not in part


def test_agents_cost_and_adapter_are_told(tmp_path: Path) -> None:
    project = builders.make_project()
    group = builders.make_group(project, (0.0, 1.0))
    group.trajectories.update(prompt_tokens=1000, completion_tokens=50)
    batch = builders.make_batch(project, status="completed", groups=(group,))
    now = timezone.now()
    builders.make_run(batch, status="failed", started_at=now - timedelta(hours=3), ended_at=now - timedelta(hours=2))
    builders.make_run(batch, status="succeeded", started_at=now - timedelta(hours=1), ended_at=now)
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16}')
    model = builders.make_model(
        project, batch=batch, status="deployed", adapter_path=str(tmp_path), adapter_bytes=10**6
    )
    interval = serve(model, project)
    AgentRoute.objects.create(agent=builders.make_agent(project, "clerk"), interval=interval)
    page = page_of(model)
    assert (list(page.agents), page.n_agents) == (["clerk"], 1)
    assert (page.cost.prompt_tokens, page.cost.completion_tokens, page.cost.runs) == (2000, 100, 2)
    assert page.cost.run_seconds == pytest.approx(7200)
    assert (page.adapter.rank, page.adapter.alpha, page.adapter.is_here) == (8, 16.0, True)
    text = read(builders.make_member(project), address(model))
    for words in ("1 MB", "2 h in 2 attempts", "2,000 read, 100 written", "clerk", str(tmp_path)):
        assert words in text


def test_of_a_version_without_anything_the_page_says_so() -> None:
    model = builders.make_model(adapter_path="/nowhere")
    text = read(builders.make_member(model.project), address(model))
    for words in ("Not evaluated yet", "Nobody has asked for it to serve", "not trained here", "not on this machine"):
        assert words in text


# --- what served when ------------------------------------------------------------------------------------------------


def test_the_time_line_has_a_lane_for_each_audience() -> None:
    project = builders.make_project()
    model = builders.make_model(project, status="deployed")
    now = timezone.now()
    serve(None, project, starts_at=now - timedelta(days=2), ends_at=now - timedelta(days=1))
    serve(model, project, starts_at=now - timedelta(days=1))
    serve(model, project, audience=HOSTILE[:40], starts_at=now - timedelta(hours=3))
    found = model_pages.timeline(project)
    assert found is not None
    assert [(lane.audience, len(lane.spans)) for lane in found.lanes] == [("every agent", 2), (HOSTILE[:40], 1)]
    spans = sorted(found.lanes[0].spans, key=lambda one: one.x)
    assert spans[0].x + spans[0].width == pytest.approx(spans[1].x, abs=0.1)
    user = builders.make_member(project)
    for page in ("/admin/training/servinginterval/", "/admin/training/deployment/"):
        text = read(user, page)
        assert 'class="timeline"' in text
        assert "<script>alert" not in text
    assert 'class="timeline"' not in read(
        builders.make_member(builders.make_project()), "/admin/training/servinginterval/"
    )
    assert model_pages.timeline(builders.make_project()) is None


# --- who may, and how much it asks -----------------------------------------------------------------------------------


def test_who_decides_is_offered_it_in_place() -> None:
    project = builders.make_project()
    model = builders.make_model(project)
    operator = builders.make_member(project, Role.OPERATOR)
    one = builders.make_deployment(model, requested_by=operator)
    approver = builders.make_member(project, Role.APPROVER)
    assert address(one, "do/approve") in read(approver, address(model))
    assert address(one, "do/withdraw") in read(operator, address(model))
    assert address(one, "do/approve") not in read(operator, address(model))
    reader = read(builders.make_member(project), address(model))
    assert "/do/" not in reader
    mine = builders.make_deployment(builders.make_model(project), requested_by=approver)
    assert "a second person decides" in read(approver, address(mine.model))


def test_a_stale_button_is_refused_with_words() -> None:
    project = builders.make_project()
    one = builders.make_deployment(builders.make_model(project), requested_by=builders.make_user())
    first, second = (sign_in(builders.make_member(project, Role.APPROVER)) for _ in range(2))
    first.post(address(one, "do/reject"), {"reason": "worse"})
    told = second.post(address(one, "do/reject"), {"reason": "me too"}, follow=True)
    assert b"decided" in told.content or b"is rejected" in told.content


def test_another_project_finds_nothing() -> None:
    model = builders.make_model()
    outsider = sign_in(builders.make_member(builders.make_project(), Role.APPROVER))
    assert outsider.get(address(model, "made-of")).status_code == 404
    assert outsider.get(address(model)).status_code == 404


def test_each_page_asks_little() -> None:
    project = builders.make_project()
    policies.of(project)
    furnish(project)
    for _ in range(8):
        builders.make_model(project, parent=TrainedModel.objects.filter(project=project).order_by("-pk")[0])
    user = builders.make_member(project, Role.APPROVER)
    client = sign_in(user)
    client.get("/admin/")
    model = TrainedModel.objects.get(project=project, version="v1.0.1")
    pages = [
        address(model),
        address(model, "made-of"),
        address(Evaluation.objects.get(project=project)),
        address(Deployment.objects.get(project=project)),
        f"/admin/training/rewardjudgment/{RewardJudgment.objects.get(project=project).pk}/change/",
        f"/admin/training/judgecall/{RewardJudgment.objects.get(project=project).judge_call_id}/change/",
        "/admin/training/deployment/",
        "/admin/training/servinginterval/",
        f"/admin/training/trainingbatch/{TrainingBatch.objects.get(project=project).pk}/change/",
    ]
    asked = {}
    for page in pages:
        with CaptureQueriesContext(connection) as queries:
            assert client.get(page).status_code == 200, page
        asked[page] = len(queries)
    assert {page: n for page, n in asked.items() if n > MOST_QUERIES} == {}


def test_hostile_words_are_shown_as_words() -> None:
    project = builders.make_project()
    furnish(project)
    user = builders.make_member(project, Role.APPROVER)
    for row in (
        TrainedModel.objects.get(project=project, version="v1.0.1"),
        Evaluation.objects.get(project=project),
        Deployment.objects.get(project=project),
    ):
        text = read(user, address(row))
        assert "<script>alert" not in text
        assert ESCAPED in text
