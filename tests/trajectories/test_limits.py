"""GET /api/v1/limits/ is the truth: every limit that is listed holds at its value and refuses one more."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from django.utils import timezone
from pytest_django import Settings

from tests import builders
from tests.trajectories import recordings
from training import limits as loop_limits
from training.models import Evaluation, TrainingBatch
from trajectories import limits, pressure, rewards
from trajectories.models import ApiKey, Blob, Project, RewardChange, Split

pytestmark = pytest.mark.django_db

URL = "/api/v1/trajectories/"
Answer = tuple[int, dict[str, object]]


class Site:
    """One project's API, and what of the limits a test makes small enough to reach."""

    def __init__(self, client: Client, monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
        self.client, self.monkeypatch, self.settings = client, monkeypatch, settings
        self.project: Project = builders.make_project()
        self.key: ApiKey
        self.key, secret = builders.make_key(self.project)
        self.headers = builders.bearer(secret)

    def send(self, path: str, body: object, method: str = "POST", kind: str = "application/json") -> Answer:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = self.client.generic(method, path, raw, content_type=kind, headers=self.headers)
        return answer.status_code, json.loads(answer.content)

    def get(self, path: str) -> Answer:
        answer = self.client.get(path, headers=self.headers)
        return answer.status_code, json.loads(answer.content)

    def lower(self, name: str, value: float) -> None:
        self.monkeypatch.setattr(limits, name, value)


class Case(NamedTuple):
    """How to reach a limit: what is answered when exactly so much is sent."""

    at: Callable[[Site, int], Answer]
    lowered: tuple[str, int] | None = None  # a constant that is made small for the test


def sized(size: int, **fields: object) -> bytes:
    """A native trajectory of exactly so many bytes."""
    body = recordings.native(f"sized-{size}", **fields)
    body["metadata"] = {"filling": ""}
    bare = len(json.dumps(body).encode())
    body["metadata"] = {"filling": "x" * (size - bare)}
    return json.dumps(body).encode()


def padded(body: dict[str, object], size: int) -> bytes:
    raw = json.dumps(body).encode()
    return raw + b" " * (size - len(raw))


def item(site: Site, n: int) -> Answer:
    return site.send(URL, sized(n))


def otlp(site: Site, n: int) -> Answer:
    status, answer = site.send("/otel/v1/traces", padded({"resourceSpans": []}, n))
    if status < 400:
        return status, answer
    assert f"has {n} bytes; {n - 1} are allowed" in str(answer["message"])
    return status, {
        "detail": answer["message"],
        "limit": n - 1,
        "size": n,
        "pointer": "",
    }  # google.rpc.Status has no more


def steps_together(site: Site, n: int) -> Answer:
    site.send(URL, recordings.native(f"open-{n}", steps=[], final_status="running", ended_at=None))
    pieces = [f"k{at}" for at in range(10)]  # each below what would lie elsewhere
    state = dict.fromkeys(pieces, "x" * (n // 11))
    header = sum(row.raw_size for row in site.project.trajectories.get(trajectory_id=f"open-{n}").segments.all())
    body = {"steps": [{"index": 0, "environment_state": {**state, "last": ""}}]}
    overhead = header + len(json.dumps(body, separators=(",", ":")))
    state["last"] = "x" * (n - overhead)
    return site.send(f"{URL}open-{n}/steps/", {"steps": [{"index": 0, "environment_state": state}]})


def batch(site: Site, n: int) -> Answer:
    return site.send(URL + "bulk/", padded({"batch": [recordings.native()]}, n))


def ndjson(site: Site, n: int) -> Answer:
    line = json.dumps(recordings.native()).encode()
    return first_error(site.send(URL + "bulk/", line + b"\n" * (n - len(line)), kind="application/x-ndjson"))


def small_body(site: Site, n: int) -> Answer:
    return site.send("/api/v1/scenarios/s/", padded({"description": "x"}, n), "PUT")


def bulk_items(site: Site, n: int) -> Answer:
    lines = [json.dumps({"trajectory_id": f"b{n}-{at}", "agent_id": "a", "steps": []}) for at in range(n)]
    return first_error(site.send(URL + "bulk/", "\n".join(lines).encode(), kind="application/x-ndjson"))


def first_error(answer: Answer) -> Answer:
    """Of a bulk request: what its first refused item is told."""
    errors = answer[1]["errors"]
    assert isinstance(errors, list)
    return (int(errors[0]["status"]), errors[0]) if errors else answer


def steps(site: Site, n: int) -> Answer:
    return site.send(URL, recordings.native(f"steps-{n}", steps=[{}] * n))


def histories(site: Site, n: int) -> Answer:
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    body = {"trajectory_id": f"histories-{n}", "agent_id": "a", "histories": [talk] * n}
    return site.send(URL + "?format=messages", body)


def ids(site: Site, n: int) -> Answer:
    answers = [
        site.send(URL, recordings.native(f"id-{n}-{name}", **{name: "x" * n}))
        for name in ("agent_id", "scenario_id", "group_id", "episode_id", "parent_trajectory_id", "retry_of", "role")
    ]
    answers.append(site.send(URL, recordings.native("y" * n)))
    answers.append(site.send(URL, recordings.native(scenario={"id": "z" * n})))
    assert len({status for status, _ in answers}) == 1
    return answers[-1]


def evaluation_id(site: Site, n: int) -> Answer:
    return site.send(URL, recordings.native(evaluation_id="x" * n))


def reward_source(site: Site, n: int) -> Answer:
    return site.send(f"{URL}unknown/reward/", {"reward": 1, "source": "x" * n}, "PATCH")


def column_json(site: Site, n: int) -> Answer:
    described = site.send("/api/v1/scenarios/s/", {"description": "x" * n}, "PUT")
    told = site.send("/api/v1/scenarios/s/", {"metadata": {"x": "y" * (n - len('{"x":""}'))}}, "PUT")
    components = site.send(URL, recordings.native(f"r-{n}", reward_components={"y" * (n - len('{"":1.0}')): 1.0}))
    assert described[0] // 100 == told[0] // 100 == components[0] // 100
    return told


def group_size(site: Site, n: int) -> Answer:
    return site.send(URL, recordings.native(group_size=n))


def clock_skew(site: Site, n: int) -> Answer:
    ahead = datetime.now(UTC) + timedelta(seconds=n if n == limits.CLOCK_SKEW.total_seconds() else n + 60)
    return site.send(URL, recordings.native(started_at=ahead.isoformat(), ended_at=None))


def page(site: Site, n: int) -> Answer:
    assert site.get(f"/api/v1/scenarios/?limit={n}")[0] == site.get(f"{URL}?limit={n}")[0]
    return site.get(f"{URL}?limit={n}")


def requests(site: Site, n: int) -> Answer:
    site.settings.API_REQUESTS_PER_MINUTE = 3
    pressure.forget()
    site.key, secret = builders.make_key(site.project)
    site.headers = builders.bearer(secret)
    return [site.get("/api/v1/limits/") for _ in range(n)][-1]


def feedback(field: str) -> Callable[[Site, int], Answer]:
    def at(site: Site, n: int) -> Answer:
        builders.make_trajectory(site.project, trajectory_id=f"{field}-{n}")
        body = {"annotator_kind": "code", "name": "x", "score": 1.0, field: "x" * n}
        return site.send(f"{URL}{field}-{n}/judgments/", body)

    return at


def loop_body(site: Site, n: int) -> Answer:
    builders.make_trajectory(site.project, trajectory_id=f"body-{n}")
    return site.send(f"{URL}body-{n}/judgments/", padded({"annotator_kind": "code", "name": "x"}, n))


def batch_field(field: str) -> Callable[[Site, int], Answer]:
    def at(site: Site, n: int) -> Answer:
        status, answer = site.send("/api/v1/batches/", {"force": True, field: "x" * n})
        return (201 if status == 409 else status), answer  # nothing to train on: the body itself was fine

    return at


def reason(site: Site, n: int) -> Answer:
    status, answer = site.send("/api/v1/batches/nowhere/cancel/", {"reason": "x" * n})
    return (200 if status == 404 else status), answer


def loop_page(site: Site, n: int) -> Answer:
    return site.get(f"/api/v1/groups/?limit={n}")


def evaluation(**fields: object) -> Callable[[Site, int], Answer]:
    def at(site: Site, n: int) -> Answer:
        builders.make_model(site.project, f"v1.0.{n}")
        builders.make_scenario(site.project, split=Split.HELD_OUT)
        version = {"version": f"v1.0.{n}", **dict.fromkeys(fields, n)}
        return site.send("/api/v1/evaluations/", version)

    return at


def work(site: Site, n: int) -> Answer:
    running = Evaluation.objects.filter(project=site.project).first() or builders.make_evaluation(
        builders.make_model(site.project)
    )
    return site.get(f"/api/v1/evaluations/{running.evaluation_id}/work/?limit={n}")


def adapter(site: Site, weights: int = 100, config: int = 100) -> Answer:
    batch = TrainingBatch.objects.filter(project=site.project).first() or builders.make_batch(site.project)
    files = {
        "batch_id": batch.batch_id,
        "config": SimpleUploadedFile("adapter_config.json", b"{" + b" " * (config - 2) + b"}"),
        "adapter": SimpleUploadedFile("adapter_model.safetensors", b"x" * weights),
    }
    answer = site.client.post("/api/v1/models/", files, headers=site.headers)
    return answer.status_code, json.loads(answer.content)


def adapter_bytes(site: Site, n: int) -> Answer:
    site.monkeypatch.setattr(loop_limits, "ADAPTER_BYTES", 5000)
    status, answer = adapter(site, weights=n)
    return (201 if status == 409 else status), answer  # no adapter at all, but not too large for one


def adapter_config(site: Site, n: int) -> Answer:
    status, answer = adapter(site, config=n)
    return (201 if status == 409 else status), answer


CASES = {
    "trajectory_bytes": Case(item, ("ITEM_BYTES", 2**20)),
    "open_trajectory_bytes": Case(steps_together, ("OPEN_BYTES", 2**20)),
    "batch_json_bytes": Case(batch, ("BATCH_JSON_BYTES", 2**20)),
    "otlp_bytes": Case(otlp, ("OTLP_BYTES", 2**20)),
    "ndjson_bytes": Case(ndjson, ("NDJSON_BYTES", 2**20)),
    "small_body_bytes": Case(small_body),
    "bulk_items": Case(bulk_items, ("BULK_ITEMS", 20)),
    "steps": Case(steps),
    "histories": Case(histories),
    "id_characters": Case(ids),
    "evaluation_id_characters": Case(evaluation_id),
    "reward_source_characters": Case(reward_source),
    "column_json_bytes": Case(column_json),
    "group_size": Case(group_size),
    "clock_skew_seconds": Case(clock_skew),
    "page": Case(page),
    "requests_per_minute": Case(requests),
    "loop_body_bytes": Case(loop_body),
    "feedback_name_characters": Case(feedback("name")),
    "feedback_comment_characters": Case(feedback("comment")),
    "feedback_author_characters": Case(feedback("author")),
    "reason_characters": Case(reason),
    "purpose_characters": Case(batch_field("purpose")),
    "base_model_characters": Case(batch_field("base_model")),
    "loop_page": Case(loop_page),
    "evaluation_work": Case(work),
    "evaluation_attempts": Case(evaluation(attempts=1)),
    "evaluation_scenarios": Case(evaluation(scenarios=1)),
    "adapter_bytes": Case(adapter_bytes),
    "adapter_config_bytes": Case(adapter_config),
}
ELSEWHERE = {  # shown by a test of their own
    "part_bytes": "test_blobs.py",
    "earliest_year": "below",
    "reward_wait_seconds": "below",
    "refused_bytes_read": "test_post_trajectory.py",
    "redaction_milliseconds": "test_redaction.py",
    "disk_free_floor_mb": "test_pressure.py",
    "database_max_mb": "test_pressure.py",
    "gateway_body_bytes": "gateway/test_refuse_calls.py",
    "gateway_spool_bytes": "gateway/test_full_spool.py",
}


@pytest.fixture
def site(client: Client, monkeypatch: pytest.MonkeyPatch, settings: Settings) -> Site:
    return Site(client, monkeypatch, settings)


def published(site: Site) -> dict[str, dict[str, object]]:
    rows = site.get("/api/v1/limits/")[1]["limits"]
    assert isinstance(rows, list)
    return {row["name"]: row for row in rows}


def test_every_limit_is_listed_with_its_unit_and_shown_somewhere(site: Site) -> None:
    answer = site.get("/api/v1/limits/")[1]
    rows = published(site)

    assert set(rows) == set(CASES) | set(ELSEWHERE)
    assert all(row["unit"] and row["what"] for row in rows.values())
    assert {name: answer[name] for name in rows} == {name: row["value"] for name, row in rows.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_limit_takes_what_it_says_and_refuses_one_more(site: Site, name: str) -> None:
    case = CASES[name]
    if case.lowered is not None:
        site.lower(*case.lowered)
    row = published(site)[name]
    value = row["value"]
    if name in ("requests_per_minute", "adapter_bytes"):  # by settings, and 8 GB
        value = {"requests_per_minute": 3, "adapter_bytes": 5000}[name]
    assert isinstance(value, int)

    status, answer = case.at(site, value)
    assert status < 300, answer
    status, answer = case.at(site, value + 1)

    assert status == row["status"], answer
    assert str(answer["detail"])
    assert answer["limit"] == value
    if row["status"] == 413 and name != "ndjson_bytes":
        assert answer["size"] == value + 1
    assert "pointer" in answer or name in ("bulk_items", "requests_per_minute")


@pytest.mark.parametrize("path", ["/api/v1/batches/", "/api/v1/models/", "/api/v1/trajectories/"])
@pytest.mark.parametrize("wrong", ["0", "-1", "ten", "1e2", "00000110000000", "9" * 5000])
def test_a_page_is_no_larger_however_its_size_is_written(site: Site, path: str, wrong: str) -> None:
    status, answer = site.get(f"{path}?limit={wrong}")

    assert (status, answer["pointer"]) == (400, "?limit")


def test_no_time_lies_before_the_earliest_year(site: Site) -> None:
    year = published(site)["earliest_year"]["value"]

    assert site.send(URL, recordings.native(started_at=f"{year}-01-01T00:00:00Z", ended_at=None))[0] == 201
    status, answer = site.send(URL, recordings.native(started_at="1969-12-31T23:59:59Z", ended_at=None))
    assert (status, answer["limit"]) == (400, year)


def test_a_reward_waits_as_long_as_is_said(site: Site) -> None:
    wait = published(site)["reward_wait_seconds"]["value"]
    assert isinstance(wait, int)
    site.send(f"{URL}unknown/reward/", {"reward": 1, "source": "x"}, "PATCH")

    RewardChange.objects.update(created_at=timezone.now() - timedelta(seconds=wait - 60))
    assert rewards.expire_waiting() == 0
    RewardChange.objects.update(created_at=timezone.now() - timedelta(seconds=wait + 1))
    assert rewards.expire_waiting() == 1


def test_appended_steps_count_with_those_that_are_there(site: Site) -> None:
    site.lower("STEPS", 3)
    site.send(URL, recordings.native("open", steps=[], final_status="running", ended_at=None))

    assert site.send(f"{URL}open/steps/", {"steps": [{"index": at} for at in range(3)]})[0] == 200
    status, answer = site.send(f"{URL}open/steps/", {"steps": [{"index": 3}]})
    assert (status, answer["limit"], answer["size"], answer["pointer"]) == (413, 3, 4, "/steps")


def test_no_blob_is_made_of_what_is_refused(site: Site) -> None:
    site.lower("ITEM_BYTES", 2**20)

    assert item(site, 2**20 + 1)[0] == 413
    assert not Blob.objects.exists()
