"""Decorated functions behave as before, and what they do inside a trajectory is recorded."""

import asyncio
import inspect
import re
import threading
from collections.abc import AsyncIterator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest

from recorder import Recorder
from tests.recorder.site import Site, recorder

JSON = dict[str, object]


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.fixture
def recording(site: Site) -> Iterator[Recorder]:
    with recorder(site) as recording:
        yield recording


def steps(recording: Recorder, site: Site) -> list[JSON]:
    assert recording.flush(10)
    assert recording.counts.faults == 0
    return cast(list[JSON], site.only()["steps"])


def actions(recording: Recorder, site: Site) -> list[JSON]:
    """One of each step, without its time."""
    found = [cast(JSON, step["action"]) for step in steps(recording, site)]
    for one in found:
        assert one.pop("latency_ms", 0) >= 0  # type: ignore[operator]  # JSON
    return found


def test_an_action_is_recorded_with_arguments_result_and_time(recording: Recorder, site: Site) -> None:
    @recording.action
    def buy(stock: str, n: int = 1, *, limit: float | None = None) -> JSON:
        """Buys."""
        return {"filled": n}

    assert (buy.__name__, buy.__doc__) == ("buy", "Buys.")
    with recording.start_trajectory() as trajectory, trajectory.start_step():
        assert buy("ACME", limit=2.5) == {"filled": 1}
    [step] = steps(recording, site)
    action = cast(JSON, step["action"])
    assert action.pop("latency_ms", -1) >= 0  # type: ignore[operator]  # JSON
    assert action == {
        "action_type": "buy",
        "parameters": {"stock": "ACME", "limit": 2.5},
        "result": {"filled": 1},
        "success": True,
    }


def test_what_an_action_raises_is_recorded_and_raised_as_it_is(recording: Recorder, site: Site) -> None:
    fault = KeyError("ACME")

    @recording.action(name="SELL")
    def sell(stock: str) -> None:
        raise fault

    with recording.start_trajectory():
        with pytest.raises(KeyError) as caught:
            sell("ACME")
        assert caught.value is fault
    [action] = actions(recording, site)
    assert action == {
        "action_type": "SELL",
        "parameters": {"stock": "ACME"},
        "error": "KeyError: 'ACME'",
        "success": False,
    }
    assert site.only()["final_status"] == "completed"  # the agent went on


def test_coroutines_methods_and_static_methods(recording: Recorder, site: Site) -> None:
    class Desk:
        @recording.action
        async def wait(self, days: int) -> str:
            await asyncio.sleep(0)
            return f"{days} days"

        @recording.action
        @staticmethod
        def look(where: str) -> str:
            return where

        @recording.action
        async def fail(self) -> None:
            raise TimeoutError

    assert inspect.iscoroutinefunction(Desk.wait)

    async def main() -> None:
        async with recording.start_trajectory() as trajectory:
            async with trajectory.start_step():
                assert await Desk().wait(3) == "3 days"
            async with trajectory.start_step():
                assert Desk.look("news") == "news"
            async with trajectory.start_step():
                with pytest.raises(TimeoutError):
                    await Desk().fail()

    asyncio.run(main())
    found = actions(recording, site)
    assert [one.get("parameters") for one in found] == [{"days": 3}, {"where": "news"}, None]
    assert [one.get("result") for one in found] == ["3 days", "news", None]
    assert found[2]["error"] == "TimeoutError"


def test_generators_stay_lazy_and_take_what_is_sent_and_thrown(recording: Recorder, site: Site) -> None:
    seen: list[object] = []

    @recording.action
    def count(upto: int) -> Generator[int, str, str]:
        for n in range(upto):
            try:
                seen.append((yield n))
            except LookupError as exc:
                seen.append(str(exc))
        return "done"

    with recording.start_trajectory() as trajectory:
        with trajectory.start_step():
            counting = count(4)
            assert seen == []
            assert next(counting) == 0
            assert counting.send("a") == 1
            assert counting.throw(LookupError("b")) == 2
            assert next(counting) == 3
            with pytest.raises(StopIteration, match="done"):
                next(counting)
        with trajectory.start_step():
            left = count(9)
            assert [next(left), next(left)] == [0, 1]
            left.close()
    assert seen == ["a", "b", None, None, None]
    whole, cut = actions(recording, site)
    assert whole["result"] == {"items": [0, 1, 2, 3], "returned": "done"}
    assert cut["result"] == [0, 1]


def test_async_generators_too(recording: Recorder, site: Site) -> None:
    @recording.action
    async def read(n: int) -> AsyncIterator[str]:
        for at in range(n):
            await asyncio.sleep(0)
            yield f"line {at}"
        if n > 2:
            raise EOFError

    async def main() -> None:
        async with recording.start_trajectory() as trajectory:
            async with trajectory.start_step():
                assert [line async for line in read(2)] == ["line 0", "line 1"]
            async with trajectory.start_step():
                with pytest.raises(EOFError):
                    assert [line async for line in read(3)]

    asyncio.run(main())
    good, bad = actions(recording, site)
    assert good["result"] == ["line 0", "line 1"]
    assert (bad["result"], bad["error"]) == (["line 0", "line 1", "line 2"], "EOFError")


def test_several_actions_answer_the_tool_calls_of_their_step(recording: Recorder, site: Site) -> None:
    @recording.action
    def news(day: int) -> str:
        return f"news of {day}"

    asked = [
        {"id": f"c{n}", "type": "function", "function": {"name": "news", "arguments": f'{{"day": {n}}}'}}
        for n in (1, 2)
    ]
    with recording.start_trajectory() as trajectory:
        with trajectory.start_step() as step:
            step.log_llm_call(model="m", tool_calls=asked)
            for n in (1, 2):
                news(n)
        with trajectory.start_step() as step:
            step.log_llm_call(model="m", tool_calls=asked[:1])
            news(3)
    several, one = [cast(JSON, step["action"]) for step in steps(recording, site)]
    assert (several["action_type"], several["success"]) == ("tool_calls", True)
    calls = cast(list[JSON], several["calls"])
    assert [(call["tool_call_id"], call["parameters"], call["result"]) for call in calls] == [
        ("c1", {"day": 1}, "news of 1"),
        ("c2", {"day": 2}, "news of 2"),
    ]
    assert (one["action_type"], one["parameters"], one["success"]) == ("news", {"day": 3}, True)
    assert one["calls"] == [{"tool_call_id": "c1", "result": "news of 3"}]


def test_without_steps_of_the_agents_own_each_call_begins_one_and_takes_the_actions_that_follow(
    recording: Recorder, site: Site
) -> None:
    @recording.action
    def act(n: int) -> int:
        return n

    with recording.start_trajectory() as trajectory:
        act(0)  # before any call: a step by itself
        for n in (1, 2):
            trajectory.add_call({"model": "m", "response": f"say {n}"}, None, "2026-01-01T00:00:00+00:00")
            act(n)
    found = steps(recording, site)
    assert [len(cast(list[JSON], step.get("llm_calls", []))) for step in found] == [0, 1, 1]
    assert [cast(JSON, step["action"])["result"] for step in found] == [0, 1, 2]


def test_arguments_are_recorded_as_they_were_and_only_so_much_of_them(recording: Recorder, site: Site) -> None:
    @recording.action
    def grow(values: list[int], text: str) -> str:
        values.append(2)
        return text * 2

    with recording.start_trajectory():
        assert len(grow([1], "x" * 200_000)) == 400_000
    [action] = actions(recording, site)
    parameters = cast(JSON, action["parameters"])
    assert parameters["values"] == [1]
    assert str(parameters["text"]).endswith(" characters more)")
    assert len(str(action["result"])) < 70_000
    assert [re.sub(r"\d+ of", "N of", str(one)) for one in cast(list[str], action["changed"])] == [
        "/parameters/text was too long to record: N of 200000 characters are left out",
        "/action/result was too long to record: N of 400000 characters are left out",
    ]


def test_outside_of_a_trajectory_an_action_just_runs(recording: Recorder) -> None:
    @recording.action
    def act() -> str:
        return "done"

    assert act() == "done"
    with recording.start_trajectory() as trajectory:
        trajectory.end()
        assert act() == "done"
    assert recording.counts.faults == 0


def test_actions_of_parallel_threads_and_tasks_keep_to_their_own_trajectory(recording: Recorder, site: Site) -> None:
    @recording.action
    def act(name: str) -> str:
        return name

    @recording.action
    async def act_async(name: str) -> str:
        await asyncio.sleep(0)
        return name

    def play(name: str) -> None:
        with recording.start_trajectory(name):
            for _ in range(20):
                act(name)

    async def play_async(name: str) -> None:
        async with recording.start_trajectory(name):
            for _ in range(20):
                await act_async(name)

    async def main() -> None:
        await asyncio.gather(*(play_async(f"task-{n}") for n in range(10)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(play, [f"thread-{n}" for n in range(10)]))
    asyncio.run(main())
    assert recording.flush(10)
    assert len(site.taken) == 20
    for found in map(site.trajectory, site.taken):
        acted = [step["action"] for step in cast(list[dict[str, JSON]], found["steps"])]
        assert [one["result"] for one in acted] == [found["agent_id"]] * 20
        assert "parent_trajectory_id" not in found


def test_a_trajectory_inside_another_is_its_sub_agent(recording: Recorder, site: Site) -> None:
    with recording.start_trajectory("boss") as boss:
        with boss.start_step() as step:
            step.log_llm_call(model="m", response="ask the other")
            with recording.start_trajectory("worker") as worker:
                assert recording.current_trajectory is worker
                assert recording.current_step is None
            after = [recording.current_trajectory, recording.current_step]
        after.append(recording.current_step)
    after.append(recording.current_trajectory)
    assert after == [boss, step, None, None]
    assert recording.flush(10)
    found = site.trajectory(worker.trajectory_id)
    assert (found["parent_trajectory_id"], found["parent_call"]) == (boss.trajectory_id, 0)


def test_a_thread_of_an_agent_joins_its_trajectory(recording: Recorder, site: Site) -> None:
    @recording.action
    def act() -> None:
        return None

    with recording.start_trajectory() as trajectory:

        def work() -> None:
            act()  # a new thread inherits nothing
            with trajectory.use():
                act()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert recording.current_trajectory is trajectory
    assert len(actions(recording, site)) == 1


def test_two_recorders_do_not_mix() -> None:
    sites = [Site(), Site()]
    with recorder(sites[0]) as first, recorder(sites[1]) as second:

        @first.action
        def act() -> None:
            return None

        with first.start_trajectory("a"), second.start_trajectory("b"):
            act()
        assert first.flush(10) and second.flush(10)
    assert [len(cast(list[JSON], site.only()["steps"])) for site in sites] == [1, 0]
