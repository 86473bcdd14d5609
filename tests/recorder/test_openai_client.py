"""A wrapped OpenAI client behaves as before, and what it is asked is recorded."""

import asyncio
import json
import threading
from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam
from openai.types.chat import ChatCompletionToolUnionParam as Tool
from pydantic import BaseModel

from recorder import Recorder
from tests.gateway.backend import Backend, Reply
from tests.recorder.site import Site, recorder

JSON = dict[str, object]

QUESTION: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Answer BUY or SELL."},
    {"role": "user", "content": "Profits are up."},
]
NEWS: list[Tool] = [{"type": "function", "function": {"name": "news", "parameters": {"type": "object"}}}]
ASKS_FOR_NEWS: list[JSON] = [{"id": "c1", "type": "function", "function": {"name": "news", "arguments": '{"n": 1}'}}]


class Answer(BaseModel):  # type: ignore[explicit-any]  # in pydantic
    word: str


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend()
    yield backend
    backend.close()


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.fixture
def recording(site: Site) -> Iterator[Recorder]:
    with recorder(site) as recording:
        yield recording


def openai_client(backend: Backend, retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{backend.url}/v1", api_key="sk-secret", max_retries=retries)


def async_client(backend: Backend) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{backend.url}/v1", api_key="sk-secret", max_retries=0)


def calls(recording: Recorder, site: Site) -> list[JSON]:
    """Of the only trajectory, in their order."""
    assert recording.flush(10)
    assert recording.counts.faults == 0
    steps = site.only()["steps"]
    assert isinstance(steps, list)
    return [call for step in steps for call in step.get("llm_calls", [])]


def test_the_client_is_the_same_and_its_answers_too(backend: Backend, recording: Recorder, site: Site) -> None:
    plain = openai_client(backend)
    client = recording.wrap(plain)
    assert client is plain
    assert recording.wrap(client) is plain  # twice is as once
    with recording.start_trajectory():
        answer = client.chat.completions.create(
            model="tiny", messages=QUESTION, temperature=0.5, max_tokens=9, extra_body={"return_token_ids": True},
            logprobs=True, extra_headers={"X-Secret": "hidden"},
        )  # fmt: skip
    assert type(answer) is ChatCompletion
    assert answer.choices[0].message.content == "Buy on good news."
    assert "hidden" in backend.asked[0].headers.values()

    [call] = calls(recording, site)
    assert call.pop("latency_ms", 0) > 0  # type: ignore[operator]  # JSON
    assert call == {
        "model": "tiny",
        "messages": QUESTION,
        "response": "Buy on good news.",
        "finish_reason": "stop",
        "temperature": 0.5,
        "max_tokens": 9,
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "prompt_token_ids": [1, 2, 3, 4, 5, 6, 7],
        "token_ids": [100, 101, 102, 103, 104],
        "logprobs": [-0.25, -0.5, -0.75, -1.0, -1.25],
        "extra": {"request": {"logprobs": True, "return_token_ids": True}},
    }
    sent = b"".join(request.content for request in site.requests)
    assert b"secret" not in sent and b"hidden" not in sent


def test_a_stream_comes_chunk_by_chunk_and_is_recorded_whole(backend: Backend, recording: Recorder, site: Site) -> None:
    gate = threading.Event()
    backend.replies = [Reply(gates={3: gate})]
    client = recording.wrap(openai_client(backend))
    words: list[str] = []
    with recording.start_trajectory():
        stream = client.chat.completions.create(
            model="tiny", messages=QUESTION, stream=True, logprobs=True, stream_options={"include_usage": True},
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        assert type(stream) is openai.Stream
        for chunk in stream:
            assert type(chunk) is ChatCompletionChunk
            words.append(chunk.choices[0].delta.content or "" if chunk.choices else "")
            if "".join(words) == "Buy on good":
                gate.set()  # the fourth word is not written before the third was received
    assert "".join(words) == "Buy on good news."

    [call] = calls(recording, site)
    assert (call["response"], call["finish_reason"], call["model"]) == ("Buy on good news.", "stop", "tiny")
    assert (call["prompt_tokens"], call["completion_tokens"]) == (7, 5)
    assert call["prompt_token_ids"] == [1, 2, 3, 4, 5, 6, 7]
    assert call["token_ids"] == [100, 101, 102, 103, 104]
    assert call["logprobs"] == [-0.25, -0.5, -0.75, -1.0, -1.25]
    assert 0 < call["first_token_ms"] <= call["latency_ms"]  # type: ignore[operator]  # JSON
    assert "error" not in call


def test_tool_calls_are_recorded_streamed_or_not(backend: Backend, recording: Recorder, site: Site) -> None:
    backend.replies = [Reply(words=[], tool_calls=ASKS_FOR_NEWS)]
    client = recording.wrap(openai_client(backend))
    with recording.start_trajectory():
        client.chat.completions.create(model="tiny", messages=QUESTION, tools=NEWS)
        for _ in client.chat.completions.create(model="tiny", messages=QUESTION, tools=NEWS, stream=True):
            continue
    for call in calls(recording, site):
        assert call["tool_calls"] == ASKS_FOR_NEWS
        assert call["tools"] == NEWS
        assert call["finish_reason"] == "tool_calls"


def test_an_answer_that_is_left_is_recorded_as_far_as_it_was_read(
    backend: Backend, recording: Recorder, site: Site
) -> None:
    client = recording.wrap(openai_client(backend))
    with recording.start_trajectory() as trajectory:
        with trajectory.start_step():
            with client.chat.completions.create(model="tiny", messages=QUESTION, stream=True) as stream:
                for chunk in stream:
                    if chunk.choices[0].delta.content == " on":
                        break
        with trajectory.start_step():
            kept = client.chat.completions.create(model="tiny", messages=QUESTION, stream=True)
            next(kept)  # and neither read on nor closed before the step is over
    left, unread = calls(recording, site)
    assert str(left["response"]).startswith("Buy on")
    assert (left["error"], unread["error"]) == ("the answer was not read to its end",) * 2
    assert unread["messages"] == QUESTION
    kept.close()


def test_a_connection_that_breaks_raises_as_before_and_is_recorded(
    backend: Backend, recording: Recorder, site: Site
) -> None:
    backend.replies = [Reply(break_off_at=2)]
    client = recording.wrap(openai_client(backend))
    with recording.start_trajectory():
        with pytest.raises(openai.APIConnectionError):
            for _ in client.chat.completions.create(model="tiny", messages=QUESTION, stream=True):
                continue
    [call] = calls(recording, site)
    assert call["response"] == "Buy on"
    assert "ProtocolError" in str(call["error"])


def test_an_error_is_recorded_once_whatever_the_client_tries_and_raised_as_it_is(
    backend: Backend, recording: Recorder, site: Site
) -> None:
    body = json.dumps({"error": {"message": "too many", "type": "rate_limit"}}).encode()
    backend.replies = [Reply(status=429, raw=body, headers={"Retry-After": "0"})]
    client = recording.wrap(openai_client(backend, retries=1))
    with recording.start_trajectory():
        with pytest.raises(openai.RateLimitError, match="too many"):
            client.chat.completions.create(model="tiny", messages=QUESTION)
    assert len(backend.asked) == 2
    [call] = calls(recording, site)
    assert str(call["error"]).startswith("RateLimitError: Error code: 429")
    assert call["messages"] == QUESTION


def test_raw_and_streaming_responses_parse_and_beta_are_recorded(
    backend: Backend, recording: Recorder, site: Site
) -> None:
    backend.replies = [Reply(words=['{"word": ', '"BUY"}'])]
    plain = openai_client(backend)
    _ = plain.chat.completions.with_raw_response.create  # looked at before it was wrapped
    client = recording.wrap(plain)
    with recording.start_trajectory():
        raw = client.chat.completions.with_raw_response.create(model="tiny", messages=QUESTION)
        assert raw.headers["content-type"] == "application/json"
        assert raw.parse().choices[0].message.content == '{"word": "BUY"}'
        with client.chat.completions.with_streaming_response.create(model="tiny", messages=QUESTION) as slow:
            assert "chatcmpl-1" in "".join(slow.iter_lines())
        with client.chat.completions.with_streaming_response.create(
            model="tiny", messages=QUESTION, stream=True
        ) as lines:
            assert sum(line.startswith("data:") for line in lines.iter_lines()) == 5
        parsed = client.chat.completions.parse(model="tiny", messages=QUESTION, response_format=Answer)
        assert parsed.choices[0].message.parsed == Answer(word="BUY")
        beta = client.beta.chat.completions.parse(model="tiny", messages=QUESTION, response_format=Answer)
        assert beta.choices[0].message.parsed == Answer(word="BUY")
        with client.chat.completions.stream(model="tiny", messages=QUESTION, response_format=Answer) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == Answer(word="BUY")
        client.with_options(timeout=20).chat.completions.create(model="tiny", messages=QUESTION)
        client.with_raw_response.chat.completions.create(model="tiny", messages=QUESTION)
    found = calls(recording, site)
    assert [call["response"] for call in found] == ['{"word": "BUY"}'] * 8
    assert [call["finish_reason"] for call in found] == ["stop"] * 8
    assert not any("error" in call for call in found)


def test_a_growing_conversation_of_the_clients_own_messages_costs_its_new_words_only(
    backend: Backend, recording: Recorder, site: Site
) -> None:
    backend.replies = [Reply(words=[], tool_calls=ASKS_FOR_NEWS), Reply()]
    client = recording.wrap(openai_client(backend))
    talk = list(QUESTION)
    with recording.start_trajectory():
        answer = client.chat.completions.create(model="tiny", messages=talk, tools=NEWS)
        talk.append(answer.choices[0].message)  # type: ignore[arg-type]  # as the client's own examples do
        talk.append({"role": "tool", "tool_call_id": "c1", "content": "Up."})
        client.chat.completions.create(model="tiny", messages=talk, tools=NEWS)
    second = calls(recording, site)[1]
    assert second["prompt_ref"] == {
        "call": 0,
        "append": [{"role": "tool", "tool_call_id": "c1", "content": "Up."}],
    }


def test_a_call_outside_of_all_trajectories_is_one_of_its_own(
    backend: Backend, recording: Recorder, site: Site
) -> None:
    client = recording.wrap(openai_client(backend))
    client.chat.completions.create(model="tiny", messages=QUESTION)
    for _ in client.chat.completions.create(model="tiny", messages=QUESTION, stream=True):
        continue
    silent = recording.wrap(openai_client(backend), outside=False)
    silent.chat.completions.create(model="tiny", messages=QUESTION)
    assert recording.flush(10)
    assert len(site.taken) == 2
    for trajectory_id in site.taken:
        found = site.trajectory(trajectory_id)
        assert found["final_status"] == "completed"
        assert found["steps"][0]["llm_calls"][0]["response"] == "Buy on good news."  # type: ignore[index]  # JSON


def test_async_calls_of_parallel_trajectories_keep_apart(backend: Backend, recording: Recorder, site: Site) -> None:
    async def play(client: openai.AsyncOpenAI, name: str) -> None:
        async with recording.start_trajectory(name):
            for turn in range(3):
                said = f"{name} {turn}"
                answer = await client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": said}]
                )
                assert type(answer) is ChatCompletion
                stream = await client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": f"{said} streamed"}], stream=True
                )
                assert type(stream) is openai.AsyncStream
                assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Buy on good news."

    async def main() -> None:
        async with recording.wrap(async_client(backend)) as client:
            await asyncio.gather(*(play(client, f"agent-{n}") for n in range(8)))
            async with recording.start_trajectory("raw"):
                raw = await client.chat.completions.with_raw_response.create(model="tiny", messages=QUESTION)
                assert raw.parse().choices[0].message.content == "Buy on good news."
                async with client.chat.completions.stream(model="tiny", messages=QUESTION) as stream:
                    assert (await stream.get_final_completion()).choices[0].message.content == "Buy on good news."
                parsing = client.beta.chat.completions.parse(model="tiny", messages=QUESTION)
                assert (await parsing).choices[0].finish_reason == "stop"

    asyncio.run(main())
    assert recording.flush(10)
    assert recording.counts.faults == 0
    found = {one["agent_id"]: one for one in map(site.trajectory, site.taken)}
    for n in range(8):
        steps = found[f"agent-{n}"]["steps"]
        assert isinstance(steps, list)
        asked = [step["llm_calls"][0]["messages"][0]["content"] for step in steps]
        assert asked == [f"agent-{n} {turn}{more}" for turn in range(3) for more in ("", " streamed")]
        assert {step["llm_calls"][0]["response"] for step in steps} == {"Buy on good news."}
    assert len(found["raw"]["steps"]) == 3  # type: ignore[arg-type]  # JSON


def test_a_task_that_is_cancelled_in_mid_answer_is_recorded_so(
    backend: Backend, recording: Recorder, site: Site
) -> None:
    gate = threading.Event()
    backend.replies = [Reply(gates={2: gate})]

    async def main() -> None:
        heard = asyncio.Event()

        async def listen() -> None:
            async with recording.start_trajectory():
                stream = await client.chat.completions.create(model="tiny", messages=QUESTION, stream=True)
                async for chunk in stream:
                    if chunk.choices[0].delta.content == " on":
                        heard.set()

        async with recording.wrap(async_client(backend)) as client:
            task = asyncio.create_task(listen())
            await heard.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    gate.set()
    [call] = calls(recording, site)
    assert (call["response"], call["error"]) == ("Buy on", "CancelledError")
    assert site.only()["final_status"] == "cancelled"


def test_clients_of_other_makers_with_the_same_shape_are_recorded(recording: Recorder, site: Site) -> None:
    class Completions:
        def create(self, **asked: object) -> object:
            answer: JSON = {"model": "m", "choices": [{"message": {"content": "BUY"}, "finish_reason": "stop"}]}
            piece: JSON = {"choices": [{"index": 0, "delta": {"content": "BUY"}, "finish_reason": "stop"}]}
            return iter([piece]) if asked.get("stream") else answer

    class Chat:
        completions = Completions()

    class Client:
        chat = Chat()

    client = recording.wrap(Client())
    with recording.start_trajectory():
        assert isinstance(client.chat.completions.create(model="m", messages=iter(QUESTION)), dict)
        assert len(list(client.chat.completions.create(model="m", messages=QUESTION, stream=True))) == 1  # type: ignore[call-overload]  # a stream
    found = calls(recording, site)
    assert [call["response"] for call in found] == ["BUY", "BUY"]
    assert found[0]["messages"] == QUESTION  # given as an iterator, and not used up


def test_a_fault_of_ours_costs_the_recording_and_never_the_call(
    backend: Backend, recording: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object) -> JSON:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("recorder.completions.call_of", broken)
    client = recording.wrap(openai_client(backend))
    with recording.start_trajectory():
        answer = client.chat.completions.create(model="tiny", messages=QUESTION)
        assert answer.choices[0].message.content == "Buy on good news."
        stream = client.chat.completions.create(model="tiny", messages=QUESTION, stream=True)
        assert len(list(stream)) == 7
    assert recording.counts.faults == 2
    assert recording.wrap(object()) is not None  # nothing to listen to


def test_a_recorder_that_is_switched_off_leaves_the_client_alone(backend: Backend) -> None:
    client = openai_client(backend)
    before = client.chat.completions.create
    assert Recorder(enabled=False).wrap(client).chat.completions.create == before
