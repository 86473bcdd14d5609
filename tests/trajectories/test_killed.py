"""Kill -9 of the web process and of PostgreSQL in mid-bulk: what was acknowledged is there, once, and so is the rest
when all of it is sent again."""

import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPException

import pytest

from tests.trainingsite.console import until
from tests.trajectories.served import SINGLE, Answer, Body, ServedSite, rows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")]

ITEMS = 1_500
AGENTS = 4


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedSite]:
    site = ServedSite(tmp_path_factory.mktemp("killed"))
    try:
        site.start()
        yield site
    finally:
        site.stop()


def trajectory(name: str) -> bytes:
    asked = f"{name} asks" + " x" * 4_000  # the server reads 256 kB at once
    steps = [{"llm_calls": [{"model": "m", "user_prompt": asked, "response": f"{name} answers"}]}] * 3
    return json.dumps({"trajectory_id": name, "agent_id": "a", "scenario_id": f"s-{name}", "steps": steps}).encode()


def sent(site: ServedSite, path: str, body: Body, kind: str) -> Answer | None:
    """None: no answer came."""
    try:
        return site.ask("POST", path, body, Content_Type=kind)
    except (OSError, HTTPException, ValueError):
        return None


class Agents:
    """They post one trajectory after the other, the same again until it is acknowledged, as careful agents do."""

    def __init__(self, site: ServedSite, name: str) -> None:
        self.site, self.name = site, name
        self.acknowledged: list[str] = []
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._post, args=(number,), daemon=True) for number in range(AGENTS)]

    def _post(self, number: int) -> None:
        count = 0
        while not self.stop.is_set():
            name = f"{self.name}-{number}-{count}"
            answer = sent(self.site, SINGLE, trajectory(name), "application/json")
            if answer is None or answer[0] == 503:
                self.stop.wait(0.05)
                continue
            assert answer[0] in (200, 201), answer
            self.acknowledged.append(name)
            count += 1
            self.stop.wait(0.02)  # a few hundred are enough

    def __enter__(self) -> "Agents":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(90)


class Halfway:
    """A bulk body that stops after some items until it is told to go on: in between somebody strikes."""

    def __init__(self, name: str, after: int) -> None:
        self.names = [f"{name}-{number}" for number in range(ITEMS)]
        self.after = after
        self.there, self.go_on = threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        for number, name in enumerate(self.names):
            if number == self.after:
                self.there.set()
                self.go_on.wait(90)
            yield trajectory(name) + b"\n"


def strike(site: ServedSite, name: str, after: int, how: str) -> None:
    body = Halfway(name, after)
    with Agents(site, f"{name}-single") as agents, ThreadPoolExecutor(1) as pool:
        answer: Future[Answer | None] = pool.submit(sent, site, f"{SINGLE}bulk/", iter(body), "application/x-ndjson")
        assert body.there.wait(90)
        # Some of them are written, though nobody was told so.
        assert until(lambda: site.ask("GET", f"{SINGLE}{body.names[0]}/")[0] == 200, 60)
        if how == "web":
            site.kill_web()
            body.go_on.set()
            assert answer.result(90) is None
            site.start_web()
        else:
            site.kill_database()
            body.go_on.set()
            told = answer.result(90)
            assert told is None or told[0] == 503, told
            site.postgres.start()
            assert until(lambda: site.ask("GET", f"{SINGLE}?limit=1")[0] == 200, 90)
        seen = len(agents.acknowledged)
        assert until(lambda: len(agents.acknowledged) > seen + AGENTS, 60)  # they go on by themselves

    before = site.ids()
    assert len(before) == len(set(before))
    assert set(agents.acknowledged) <= set(before)

    status, replay = site.bulk(b"\n".join(trajectory(one) for one in (*agents.acknowledged, *body.names)))

    assert (status, replay["errors"]) == (207, [])
    told_of = {str(row["trajectory_id"]): row["status"] for row in rows((status, replay), "successes")}
    there = set(before)  # what was acknowledged among them: that is a replay
    assert told_of == {one: 200 if one in there else 201 for one in (*agents.acknowledged, *body.names)}
    after_all = site.ids()
    assert len(after_all) == len(set(after_all)) == len(set(before) | set(body.names))


@pytest.mark.parametrize("after", [60, 700, ITEMS - 1])
@pytest.mark.parametrize("how", ["web", "database"])
def test_what_was_acknowledged_is_there_once_and_the_rest_may_be_sent_again(
    site: ServedSite, how: str, after: int
) -> None:
    strike(site, f"{how}-{after}", after, how)


def test_every_recording_that_survived_is_whole(site: ServedSite) -> None:
    names = site.ids()
    status, exported = site.ask("GET", "/api/v1/export/?format=native", seconds=120)

    assert status == 200
    lines = [json.loads(line) for line in str(exported["raw"]).splitlines()]
    assert sorted(line["trajectory_id"] for line in lines) == sorted(names)
    for line in lines:
        name = line["trajectory_id"]
        calls = [call for step in line["steps"] for call in step["llm_calls"]]
        assert [call["response"] for call in calls] == [f"{name} answers"] * 3
