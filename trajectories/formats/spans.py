"""Spans and log records in one shape, whichever way they were written: OTLP as JSON or protobuf, and their mishaps.

OTLP/JSON names ids in hexadecimal, numbers as text, enums as numbers; in the wild ids come in base64, enums by name,
keys in snake_case or without a value, and scopes under their old name.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

import msgspec
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan

from trajectories import limits, payloads
from trajectories.errors import Invalid
from trajectories.formats import lenient

KINDS = ("", "internal", "server", "client", "producer", "consumer")
NS = 1_000_000_000
INT64 = 2**63


class Event(msgspec.Struct, kw_only=True, omit_defaults=True):
    """An event of a span, or a log record that names the span."""

    name: str = ""
    time: int | None = None  # ns since 1970
    attributes: dict[str, object] = {}
    body: object = None
    trace_id: str = ""
    span_id: str = ""
    severity: str = ""
    scope: dict[str, object] = {}
    resource: dict[str, object] = {}
    extra: dict[str, object] = {}


class Span(msgspec.Struct, kw_only=True, omit_defaults=True):
    trace_id: str = ""
    span_id: str = ""
    parent_id: str = ""
    name: str = ""
    kind: str = ""
    start: int | None = None  # ns since 1970
    end: int | None = None
    attributes: dict[str, object] = {}
    events: list[Event] = []
    status: str = ""  # OK, ERROR or nothing
    message: str = ""  # of the status
    scope: dict[str, object] = {}
    resource: dict[str, object] = {}
    extra: dict[str, object] = {}


class Found(msgspec.Struct, kw_only=True):
    """What an export request or a file held; `bad`: why an entry is no span or log record."""

    spans: list[Span] = []
    logs: list[Event] = []
    bad: list[str] = []


def trace_id_is_good(value: str) -> bool:
    return bool(_TRACE.fullmatch(value)) and value != "0" * 32


def span_id_is_good(value: str) -> bool:
    return bool(_SPAN.fullmatch(value)) and value != "0" * 16


_TRACE = re.compile(r"[0-9a-f]{32}")
_SPAN = re.compile(r"[0-9a-f]{16}")


def moment(ns: int | None) -> datetime | None:
    """The time, where it is one that we can keep: not before 1970, not in the future."""
    if ns is None or ns <= 0:
        return None
    try:
        found = datetime.fromtimestamp(ns // NS, UTC).replace(microsecond=ns % NS // 1000)
    except (ValueError, OverflowError, OSError):
        return None
    return found if found <= datetime.now(UTC) + limits.CLOCK_SKEW else None


# --- JSON ----------------------------------------------------------------------------------------------------------

SPAN_KEYS = ("resourceSpans", "resource_spans", "batches")
LOG_KEYS = ("resourceLogs", "resource_logs")


def is_otlp(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(value.get(key), list) for key in (*SPAN_KEYS, *LOG_KEYS))


def of_json(value: object) -> Found:
    """What a decoded request, or a document of the collector's file exporter, holds.

    Raises:
        Invalid: it is no such document as a whole.
    """
    if not isinstance(value, dict):
        raise Invalid("An OTLP request is an object with resourceSpans or resourceLogs.", pointer="")
    found = Found()
    for resource, scope, one, place in _entries(value, SPAN_KEYS, _SCOPE_SPANS, ("spans",), found.bad):
        if isinstance(one, dict):
            found.spans.append(span(one, resource, scope))
        else:
            found.bad.append(f"{place} is no span but {type(one).__name__}")
    for resource, scope, one, place in _entries(value, LOG_KEYS, _SCOPE_LOGS, ("logRecords", "log_records"), found.bad):
        if isinstance(one, dict):
            found.logs.append(log(one, resource, scope))
        else:
            found.bad.append(f"{place} is no log record but {type(one).__name__}")
    return found


_SCOPE_SPANS = ("scopeSpans", "scope_spans", "instrumentationLibrarySpans", "instrumentation_library_spans")
_SCOPE_LOGS = ("scopeLogs", "scope_logs", "instrumentationLibraryLogs", "instrumentation_library_logs")
_Entry = tuple[dict[str, object], dict[str, object], object, str]


def _entries(
    value: Mapping[str, object],
    outer: Sequence[str],
    middle: Sequence[str],
    inner: Sequence[str],
    bad: list[str],
) -> Iterator[_Entry]:
    for top in outer:
        for number, group in enumerate(_list(value, (top,), "", bad)):
            place = f"/{top}/{number}"
            if not isinstance(group, dict):
                bad.append(f"{place} is no object")
                continue
            resource = attributes(lenient.mapping(group.get("resource")).get("attributes"))
            for key in middle:
                for at, scoped in enumerate(_list(group, (key,), place, bad)):
                    if not isinstance(scoped, dict):
                        bad.append(f"{place}/{key}/{at} is no object")
                        continue
                    scope = _scope(scoped.get("scope") or scoped.get("instrumentationLibrary"))
                    for last in inner:
                        below = f"{place}/{key}/{at}"
                        for index, one in enumerate(_list(scoped, (last,), below, bad)):
                            yield resource, scope, one, f"{below}/{last}/{index}"


def _list(value: Mapping[str, object], names: Sequence[str], place: str, bad: list[str]) -> list[object]:
    found: list[object] = []
    for name in names:
        inner = value.get(name)
        if isinstance(inner, list):
            found.extend(inner)
        elif inner is not None:
            bad.append(f"{place}/{name} is no list")
    return found


def _scope(value: object) -> dict[str, object]:
    told = dict(lenient.mapping(value))
    if inner := attributes(told.pop("attributes", None)):
        told["attributes"] = inner
    return {key: inner for key, inner in told.items() if inner not in (None, "", {}, [])}


def span(value: Mapping[str, object], resource: dict[str, object], scope: dict[str, object]) -> Span:
    """A span of OTLP/JSON; nothing in it can be so wrong that this raises."""
    take = _Taker(value)
    status = lenient.mapping(take("status"))
    return Span(
        trace_id=identifier(take("traceId", "trace_id"), 32),
        span_id=identifier(take("spanId", "span_id"), 16),
        parent_id=identifier(take("parentSpanId", "parent_span_id"), 16),
        name=_text(take("name")),
        kind=_kind(take("kind")),
        start=time(take("startTimeUnixNano", "start_time_unix_nano")),
        end=time(take("endTimeUnixNano", "end_time_unix_nano")),
        attributes=attributes(take("attributes")),
        events=[event(one) for one in lenient.objects(take("events"))],
        status=_status(status.get("code")),
        message=_text(status.get("message")),
        scope=scope,
        resource=resource,
        extra=take.rest(),
    )


def event(value: Mapping[str, object]) -> Event:
    take = _Taker(value)
    return Event(
        name=_text(take("name")),
        time=time(take("timeUnixNano", "time_unix_nano")),
        attributes=attributes(take("attributes")),
        extra=take.rest(),
    )


def log(value: Mapping[str, object], resource: dict[str, object], scope: dict[str, object]) -> Event:
    take = _Taker(value)
    told = attributes(take("attributes"))
    name = _text(take("eventName", "event_name")) or _text(told.get("event.name"))
    at = time(take("timeUnixNano", "time_unix_nano"))
    observed = take("observedTimeUnixNano", "observed_time_unix_nano")
    return Event(
        name=name,
        time=at or time(observed),
        attributes=told,
        body=any_value(take("body")),
        trace_id=identifier(take("traceId", "trace_id"), 32),
        span_id=identifier(take("spanId", "span_id"), 16),
        severity=_text(take("severityText", "severity_text")) or _text(take("severityNumber", "severity_number")),
        scope=scope,
        resource=resource,
        extra=take.rest(),
    )


class _Taker:
    """Takes values by any of their names; the rest is kept."""

    def __init__(self, value: Mapping[str, object]) -> None:
        self.left = dict(value)

    def __call__(self, *names: str) -> object:
        found: object = None
        for name in names:
            if name in self.left and found is None:
                found = self.left.pop(name)
        return found

    def rest(self) -> dict[str, object]:
        dull = ("flags", "droppedAttributesCount", "dropped_attributes_count", "traceState", "trace_state")
        return {
            key: inner
            for key, inner in self.left.items()
            if inner not in (None, "", [], {}) and not (key in dull and inner in (0, "", 1, 3, 256, 257))
        }


def identifier(value: object, digits: int) -> str:
    """An id in lower-case hexadecimal where it is one, in hexadecimal, base64, or as a number; else as it came."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 16**digits:
        return f"{value:0{digits}x}"
    if not isinstance(value, str) or not value:
        return ""
    text = value.removeprefix("0x").lower()
    if len(text) == digits and re.fullmatch(r"[0-9a-f]+", text):
        return "" if set(text) == {"0"} else text
    if len(value) in (12, 24) and value.endswith("="):
        try:
            raw = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) * 2 == digits:
            return raw.hex()
    return value


def time(value: object) -> int | None:
    """Nanoseconds since 1970, from a number, a number as text, or ISO 8601 text."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, float):
        value = int(value) if value == value and abs(value) < INT64 else None
    if isinstance(value, str):
        text = value.strip()
        if re.fullmatch(r"\d{1,20}", text):
            value = int(text)
        else:
            try:
                found = payloads.utc(datetime.fromisoformat(text[:64]))
            except (ValueError, OverflowError):
                return None
            fraction = re.search(r"\.(\d{7,9})", text)
            ns = int(fraction[1].ljust(9, "0")) if fraction else found.microsecond * 1000
            value = int((found.replace(microsecond=0) - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()) * NS + ns
    return value if isinstance(value, int) and 0 < value < INT64 else None


def attributes(value: object) -> dict[str, object]:
    """[{"key", "value": AnyValue}] as an object; an object stays one. A key that comes twice keeps its last value."""
    if isinstance(value, dict):
        return {str(key): inner for key, inner in value.items()}
    found: dict[str, object] = {}
    for one in lenient.objects(value):
        key = one.get("key")
        if isinstance(key, str) and key:
            found[key] = any_value(one.get("value"))
    return found


_ANY = {
    key: name
    for name in ("stringValue", "boolValue", "intValue", "doubleValue", "arrayValue", "kvlistValue", "bytesValue")
    for key in (name, re.sub("V", "_v", name))
}


def any_value(value: object, depth: int = 0) -> object:
    """The value inside an AnyValue; anything else stays as it is."""
    if not isinstance(value, dict) or depth > 100:
        return value
    if not value:
        return None
    if len(value) != 1:
        return value
    ((key, inner),) = value.items()
    name = _ANY.get(str(key))
    if name is None:
        return value
    if name == "intValue":
        return _int(inner)
    if name == "doubleValue":
        return float(inner) if isinstance(inner, int) and abs(inner) < 2**53 else inner
    if name == "arrayValue":
        listed = inner.get("values") if isinstance(inner, dict) else inner
        return [any_value(one, depth + 1) for one in lenient.listed(listed)]
    if name == "kvlistValue":
        listed = inner.get("values") if isinstance(inner, dict) else inner
        return {
            str(one["key"]): any_value(one.get("value"), depth + 1)
            for one in lenient.objects(listed)
            if one.get("key") is not None
        }
    return inner


def _int(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,19}", value.strip()):
        found = int(value)
        return found if -INT64 <= found < INT64 else value
    return value


def _text(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None or isinstance(value, dict | list) else str(value)


def _kind(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return KINDS[value] if 0 <= value < len(KINDS) else str(value)
    name = _text(value).removeprefix("SPAN_KIND_").removeprefix("SpanKind.").lower()
    return "" if name == "unspecified" else KINDS[int(name)] if name in ("0", "1", "2", "3", "4", "5") else name


def _status(value: object) -> str:
    name = _text(value).removeprefix("STATUS_CODE_").removeprefix("StatusCode.").upper()
    return {"1": "OK", "2": "ERROR", "OK": "OK", "ERROR": "ERROR"}.get(name, "")


# --- protobuf ------------------------------------------------------------------------------------------------------


def traces_of_protobuf(raw: bytes) -> Found:
    """Raises Invalid: it is no ExportTraceServiceRequest."""
    request = ExportTraceServiceRequest()
    try:
        request.ParseFromString(raw)
    except DecodeError as exc:
        raise Invalid(f"The body is no ExportTraceServiceRequest: {exc}", pointer="") from None
    found = Found()
    for group in request.resource_spans:
        resource = _resource(group.resource)
        for scoped in group.scope_spans:
            scope = _proto_scope(scoped.scope)
            found.spans.extend(_proto_span(one, resource, scope) for one in scoped.spans)
    return found


def logs_of_protobuf(raw: bytes) -> Found:
    """Raises Invalid: it is no ExportLogsServiceRequest."""
    request = ExportLogsServiceRequest()
    try:
        request.ParseFromString(raw)
    except DecodeError as exc:
        raise Invalid(f"The body is no ExportLogsServiceRequest: {exc}", pointer="") from None
    found = Found()
    for group in request.resource_logs:
        resource = _resource(group.resource)
        for scoped in group.scope_logs:
            scope = _proto_scope(scoped.scope)
            found.logs.extend(_proto_log(one, resource, scope) for one in scoped.log_records)
    return found


def _resource(value: Resource) -> dict[str, object]:
    return _pairs(value.attributes)


def _proto_scope(value: InstrumentationScope) -> dict[str, object]:
    told = {"name": value.name, "version": value.version, "attributes": _pairs(value.attributes)}
    return {key: inner for key, inner in told.items() if inner}


def _proto_span(value: ProtoSpan, resource: dict[str, object], scope: dict[str, object]) -> Span:
    links = [
        {"traceId": one.trace_id.hex(), "spanId": one.span_id.hex(), "attributes": _pairs(one.attributes)}
        for one in value.links
    ]
    return Span(
        trace_id=_hex(value.trace_id),
        span_id=_hex(value.span_id),
        parent_id=_hex(value.parent_span_id),
        name=value.name,
        kind=_kind(int(value.kind)),
        start=time(value.start_time_unix_nano),
        end=time(value.end_time_unix_nano),
        attributes=_pairs(value.attributes),
        events=[
            Event(name=one.name, time=time(one.time_unix_nano), attributes=_pairs(one.attributes))
            for one in value.events
        ],
        status=_status(int(value.status.code)),
        message=value.status.message,
        scope=scope,
        resource=resource,
        extra={"links": links} if links else {},
    )


def _proto_log(value: LogRecord, resource: dict[str, object], scope: dict[str, object]) -> Event:
    told = _pairs(value.attributes)
    return Event(
        name=value.event_name or _text(told.get("event.name")),
        time=time(value.time_unix_nano) or time(value.observed_time_unix_nano),
        attributes=told,
        body=_proto_value(value.body),
        trace_id=_hex(value.trace_id),
        span_id=_hex(value.span_id),
        severity=value.severity_text or (str(int(value.severity_number)) if value.severity_number else ""),
        scope=scope,
        resource=resource,
    )


def _hex(value: bytes) -> str:
    return value.hex() if any(value) else ""


def _pairs(values: Sequence[KeyValue]) -> dict[str, object]:
    return {one.key: _proto_value(one.value) for one in values if one.key}


def _proto_value(value: AnyValue) -> object:
    which = value.WhichOneof("value")
    if which == "array_value":
        return [_proto_value(one) for one in value.array_value.values]
    if which == "kvlist_value":
        return _pairs(value.kvlist_value.values)
    if which == "bytes_value":
        return base64.b64encode(value.bytes_value).decode()
    if which is None:
        return None
    found: object = getattr(value, which)
    return lenient.clean(found)
