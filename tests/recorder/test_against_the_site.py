"""The recorder and the client against the site itself, over HTTP."""

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from pytest_django.live_server_helper import LiveServer

from recorder import AsyncClient, Client, Invalid, NotAllowed, NotFound, Recorder, Refused
from tests.builders import make_batch, make_key, make_model, make_project, make_trajectory, make_version
from tests.recorder.site import SOON
from training.models import BatchStatus, JudgeKind, RewardJudgment
from trajectories import segments, transcripts
from trajectories.models import Project, Trajectory

pytestmark = pytest.mark.django_db(transaction=True)

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = "You trade one stock and answer BUY or SELL, nothing else."
NEWS = "The headline says: profits are up by a third."


@pytest.fixture
def project() -> Project:
    return make_project(held_out_share=0.0)


@pytest.fixture
def client(live_server: LiveServer, project: Project) -> Iterator[Client]:
    with Client(live_server.url, make_key(project)[1]) as client:
        yield client


@pytest.fixture
def recording(live_server: LiveServer, project: Project) -> Iterator[Recorder]:
    with Recorder(live_server.url, make_key(project, "ingest")[1], limits=SOON) as recording:
        yield recording


def play(recording: Recorder, reward: float | None, *, scenario: str = "day-1", model: str = "m") -> str:
    talk: list[dict[str, object]] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": NEWS},
    ]
    with recording.start_trajectory("trader", scenario_id=scenario, group_size=4) as trajectory:
        for turn in range(2):
            with trajectory.start_step({"turn": turn}) as step:
                step.log_provider_access("news", {"turn": turn})
                step.log_llm_call(model=model, messages=talk, response=f"BUY {turn}", temperature=1.0)
                step.complete("BUY", {"n": turn}, success=True, result="done")
            talk += [{"role": "assistant", "content": f"BUY {turn}"}, {"role": "user", "content": "And now?"}]
        trajectory.end(reward=reward)
    return trajectory.trajectory_id


def test_what_was_recorded_is_read_back_whole(recording: Recorder, client: Client) -> None:
    trajectory_id = play(recording, 0.5)
    assert recording.flush(20)

    assert recording.counts.delivered == 1
    found = client.trajectory(trajectory_id)
    assert (found["agent_id"], found["reward"], found["final_status"]) == ("trader", 0.5, "completed")
    assert [step["action"] for step in found["steps"]] == [
        {"action_type": "BUY", "parameters": {"n": turn}, "success": True, "result": "done"} for turn in (0, 1)
    ]
    row = found["recorded"]
    assert (row["steps"], row["llm_calls"], row["fidelity"], row["origin"]) == (2, 2, "retokenised", "foreign")
    assert row["quality"] == 1.0
    loaded = segments.load(Trajectory.objects.get(trajectory_id=trajectory_id))
    assert [[message["content"] for message in prompt] for prompt in transcripts.prompts(loaded)] == [
        [SYSTEM, NEWS],
        [SYSTEM, NEWS, "BUY 0", "And now?"],  # the second call was sent as a reference to the first
    ]


def test_sending_everything_again_changes_nothing(live_server: LiveServer, project: Project, tmp_path: Path) -> None:
    program = f"""
import os, signal
from recorder import Recorder
recording = Recorder("http://127.0.0.1:9", "k", spool={str(tmp_path)!r})
for n in range(5):
    with recording.start_trajectory("agent", trajectory_id=f"t{{n}}") as trajectory:
        trajectory.start_step().complete("ACT")
recording.start_trajectory("agent", trajectory_id="cut").start_step().complete("ACT")
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    saved = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    key = make_key(project, "ingest")[1]

    for known in (0, 6):  # a second process that finds the same files: the first one's answers were lost
        for path, content in saved.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        with Recorder(live_server.url, key, spool=tmp_path) as recording:
            assert wait_until_delivered(recording, 6)
            assert recording.counts.replayed == known

    rows = Trajectory.objects.filter(project=project)
    assert sorted(rows.values_list("trajectory_id", "final_status")) == [
        ("cut", "cancelled"),
        *((f"t{n}", "completed") for n in range(5)),
    ]


def wait_until_delivered(recording: Recorder, n: int) -> bool:
    """The spool is looked through by the recorder's own thread, so first wait for it to have begun."""
    for _ in range(200):
        if recording.counts.recorded >= n:
            return recording.flush(20)
        recording.flush(0.1)
        asyncio.run(asyncio.sleep(0.05))
    return False


def test_a_live_trajectory_is_shown_while_it_runs_and_is_the_same_at_its_end(
    recording: Recorder, client: Client
) -> None:
    def shown(n: int) -> bool:
        for _ in range(400):
            try:
                found = client.trajectory(trajectory.trajectory_id)
            except NotFound:
                found = {}
            if len(found.get("steps", [])) >= n:
                return found["recorded"]["state"] == "open"
            threading.Event().wait(0.05)
        return False

    with recording.start_trajectory("trader", scenario_id="day-1", live=True) as trajectory:
        for turn in range(3):
            with trajectory.start_step({"turn": turn}) as step:
                step.log_llm_call(model="m", messages=[{"role": "user", "content": NEWS}], response=f"BUY {turn}")
                step.complete("BUY", {"n": turn})
            assert shown(turn + 1)
        trajectory.end(reward=0.5)
    assert recording.flush(20)
    assert (recording.counts.delivered, recording.counts.rejected) == (1, 0)
    found = client.trajectory(trajectory.trajectory_id)
    assert (found["recorded"]["state"], found["reward"], len(found["steps"])) == ("sealed", 0.5, 3)


def test_rewards_that_come_later_by_the_recorder(recording: Recorder, client: Client) -> None:
    trajectory_id = play(recording, None)
    recording.reward(trajectory_id, 0.75, source="shop", reason="the order came in")
    recording.reward("not-yet-known", 1.0)  # waits on the site
    assert recording.flush(20)
    assert (recording.counts.delivered, recording.counts.rejected) == (3, 0)
    assert client.trajectory(trajectory_id)["reward"] == 0.75


def test_a_group_is_plain_lists(recording: Recorder, client: Client) -> None:
    rewards = [0.0, 1.0, None, 1.0]
    ids = []
    for reward in rewards:
        ids.append(play(recording, reward))
        assert recording.flush(20)
    first = Trajectory.objects.get(trajectory_id=ids[0])

    (row,) = client.groups(scenario="day-1")
    RewardJudgment.objects.create(
        project=first.project, trajectory=first, kind=JudgeKind.CODE, source="rule:exact", score=0.25, reasoning="close"
    )
    group = client.group(row["id"])

    assert (row["n"], row["reward_n"], row["reward_mean"], row["state"]) == (4, 3, 2 / 3, "closed")
    assert group["trajectory_ids"] == ids
    assert group["rewards"] == rewards
    assert group["scores"] == {"rule:exact": [0.25, None, None, None]}
    assert group["trajectories"][0]["judgments"][0]["comment"] == "close"
    assert group["trajectories"][1]["judgments"] == []
    assert list(client.groups(state="open")) == []


def test_lists_go_on_over_all_pages(project: Project, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [make_trajectory(project, trajectory_id=f"t{n}", reward=n / 10).trajectory_id for n in range(7)]
    monkeypatch.setattr("recorder.client.PAGE", 3)
    assert [row["trajectory_id"] for row in client.trajectories()] == made[::-1]
    assert [row["trajectory_id"] for row in client.trajectories(reward_min=0.5)] == ["t6", "t5"]


def test_rewards_and_feedback_that_come_later(recording: Recorder, client: Client) -> None:
    trajectory_id = play(recording, None)
    assert recording.flush(20)
    assert client.set_reward(trajectory_id, 0.75, source="shop", reason="the order came in")["applied"]
    client.add_judgment(trajectory_id, name="tone", score=0.9, comment="polite")
    assert client.trajectory(trajectory_id)["reward"] == 0.75
    assert [one["comment"] for one in client.judgments(trajectory_id)] == ["polite"]
    assert not client.set_reward("not-yet-known", 1.0)["applied"]


def test_scenarios_with_their_split(client: Client) -> None:
    client.put_scenario("a/b c", description="Trade.", split="held_out", metadata={"private": {"gold": 1}, "year": 2})
    assert client.scenario("a/b c")["metadata"] == {"year": 2}
    assert [one["id"] for one in client.scenarios(split="held_out")] == ["a/b c"]


def test_readiness_status_and_limits(client: Client) -> None:
    readiness = client.readiness()
    assert readiness["ready"] is False
    assert {check["check"] for check in readiness["reasons"]} >= {"trajectories", "scenario_groups"}
    assert client.status()["data_collection"]["last_24h"] == 0
    assert client.limits()["id_characters"] == 200


def test_a_batch_that_is_refused_says_every_reason(client: Client) -> None:
    with pytest.raises(Refused) as caught:
        client.trigger_batch()
    assert caught.value.status == 409
    assert [reason["ok"] for reason in caught.value.reasons if reason["check"] == "trajectories"] == [False]


def test_batches_and_models(project: Project, client: Client) -> None:
    batch = make_batch(project, status=BatchStatus.COMPLETED)
    make_model(batch=batch, version="v1.0.0")
    assert [one["batch_id"] for one in client.batches()] == [batch.batch_id]
    assert client.batch(batch.batch_id)["model_version"] == "v1.0.0"
    assert client.wait_for_batch(batch.batch_id)["status"] == "completed"
    assert [one["version"] for one in client.models()] == ["v1.0.0"]
    assert client.model("v1.0.0")["batch_id"] == batch.batch_id


def test_an_agent_asks_which_model_it_uses_and_asks_cheaply_again(client: Client) -> None:
    route = client.model_for("trader 7")
    assert (route["agent_id"], route["version"]) == ("trader 7", None)
    assert route["model"]
    assert client.model_for("trader 7") is route  # a 304


def test_an_evaluation_and_a_deployment_are_asked_for(project: Project, client: Client) -> None:
    make_model(project, "v1.0.0", adapter_hash="0" * 64)
    deployment = client.deploy("v1.0.0", reason="first")
    assert (deployment["version"], deployment["state"]) == ("v1.0.0", "requested")
    assert deployment["gates"]
    assert [one["id"] for one in client.deployments()] == [deployment["id"]]
    with pytest.raises((Refused, NotAllowed)):
        client.approve(deployment["id"], "by nobody")
    with pytest.raises(NotFound, match=r"v9\.9\.9"):
        client.evaluate("v9.9.9")
    assert list(client.evaluations()) == []


def test_refusals_are_typed_by_what_to_do_next(live_server: LiveServer, project: Project, client: Client) -> None:
    with pytest.raises(NotFound, match="no such trajectory"):
        client.trajectory("never")
    with pytest.raises(Invalid, match="no filter 'colour'") as caught:
        list(client.trajectories(colour="red"))
    assert (caught.value.status, caught.value.pointer) == (400, "?colour")
    with Client(live_server.url, "ts_wrong") as stranger, pytest.raises(NotAllowed, match="create_api_key"):
        stranger.status()
    with Client(live_server.url, make_key(project, "ingest")[1]) as agent, pytest.raises(NotAllowed, match="scope"):
        agent.status()
    other = Client(live_server.url, make_key(make_project())[1])
    make_trajectory(project, trajectory_id="ours")
    with other, pytest.raises(NotFound):
        other.trajectory("ours")


def test_an_id_that_is_taken_by_other_content_is_refused_and_the_first_one_kept(
    recording: Recorder, project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    for action in ("BUY", "SELL"):
        with recording.start_trajectory(trajectory_id="t1") as trajectory:
            trajectory.start_step().complete(action)
        assert recording.flush(20)
    assert (recording.counts.delivered, recording.counts.rejected) == (1, 1)
    assert "refused trajectory t1" in caplog.text
    assert Trajectory.objects.filter(project=project).count() == 1


def test_an_own_version_is_recognised_by_the_name_it_is_served_under(
    recording: Recorder, client: Client, project: Project
) -> None:
    version = make_version(project, "v1.0.0")
    trajectory_id = play(recording, 1.0, model=version.serving_name)
    assert recording.flush(20)
    row = client.trajectory(trajectory_id)["recorded"]
    assert (row["origin"], row["version"], row["trainable_calls"]) == ("own", "v1.0.0", 2)


def test_a_completion_with_token_ids_is_recorded_exactly(recording: Recorder, client: Client, project: Project) -> None:
    served = make_version(project, "v1.0.0").serving_name
    request = {"model": served, "messages": [{"role": "user", "content": "Now?"}], "temperature": 1.0}
    answer = {
        "model": served,
        "choices": [
            {
                "message": {"role": "assistant", "content": "BUY"},
                "finish_reason": "stop",
                "token_ids": [7, 2],
                "logprobs": {"content": [{"token": "BUY", "logprob": -0.7}, {"token": "", "logprob": -0.1}]},
            }
        ],
        "prompt_token_ids": [1, 5, 6],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    with recording.start_trajectory("trader", scenario_id="day-1") as trajectory:
        with trajectory.start_step() as step:
            step.log_completion(request, answer, logprobs_mode="processed", tokenizer="tiny")
    assert recording.flush(20)
    found = client.trajectory(trajectory.trajectory_id)
    assert (found["recorded"]["fidelity"], found["recorded"]["trainable_calls"]) == ("exact", 1)
    (call,) = cast(list[dict[str, object]], found["steps"][0]["llm_calls"])
    assert (call["prompt_token_ids"], call["token_ids"], call["logprobs"]) == ([1, 5, 6], [7, 2], [-0.7, -0.1])


def test_the_async_client_reads_the_same(live_server: LiveServer, project: Project) -> None:
    make_trajectory(project, trajectory_id="t1")

    key = make_key(project)[1]

    async def main() -> tuple[list[str], bool]:
        async with AsyncClient(live_server.url, key) as client:
            rows = [row["trajectory_id"] async for row in client.trajectories()]
            return rows, (await client.readiness())["ready"]

    assert asyncio.run(main()) == (["t1"], False)
