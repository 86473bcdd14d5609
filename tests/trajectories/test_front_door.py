"""One trajectory straight from the server: the same answers as by the ordinary way, in less time."""

import io
import json
from collections.abc import Iterable

import pytest
from django.db import OperationalError
from django.test import Client

from tests import builders
from tests.trajectories import recordings
from trajectories import ingestion, limits
from trajectories.front_door import FrontDoor
from trajectories.models import ApiKey, Project, Trajectory

pytestmark = pytest.mark.django_db
URL = "/api/v1/trajectories/"


class Site:
    """Stands behind the door and counts who comes through."""

    def __init__(self) -> None:
        self.visitors = 0

    def __call__(self, environ: object, start_response: object) -> Iterable[bytes]:
        self.visitors += 1
        return (b"ordinary",)


@pytest.fixture
def project() -> Project:
    return builders.make_project()


@pytest.fixture
def key(project: Project) -> str:
    return builders.make_key(project)[1]


def knock(raw: bytes, key: str, *, site: Site | None = None, **changed: object) -> tuple[int, dict[str, object]]:
    """(status, answer); status 0: it went the ordinary way."""
    environ: dict[str, object] = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": URL,
        "QUERY_STRING": "",
        "CONTENT_LENGTH": str(len(raw)),
        "HTTP_AUTHORIZATION": f"Bearer {key}",
        "wsgi.input": io.BytesIO(raw),
        **changed,
    }
    said: list[str] = []

    def start_response(status: str, headers: object, exc_info: object = None) -> None:
        said.append(status)

    answer = b"".join(FrontDoor(site or Site())(environ, start_response))  # type: ignore[arg-type]  # enough of one
    return (int(said[0].split()[0]), json.loads(answer)) if said else (0, {})


BODIES = {
    "a new one": recordings.native("run"),
    "no object": [1, 2],
    "a wrong type": recordings.native("run", steps="none"),
    "a bad id": recordings.native("x" * 201),
    "a reward that is none": {**recordings.native("run"), "reward": "much"},
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_the_answer_is_the_ordinary_one(project: Project, key: str, client: Client, body: object) -> None:
    raw = json.dumps(body).encode()
    status, answer = knock(raw, key)
    Trajectory.objects.all().delete()

    ordinary = client.post(URL, raw, content_type="application/json", headers=builders.bearer(key))

    assert (status, answer) == (ordinary.status_code, ordinary.json())


def test_sent_again_it_is_a_replay_and_other_content_a_conflict(key: str) -> None:
    body = recordings.native("run")
    assert knock(json.dumps(body).encode(), key)[0] == 201
    assert knock(json.dumps(body).encode(), key)[0] == 200
    assert knock(json.dumps({**body, "metadata": {"other": 1}}).encode(), key)[0] == 409
    assert Trajectory.objects.count() == 1


def test_a_body_that_broke_off_is_a_400(key: str) -> None:
    raw = json.dumps(recordings.native("run")).encode()

    status, answer = knock(raw[:-5], key, CONTENT_LENGTH=str(len(raw)))

    assert status == 400
    assert "5 bytes of its Content-Length did not come" in str(answer["detail"])


@pytest.mark.parametrize(
    "changed",
    [
        {"REQUEST_METHOD": "GET"},
        {"PATH_INFO": f"{URL}bulk/"},
        {"QUERY_STRING": "format=art"},
        {"HTTP_CONTENT_ENCODING": "gzip"},
        {"HTTP_AUTHORIZATION": "Bearer ts_unknown"},
        {"HTTP_AUTHORIZATION": ""},
        {"CONTENT_LENGTH": ""},
        {"CONTENT_LENGTH": str(limits.ITEM_BYTES + 1)},
    ],
)
def test_what_is_out_of_the_ordinary_goes_the_ordinary_way_unread(key: str, changed: dict[str, object]) -> None:
    site, source = Site(), io.BytesIO(b"body")

    assert knock(b"", key, site=site, **{"wsgi.input": source, **changed})[0] == 0

    assert site.visitors == 1
    assert source.tell() == 0


def test_a_key_without_the_scope_goes_the_ordinary_way(project: Project) -> None:
    assert knock(b"{}", builders.make_key(project, "read")[1])[0] == 0


def test_a_key_that_was_revoked_opens_nothing_at_once(project: Project, key: str) -> None:
    assert knock(json.dumps(recordings.native("run")).encode(), key)[0] == 201
    row = ApiKey.objects.get(project=project)
    row.delete()

    assert knock(json.dumps(recordings.native("other")).encode(), key)[0] == 0


def test_a_database_that_is_away_is_a_503(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(ingestion, "record", gone)

    assert knock(json.dumps(recordings.native("run")).encode(), key)[0] == 503


def test_a_fault_of_ours_is_a_500_without_its_story(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(ingestion, "record", broken)

    status, answer = knock(json.dumps(recordings.native("run")).encode(), key)

    assert status == 500
    assert "secret" not in str(answer)
