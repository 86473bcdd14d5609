"""Reading: lists with filters and cursors, one whole trajectory, scenarios, limits, export."""

import json

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from tests import builders
from tests.trajectories import recordings
from trajectories import formats, ingestion, limits, preparing
from trajectories.models import Project, StateChange, Trajectory

pytestmark = pytest.mark.django_db

URL = "/api/v1/trajectories/"


@pytest.fixture
def project() -> Project:
    return builders.make_project()


@pytest.fixture
def headers(project: Project) -> dict[str, str]:
    return builders.bearer(builders.make_key(project)[1])


def record(project: Project, *bodies: recordings.Body) -> None:
    ingestion.record_many(project, [formats.incoming(json.dumps(body).encode()) for body in bodies])


def ids(client: Client, headers: dict[str, str], query: str = "") -> list[str]:
    answer = client.get(f"{URL}?{query}", headers=headers)
    assert answer.status_code == 200, answer.content
    return [one["trajectory_id"] for one in answer.json()["results"]]


def test_pages_go_from_new_to_old_without_gap_or_double(
    client: Client, project: Project, headers: dict[str, str]
) -> None:
    record(project, *(recordings.native(f"a{number}") for number in range(7)))
    seen: list[str] = []
    cursor = ""
    while True:
        answer = client.get(f"{URL}?limit=3&cursor={cursor}", headers=headers).json()
        seen += [one["trajectory_id"] for one in answer["results"]]
        cursor = answer["next"]
        if cursor is None:
            break
        record(project, recordings.native(f"new-{len(seen)}"))  # rows that come in meanwhile shift nothing

    assert seen == [f"a{number}" for number in reversed(range(7))]


def test_filters_find_what_they_name(client: Client, project: Project, headers: dict[str, str]) -> None:
    record(
        project,
        recordings.native("a", agent_id="one", scenario_id="s", reward=0.1),
        recordings.native("b", agent_id="two", final_status="agent_error", reward=0.9),
        recordings.native("c", agent_id="two", is_evaluation=True, reward=None),
    )
    window = Trajectory.objects.get(trajectory_id="a").window

    assert ids(client, headers, "agent=one") == ["a"]
    assert ids(client, headers, "scenario=s") == ["a"]
    assert ids(client, headers, "status=agent_error") == ["b"]
    assert ids(client, headers, "reward_min=0.5&reward_max=1") == ["b"]
    assert ids(client, headers, "evaluation=true") == ["c"]
    assert ids(client, headers, "archived=true") == []
    assert ids(client, headers, "version=foreign:some-model") == ["c", "b", "a"]
    assert "a" in ids(client, headers, f"window={window}")
    assert ids(client, headers, "since=2999-01-01T00:00:00Z") == []
    assert ids(client, headers, "judged=true") == []


@pytest.mark.parametrize(
    "query",
    ["nonsense=1", "limit=0", "limit=1000", "limit=x", "cursor=%00", "cursor=x", "reward_min=nan", "reward_min=x",
     "since=yesterday", "judged=perhaps", "agent=%00", "group=x", "group=99999999999999999999"],
)  # fmt: skip
def test_filters_that_make_no_sense_are_a_400(client: Client, headers: dict[str, str], query: str) -> None:
    answer = client.get(f"{URL}?{query}", headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (400, "invalid")


def test_a_list_opens_no_payload_and_asks_no_query_per_row(
    client: Client, project: Project, headers: dict[str, str]
) -> None:
    record(project, *(recordings.native(f"a{number}", scenario_id=f"s{number}") for number in range(30)))
    client.get(URL, headers=headers)

    with CaptureQueriesContext(connection) as queries:
        assert len(ids(client, headers)) == 30

    assert len(queries) <= 3
    assert not any("trajectory_segments" in one["sql"] for one in queries)


def test_unknown_and_erased_ids_are_told_apart(client: Client, project: Project, headers: dict[str, str]) -> None:
    project.tombstones.create(trajectory_id="gone", content_hash=b"x", by_name="someone")

    assert client.get(f"{URL}nowhere/", headers=headers).status_code == 404
    assert client.get(f"{URL}gone/", headers=headers).status_code == 410


def test_ids_with_slashes_and_odd_letters_are_found(client: Client, project: Project, headers: dict[str, str]) -> None:
    record(project, recordings.native("a/b c/ü?#"))

    assert client.get(f"{URL}a/b%20c/%C3%BC%3F%23/", headers=headers).json()["trajectory_id"] == "a/b c/ü?#"


def test_limits_are_published(client: Client, headers: dict[str, str]) -> None:
    assert client.get("/api/v1/limits/", headers=headers).json()["trajectory_bytes"] == limits.ITEM_BYTES


def test_a_scenario_is_put_changed_and_shown_without_gold(client: Client, headers: dict[str, str]) -> None:
    def put(body: recordings.Body) -> int:
        raw = json.dumps(body)
        return client.put("/api/v1/scenarios/s/", raw, content_type="application/json", headers=headers).status_code

    assert put({"description": "Trade.", "split": "train", "metadata": {"a": 1, "private": {"b": 2}}}) == 201
    assert put({"split": "held_out"}) == 200
    assert put({"split": "both"}) == 400
    assert put({"metadata": {"x": "\x00"}}) == 400

    shown = client.get("/api/v1/scenarios/s/", headers=headers).json()
    assert (shown["description"], shown["split"], shown["metadata"]) == ("Trade.", "held_out", {"a": 1})
    assert client.get("/api/v1/scenarios/s/?private=1", headers=headers).json()["metadata"]["private"] == {"b": 2}
    assert [
        one["id"] for one in client.get("/api/v1/scenarios/?split=held_out", headers=headers).json()["results"]
    ] == ["s"]
    change = StateChange.objects.get(kind="scenario")
    assert (change.was, change.to) == ("train", "held_out")


def test_the_export_is_read_back_as_the_same_content(client: Client, project: Project, headers: dict[str, str]) -> None:
    bodies = [recordings.native(f"a{number}", tools=[{"name": "x" * 500}]) for number in range(3)]
    record(project, *bodies)
    exported = b"".join(client.get("/api/v1/export/", headers=headers)).splitlines()

    replayed = ingestion.record_many(project, [formats.incoming(line) for line in exported])

    assert [one.outcome for one in replayed if isinstance(one, preparing.Recorded)] == ["replay"] * 3
