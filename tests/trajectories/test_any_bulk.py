"""Any bulk body: whatever stands beside it, each item has its own answer; a cut costs what comes after it alone."""

import gzip
import io
import json
from collections.abc import Callable
from typing import cast

import pytest
import zstandard
from django.http import HttpResponse
from django.test import Client
from django.test.client import ClientHandler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import builders
from tests.trajectories import recordings
from trajectories import limits, segments
from trajectories.models import Project, Trajectory

pytestmark = pytest.mark.django_db

URL = "/api/v1/trajectories/bulk/"
LARGEST = 4_000  # bytes of an item, here
QUICK = settings(
    max_examples=80, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
LONG = settings(QUICK, max_examples=1_500, derandomize=False, print_blob=True)

Item = tuple[str, int]  # what it is, and whose number it bears
KINDS = {
    "good": 201, "again": 200, "other": 409, "broken": 400, "wrong": 400, "nan": 400, "torn": 400, "list": 400,
    "large": 413,
}  # fmt: skip


def line(item: Item) -> bytes:
    kind, number = item
    body = recordings.native(f"id-{number}", started_at="2026-01-01T00:00:00Z", ended_at="2026-01-01T00:01:00Z")
    made: dict[str, Callable[[], str]] = {
        "good": lambda: json.dumps(body),
        "again": lambda: json.dumps(body),
        "other": lambda: json.dumps({**body, "metadata": {"other": 1}}),
        "broken": lambda: json.dumps(body)[:-9],
        "wrong": lambda: json.dumps({**body, "steps": 3}),
        "nan": lambda: json.dumps({**body, "reward": float("nan")}),
        "torn": lambda: json.dumps({**body, "metadata": {"x": "\ud800"}}),
        "list": lambda: "[1, 2]",
        "large": lambda: json.dumps({**body, "metadata": {"x": "y" * LARGEST}}),
    }
    return made[kind]().encode()


ITEMS = st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.integers(0, 12)), min_size=1, max_size=40)


def expected(items: list[Item]) -> list[int]:
    """The status of each, from what stands before it."""
    first: dict[int, str] = {}
    statuses = []
    for kind, number in items:
        status = KINDS[kind]
        if status in (201, 200, 409):  # the first of an id is taken, its content repeated is a replay, other a conflict
            content = "other" if kind == "other" else "good"
            status = 201 if number not in first else 200 if first[number] == content else 409
            first.setdefault(number, content)
        statuses.append(status)
    return statuses


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setattr(limits, "ITEM_BYTES", LARGEST)
    return builders.make_project()


@pytest.fixture
def headers(project: Project) -> dict[str, str]:
    return builders.bearer(builders.make_key(project)[1])


def told(answer: dict[str, list[dict[str, object]]]) -> list[int]:
    """The status of each item; every one has exactly one answer, a refused one says why."""
    rows = sorted((*answer["successes"], *answer["errors"]), key=lambda row: int(str(row["index"])))
    assert [row["index"] for row in rows] == list(range(len(rows)))
    assert all(row["detail"] and row["code"] for row in answer["errors"])
    return [int(str(row["status"])) for row in rows]


def check_rows(project: Project, items: list[Item], statuses: list[int]) -> None:
    """One whole row for each that was taken, none for any other."""
    taken = {f"id-{number}" for (_, number), status in zip(items, statuses, strict=False) if status == 201}
    found = list(Trajectory.objects.filter(project=project))
    assert sorted(row.trajectory_id for row in found) == sorted(taken)
    for row in found:
        assert len(segments.load(row).steps) == row.n_steps == 1


def forget(project: Project) -> None:
    Trajectory.objects.filter(project=project).delete()


def post(client: Client, headers: dict[str, str], raw: bytes, kind: str, encoding: str) -> tuple[int, bytes]:
    packed = {"gzip": gzip.compress, "zstd": zstandard.ZstdCompressor().compress}.get(encoding, bytes)(raw)
    answer = client.post(URL, packed, content_type=kind, headers={**headers, "Content-Encoding": encoding})
    return answer.status_code, answer.content


def check_any(client: Client, project: Project, headers: dict[str, str], items: list[Item], encoding: str) -> None:
    forget(project)
    raw = b"\n".join(line(one) for one in items)
    status, content = post(client, headers, raw, "application/x-ndjson", encoding)
    assert status == 207, content
    assert told(json.loads(content)) == expected(items)
    check_rows(project, items, expected(items))


@QUICK
@given(items=ITEMS, encoding=st.sampled_from(["identity", "gzip", "zstd"]))
def test_each_line_has_its_own_answer(
    client: Client, project: Project, headers: dict[str, str], items: list[Item], encoding: str
) -> None:
    check_any(client, project, headers, items, encoding)


@pytest.mark.slow
@LONG
@given(items=ITEMS, encoding=st.sampled_from(["identity", "gzip", "zstd"]))
def test_each_line_has_its_own_answer_for_long(
    client: Client, project: Project, headers: dict[str, str], items: list[Item], encoding: str
) -> None:
    check_any(client, project, headers, items, encoding)


@QUICK
@given(items=ITEMS.map(lambda items: [one for one in items if one[0] != "broken"]))
def test_each_item_of_a_batch_has_its_own_answer(
    client: Client, project: Project, headers: dict[str, str], items: list[Item]
) -> None:
    """But for what breaks the JSON of all."""
    forget(project)
    raw = b'{"batch": [' + b",".join(line(one) for one in items) + b"]}"
    status, content = post(client, headers, raw, "application/json", "identity")
    assert status == 207, content
    assert told(json.loads(content)) == expected(items)
    check_rows(project, items, expected(items))


@QUICK
@given(items=ITEMS, share=st.floats(0, 1), encoding=st.sampled_from(["identity", "gzip", "zstd"]))
def test_a_body_may_be_cut_anywhere(
    client: Client, project: Project, headers: dict[str, str], items: list[Item], share: float, encoding: str
) -> None:
    """What arrived whole is taken, the item that was cut is refused, nothing is there by halves."""
    forget(project)
    raw = b"\n".join(line(one) for one in items)
    packed = {"gzip": gzip.compress, "zstd": zstandard.ZstdCompressor().compress}.get(encoding, bytes)(raw)
    packed = packed[: int(len(packed) * share)]
    answer = client.post(
        URL, packed, content_type="application/x-ndjson", headers={**headers, "Content-Encoding": encoding}
    )
    check_cut(project, items, answer.status_code, answer.content)


def check_cut(project: Project, items: list[Item], status: int, content: bytes) -> None:
    """The answers are those of the whole body as far as they go; what was not answered is not there."""
    statuses = told(json.loads(content)) if status == 207 else []
    assert status in (207, 400), content
    whole = expected(items)[: len(statuses)]
    assert statuses[: len(whole)] in (whole, [*whole[:-1], 400])
    assert statuses[len(whole) :] in ([], [400])
    check_rows(project, items, statuses)


@QUICK
@given(items=ITEMS, by=st.integers(-3_000, 3_000), encoding=st.sampled_from(["", "gzip", "zstd", "br", "GZIP", "x, y"]))
def test_lengths_and_encodings_may_be_wrong(
    project: Project, headers: dict[str, str], items: list[Item], by: int, encoding: str
) -> None:
    """As a server hands it over: Content-Length may be more or less than what comes, the encoding another."""
    forget(project)
    raw = b"\n".join(line(one) for one in items)
    length = max(0, len(raw) + by)
    environ = {
        "REQUEST_METHOD": "POST", "PATH_INFO": URL, "SERVER_NAME": "testserver", "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1", "wsgi.input": io.BytesIO(raw[:length]), "wsgi.url_scheme": "http",
        "wsgi.errors": io.StringIO(), "CONTENT_LENGTH": str(length), "CONTENT_TYPE": "application/x-ndjson",
        "HTTP_AUTHORIZATION": headers["Authorization"],
    }  # fmt: skip
    if encoding:
        environ["HTTP_CONTENT_ENCODING"] = encoding
    answer = cast(HttpResponse, ClientHandler()(environ))
    if not encoding:
        check_cut(project, items, answer.status_code, answer.content)
    else:
        assert answer.status_code in (400, 415) or (answer.status_code == 207 and length == 0), answer.content
        check_rows(project, [], [])
