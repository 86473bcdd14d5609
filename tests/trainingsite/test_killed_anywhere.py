"""Anything may be killed at any moment: no acknowledged trajectory is lost, and a batch ends in one model."""

import json
import os
import random
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainingsite.console import Console, command, until
from trainingsite import children

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")]

GROUPS, GROUP_SIZE = 24, 4
SEED = int(os.environ.get("CHAOS_SEED", "7"))  # of the moments; another seed is another story


class Api:
    """The site's API with one key; an answer that does not come is None."""

    def __init__(self, site: Console, key: str) -> None:
        self.site = site
        self.base = f"http://127.0.0.1:{site.port}/api/v1"
        self.key = key

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, object]] | None:
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as exc:
            text = exc.read()
            return exc.code, json.loads(text) if text.startswith(b"{") else {"detail": text.decode(errors="replace")}
        except (OSError, ValueError):
            return None  # refused, cut off in the middle, or half an answer

    def get(self, path: str) -> dict[str, object]:
        """The answer, waited for while the site comes back."""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            answer = self.ask("GET", path)
            if answer is not None and answer[0] == 200:
                return answer[1]
            time.sleep(0.2)
        raise AssertionError(f"{path} was not answered for 90 s: {answer}\n{self.site.text()}")


def episode(number: int) -> dict[str, object]:
    group, place = divmod(number, GROUP_SIZE)
    answer = "BUY" if (group + place) % 2 else "SELL"
    return {
        "trajectory_id": f"t{number}",
        "agent_id": f"agent-{place}",
        "scenario": {"id": f"s{group}", "description": f"Company {group} reports.", "split": "train"},
        "group_id": f"g{group}",
        "group_size": GROUP_SIZE,
        "final_status": "completed",
        "started_at": "2026-01-01T00:00:00Z",
        "reward": float(answer == "BUY"),
        "messages": [
            {"role": "system", "content": "Answer BUY or SELL."},
            {"role": "user", "content": f"Company {group} reports."},
            {"role": "assistant", "content": answer},
        ],
    }


def send_all(api: Api, acknowledged: set[str], stop: threading.Event) -> None:
    """As a careful agent does: each one again and again until it is acknowledged."""
    for number in range(GROUPS * GROUP_SIZE):
        while not stop.is_set():
            answer = api.ask("POST", "/trajectories/?format=messages", episode(number))
            if answer is not None and answer[0] in (200, 201):
                acknowledged.add(f"t{number}")
                break
            time.sleep(0.2)
        time.sleep(0.15)


def listed(api: Api) -> list[str]:
    ids: list[str] = []
    cursor = ""
    while True:
        page = api.get(f"/trajectories/?limit=50{cursor}")
        rows = page["results"]
        assert isinstance(rows, list)
        ids += [row["trajectory_id"] for row in rows]
        if not page["next"]:
            return ids
        cursor = f"&cursor={page['next']}"


def server(site: Console, name: str) -> children.Process | None:
    return children.kept(site.data / name / "process")


def running(site: Console, *words: str) -> children.Process | None:
    """The oldest of the site's processes whose command holds these words."""
    found = [one for one in site.programs() if all(word in command(one.pid).split() for word in words)]
    return min(found, key=lambda one: one.pid, default=None)


def kill(find: Callable[[], children.Process | None], seconds: float = 60.0) -> children.Process:
    """Kill -9 what is found, waiting until there is something."""
    found: list[children.Process] = []

    def there() -> bool:
        one = find()
        if one is not None:
            found.append(one)
        return one is not None

    assert until(there, seconds)
    found[0].signal(signal.SIGKILL)
    return found[0]


def test_nothing_acknowledged_is_lost_and_one_model_is_made(tmp_path: Path) -> None:
    moment = random.Random(SEED)
    site = Console(
        tmp_path / "data folder",
        TRAINING_BASE_MODEL="tiny",
        TRAINER_LEASE_SECONDS="4",
        TRAINER_MAX_ATTEMPTS="12",
        TRAINING_AUTO_TRIGGER="0",
    )
    stop = threading.Event()
    try:
        site.up()
        site.manage("create_project", "chaos")
        key = site.manage("create_api_key", "--project", "chaos", "--name", "k", "--scopes", "ingest,read,operate")
        api = Api(site, key.split()[-1])
        acknowledged: set[str] = set()
        sender = threading.Thread(target=send_all, args=(api, acknowledged, stop), daemon=True)
        sender.start()
        for victim in moment.sample(["granian", "celery", "postgres", "valkey", "supervisor"], 5):
            time.sleep(moment.uniform(0.5, 3.0))
            strike(site, victim)
        sender.join(120)
        assert len(acknowledged) == GROUPS * GROUP_SIZE
        ids = listed(api)
        assert sorted(ids) == sorted(acknowledged)  # each once

        hyperparameters = {"epochs": 40, "trajectories_per_step": 8, "learning_rate": 0.001, "checkpoint_every": 5}
        asked: dict[str, object] = {}

        def triggered() -> bool:
            answer = api.ask(
                "POST", "/batches/", {"force": True, "mode": "sft", "hyperparameters": hyperparameters, "seed": 1}
            )
            asked.update(answer[1] if answer else {})
            return answer is not None and answer[0] == 201

        assert until(triggered, 90), asked
        batch = asked["batch_id"]
        struck: list[str] = []
        for victim in ("trainer", "shim", "celery", "postgres", "valkey", "trainer", "supervisor"):
            assert until(lambda: running(site, "training.trainer") is not None or over(api, batch), 90)
            time.sleep(moment.uniform(0.2, 2.5))
            if over(api, batch):
                break
            strike(site, victim)
            struck.append(victim)
        assert {"trainer", "shim", "celery"} <= set(struck), f"training was over after {struck}: train longer"

        assert until(lambda: over(api, batch), 240), api.get(f"/batches/{batch}/")
        assert not site.ended(), site.text()
        done = api.get(f"/batches/{batch}/")
        assert done["status"] == "completed", done
        models = api.get("/models/")["results"]
        assert isinstance(models, list)
        assert [model["batch_id"] for model in models] == [batch]
        assert sorted(listed(api)) == sorted(acknowledged)
        assert site.ask_to_end() == 0
        assert site.programs() == []
        assert site.servers() == []
    finally:
        stop.set()
        if site.process is not None and not site.ended():
            site.process.kill()
            site.process.wait()
            until(lambda: not site.programs() and not site.servers(), 30)


def over(api: Api, batch: object) -> bool:
    return api.get(f"/batches/{batch}/")["status"] in ("completed", "failed", "cancelled")


def strike(site: Console, victim: str) -> None:
    """Kill -9 one part; the supervisor is started again, as a person would."""
    if victim in ("postgres", "valkey"):
        kill(lambda: server(site, victim))
    elif victim == "trainer":
        kill(lambda: running(site, "training.trainer"))
    elif victim == "shim":
        kill(lambda: running(site, "training.shim"))
    elif victim == "supervisor":
        assert site.process is not None
        site.process.kill()
        site.process.wait()
        site.lines.clear()
        site.up()
    else:
        kill(lambda: running(site, victim))
