"""What agents say is shown as words on every page: scripts, bidi, ANSI, NUL, a line of 1 MB, halves of characters."""

import json
from html.parser import HTMLParser

import pytest
from django.test import Client

from tests import builders
from tests.admin.test_walk_admin import address, nouns, rows_of, sign_in
from trajectories import formats, indexing, ingestion
from trajectories.errors import Problem
from trajectories.formats import lenient
from trajectories.models import Project, Trajectory

pytestmark = pytest.mark.django_db

URL = "/admin/trajectories/trajectory/"
WORDS = {
    "script": "<script>alert(1)</script>",
    "attribute": "\"><img src=x onerror=alert(1)> ' onmouseover='alert(1)",
    "template": "{{ request.user.password }}{% debug %}",
    "entity": "&lt;script&gt;&#x3c;script>alert(1)</script>",
    "closing": "</pre></textarea></title></style></table><script>alert(1)</script>",
    "comment": "<!--<script>alert(1)//--></script>",
    "bidi": "\u202e\u2066gnp.exe\u2069 \u200f\u05d0\u05d1\u05d2 <script>alert(1)</script>",
    "ansi": "\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b1m\f\r\n\t\v",
    "nul": "a\x00b<script>alert(1)</script>",
    "surrogate": "\ud800<script>alert(1)</script>\udfff",
    "unassigned": "\ufffe\uffff\U0010ffff\ufeff\u2028\u2029",
    "line": "<marquee>" + "x" * 1_000_000,
    "address": "javascript:alert(1)",
    "image": "data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9YWxlcnQoMSk+",
    "page": "data:text/html,<script>alert(1)</script>",
    "path": "../../../etc/passwd?<script>alert(1)</script>",
}
SHORT = {name: text for name, text in WORDS.items() if len(text) < 200}


class Alive(HTMLParser):
    """What of a page would run: scripts of its own, handlers, addresses that are scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        address = (told.get("href") or told.get("src") or "").strip().lower()
        if (
            (tag == "script" and "src" not in told)
            or tag == "marquee"
            or told.get("src") == "x"
            or any(name.startswith("on") for name in told)
            or address.startswith(("javascript:", "data:"))
        ):
            self.found.append(f"{tag} {attrs}"[:300])


def recording(words: str) -> dict[str, object]:
    """These words wherever an agent may put some."""
    short = words[:150]
    call = {"id": short, "type": "function", "function": {"name": words, "arguments": words}}
    return {
        "trajectory_id": f"id {short}",
        "agent_id": f"agent {short}",
        "role": short,
        "scenario": {
            "id": f"scenario {short}",
            "description": words[:50_000],
            "metadata": {words[:1000]: words[:1000]},
        },
        "episode_id": short,
        "stop_reason": words,
        "policy_version": short,
        "reward": 0.5,
        "reward_components": {words[:1000]: 0.5},
        "metrics": {short: short},
        "metadata": {words: words},
        "tools": [{"type": "function", "function": {"name": words, "description": words}}],
        "steps": [
            {
                "environment_state": {words: words},
                "provider_accesses": [{"provider_name": words, "purpose": words, "data": {words: [words]}}],
                "llm_calls": [
                    {
                        "model": words,
                        "messages": [
                            {"role": "system", "content": words},
                            {"role": "user", "content": [{"type": "text", "text": words}], "name": words},
                            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": words}}]},
                            {"role": words, "content": words},
                        ],
                        "response": words,
                        "reasoning": words,
                        "tool_calls": [call, {"function": words}],
                        "finish_reason": words,
                        "error": {words: words},
                        "purpose": words,
                        "tokenizer": words,
                        "unknown": words,
                    }
                ],
                "action": {
                    "action_type": words,
                    "parameters": {words: words},
                    "result": words,
                    "error": words,
                    "reasoning": words,
                    "calls": [{"tool_call_id": words, "result": {words: words}, "error": words}],
                },
            }
        ],
    }


def record(project: Project, body: dict[str, object], name: str = "native") -> str:
    """As the importer reads it: halves of characters become words."""
    value = lenient.loads(json.dumps(body).encode())
    assert isinstance(value, dict)
    found = formats.incoming_value(value, name)
    return ingestion.record(project, found).trajectory_id


def look_at(client: Client, page: str) -> str:
    response = client.get(page)
    assert response.status_code == 200, page
    text = response.content.decode()
    assert Alive(text).found == [], page
    assert "\x00" not in text
    assert "script-src 'self'" in response.headers["Content-Security-Policy"]
    return text


def every_page(project: Project) -> list[str]:
    pages = ["/admin/", "/admin/dashboard/"]
    for model, model_admin in nouns():
        pages.append(address(model))
        pages += [f"{address(model)}{row.pk}/change/" for row in rows_of(model, model_admin, project)[:3]]
    for row in Trajectory.objects.filter(project=project):
        pages += [f"{URL}{row.pk}/change/?step=0", f"{URL}{row.pk}/change/?q=x"]
    return pages


@pytest.mark.parametrize("name", list(WORDS))
def test_what_an_agent_says_is_shown_as_words_on_every_page(name: str) -> None:
    project = builders.make_project()
    try:
        record(project, recording(WORDS[name]))
    except Problem as problem:
        assert name in ("nul",), problem.detail  # an id with a NUL is refused; the words go everywhere else
        record(project, {**recording(WORDS[name]), **names_without(WORDS[name])})
    indexing.drain(project)
    client = sign_in(builders.make_member(project, "operator"))
    for page in every_page(project):
        look_at(client, page)


def names_without(words: str) -> dict[str, object]:
    """Ids cannot hold everything."""
    plain = {"trajectory_id": "t", "agent_id": "a", "role": "r", "episode_id": "e", "policy_version": None}
    return {**plain, "scenario": {"id": "s"}, "reward_components": {}}


@pytest.mark.parametrize("name", list(SHORT))
def test_a_conversation_that_runs_is_shown_as_words(name: str, client: Client) -> None:
    project = builders.make_project()
    words = SHORT[name].encode("utf-8", "replace").decode().replace("\x00", "")
    headers = builders.bearer(builders.make_key(project)[1])
    opened = {**recording(words), "trajectory_id": "t", "steps": [], "final_status": "running", "reward": None}
    told = client.post("/api/v1/trajectories/", json.dumps(opened), content_type="application/json", headers=headers)
    assert told.status_code == 201, told.content
    steps = recording(SHORT[name].replace("\ud800", "").replace("\udfff", ""))["steps"]
    assert isinstance(steps, list)
    told = client.post(
        "/api/v1/trajectories/t/steps/", json.dumps({"steps": [{**steps[0], "index": 0}]}),
        content_type="application/json", headers=headers,
    )  # fmt: skip
    assert told.status_code == 200, told.content
    row = Trajectory.objects.get(project=project)
    member = sign_in(builders.make_member(project))
    look_at(member, f"{URL}{row.pk}/change/")
    part = member.get(f"{URL}{row.pk}/live/?after=0")
    assert part.status_code == 200
    assert Alive(part.content.decode()).found == []
