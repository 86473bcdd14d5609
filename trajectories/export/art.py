"""OpenPipe ART: a line a group (`TrajectoryGroup`), or parquet with a row a trajectory in the columns of its logs.

What the policy wrote goes out as `Choice`, with token ids and log-probabilities as vLLM tells them (`token_id:N`); the
rest is context. ART's reward is a number, so trajectories whose reward is unknown are left out.
"""

import math
from collections.abc import Mapping, Sequence

from trajectories import payloads
from trajectories.export import native, said
from trajectories.export.pages import Opened
from trajectories.export.said import Conversation, Said
from trajectories.transcripts import HistoryCall

ENDS = ("stop", "length", "tool_calls", "content_filter", "function_call")  # those that OpenAI's `Choice` may have


def trajectory(one: Opened) -> dict[str, object]:
    """One trajectory in ART's JSON; its reward must be known."""
    assert one.row.reward is not None, "ART has no unknown reward"
    found = said.conversations(one.payload)
    first, *others = [_history(conversation) for conversation in found] or [_history(Conversation((), []))]
    return {
        **first,
        "additional_histories": others,
        "reward": one.row.reward,
        "metrics": metrics(one),
        "metadata": metadata(one),
        "logs": [],
    }


def _history(conversation: Conversation) -> dict[str, object]:
    messages = said.openai(conversation.said, weights=False)
    choices = _aligned(conversation.said)
    answers = iter(choices)
    made = []
    for message in messages:
        call = next(answers) if message["role"] == "assistant" else None
        made.append(choice(message, call) if call is not None else message)
    return {"messages_and_choices": made, "tools": conversation.tools or None}


def _aligned(told: Sequence[Said]) -> list[HistoryCall | None]:
    """The call of each assistant message, where it is to be learnt."""
    return [one.call if one.is_learnt else None for one in told if one.role == "assistant"]


def choice(message: Mapping[str, object], call: HistoryCall) -> dict[str, object]:
    end = call.finish_reason if call.finish_reason in ENDS else "tool_calls" if message.get("tool_calls") else "stop"
    made: dict[str, object] = {
        "finish_reason": end,
        "index": 0,
        "logprobs": _logprobs(call),
        "message": {**message, "refusal": None},
    }
    if call.token_ids is not None:
        made["token_ids"] = call.token_ids
    if call.prompt_token_ids is not None:
        made["prompt_token_ids"] = call.prompt_token_ids
    return made


def _logprobs(call: HistoryCall) -> dict[str, object] | None:
    ids, values = call.token_ids, call.logprobs
    if not ids or values is None or len(ids) != len(values) or any(value is None for value in values):
        return None
    tokens: list[dict[str, object]] = [
        {"token": f"token_id:{ident}", "bytes": None, "logprob": value, "top_logprobs": []}
        for ident, value in zip(ids, values, strict=True)
    ]
    return {"content": tokens, "refusal": None}


def metrics(one: Opened) -> dict[str, object]:
    """Numbers alone; parts of the reward as `reward/<name>`."""
    parts = {f"reward/{name}": value for name, value in (one.row.reward_components or {}).items()}
    return {name: value for name, value in {**parts, **one.payload.metrics}.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def metadata(one: Opened) -> dict[str, object]:
    """Scalars alone: what is nested goes as JSON text. Ours come last, so that no sender's word replaces them."""
    told = {name: _scalar(value) for name, value in native.public(one.payload.metadata).items()}
    ours = {
        "trajectory_id": one.row.trajectory_id,
        "agent_id": one.payload.agent_id,
        "scenario_id": one.payload.scenario_id,
        "split": one.scenario.split if one.scenario else None,
        "group": one.row.group_id,
        "final_status": one.row.final_status,
        "version": one.row.behaviour,
        "model": one.row.model_names[0] if one.row.model_names else None,
    }
    return {**told, **{name: value for name, value in ours.items() if value is not None}}


def _scalar(value: object) -> str | int | float | bool | None:
    return value if isinstance(value, str | int | float | bool | None) else payloads.encode(value).decode()


def group_metadata(group: int | None, cursor: str) -> dict[str, object]:
    return {"cursor": cursor} if group is None else {"group": group, "cursor": cursor}
