"""Turns of a conversation as steps: what was said to the model, and each answer of it as a call.

Unlike in `messages`, an assistant message that the agent was only shown (few-shot, copied context) is a message like
any other: the reader says which answers are calls.
"""

from collections.abc import Iterable, Mapping

import msgspec

from trajectories import payloads
from trajectories.formats.incoming import Incoming, identity
from trajectories.formats.messages import with_actions
from trajectories.payloads import LlmCallPayload, Message, PromptRef, StepPayload, TrajectoryPayload


class Answer(msgspec.Struct, kw_only=True):
    """A call without its prompt, and what its step has beside it."""

    call: LlmCallPayload
    step: Mapping[str, object] = {}  # fields of StepPayload


class Done(msgspec.Struct):
    """A step without a model: what the agent's program did by itself."""

    step: StepPayload


Turn = Message | Answer | Done


def call_of(fields: Mapping[str, object]) -> LlmCallPayload:
    """Raises Invalid."""
    return payloads.from_builtins({key: value for key, value in fields.items() if value is not None}, LlmCallPayload)


def steps_of(conversations: Iterable[Iterable[Turn]]) -> tuple[tuple[StepPayload, ...], tuple[Message, ...], bool]:
    """One step a call; what follows the last call; and whether all actions can be made of the messages again.

    The first call of a conversation carries its prompt, the others refer to the one before. What follows the last call
    of a conversation that is not the last one stays with that call.
    """
    steps: list[StepPayload] = []
    done: list[tuple[int, StepPayload]] = []  # before which call, counted from 0
    waiting: list[Message] = []
    for turns in conversations:
        if waiting and steps:
            last = steps[-1]
            call = msgspec.structs.replace(last.llm_calls[0], closing_messages=tuple(waiting))
            steps[-1] = msgspec.structs.replace(last, llm_calls=(call,))
            waiting = []
        first = True
        for turn in turns:
            if isinstance(turn, Done):
                done.append((len(steps), turn.step))
                continue
            if not isinstance(turn, Answer):
                waiting.append(turn)
                continue
            if first:
                call = msgspec.structs.replace(turn.call, messages=tuple(waiting))
            else:
                reference = PromptRef(call=len(steps) - 1, append=tuple(waiting))
                call = msgspec.structs.replace(turn.call, prompt_ref=reference)
            steps.append(msgspec.structs.replace(StepPayload(llm_calls=(call,)), **turn.step))
            first, waiting = False, []
    closing = tuple(waiting)
    acted = list(with_actions(steps, closing))
    for at, step in reversed(done):
        acted.insert(at, step)
    return tuple(acted), closing, not done


def incoming(
    envelope: Mapping[str, object],
    conversations: Iterable[Iterable[Turn]],
    *,
    name: str,
    made_id: bool = False,
) -> Incoming:
    """The trajectory of these fields and conversations.

    Raises:
        Invalid, TooLarge: with pointer and limit.
    """
    steps, closing, derived = steps_of(conversations)
    told = {key: value for key, value in envelope.items() if value is not None and value != {}}
    bare = payloads.from_builtins({**told, "steps": ()}, TrajectoryPayload)
    payload = msgspec.structs.replace(bare, steps=steps, closing_messages=closing)
    payloads.check(payload)
    payloads.check_steps(payload.steps)
    return Incoming(
        payload=payload, canonical=identity(payload), source_format=name, derived_actions=derived, made_id=made_id
    )


def with_tokens(turn: Answer, prompt: object, written: object) -> Answer:
    """The answer with these counts, where it has none of its own."""
    call = turn.call
    told = msgspec.structs.replace(
        call,
        prompt_tokens=call.prompt_tokens if call.prompt_tokens is not None else _count(prompt),
        completion_tokens=call.completion_tokens if call.completion_tokens is not None else _count(written),
    )
    return Answer(call=told, step=turn.step)


def _count(value: object) -> int | None:
    return value if isinstance(value, int) else None


def shown(message: Mapping[str, object]) -> Message:
    """A message that is not an answer, with a role and content that we keep as they are."""
    made = dict(message)
    if not isinstance(made.get("role"), str) or not made["role"]:
        made = {**made, "role": "user"}
        if message.get("role") is not None:
            made["said_role"] = message["role"]
    if not isinstance(made.get("content"), str | list | None):
        made["content"] = [made["content"]]
    return made
