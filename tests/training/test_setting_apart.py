"""A person sets a group apart for evaluation: it measures versions and trains none, unless one learned from it."""

import pytest

from tests import builders
from tests.training.recorded import recorded_group
from training import freezing, group_pages, setting_apart
from training.models import BatchStatus, TruncatedRuns
from trajectories import formats, indexing, ingestion
from trajectories.errors import Refused
from trajectories.history import Actor
from trajectories.models import Group, GroupState, StateChange

pytestmark = pytest.mark.django_db

ROSA = Actor("rosa")


def apart(group: Group, reason: str = "a good test") -> None:
    setting_apart.set_apart(group, by=ROSA, reason=reason)


def test_the_group_and_its_attempts_are_for_evaluation_and_the_history_says_who_and_why() -> None:
    group = builders.make_group(builders.make_project())
    apart(group)
    assert group.is_evaluation
    assert all(one.is_evaluation for one in group.trajectories.all())
    assert not freezing.members_of(group, TruncatedRuns.MASK).exists()
    change = StateChange.objects.get(kind="group", object_id=group.pk, field="is_evaluation")
    assert (change.was, change.to, change.by_name, change.reason) == ("training", "evaluation", "rosa", "a good test")
    assert group_pages.group_page(group, group_pages.Look()).why_not == "for evaluation only"


def test_it_can_be_given_back() -> None:
    group = builders.make_group(builders.make_project())
    apart(group)
    setting_apart.give_back(group, by=ROSA, reason="enough tests")
    assert not group.is_evaluation
    assert freezing.members_of(group, TruncatedRuns.MASK).count() == 4


@pytest.mark.parametrize("status", [BatchStatus.PENDING, BatchStatus.TRAINING, BatchStatus.COMPLETED])
def test_what_a_version_learned_from_cannot_measure_it(status: str) -> None:
    project = builders.make_project()
    group = builders.make_group(project)
    batch = builders.make_batch(project, status=status, groups=(group,))
    with pytest.raises(Refused, match=f"Batch {batch.pk} has group"):
        apart(group)
    group.refresh_from_db()
    assert not group.is_evaluation


def test_attempts_that_a_batch_holds_alone_count_as_well() -> None:
    project = builders.make_project()
    group = builders.make_group(project)
    batch = builders.make_batch(project, status=BatchStatus.COMPLETED, groups=(group,))
    batch.groups.update(group=None)
    with pytest.raises(Refused, match="has group"):
        apart(group)


def test_a_failed_batch_lets_it_go() -> None:
    project = builders.make_project()
    group = builders.make_group(project)
    builders.make_batch(project, status=BatchStatus.FAILED, groups=(group,))
    apart(group)
    assert group.is_evaluation


def test_it_is_refused_without_a_reason_while_open_and_twice() -> None:
    project = builders.make_project()
    group = builders.make_group(project)
    with pytest.raises(Refused, match="Give a reason"):
        apart(group, " ")
    with pytest.raises(Refused, match="is open"):
        apart(builders.make_group(project, state=GroupState.OPEN))
    second = Group.objects.get(pk=group.pk)  # read before the first one acts
    apart(group)
    with pytest.raises(Refused, match="already"):
        apart(second)


def test_attempts_that_answer_an_evaluation_stay_there() -> None:
    group = builders.make_group(builders.make_project(), is_evaluation=True)
    group.trajectories.update(evaluation_id="e1")
    with pytest.raises(Refused, match="answer an evaluation"):
        setting_apart.give_back(group, by=ROSA, reason="x")


def test_a_cohort_of_that_name_on_the_other_side_is_no_obstacle() -> None:
    project = builders.make_project()
    there = builders.make_group(project, is_evaluation=True)
    group = builders.make_group(project, scenario=there.scenario)
    Group.objects.filter(pk=group.pk).update(cohort=there.cohort)
    group.refresh_from_db()
    apart(group)
    assert group.cohort == f"{there.cohort} (2)"


def test_later_attempts_open_cohorts_of_their_own() -> None:
    """Cohorts are numbered by how many there are: one that left must not make two have the same name."""
    project = builders.make_project()
    first = recorded_group(project, scenario_id="headline")
    for number in range(3):
        if number == 1:
            apart(first)
        for trajectory in range(4):
            body = {
                "trajectory_id": f"more-{number}-{trajectory}", "agent_id": "agent", "group_size": 4, "reward": 1.0,
                "scenario": {"id": "headline", "split": "train"},
                "steps": [{"llm_calls": [{"messages": [{"role": "user", "content": "BUY or SELL?"}],
                                          "response": f"{number} {trajectory}", "model_version": "v1.0.0"}]}],
            }  # fmt: skip
            ingestion.record(project, formats.incoming_value(body))
        indexing.drain(project)
    groups = Group.objects.filter(project=project)
    assert sorted(groups.values_list("n", flat=True)) == [4, 4, 4, 4]
    assert groups.filter(is_evaluation=False).count() == 3
