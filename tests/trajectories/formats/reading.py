"""What a document becomes, for the conformance tests: counts, and whether anything of it was lost."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from trajectories import formats, importing, payloads
from trajectories.errors import Problem
from trajectories.formats import messages
from trajectories.formats.incoming import Incoming
from trajectories.payloads import TrajectoryPayload


def read(value: object, name: str | None = None, source: str = "file.json") -> list[Incoming | Problem]:
    """As the importer reads it, which recognises the format itself unless it is named."""
    found = formats.recognised(value)
    assert name is not None or found is not None, "the format was not recognised"
    module = formats.named(name) if name else found
    assert module is not None and (found is None or found is module), f"recognised as {found and found.NAME}"
    return list(formats.trajectories_in(value, module, source=source))


def one(value: object, name: str | None = None, source: str = "file.json") -> TrajectoryPayload:
    (found,) = read(value, name, source)
    assert isinstance(found, Incoming), found
    return found.payload


def of_file(path: Path) -> tuple[list[Incoming], list[tuple[object, Problem]]]:
    """The trajectories of a file, and what could not be read, with its place."""
    good: list[Incoming] = []
    bad: list[tuple[object, Problem]] = []
    for place, item in importing.items(path):
        if isinstance(item, Problem):
            bad.append((place, item))
        else:
            good.append(item)
    return good, bad


def counts(found: Iterable[Incoming | TrajectoryPayload]) -> dict[str, object]:
    """Trajectories, calls, tool calls, the sum of known rewards and how many are unknown, tokens that calls tell."""
    whole = [item.payload if isinstance(item, Incoming) else item for item in found]
    calls = [call for payload in whole for call in payload.calls()]
    return {
        "trajectories": len(whole),
        "llm_calls": len(calls),
        "tool_calls": sum(len(messages.tool_calls(call)) for call in calls) + without_model(whole),
        "reward": round(sum(payload.reward for payload in whole if payload.reward is not None), 6),
        "unknown_rewards": sum(payload.reward is None for payload in whole),
        "token_ids": sum(len(call.token_ids or ()) for call in calls),
    }


def without_model(found: Iterable[TrajectoryPayload]) -> int:
    """Tool calls of steps in which no model was asked."""
    steps = [step for payload in found for step in payload.steps if not step.llm_calls]
    return sum(len(step.action.calls) for step in steps if step.action is not None)


def lost(source: object, found: Sequence[Incoming], known: Iterable[str] = ()) -> list[str]:
    """Pointers of the texts and numbers of the source that are nowhere in the payloads.

    `known`: words of the format itself, such as the names of kinds, which the shape of the payload says.
    """
    held_texts: set[str] = {"assistant", *known}  # whoever wrote a call's answer is no text of it
    held_numbers: set[float] = {0.0, 1.0}
    for item in found:
        for _, leaf in payloads.walk(msgspec.to_builtins(item.payload)):
            if isinstance(leaf, str):
                held_texts.add(leaf)
            elif isinstance(leaf, int | float) and not isinstance(leaf, bool):
                held_numbers.add(float(leaf))
    joined = "\n".join(held_texts)
    missing: list[str] = []
    for pointer, leaf in payloads.walk(source):
        if isinstance(leaf, str):
            is_key = pointer.endswith(f"/{payloads.escape(leaf)}")
            kept = is_key or not leaf.strip() or leaf in held_texts or leaf in joined
        else:
            is_number = isinstance(leaf, int | float) and not isinstance(leaf, bool)
            kept = not is_number or float(str(leaf)) in held_numbers or str(leaf) in joined
        if not kept:
            missing.append(pointer)
    return missing
