"""A plain conversation is read and stored by a short cut; nothing of it may differ from the long way."""

import json
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from tests import builders
from tests.trajectories import recordings
from trajectories import census, formats, ingestion, payloads, segments
from trajectories.formats import chat, messages
from trajectories.formats.incoming import Incoming
from trajectories.models import SharedText, Trajectory

words = some.text(max_size=30) | some.just("x" * 500)
tool_calls = some.lists(
    some.fixed_dictionaries(
        {"function": some.fixed_dictionaries({"name": words, "arguments": words})},
        optional={"id": some.sampled_from(["a", "b", ""]), "type": some.just("function")},
    ),
    max_size=3,
)
message = some.fixed_dictionaries(
    {"role": some.sampled_from(["system", "developer", "user", "assistant", "assistant", "tool", "critic"])},
    optional={
        "content": words | some.none(),
        "name": words | some.none(),
        "tool_calls": tool_calls | some.none(),
        "tool_call_id": some.sampled_from(["a", "b", "c"]),
        "refusal": some.none(),
        "function_call": some.none(),
        "weight": some.sampled_from([0, 1]),
    },
)
body = some.fixed_dictionaries(
    {"trajectory_id": some.just("run"), "agent_id": some.just("agent"), "messages": some.lists(message, max_size=8)},
    optional={
        "model": words | some.none(),
        "tools": some.lists(some.fixed_dictionaries({"type": words}), max_size=2),
        "reward": some.floats(-1, 1),
        "metadata": some.dictionaries(words, words, max_size=2),
        "judgments": some.just([1]),
        "agentRole": some.just("x"),
        "final_status": some.sampled_from(["completed", "timeout"]),
    },
)


def the_long_way(raw: bytes) -> Incoming:
    return messages._incoming(payloads.decode(raw, messages.MessagesPayload))


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(body)
def test_it_is_what_the_long_way_makes_of_it(sent: recordings.Body) -> None:
    raw = json.dumps(sent).encode()

    short, long = formats.incoming(raw, "messages"), the_long_way(raw)

    assert short.canonical == long.canonical
    assert payloads.canonical(short.payload) == payloads.canonical(long.payload)
    if short.chat is not None:
        assert census.of_chat(short.chat.sent) == census.of(long.payload)
        packed = segments.pack_chat(short.chat, 0, (), key=b"k")
        stored = msgspec.json.decode(packed.pieces[0].raw, type=segments.StoredSegment).chat
        assert stored is not None
        read = segments._of_chat(stored, [text.raw for text in packed.texts])
        bare = msgspec.structs.replace(long.payload, reward=None, reward_components={})
        assert payloads.canonical(read) == payloads.canonical(bare)


def with_parts(sent: recordings.Body) -> None:
    said = sent["messages"]
    assert isinstance(said, list)
    said[0]["content"] = [{"type": "text", "text": "parts"}]


def with_an_unknown_field(sent: recordings.Body) -> None:
    said = sent["messages"]
    assert isinstance(said, list)
    said[0]["cache_control"] = {"type": "ephemeral"}


def with_completions(sent: recordings.Body) -> None:
    sent["completions"] = [{"token_ids": [1], "logprobs": [-0.5], "prompt_token_ids": [2]}]


def running(sent: recordings.Body) -> None:
    sent["final_status"] = "running"


def as_it_is(sent: recordings.Body) -> None:
    pass


@pytest.mark.parametrize("change", [with_parts, with_an_unknown_field, with_completions, running])
def test_whatever_is_not_plain_goes_the_long_way(change: Callable[[recordings.Body], None]) -> None:
    plain, other = recordings.chat("run"), recordings.chat("run")
    change(other)

    assert formats.incoming(json.dumps(plain).encode(), "messages").chat is not None
    assert formats.incoming(json.dumps(other).encode(), "messages").chat is None


@pytest.mark.django_db
def test_sent_again_after_rules_came_it_is_a_replay() -> None:
    """Rules send it the long way: the identity must be the same."""
    project = builders.make_project()
    raw = json.dumps(recordings.chat("run")).encode()
    assert ingestion.record(project, formats.incoming(raw, "messages")).outcome == "created"
    project.redaction_rules = [{"name": "secrets", "pattern": "BUY"}]
    project.save()

    assert ingestion.record(project, formats.incoming(raw, "messages")).outcome == "replay"


@pytest.mark.django_db
def test_a_system_prompt_is_stored_once_whichever_way_it_came() -> None:
    project = builders.make_project()
    system = {"role": "system", "content": "Rules of the house. " * 50}
    plain = {**recordings.chat("a"), "messages": [system, {"role": "assistant", "content": "yes"}]}
    parts = {**plain, "trajectory_id": "b", "metadata": {}, "histories": [plain["messages"]], "messages": None}
    for sent in (plain, parts):
        ingestion.record(project, formats.incoming(json.dumps(sent).encode(), "messages"))

    assert SharedText.objects.count() == 1
    a, b = Trajectory.objects.order_by("trajectory_id")
    assert segments.load(a).steps == segments.load(b).steps
    assert len(system["content"]) > chat.SHARED_BYTES
