"""Every page of the admin, generated from the registry, as everyone who might ask for it."""

from collections.abc import Iterator

import pytest
from django.contrib import admin
from django.contrib.auth.models import User
from django.db import connection
from django.db.models import Model
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from tests import builders
from training import policies, readiness
from training.models import (
    EvaluationWork,
    JudgeCall,
    JudgeKind,
    RewardJudgment,
    RunMetric,
    ServingInterval,
)
from trajectories import history
from trajectories.history import SYSTEM
from trajectories.models import (
    Blob,
    BulkAction,
    BulkItem,
    LlmCallLog,
    OtelRecord,
    Project,
    RewardChange,
    Role,
    SharedText,
    Tombstone,
    Trajectory,
)
from trajectories.project_admin import ProjectAdmin

pytestmark = pytest.mark.django_db

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202egnp.exe"
ESCAPED = "&lt;script&gt;alert(1)&lt;/script&gt;"


def furnish(project: Project, words: str = HOSTILE) -> None:
    """One of everything, with these words wherever a sender or a judge may put some."""
    builders.make_member(project)
    scenario = builders.make_scenario(project, f"refund: {words}"[:60], description=words)
    group = builders.make_group(project, (0.0, 1.0), scenario=scenario)
    first = group.trajectories.all()[0]
    Trajectory.objects.filter(pk=first.pk).update(
        stop_reason=words[:200], findings=[{"check": words, "ok": False, "detail": words}]
    )
    LlmCallLog.objects.create(trajectory=first, position=0, step=0, model=words)
    batch = builders.make_batch(project, status="completed", groups=(group,), error=words, purpose="test")
    run = builders.make_run(batch, status="succeeded", log_tail=words, error=words)
    RunMetric.objects.create(run=run, step=1, values={"loss": 0.5, "entropy": 1.0, "drift": 0.1}, at=timezone.now())
    RunMetric.objects.create(run=run, step=2, values={"loss": 0.4, "entropy": 0.9, "drift": 0.2}, at=timezone.now())
    base = builders.make_model(project, status="deployed")
    model = builders.make_model(project, batch=batch, parent=base, notes=words)
    side = {"mean": 0.5, "lower": 0.4, "upper": 0.6}
    result = {
        "scenarios": 10, "attempts": 40, "candidate": side, "baseline": {"mean": 0.4, "lower": 0.3, "upper": 0.5},
        "gain": {"mean": 0.1, "lower": 0.05, "upper": 0.2},
        "better": 6, "worse": 2, "ties": 2,
        "regressions": [{"scenario": words, "candidate": 0.1, "baseline": 0.5, "gain": -0.4}],
    }  # fmt: skip
    evaluation = builders.make_evaluation(model, base, state="done", result=result)
    EvaluationWork.objects.create(evaluation=evaluation, scenario=scenario, side="candidate", n=2)
    operator = builders.make_user()
    builders.make_deployment(
        model, requested_by=operator, replaces=base, evaluation=evaluation, reason=words,
        gates=[{"name": "better", "ok": True, "value": 0.05, "threshold": 0.0, "detail": words}],
    )  # fmt: skip
    ServingInterval.objects.create(project=project, model=base, starts_at=timezone.now(), by_name="x", reason=words)
    rubric = builders.make_rubric(project, words)
    call = JudgeCall.objects.create(
        project=project, group=group, kind=JudgeKind.LLM, source="ruler", rubric=rubric, model="m", raw_answer=words,
        prompt=words, state="done",
    )  # fmt: skip
    RewardJudgment.objects.create(
        project=project, trajectory=first, group=group, judge_call=call, kind=JudgeKind.LLM, source="ruler", score=0.5,
        rank=1, reasoning=words, strengths=[words], weaknesses=[words],
    )  # fmt: skip
    policies.of(project)
    readiness.snapshot(project)
    builders.make_key(project)
    RewardChange.objects.create(project=project, trajectory=first, reward=1.0, source=words[:90], by_name="x")
    SharedText.objects.create(project=project, text_hash=b"x" * 32, kind="system", raw_size=1, data=b"x")
    Blob.objects.create(
        project=project, kind="text", content_hash=b"x" * 32, raw_size=1, stored_size=1, preview=words, location=words
    )
    Tombstone.objects.create(project=project, trajectory_id="gone", content_hash=b"x" * 32, by_name="x", reason=words)
    OtelRecord.objects.create(
        project=project, kind="span", trace_id="t", key="k", name=words, content_hash=b"x" * 32, raw_size=1, data=b"x",
        state="quarantined", reason=words,
    )  # fmt: skip
    action = BulkAction.objects.create(
        project=project,
        kind="exclude",
        chosen_by=words,
        reason=words,
        by_name="r",
        n_chosen=2,
        n_refused=1,
        error=words,
    )
    BulkItem.objects.create(action=action, object_id=first.pk, state="refused", detail=words)
    history.record(group, "open", "closed", project=project, by=SYSTEM, reason=words)


def nouns() -> Iterator[tuple[type[Model], ProjectAdmin[Model]]]:
    for model, model_admin in admin.site._registry.items():
        if isinstance(model_admin, ProjectAdmin):
            yield model, model_admin


def address(model: type[Model]) -> str:
    return f"/admin/{model._meta.app_label}/{model._meta.model_name}/"


def rows_of(model: type[Model], model_admin: ProjectAdmin[Model], project: Project) -> list[Model]:
    if model is Project:
        return [project]
    return list(model._default_manager.filter(**{model_admin.project_path: project}))


def sign_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def test_every_noun_of_a_project_is_in_the_admin() -> None:
    """A model that nobody registered could not be looked at; these few are parts of another's page."""
    parts = {"redactioncount", "trajectorysegment", "indexingwork", "knownversion", "batchgroup", "batchitem",
             "runmetric", "approval", "evaluationwork", "lockedsetopening", "agentroute", "blobuse",
             "loosefile", "bulkitem", "arrivalhour", "boardsnapshot", "searchtext",
             "steprewards", "relation", "metricvalue", "savedview"}  # fmt: skip
    from django.apps import apps

    missing = {
        model._meta.model_name
        for label in ("trajectories", "training")
        for model in apps.get_app_config(label).get_models()
        if model not in admin.site._registry
    }
    assert missing <= parts


@pytest.mark.parametrize("role", [*Role.values, "superuser"])
def test_members_see_every_page_of_their_project(role: str) -> None:
    project = builders.make_project()
    furnish(project)
    user = builders.make_user(superuser=True) if role == "superuser" else builders.make_member(project, role)
    client = sign_in(user)
    pages = ["/admin/", "/admin/dashboard/"]
    for model, model_admin in nouns():
        pages += [address(model), f"{address(model)}?q=abc"]
        rows = rows_of(model, model_admin, project)
        assert rows, f"furnish() makes no {model.__name__}"
        pages.append(f"{address(model)}{rows[0].pk}/change/")
    faults = {}
    for page in pages:
        response = client.get(page)
        text = response.content.decode()
        if response.status_code != 200:
            faults[page] = str(response.status_code)
        elif "<script>alert" in text:
            faults[page] = "hostile text is not escaped"
        elif "script-src 'self'" not in response.headers["Content-Security-Policy"]:
            faults[page] = "no Content-Security-Policy"
        elif " style=" in text or " onclick=" in text:
            faults[page] = "inline style or script, which the policy blocks"
    assert faults == {}


def test_hostile_words_are_shown_as_words() -> None:
    project = builders.make_project()
    furnish(project)
    client = sign_in(builders.make_member(project))
    judgment = RewardJudgment.objects.get(project=project)
    assert ESCAPED in client.get(f"/admin/training/rewardjudgment/{judgment.pk}/change/").content.decode()


def test_an_outsider_finds_nothing_of_another_project() -> None:
    project, elsewhere = builders.make_project(), builders.make_project()
    furnish(project)
    client = sign_in(builders.make_member(elsewhere, Role.OPERATOR))
    for model, model_admin in nouns():
        row = rows_of(model, model_admin, project)[0]
        response = client.get(f"{address(model)}{row.pk}/change/")
        assert response.status_code in (302, 404), address(model)
        if response.status_code == 302:  # Django's way of saying "there is none", on the first page
            assert response.headers["Location"] == "/admin/"
        assert f"{address(model)}{row.pk}/change/" not in client.get(address(model)).content.decode()
        for verb in model_admin.verbs:
            assert client.post(f"{address(model)}{row.pk}/do/{verb.name}/", {"reason": "x"}).status_code == 404


def test_nobody_gets_in_without_signing_in() -> None:
    for model, _ in nouns():
        assert Client().get(address(model)).status_code == 302


def test_somebody_without_a_membership_sees_an_empty_first_page() -> None:
    response = sign_in(builders.make_user()).get("/admin/")
    assert response.status_code == 200
    assert b"member of no project" in response.content


def test_what_one_may_not_do_is_not_offered_and_refused_when_forced() -> None:
    project = builders.make_project()
    furnish(project)
    reader = sign_in(builders.make_member(project, Role.READER))
    for model, model_admin in nouns():
        for row in rows_of(model, model_admin, project)[:1]:
            page = reader.get(f"{address(model)}{row.pk}/change/").content.decode()
            for verb in model_admin.verbs:
                assert f"../do/{verb.name}/" not in page
                forced = reader.post(f"{address(model)}{row.pk}/do/{verb.name}/", {"reason": "x"})
                assert forced.status_code == 403, (model, verb.name)


def test_nothing_can_be_deleted_in_bulk() -> None:
    project = builders.make_project()
    furnish(project)
    client = sign_in(builders.make_member(project, Role.OPERATOR))
    for model, model_admin in nouns():
        row = rows_of(model, model_admin, project)[0]
        form = {"action": "delete_selected", "_selected_action": [row.pk], "post": "yes"}
        client.post(address(model), form)
        assert model._default_manager.filter(pk=row.pk).exists(), model


def test_lists_ask_the_database_the_same_however_many_rows_there_are() -> None:
    project = builders.make_project()
    furnish(project)
    client = sign_in(builders.make_member(project))
    few = {}
    for model, _ in nouns():
        with CaptureQueriesContext(connection) as queries:
            client.get(address(model))
        few[model] = len(queries)
    for _ in range(6):
        builders.make_group(project)
    for model, _ in nouns():
        with CaptureQueriesContext(connection) as queries:
            client.get(address(model))
        assert len(queries) <= few[model], model
        assert few[model] <= 12, model


def test_no_page_asks_the_database_more_than_twelve_things() -> None:
    project = builders.make_project()
    furnish(project)
    client = sign_in(builders.make_member(project, Role.OPERATOR))
    asked: dict[str, int] = {}
    for model, model_admin in nouns():
        for row in rows_of(model, model_admin, project):
            page = f"{address(model)}{row.pk}/change/"
            client.get(page)  # content types and the like are read once a process
            with CaptureQueriesContext(connection) as queries:
                assert client.get(page).status_code == 200
            asked[page] = sum(not one["sql"].startswith(("SAVEPOINT", "RELEASE")) for one in queries.captured_queries)
    assert {page: n for page, n in asked.items() if n > 12} == {}


def test_lists_never_read_payloads() -> None:
    project = builders.make_project()
    furnish(project)
    client = sign_in(builders.make_member(project))
    with CaptureQueriesContext(connection) as queries:
        client.get("/admin/trajectories/trajectory/")
        client.get("/admin/training/judgecall/")
    asked = " ".join(query["sql"] for query in queries.captured_queries)
    for column in ('"trajectory_segments"', '"judge_calls"."prompt"', '"judge_calls"."raw_answer"', '"content_hash"'):
        assert column not in asked
