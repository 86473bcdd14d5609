"""What was said: the prompt of each call, and the conversations of a trajectory, for judge, trainer and pages."""

from collections.abc import Mapping, Sequence

import msgspec

from trajectories.formats.messages import tool_calls
from trajectories.payloads import LlmCallPayload, Message, TrajectoryPayload

Tools = list[dict[str, object]]

GRADING = "grading"  # the purpose of a call that judged the trajectory it stands in
LOOK_BACK = 8  # conversations that a call with a whole prompt may go on from


class HistoryCall(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One call inside a history: its answer is `messages[at]`, its prompt `messages[:at]`."""

    at: int
    position: int  # through the whole trajectory
    step: int
    trainable: bool  # not marked as context, no image in the prompt, an answer there
    origin: str = "unknown"  # own | foreign | unknown
    version: str = ""  # of this project, when own
    model: str = ""
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    logprobs: list[float | None] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    logprobs_mode: str | None = None
    tokenizer: str | None = None
    finish_reason: str | None = None
    purpose: str = ""


class History(msgspec.Struct, kw_only=True):
    """One conversation: OpenAI messages, and which of them were calls of this trajectory."""

    messages: list[Message]
    tools: Tools | None = None
    calls: list[HistoryCall] = []


class OriginOfCall(msgspec.Struct, frozen=True):
    """Whose answer a call's is."""

    origin: str  # own | foreign | unknown
    version: str = ""


def histories(payload: TrajectoryPayload, origins: Sequence[OriginOfCall] | None = None) -> list[History]:
    """The conversations of a trajectory, each as long as it grew: a call that goes on from another shares its history.

    A call that branches off gets a history of its own, in which earlier answers are context. `origins` are those of
    the calls by position; payloads from `segments.load` carry them.
    """
    told = origins if origins is not None else payload_origins(payload)
    made: list[History] = []
    places: list[tuple[History, int]] = []  # by call: its history, and where its answer is or would be
    looked: dict[int, tuple[int, bool]] = {}  # by id of the history: of so many messages, whether one has an image
    position = 0
    for number, step in enumerate(payload.steps):
        for call in step.llm_calls:
            tools = call.tools if call.tools is not None else payload.tools
            history = _history_for(call, tools, made, places)
            answer = answer_of(call)
            at = len(history.messages)
            places.append((history, at))
            if answer is not None:
                origin = told[position] if position < len(told) else OriginOfCall("unknown")
                size, image = looked.get(id(history), (0, False))
                image = image or any(map(has_image, history.messages[size:]))
                looked[id(history)] = (at, image)
                history.calls.append(_call(call, at, position, number, origin, image=image))
                history.messages.append(answer)
            history.messages.extend(plain(message) for message in call.closing_messages)
            position += 1
    if payload.closing_messages:
        if not made:
            made.append(History(messages=[], tools=payload.tools))
        last = places[-1][0] if places else made[-1]
        last.messages.extend(plain(message) for message in payload.closing_messages)
    return made


def played(payload: TrajectoryPayload) -> list[History]:
    """The same without the conversations of those who graded the run: they know the answer and the grade."""
    return [one for one in histories(payload) if not one.calls or any(call.purpose != GRADING for call in one.calls)]


def _history_for(
    call: LlmCallPayload, tools: Tools | None, made: list[History], places: Sequence[tuple[History, int]]
) -> History:
    """The history that the call goes on from, brought up to its prompt; or a new one."""
    if call.prompt_ref is not None and call.messages is None and call.prompt_ref.call < len(places):
        earlier, at = places[call.prompt_ref.call]
        append = [plain(message) for message in call.prompt_ref.append]
        if len(earlier.messages) <= at + 1 and earlier.tools == tools:
            earlier.messages.extend(append)
            return earlier
        made.append(History(messages=[*earlier.messages[: at + 1], *append], tools=tools, calls=[]))
        return made[-1]
    prompt = [plain(message) for message in own_prompt(call)]
    for history in reversed(made[-LOOK_BACK:]):
        size = len(history.messages)
        if (
            size <= len(prompt)
            and history.tools == tools
            and all(map(_same, reversed(history.messages), reversed(prompt[:size])))
        ):
            history.messages.extend(prompt[size:])
            return history
    made.append(History(messages=prompt, tools=tools, calls=[]))
    return made[-1]


def _call(call: LlmCallPayload, at: int, position: int, step: int, origin: OriginOfCall, *, image: bool) -> HistoryCall:
    return HistoryCall(
        at=at,
        position=position,
        step=step,
        trainable=call.trainable is not False and is_answered(call) and not image,
        origin=origin.origin,
        version=origin.version,
        model=call.model or "",
        prompt_token_ids=call.prompt_token_ids,
        token_ids=call.token_ids,
        logprobs=call.logprobs,
        temperature=call.temperature,
        top_p=call.top_p,
        top_k=call.top_k,
        min_p=call.min_p,
        logprobs_mode=call.logprobs_mode,
        tokenizer=call.tokenizer,
        finish_reason=call.finish_reason,
        purpose=call.purpose or "",
    )


def payload_origins(payload: TrajectoryPayload) -> Sequence[OriginOfCall]:
    """What ingestion found out about the calls; () for a payload that was not loaded from the store."""
    found = getattr(payload, "origins", ())
    return found if isinstance(found, tuple) else ()


def own_prompt(call: LlmCallPayload) -> tuple[Message, ...]:
    """The messages that the call itself carries; () when it refers to another."""
    if call.messages is not None:
        return call.messages
    parts: list[Message] = []
    if call.system_prompt is not None:
        parts.append({"role": "system", "content": call.system_prompt})
    if call.user_prompt is not None:
        parts.append({"role": "user", "content": call.user_prompt})
    return tuple(parts)


def prompts(payload: TrajectoryPayload) -> list[tuple[Message, ...]]:
    """The whole prompt of each call, as it was sent, references resolved."""
    found: list[tuple[Message, ...]] = []
    answers: list[Message | None] = []
    for call in payload.calls():
        reference = call.prompt_ref
        if call.messages is None and reference is not None and reference.call < len(found):
            answer = answers[reference.call]
            found.append((*found[reference.call], *((answer,) if answer else ()), *reference.append))
        else:
            found.append(own_prompt(call))
        answers.append(answer_as_sent(call))
    return found


def is_answered(call: LlmCallPayload) -> bool:
    return bool(call.response or call.tool_calls or call.token_ids or _kept(call).get("content"))


def answer_as_sent(call: LlmCallPayload) -> Message | None:
    """The assistant message of a call; None for a call that failed without an answer."""
    if call.error is not None and not is_answered(call):
        return None
    message: Message = {"role": "assistant", "content": call.response}
    if call.reasoning is not None:
        message["reasoning_content"] = call.reasoning
    if call.tool_calls is not None:
        message["tool_calls"] = call.tool_calls
    message.update(_kept(call))
    return message


def answer_of(call: LlmCallPayload) -> Message | None:
    """The same in the form that templates and judges read."""
    message = answer_as_sent(call)
    return plain(message) if message is not None else None


def _kept(call: LlmCallPayload) -> Mapping[str, object]:
    """What of an assistant message found no place in the call (formats/messages.py)."""
    kept = call.extra.get("message") if call.extra else None
    return kept if isinstance(kept, dict) else {}


def plain(message: Message) -> Message:
    """A message as OpenAI has it: tool calls as objects, their arguments as JSON text, no training marks."""
    calls = message.get("tool_calls")
    if calls is None and "weight" not in message:
        return message
    clean = {key: value for key, value in message.items() if key not in ("weight", "tool_calls")}
    if calls:
        clean["tool_calls"] = [_tool_call(one) for one in tool_calls(LlmCallPayload(tool_calls=_listed(calls)))]
    return clean


def _listed(calls: object) -> list[dict[str, object] | str] | str | None:
    if isinstance(calls, list):
        return [one for one in calls if isinstance(one, dict | str)]
    return calls if isinstance(calls, str) else None


def _tool_call(one: dict[str, object]) -> dict[str, object]:
    function = one.get("function")
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str):
        return one
    text = msgspec.json.encode(function.get("arguments") or {}).decode()
    return {**one, "function": {**function, "arguments": text}}


def _same(one: Message, other: Message) -> bool:
    """The same words of the same speaker: senders decorate assistant messages on the way back in."""
    return one is other or (
        one.get("role") == other.get("role")
        and (one.get("content") or None) == (other.get("content") or None)
        and (one.get("tool_calls") or None) == (other.get("tool_calls") or None)
    )


def has_image(message: Message) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(
        isinstance(part, dict) and str(part.get("type", "")).endswith(("image", "image_url")) for part in content
    )


def text_of(message: Message) -> str:
    """The words of a message: a string, or the text parts of a list."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(str(part.get("text") or "") if isinstance(part, dict) else str(part) for part in content)
    return ""
