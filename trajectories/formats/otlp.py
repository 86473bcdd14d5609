"""Files of spans: OTLP (JSON, lines of the collector's file exporter, protobuf), SDK-style lists, Jaeger's export.

A trace is a trajectory, or a conversation where its spans name one. Spans without ids and times, as some tests and
tools keep single ones, are a trajectory each.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trajectories.errors import Invalid, Problem
from trajectories.formats import files, lenient, spans, traces
from trajectories.formats.incoming import Incoming
from trajectories.formats.spans import Event, Found, Span

NAME = "otlp"
ALIASES = ("otel", "opentelemetry", "openinference", "jaeger")
SUFFIXES = (".binpb", ".pb")
SPAN_KEYS = ({"trace_id", "traceId", "traceID"}, {"span_id", "spanId", "spanID"})
JAEGER_US = 1_000  # nanoseconds: Jaeger's times are microseconds


def recognises(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return spans.is_otlp(value) or _is_flat(value) or _is_jaeger(value) or _is_bare(value)


def _is_flat(value: Mapping[str, object]) -> bool:
    """A span as SDKs print it."""
    return all(names & value.keys() for names in SPAN_KEYS) and bool(
        {"attributes", "start_time", "startTimeUnixNano", "start_time_unix_nano"} & value.keys()
    )


def _is_bare(value: Mapping[str, object]) -> bool:
    """A span of OTLP/JSON by itself, perhaps without its ids."""
    attributes = value.get("attributes")
    if not isinstance(value.get("name"), str) or not isinstance(attributes, list) or not attributes:
        return False
    return all(isinstance(one, dict) and "key" in one and len(one) <= 2 for one in attributes[:3]) and (
        "kind" in value or "traceId" in value or "startTimeUnixNano" in value
    )


def _is_jaeger(value: Mapping[str, object]) -> bool:
    listed = value.get("data")
    first = listed[0] if isinstance(listed, list) and listed else value
    return isinstance(first, dict) and isinstance(first.get("spans"), list) and "traceID" in first


def gather(values: Sequence[object], *, source: str) -> Iterator[Incoming | Problem]:
    found = Found()
    for number, value in enumerate(values):
        _collect(value, found, f"{source}#{number}")
    yield from _trajectories(found)


def _collect(value: object, found: Found, place: str) -> None:
    if not isinstance(value, dict):
        found.bad.append(f"{place} is no span but {type(value).__name__}")
    elif spans.is_otlp(value):
        more = spans.of_json(value)
        found.spans += more.spans
        found.logs += more.logs
        found.bad += more.bad
    elif _is_jaeger(value):
        for trace in lenient.objects(value.get("data", [value])):
            found.spans += _of_jaeger(trace)
    elif _is_flat(value) and not _is_bare(value):
        found.spans.append(_of_flat(value))
    else:
        found.spans.append(_with_ids(spans.span(value, spans.attributes(value.get("resource")), {}), value))


def _with_ids(span: Span, value: object) -> Span:
    """A span that was kept without its ids gets some of its content: the same file again is the same span."""
    if not span.trace_id:
        span.trace_id = lenient.digest(value)[:32].ljust(32, "0")
    if not span.span_id:
        span.span_id = span.trace_id[:16]
    return span


def _trajectories(found: Found) -> Iterator[Incoming | Problem]:
    for said in found.bad:
        yield Invalid(f"{said}.")
    for group in traces.groups(found.spans, found.logs):
        try:
            yield traces.trajectory(group, name=NAME, trajectory_id=traces.trajectory_id(group))
        except Problem as problem:
            yield type(problem)(f"Trace {group.key[:64]}: {problem.detail}", pointer=problem.pointer)


# --- spans as SDKs print them ----------------------------------------------------------------------------------------


def _of_flat(value: Mapping[str, object]) -> Span:
    """{"trace_id", "parent_span_id", "start_time": ns or ISO, "attributes": {…}, "span_events"}; also what `to_json` of
    the Python SDK gives, where ids are in "context"."""
    renamed: dict[str, object] = {}
    for name, inner in value.items():
        renamed[_NAMES.get(name, name)] = inner
    resource = renamed.pop("resource", None)
    scope = renamed.pop("scope", None)
    told = lenient.mapping(resource)
    events = [
        {**{_EVENTS.get(name, name): inner for name, inner in one.items()}}
        for one in lenient.objects(renamed.pop("events", None))
    ]
    span = spans.span(
        {**renamed, "events": events},
        spans.attributes(told.get("attributes", told)),
        {name: inner for name, inner in lenient.mapping(scope).items() if inner not in (None, "", {}, [])},
    )
    return _with_ids(span, dict(value))


_NAMES = {
    "trace_id": "traceId",
    "traceID": "traceId",
    "span_id": "spanId",
    "spanID": "spanId",
    "parent_span_id": "parentSpanId",
    "parent_id": "parentSpanId",
    "parentSpanID": "parentSpanId",
    "start_time": "startTimeUnixNano",
    "end_time": "endTimeUnixNano",
    "span_events": "events",
    "span_name": "name",
    "instrumentation_scope": "scope",
}
_EVENTS = {
    "event_name": "name",
    "timestamp": "timeUnixNano",
    "time": "timeUnixNano",
}


# --- Jaeger ----------------------------------------------------------------------------------------------------------


def _of_jaeger(trace: Mapping[str, object]) -> list[Span]:
    processes = lenient.mapping(trace.get("processes"))
    return [_jaeger_span(one, processes) for one in lenient.objects(trace.get("spans"))]


def _jaeger_span(value: Mapping[str, object], processes: Mapping[str, object]) -> Span:
    tags = _tags(value.get("tags"))
    process = lenient.mapping(processes.get(str(value.get("processID"))))
    resource = _tags(process.get("tags"))
    if isinstance(process.get("serviceName"), str):
        resource["service.name"] = process["serviceName"]
    parents = [one for one in lenient.objects(value.get("references")) if one.get("refType") in (None, "CHILD_OF")]
    start, length = lenient.whole(value.get("startTime")), lenient.whole(value.get("duration"))
    scope = {name: tags.pop(f"otel.scope.{name}") for name in ("name", "version") if f"otel.scope.{name}" in tags}
    failed = tags.pop("otel.status_code", None)
    told = {
        "traceId": _padded(value.get("traceID"), 32),
        "spanId": _padded(value.get("spanID"), 16),
        "parentSpanId": _padded(parents[0].get("spanID"), 16) if parents else "",
        "name": value.get("operationName"),
        "kind": tags.pop("span.kind", None),
        "startTimeUnixNano": start * JAEGER_US if start else None,
        "endTimeUnixNano": (start + (length or 0)) * JAEGER_US if start else None,
        "attributes": tags,
        "status": {
            "code": failed or ("ERROR" if tags.get("error") is True else None),
            "message": tags.pop("otel.status_description", None),
        },
    }
    span = spans.span(told, resource, scope)
    span.events = [_jaeger_log(one) for one in lenient.objects(value.get("logs"))]
    if value.get("warnings"):
        span.extra["warnings"] = value["warnings"]
    return _with_ids(span, dict(value))


def _padded(value: object, digits: int) -> object:
    """Jaeger leaves leading zeros away."""
    return value.rjust(digits, "0") if isinstance(value, str) and 0 < len(value) < digits else value


def _tags(value: object) -> dict[str, object]:
    return {str(one.get("key")): one.get("value") for one in lenient.objects(value) if one.get("key")}


def _jaeger_log(value: Mapping[str, object]) -> Event:
    told = _tags(value.get("fields"))
    at = lenient.whole(value.get("timestamp"))
    name = told.pop("event", "")
    return Event(name=str(name or ""), time=at * JAEGER_US if at else None, attributes=told)


# --- protobuf --------------------------------------------------------------------------------------------------------

TRACES, LOGS = ".traces.", ".logs."


def opens(path: Path) -> bool:
    return any(path.name.removesuffix(packed).endswith(SUFFIXES) for packed in ("", ".gz", ".zst"))


def lies_beside(path: Path) -> bool:
    """Log records are read along with the spans that they belong to."""
    return opens(path) and LOGS in path.name and _neighbour(path, LOGS, TRACES).exists()


def read_file(path: Path) -> Iterator[Incoming | Problem]:
    """`x.binpb` alone, or `x.traces.binpb` with `x.logs.binpb` beside it."""
    raw = files.whole(path)
    found = spans.logs_of_protobuf(raw) if LOGS in path.name else spans.traces_of_protobuf(raw)
    logs = _neighbour(path, TRACES, LOGS)
    if TRACES in path.name and logs.exists():
        found.logs += spans.logs_of_protobuf(files.whole(logs)).logs
    yield from _trajectories(found)


def _neighbour(path: Path, this: str, other: str) -> Path:
    return path.with_name(path.name.replace(this, other))
