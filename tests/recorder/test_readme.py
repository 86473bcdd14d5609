"""The examples of the recorder's README, run as they stand there, against the site."""

import ast
import asyncio
import inspect
import re
from collections.abc import Awaitable, Iterator
from pathlib import Path
from types import CodeType

import pytest
from pytest_django.live_server_helper import LiveServer

from tests.builders import make_key, make_project
from tests.gateway.backend import Backend
from trajectories import segments
from trajectories.models import Project, Trajectory
from trajectories.payloads import TrajectoryPayload

pytestmark = pytest.mark.django_db(transaction=True)

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "recorder" / "README.md"
EXAMPLE = re.compile(r"^## (?P<title>[^\n]+)\n\n```python\n(?P<code>.*?)```", re.DOTALL | re.MULTILINE)

# What an agent brings along; the examples say nothing of it.
AGENT = """
messages = [{"role": "user", "content": "Profits are up. BUY or SELL?"}]
turns = iter([False, False, True])
done = lambda: next(turns)
balance = lambda: 10_000
ask = lambda messages: "BUY"
buy = lambda n: {"filled": n}
profit = lambda: 12.5
"""


def example(title: str) -> str:
    """Its code. Fails where the page has no such heading with an example right below."""
    found = {one["title"]: one["code"] for one in EXAMPLE.finditer(PAGE.read_text())}
    return found[title]


def run(code: str) -> None:
    """As a program's, where `await` may stand at the outermost level."""
    compiled: CodeType = compile(code, str(PAGE), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names: dict[str, object] = {}
    if compiled.co_flags & inspect.CO_COROUTINE:

        async def whole() -> None:
            came: object = eval(compiled, names)
            assert isinstance(came, Awaitable)
            await came

        asyncio.run(whole())
    else:
        exec(compiled, names)


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend(("my-model",))
    yield backend
    backend.close()


@pytest.fixture
def project(live_server: LiveServer, backend: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Project:
    """The project that the environment points to; `~` is a folder of the test's."""
    project = make_project()
    monkeypatch.setenv("TRAININGSITE_URL", live_server.url)
    monkeypatch.setenv("TRAININGSITE_API_KEY", make_key(project)[1])
    monkeypatch.setenv("OPENAI_BASE_URL", f"{backend.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    return project


def recorded(project: Project) -> tuple[Trajectory, TrajectoryPayload]:
    row = Trajectory.objects.get(project=project)
    return row, segments.load(row)


def test_a_plain_loop(project: Project, tmp_path: Path) -> None:
    run(AGENT + example("A plain loop") + "recorder.close()")
    row, payload = recorded(project)
    assert (row.agent.agent_id, row.reward, row.final_status, row.n_steps) == ("trader-1", 12.5, "completed", 2)
    assert payload.steps[1].environment_state == {"balance": 10_000}
    assert payload.steps[1].llm_calls[0].response == "BUY"
    action = payload.steps[1].action
    assert action is not None
    assert (action.action_type, action.result, payload.steps[1].reward) == ("BUY", {"filled": 3}, 0.1)
    assert (tmp_path / ".trainingsite-spool").is_dir()


def test_the_openai_client(project: Project) -> None:
    run(AGENT + example("The OpenAI client") + "recorder.close()")
    row, payload = recorded(project)
    assert (row.reward, row.n_steps) == (12.5, 1)
    call = payload.steps[0].llm_calls[0]
    assert (call.model, call.temperature, call.response) == ("my-model", 0.7, "Buy on good news.")
    assert (call.prompt_tokens, call.completion_tokens) == (7, 5)


def test_with_asyncio(project: Project) -> None:
    run(example("With asyncio"))
    row, payload = recorded(project)
    assert row.final_status == "completed"
    assert [step.action.action_type for step in payload.steps if step.action] == ["WAIT"]


def test_which_model_to_play_with(project: Project) -> None:
    before = "import openai\nfrom recorder import Recorder\nrecorder = Recorder()\n"
    run(before + example("Which model to play with") + "trajectory.end()\nrecorder.close()")
    assert recorded(project)[0].final_status == "completed"
