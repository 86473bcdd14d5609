"""Conversations in the words that trainers read: plain texts, tool calls, and which answers are to be learnt.

Senders write messages in many ways (contents in parts, tool calls as JSON text, results without ids). Here each is one
thing that was said; the formats spell it their way. Conversations of those who graded the run are left out: they know
the answer.
"""

import json
from collections.abc import Iterator, Sequence

import msgspec

from trajectories import payloads, transcripts
from trajectories.formats import messages as messages_format
from trajectories.payloads import LlmCallPayload, Message
from trajectories.segments import LoadedPayload
from trajectories.transcripts import History, HistoryCall

ROLES = ("system", "developer", "user", "assistant", "tool")


class Asked(msgspec.Struct, frozen=True):
    """A tool call."""

    id: str | None
    name: str
    arguments: str  # JSON text, as the model wrote it


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """A message. `call` is there where a model of this trajectory wrote it."""

    role: str
    text: str
    parts: list[dict[str, object]] | None = None  # a user's, where some are no text
    reasoning: str | None = None
    asked: tuple[Asked, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    call: HistoryCall | None = None

    @property
    def is_learnt(self) -> bool:
        return self.call is not None and self.call.trainable


class Conversation(msgspec.Struct, frozen=True):
    said: tuple[Said, ...]
    tools: list[dict[str, object]]


def conversations(payload: LoadedPayload) -> list[Conversation]:
    """The conversations that were played, each message once."""
    return [conversation(history) for history in transcripts.played(payload)]


def learnable(payload: LoadedPayload) -> list[Conversation]:
    """Those with an answer to learn, each up to its last answer."""
    found = (up_to_last_answer(one) for one in conversations(payload))
    return [one for one in found if any(said.is_learnt for said in one.said)]


def up_to_last_answer(one: Conversation) -> Conversation:
    """What follows the last answer teaches nobody."""
    size = len(one.said)
    while size and one.said[size - 1].role != "assistant":
        size -= 1
    return Conversation(one.said[:size], one.tools)


def conversation(history: History) -> Conversation:
    calls = {call.at: call for call in history.calls}
    said = tuple(_said(message, calls.get(at)) for at, message in enumerate(history.messages))
    return Conversation(said, [tool(one) for one in history.tools or ()])


def tool(told: dict[str, object]) -> dict[str, object]:
    """A tool as OpenAI has it; some senders leave its outer layer out."""
    if "function" in told or not isinstance(told.get("name"), str):
        return told
    inner = {key: value for key, value in told.items() if key != "type"}
    if "input_schema" in inner and "parameters" not in inner:
        inner["parameters"] = inner.pop("input_schema")
    return {"type": "function", "function": inner}


def _said(message: Message, call: HistoryCall | None) -> Said:
    role = str(message.get("role") or "user")
    if role not in ROLES:
        role = "tool" if role == "function" else "user"
    content = message.get("content")
    text = content if isinstance(content, str) else _text(message)
    if len(message) == 2 and text is content:  # nothing but who said what
        return Said(role=role, text=text, call=call)
    reasoning, name, tool_call_id = message.get("reasoning_content"), message.get("name"), message.get("tool_call_id")
    return Said(
        role=role,
        text=text,
        parts=_parts(message) if role == "user" else None,
        reasoning=reasoning if isinstance(reasoning, str) else None,
        asked=tuple(_asked(message)) if role == "assistant" else (),
        tool_call_id=str(tool_call_id) if tool_call_id is not None else None,
        name=name if isinstance(name, str) else None,
        call=call,
    )


def _text(message: Message) -> str:
    content = message.get("content")
    if content is None or isinstance(content, str | list):
        return transcripts.text_of(message)
    return payloads.encode(content).decode()


def _parts(message: Message) -> list[dict[str, object]] | None:
    content = message.get("content")
    if not isinstance(content, list):
        return None
    parts: list[dict[str, object]] = [
        part if isinstance(part, dict) else {"type": "text", "text": str(part)} for part in content
    ]
    return parts if any(part.get("type") not in ("text", "input_text") for part in parts) else None


def _asked(message: Message) -> Iterator[Asked]:
    asked = message.get("tool_calls")
    if not asked:
        old = message.get("function_call")
        asked = [{"function": old}] if isinstance(old, dict) else None
    if isinstance(asked, list):
        asked = [one for one in asked if isinstance(one, dict | str)]
    elif not isinstance(asked, str):
        return
    for one in messages_format.tool_calls(LlmCallPayload(tool_calls=asked)):
        name, arguments = messages_format.function_of(one)
        text = arguments if isinstance(arguments, str) else payloads.encode(arguments or {}).decode()
        yield Asked(str(one["id"]) if one.get("id") is not None else None, name, text)


def arguments_of(asked: Asked) -> dict[str, object]:
    """The arguments as an object; what is none stands under "raw"."""
    try:
        found: object = msgspec.json.decode(asked.arguments or "{}")
    except (msgspec.MsgspecError, RecursionError):
        return {"raw": asked.arguments}
    return found if isinstance(found, dict) else {"raw": asked.arguments}


# --- OpenAI's words ------------------------------------------------------------------------------------------------


def openai(said: Sequence[Said], *, weights: bool) -> list[dict[str, object]]:
    """Messages that OpenAI takes: every result answers a call before it, every call that is passed has a result.

    Calls without an id get one. A result that answers no call becomes a user's message; a call that the conversation
    goes on from without a result gets an empty one. `weights`: answers that are not to be learnt get `weight: 0`.
    """
    made: list[dict[str, object]] = []
    waiting: list[str] = []  # ids of calls whose results have not come
    for number, one in enumerate(said):
        if one.role == "tool":
            answered = one.tool_call_id if one.tool_call_id in waiting else None
            if answered is None and waiting and one.tool_call_id is None:
                answered = waiting[0]
            if answered is not None:
                waiting.remove(answered)
                made.append({"role": "tool", "tool_call_id": answered, "content": one.text})
                continue
        made += [{"role": "tool", "tool_call_id": waited, "content": ""} for waited in waiting]
        waiting = []
        if one.role != "assistant":
            role = "user" if one.role == "tool" else one.role
            made.append({"role": role, "content": one.parts if one.parts is not None else one.text})
            continue
        message: dict[str, object] = {"role": "assistant", "content": one.text or (None if one.asked else "")}
        if one.asked:
            ids = _ids(one.asked, number)
            message["tool_calls"] = [
                {"id": ident, "type": "function", "function": {"name": asked.name, "arguments": asked.arguments}}
                for ident, asked in zip(ids, one.asked, strict=True)
            ]
            waiting = list(ids)
        if weights and not one.is_learnt:
            message["weight"] = 0
        made.append(message)
    return made


def _ids(asked: Sequence[Asked], number: int) -> list[str]:
    """Of one message's calls, each once."""
    ids: list[str] = []
    for place, one in enumerate(asked):
        ident = one.id or f"call_{number}_{place}"
        ids.append(ident if ident not in ids else f"{ident}_{place}")
    return ids


# --- TRL's words ---------------------------------------------------------------------------------------------------


def trl(said: Sequence[Said]) -> list[dict[str, object]]:
    """Messages as TRL's conversational rows have them: contents are always text, arguments are objects."""
    return [_trl(one) for one in said]


def _trl(one: Said) -> dict[str, object]:
    message: dict[str, object] = {"role": one.role, "content": one.text}
    if one.reasoning is not None:
        message["reasoning_content"] = one.reasoning
    if one.asked:
        message["tool_calls"] = [
            {
                **({"id": asked.id} if asked.id is not None else {}),
                "type": "function",
                "function": {"name": asked.name, "arguments": arguments_of(asked)},
            }
            for asked in one.asked
        ]
    if one.role == "tool":
        if one.tool_call_id is not None:
            message["tool_call_id"] = one.tool_call_id
        if one.name is not None:
            message["name"] = one.name
    return message


def tools_text(tools: Sequence[dict[str, object]]) -> str | None:
    """A text, because libraries that infer columns cannot hold schemas of different tools in one."""
    return json.dumps(list(tools), ensure_ascii=False) if tools else None
