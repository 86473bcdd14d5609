"""OpenAI chat messages in the native envelope: `messages`, or `histories` for several conversations.

Each assistant message is a step: its call, whose prompt is what stands before it (stored once, as a reference to
the call before), and, with the tool results that follow it, its action. What follows the last call is kept as
`closing_messages`.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial

import msgspec

from trajectories import limits, payloads
from trajectories.errors import Invalid, Problem, TooLarge
from trajectories.formats import chat
from trajectories.formats.incoming import Incoming, identity
from trajectories.payloads import (
    ActionCallPayload,
    ActionPayload,
    Count,
    Envelope,
    LlmCallPayload,
    Message,
    Payload,
    PromptRef,
    StepPayload,
    TrajectoryPayload,
)

NAME = "messages"


class CompletionPayload(Payload, frozen=True, kw_only=True):
    """What a message cannot say of the call that wrote it; aligned with the assistant messages."""

    timestamp: datetime | None = None
    reward: float | None = None
    model: str | None = None
    model_version: str | None = None
    trainable: bool | None = None
    finish_reason: str | None = None
    error: object = None
    purpose: str | None = None
    latency_ms: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    logprobs_mode: str | None = None
    tokenizer: str | None = None
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    logprobs: list[float | None] | None = None


class MessagesPayload(Envelope, frozen=True, kw_only=True):
    """The envelope with messages in place of steps."""

    messages: tuple[Message, ...] | None = None
    histories: tuple[tuple[Message, ...], ...] | None = None
    completions: tuple[CompletionPayload | None, ...] = ()
    model: str | None = None  # of every call whose completion names none


def recognises(value: object) -> bool:
    return (
        isinstance(value, dict)
        and ("messages" in value or "histories" in value)
        and bool({"trajectory_id", "trajectoryId"} & set(value))
    )


def decode(raw: bytes) -> Incoming:
    """Raises Invalid, TooLarge: with pointer and limit."""
    plain = chat.decode(raw) if len(raw) <= 4 * chat.CHAT_BYTES else None
    packed = chat.pack(plain) if plain is not None else None
    if packed is None:
        return _incoming(payloads.decode(raw, MessagesPayload))
    payloads.check(packed.sent)
    return Incoming(
        chat=packed,
        canonical=chat.identity(packed.sent, packed.body, packed.system),
        source_format="messages",
        make=partial(_of_chat, packed.sent),
    )


def read(value: object, *, source: str) -> Iterator[Incoming | Problem]:
    try:
        yield from_value(value)
    except Problem as problem:
        yield problem


def from_value(value: object) -> Incoming:
    return _incoming(payloads.from_builtins(value, MessagesPayload))


def _incoming(sent: MessagesPayload) -> Incoming:
    payloads.check(sent)
    payload = convert(sent)
    payloads.check_steps(payload.steps)
    return Incoming(payload=payload, canonical=_identity(sent), source_format=NAME, derived_actions=True)


def _identity(sent: MessagesPayload) -> bytes:
    """One conversation has the same identity whichever way it was read (chat.py)."""
    if sent.messages is None:
        return identity(sent)
    return chat.identity(sent, *chat.split(sent.messages))


def _of_chat(sent: chat.ChatPayload) -> TrajectoryPayload:
    told = {field: getattr(sent, field) for field in Envelope.__struct_fields__}
    return convert(MessagesPayload(**told, messages=msgspec.to_builtins(sent.messages), model=sent.model))


def convert(sent: MessagesPayload) -> TrajectoryPayload:
    """The same as a native payload.

    Raises:
        Invalid: neither or both of messages and histories, a message without a role, too many completions.
    """
    if (sent.messages is None) == (sent.histories is None):
        raise Invalid('Send either "messages" or "histories".', pointer="/messages")
    histories = sent.histories if sent.histories is not None else (sent.messages or (),)
    if len(histories) > limits.HISTORIES:
        raise TooLarge(
            f"/histories has {len(histories)} entries; {limits.HISTORIES} are allowed.",
            pointer="/histories",
            limit=limits.HISTORIES,
            size=len(histories),
        )
    for number, history in enumerate(histories):
        where = "/messages" if sent.messages is not None else f"/histories/{number}"
        for index, message in enumerate(history):
            _check(message, f"{where}/{index}")
    written = sum(message["role"] == "assistant" for history in histories for message in history)
    if len(sent.completions) > written:
        raise Invalid(
            f"There are {len(sent.completions)} completions and {written} assistant messages.", pointer="/completions"
        )
    completions = (*sent.completions, *((None,) * (written - len(sent.completions))))
    steps: list[StepPayload] = []
    closing: tuple[Message, ...] = ()
    for number, history in enumerate(histories):
        before = len(steps)
        made, rest = _steps(history, completions[before:], before, sent.model)
        if made and rest and number < len(histories) - 1:
            last = msgspec.structs.replace(made[-1].llm_calls[0], closing_messages=rest)
            made[-1] = msgspec.structs.replace(made[-1], llm_calls=(last,))
        else:
            closing = (*closing, *rest)
        steps.extend(made)
    return TrajectoryPayload(
        **{field: getattr(sent, field) for field in Envelope.__struct_fields__},
        steps=with_actions(steps, closing),
        closing_messages=closing,
    )


def _check(message: Message, pointer: str) -> None:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise Invalid(f"{pointer}/role must be text such as user or assistant.", pointer=f"{pointer}/role")
    content = message.get("content")
    if content is not None and not isinstance(content, str | list):
        raise Invalid(
            f"{pointer}/content must be text, a list of parts, or null, not {type(content).__name__}.",
            pointer=f"{pointer}/content",
        )


def _steps(
    history: Sequence[Message], completions: Sequence[CompletionPayload | None], first_call: int, model: str | None
) -> tuple[list[StepPayload], tuple[Message, ...]]:
    """One conversation as steps, and what follows its last call."""
    steps: list[StepPayload] = []
    begin = 0
    for index, message in enumerate(history):
        if message["role"] != "assistant":
            continue
        context = tuple(history[begin:index])
        begin = index + 1
        completion = completions[len(steps)]
        prompt = (
            {"messages": context}
            if not steps
            else {"prompt_ref": PromptRef(call=first_call + len(steps) - 1, append=context)}
        )
        call = _call(message, completion, model, prompt)
        steps.append(
            StepPayload(
                timestamp=completion.timestamp if completion else None,
                llm_calls=(call,),
                reward=completion.reward if completion else None,
            )
        )
    return steps, tuple(history[begin:])


TAKEN = frozenset(LlmCallPayload.__struct_fields__) & frozenset(CompletionPayload.__struct_fields__) - {"extra"}


def _call(
    message: Message, completion: CompletionPayload | None, model: str | None, prompt: Mapping[str, object]
) -> LlmCallPayload:
    """The call that wrote the message. What of the message has no place in a call is kept in extra["message"]."""
    told: dict[str, object] = dict(prompt)
    if completion is not None:
        told.update((name, getattr(completion, name)) for name in TAKEN)
    if told.get("model") is None:
        told["model"] = model
    rest = {key: value for key, value in message.items() if key not in ("role", "content", "tool_calls")}
    content = message.get("content")
    if isinstance(content, list):
        rest["content"] = content
    else:
        told["response"] = content
    tool_calls = message.get("tool_calls")
    if isinstance(tool_calls, str) or (
        isinstance(tool_calls, list) and all(isinstance(one, dict | str) for one in tool_calls)
    ):
        told["tool_calls"] = tool_calls
    elif tool_calls is not None:
        rest["tool_calls"] = tool_calls
    if isinstance(rest.get("reasoning_content"), str):
        told["reasoning"] = rest.pop("reasoning_content")
    if message.get("weight") == 0:
        told["trainable"] = False
    extra = dict(completion.extra) if completion else {}
    if rest:
        extra["message"] = rest
    return msgspec.convert({**told, "extra": extra}, LlmCallPayload)


def with_actions(steps: Sequence[StepPayload], closing: tuple[Message, ...]) -> tuple[StepPayload, ...]:
    """Each step whose call asked for tools gets the action: what was asked, with the results that follow it."""
    if not any(step.llm_calls and step.llm_calls[0].tool_calls for step in steps):
        return tuple(steps)
    made: list[StepPayload] = []
    for number, step in enumerate(steps):
        call = step.llm_calls[0]
        asked = tool_calls(call)
        if asked:
            following = call.closing_messages
            if not following and number + 1 < len(steps):
                after = steps[number + 1].llm_calls[0]
                following = after.prompt_ref.append if after.prompt_ref else ()
            elif not following:
                following = closing
            step = msgspec.structs.replace(step, action=action(asked, following))
        made.append(step)
    return tuple(made)


def without_actions(steps: Sequence[StepPayload]) -> tuple[StepPayload, ...]:
    """The steps as they are stored: `with_actions` makes the rest again, so each text is there once."""
    return tuple(msgspec.structs.replace(step, action=None) if step.action else step for step in steps)


def tool_calls(call: LlmCallPayload) -> list[dict[str, object]]:
    """The tool calls as objects; some senders have them as JSON text, some of it broken: that is left out."""
    return list(_objects(call.tool_calls))


def _objects(found: object) -> Iterator[dict[str, object]]:
    if isinstance(found, str):
        try:
            found = msgspec.json.decode(found)
        except (msgspec.MsgspecError, RecursionError):
            return
    if isinstance(found, dict):
        yield found
    elif isinstance(found, list):
        for one in found:
            yield from _objects(one)


def function_of(tool_call: Mapping[str, object]) -> tuple[str, object]:
    """(name, arguments) of an OpenAI tool call, whichever way it is nested."""
    inner = tool_call.get("function")
    if not isinstance(inner, Mapping):
        inner = tool_call
    return str(inner.get("name") or ""), inner.get("arguments")


def action(asked: Sequence[Mapping[str, object]], following: Sequence[Message]) -> ActionPayload:
    """Ids repeat inside a run and results come out of order: the first open call with the id takes a result."""
    results: list[object] = [None] * len(asked)
    errors: list[object] = [None] * len(asked)
    open_calls = list(range(len(asked)))
    for message in following:
        if message.get("role") != "tool" or not open_calls:
            continue
        wanted = message.get("tool_call_id")
        taker = next((at for at in open_calls if wanted is None or asked[at].get("id") == wanted), None)
        if taker is not None:
            open_calls.remove(taker)
            results[taker] = message.get("content")
            errors[taker] = message.get("error")
    names = [function_of(one)[0] for one in asked]
    parameters: dict[str, object] | None = None
    if len(asked) == 1:
        parameters = _arguments(function_of(asked[0])[1])
    return ActionPayload(
        action_type=names[0] if len(names) == 1 else "tool_calls",
        parameters=parameters,
        calls=tuple(
            ActionCallPayload(
                tool_call_id=str(one["id"]) if one.get("id") is not None else None, result=result, error=error
            )
            for one, result, error in zip(asked, results, errors, strict=True)
        ),
    )


def _arguments(raw: object) -> dict[str, object] | None:
    if isinstance(raw, str):
        try:
            raw = msgspec.json.decode(raw)
        except (msgspec.MsgspecError, RecursionError):
            return None
    return raw if isinstance(raw, dict) else None
