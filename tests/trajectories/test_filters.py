"""The declared filters: each narrows to what it names, takes no garbage, and is the same for the admin and the API."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.test import Client

from tests import builders
from tests.trajectories import recordings
from training.models import BatchStatus
from trajectories import filters, formats, indexing, ingestion, metric_values
from trajectories.errors import Invalid
from trajectories.models import Judging, MetricValue, Project, Scope, Trajectory

pytestmark = pytest.mark.django_db

FIRST = datetime(2026, 3, 1, 8, tzinfo=UTC)
LATER = datetime(2026, 3, 2, 9, tzinfo=UTC)

# filter, a value that lets "this" through and not "that", one that lets "that" through and not "this"
CASES = {
    "agent": ("mine", "yours"),
    "scenario": ("day-1", "day-2"),
    "version": ("v1.0.0", "foreign:gpt"),
    "origin": ("own", "foreign"),
    "episode": ("e1", "e2"),
    "evaluation_id": ("ev", ""),
    "since": ("2026-03-01T12:00:00Z", ""),
    "until": ("", "2026-03-01T12:00:00Z"),
    "window": ("2026-03-02T09:00", "2026-03-01T08:00"),
    "window_from": ("2026-03-02", ""),
    "window_to": ("", "2026-03-02"),
    "reward_min": ("0.5", ""),
    "reward_max": ("", "0.5"),
    "rewarded": ("1", "0"),
    "judged": ("yes", "no"),
    "status": ("completed", "agent_error"),
    "state": ("sealed", "timed_out"),
    "steps_min": ("7", ""),
    "steps_max": ("", "6"),
    "fidelity": ("exact", "text"),
    "quality_min": ("0.5", ""),
    "quality_max": ("", "0.5"),
    "recorded_as": ("native", "messages"),
    "evaluation": ("true", "false"),
    "excluded": ("1", "0"),
    "superseded": ("1", "0"),
    "archived": ("1", "0"),
    "used": ("1", "0"),
    "metric.score.min": ("3", ""),
    "metric.score.max": ("", "3"),
}
BOUNDED = {"reward_max"}  # what is unknown is in no range, so "that" needs a reward there


@pytest.fixture
def project() -> Project:
    project = builders.make_project("shop", listed_metrics=["score"])
    mine, yours = builders.make_agent(project, "mine"), builders.make_agent(project, "yours")
    one, two = builders.make_scenario(project, "day-1"), builders.make_scenario(project, "day-2")
    judged = builders.make_group(project, judging=Judging.JUDGED)
    this = builders.make_trajectory(
        project, trajectory_id="this", agent=mine, scenario=one, group=judged, behaviour="v1.0.0", origin="own",
        episode_id="e1", is_evaluation=True, evaluation_id="ev", received_at=LATER, window="2026-03-02T09:00",
        reward=1.0, n_steps=7, fidelity="exact", quality=0.9, is_excluded=True, is_superseded=True, archived_at=LATER,
        metrics={"score": 5},
    )  # fmt: skip
    that = builders.make_trajectory(
        project, trajectory_id="that", agent=yours, scenario=two, group=None, behaviour="foreign:gpt", origin="foreign",
        episode_id="e2", received_at=FIRST, window="2026-03-01T08:00", reward=None, final_status="agent_error",
        state="timed_out", n_steps=6, fidelity="text", quality=0.2, source_format="messages", metrics={"score": 2.5},
    )  # fmt: skip
    metric_values.write(project, [this, that])
    builders.make_batch(project, status=BatchStatus.COMPLETED, groups=(judged,))
    builders.make_batch(project, status=BatchStatus.CANCELLED, groups=(judged,))
    return project


def found(project: Project, **arguments: str) -> set[str]:
    rows = Trajectory.objects.filter(project=project, trajectory_id__in=("this", "that"))
    return set(filters.narrowed(rows, arguments, project.listed_metrics).values_list("trajectory_id", flat=True))


def test_every_filter_is_tried_here() -> None:
    assert set(filters.offered()) - {"group"} == {name for name in CASES if not name.startswith("metric.")}


def test_every_filter_is_in_the_documentation() -> None:
    told = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text().partition("## Reading")[2]
    assert [name for name in filters.offered() if f"`{name}`" not in told] == []


@pytest.mark.parametrize("name", CASES)
def test_a_filter_lets_through_what_it_names(project: Project, name: str) -> None:
    this, that = CASES[name]
    if name in BOUNDED:
        Trajectory.objects.filter(trajectory_id="that").update(reward=0.25)
    if this:
        assert found(project, **{name: this}) == {"this"}
    if that:
        assert found(project, **{name: that}) == {"that"}
    assert found(project, **{name: ""}) == {"this", "that"}


def test_a_group_is_named_by_its_number(project: Project) -> None:
    group = Trajectory.objects.get(trajectory_id="this").group_id
    assert found(project, group=str(group)) == {"this"}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("reward_min", "much", "must be a finite number, not 'much'"),
        ("quality_max", "nan", "must be a finite number"),
        ("steps_min", "1.5", "must be a whole number, not '1.5'"),
        ("steps_min", "9" * 30, "too large"),
        ("group", "x", "must be a whole number"),
        ("since", "yesterday", "must be a time such as"),
        ("until", "2026-02-30T00:00:00Z", "must be a time such as"),
        ("judged", "perhaps", "must be true or false, not 'perhaps'"),
        ("status", "done", "is one of completed, "),
        ("agent", "a\x00b", "no value of that column"),
        ("agent", "a" * 10_000, "no value of that column"),
        ("metric.score.min", "x", "must be a finite number"),
        ("metric.price.min", "1", "The metric 'price' is not declared. Declared: score."),
        ("metric.score.mean", "1", "There is no filter"),
        ("password", "x", "There is no filter 'password'"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(project: Project, name: str, value: str, told: str) -> None:
    with pytest.raises(Invalid, match=told.replace("[", r"\[")):
        found(project, **{name: value})


def test_the_api_and_the_admin_find_the_same(project: Project) -> None:
    _, key = builders.make_key(project, Scope.READ)
    reader = signed_in(builders.make_member(project))
    for name, (this, that) in CASES.items():
        for value in filter(None, (this, that)):
            answer = Client().get("/api/v1/trajectories/", {name: value}, headers=builders.bearer(key))
            assert answer.status_code == 200, answer.content
            ids = {row["trajectory_id"] for row in answer.json()["results"]}
            page = reader.get("/admin/trajectories/trajectory/", {name: value}).content.decode()
            assert {one for one in ids if f'title="{one}"' in page} == ids, (name, value)
            assert page.count('class="action-select"') == len(ids), (name, value)


@pytest.mark.parametrize(
    "question",
    ["since=0001-01-01T00:00:00%2B14:00", "until=9999-12-31T23:59:59-14:00", "steps_min=9223372036854775807",
     "steps_max=-9223372036854775808", "group=9223372036854775807", "reward_min=-1e308", "agent=%F0%9F%90%8D",
     "metric.score.min=1e308", "window_from=%EF%BF%BF", "metric.%25s.min=1", "metric..min=1", "agent[]=x"],
)  # fmt: skip
def test_what_is_at_the_edge_is_answered(project: Project, question: str) -> None:
    _, key = builders.make_key(project, Scope.READ)
    answer = Client().get(f"/api/v1/trajectories/?{question}", headers=builders.bearer(key))
    assert answer.status_code in (200, 400)
    page = signed_in(builders.make_member(project)).get(f"/admin/trajectories/trajectory/?{question}", follow=True)
    assert page.status_code == 200


def signed_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


# --- metrics ---------------------------------------------------------------------------------------------------------


def values(project: Project) -> dict[str, float]:
    rows = MetricValue.objects.filter(project=project)
    return {f"{row.trajectory.trajectory_id} {row.name}": row.value for row in rows.select_related("trajectory")}


def test_a_metric_that_is_listed_is_written_behind_the_write() -> None:
    project = builders.make_project(listed_metrics=["score", "won"])
    body = recordings.native(trajectory_id="t", metrics={"score": 2.5, "won": True, "other": 1, "words": "none"})
    ingestion.record(project, formats.incoming_value(body, "native"))
    indexing.drain(project)
    assert values(project) == {"t score": 2.5, "t won": 1.0}


def test_what_was_there_before_is_looked_through_once_a_metric_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_values, "WINDOW", 2)
    project, other = builders.make_project(), builders.make_project()
    for number, value in enumerate((1, 2.5, True, "3", None, 10**400, [1])):
        builders.make_trajectory(project, trajectory_id=f"t{number}", metrics={"score": value})
    builders.make_trajectory(other, metrics={"score": 1})
    metric_values.declare(project, ["score", " score ", ""])
    assert metric_values.unfinished() == [project]
    assert metric_values.look_through(project) == 3
    assert values(project) == {"t0 score": 1.0, "t1 score": 2.5, "t2 score": 1.0}
    assert metric_values.unfinished() == []
    assert values(other) == {}

    metric_values.declare(project, ["price"])
    metric_values.look_through(project)
    assert values(project) == {}


def test_a_list_that_changed_while_it_was_looked_through_is_looked_through_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody declares another metric in the middle: what is pending stays so."""
    project = builders.make_project()
    builders.make_trajectory(project, trajectory_id="t", metrics={"score": 1, "price": 2})
    metric_values.declare(project, ["score"])
    real = metric_values._window

    def in_the_middle(of: Project, names: list[str], low: int) -> int:
        metric_values.declare(project, ["price"])
        return real(of, names, low)

    monkeypatch.setattr(metric_values, "_window", in_the_middle)
    metric_values.look_through(project)
    monkeypatch.undo()
    assert metric_values.unfinished() == [project]
    metric_values.look_through(project)
    assert values(project) == {"t price": 2.0}


def test_looking_through_that_was_cut_off_is_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_values, "WINDOW", 1)
    project = builders.make_project()
    for number in range(3):
        builders.make_trajectory(project, trajectory_id=f"t{number}", metrics={"score": number})
    metric_values.declare(project, ["score"])
    real = metric_values._window
    first = project.trajectories.order_by("pk")[0].pk

    def cut_off(of: Project, names: list[str], low: int) -> int:
        if low > first:
            raise KeyboardInterrupt
        return real(of, names, low)

    monkeypatch.setattr(metric_values, "_window", cut_off)
    with pytest.raises(KeyboardInterrupt):
        metric_values.look_through(project)
    monkeypatch.undo()
    assert values(project) == {"t0 score": 0.0}
    assert metric_values.unfinished() == [project]
    metric_values.look_through(project)
    assert values(project) == {"t0 score": 0.0, "t1 score": 1.0, "t2 score": 2.0}


def test_of_one_that_still_runs_the_value_is_that_of_its_end() -> None:
    project = builders.make_project()
    row = builders.make_trajectory(project, trajectory_id="t", state="open", metrics={"score": 1})
    metric_values.declare(project, ["score"])
    metric_values.look_through(project)
    assert values(project) == {}
    row.state, row.metrics = "sealed", {"score": 7}
    row.save()
    metric_values.write(project, [row])
    assert values(project) == {"t score": 7.0}


def test_too_many_metrics_are_refused() -> None:
    with pytest.raises(Invalid, match="9 metrics are too many"):
        metric_values.declare(builders.make_project(), [f"m{number}" for number in range(9)])
