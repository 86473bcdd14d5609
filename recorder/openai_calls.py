"""The calls of an OpenAI client, recorded as they are made: chat completions and responses, streamed or not.

The client is only listened to. What it is asked goes on as it is, its answers come back as they are, chunk by chunk;
a stream is read along from the bytes that pass. The package `openai` is never imported: whatever has its shape will do.
"""

import functools
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, cast

from . import completions, responses
from .completions import Body
from .current import here
from .events import chat_completion, document, events
from .harmless import now, reason
from .plain import Notes, encode, mapping
from .step import Step
from .trajectory import Outlet, Trajectory

C = TypeVar("C")

MOST_BYTES = 64 * 1024 * 1024  # of a stream that is read along; of a longer one the recording says so
LEFT = "the answer was not read to its end"
ABSENT = ("NotGiven", "Omit")  # types of what stands for an argument that was not given
DROPPED = ("extra_headers", "extra_query", "timeout")  # headers hold keys; the others are no part of what was asked
ONE_SHOT = ("messages", "input", "tools")  # what may be an iterator, which we must not use up


@dataclass(frozen=True)
class Told:
    """What only the agent's author knows of a client's calls."""

    purpose: str | None = None
    trainable: bool | None = None
    model_version: str | None = None
    logprobs_mode: Literal["raw", "processed"] | None = None
    tokenizer: str | None = None


class Kind(Protocol):
    """How one of the API's routes is read."""

    def call(self, request: Mapping[str, object], answer: Mapping[str, object]) -> Body: ...
    def whole(self, chunks: Iterator[Body]) -> Body: ...
    def finished(self, answer: Mapping[str, object]) -> bool: ...


class _Chat:
    def call(self, request: Mapping[str, object], answer: Mapping[str, object]) -> Body:
        return completions.call_of(request, answer)

    def whole(self, chunks: Iterator[Body]) -> Body:
        return chat_completion(chunks)

    def finished(self, answer: Mapping[str, object]) -> bool:
        choices = answer.get("choices")
        return isinstance(choices, list) and any(isinstance(one, dict) and one.get("finish_reason") for one in choices)


class _Responses:
    def call(self, request: Mapping[str, object], answer: Mapping[str, object]) -> Body:
        return responses.call_of(request, answer)

    def whole(self, chunks: Iterator[Body]) -> Body:
        return responses.whole(chunks)

    def finished(self, answer: Mapping[str, object]) -> bool:
        return answer.get("status") not in (None, "in_progress", "queued")


ROUTES: tuple[tuple[tuple[str, ...], Kind], ...] = (
    (("chat", "completions"), _Chat()),
    (("beta", "chat", "completions"), _Chat()),
    (("responses",), _Responses()),
)
HOLDERS = ("root_client", "root_async_client")  # where LangChain's chat models keep the clients that they ask by
METHODS = ("create", "parse")  # `stream` asks by `create`
MADE_OF_THEM = ("with_raw_response", "with_streaming_response")  # hold the methods as they were


class Recording(Outlet, Protocol):
    """The recorder, as a wrapped client sees it."""

    def start_call(self, started_at: str) -> Trajectory:
        """A trajectory for a call that is made outside of all."""
        ...


def wrap(recording: Recording, client: C, told: Told, *, outside: bool) -> C:
    """The same client, listened to. Twice is as once."""
    held = [one for name in HOLDERS if (one := getattr(client, name, None)) is not None]
    for one in held:
        wrap(recording, one, told, outside=outside)
    if held:
        return client
    for path, kind in ROUTES:
        resource: object = client
        for name in path:
            _forget_views(resource)
            resource = getattr(resource, name, None)
        if resource is None:
            continue
        for name in METHODS:
            method: object = getattr(resource, name, None)
            if callable(method) and not hasattr(method, "trainingsite_recorder"):
                setattr(resource, name, _listening(recording, method, kind, told, outside))
        _forget_views(resource)
    for name in ("copy", "with_options"):
        method = getattr(client, name, None)
        if callable(method) and not hasattr(method, "trainingsite_recorder"):
            setattr(client, name, _wrapped_copy(recording, method, told, outside))
    return client


def _forget_views(resource: object) -> None:
    for name in MADE_OF_THEM:
        getattr(resource, "__dict__", {}).pop(name, None)


def _wrapped_copy(recording: Recording, method: Callable[[], object], told: Told, outside: bool) -> object:
    @functools.wraps(method)
    def copy(*args: object, **kwargs: object) -> object:
        return wrap(recording, cast(Method, method)(*args, **kwargs), told, outside=outside)

    copy.trainingsite_recorder = True  # type: ignore[attr-defined]  # a mark of ours
    return copy


class Method(Protocol):
    def __call__(self, *args: object, **kwargs: object) -> object: ...


def _listening(recording: Recording, method: Callable[[], object], kind: Kind, told: Told, outside: bool) -> object:
    asked = cast(Method, method)

    @functools.wraps(method)
    def ask(*args: object, **kwargs: object) -> object:
        for name in ONE_SHOT:
            if isinstance(kwargs.get(name), Iterator):
                kwargs[name] = list(cast(Iterator[object], kwargs[name]))
        call = _Call(recording, kind, told, outside)
        call.asked(kwargs)
        try:
            answer = asked(*args, **kwargs)
        except BaseException as exc:
            call.failed(exc)
            raise
        if inspect.isawaitable(answer):
            return _awaited(call, answer)
        return call.answered(answer)

    ask.trainingsite_recorder = True  # type: ignore[attr-defined]  # a mark of ours
    return ask


async def _awaited(call: "_Call", answer: Awaitable[object]) -> object:
    try:
        came = await answer
    except BaseException as exc:  # of cancelling too
        call.failed(exc)
        raise
    return call.answered(came)


class _Call:
    """One call: what was asked, and what of the answer has come by."""

    def __init__(self, recording: Recording, kind: Kind, told: Told, outside: bool) -> None:
        self.step: Step | None = None
        self._recording = recording
        self._kind = kind
        self._told = told
        self._outside = outside
        self._trajectory: Trajectory | None = None
        self._request: Body = {}
        self._notes: Notes = []
        self._at = now()
        self._since = time.perf_counter()
        self._first: float | None = None  # milliseconds to the first bytes
        self._latency: float | None = None
        self._raw: list[bytes] = []
        self._size = 0
        self._error: str | None = None
        self._reading = False  # inside the response, waiting for bytes
        self._was_closed = False
        self._over = False
        self._recorded = False

    def asked(self, kwargs: Mapping[str, object]) -> None:
        try:
            place = here(self._recording)
            if place is not None:
                self._trajectory, self.step = place.trajectory, place.step
            if place is not None or self._outside:
                given = {
                    name: value
                    for name, value in kwargs.items()
                    if type(value).__name__ not in ABSENT and name not in DROPPED and value is not None
                }
                self._request = mapping(given, self._notes, "/request") or {}
        except Exception:
            self._fault()

    def failed(self, exc: BaseException) -> None:
        self._finish(reason(exc))
        self._record_with({})

    def answered(self, answer: object) -> object:
        """The answer, as it is; what has not been read yet is recorded when it was."""
        try:
            response: object = getattr(answer, "response", None) or getattr(answer, "http_response", None)
            if response is None or not hasattr(response, "iter_bytes"):
                return self._in_one_piece(answer)
            if getattr(response, "is_stream_consumed", False) or getattr(response, "is_closed", False):
                self._finish()
                content: object = getattr(response, "content", b"")
                self._record_with(document(content) if isinstance(content, bytes) else {})
            else:
                self._read_along(response)
        except Exception:
            self._fault()
        return answer

    def _in_one_piece(self, answer: object) -> object:
        if isinstance(answer, Iterator):  # a stream of somebody else's client
            return self._seen_through(answer)
        if isinstance(answer, AsyncIterator):
            return self._seen_through_async(answer)
        self._finish()
        self._record_with(_dumped(answer, self._notes))
        return answer

    def _read_along(self, response: object) -> None:
        """Every way of reading an answer asks it for its bytes, and closes it; both are listened to."""
        listened = cast(_Response, response)
        self._wait()
        if hasattr(response, "aclose"):
            listened.aiter_bytes = self._bytes_async(listened.aiter_bytes)  # type: ignore[method-assign]  # of this one
            aclose = listened.aclose

            async def aclosed() -> None:
                try:
                    await aclose()
                finally:
                    self._closed()

            listened.aclose = aclosed  # type: ignore[method-assign]  # of this one
        listened.iter_bytes = self._bytes(listened.iter_bytes)  # type: ignore[method-assign]  # of this one
        close = listened.close

        def closed() -> None:
            try:
                close()
            finally:
                self._closed()

        listened.close = closed  # type: ignore[method-assign]  # of this one

    def _bytes(self, read: "_Read") -> "_Read":
        def iter_bytes(chunk_size: int | None = None) -> Iterator[bytes]:
            chunks = read(chunk_size)
            try:
                while True:
                    self._reading = True
                    try:
                        chunk = next(chunks, None)
                    finally:
                        self._reading = False
                    if chunk is None:
                        return
                    self._heard(chunk)
                    yield chunk
            except GeneratorExit:
                raise
            except BaseException as exc:
                self._error = reason(exc)
                raise
            finally:
                self._closed(self._was_closed)

        return iter_bytes

    def _bytes_async(self, read: "_ReadAsync") -> "_ReadAsync":
        async def aiter_bytes(chunk_size: int | None = None) -> AsyncIterator[bytes]:
            chunks = read(chunk_size)
            try:
                while True:
                    self._reading = True
                    try:
                        chunk = await anext(chunks, None)
                    finally:
                        self._reading = False
                    if chunk is None:
                        return
                    self._heard(chunk)
                    yield chunk
            except GeneratorExit:
                raise
            except BaseException as exc:
                self._error = reason(exc)
                raise
            finally:
                self._closed(self._was_closed)

        return aiter_bytes

    def _closed(self, closed: bool = True) -> None:
        """A response closes itself when it breaks, before it says how: then its reader comes by here again."""
        self._was_closed = closed
        if closed and not self._reading:
            self._came()

    def _seen_through(self, answer: Iterator[object]) -> Iterator[object]:
        self._wait()
        try:
            for chunk in answer:
                self._heard_chunk(chunk)
                yield chunk
        except GeneratorExit:
            raise
        except BaseException as exc:
            self._error = reason(exc)
            raise
        finally:
            self._came()

    async def _seen_through_async(self, answer: AsyncIterator[object]) -> AsyncIterator[object]:
        self._wait()
        try:
            async for chunk in answer:
                self._heard_chunk(chunk)
                yield chunk
        except GeneratorExit:
            raise
        except BaseException as exc:
            self._error = reason(exc)
            raise
        finally:
            self._came()

    def _heard(self, chunk: bytes) -> None:
        if self._first is None:
            self._first = self._milliseconds()
        self._size += len(chunk)
        if self._size <= MOST_BYTES:
            self._raw.append(chunk)

    def _heard_chunk(self, chunk: object) -> None:
        try:
            self._heard(b"data: " + encode(_dumped(chunk, self._notes)) + b"\n\n")
        except Exception:
            self._fault()

    def _wait(self) -> None:
        if self._trajectory is not None:
            self._trajectory.wait_for(self)

    def _came(self) -> None:
        """It was closed: at its end, or before. May be called by a finaliser."""
        try:
            if not self._over:
                self._finish()
                if self._trajectory is None:
                    self.record()
                else:
                    self._trajectory.came(self)
        except Exception:
            self._fault()

    # What the trajectory asks.

    def over(self) -> bool:
        return self._over

    def record(self) -> None:
        if self._recorded:
            return
        try:
            self._finish()
            raw = b"".join(self._raw)
            self._raw = []
            body = document(raw) or self._kind.whole(events(raw))
            fault: object = body.get("error")
            if fault and self._error is None and not body.get("choices"):
                self._error = str(fault)[:1000]
            if not self._kind.finished(body) and self._error is None:
                self._error = LEFT
            if self._size > MOST_BYTES:
                self._notes.append(f"/response was {self._size} bytes, of which {MOST_BYTES} at most were read along")
            self._record_with(body)
        except Exception:
            self._fault()

    def _finish(self, error: str | None = None) -> None:
        self._over = True
        self._error = error if error is not None else self._error
        if self._latency is None:
            self._latency = self._milliseconds()

    def _record_with(self, body: Mapping[str, object]) -> None:
        """Give the call to the trajectory."""
        if self._recorded:
            return
        self._recorded = True
        try:
            if self._trajectory is None and not self._outside:
                return
            call = self._call_of(body)
            if self._trajectory is not None:
                self._trajectory.add_call(call, self.step, self._at)
                return
            alone = self._recording.start_call(self._at)
            alone.add_call(call, None, self._at)
            alone.end("agent_error" if self._error else "completed", stop_reason=self._error)
        except Exception:
            self._fault()

    def _call_of(self, body: Mapping[str, object]) -> Body:
        call = self._kind.call(self._request, body)
        told = {
            "purpose": self._told.purpose,
            "trainable": self._told.trainable,
            "model_version": self._told.model_version,
            "logprobs_mode": self._told.logprobs_mode if call.get("logprobs") else None,
            "tokenizer": self._told.tokenizer,
            "error": self._error,
            "latency_ms": self._latency,
            "first_token_ms": self._first if self._request.get("stream") else None,
            "changed": self._notes or None,
        }
        call.update({name: value for name, value in told.items() if value is not None})
        return {name: value for name, value in call.items() if value is not None}

    def _milliseconds(self) -> float:
        return round((time.perf_counter() - self._since) * 1000, 3)

    def _fault(self) -> None:
        self._recording.fault("a wrapped client")


class _Read(Protocol):
    def __call__(self, chunk_size: int | None = None) -> Iterator[bytes]: ...


class _ReadAsync(Protocol):
    def __call__(self, chunk_size: int | None = None) -> AsyncIterator[bytes]: ...


class _Response(Protocol):
    """What is listened to of an HTTP response."""

    def iter_bytes(self, chunk_size: int | None = None) -> Iterator[bytes]: ...
    def aiter_bytes(self, chunk_size: int | None = None) -> AsyncIterator[bytes]: ...
    def close(self) -> None: ...
    async def aclose(self) -> None: ...


def _dumped(answer: object, notes: Notes) -> Body:
    """An answer object as a mapping."""
    if isinstance(answer, Mapping):
        return mapping(answer, notes, "/response") or {}
    dump: object = getattr(answer, "model_dump", None)
    if not callable(dump):
        raise TypeError(f"{type(answer).__name__} has no model_dump()")
    try:
        made: object = dump(warnings=False)  # of pydantic: parsed answers do not fit their declared types
    except TypeError:
        made = dump()
    if not isinstance(made, Mapping):
        raise TypeError(f"the model_dump() of {type(answer).__name__} is no mapping")
    return mapping(made, notes, "/response") or {}
