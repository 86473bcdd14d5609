"""What an attempt said and did, turn by turn, so that two attempts can be held against each other.

A turn is one message, or one thing of a step that is no message: a state of the environment, data that was looked up,
an action. Two turns are the same when their canonical bytes are; ids of tool calls are drawn anew in every run and say
nothing, so they are left out of them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from trajectories import payloads, shown, transcripts
from trajectories.payloads import ActionPayload, Message, TrajectoryPayload

SAYS_NOTHING = frozenset({"id", "tool_call_id", "weight"})  # of a message; drawn anew or for the trainer
MESSAGES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
KINDS = MESSAGES | {"environment", "provider", "action", "reasoning", "call", "error"}
KEPT_APART = "[a large part that is kept apart; its step's page opens it]"
LOOK_BACK = 8  # conversations that another one may repeat the beginning of


class Turn(NamedTuple):
    """One thing that was said or done. `key` decides whether it is the same as another attempt's."""

    key: bytes
    step: int  # 0-based
    role: str  # system, user, assistant, tool, environment, provider, action
    said: object  # the message, or what stands in its place


@dataclass(frozen=True, slots=True)
class Line:
    """A part of a turn as pages show it."""

    role: str  # as the turn's, or reasoning, call, error
    text: str
    note: str = ""  # name of a tool or a provider

    @property
    def kind(self) -> str:
        """The role where it is one that pages know the look of: a sender may write anything there."""
        return self.role if self.role in KINDS else "other"


def of(payload: TrajectoryPayload, marks: Mapping[str, int] | None = None) -> list[Turn]:
    """The turns of an attempt in the order of its steps; a beginning that several of its conversations share is
    there once.

    Args:
        marks: texts that stand for large parts, see segments.load_many(open_blobs=False).
    """
    by_step: dict[int, list[Turn]] = {}
    earlier: list[list[bytes]] = []
    seam = _Marks(marks or {})
    for history in transcripts.played(payload):
        keys = [seam.key(_told(message)) for message in history.messages]
        known = max((_shared(keys, one) for one in earlier[-LOOK_BACK:]), default=0)
        earlier.append(keys)
        calls = iter(history.calls)
        call = next(calls, None)
        last = 0
        for at, message in enumerate(history.messages):
            while call is not None and call.at < at:
                last, call = call.step, next(calls, None)
            step = call.step if call is not None else last
            # What comes back from a tool belongs to the step that asked.
            if call is not None and at < call.at and at > 0 and str(message.get("role")) == "tool":
                step = last
            if at >= known:
                by_step.setdefault(step, []).append(
                    Turn(keys[at], step, shown.visible(str(message.get("role") or "message")[:40]), seam.text(message))
                )
    found: list[Turn] = []
    for number, step_payload in enumerate(payload.steps):
        if step_payload.environment_state:
            found.append(_part(seam, number, "environment", step_payload.environment_state))
        for access in step_payload.provider_accesses:
            found.append(_part(seam, number, "provider", msgspec.to_builtins(access)))
        found += by_step.pop(number, [])
        if step_payload.action is not None:
            found.append(_part(seam, number, "action", _action(step_payload.action)))
    for rest in by_step.values():
        found += rest
    return found


def _part(seam: "_Marks", step: int, role: str, value: object) -> Turn:
    return Turn(seam.key([role, value]), step, role, seam.text(value))


def _action(action: ActionPayload) -> dict[str, object]:
    told = msgspec.to_builtins(action)
    assert isinstance(told, dict)
    told["calls"] = [
        {key: value for key, value in one.items() if key not in SAYS_NOTHING} for one in told.get("calls", [])
    ]
    return {key: value for key, value in told.items() if value not in (None, "", [], {})}


def _told(message: Message) -> dict[str, object]:
    """What of a message makes it the same as another."""
    told = {key: value for key, value in message.items() if key not in SAYS_NOTHING and value not in (None, "", [])}
    calls = told.get("tool_calls")
    if isinstance(calls, list):
        told["tool_calls"] = [_call(one) for one in calls]
    return told


def _call(call: object) -> object:
    if not isinstance(call, dict):
        return call
    function = call.get("function")
    inner = function if isinstance(function, dict) else call
    return [inner.get("name"), _parsed(inner.get("arguments"))]


def _parsed(arguments: object) -> object:
    """Arguments are JSON text: two spellings of one object are the same call."""
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed: object = msgspec.json.decode(arguments)
    except (msgspec.MsgspecError, RecursionError, UnicodeEncodeError):
        return arguments
    return parsed


def _shared(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class _Marks:
    """Puts what is the same everywhere in the place of marks that are drawn anew for each trajectory."""

    def __init__(self, marks: Mapping[str, int]) -> None:
        self.pks = {mark.encode(): b"blob %d" % pk for mark, pk in marks.items()}
        names = sorted(self.pks, key=len, reverse=True)
        self.any = re.compile(b"|".join(map(re.escape, names))) if names else None

    def key(self, value: object) -> bytes:
        told = payloads.canonical(value)
        if self.any is None:
            return told
        return self.any.sub(lambda found: self.pks[found[0]], told)

    def text(self, value: object) -> object:
        if self.any is None:
            return value
        raw = payloads.encode(value)
        if not self.any.search(raw):
            return value
        said: object = msgspec.json.decode(self.any.sub(KEPT_APART.encode(), raw))
        return said


# --- as pages show it ------------------------------------------------------------------------------------------------


def lines(turn: Turn) -> list[Line]:
    """A turn in the parts that a page shows: what it thought, said, called."""
    if isinstance(turn.said, dict) and turn.role not in ("environment", "provider", "action"):
        return list(_of_message(turn.role, turn.said))
    if turn.role == "action" and isinstance(turn.said, dict):
        return list(_of_action(turn.said))
    if turn.role == "provider" and isinstance(turn.said, dict):
        named = " ".join(str(turn.said[key]) for key in ("provider_name", "purpose") if turn.said.get(key))
        return [Line("provider", pretty(turn.said.get("data")), shown.visible(named[:200]))]
    return [Line(turn.role, pretty(turn.said))]


def _of_message(role: str, message: Mapping[str, object]) -> Iterator[Line]:
    thought = message.get("reasoning_content") or message.get("reasoning")
    if thought:
        yield Line("reasoning", pretty(thought))
    text = transcripts.text_of(dict(message))
    calls = message.get("tool_calls")
    listed = calls if isinstance(calls, list) else []
    name = message.get("name")
    if text or not listed:
        yield Line(role, shown.visible(text), shown.visible(str(name)[:200]) if name else "")
    for one in listed:
        function = one.get("function") if isinstance(one, dict) else None
        inner = function if isinstance(function, dict) else one
        if not isinstance(inner, dict):
            yield Line("call", pretty(inner))
            continue
        yield Line("call", pretty(_parsed(inner.get("arguments"))), shown.visible(str(inner.get("name"))[:200]))


def _of_action(action: Mapping[str, object]) -> Iterator[Line]:
    success = action.get("success")
    outcome = "" if success is None else (", succeeded" if success else ", failed")
    rest = {key: action[key] for key in ("parameters", "reasoning", "result") if key in action}
    yield Line("action", pretty(rest) if rest else "", shown.visible(f"{action.get('action_type', '')}{outcome}"[:200]))
    if action.get("error") is not None:
        yield Line("error", pretty(action["error"]))
    calls = action.get("calls")
    for one in calls if isinstance(calls, list) else []:
        if isinstance(one, dict):
            yield Line("tool", pretty(one.get("result", one.get("error"))))


def pretty(value: object) -> str:
    """Text as it is, anything else as short JSON on lines of its own."""
    if value is None:
        return ""
    if isinstance(value, str):
        return shown.visible(value)
    raw = payloads.encode(value)
    if len(raw) > 60:
        raw = msgspec.json.format(raw, indent=2)
    return shown.visible(raw.decode())
