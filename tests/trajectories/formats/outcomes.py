"""What a reader made of a document, and what of the document is missing in it."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec

from trajectories.errors import Problem
from trajectories.formats import Reads, messages
from trajectories.formats.incoming import Incoming
from trajectories.payloads import TrajectoryPayload
from trajectories.transcripts import histories


def document(path: Path) -> object:
    raw = path.read_bytes()
    return json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)


def read(module: Reads, value: object, source: str = "run.json") -> list[Incoming]:
    """The trajectories of a document in which none is bad."""
    assert module.recognises(value)
    found = list(module.read(value, source=source))
    assert not [one.detail for one in found if isinstance(one, Problem)]
    return [one for one in found if isinstance(one, Incoming)]


def one(module: Reads, value: object, source: str = "run.json") -> TrajectoryPayload:
    (found,) = read(module, value, source)
    return found.payload


def counts(found: list[Incoming]) -> tuple[int, int, int, int, int]:
    """(trajectories, calls, tool calls, prompt tokens, completion tokens)"""
    calls = [call for one in found for call in one.payload.calls()]
    return (
        len(found),
        len(calls),
        sum(len(messages.tool_calls(call)) for call in calls),
        sum(call.prompt_tokens or 0 for call in calls),
        sum(call.completion_tokens or 0 for call in calls),
    )


def texts(value: object) -> Iterator[str]:
    """Every text in a value; JSON inside of a text is opened."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts(inner)
    elif isinstance(value, str):
        if value[:1] in ("{", "[", '"') and len(value) > 1:
            try:
                inner = json.loads(value)
            except ValueError:
                pass
            else:
                yield from texts(inner)
                return
        yield value


def lost(value: object, *payloads: TrajectoryPayload, structural: frozenset[str] = frozenset()) -> set[str]:
    """Texts of the document that are in none of the payloads. Roles and the like may have become structure."""
    kept: set[str] = set()
    for payload in payloads:
        kept.update(texts(msgspec.to_builtins(payload)))
    return {text for text in texts(value) if text not in kept} - {"assistant", ""} - structural


def roles(payload: TrajectoryPayload) -> list[list[object]]:
    """Of each conversation, the roles in order."""
    return [[message["role"] for message in history.messages] for history in histories(payload)]
