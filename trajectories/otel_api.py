"""OTLP over HTTP: what a stock exporter sends to `/otel/v1/traces` and `/otel/v1/logs`, JSON or protobuf.

Answers are OTLP's: `Export…ServiceResponse` with a partial success where something was rejected or put into quarantine;
refusals are a `google.rpc.Status` in the request's own encoding. An exporter sends again after 429 and 503 alone, so
what can succeed later is one of these.

https://opentelemetry.io/docs/specs/otlp/#otlphttp
"""

from collections.abc import Mapping
from typing import ClassVar

from django.http import HttpResponse
from drf_spectacular.utils import extend_schema
from google.protobuf import json_format
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from rest_framework.request import Request
from rest_framework.response import Response

from trajectories import body, limits, otlp, payloads
from trajectories.formats import lenient, spans
from trajectories.formats.spans import Found
from trajectories.otlp import Kept
from trajectories.views import ProjectAPIView

PROTOBUF, JSON = "application/x-protobuf", "application/json"
KINDS = {PROTOBUF: PROTOBUF, "application/protobuf": PROTOBUF, JSON: JSON}
# Status of google.rpc by ours; https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto
CODES = {400: 3, 401: 16, 403: 7, 404: 5, 405: 12, 409: 10, 413: 8, 415: 3, 429: 8, 503: 14, 507: 14}
INTERNAL = 13
LATER = {409: 503, 507: 503}  # a redaction rule that is broken, a full disk: somebody mends it


class _Export(ProjectAPIView):
    """Spans or log records, kept before they are acknowledged; trajectories are made of them behind the write."""

    what: ClassVar[str]

    def read(self, raw: bytes, kind: str) -> Found:
        raise NotImplementedError

    def answered(self, kept: Kept) -> ExportTraceServiceResponse | ExportLogsServiceResponse:
        raise NotImplementedError

    def receive(self, request: Request) -> HttpResponse:
        kind = _kind(request)
        if kind is None:
            body.drain(request)
            raise body.Unsupported(
                f"OTLP comes as {PROTOBUF} or {JSON}, not as {(request.content_type or 'nothing')[:100]!r}."
            )
        with body.held(request, limits.OTLP_BYTES, what=f"The {self.what}") as raw:
            kept = otlp.keep(self.project, self.read(raw, kind))
        told = self.answered(kept)
        if kind == JSON:
            return HttpResponse(json_format.MessageToJson(told, indent=None), content_type=JSON)
        return HttpResponse(told.SerializeToString(), content_type=PROTOBUF)

    def finalize_response(self, request: Request, response: Response, *args: object, **kwargs: object) -> Response:
        """Refusals, whoever made them, as OTLP has them."""
        made = super().finalize_response(request, response, *args, **kwargs)
        if made.status_code < 400:
            return made
        data = made.data if isinstance(made.data, Mapping) else {}
        code = CODES.get(made.status_code, INTERNAL)
        kind = _kind(request) or JSON
        made.content = _status(code, str(data.get("detail") or "This cannot be taken."), kind)  # so it is rendered
        made["Content-Type"] = kind
        made.status_code = LATER.get(made.status_code, made.status_code)
        if made.status_code == 503 and "Retry-After" not in made.headers:
            made["Retry-After"] = "30"
        return made


class Traces(_Export):
    """`POST /otel/v1/traces`"""

    what = "export of spans"

    @extend_schema(operation_id="export_spans", request=dict, responses={200: dict})
    def post(self, request: Request) -> HttpResponse:
        return self.receive(request)

    def read(self, raw: bytes, kind: str) -> Found:
        return spans.traces_of_protobuf(raw) if kind == PROTOBUF else spans.of_json(_loads(raw))

    def answered(self, kept: Kept) -> ExportTraceServiceResponse:
        told = ExportTraceServiceResponse()
        if kept.rejected or kept.said:
            told.partial_success.rejected_spans = kept.rejected
            told.partial_success.error_message = kept.message
        return told


class Logs(_Export):
    """`POST /otel/v1/logs`"""

    what = "export of log records"

    @extend_schema(operation_id="export_log_records", request=dict, responses={200: dict})
    def post(self, request: Request) -> HttpResponse:
        return self.receive(request)

    def read(self, raw: bytes, kind: str) -> Found:
        return spans.logs_of_protobuf(raw) if kind == PROTOBUF else spans.of_json(_loads(raw))

    def answered(self, kept: Kept) -> ExportLogsServiceResponse:
        told = ExportLogsServiceResponse()
        if kept.rejected or kept.said:
            told.partial_success.rejected_log_records = kept.rejected
            told.partial_success.error_message = kept.message
        return told


def _kind(request: Request) -> str | None:
    given = (request.content_type or "").partition(";")[0].strip().lower()
    return KINDS.get(given)


def _loads(raw: bytes) -> object:
    return lenient.loads(raw) if raw.strip() else {}


def _status(code: int, message: str, kind: str) -> bytes:
    """google.rpc.Status{code = 1, message = 2}, whose own package nothing else here needs."""
    if kind == JSON:
        return payloads.encode({"code": code, "message": message})
    text = message.encode("utf-8", "replace")
    return bytes((0x08, code, 0x12)) + _varint(len(text)) + text


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*made, number))
