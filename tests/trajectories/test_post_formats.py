"""POST and bulk in other formats: one body, or one line, is one trajectory."""

import json

import pytest
from django.test import Client

from tests import builders
from tests.trajectories import recordings
from trajectories import formats, segments
from trajectories.models import Project, Trajectory

pytestmark = pytest.mark.django_db

URL = "/api/v1/trajectories/"
Body = dict[str, object]


@pytest.fixture
def project() -> Project:
    return builders.make_project("here", held_out_share=0.0)


@pytest.fixture
def headers(project: Project) -> dict[str, str]:
    return builders.bearer(builders.make_key(project)[1])


def art(text: str = "BUY") -> Body:
    choice = {"finish_reason": "stop", "index": 0, "message": {"role": "assistant", "content": text}}
    return {"messages_and_choices": [{"role": "user", "content": "ACME?"}, choice], "reward": 0.5}


DOCUMENTS: dict[str, Body | list[Body]] = {
    "art": art(),
    "atif": {
        "schema_version": "ATIF-v1.6",
        "session_id": "s",
        "agent": {"name": "a"},
        "steps": [{"step_id": 1, "source": "user", "message": "?"}, {"step_id": 2, "source": "agent", "message": "!"}],
    },
    "nemo-gym": {
        "responses_create_params": {"input": "?"},
        "response": {"output": [{"type": "message", "role": "assistant", "content": "!"}]},
        "reward": 1,
    },
    "verifiers": {"example_id": 1, "prompt": "?", "completion": "!", "reward": 1.0},
    "tau-bench": {"task_id": 1, "trial": 0, "traj": [{"role": "assistant", "content": "!"}]},
    "tau2-bench": {
        "task_id": "1",
        "termination_reason": "user_stop",
        "messages": [
            {"role": "assistant", "content": "How can I help you?"},  # the harness's greeting, no call
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "!"},
        ],
    },
    "reflexion": {"question": "?", "trial": 1, "outcome": "correct", "steps": [{"thought": "t", "action": "!"}]},
    "openai-chat": {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]},
    "llm-calls": {
        "request": {"messages": [{"role": "user", "content": "?"}]},
        "response": {"choices": [{"message": {"role": "assistant", "content": "!"}}]},
    },
    "native": recordings.native("n"),
    "messages": recordings.chat("c"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_is_recorded_once(client: Client, headers: dict[str, str], name: str) -> None:
    body = json.dumps(DOCUMENTS[name])
    answers = [
        client.post(f"{URL}?format={spelt}", body, content_type="application/json", headers=headers)
        for spelt in (name, name.upper().replace("-", "_"))
    ]
    assert [answer.status_code for answer in answers] == [201, 200], answers[0].content
    row = Trajectory.objects.get()
    assert row.source_format == name
    assert row.n_calls >= 1
    whole = client.get(f"{URL}{row.trajectory_id}/", headers=headers)
    assert whole.status_code == 200


def test_a_body_with_several_trajectories_or_none_is_refused_with_the_way_out(
    client: Client, headers: dict[str, str]
) -> None:
    several = {"trajectories": [art("BUY"), art("SELL")]}
    answer = client.post(f"{URL}?format=art", json.dumps(several), content_type="application/json", headers=headers)
    assert answer.status_code == 400
    assert "bulk/" in answer.json()["detail"]
    other = client.post(f"{URL}?format=art", "{}", content_type="application/json", headers=headers)
    assert (other.status_code, "not in the format art" in other.json()["detail"]) == (400, True)
    unknown = client.post(f"{URL}?format=csv", "{}", content_type="application/json", headers=headers)
    assert (unknown.status_code, "There are: " in unknown.json()["detail"]) == (400, True)
    assert not Trajectory.objects.exists()


def test_lines_of_a_bulk_are_answered_one_by_one(client: Client, headers: dict[str, str]) -> None:
    lines = [json.dumps(art("BUY")), "<PLACEHOLDER ROW>", json.dumps({"x": 1}), json.dumps(art("SELL"))]
    answer = client.post(
        f"{URL}bulk/?format=art", "\n".join(lines), content_type="application/x-ndjson", headers=headers
    )
    assert answer.status_code == 207
    assert [one["index"] for one in answer.json()["successes"]] == [0, 3]
    assert [(one["index"], one["status"]) for one in answer.json()["errors"]] == [(1, 400), (2, 400)]


def test_lines_without_ids_are_known_for_lines_under_any_content_type(client: Client, headers: dict[str, str]) -> None:
    lines = "\n".join(json.dumps(art(text)) for text in ("BUY", "SELL"))
    answer = client.post(f"{URL}bulk/?format=art", lines, content_type="application/json", headers=headers)
    assert (answer.status_code, len(answer.json()["successes"])) == (207, 2)


def test_what_a_foreign_format_tells_more_comes_back_with_its_actions(client: Client, headers: dict[str, str]) -> None:
    asked = {"tool_call_id": "c", "function_name": "look", "arguments": {"at": 1}}
    step = {
        "step_id": 1,
        "source": "agent",
        "message": "?",
        "tool_calls": [asked],
        "observation": {"results": [{"source_call_id": "c", "content": "seen"}]},
    }
    body = {**DOCUMENTS["atif"], "steps": [step], "notes": "kept"} if isinstance(DOCUMENTS["atif"], dict) else {}
    client.post(f"{URL}?format=atif", json.dumps(body), content_type="application/json", headers=headers)

    payload = segments.load(Trajectory.objects.get())
    assert payload.steps[0].action is not None
    assert payload.steps[0].action.calls[0].result == "seen"
    assert payload.extra["notes"] == "kept"


def test_the_limits_list_the_formats_that_are_taken(client: Client, headers: dict[str, str]) -> None:
    told = client.get("/api/v1/limits/", headers=headers).json()["formats"]["in"]
    assert told == list(formats.POSTED)
    assert {"native", "messages", "art", "atif", "nemo-gym"} <= set(told)
