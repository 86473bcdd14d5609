"""A judge that does as it is told: the chat endpoint of an OpenAI-compatible server, real HTTP on a free port.

    with JudgeServer() as judge:
        judge.script = [busy(retry_after=7), good]      # then `good` for all that follow

`good` scores each shown attempt by the first of `points` whose word stands in it, so its word holds whatever the order.
"""

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

POINTS: Mapping[str, float] = {"BUY": 1.0, "SELL": 0.6, "HOLD": 0.3, "WAIT": 0.0}


@dataclass(frozen=True)
class Reply:
    status: int = 200
    content: str = ""  # of the assistant message
    body: str | None = None  # in place of a chat completion
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """One request as it came in."""

    authorization: str
    body: dict[str, object]
    messages: list[dict[str, str]]
    attempts: list[str]  # as shown, in the order shown

    @property
    def text(self) -> str:
        return "\n".join(message["content"] for message in self.messages)


Behaviour = Callable[[Asked, "JudgeServer"], Reply]


def good(asked: Asked, judge: "JudgeServer") -> Reply:
    return Reply(content=answer([judge.score(text) for text in asked.attempts]))


def answer(scores: list[float | str], ids: list[str] | None = None) -> str:
    ids = ids or [str(number) for number in range(1, len(scores) + 1)]
    rows = [
        {
            "trajectory_id": name,
            "explanation": f"because {score}",
            "strengths": ["direct"],
            "weaknesses": [],
            "score": score,
        }
        for name, score in zip(ids, scores, strict=True)
    ]
    return json.dumps({"scores": rows})


def slow(asked: Asked, judge: "JudgeServer") -> Reply:
    """Says nothing until the server is closed, or `judge.go_on` is set."""
    judge.go_on.wait(30)
    return good(asked, judge)


def failing(status: int, **headers: str) -> Behaviour:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda asked, judge: Reply(status=status, body='{"error": "as I was told"}', headers=named)


def saying(content: str) -> Behaviour:
    return lambda asked, judge: Reply(content=content)


def saying_no(why: str) -> Behaviour:
    return lambda asked, judge: Reply(status=400, body=json.dumps({"error": why}))


def sending(body: str) -> Behaviour:
    """This in place of a chat completion."""
    return lambda asked, judge: Reply(body=body)


def rubbish(asked: Asked, judge: "JudgeServer") -> Reply:
    return Reply(content="They are all very good, each in its own way.")


def wrong_count(asked: Asked, judge: "JudgeServer") -> Reply:
    """7 scores for 8 trajectories (OpenPipe/ART#825)."""
    return Reply(content=answer([0.5] * (len(asked.attempts) - 1)))


def out_of_range(asked: Asked, judge: "JudgeServer") -> Reply:
    return Reply(content=answer([7.0, *[0.5] * (len(asked.attempts) - 1)]))


def duplicate_ids(asked: Asked, judge: "JudgeServer") -> Reply:
    return Reply(content=answer([0.5] * len(asked.attempts), ids=["1"] * len(asked.attempts)))


class JudgeServer:
    def __init__(self, points: Mapping[str, float] = POINTS) -> None:
        self.points = points
        self.script: list[Behaviour] = []  # one a request; `good` when it is empty
        self.asked: list[Asked] = []
        self.go_on = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def score(self, text: str) -> float:
        return next((points for word, points in self.points.items() if word in text), 0.5)

    def next_reply(self, asked: Asked) -> Reply:
        with self._lock:
            self.asked.append(asked)
            behaviour = self.script.pop(0) if self.script else good
        return behaviour(asked, self)

    def __enter__(self) -> "JudgeServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(judge: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """GET …/models: what a health page asks for."""
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = Asked(self.headers.get("Authorization", ""), body, body["messages"], _attempts(body["messages"]))
            reply = judge.next_reply(asked)
            text = reply.body
            if text is None:
                message = {"role": "assistant", "content": reply.content}
                usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
                text = json.dumps({"choices": [{"index": 0, "message": message}], "usage": usage})
            try:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())
            except (BrokenPipeError, ConnectionResetError):
                return  # whoever asked has given up

        def log_message(self, format: str, *args: object) -> None:
            return

    return Handler


def _attempts(messages: list[dict[str, str]]) -> list[str]:
    """What is shown of each attempt, between the marks that the system message names."""
    if len(messages) < 2:
        return []
    marks = re.search(r"marks <(\w+)>", messages[0]["content"])
    assert marks is not None, "the system message names the marks"
    fence = marks[1]
    inner = rf'<trajectory id="\d+">\n<{fence}>\n(.*?)\n</{fence}>\n</trajectory>'
    return re.findall(inner, messages[1]["content"], re.DOTALL)
