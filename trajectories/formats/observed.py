"""A run that was watched as a tree of spans: which of them are calls to a model, and what the tools answered.

The same call is often seen twice, by a framework and by the client that it uses, and what stands around calls repeats
their totals: a call is a model's span that has no other one inside of it, and only its own tokens count.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

import msgspec

from trajectories.formats import conversations, dialects, lenient, messages
from trajectories.formats.conversations import Call, Laid
from trajectories.payloads import ActionCallPayload, LlmCallPayload, StepPayload

Object = dict[str, object]
DEPTH = 200
LAST = datetime.max.replace(tzinfo=UTC)
PREFIXES = ("running tool: ", "execute_tool ", "tool.", "call_tool ", "tool ")


class Span(msgspec.Struct, kw_only=True):
    """One span of the tree, told in the sender's words under `raw`."""

    id: str
    parent: str | None
    kind: Literal["model", "tool", "other"]
    name: str
    began: datetime | None
    ended: datetime | None
    order: tuple[object, ...] = ()
    input: object = None
    output: object = None
    fields: Mapping[str, object] = {}  # of LlmCallPayload
    error: object = None
    raw: Object


class Run(msgspec.Struct, kw_only=True):
    laid: Laid
    spans: list[Object]  # those that are no calls, as they were sent
    calls: list[Span]


def run(spans: Sequence[Span], *, bulky: Sequence[str]) -> Run:
    """The calls as steps. `bulky`: fields of `raw` that are kept only where the calls do not say the same."""
    ordered = sorted(spans, key=lambda one: (one.began or LAST, one.order, one.id))
    inner = _model_spans_inside(ordered)
    chosen = [one for one in ordered if one.kind == "model" and not inner[one.id] and _says_something(one)]
    around = _twins(chosen, inner, {one.id: one for one in ordered})
    calls = [_call(one, around.get(one.id)) for one in chosen]
    laid = _with_results(conversations.lay(calls), [one for one in ordered if one.kind != "model"])
    known = conversations.leaves(laid.steps)
    steps = list(laid.steps)
    for number, one in enumerate(chosen):
        rest: Object = {}
        for key, value in one.raw.items():
            left = _untold(dialects.opened_deep(value), known) if key in bulky else value
            if left not in (None, {}, [], ""):
                rest[key] = left
        call = steps[number].llm_calls[0]
        call = msgspec.structs.replace(call, extra={**call.extra, "span": rest})
        steps[number] = msgspec.structs.replace(steps[number], llm_calls=(call,))
    taken = {one.id for one in chosen}
    return Run(
        laid=msgspec.structs.replace(laid, steps=tuple(steps)),
        spans=[one.raw for one in ordered if one.id not in taken],
        calls=chosen,
    )


def _untold(value: object, known: set[str]) -> object:
    """The value without the parts of which nothing is new; None where that is all of it."""
    if isinstance(value, dict):
        kept = {key: left for key, one in value.items() if (left := _untold(one, known)) is not None}
        return kept or None
    if isinstance(value, list):
        lefts = [_untold(one, known) for one in value]
        return lefts if any(left is not None for left in lefts) else None
    return None if conversations.leaves(value) <= known else value


def _says_something(one: Span) -> bool:
    """Some senders mark the start and the end of a call by spans of their own."""
    told = (one.fields.get("prompt_tokens"), one.fields.get("completion_tokens"))
    return bool(any(told) or one.input not in (None, "", {}, []) or one.output not in (None, "", {}, []) or one.error)


def _model_spans_inside(spans: Sequence[Span]) -> Mapping[str, set[str]]:
    """By span: the model's spans below it."""
    by_id = {one.id: one for one in spans}
    inside: dict[str, set[str]] = defaultdict(set)
    for one in spans:
        if one.kind != "model" or not _says_something(one):
            continue
        above = one.parent
        for _ in range(DEPTH):
            if above is None or above not in by_id or above == one.id:
                break
            inside[above].add(one.id)
            above = by_id[above].parent
    return inside


def _twins(chosen: Sequence[Span], inner: Mapping[str, set[str]], by_id: Mapping[str, Span]) -> dict[str, Span]:
    """The model's span around a call that holds this call alone: the same call, seen by the framework."""
    found: dict[str, Span] = {}
    for one in chosen:
        above = by_id.get(one.parent or "")
        if above is not None and above.kind == "model" and inner[above.id] == {one.id}:
            found[one.id] = above
    return found


def _call(one: Span, twin: Span | None) -> Call:
    said = dialects.answer(one.output)
    told: Object = dict(one.fields)
    if twin is not None and not (said or {}).get("tool_calls"):
        better = dialects.answer(twin.output)
        if better is not None and (better.get("tool_calls") or said is None):
            said = better
    if one.error is not None:
        told["error"] = one.error
    if said is not None and told.get("finish_reason") is None and isinstance(said.get("finish_reason"), str):
        told["finish_reason"] = said.pop("finish_reason")
    if one.began is not None and one.ended is not None and one.ended >= one.began:
        told["latency_ms"] = (one.ended - one.began).total_seconds() * 1000
    call = conversations.answer(said, told) if said else msgspec.structs.replace(LlmCallPayload(), **told)
    return Call(prompt=dialects.prompt(one.input), call=call, step={"timestamp": one.began})


def _with_results(laid: Laid, tools: Sequence[Span]) -> Laid:
    """Results that no prompt repeats come from the spans of the tools."""
    free = list(tools)
    steps: list[StepPayload] = []
    changed = False
    for step in laid.steps:
        action = step.action
        if action is None or not action.calls:
            steps.append(step)
            continue
        asked = messages.tool_calls(step.llm_calls[0])
        made: list[ActionCallPayload] = []
        for one, call in zip(asked, action.calls, strict=False):
            span = _take(free, *messages.function_of(one))
            if span is not None and call.result is None and call.error is None:
                call = msgspec.structs.replace(call, result=_result(span.output), error=span.error)
                changed = True
            made.append(call)
        steps.append(msgspec.structs.replace(step, action=msgspec.structs.replace(action, calls=tuple(made))))
    if not changed:
        return laid
    return msgspec.structs.replace(laid, steps=tuple(steps), derived_actions=False)


def _take(free: list[Span], name: str, arguments: object) -> Span | None:
    """The first span of the tool with these arguments that no other call has taken, or the first of its name."""
    wanted = dialects.opened(arguments)
    named = [one for one in free if _bare(one.name) == name]
    found = next((one for one in named if _arguments(one.input) == wanted), None) or next(iter(named), None)
    if found is not None:
        free.remove(found)
    return found


def _bare(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _arguments(value: object) -> object:
    value = dialects.opened(value)
    if isinstance(value, dict) and set(value) == {"input"}:
        return dialects.opened(value["input"])
    return value


def _result(value: object) -> object:
    value = dialects.opened(value)
    if isinstance(value, dict) and set(value) == {"output"}:
        value = dialects.opened(value["output"])
    if dialects.is_message(value):
        made = dialects.message(value)
        return made[0].get("content")
    return value


def tools(value: object) -> list[Object] | None:
    """Definitions of tools as OpenAI's chat has them, from any request that names them."""
    value = dialects.opened(value)
    if isinstance(value, list):
        return [told for one in value if (told := dialects.definition(one)) is not None] or None
    found = lenient.mapping(value)
    sent = found.get("tools", lenient.mapping(found.get("config")).get("tools"))
    made: list[Object] = []
    for one in lenient.objects(dialects.opened(sent)):
        declared = lenient.objects(one.get("function_declarations", one.get("functionDeclarations")))
        if declared:
            made.extend({"type": "function", "function": each} for each in declared)
        elif isinstance(one.get("function"), dict) or "type" in one:
            made.append(one)
        else:
            made.append({"type": "function", "function": one})
    return made or None
