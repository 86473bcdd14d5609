"""A backend that is only vLLM's wire, in this process: it writes what it is told, and can wait, fail and be away.

The shapes are those of vLLM 0.32 and of our own small server (tests/serving/test_wire.py holds that one to them).
"""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Body = dict[str, object]

WORDS = ["Buy", " on", " good", " news", "."]


@dataclass
class Reply:
    """One answer. `gate`: wait for it before the n-th word of a stream."""

    words: list[str] = field(default_factory=lambda: list(WORDS))
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None  # the whole body, as it is
    tool_calls: list[Body] | None = None
    gates: dict[int, threading.Event] = field(default_factory=dict)
    break_off_at: int | None = None  # the connection is cut before this word
    finish_reason: str = "stop"


@dataclass
class Asked:
    body: Body
    headers: dict[str, str]
    written: int = 0  # words
    hung_up: threading.Event = field(default_factory=threading.Event)


class Backend:
    """Answers `replies` in order, then the last one again. `refuse_more`: as OpenAI does."""

    def __init__(self, models: tuple[str, ...] = ("tiny",), *, refuse_more: bool = False) -> None:
        self.reset(models, refuse_more=refuse_more)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def reset(self, models: tuple[str, ...] = ("tiny",), *, refuse_more: bool = False) -> None:
        self.models = list(models)
        self.refuse_more = refuse_more
        self.replies: list[Reply] = [Reply()]
        self.decide: Callable[[Body], Reply | None] = lambda body: None
        self.asked: list[Asked] = []

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reply(self, body: Body) -> Reply:
        given = self.decide(body)
        if given is not None:
            return given
        if body["model"] not in self.models:
            said = f"The model `{body['model']}` does not exist."
            return Reply(status=404, raw=json.dumps({"error": {"message": said, "type": "NotFoundError"}}).encode())
        if self.refuse_more and "return_token_ids" in body:
            said = "Unrecognized request argument supplied: return_token_ids"
            kind = "invalid_request_error"
            return Reply(status=400, raw=json.dumps({"error": {"message": said, "type": kind}}).encode())
        with self._lock:
            return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


def choice_of(reply: Reply, body: Body) -> Body:
    text = "".join(reply.words)
    message: Body = {"role": "assistant", "content": text, "tool_calls": reply.tool_calls or []}
    choice: Body = {
        "index": 0,
        "message": message,
        "logprobs": _logprobs(reply.words, 0) if body.get("logprobs") else None,
        "finish_reason": "tool_calls" if reply.tool_calls else reply.finish_reason,
        "stop_reason": None,
    }
    if body.get("return_token_ids"):
        choice["token_ids"] = list(range(100, 100 + len(reply.words)))
    return choice


def _logprobs(words: list[str], first: int) -> Body:
    return {
        "content": [
            {"token": word, "logprob": -0.25 * (first + at + 1), "bytes": list(word.encode()), "top_logprobs": []}
            for at, word in enumerate(words)
        ]
    }


def usage_of(reply: Reply) -> Body:
    count = len(reply.words)
    return {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count}


def whole(reply: Reply, body: Body) -> Body:
    answer: Body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [choice_of(reply, body)],
        "usage": usage_of(reply),
    }
    if body.get("return_token_ids"):
        answer["prompt_token_ids"] = [1, 2, 3, 4, 5, 6, 7]
    return answer


def chunks(reply: Reply, body: Body) -> Iterator[Body]:
    """The events of a stream; tool calls come in pieces, as vLLM's do."""

    def chunk(choices: list[Body], **more: object) -> Body:
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
        return {**head, "choices": choices, **more}

    opening: Body = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    yield chunk([opening], **({"prompt_token_ids": [1, 2, 3, 4, 5, 6, 7]} if body.get("return_token_ids") else {}))
    for at, word in enumerate(reply.words):
        choice: Body = {"index": 0, "delta": {"content": word}, "finish_reason": None}
        choice["logprobs"] = _logprobs([word], at) if body.get("logprobs") else None
        if body.get("return_token_ids"):
            choice["token_ids"] = [100 + at]
        yield chunk([choice])
    for at, call in enumerate(reply.tool_calls or []):
        function = call["function"]
        assert isinstance(function, dict)
        head = {**call, "index": at, "function": {"name": function["name"], "arguments": ""}}
        yield chunk([{"index": 0, "delta": {"tool_calls": [head]}, "logprobs": None, "finish_reason": None}])
        arguments = str(function["arguments"])
        for piece in (arguments[:3], arguments[3:]):
            part = {"index": at, "function": {"arguments": piece}}
            yield chunk([{"index": 0, "delta": {"tool_calls": [part]}, "logprobs": None, "finish_reason": None}])
    reason = "tool_calls" if reply.tool_calls else reply.finish_reason
    yield chunk(
        [{"index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": reason, "stop_reason": None}]
    )
    options = body.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage"):
        yield chunk([], usage=usage_of(reply))


def _handler(backend: Backend) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            cards = [{"id": one, "object": "model", "created": 1, "owned_by": "vllm", "root": f"/secret/{one}"}
                     for one in backend.models]  # fmt: skip
            self._whole(200, json.dumps({"object": "list", "data": cards}).encode(), {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            asked = Asked(body, dict(self.headers.items()))
            backend.asked.append(asked)
            reply = backend.reply(body)
            if reply.raw is not None or reply.status != 200:
                self._whole(reply.status, reply.raw or b"", reply.headers)
            elif body.get("stream"):
                self._stream(reply, body, asked)
            else:
                if 0 in reply.gates:
                    reply.gates[0].wait(30)
                self._whole(200, json.dumps(whole(reply, body)).encode(), reply.headers)

        def _whole(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _stream(self, reply: Reply, body: Body, asked: Asked) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                for at, chunk in enumerate(chunks(reply, body)):
                    word = at - 1
                    if word in reply.gates and not self._waits(reply.gates[word]):
                        asked.hung_up.set()
                        return
                    if reply.break_off_at == word:
                        self.connection.shutdown(socket.SHUT_RDWR)
                        return
                    self._event(b"data: " + json.dumps(chunk).encode() + b"\n\n")
                    asked.written = max(0, word + 1)
                self._event(b"data: [DONE]\n\n")
                self.wfile.write(b"0\r\n\r\n")
            except OSError:
                asked.hung_up.set()

        def _waits(self, gate: threading.Event) -> bool:
            """Until the gate opens. False: the one who asked went away."""
            self.connection.setblocking(False)
            try:
                while not gate.wait(0.01):
                    try:
                        if not self.connection.recv(1):
                            return False
                    except BlockingIOError:
                        continue
            finally:
                self.connection.setblocking(True)
            return True

        def _event(self, raw: bytes) -> None:
            self.wfile.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")
            self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    return Handler
