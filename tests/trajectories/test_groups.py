"""Groups: which attempts share a baseline, when a cohort closes, what counts. Filled behind the write."""

import json
from datetime import timedelta

import pytest
from django.utils import timezone

from tests import builders
from tests.trajectories import recordings
from trajectories import formats, indexing, ingestion, preparing
from trajectories.models import Group, GroupState, IndexingWork, LlmCallLog, Project, StateChange, Trajectory

pytestmark = pytest.mark.django_db


@pytest.fixture
def project() -> Project:
    return builders.make_project()


def record(project: Project, *bodies: recordings.Body, name: str = "native") -> None:
    found = ingestion.record_many(project, [formats.incoming(json.dumps(body).encode(), name) for body in bodies])
    assert all(isinstance(one, preparing.Recorded) for one in found), found


def groups(project: Project) -> list[tuple[str, str, str, int, str]]:
    indexing.drain(project)
    return [
        (row.scenario.scenario_id, row.behaviour, row.cohort, row.n, row.state)
        for row in Group.objects.filter(project=project).select_related("scenario").order_by("id")
    ]


def test_without_a_scenario_there_is_no_group(project: Project) -> None:
    record(project, recordings.native())

    assert groups(project) == []


def test_attempts_of_one_policy_at_one_scenario_are_a_group(project: Project) -> None:
    record(project, *(recordings.native(scenario_id="s", reward=reward) for reward in (0.0, 1.0, None)))

    assert groups(project) == [("s", "foreign:some-model", "#1", 3, GroupState.OPEN)]
    group = Group.objects.get()
    assert (group.reward_n, group.reward_min, group.reward_max, group.reward_sum) == (2, 0.0, 1.0, 1.0)
    assert group.n_trainable == 0
    assert group.quality_sum > 0


def test_a_version_of_the_project_makes_calls_trainable(project: Project) -> None:
    builders.make_version(project, "v1.0.0")
    steps = [recordings.step(llm_calls=[recordings.call(model_version="v1.0.0", model=None)])]
    record(project, recordings.native(scenario_id="s", steps=steps))
    served = [recordings.step(llm_calls=[recordings.call(model=f"{project.slug}-v1.0.0")])]
    record(project, recordings.native(scenario_id="s", steps=served))

    assert groups(project) == [("s", "v1.0.0", "#1", 2, GroupState.OPEN)]
    group = Group.objects.get()
    assert (group.n_trainable, group.policy_minor) == (2, 1)


def test_a_version_that_the_project_does_not_have_is_unknown(project: Project) -> None:
    steps = [recordings.step(llm_calls=[recordings.call(model_version="v9.0.0", model=None)])]
    record(project, recordings.native(scenario_id="s", steps=steps))

    row = Trajectory.objects.get()
    assert (row.origin, row.behaviour) == ("unknown", "unknown")
    assert "does not have" in str(row.findings)


def test_role_behaviour_and_evaluation_part_groups(project: Project) -> None:
    record(
        project,
        recordings.native(scenario_id="s"),
        recordings.native(scenario_id="s", role="critic"),
        recordings.native(scenario_id="s", steps=[recordings.step(llm_calls=[recordings.call(model="other")])]),
        recordings.native(scenario_id="s", is_evaluation=True),
        recordings.native(scenario_id="t"),
    )

    assert len(groups(project)) == 5


def test_a_cohort_closes_at_its_declared_size_and_later_ones_open_the_next(project: Project) -> None:
    record(project, *(recordings.native(scenario_id="s", group_size=2) for _ in range(5)))

    assert [one[2:] for one in groups(project)] == [
        ("#1", 2, GroupState.CLOSED),
        ("#2", 2, GroupState.CLOSED),
        ("#3", 1, GroupState.OPEN),
    ]
    assert StateChange.objects.filter(kind="group", to=GroupState.CLOSED).count() == 2


def test_a_sender_may_name_the_cohort(project: Project) -> None:
    record(project, *(recordings.native(scenario_id="s", group_id=name, group_size=2) for name in "abab"))
    record(project, recordings.native(scenario_id="s", group_id="a", group_size=2))

    assert [one[2:] for one in groups(project)] == [
        ("a", 2, GroupState.CLOSED),
        ("b", 2, GroupState.CLOSED),
        ("a #2", 1, GroupState.OPEN),
    ]


def test_an_idle_cohort_closes(project: Project) -> None:
    record(project, recordings.native(scenario_id="s"))
    indexing.drain(project)
    assert indexing.close_idle(project) == 0
    Group.objects.update(last_received_at=timezone.now() - timedelta(minutes=61))

    assert indexing.close_idle(project) == 1
    assert Group.objects.get().state == GroupState.CLOSED


@pytest.mark.parametrize("order", [1, -1])
def test_only_the_last_try_counts_whichever_comes_in_first(project: Project, order: int) -> None:
    tries = [
        recordings.native("first", scenario_id="s"),
        recordings.native("second", scenario_id="s", retry_of="first"),
    ]
    for body in tries[::order]:
        record(project, body)
        indexing.drain(project)

    assert [one[3] for one in groups(project)] == [1]
    assert Trajectory.objects.get(is_superseded=True).trajectory_id == "first"


def test_identical_content_under_another_id_counts_once(project: Project) -> None:
    body = recordings.native("a", scenario_id="s")
    record(project, body, {**body, "trajectory_id": "b"}, recordings.native("c", scenario_id="s"))

    assert [one[3] for one in groups(project)] == [2]
    assert Trajectory.objects.get(trajectory_id="b").twin_of == Trajectory.objects.get(trajectory_id="a")


def test_what_the_environment_spoiled_does_not_count(project: Project) -> None:
    record(
        project,
        recordings.native(scenario_id="s", group_size=2, final_status="environment_error", reward=-9.0),
        recordings.native(scenario_id="s", group_size=2),
    )

    assert [one[2:] for one in groups(project)] == [("#1", 1, GroupState.CLOSED)]
    assert Group.objects.get().reward_min == 0.5


def test_call_rows_are_filled(project: Project) -> None:
    record(
        project,
        recordings.chat("a", model="gpt-x", completions=[{"latency_ms": 5}, {"token_ids": [1, 2]}]),
        name="messages",
    )
    assert LlmCallLog.objects.count() == 0
    indexing.drain(project)

    first, second = LlmCallLog.objects.order_by("position")
    assert (first.step, first.model, first.origin, first.latency_ms) == (0, "gpt-x", "foreign", 5)
    assert (second.step, second.n_token_ids, second.completion_tokens) == (1, 2, 2)


def test_draining_twice_changes_nothing_and_reindexing_makes_the_same(project: Project) -> None:
    record(project, *(recordings.native(scenario_id="s", group_size=2) for _ in range(3)))
    before = groups(project)
    assert indexing.drain(project) == 0
    assert indexing.lag(project).waiting == 0

    LlmCallLog.objects.all().delete()
    indexing.reindex(project)

    assert indexing.lag(project).waiting > 0
    assert groups(project) == before
    assert LlmCallLog.objects.count() == 3


def test_a_changed_flag_is_counted_again(project: Project) -> None:
    record(project, *(recordings.native(scenario_id="s") for _ in range(2)))
    indexing.drain(project)
    row = Trajectory.objects.first()
    assert row is not None
    Trajectory.objects.filter(pk=row.pk).update(is_excluded=True)
    indexing.touch(project, [row.group_id])

    assert [one[3] for one in groups(project)] == [1]
    assert not IndexingWork.objects.exists()
