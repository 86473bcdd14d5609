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
    return laid_out(sent)


def laid_out(sent: MessagesPayload, *, actions: bool = True) -> TrajectoryPayload:
    """The same of what was checked before, as it is when it comes from the store. `actions`: made from the results."""
    histories = sent.histories if sent.histories is not None else (sent.messages or (),)
    completions = sent.completions
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
        steps=with_actions(steps, closing) if actions else tuple(steps),
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
        number = len(steps)
        told: dict[str, object] = (
            {"prompt_ref": PromptRef(call=first_call + number - 1, append=context)} if number else {"messages": context}
        )
        completion = completions[number] if number < len(completions) else None
        if completion is None:
            steps.append(StepPayload(llm_calls=(_call(message, None, model, told),)))
            continue
        call = _call(message, completion, model, told)
        steps.append(StepPayload(timestamp=completion.timestamp, llm_calls=(call,), reward=completion.reward))
    return steps, tuple(history[begin:])


TAKEN = frozenset(LlmCallPayload.__struct_fields__) & frozenset(CompletionPayload.__struct_fields__) - {"extra"}


def _call(
    message: Message, completion: CompletionPayload | None, model: str | None, told: dict[str, object]
) -> LlmCallPayload:
    """The call that wrote the message; `told`: its prompt. What of the message has no place in a call is kept in
    extra["message"]."""
    if completion is not None:
        told.update((name, getattr(completion, name)) for name in TAKEN)
    if told.get("model") is None:
        told["model"] = model
    placed = 1  # the role
    rest: dict[str, object] = {}
    if "content" in message:
        content = message["content"]
        placed += 1
        if isinstance(content, list):
            rest["content"] = content
        else:
            told["response"] = content
    if "tool_calls" in message:
        tool_calls = message["tool_calls"]
        placed += 1
        if isinstance(tool_calls, str) or _are_calls(tool_calls):
            told["tool_calls"] = tool_calls
        elif tool_calls is not None:
            rest["tool_calls"] = tool_calls
    if placed < len(message):
        others = {key: value for key, value in message.items() if key not in ("role", "content", "tool_calls")}
        if isinstance(others.get("reasoning_content"), str):
            told["reasoning"] = others.pop("reasoning_content")
        if others.get("weight") == 0:
            told["trainable"] = False
        rest = {**others, **rest}
    if rest:
        told["extra"] = {**(completion.extra if completion else {}), "message": rest}
    elif completion is not None and completion.extra:
        told["extra"] = dict(completion.extra)
    return LlmCallPayload(**told)  # type: ignore[arg-type]  # each was checked above, or where it was decoded


def _are_calls(found: object) -> bool:
    if not isinstance(found, list):
        return False
    if len(found) == 1:  # as nearly always: a generator would cost more than what it looks at
        return isinstance(found[0], dict | str)
    return all(isinstance(one, dict | str) for one in found)


def with_actions(steps: Sequence[StepPayload], closing: tuple[Message, ...]) -> tuple[StepPayload, ...]:
    """Each step whose call asked for tools gets the action: what was asked, with the results that follow it."""
    if not any(step.llm_calls and step.llm_calls[0].tool_calls for step in steps):
        return tuple(steps)
    made: list[StepPayload] = []
    for number, step in enumerate(steps):
        call = step.llm_calls[0]
        asked = tool_calls(call) if call.tool_calls else ()
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
    found = call.tool_calls
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], dict):
        return [found[0]]
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
    if not isinstance(inner, dict):
        inner = tool_call
    return str(inner.get("name") or ""), inner.get("arguments")


def action(asked: Sequence[Mapping[str, object]], following: Sequence[Message]) -> ActionPayload:
    """Ids repeat inside a run and results come out of order: the first open call with the id takes a result."""
    if len(asked) == 1:
        return _action_of_one(asked[0], following)
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
    return ActionPayload(
        action_type="tool_calls",
        calls=tuple(
            ActionCallPayload(
                tool_call_id=str(one["id"]) if one.get("id") is not None else None, result=result, error=error
            )
            for one, result, error in zip(asked, results, errors, strict=True)
        ),
    )


def _action_of_one(asked: Mapping[str, object], following: Sequence[Message]) -> ActionPayload:
    ident = asked.get("id")
    result = error = None
    for message in following:
        if message.get("role") == "tool" and message.get("tool_call_id") in (None, ident):
            result, error = message.get("content"), message.get("error")
            break
    name, arguments = function_of(asked)
    told = ActionCallPayload(tool_call_id=str(ident) if ident is not None else None, result=result, error=error)
    return ActionPayload(action_type=name, parameters=_arguments(arguments), calls=(told,))


def _arguments(raw: object) -> dict[str, object] | None:
    if isinstance(raw, str):
        try:
            raw = msgspec.json.decode(raw)
        except (msgspec.MsgspecError, RecursionError):
            return None
    return raw if isinstance(raw, dict) else None
