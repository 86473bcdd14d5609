"""The wheel, alone in an environment of its own: what it needs, what it says of its types; and beside frameworks."""

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from django.utils import timezone
from pytest_django.live_server_helper import LiveServer

from tests.builders import make_key, make_project
from tests.gateway.backend import Backend, Reply
from tests.recorder.test_readme import AGENT, example
from trajectories import otlp, segments
from trajectories.models import Project, Trajectory

pytestmark = [pytest.mark.slow, pytest.mark.django_db(transaction=True)]

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = (
    "langgraph",
    "langchain-openai",
    "opentelemetry-sdk",
    "opentelemetry-exporter-otlp-proto-http",
    "openinference-instrumentation-openai",
)

USER = """
import asyncio

from recorder import Client, Counts, Recorder, Trajectory


class Account:
    def __init__(self) -> None:
        self.balance = 100.0


recorder = Recorder("http://127.0.0.1:9", "ts_key", exit_seconds=0.0)


@recorder.action
def buy(n: int, *, limit: float | None = None) -> dict[str, int]:
    return {"filled": n}


@recorder.action(name="SELL")
async def sell(n: int) -> str:
    return f"sold {n}"


def play(trajectory: Trajectory, account: Account) -> int:
    with trajectory.start_step({"balance": account.balance}) as step:
        step.log_llm_call(model="m", messages=[{"role": "user", "content": "Now?"}], response="BUY")
        filled: dict[str, int] = buy(3, limit=2.0)
        step.complete(reward=0.5)
    return filled["filled"]


async def main() -> str:
    async with recorder.start_trajectory("a", scenario_id="s") as trajectory:
        play(trajectory, Account())
        said: str = await sell(2)
    return said


def read(client: Client) -> list[float | None]:
    return [row["reward"] for row in client.trajectories(scenario="s")]


said = asyncio.run(main())
counts: Counts = recorder.counts
print(said, counts.recorded, counts.faults)
"""
WRONG = """
from recorder import Recorder

recorder = Recorder()


@recorder.action
def buy(n: int) -> str:
    return "done"


buy("three")
recorder.start_trajectory(group_size="eight")
recorder.start_trajectory().end("finished")
"""


def command(*words: object, cwd: Path, seconds: int = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRAININGSITE"))}
    return subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=seconds, env=kept | environment
    )


def environment(folder: Path) -> Path:
    """A new one; its interpreter."""
    assert command(sys.executable, "-m", "venv", folder, cwd=ROOT).returncode == 0
    return folder / "bin" / "python"


def install(python: Path, *what: object, cwd: Path) -> None:
    """Skips where no package index can be reached."""
    come = command(python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *what, cwd=cwd, seconds=550)
    if come.returncode:
        pytest.skip(f"cannot install {', '.join(map(str, what))}: {come.stderr[-300:]}")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, which leaves no `build` folder in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = command("git", "ls-files", "recorder", cwd=ROOT).stdout.split()
    for name in tracked or [str(one.relative_to(ROOT)) for one in (ROOT / "recorder").iterdir() if one.is_file()]:
        kept = folder / name
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes((ROOT / name).read_bytes())
    python = environment(folder / "venv")
    made = command(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, folder / "recorder", cwd=folder)
    if made.returncode and "setuptools" in made.stderr:
        pytest.skip(f"the build needs setuptools from a package index: {made.stderr[-300:]}")
    assert made.returncode == 0, made.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    python = environment(folder / "venv")
    install(python, wheel, cwd=folder)
    return python


@pytest.fixture(scope="module")
def beside_frameworks(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frameworks")
    python = environment(folder / "venv")
    install(python, wheel, *FRAMEWORKS, cwd=folder)
    return python


def test_the_wheel_runs_with_nothing_else_but_httpx(alone: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    ran = command(alone, "-W", "error", "user.py", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "sold 2 1 0\n"
    found = command(alone, "-c", "import recorder; print(recorder.__file__)", cwd=tmp_path).stdout
    assert "site-packages" in found
    assert command(alone, "-m", "pip", "check", cwd=tmp_path).returncode == 0
    needs = command(alone, "-m", "pip", "show", "trainingsite-recorder", cwd=tmp_path).stdout
    assert "Requires: httpx\n" in needs


def test_a_users_program_is_checked_strictly(alone: Path, tmp_path: Path) -> None:
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", alone, "--cache-dir", tmp_path / "cache")
    (tmp_path / "user.py").write_text(USER)
    checked = command(*mypy, "user.py", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout
    (tmp_path / "wrong.py").write_text(WRONG)
    said = command(*mypy, "wrong.py", cwd=tmp_path).stdout
    assert "Found 3 errors" in said, said
    assert 'incompatible type "str"; expected "int"' in said


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend(("my-model",))
    yield backend
    backend.close()


@pytest.fixture
def project() -> Project:
    return make_project()


def run(python: Path, folder: Path, code: str, site: LiveServer, project: Project, backend: Backend) -> None:
    (folder / "agent.py").write_text(code)
    ran = command(
        python,
        "agent.py",
        cwd=folder,
        TRAININGSITE_URL=site.url,
        TRAININGSITE_API_KEY=make_key(project)[1],
        OPENAI_BASE_URL=f"{backend.url}/v1",
        OPENAI_API_KEY="sk-secret",
    )
    assert ran.returncode == 0, ran.stderr


def test_langgraph(
    beside_frameworks: Path, tmp_path: Path, live_server: LiveServer, project: Project, backend: Backend
) -> None:
    asks: dict[str, object] = {
        "id": "c1",
        "type": "function",
        "function": {"name": "price", "arguments": '{"of": "ACME"}'},
    }
    backend.replies = [Reply(words=[""], tool_calls=[asks]), Reply()]
    tool = 'def price(of: str) -> float:\n    "The price of a stock."\n    return 12.5\n'
    code = AGENT + tool + example("LangGraph") + "recorder.close()\nassert recorder.counts.faults == 0\n"
    run(beside_frameworks, tmp_path, code, live_server, project, backend)

    row = Trajectory.objects.get(project=project)
    payload = segments.load(row)
    assert (row.reward, row.final_status, row.n_steps, row.n_calls) == (12.5, "completed", 2, 2)
    action = payload.steps[0].action
    assert action is not None
    assert (action.action_type, action.parameters) == ("price", {"of": "ACME"})
    assert [(call.tool_call_id, call.result) for call in action.calls] == [("c1", 12.5)]
    last = payload.steps[1].llm_calls[0]
    assert last.response == "Buy on good news."
    assert last.prompt_ref is not None  # the conversation was sent once


def test_an_opentelemetry_set_up(
    beside_frameworks: Path, tmp_path: Path, live_server: LiveServer, project: Project, backend: Backend
) -> None:
    before = 'import os\nurl, key = os.environ["TRAININGSITE_URL"], os.environ["TRAININGSITE_API_KEY"]\n'
    asks = (
        "from openai import OpenAI\n"
        'OpenAI().chat.completions.create(model="my-model", messages=messages)\n'
        "assert tracing.force_flush()\n"
    )
    code = before + AGENT + example("An OpenTelemetry set-up") + asks
    run(beside_frameworks, tmp_path, code, live_server, project, backend)

    otlp.sweep(timezone.now() + timedelta(hours=1))
    row = Trajectory.objects.get(project=project)
    payload = segments.load(row)
    (call,) = [call for step in payload.steps for call in step.llm_calls]
    assert (call.model, call.response) == ("my-model", "Buy on good news.")
    assert (call.prompt_tokens, call.completion_tokens) == (7, 5)
