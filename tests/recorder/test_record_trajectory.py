"""What an agent tells the recorder, as it goes over the wire."""

import asyncio
import json
import threading
from dataclasses import dataclass

import pytest

from recorder import Recorder
from tests.recorder.site import Site, recorder

JSON = dict[str, object]


def sent(site: Site, recording: Recorder) -> JSON:
    assert recording.flush(10)
    return site.only()


def test_a_trajectory_with_steps_accesses_calls_actions_and_rewards_arrives_whole() -> None:
    site = Site()
    with recorder(site) as recording:
        trajectory = recording.start_trajectory(
            "trader-1", scenario_id="day-7", group_size=8, policy_version="v1.0.3", metadata={"seed": 7}
        )
        step = trajectory.start_step({"balance": 10_000})
        step.log_provider_access("news", {"headline": "Up"}, purpose="context")
        step.log_llm_call(
            model="m", system_prompt="Trade.", user_prompt="Now?", response="BUY", temperature=0.7, latency_ms=12.5
        )
        step.complete("BUY", {"n": 3}, success=True, result={"filled": 3}, reward=0.25)
        trajectory.end(reward=1.0, reward_components={"pnl": 1.0}, metrics={"pnl": 12.5}, metadata={"note": "x"})
        found = sent(site, recording)

    times = [found.pop("started_at"), found.pop("ended_at")]
    assert times == sorted(times)  # type: ignore[type-var]  # texts
    steps = found.pop("steps")
    assert found == {
        "trajectory_id": trajectory.trajectory_id,
        "agent_id": "trader-1",
        "scenario_id": "day-7",
        "group_size": 8,
        "policy_version": "v1.0.3",
        "metadata": {"seed": 7, "note": "x"},
        "final_status": "completed",
        "reward": 1.0,
        "reward_components": {"pnl": 1.0},
        "metrics": {"pnl": 12.5},
    }
    assert isinstance(steps, list)
    assert steps[0].pop("timestamp")
    assert steps == [
        {
            "environment_state": {"balance": 10_000},
            "provider_accesses": [{"provider_name": "news", "data": {"headline": "Up"}, "purpose": "context"}],
            "llm_calls": [
                {
                    "model": "m",
                    "system_prompt": "Trade.",
                    "user_prompt": "Now?",
                    "response": "BUY",
                    "temperature": 0.7,
                    "latency_ms": 12.5,
                }
            ],
            "action": {"action_type": "BUY", "parameters": {"n": 3}, "success": True, "result": {"filled": 3}},
            "reward": 0.25,
        }
    ]
    request = site.requests[0]
    assert request.url == "http://site/api/v1/trajectories/"
    assert request.headers["Authorization"] == "Bearer ts_key"


def test_a_growing_conversation_costs_its_new_words_only() -> None:
    site = Site()
    with recorder(site) as recording:
        talk: list[JSON] = [{"role": "system", "content": "Trade."}, {"role": "user", "content": "Day 1"}]
        trajectory = recording.start_trajectory()
        for day in (2, 3, 4):
            with trajectory.start_step() as step:
                step.log_llm_call(model="m", messages=talk, response=f"answer {day}")
            talk.append({"role": "assistant", "content": f"answer {day}"})
            talk.append({"role": "user", "content": f"Day {day}"})
        trajectory.end()
        calls = [step["llm_calls"][0] for step in sent(site, recording)["steps"]]  # type: ignore[attr-defined]  # JSON

    assert [message["content"] for message in calls[0]["messages"]] == ["Trade.", "Day 1"]
    assert [call.get("prompt_ref") for call in calls[1:]] == [
        {"call": 0, "append": [{"role": "user", "content": "Day 2"}]},
        {"call": 1, "append": [{"role": "user", "content": "Day 3"}]},
    ]
    assert all("messages" not in call for call in calls[1:])


def test_an_answer_of_tool_calls_alone_goes_on_whether_its_content_is_empty_or_none() -> None:
    site = Site()
    asks: JSON = {"id": "c1", "type": "function", "function": {"name": "news", "arguments": "{}"}}
    talk: list[JSON] = [{"role": "user", "content": "Now?"}]
    result: JSON = {"role": "tool", "tool_call_id": "c1", "content": "good"}
    with recorder(site) as recording:
        with recording.start_trajectory() as trajectory:
            with trajectory.start_step() as step:
                step.log_llm_call(messages=talk, response="", tool_calls=[asks])
            with trajectory.start_step() as step:
                talk += [{"role": "assistant", "content": None, "tool_calls": [asks]}, result]
                step.log_llm_call(messages=talk, response="BUY")
        assert recording.flush(10)
    steps = site.only()["steps"]
    assert isinstance(steps, list)
    assert steps[1]["llm_calls"][0]["prompt_ref"] == {"call": 0, "append": [result]}


def test_a_conversation_that_was_rewritten_is_sent_whole() -> None:
    site = Site()
    with recorder(site) as recording:
        trajectory = recording.start_trajectory()
        step = trajectory.start_step()
        step.log_llm_call(messages=[{"role": "user", "content": "a"}], response="b", reasoning="because")
        said = {"role": "assistant", "content": "b"}  # without its reasoning: another prompt than the site would build
        step.log_llm_call(messages=[{"role": "user", "content": "a"}, said, {"role": "user", "content": "c"}])
        trajectory.end()
        calls = sent(site, recording)["steps"][0]["llm_calls"]  # type: ignore[index]  # JSON

    assert "prompt_ref" not in calls[1]
    assert calls[1]["messages"][1] == said


def test_what_the_agent_changes_afterwards_is_recorded_as_it_was() -> None:
    site = Site()
    state: JSON = {"holdings": [1]}
    with recorder(site) as recording:
        trajectory = recording.start_trajectory()
        step = trajectory.start_step(state)
        state["holdings"].append(2)  # type: ignore[attr-defined]  # a list
        step.complete()
        trajectory.end()
        assert sent(site, recording)["steps"][0]["environment_state"] == {"holdings": [1]}  # type: ignore[index]  # JSON


@dataclass
class Completion:
    """Like the object of the OpenAI client."""

    body: JSON

    def model_dump(self) -> JSON:
        return self.body


ANSWER: JSON = {
    "id": "chatcmpl-1",
    "model": "trader-v1.0.3",
    "choices": [
        {
            "index": 0,
            "finish_reason": "tool_calls",
            "message": {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "audio": None,
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "news", "arguments": "{}"}}],
                "annotations": [{"type": "note"}],
            },
            "logprobs": {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.25}]},
            "token_ids": [5, 6],
        }
    ],
    "prompt_token_ids": [1, 2, 3],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}


@pytest.mark.parametrize("response", [ANSWER, Completion(ANSWER)], ids=["mapping", "object"])
def test_a_completion_in_openais_form_is_read(response: object) -> None:
    site = Site()
    tools = [{"type": "function", "function": {"name": "news"}}]
    request: JSON = {
        "model": "trader-v1.0.3",
        "messages": [{"role": "user", "content": "Now?"}],
        "temperature": 0.7,
        "max_tokens": 64,
        "tools": tools,
        "parallel_tool_calls": False,
        "extra_body": {"top_k": 20, "return_token_ids": True},
        "extra_headers": {"Authorization": "Bearer secret"},
    }
    with recorder(site) as recording:
        trajectory = recording.start_trajectory(tools=tools)
        step = trajectory.start_step()
        step.log_completion(request, response, latency_ms=8.0, logprobs_mode="processed")
        trajectory.end()
        found = sent(site, recording)["steps"][0]["llm_calls"]  # type: ignore[index]  # JSON

    assert found == [
        {
            "model": "trader-v1.0.3",
            "messages": [{"role": "user", "content": "Now?"}],
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "news", "arguments": "{}"}}],
            "finish_reason": "tool_calls",
            "temperature": 0.7,
            "top_k": 20,
            "max_tokens": 64,
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "prompt_token_ids": [1, 2, 3],
            "token_ids": [5, 6],
            "logprobs": [-0.5, -1.25],
            "latency_ms": 8.0,
            "logprobs_mode": "processed",
            "extra": {
                "message": {"annotations": [{"type": "note"}]},
                "request": {"parallel_tool_calls": False, "return_token_ids": True},
            },
        }
    ]
    assert b"secret" not in site.requests[0].content


def test_an_exception_ends_the_trajectory_as_agent_error_and_goes_on_to_the_agent() -> None:
    site = Site()
    with recorder(site) as recording:
        with pytest.raises(KeyError):
            with recording.start_trajectory() as trajectory, trajectory.start_step():
                raise KeyError("price")
        found = sent(site, recording)
    assert (found["final_status"], found["stop_reason"]) == ("agent_error", "KeyError: 'price'")
    assert found["steps"][0]["action"] == {"error": "KeyError: 'price'"}  # type: ignore[index]  # JSON


def test_async_agents_use_the_same_objects() -> None:
    site = Site()

    async def play(recording: Recorder, name: str) -> None:
        async with recording.start_trajectory(name) as trajectory:
            async with trajectory.start_step() as step:
                await asyncio.sleep(0)
                step.complete("WAIT")

    async def main() -> None:
        async with recorder(site) as recording:
            await asyncio.gather(*(play(recording, f"agent-{n}") for n in range(5)))
            with pytest.raises(asyncio.CancelledError):
                async with recording.start_trajectory("cancelled"):
                    raise asyncio.CancelledError
            assert await recording.aflush(10)

    asyncio.run(main())
    found = {json.loads(raw)["agent_id"]: json.loads(raw)["final_status"] for raw in site.taken.values()}
    assert found == {**{f"agent-{n}": "completed" for n in range(5)}, "cancelled": "cancelled"}


def test_steps_of_several_threads_are_all_there() -> None:
    site = Site()
    with recorder(site) as recording:
        trajectory = recording.start_trajectory()

        def act() -> None:
            for _ in range(50):
                step = trajectory.start_step()
                step.complete("ACT")

        threads = [threading.Thread(target=act) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        trajectory.end()
        assert len(sent(site, recording)["steps"]) == 200  # type: ignore[arg-type]  # JSON
        assert recording.counts.faults == 0


def test_what_json_cannot_say_is_changed_and_said_so() -> None:
    site = Site()

    class Odd:
        def __str__(self) -> str:
            return "odd"

    state = {"nan": float("nan"), "text": "a\ud800b", "set": {2, 1}, "odd": Odd(), "inner": {5: b"\xff"}}
    with recorder(site) as recording:
        trajectory = recording.start_trajectory()
        step = trajectory.start_step(state)
        step.complete(reward=float("inf"))
        trajectory.end(reward=float("nan"))
        found = sent(site, recording)

    assert "reward" not in found or found["reward"] is None
    step_found = found["steps"][0]  # type: ignore[index]  # JSON
    assert step_found["environment_state"] == {
        "nan": None,
        "text": "a\ufffdb",
        "set": [1, 2],
        "odd": "odd",
        "inner": {"5": "/w=="},
    }
    assert "reward" not in step_found
    changed = found["extra"]["recorder"]["changed"]  # type: ignore[index]  # JSON
    assert "/steps/0/state/nan was nan, recorded as unknown" in changed
    assert "/reward was nan, recorded as unknown" in changed


def test_misuse_and_faults_never_reach_the_agent_and_are_counted() -> None:
    site = Site()

    class Broken:
        def model_dump(self) -> JSON:
            raise RuntimeError("no")

    with recorder(site) as recording:
        trajectory = recording.start_trajectory("careful", metadata={"bad": Broken(), "good": 1})
        step = trajectory.start_step()
        step.log_completion({}, "no completion")
        step.log_llm_call(modell="typo")  # type: ignore[call-arg]  # what is tested
        step.complete()
        step.log_provider_access("late")
        trajectory.end()
        trajectory.end("agent_error")  # changes nothing
        trajectory.start_step().complete()
        assert recording.flush(10)
        assert recording.counts.faults == 4
    found = site.only()
    assert (found["agent_id"], found["final_status"]) == ("careful", "completed")
    assert found["metadata"] == {"bad": None, "good": 1}


def test_a_recorder_that_is_switched_off_needs_no_address_and_sends_nothing() -> None:
    with Recorder(enabled=False) as recording, recording.start_trajectory() as trajectory:
        trajectory.start_step().complete("ACT")
    assert recording.counts.recorded == 0


def test_a_missing_address_or_key_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRAININGSITE_URL", raising=False)
    monkeypatch.delenv("TRAININGSITE_API_KEY", raising=False)
    with pytest.raises(ValueError, match="TRAININGSITE_URL"):
        Recorder()
    with pytest.raises(ValueError, match="create_api_key"):
        Recorder("http://site")
