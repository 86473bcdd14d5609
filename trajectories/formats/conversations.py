"""Model calls that were logged each with its whole prompt, as steps: each text of a growing conversation once.

A prompt that goes on from an earlier call (its prompt, its answer, then new messages) becomes a reference to that call
and the new messages. Sub-agents, retries and graders between the calls do not matter: the call that is gone on from
need not be the one before.
"""

from collections import deque
from collections.abc import Mapping, Sequence

import msgspec

from trajectories import payloads
from trajectories.formats import messages
from trajectories.formats.incoming import Incoming
from trajectories.payloads import LlmCallPayload, Message, PromptRef, StepPayload, TrajectoryPayload

LOOK_BACK = 32  # earlier calls that a prompt may go on from


class Call(msgspec.Struct, kw_only=True):
    """A call with the prompt that it was sent, and what its step has beside it."""

    prompt: Sequence[Message]
    call: LlmCallPayload  # without a prompt
    step: Mapping[str, object] = {}  # fields of StepPayload


class Laid(msgspec.Struct, kw_only=True):
    """The calls as steps."""

    steps: tuple[StepPayload, ...]
    closing: tuple[Message, ...]
    derived_actions: bool  # the actions are those that `messages.with_actions` makes
    final_is_placed: bool


class _Open(msgspec.Struct):
    """A conversation as it stood after a call."""

    call: int
    messages: list[Message]
    answer: Message | None  # the last of the messages


def answer(
    message: Mapping[str, object], fields: Mapping[str, object] | None = None, extra: Mapping[str, object] | None = None
) -> LlmCallPayload:
    """The call that wrote an OpenAI assistant message; `fields` are those of LlmCallPayload, of the right types.

    What of the message has no place in a call is kept in extra["message"].
    """
    told: dict[str, object] = dict(fields or {})
    rest = {key: value for key, value in message.items() if key not in ("role", "content", "tool_calls")}
    content = message.get("content")
    if content is None or isinstance(content, str):
        told["response"] = content
    else:
        rest["content"] = content if isinstance(content, list) else [content]
    asked = message.get("tool_calls")
    if isinstance(asked, str) or (isinstance(asked, list) and all(isinstance(one, dict | str) for one in asked)):
        told["tool_calls"] = asked
    elif asked is not None:
        rest["tool_calls"] = asked
    if isinstance(rest.get("reasoning_content"), str):
        told["reasoning"] = rest.pop("reasoning_content")
    if message.get("weight") == 0:
        told["trainable"] = False
    kept = {**(extra or {}), **({"message": rest} if rest else {})}
    return msgspec.structs.replace(LlmCallPayload(extra=kept), **told)


def lay(calls: Sequence[Call], final: Sequence[Message] = ()) -> Laid:
    """One step a call, in their order. `final`: the conversation as it stood in the end, with what nobody answered."""
    recent: deque[_Open] = deque(maxlen=LOOK_BACK)
    steps: list[StepPayload] = []
    following: dict[int, tuple[Message, ...]] = {}  # by call: what was said after it
    for number, one in enumerate(calls):
        found = _goes_on_from(recent, one.prompt)
        call = one.call
        if found is None:
            call = msgspec.structs.replace(call, messages=tuple(one.prompt))
        else:
            append = tuple(one.prompt[len(found.messages) :])
            call = msgspec.structs.replace(call, prompt_ref=PromptRef(call=found.call, append=append))
            _keep_difference(steps, found, one.prompt)
            following.setdefault(found.call, append)
        steps.append(msgspec.structs.replace(StepPayload(llm_calls=(call,)), **one.step))
        said = _answer(call)
        recent.append(_Open(number, [*one.prompt, *([said] if said else [])], said))
    closing, placed = _close(steps, recent, final, following)
    made = tuple(
        _with_action(step, following.get(number) or (closing if number == len(steps) - 1 else ()))
        for number, step in enumerate(steps)
    )
    bare = messages.without_actions(made)
    derived = bool(made) and messages.with_actions(bare, closing) == made
    return Laid(steps=made, closing=closing, derived_actions=derived, final_is_placed=placed)


def _goes_on_from(recent: deque[_Open], prompt: Sequence[Message]) -> _Open | None:
    """The latest call of the longest conversation that the prompt begins with."""
    best: _Open | None = None
    for one in reversed(recent):
        size = len(one.messages)
        if size and size <= len(prompt) and (best is None or size > len(best.messages)) and _begins(one, prompt):
            best = one
    return best


def _begins(one: _Open, prompt: Sequence[Message]) -> bool:
    size = len(one.messages)
    if one.answer is not None:
        size -= 1
        if not _is_answer(prompt[size], one.answer):
            return False
    # from the end: conversations of one trajectory often begin alike
    return all(one.messages[at] is prompt[at] or one.messages[at] == prompt[at] for at in reversed(range(size)))


def _begins_with(one: _Open, final: Sequence[Message]) -> bool:
    """Whether the conversation goes further than the final one, which then tells nothing more."""
    size = len(final)
    return size < len(one.messages) and all(one.messages[at] == final[at] for at in reversed(range(size)))


def _is_answer(message: Message, said: Message) -> bool:
    """The same words and tool calls; senders decorate an answer, or strip it, on its way back into a prompt."""
    return message is said or (
        message.get("role") == "assistant"
        and (message.get("content") or None) == (said.get("content") or None)
        and (message.get("tool_calls") or None) == (said.get("tool_calls") or None)
    )


def _answer(call: LlmCallPayload) -> Message | None:
    kept = call.extra.get("message")
    more = kept if isinstance(kept, dict) else {}
    if not (call.response or call.tool_calls or more.get("content")) and call.error is not None:
        return None
    said: Message = {"role": "assistant", "content": call.response}
    if call.tool_calls is not None:
        said["tool_calls"] = call.tool_calls
    if call.reasoning is not None:
        said["reasoning_content"] = call.reasoning
    return {**said, **more}


def _keep_difference(steps: list[StepPayload], found: _Open, prompt: Sequence[Message]) -> None:
    """What the prompt says of an answer that the answer itself did not: extra["in_prompts"] of its call."""
    if found.answer is None:
        return
    shown, said = prompt[len(found.messages) - 1], found.answer
    if shown is said:
        return
    call = steps[found.call].llm_calls[0]
    told = call.extra.get("in_prompts")
    known = {**said, **(told if isinstance(told, dict) else {})}
    more = {key: value for key, value in shown.items() if value not in (None, "", []) and known.get(key) != value}
    if more:
        kept = {**(told if isinstance(told, dict) else {}), **more}
        call = msgspec.structs.replace(call, extra={**call.extra, "in_prompts": kept})
        steps[found.call] = msgspec.structs.replace(steps[found.call], llm_calls=(call,))


def _close(
    steps: list[StepPayload],
    recent: deque[_Open],
    final: Sequence[Message],
    following: dict[int, tuple[Message, ...]],
) -> tuple[tuple[Message, ...], bool]:
    """What follows the last call; and whether the final conversation has found its place."""
    if not final:
        return (), True
    if not steps:
        return tuple(final), True
    if any(_begins_with(one, final) for one in recent):
        return (), True
    found = _goes_on_from(recent, final)
    if found is None:
        return (), False
    _keep_difference(steps, found, final)
    rest = tuple(final[len(found.messages) :])
    if not rest:
        return (), True
    following.setdefault(found.call, rest)
    if found.call == len(steps) - 1:
        return rest, True
    call = msgspec.structs.replace(steps[found.call].llm_calls[0], closing_messages=rest)
    steps[found.call] = msgspec.structs.replace(steps[found.call], llm_calls=(call,))
    return (), True


def _with_action(step: StepPayload, following: tuple[Message, ...]) -> StepPayload:
    asked = messages.tool_calls(step.llm_calls[0])
    if not asked:
        return step
    action = messages.action(asked, following)
    if step.action is not None:  # the reader knows more of it
        action = msgspec.structs.replace(step.action, calls=step.action.calls or action.calls)
    return msgspec.structs.replace(step, action=action)


def incoming(
    envelope: Mapping[str, object],
    laid: Laid,
    *,
    name: str,
    canonical: bytes,
    made_id: bool = False,
    findings: Sequence[str] = (),
) -> Incoming:
    """The trajectory of these fields and steps.

    Raises:
        Invalid, TooLarge: with pointer and limit.
    """
    told = {key: value for key, value in envelope.items() if value is not None and value != {}}
    bare = payloads.from_builtins({**told, "steps": ()}, TrajectoryPayload)
    payload = msgspec.structs.replace(bare, steps=laid.steps, closing_messages=laid.closing)
    payloads.check(payload)
    payloads.check_steps(payload.steps)
    return Incoming(
        payload=payload,
        canonical=canonical,
        source_format=name,
        derived_actions=laid.derived_actions,
        made_id=made_id,
        findings=tuple(findings),
    )


def untold(value: object, *told: object) -> bool:
    """Whether a value in it is in none of the others: then dropping it would lose something."""
    known = {"assistant"}.union(*(leaves(one) for one in told))
    return not leaves(value) <= known


def leaves(value: object) -> set[str]:
    """Texts and numbers of a value, without keys, nulls and booleans."""
    found: set[str] = set()
    waiting: list[object] = [msgspec.to_builtins(value)]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting.extend(one.values())
        elif isinstance(one, list | tuple):
            waiting.extend(one)
        elif isinstance(one, str):
            if one:
                found.add(one)
        elif one is not None and not isinstance(one, bool):
            found.add(repr(float(one)) if isinstance(one, int) and abs(one) < 2**53 else repr(one))
    return found
