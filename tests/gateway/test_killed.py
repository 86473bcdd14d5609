"""Whatever is killed, and when: a call whose answer came whole is recorded once, and no call is recorded twice."""

import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

from tests.gateway.backend import Backend
from tests.gateway.running import ROOT, RunningGateway, eventually
from trainingsite.embedded import Postgres

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("CHAOS_SEED", "7"))
AGENTS, CALLS = 4, 60

# Every recorded call as (trajectory, the last user message of its prompt), read back whole.
READ = """
import json
from trajectories import segments, transcripts
from trajectories.models import Trajectory
rows = [
    (row.trajectory_id, str(prompt[-1]["content"]), step.index)
    for row in Trajectory.objects.order_by("id")
    for payload in [segments.load(row)]
    for step, prompt in zip(payload.steps, transcripts.prompts(payload), strict=True)
]
print(json.dumps(rows))
"""


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    """One of its own, which may be killed."""
    runtime = Path(f"/tmp/gw-{os.getpid()}")
    runtime.mkdir(exist_ok=True)
    server = Postgres(tmp_path / "postgres", runtime)
    server.start()
    yield server
    server.stop()
    runtime.rmdir()


def manage(gateway: RunningGateway, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "manage.py", *arguments],
        cwd=ROOT, env=gateway.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


class Agent(threading.Thread):
    """Asks one question after the other, half of them streamed; an answer that did not come whole is no answer."""

    def __init__(self, gateway: RunningGateway, key: str, name: str) -> None:
        super().__init__(daemon=True)
        self.gateway, self.key, self.label = gateway, key, name
        self.answered: list[str] = []
        self.moments = random.Random(f"{SEED}{name}")

    def run(self) -> None:
        for number in range(CALLS):
            question = f"{self.label} question {number}"
            if self.ask(question, number):
                self.answered.append(question)

    def ask(self, question: str, number: int) -> bool:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": question}],
            "stream": bool(number % 2),
        }
        headers = {"Authorization": f"Bearer {self.key}", "X-Trajectory-Id": f"{self.label}-{number // 10}"}
        while True:
            try:
                answer = httpx.post(f"{self.gateway.url}/v1/chat/completions", json=body, headers=headers, timeout=30)
            except httpx.ConnectError:
                continue  # it is being started again
            except httpx.HTTPError:
                return False  # cut off in the middle
            if answer.status_code == 503:
                continue  # neither key nor route were known yet, and the database is away
            assert answer.status_code == 200, answer.text
            return not body["stream"] or answer.content.endswith(b"data: [DONE]\n\n")


def answers(agents: list[Agent], count: int, seconds: float) -> bool:
    """Whether the agents have got so many answers before the time is over."""
    return eventually(lambda: sum(len(one.answered) for one in agents) >= count, seconds)


def test_calls_answered_whole_are_recorded_once_whatever_is_killed(
    postgres: Postgres, tmp_path: Path, backend_alone: Backend
) -> None:
    gateway = RunningGateway(
        tmp_path / "data", backend_alone.url, DATABASE_URL=postgres.url(), TRAINING_BASE_MODEL="tiny"
    )
    manage(gateway, "migrate", "-v0")
    manage(gateway, "create_project", "chaos")
    key = manage(gateway, "create_api_key", "--project", "chaos", "--name", "k").split()[-1]
    moments = random.Random(SEED)
    agents = [Agent(gateway, key, f"agent{number}") for number in range(AGENTS)]
    with gateway:
        for agent in agents:
            agent.start()
        victims = ["gateway", "postgres", "gateway", "postgres", "gateway"]
        for round_, victim in enumerate(victims):
            share = (round_ + moments.random()) / (len(victims) + 1)
            assert answers(agents, int(share * AGENTS * CALLS), 120)
            if victim == "gateway":
                gateway.kill()
                gateway.start()
            else:
                assert postgres.process is not None
                postgres.process.kill()
                postgres.process.wait()
                # calls go on while it is away
                answers(agents, sum(len(one.answered) for one in agents) + 10, 30)
                postgres.start()
        for agent in agents:
            agent.join(120)
            assert not agent.is_alive()

        def is_drained() -> bool:
            health = gateway.health()
            spool = health["spool"]
            assert isinstance(spool, dict)
            return bool(spool["bytes"] == 0)

        assert eventually(is_drained, 60), gateway.said()
        gateway.kill()
    recorded = [tuple(row) for row in json.loads(manage(gateway, "shell", "-v0", "-c", READ).splitlines()[-1])]
    questions = Counter(question for _, question, _ in recorded)
    answered = [question for agent in agents for question in agent.answered]
    assert len(answered) > AGENTS * CALLS // 2
    assert [question for question in answered if questions[question] == 0] == []
    # An answer that was cut off may have been recorded; nothing is recorded twice.
    assert [question for question, count in questions.items() if count > 1] == []
    assert {trajectory for trajectory, question, _ in recorded} == {
        f"agent{number}-{tenth}" for number in range(AGENTS) for tenth in range(CALLS // 10)
    }
    by_trajectory: dict[str, list[int]] = {}
    for trajectory, _, index in recorded:
        by_trajectory.setdefault(trajectory, []).append(index)
    assert all(indexes == list(range(len(indexes))) for indexes in by_trajectory.values())
    with psycopg.connect(postgres.url()) as connection:
        found = connection.execute("select sum(n_calls) from trajectories").fetchone()
        assert found is not None and found[0] == len(recorded)
    assert not list((tmp_path / "data" / "gateway-spool" / "set-aside").glob("*"))
