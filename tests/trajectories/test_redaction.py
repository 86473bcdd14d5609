"""Redaction comes before payload, shared texts and columns, on every way in."""

import json
import re

import pytest
from django.db import connection
from django.test import Client

from tests import builders
from tests.trajectories import recordings
from trajectories import redaction, segments
from trajectories.models import (
    Project,
    RedactionCount,
    RewardChange,
    Scenario,
    SharedText,
    Trajectory,
    TrajectorySegment,
)

pytestmark = pytest.mark.django_db

URL = "/api/v1/trajectories/"
SECRET = "4111-1111-1111-1111"
RULES = [
    {"name": "card", "pattern": r"\d{4}-\d{4}-\d{4}-\d{4}"},
    {"name": "e-mail", "path": "steps.*.environment_state.email"},
]


@pytest.fixture
def project() -> Project:
    return builders.make_project(redaction_rules=RULES)


@pytest.fixture
def headers(project: Project) -> dict[str, str]:
    return builders.bearer(builders.make_key(project)[1])


def everything() -> bytes:
    """All that the database holds of recordings, unpacked."""
    found = [segments.raw_of(row) for row in TrajectorySegment.objects.all()]
    found += [segments.decompress(bytes(row.data), row.raw_size) for row in SharedText.objects.all()]
    with connection.cursor() as cursor:
        for table in ("trajectories", "scenarios", "reward_changes", "llm_call_logs"):
            cursor.execute(f"select t::text from {table} t")
            found += [row[0].encode() for row in cursor.fetchall()]
    return b"\n".join(found)


def secret_body(trajectory_id: str) -> recordings.Body:
    system = {"role": "system", "content": f"Card {SECRET}. " + "Be kind. " * 100}
    call = recordings.call(
        messages=[system, {"role": "user", "content": f"Pay with {SECRET}"}],
        response=f"Paid with {SECRET}",
        prompt_token_ids=[1, 2],
        token_ids=[3],
        logprobs=[-0.5],
    )
    return recordings.native(
        trajectory_id,
        scenario={"id": "s", "description": f"Pay {SECRET}", "metadata": {"private": {"card": SECRET}}},
        steps=[recordings.step(llm_calls=[call], environment_state={"email": "a@b.c", "note": SECRET})],
        metadata={"card": SECRET},
        stop_reason=f"paid {SECRET}",
    )


def test_what_the_rules_name_is_nowhere(client: Client, headers: dict[str, str]) -> None:
    response = client.post(URL, json.dumps(secret_body("a")), content_type="application/json", headers=headers)

    assert response.status_code == 201
    assert SECRET.encode() not in everything()
    loaded = segments.load(Trajectory.objects.get())
    assert loaded.steps[0].environment_state == {"email": "[redacted: e-mail]", "note": "[redacted: card]"}
    assert loaded.steps[0].llm_calls[0].response == "Paid with [redacted: card]"
    assert {one.rule: one.count for one in RedactionCount.objects.all()} == {
        "card": 8,
        "e-mail": 1,
        redaction.TOKENS: 3,
    }


def test_token_ids_of_redacted_texts_go_too(client: Client, headers: dict[str, str]) -> None:
    client.post(URL, json.dumps(secret_body("a")), content_type="application/json", headers=headers)

    call = segments.load(Trajectory.objects.get()).steps[0].llm_calls[0]
    assert (call.token_ids, call.prompt_token_ids, call.logprobs) == (None, None, None)
    assert Trajectory.objects.get().fidelity == "retokenised"


def test_every_way_in_passes_it(client: Client, headers: dict[str, str]) -> None:
    def send(path: str, body: object, method: str = "POST") -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = client.generic(method, path, raw, content_type="application/json", headers=headers)
        assert answer.status_code < 300, answer.content

    send(URL + "bulk/", json.dumps({"batch": [secret_body("bulk")]}).encode())
    send(URL + "?format=messages", recordings.chat("chat", messages=[{"role": "user", "content": SECRET}]))
    send(URL, {**secret_body("open"), "final_status": "running", "ended_at": None})
    send(URL + "open/steps/", {"steps": [recordings.step(index=1, environment_state={"note": SECRET})]})
    send(URL + "open/end/", {"stop_reason": SECRET})
    send(URL + "open/reward/", {"reward": 1, "source": "x", "reason": f"paid {SECRET}"}, "PATCH")
    send("/api/v1/scenarios/t/", {"description": SECRET, "metadata": {"private": {"card": SECRET}}}, "PUT")

    assert Trajectory.objects.count() == 3
    assert Scenario.objects.count() == 2
    assert RewardChange.objects.count() == 1
    assert not re.search(RULES[0]["pattern"].encode(), everything())


def test_the_identity_is_of_what_was_received(client: Client, headers: dict[str, str]) -> None:
    body = secret_body("a")
    other = json.loads(json.dumps(body).replace("Paid with 4111", "Paid with 4222"))
    answers = [
        client.post(URL, json.dumps(one), content_type="application/json", headers=headers).status_code
        for one in (body, body, other)
    ]

    assert answers == [201, 200, 409]


@pytest.mark.parametrize("rule", [{"name": "broken", "pattern": "("}, {"name": "empty"}, "text"])
def test_a_rule_that_cannot_be_used_stops_recording(client: Client, rule: object) -> None:
    project = builders.make_project(redaction_rules=[rule])
    headers = builders.bearer(builders.make_key(project)[1])

    answer = client.post(URL, json.dumps(recordings.native("a")), content_type="application/json", headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (409, "refused")
    assert not Trajectory.objects.exists()
