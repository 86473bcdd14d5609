"""ART: trajectories, groups, Choice objects with tokens, parquet."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openai.types.chat.chat_completion import Choice

from tests.trajectories.formats import reading
from trajectories import formats
from trajectories.errors import Invalid
from trajectories.formats.incoming import Incoming

Item = dict[str, object]

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
TOKENS = {f"token_id:{100 + number}" for number in range(5)}  # spellings of what is kept as numbers
ASKED = [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]


def choice(text: str | None, tokens: int = 0, **message: object) -> Item:
    """As OpenAI's client gives it, with vLLM's token ids as tokens."""
    logprobs = {
        "content": [
            {"token": f"token_id:{100 + n}", "logprob": -0.5 * n, "bytes": [65], "top_logprobs": []}
            for n in range(tokens)
        ],
        "refusal": None,
    }
    return Choice.model_validate(
        {
            "finish_reason": "stop",
            "index": 0,
            "logprobs": logprobs if tokens else None,
            "message": {"role": "assistant", "content": text, **message},
        }
    ).model_dump()


def trajectory(reward: object = 0.5, **fields: object) -> Item:
    return {
        "messages_and_choices": [
            {"role": "system", "content": "Trade."},
            {"role": "user", "content": "ACME?"},
            choice(None, 2, tool_calls=ASKED),
            {"role": "tool", "tool_call_id": "c1", "content": "up"},
            choice("BUY", 3),
        ],
        "tools": TOOLS,
        "reward": reward,
        "metrics": {"won": True, "ruler_score": 0.9},
        "metadata": {"step": 4},
        "logs": ["a log line"],
        **fields,
    }


def group(*members: object, **fields: object) -> Item:
    return {"trajectories": list(members), **fields}


def both(value: object) -> list[Incoming]:
    found = reading.read(value, source="train.jsonl")
    assert all(isinstance(one, Incoming) for one in found), found
    return [one for one in found if isinstance(one, Incoming)]


def test_choices_are_calls_with_token_ids_and_logprobs() -> None:
    payload = reading.one(trajectory())
    first, second = payload.calls()

    assert (first.token_ids, first.logprobs, first.finish_reason) == ([100, 101], [0.0, -0.5], "stop")
    assert (second.response, second.token_ids) == ("BUY", [100, 101, 102])
    assert first.trainable is second.trainable is None
    assert payload.steps[0].action is not None
    assert payload.steps[0].action.calls[0].result == "up"
    assert (payload.tools, payload.reward, payload.extra["logs"]) == (TOOLS, 0.5, ["a log line"])
    assert payload.metrics == {"won": True, "ruler_score": 0.9}


def test_token_ids_of_newer_servers_and_words_without_ids_are_kept() -> None:
    newer = {
        **choice("BUY"),
        "token_ids": [7, 8],
        "prompt_token_ids": [1],
        "logprobs": {"content": [{"token": "BU", "logprob": -1.0}, {"token": "Y", "logprob": -2.0}]},
    }
    words = {**choice("SELL"), "logprobs": {"content": [{"token": "SELL", "logprob": -1.0}]}}
    first, second = reading.one(
        trajectory(messages_and_choices=[{"role": "user", "content": "?"}, newer, words])
    ).calls()

    assert (first.prompt_token_ids, first.token_ids, first.logprobs) == ([1], [7, 8], [-1.0, -2.0])
    assert (second.token_ids, second.logprobs) == (None, None)
    assert second.extra["choice"] == {"logprobs": {"content": [{"token": "SELL", "logprob": -1.0}]}}


def test_assistant_messages_beside_the_choices_are_context() -> None:
    said = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "an example"},
        {"role": "user", "content": "!"},
        choice("BUY"),
    ]
    calls = list(reading.one(trajectory(messages_and_choices=said)).calls())
    assert [(call.response, call.trainable) for call in calls] == [("an example", False), ("BUY", None)]


def test_logged_trajectories_mark_their_messages() -> None:
    said = [
        {"role": "user", "content": "?", "trainable": False},
        {"role": "assistant", "content": "BUY", "trainable": True},
    ]
    payload = reading.one({"reward": 1, "metrics": {}, "metadata": {}, "messages": said, "tools": None, "logs": []})
    (call,) = payload.calls()
    assert (call.response, call.trainable) == ("BUY", True)
    assert call.messages == ({"role": "user", "content": "?"},)


def test_additional_histories_are_conversations_of_the_same_trajectory() -> None:
    more = [{"messages_and_choices": [{"role": "user", "content": "Sum up."}, choice("Up.", 1)], "tools": None}]
    payload = reading.one(trajectory(additional_histories=more))
    calls = list(payload.calls())
    assert [call.response for call in calls] == [None, "BUY", "Up."]
    assert calls[2].messages == ({"role": "user", "content": "Sum up."},)


def test_members_of_a_group_share_scenario_and_group() -> None:
    value = group(
        trajectory(0.1),
        trajectory(0.9),
        metadata={"scenario_id": "task-1", "x": 1},
        exceptions=[{"type": "E", "message": "boom", "traceback": "t"}],
    )
    one, other = both(value)

    assert {item.payload.scenario_ref() for item in (one, other)} == {"art/task-1"}
    assert one.payload.group_id == other.payload.group_id is not None
    assert (one.payload.group_size, one.payload.reward, other.payload.reward) == (2, 0.1, 0.9)
    assert one.payload.trajectory_id != other.payload.trajectory_id
    assert reading.lost(value, [one, other], TOKENS) == []


def test_without_a_name_the_scenario_is_what_was_asked() -> None:
    first, second = both([group(trajectory(0.1)), group(trajectory(0.2))])
    other = both(trajectory(messages_and_choices=[{"role": "user", "content": "else"}, choice("x")]))[0]
    assert first.payload.scenario_ref() == second.payload.scenario_ref() != other.payload.scenario_ref()
    assert first.payload.group_id != second.payload.group_id


def test_a_bad_member_and_an_empty_group_are_named() -> None:
    good, bad = reading.read(group(trajectory(), {"reward": 1}))
    assert isinstance(good, Incoming)
    assert isinstance(bad, Invalid) and "Member 1" in bad.detail
    (empty,) = reading.read(group(exceptions=[{"type": "E"}]), "art")
    assert isinstance(empty, Invalid) and "1 exceptions" in empty.detail


@pytest.mark.parametrize("reward", [None, "NaN", True])
def test_a_reward_that_is_no_number_is_unknown(reward: object) -> None:
    assert reading.one(trajectory(reward)).reward is None


def test_posting_takes_one_trajectory_and_refuses_a_group_of_two() -> None:
    assert formats.incoming(json.dumps(trajectory()).encode(), "art").payload.reward == 0.5
    assert formats.incoming(json.dumps(group(trajectory())).encode(), "art").payload.group_size == 1
    with pytest.raises(Invalid, match="several trajectories"):
        formats.incoming(json.dumps(group(trajectory(0.1), trajectory(0.2))).encode(), "art")


def test_parquet_rows_keep_groups_and_marks(tmp_path: Path) -> None:
    path = tmp_path / "0001.parquet"
    write(path, [(0, 0.25), (0, 0.75), (1, None)])
    good, bad = reading.of_file(path)

    assert bad == []
    assert reading.counts(good) == {
        "trajectories": 3,
        "llm_calls": 6,
        "tool_calls": 3,
        "reward": 1.0,
        "unknown_rewards": 1,
        "token_ids": 0,
    }
    groups = [item.payload.group_id for item in good]
    assert groups[0] == groups[1] != groups[2]
    first, second = good[0].payload.calls()
    assert (first.trainable, second.trainable) == (True, False)
    assert good[0].payload.tools == TOOLS
    assert good[0].payload.extra["logs"] == ["a log line"]
    assert good[0].payload.metadata == {"k": "v"}
    assert [item.payload.scenario_ref() for item in good] == ["art/task-0", "art/task-0", "art/task-1"]
    assert good[0].payload.extra["group"] == {"metadata": {"scenario_id": "task-0"}, "logs": ["of the group"]}


def test_other_parquet_files_are_refused_by_their_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(Invalid, match="has the columns a"):
        reading.of_file(path)
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(Invalid, match="cannot be read"):
        reading.of_file(path)


def write(path: Path, rows: list[tuple[int, float | None]]) -> None:
    """As `openpipe-art` writes its trajectories."""
    said = [
        {"role": "user", "content": "ACME?", "tool_calls": None, "tool_call_id": None, "trainable": False},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": json.dumps(ASKED),
            "tool_call_id": None,
            "trainable": True,
        },
        {"role": "tool", "content": "up", "tool_calls": None, "tool_call_id": "c1", "trainable": False},
        {"role": "assistant", "content": "BUY", "tool_calls": None, "tool_call_id": None, "trainable": False},
    ]
    message = pa.struct(
        [(n, pa.string()) for n in ("role", "content", "tool_calls", "tool_call_id")] + [("trainable", pa.bool_())]
    )
    columns: list[tuple[str, pa.DataType]] = [
        ("group_index", pa.int64()),
        ("group_metadata", pa.string()),
        ("group_metrics", pa.string()),
        ("group_logs", pa.list_(pa.string())),
        ("reward", pa.float64()),
        ("metrics", pa.string()),
        ("metadata", pa.string()),
        ("tools", pa.string()),
        ("logs", pa.list_(pa.string())),
        ("additional_histories", pa.string()),
        ("messages", pa.list_(message)),
    ]
    table = [
        {
            "group_index": number,
            "group_metadata": json.dumps({"scenario_id": f"task-{number}"}),
            "group_metrics": None,
            "group_logs": ["of the group"],
            "reward": reward,
            "metrics": json.dumps({"m": number}),
            "metadata": json.dumps({"k": "v"}),
            "tools": json.dumps(TOOLS),
            "logs": ["a log line"],
            "additional_histories": None,
            "messages": said,
        }
        for number, reward in rows
    ]
    pq.write_table(pa.Table.from_pylist(table, schema=pa.schema(columns)), path, compression="zstd")
