"""The first page: read from snapshots, by the same few questions however many projects, and what waits for whom."""

from datetime import timedelta

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from pytest_django import Settings

from tests import builders
from tests.admin.test_walk_admin import ESCAPED, HOSTILE, furnish
from tests.training.candidates import held_out
from training import boards, policies, readiness, shared_rewards, tasks
from training.models import BoardSnapshot, ReadinessSnapshot, TrainedModel
from trajectories.models import ArrivalHour, Group, Judging, Membership, OtelRecord, Project, Role, Scenario

pytestmark = pytest.mark.django_db
MOST_QUERIES = 12


def sign_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def read(user: User, page: str = "/admin/") -> str:
    response = sign_in(user).get(page)
    assert response.status_code == 200
    return response.content.decode()


def lone(project: Project) -> boards.Board:
    return boards.newest([project])[project.pk][0]


def queries(user: User, page: str) -> int:
    client = sign_in(user)
    client.get(page)
    with CaptureQueriesContext(connection) as asked:
        assert client.get(page).status_code == 200
    return len(asked)


# --- snapshots -------------------------------------------------------------------------------------------------------


def test_a_snapshot_says_how_the_project_stands() -> None:
    project = builders.make_project()
    furnish(project)
    Group.objects.filter(project=project).update(judging=Judging.ERROR)
    boards.take(project)
    board = lone(project)
    assert board.judge_errors == 1
    assert board.quarantined == 1
    assert board.serving is not None
    assert board.serving.name == "v1.0.0"
    assert [one.name for one in board.versions] == ["v1.0.1", "v1.0.0"]
    assert {one.name for one in board.ready.checks} == {"trajectories", "scenario_groups", "data_quality"}


def test_a_trend_is_of_the_last_snapshots() -> None:
    project = builders.make_project()
    ArrivalHour.objects.create(project=project, hour=timezone.now(), n=1, n_training=1)
    for value in (1, 4):
        body = readiness.check(project).body()
        body["reasons"] = [{"check": "scenario_groups", "value": value}]
        ReadinessSnapshot.objects.create(project=project, ready=False, data=body)
    boards.take(project)
    check = next(one for one in lone(project).ready.checks if one.name == "scenario_groups")
    assert check.trend == [1, 4, 0]
    assert "↓ 1" in read(builders.make_member(project))


def test_an_hour_is_kept_and_no_more() -> None:
    project = builders.make_project()
    old = BoardSnapshot.objects.create(
        project=project, data={}, created_at=timezone.now() - boards.KEPT - timedelta(minutes=1)
    )
    boards.take(project)
    assert list(BoardSnapshot.objects.filter(project=project).values_list("pk", flat=True)) != [old.pk]
    assert BoardSnapshot.objects.filter(project=project).count() == 1


def test_a_task_killed_half_way_leaves_the_snapshot_before(monkeypatch: pytest.MonkeyPatch) -> None:
    project, other = builders.make_project(), builders.make_project()
    boards.take(project)

    def killed(project: Project) -> boards.Board:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(boards, "look", killed)
        with pytest.raises(KeyboardInterrupt):
            tasks.take_boards()
    assert BoardSnapshot.objects.filter(project=project).count() == 1
    assert project.slug in read(builders.make_member(project))
    tasks.take_boards()  # its lock was free again
    assert BoardSnapshot.objects.filter(project=other).count() == 1


def test_a_fault_of_one_project_costs_no_other_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = builders.make_project(), builders.make_project()
    look = boards.look

    def fails(project: Project) -> boards.Board:
        if project == bad:
            raise ValueError("a fault")
        return look(project)

    monkeypatch.setattr(boards, "look", fails)
    tasks.take_boards()
    assert list(BoardSnapshot.objects.values_list("project", flat=True)) == [good.pk]


def test_a_snapshot_of_another_version_of_the_site_is_as_if_there_were_none() -> None:
    project = builders.make_project()
    BoardSnapshot.objects.create(project=project, data={"last_24h": "many"})
    assert "First numbers in a few seconds" in read(builders.make_member(project))


def test_an_old_snapshot_is_shown_with_its_age_and_asked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    project = builders.make_project()
    boards.take(project)
    asked: list[int] = []
    monkeypatch.setattr("training.dashboard.nudge", lambda task, pk: asked.append(pk))
    user = builders.make_member(project)
    read(user)
    assert asked == []
    BoardSnapshot.objects.update(created_at=timezone.now() - timedelta(minutes=10))
    assert "10\xa0minutes ago</time>: no worker looks" in read(user)
    assert asked == [project.pk]


# --- questions to the database ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["/admin/", "/admin/dashboard/"])
def test_twenty_projects_take_as_many_queries_as_one(page: str) -> None:
    user = builders.make_user()
    for _ in range(20):
        project = builders.make_project()
        Membership.objects.create(project=project, user=user, role=Role.OPERATOR)
        if Membership.objects.filter(user=user).count() == 1:
            furnish(project)
            batch = builders.make_batch(project, status="training")
            builders.make_run(batch, status="running", step=3, total_steps=10, seconds_per_step=2.0)
            boards.take(project)
            few = queries(user, page)
    for project in Project.objects.filter(memberships__user=user):
        boards.take(project)
    assert queries(user, page) <= few <= MOST_QUERIES


def test_neither_page_nor_snapshot_reads_trajectories_one_by_one() -> None:
    project = builders.make_project()
    furnish(project)
    boards.take(project)
    user = builders.make_member(project, Role.OPERATOR)
    client = sign_in(user)
    with CaptureQueriesContext(connection) as asked:
        client.get("/admin/dashboard/")
    assert not [one for one in asked.captured_queries if 'FROM "trajectories"' in one["sql"]]


# --- what it shows ---------------------------------------------------------------------------------------------------


def test_rates_stand_beside_what_the_policy_needs() -> None:
    project = builders.make_project()
    hour = timezone.now().replace(minute=0, second=0, microsecond=0)
    for number in range(24):
        ArrivalHour.objects.create(project=project, hour=hour - number * timedelta(hours=1), n=50, n_training=50)
    boards.take(project)
    board = lone(project)
    assert (board.last_24h, board.last_7d, board.need) == (1200, 1200, 1000)
    page = read(builders.make_member(project))
    assert "1,200" in page
    assert "41.7" in page  # 1,000 in 24 hours
    assert "the policy needs" in page


def test_an_empty_project_says_what_to_do_next() -> None:
    project = builders.make_project("fresh")
    boards.take(project)
    page = read(builders.make_member(project, Role.OPERATOR))
    for words in (
        "create_api_key --project fresh",
        "OPENAI_BASE_URL=",
        "import_trajectories FILES --project fresh",
        "/admin/trajectories/apikey/add/",
    ):
        assert words in page
    assert (
        "/admin/trajectories/apikey/add/" not in read(builders.make_member(project, Role.READER)).split("Everything")[0]
    )


def test_what_runs_now_has_progress_and_time_to_go() -> None:
    project = builders.make_project()
    batch = builders.make_batch(project, status="training")
    builders.make_run(batch, status="running", step=4, total_steps=10, seconds_per_step=20.0)
    boards.take(project)
    page = read(builders.make_member(project))
    assert "step 4 of 10" in page
    assert "2 min to go" in page


def test_versions_are_compared_on_shared_scenarios_only() -> None:
    project = builders.make_project()
    old = builders.make_model(project, status="retired")
    new = builders.make_model(project, parent=old)
    other = builders.make_model(project)
    scenarios = held_out(project, 4)
    for scenario in scenarios:
        builders.make_group(project, (1.0, 0.0), scenario=scenario, behaviour=new.version, is_evaluation=True)
    for scenario in scenarios[:3]:
        builders.make_group(project, (0.0, 0.0), scenario=scenario, behaviour=old.version, is_evaluation=True)
    builders.make_group(project, (1.0,), scenario=held_out_one(project), behaviour=old.version, is_evaluation=True)
    builders.make_group(project, (9.0,), scenario=held_out_one(project), behaviour=other.version, is_evaluation=True)
    found = shared_rewards.of(project, [new, old, other])
    assert [(one.name, one.mean, one.attempts) for one in found.rows] == [("v1.0.0", 0.0, 6), ("v1.0.1", 0.5, 6)]
    assert found.scenarios == 3
    assert found.left_out == [other.version]


def held_out_one(project: Project) -> Scenario:
    return builders.make_scenario(project, split="held_out")


# --- what waits for whom ---------------------------------------------------------------------------------------------


def waits(user: User) -> str:
    page = read(user)
    return page.split('class="mine"')[1].split("</section>")[0] if 'class="mine"' in page else ""


def test_each_sees_what_they_can_act_on() -> None:
    project = builders.make_project()
    furnish(project)
    Group.objects.filter(project=project).update(state="held")
    builders.make_batch(project, status="failed", error="it broke")
    boards.take(project)
    approver, researcher = builders.make_member(project, Role.APPROVER), builders.make_member(project, Role.RESEARCHER)
    assert "waits for your decision" in waits(approver)
    assert "held for review" not in waits(approver)
    for words in ("held for review", "1 span in quarantine", "it broke"):
        assert words in waits(researcher)
    assert "waits for your decision" not in waits(researcher)
    assert waits(builders.make_member(project, Role.READER)) == ""
    assert project.slug not in read(builders.make_member(builders.make_project(), Role.OPERATOR))


def test_who_asked_is_not_asked_to_decide() -> None:
    project = builders.make_project()
    asker = builders.make_member(project, Role.APPROVER)
    builders.make_deployment(builders.make_model(project), requested_by=asker)
    assert waits(asker) == ""
    assert "waits for your decision" in waits(builders.make_member(project, Role.APPROVER))


def test_a_version_nobody_asked_for_waits_for_an_operator() -> None:
    project = builders.make_project()
    model = builders.make_model(project)
    boards.take(project)
    operator = builders.make_member(project, Role.OPERATOR)
    assert f"{model.version} is ready" in waits(operator)
    builders.make_deployment(model)
    boards.take(project)
    assert waits(operator) == ""
    assert TrainedModel.objects.get(pk=model.pk).status == "ready"


def test_where_the_lines_lead_there_is_something() -> None:
    project = builders.make_project()
    furnish(project)
    Group.objects.filter(project=project).update(judging=Judging.ERROR)
    OtelRecord.objects.filter(project=project).update(state="quarantined")
    boards.take(project)
    user = builders.make_member(project, Role.RESEARCHER)
    client = sign_in(user)
    links = [part.split('"')[0].replace("&amp;", "&") for part in waits(user).split('href="')[1:]]
    assert len(links) >= 2
    for link in links:
        response = client.get(link)
        assert response.status_code == 200, link
        assert b"field-" in response.content, link


def test_hostile_words_are_shown_as_words() -> None:
    project = builders.make_project(name=HOSTILE)
    furnish(project)
    builders.make_batch(project, status="failed", error=HOSTILE)
    boards.take(project)
    page = read(builders.make_member(project, Role.OPERATOR))
    assert ESCAPED in page
    assert "<script>alert" not in page


def test_groups_wait_for_a_judge_only_where_one_is_set(settings: Settings) -> None:
    project = builders.make_project()
    builders.make_group(project)
    settings.JUDGE_BASE_URL, settings.JUDGE_MODEL = "", ""
    assert boards.look(project).to_judge == 0
    policy = policies.of(project)
    policy.reward_mix = {"recorded": 0.5, "ruler": 0.5}
    policy.save()
    assert boards.look(project).to_judge == 0
    settings.JUDGE_BASE_URL, settings.JUDGE_MODEL = "http://judge", "m"
    assert boards.look(project).to_judge == 1
