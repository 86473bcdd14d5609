"""Races: the same id from many threads, the same ids in other orders, a reward that overtakes its trajectory."""

import json
import threading
from collections.abc import Callable, Sequence
from functools import partial

import pytest
from django.db import connection

from tests import builders
from tests.trajectories import recordings
from trajectories import formats, indexing, ingestion, preparing, rewards, running
from trajectories.errors import Conflict, Problem
from trajectories.formats.incoming import Incoming
from trajectories.history import SYSTEM
from trajectories.models import Agent, Group, Project, Scenario, SharedText, Trajectory
from trajectories.payloads import RewardBody

pytestmark = pytest.mark.django_db(transaction=True)


def together(jobs: Sequence[Callable[[], object]]) -> list[object]:
    """Run the jobs in threads that start at once; what each returned or raised."""
    found: list[object] = [None] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def run(at: int) -> None:
        try:
            connection.ensure_connection()
            barrier.wait()
            found[at] = jobs[at]()
        except Exception as exc:  # it is what the test looks at
            found[at] = exc
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def project() -> Project:
    preparing.forget()
    return builders.make_project()


def incoming(body: recordings.Body) -> Incoming:
    return formats.incoming(json.dumps(body).encode())


def test_of_many_with_one_id_and_content_one_is_created(project: Project) -> None:
    item = incoming(recordings.native("a", scenario_id="s", tools=[{"name": "x" * 500}]))

    found = together([lambda: ingestion.record(project, item).outcome] * 8)

    assert sorted(map(str, found)) == ["created", *["replay"] * 7]
    assert Trajectory.objects.count() == 1
    assert SharedText.objects.count() == 1


def test_of_many_with_one_id_and_other_contents_one_wins(project: Project) -> None:
    items = [incoming(recordings.native("a", metadata={"n": number})) for number in range(6)]

    def outcome(item: Incoming) -> str:
        return ingestion.record(project, item).outcome

    found = together([partial(outcome, item) for item in items])

    assert found.count("created") == 1
    assert sum(isinstance(one, Conflict) for one in found) == 5
    assert Trajectory.objects.count() == 1


def test_bulks_of_the_same_ids_in_other_orders_do_not_block_each_other(project: Project) -> None:
    items = [incoming(recordings.native(f"a{number}", scenario_id=f"s{number % 5}")) for number in range(100)]

    def bulk(order: list[Incoming]) -> int:
        results = ingestion.record_many(project, order)
        assert not any(isinstance(one, Problem) for one in results)
        return sum(isinstance(one, preparing.Recorded) and one.created for one in results)

    found = together([lambda: bulk(items), lambda: bulk(items[::-1]), lambda: bulk(items[50:] + items[:50])])

    assert sum(one for one in found if isinstance(one, int)) == 100, found
    assert Trajectory.objects.count() == 100
    assert all(row.segments.count() == 1 for row in Trajectory.objects.all())


def test_drains_at_once_number_cohorts_once(project: Project) -> None:
    for number in range(4):
        ingestion.record_many(
            project, [incoming(recordings.native(f"{number}-{n}", scenario_id="s", group_size=8)) for n in range(16)]
        )

    found = together([lambda: indexing.drain(project)] * 4)

    assert not any(isinstance(one, Exception) for one in found), found
    assert sorted(Group.objects.values_list("cohort", "n")) == [(f"#{number}", 8) for number in range(1, 9)]


def test_a_reward_and_its_trajectory_may_race(project: Project) -> None:
    def change(name: str) -> rewards.Patched:
        return rewards.change(project, name, RewardBody(reward=0.5), by=SYSTEM)

    for number in range(5):
        name = f"a{number}"
        item = incoming(recordings.native(name, reward=None))
        found = together([partial(ingestion.record, project, item), partial(change, name)])
        assert not any(isinstance(one, Exception) for one in found), found
    indexing.drain(project)

    assert set(Trajectory.objects.values_list("reward", flat=True)) == {0.5}


def test_steps_sent_twice_at_once_are_appended_once(project: Project) -> None:
    ingestion.record(project, incoming(recordings.native("a", final_status="running", steps=[], ended_at=None)))
    steps = incoming(recordings.native("x", steps=[recordings.step(index=0), recordings.step(index=1)])).payload.steps

    found = together([lambda: running.append_steps(project, "a", steps).appended] * 4)

    assert sorted(map(str, found)) == ["0", "0", "0", "2"]
    assert Trajectory.objects.get().n_steps == 2


def test_an_agent_deleted_meanwhile_is_made_again(project: Project) -> None:
    ingestion.record(project, incoming(recordings.native("a", scenario_id="s")))
    Trajectory.objects.all().delete()
    Agent.objects.all().delete()
    Scenario.objects.all().delete()

    assert ingestion.record(project, incoming(recordings.native("b", scenario_id="s"))).created
    assert Trajectory.objects.get().agent == Agent.objects.get()
