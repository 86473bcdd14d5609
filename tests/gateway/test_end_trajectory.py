"""A trajectory ends after all of its calls: through the gateway, through the site, or by itself when it is idle."""

import json
import threading

import httpx
import pytest
from django.test import Client
from openai.types.chat import ChatCompletionMessageParam
from pytest_django import Settings

from tests.builders import bearer
from tests.gateway.backend import Backend, Reply
from tests.gateway.recorded import QUESTION, calls_of, row_of
from tests.gateway.running import RunningGateway, eventually
from trajectories import segments
from trajectories.models import Project, State


def end(gateway: RunningGateway, key: str, trajectory_id: str, **body: object) -> httpx.Response:
    return httpx.post(
        f"{gateway.url}/v1/trajectories/{trajectory_id}/end/",
        json=body,
        headers={"Authorization": f"Bearer {key}"},
        timeout=30,
    )


def test_an_end_right_after_the_last_call_seals_all_of_them(
    gateway: RunningGateway, key: str, project: Project
) -> None:
    client = gateway.client(key, X_Trajectory_Id="t1", X_Scenario_Id="s1")
    for _ in range(3):
        client.chat.completions.create(model="tiny", messages=QUESTION)
    answer = end(gateway, key, "t1", reward=1.0, final_status="completed")
    assert (answer.status_code, answer.json()["state"]) == (200, "sealed")
    row = row_of(project, "t1")
    assert (row.state, row.n_calls, row.reward, row.source_format) == (State.SEALED, 3, 1.0, "gateway")
    assert row.fidelity == "exact"
    assert end(gateway, key, "t1", reward=1.0, final_status="completed").json()["outcome"] == "replay"
    assert end(gateway, key, "t1", reward=0.0).status_code == 409
    with pytest.raises(Exception, match="has ended"):
        client.chat.completions.create(model="tiny", messages=QUESTION)


def test_an_end_waits_for_a_call_under_way(
    gateway: RunningGateway, backend: Backend, key: str, project: Project
) -> None:
    gate = threading.Event()
    backend.replies = [Reply(gates={0: gate})]
    client = gateway.client(key, X_Trajectory_Id="t1")
    asking = threading.Thread(
        target=lambda: client.chat.completions.create(model="tiny", messages=QUESTION), daemon=True
    )
    asking.start()
    assert eventually(lambda: bool(backend.asked))
    answers: list[httpx.Response] = []
    ending = threading.Thread(target=lambda: answers.append(end(gateway, key, "t1")), daemon=True)
    ending.start()
    refused = eventually(lambda: "ended" in _try(gateway, key))  # no new call comes between
    gate.set()
    ending.join(30)
    asking.join(30)
    assert refused
    assert answers[0].json()["state"] == "sealed"
    assert len(calls_of(project, "t1")) == 1


def _try(gateway: RunningGateway, key: str) -> str:
    """What another call into t1 is told; none is made while the end is not there yet, since it would wait too."""
    headers = {"Authorization": f"Bearer {key}", "X-Trajectory-Id": "t1", "X-Agent-Id": "nobody"}
    answer = httpx.post(f"{gateway.url}/v1/chat/completions", json={"messages": QUESTION}, headers=headers)
    return answer.text


def test_an_end_at_the_site_does_not_overtake_calls_in_the_spool(
    gateway: RunningGateway, key: str, client: Client, settings: Settings, project: Project
) -> None:
    settings.GATEWAY_URL = gateway.url
    for number in range(5):
        gateway.client(key, X_Trajectory_Id=f"t{number}").chat.completions.create(model="tiny", messages=QUESTION)
        answer = client.post(
            f"/api/v1/trajectories/t{number}/end/", {"reward": 0.5}, "application/json", headers=bearer(key)
        )  # at once: the database may not have heard of it
        assert answer.status_code == 200, answer.content
        row = row_of(project, f"t{number}")
        assert (row.state, row.n_calls, row.reward) == (State.SEALED, 1, 0.5)
    gone = client.post("/api/v1/trajectories/never/end/", {}, "application/json", headers=bearer(key))
    assert gone.status_code == 404


def test_while_the_gateway_is_away_the_site_seals_nothing_of_it(
    gateway: RunningGateway, key: str, client: Client, settings: Settings, project: Project
) -> None:
    settings.GATEWAY_URL = gateway.url
    gateway.client(key, X_Trajectory_Id="t1").chat.completions.create(model="tiny", messages=QUESTION)
    calls_of(project, "t1")
    gateway.stop()
    try:
        answer = client.post("/api/v1/trajectories/t1/end/", {}, "application/json", headers=bearer(key))
    finally:
        gateway.start()
    assert answer.status_code == 503
    assert "Retry-After" in answer.headers
    assert row_of(project, "t1").state == State.OPEN


def test_tool_results_become_the_results_of_the_actions_that_asked(
    gateway: RunningGateway, backend: Backend, key: str, project: Project
) -> None:
    wanted: dict[str, object] = {
        "id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "AAPL"}'},
    }  # fmt: skip
    backend.replies = [Reply(words=[], tool_calls=[wanted]), Reply()]
    client = gateway.client(key, X_Trajectory_Id="t1")
    first = client.chat.completions.create(model="tiny", messages=QUESTION)
    going_on: list[ChatCompletionMessageParam] = [
        *QUESTION,
        first.choices[0].message.to_dict(),  # type: ignore[list-item]  # what the docs suggest
        {"role": "tool", "tool_call_id": "call_1", "content": "up 3 %"},
    ]
    client.chat.completions.create(model="tiny", messages=going_on)
    assert end(gateway, key, "t1").status_code == 200
    payload = segments.load(row_of(project, "t1"))
    action = payload.steps[0].action
    assert action is not None
    assert (action.action_type, action.parameters) == ("look", {"at": "AAPL"})
    assert action.calls[0].result == "up 3 %"
    assert json.dumps(payload.steps[1].llm_calls[0].prompt_ref is not None) == "true"
