"""Conversations from payloads: prompts resolved, calls found again, texts stored once."""

import json
import random

import pytest

from tests import builders
from tests.trajectories import recordings
from trajectories import census, formats, ingestion, payloads, quality, segments, transcripts
from trajectories.models import Trajectory
from trajectories.payloads import LlmCallPayload, Message, TrajectoryPayload


def read(body: recordings.Body, name: str = "native") -> TrajectoryPayload:
    return formats.incoming(json.dumps(body).encode(), name).payload


def assess(payload: TrajectoryPayload) -> quality.Assessment:
    return quality.assess(census.of(payload), payload.final_status)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def with_calls(*calls: recordings.Body) -> TrajectoryPayload:
    return read(recordings.native(steps=[{"llm_calls": [call]} for call in calls]))


def test_a_growing_conversation_is_one_history_however_it_was_sent() -> None:
    whole = with_calls(
        {"messages": [user("a")], "response": "b"},
        {"messages": [user("a"), said("b"), user("c")], "response": "d"},
    )
    referring = with_calls(
        {"messages": [user("a")], "response": "b"},
        {"prompt_ref": {"call": 0, "append": [user("c")]}, "response": "d"},
    )
    chat = read(recordings.chat(messages=[user("a"), said("b"), user("c"), said("d")]), "messages")

    for payload in (whole, referring, chat):
        (history,) = transcripts.histories(payload)
        assert history.messages == [user("a"), said("b"), user("c"), said("d")]
        assert [call.at for call in history.calls] == [1, 3]
        assert transcripts.prompts(payload)[1] == (user("a"), said("b"), user("c"))


def test_a_branch_is_a_history_of_its_own_in_which_earlier_answers_are_context() -> None:
    payload = with_calls(
        {"messages": [user("a")], "response": "b"},
        {"prompt_ref": {"call": 0, "append": [user("c")]}, "response": "d"},
        {"prompt_ref": {"call": 0, "append": [user("x")]}, "response": "y"},
        {"messages": [user("a")], "response": "z"},
    )

    first, second, third = transcripts.histories(payload)
    assert [call.position for call in first.calls] == [0, 1]
    assert (second.messages, [call.at for call in second.calls]) == ([user("a"), said("b"), user("x"), said("y")], [3])
    assert third.messages == [user("a"), said("z")]


def test_system_and_user_prompts_are_two_messages() -> None:
    payload = with_calls({"system_prompt": "s", "user_prompt": "u", "response": "r"})

    assert transcripts.histories(payload)[0].messages == [{"role": "system", "content": "s"}, user("u"), said("r")]
    assert quality.fidelity(census.of(payload))[0] == "text"


def test_a_call_that_failed_leaves_no_answer() -> None:
    payload = with_calls({"messages": [user("a")], "error": "timeout"}, {"messages": [user("a")], "response": "b"})

    (history,) = transcripts.histories(payload)
    assert history.messages == [user("a"), said("b")]
    assert [call.position for call in history.calls] == [1]


def test_weight_0_makes_context_and_several_histories_stay_apart() -> None:
    payload = read(
        recordings.chat(
            messages=None,
            histories=[
                [user("a"), {**said("few-shot"), "weight": 0}, user("b"), said("c"), user("thanks")],
                [user("x"), said("y"), user("bye")],
            ],
            completions=[None, {"token_ids": [1], "logprobs": [-1.0]}],
        ),
        "messages",
    )

    first, second = transcripts.histories(payload)
    assert [call.trainable for call in first.calls] == [False, True]
    assert first.calls[1].token_ids == [1]
    assert first.messages[-1] == user("thanks")
    assert first.messages[1] == said("few-shot")
    assert second.messages == [user("x"), said("y"), user("bye")]
    assert payload.closing_messages == (user("bye"),)


def test_tool_calls_as_json_text_and_arguments_as_objects_become_openais() -> None:
    asked = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    for sent in ([asked], [json.dumps(asked)], json.dumps([asked])):
        payload = read(
            recordings.chat(
                messages=[
                    user("a"),
                    {"role": "assistant", "content": None, "tool_calls": sent},
                    {"role": "tool", "content": "3"},
                ]
            ),
            "messages",
        )
        message = transcripts.histories(payload)[0].messages[1]
        assert message["tool_calls"] == [{**asked, "function": {"name": "f", "arguments": '{"x":1}'}}]
        action = payload.steps[0].action
        assert action is not None
        assert (action.action_type, action.calls[0].result) == ("f", "3")


def test_results_find_their_calls_though_ids_repeat_and_come_out_of_order() -> None:
    def ask(*ids: str) -> Message:
        calls = [{"id": one, "function": {"name": "f", "arguments": "{}"}} for one in ids]
        return {"role": "assistant", "content": None, "tool_calls": calls}

    def result(of: str, text: str) -> Message:
        return {"role": "tool", "tool_call_id": of, "content": text}

    payload = read(
        recordings.chat(
            messages=[
                user("go"),
                ask("a", "a", "b"),
                result("b", "3"),
                result("a", "1"),
                result("zzz", "?"),
                ask("a"),
                result("a", "4"),
            ]
        ),
        "messages",
    )

    first, second = (step.action for step in payload.steps)
    assert first is not None
    assert second is not None
    assert [one.result for one in first.calls] == ["1", None, "3"]
    assert [one.result for one in second.calls] == ["4"]


def test_images_are_not_trainable() -> None:
    picture: Message = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}],
    }
    payload = with_calls({"messages": [picture], "response": "a cat"})

    assert [call.trainable for call in transcripts.histories(payload)[0].calls] == [False]
    assert "images" in str(assess(payload).findings)


def test_quality_leaves_out_what_does_not_apply() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    whole = assess(read(recordings.native(tools=tools)))
    assert (whole.quality, whole.findings) == (1.0, ())

    assert assess(read(recordings.native(steps=[]))).quality < 0.5
    cut = assess(read(recordings.native(final_status="truncated_steps")))
    assert [one.check for one in cut.findings] == ["not_truncated"]
    assert 0.5 < cut.quality < 1


WORDS = ("", "BUY", "ACME rises", "ا ل س و ق", "line\r\n\x1b[31mred\x0c", "nul\x00nul", "😀" * 5, "x" * 3000)


def random_payload(seed: int) -> recordings.Body:
    """A trajectory with whole prompts, references, branches, tools, token ids and odd texts."""
    pick = random.Random(seed)
    system: Message = {"role": "system", "content": pick.choice(WORDS) + "s" * pick.choice((0, 900))}
    tools = [{"type": "function", "function": {"name": "f", "description": "d" * pick.choice((1, 900))}}]
    steps: list[recordings.Body] = []
    prompt = [system]
    position = 0
    for _ in range(pick.randrange(1, 12)):
        calls = []
        for _ in range(pick.randrange(0, 3)):
            prompt = [*prompt, user(pick.choice(WORDS))] if pick.random() < 0.8 else [system, user(pick.choice(WORDS))]
            call: recordings.Body = {"response": pick.choice(WORDS), "tools": pick.choice((None, tools, [{"t": 1}]))}
            if position and pick.random() < 0.3:
                call["prompt_ref"] = {"call": pick.randrange(position), "append": [user(pick.choice(WORDS))]}
            elif pick.random() < 0.2:
                call["system_prompt"], call["user_prompt"] = system["content"], pick.choice(WORDS)
            else:
                call["messages"] = prompt
            if pick.random() < 0.3:
                call["token_ids"], call["logprobs"] = [1, 2], [-0.0, None]
            if pick.random() < 0.3:
                call["odd"] = {"deep": [None, 1.5, {"a": pick.choice(WORDS)}]}
            calls.append(call)
            position += 1
            prompt = [*prompt, said(str(call["response"]))]
        steps.append(
            {
                "llm_calls": calls,
                "environment_state": {"n": pick.random(), "big": 2**60},
                "reward": pick.choice((None, 0.0, -100.0)),
            }
        )
    return recordings.native(
        f"random-{seed}", steps=steps, tools=pick.choice((None, tools)), metadata={"w": pick.choice(WORDS)}, reward=1.0
    )


@pytest.mark.django_db
def test_whatever_was_sent_is_read_back_and_each_text_is_stored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    project = builders.make_project()
    for seed in range(60):
        if seed == 30:
            monkeypatch.setattr(segments, "SEGMENT_BYTES", 2_000)  # from here on in many segments
        sent = formats.incoming(json.dumps(random_payload(seed)).encode())
        ingestion.record(project, sent)
        row = Trajectory.objects.get(trajectory_id=f"random-{seed}")

        loaded = segments.load(row)

        for field in sent.payload.__struct_fields__:
            assert getattr(loaded, field) == getattr(sent.payload, field), (seed, field)
        assert transcripts.prompts(loaded) == transcripts.prompts(sent.payload)
        assert payloads.canonical(
            TrajectoryPayload(**{name: getattr(loaded, name) for name in TrajectoryPayload.__struct_fields__})
        ) == payloads.canonical(sent.payload)


@pytest.mark.django_db
def test_a_page_of_a_long_run_opens_one_segment() -> None:
    project = builders.make_project()
    steps = [
        {"environment_state": {"tick": number, "noise": str(random.Random(number).random()) * 100},
         "llm_calls": [recordings.call(messages=[{"role": "system", "content": "s" * 1000}, user(f"tick {number}")])]}
        for number in range(1810)
    ]  # fmt: skip
    ingestion.record(project, formats.incoming(json.dumps(recordings.native("long", steps=steps)).encode()))
    row = Trajectory.objects.get()

    parts = list(row.segments.order_by("seq"))
    assert len(parts) > 5
    assert max(part.raw_size for part in parts) <= segments.SEGMENT_BYTES + 10_000
    middle = parts[3]
    shown = segments.part(row, middle.first_step, middle.last_step + 1)
    assert [step.environment_state["tick"] for step in shown.steps if step.environment_state] == list(
        range(middle.first_step, middle.last_step + 1)
    )


def test_an_answer_is_told_apart_from_none() -> None:
    assert transcripts.answer_of(LlmCallPayload(response="x")) == said("x")
    assert transcripts.answer_of(LlmCallPayload(error="gone")) is None
