"""When the site says "later": rates of keys, a full disk, a database that is away. Reading goes on."""

import io
import json
import logging
import shutil
import socket
from typing import NamedTuple

import pytest
from django.core.management import call_command
from django.db import InterfaceError, OperationalError
from django.test import Client
from pytest_django import Settings

from tests import builders
from tests.trajectories import recordings
from trainingsite import health, problems
from trajectories import ingestion, people, pressure, rewards, running, scenarios
from trajectories.errors import Full, Refused, TooMany
from trajectories.formats import incoming_value
from trajectories.front_door import FrontDoor
from trajectories.history import SYSTEM
from trajectories.models import ApiKey, Project, RewardChange, Scenario, Trajectory
from trajectories.payloads import EndBody, RewardBody, ScenarioBody, StepPayload

pytestmark = pytest.mark.django_db

URL = "/api/v1/trajectories/"


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def nearly_full(path: object) -> Usage:
    return Usage(10**10, 10**10 - 10**7, 10**7)


@pytest.fixture
def project() -> Project:
    return builders.make_project()


@pytest.fixture
def headers(project: Project) -> dict[str, str]:
    return builders.bearer(builders.make_key(project)[1])


def keyed(project: Project, rate: int | None) -> dict[str, str]:
    row, key = builders.make_key(project)
    ApiKey.objects.filter(pk=row.pk).update(requests_per_minute=rate)
    return builders.bearer(key)


# --- rates ---------------------------------------------------------------------------------------------------------


def test_a_key_may_send_its_rate_and_then_has_to_wait(client: Client, project: Project) -> None:
    headers = keyed(project, 3)

    answers = [client.get(URL, headers=headers) for _ in range(4)]

    assert [one.status_code for one in answers] == [200, 200, 200, 429]
    assert answers[3].headers["Content-Type"] == "application/problem+json"
    assert 1 <= int(answers[3].headers["Retry-After"]) <= 20
    assert (answers[3].json()["code"], answers[3].json()["limit"]) == ("too-many-requests", 3)
    assert client.get(URL, headers=keyed(project, 3)).status_code == 200  # another key is another bucket


def test_what_waited_is_admitted_again_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(at: float) -> float:
        return pressure._take_here(1, 60, at)

    assert [take(100.0) for _ in range(60)] == [0.0] * 60
    assert take(100.0) == pytest.approx(1.0)
    assert take(100.5) == pytest.approx(0.5)
    assert take(101.0) == 0.0
    assert take(101.0) == pytest.approx(1.0)
    assert [take(1000.0) for _ in range(60)] == [0.0] * 60  # never more than a minute's worth
    assert take(1000.0) > 0


def test_the_rate_is_one_for_all_processes_while_the_broker_is_there(project: Project) -> None:
    key = builders.make_key(project)[0]
    key.requests_per_minute = 2
    pressure.admit(key)
    pressure.forget()  # as another process would begin
    pressure.admit(key)

    with pytest.raises(TooMany):
        pressure.admit(key)


def test_without_a_broker_each_process_counts_for_itself(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pressure, "QUIET_SECONDS", 600.0)
    settings.REDIS_URL = "redis://127.0.0.1:1/0"
    key = builders.make_key(project)[0]
    key.requests_per_minute = 2
    with caplog.at_level(logging.WARNING):
        pressure.admit(key)
        pressure.admit(key)
        with pytest.raises(TooMany):
            pressure.admit(key)

    assert len([one for one in caplog.records if "broker away" in one.message]) == 1  # asked once, then left in peace


def test_the_default_of_the_site_holds_for_keys_without_a_rate(
    client: Client, project: Project, settings: Settings
) -> None:
    settings.API_REQUESTS_PER_MINUTE = 1
    own, default, free = keyed(project, 2), keyed(project, None), keyed(project, 0)

    assert [client.get(URL, headers=own).status_code for _ in range(3)] == [200, 200, 429]
    assert [client.get(URL, headers=default).status_code for _ in range(2)] == [200, 429]
    assert [client.get(URL, headers=free).status_code for _ in range(5)] == [200] * 5


def test_no_request_writes_a_row_for_its_rate(
    client: Client, project: Project, django_assert_num_queries: object
) -> None:
    headers = keyed(project, 100)
    client.get("/api/v1/limits/", headers=headers)  # notes that the key was used
    assert callable(django_assert_num_queries)

    with django_assert_num_queries(0):
        assert client.get("/api/v1/limits/", headers=headers).json()["requests_per_minute"] == 100


def test_a_key_is_made_with_its_rate(project: Project) -> None:
    call_command("create_api_key", project=project.slug, name="slow", requests_per_minute=7)

    assert ApiKey.objects.get(name="slow").requests_per_minute == 7


# --- room ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    pressure.forget()


def test_a_disk_that_is_nearly_full_stops_every_way_in_and_no_way_out(
    client: Client, project: Project, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(method: str, path: str, body: object) -> int:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = client.generic(method, path, raw, content_type="application/json", headers=headers)
        if answer.status_code == 507:
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["code"] == "storage-full"
        return int(answer.status_code)

    assert send("POST", URL, recordings.native("before")) == 201
    assert send("POST", URL, recordings.native("open", final_status="running", ended_at=None)) == 201
    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    pressure.forget()
    step = recordings.step(index=1)
    ways_in = [
        send("POST", URL, recordings.native("after")),
        send("POST", URL + "?format=messages", recordings.chat("after")),
        send("POST", URL + "bulk/", {"batch": [recordings.native("after")]}),
        send("POST", URL + "open/steps/", {"steps": [step]}),
        send("POST", URL + "open/end/", {}),
        send("PATCH", URL + "before/reward/", {"reward": 1, "source": "x"}),
        send("POST", URL + "before/judgments/", {"annotator_kind": "code", "name": "x", "score": 1}),
        send("PUT", "/api/v1/scenarios/s/", {"description": "x"}),
        send("PUT", "/api/v1/agents/a/", {}),
    ]

    assert ways_in == [507] * len(ways_in)
    assert Trajectory.objects.count() == 2
    assert not RewardChange.objects.exists()
    assert not Scenario.objects.exists()
    reads = [URL, URL + "before/", "/api/v1/export/", "/api/v1/limits/", "/api/v1/status/", "/api/v1/readiness/"]
    assert [client.get(path, headers=headers).status_code for path in reads] == [200] * len(reads)


def test_what_does_not_come_over_http_is_refused_too(project: Project, full: None) -> None:
    item = incoming_value(recordings.native("a"))
    for act in (
        lambda: ingestion.record(project, item),
        lambda: ingestion.record_many(project, [item]),
        lambda: running.append_steps(project, "a", [StepPayload(index=0)]),
        lambda: running.end(project, "a", EndBody()),
        lambda: rewards.change(project, "a", RewardBody(reward=1.0), by=SYSTEM),
        lambda: scenarios.put(project, "a", ScenarioBody(), by=SYSTEM),
    ):
        with pytest.raises(Full, match="nearly full"):
            act()
    assert not Trajectory.objects.exists()


def test_the_disk_is_looked_at_once_a_second(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []

    def look(path: object) -> Usage:
        looks.append(path)
        return Usage(10**12, 0, 10**12)

    monkeypatch.setattr(shutil, "disk_usage", look)
    pressure.forget()
    for _ in range(1000):
        pressure.check_room()

    assert 1 <= len(looks) <= 3


@pytest.mark.parametrize(("total", "floor"), [(2**30, 64), (40 * 2**30, 2048), (10 * 2**30, 512), (2**42, 2048)])
def test_the_floor_is_a_twentieth_of_the_disk_within_bounds(total: int, floor: int, settings: Settings) -> None:
    settings.DISK_FREE_FLOOR_MB = -1
    assert pressure.floor_bytes(total) == floor * 2**20
    settings.DISK_FREE_FLOOR_MB = 7
    assert pressure.floor_bytes(total) == 7 * 2**20


def test_a_database_above_its_size_stops_writing(project: Project, settings: Settings) -> None:
    settings.DATABASE_MAX_MB = 1  # an empty one of ours has about 10

    with pytest.raises(Full, match="DATABASE_MAX_MB allows 1"):
        pressure.check_room()


def test_health_says_that_nothing_is_taken_in(client: Client, headers: dict[str, str], full: None) -> None:
    health.forget()

    told = client.get("/api/v1/status/", headers=headers).json()["health"]["storage"]

    assert told["ok"] is False
    assert "Nothing is taken in" in told["detail"]
    assert client.get("/readyz").json()["parts"]["storage"]["ok"] is False


# --- the database --------------------------------------------------------------------------------------------------


def failing(error: Exception) -> object:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


class Refusal(Exception):
    def __init__(self, sqlstate: str) -> None:
        super().__init__("refused")
        self.sqlstate = sqlstate


@pytest.mark.parametrize("kind", [OperationalError, InterfaceError])
def test_a_database_that_is_away_is_a_503(
    client: Client, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    monkeypatch.setattr(ingestion, "record", failing(kind("the connection is lost")))

    answer = client.post(URL, json.dumps(recordings.native()), content_type="application/json", headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (503, "away")
    assert int(answer.headers["Retry-After"]) >= 1
    assert "connection is lost" not in answer.content.decode()


def test_a_database_whose_disk_is_full_is_a_507_for_a_while(
    client: Client, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OperationalError("could not extend file")
    error.__cause__ = Refusal(problems.DISK_FULL)
    with monkeypatch.context() as patched:
        patched.setattr(ingestion, "record", failing(error))
        first = client.post(URL, json.dumps(recordings.native()), content_type="application/json", headers=headers)
    second = client.post(URL, json.dumps(recordings.native()), content_type="application/json", headers=headers)

    assert (first.status_code, second.status_code) == (507, 507)
    assert client.get(URL, headers=headers).status_code == 200


def test_a_statement_that_cannot_be_run_stays_a_fault_of_ours() -> None:
    error = OperationalError("too complex")
    error.__cause__ = Refusal("54001")

    assert problems.exception_handler(error, {}) is None


def test_a_broker_that_hangs_costs_no_request(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pressure, "BROKER_SECONDS", 0.05)
    monkeypatch.setattr(pressure, "QUIET_SECONDS", 600.0)
    key = builders.make_key(project)[0]
    key.requests_per_minute = 2
    with socket.create_server(("127.0.0.1", 0)) as hanging, caplog.at_level(logging.WARNING):
        settings.REDIS_URL = f"redis://127.0.0.1:{hanging.getsockname()[1]}/0"
        pressure.admit(key)
        pressure.admit(key)
        with pytest.raises(TooMany):
            pressure.admit(key)

    assert len([one for one in caplog.records if "broker away" in one.message]) == 1


# --- the front door ------------------------------------------------------------------------------------------------


def knock(key: str) -> tuple[int, dict[str, str], dict[str, object]]:
    """(status, headers, answer) of a trajectory that is posted past Django."""
    raw = json.dumps(recordings.native()).encode()
    environ: dict[str, object] = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": URL,
        "CONTENT_LENGTH": str(len(raw)),
        "HTTP_AUTHORIZATION": f"Bearer {key}",
        "wsgi.input": io.BytesIO(raw),
    }
    said: list[tuple[str, list[tuple[str, str]]]] = []

    def site(environ: object, start_response: object) -> tuple[bytes]:
        raise AssertionError("it went the ordinary way")

    def start_response(status: str, headers: list[tuple[str, str]]) -> None:
        said.append((status, headers))

    body = b"".join(FrontDoor(site)(environ, start_response))  # type: ignore[arg-type]  # enough of a server
    return int(said[0][0].split()[0]), dict(said[0][1]), json.loads(body)


def test_the_front_door_answers_a_key_above_its_rate_alike(project: Project) -> None:
    row, key = builders.make_key(project)
    people.set_rate(row, "2")

    answers = [knock(key) for _ in range(3)]
    assert [status for status, _, _ in answers] == [201, 201, 429]
    assert int(answers[2][1]["Retry-After"]) >= 1
    assert answers[2][2]["limit"] == 2
    people.set_rate(row, "")
    assert knock(key)[0] == 201


def test_the_front_door_answers_a_full_disk_and_a_lost_database_alike(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = builders.make_key(project)[1]
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", nearly_full)
        pressure.forget()
        status, headers, answer = knock(key)
    assert (status, headers["Content-Type"], answer["code"]) == (507, "application/problem+json", "storage-full")
    assert int(headers["Retry-After"]) >= 1
    pressure.forget()
    with monkeypatch.context() as patched:
        patched.setattr(ingestion, "record", failing(OperationalError("gone")))
        status, headers, answer = knock(key)
    assert (status, answer["code"]) == (503, "away")
    assert int(headers["Retry-After"]) >= 1
    assert knock(key)[0] == 201


@pytest.mark.parametrize("wrong", ["-1", "many", "1e3", "1000001", "٣"])
def test_a_rate_is_a_whole_number(project: Project, wrong: str) -> None:
    with pytest.raises(Refused, match="no number of requests"):
        people.set_rate(builders.make_key(project)[0], wrong)
