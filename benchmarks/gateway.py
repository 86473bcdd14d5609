"""What the gateway adds to a backend's answer: the same requests straight to the backend and through the gateway.

Each client asks one after the other, by turns straight and through, on a kept connection, in a conversation that
grows; so both ways meet the same neighbours. The backend is a process of its own that thinks for 20 ms and writes
32 words with token ids and log-probabilities, in a stream one each 4 ms. The gateway records all of it, synced to the
disk, into a PostgreSQL with its durable settings on the same machine. Figures are milliseconds: of a whole answer, of a
stream until its end, and of a stream until its first word.
"""

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from benchmarks.ingest import wait_for
from trainingsite.embedded import Postgres, Valkey

ROOT = Path(__file__).resolve().parent.parent
BACKEND_PORT, GATEWAY_PORT = 18_741, 18_742
THINKS = 0.02  # seconds
WRITES = 0.004  # seconds a word of a stream
WORDS = 32
SYSTEM = "You are an agent. " * 200  # 3.6 kB, as system prompts are
ROUNDS = 100  # of each client and way
TURNS = 10  # of a conversation

Json = dict[str, object]

# --- the backend -----------------------------------------------------------------------------------------------------


def answer(streamed: bool) -> list[bytes]:
    """Made once: the answer in one piece, or its events."""
    head: Json = {"id": "chatcmpl-1", "created": 1, "model": "tiny"}
    usage: Json = {"prompt_tokens": 900, "completion_tokens": WORDS, "total_tokens": 900 + WORDS}
    said = [{"token": " word", "logprob": -0.5, "bytes": None, "top_logprobs": []}]
    if not streamed:
        message = {"role": "assistant", "content": " word" * WORDS}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": said * WORDS}}
        choices = [{**choice, "token_ids": list(range(WORDS))}]
        whole = {**head, "object": "chat.completion", "choices": choices, "usage": usage}
        return [json.dumps({**whole, "prompt_token_ids": list(range(900))}).encode()]
    events: list[Json] = []
    for at in range(WORDS):
        one = {"index": 0, "delta": {"content": " word"}, "logprobs": {"content": said}, "token_ids": [at]}
        reason = "stop" if at == WORDS - 1 else None
        events.append({**head, "object": "chat.completion.chunk", "choices": [{**one, "finish_reason": reason}]})
    events.append({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
    return [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]


async def backend() -> None:
    """Answers every request alike, until it is ended."""
    whole, events = answer(False), answer(True)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                _, _, length = head.lower().partition(b"content-length:")
                body = await reader.readexactly(int(length.partition(b"\r\n")[0] or 0))
                if head.startswith(b"GET"):
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                    continue
                await asyncio.sleep(THINKS)
                if json.loads(body).get("stream"):
                    kind = b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                    writer.write(b"HTTP/1.1 200 OK\r\n" + kind)
                    for event in events:
                        writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                        await asyncio.sleep(WRITES)
                    writer.write(b"0\r\n\r\n")
                else:
                    kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(whole[0])
                    writer.write(b"HTTP/1.1 200 OK\r\n" + kind + whole[0])
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", BACKEND_PORT)
    await server.serve_forever()


# --- what asks -------------------------------------------------------------------------------------------------------


class Client:
    """A kept connection that costs next to nothing, so that it is not what is measured."""

    def __init__(self, port: int, key: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"

    def ask(self, body: Json, trajectory: str) -> tuple[float, float]:
        """Milliseconds until the first word and until the end. Raises SystemExit: another answer than 200."""
        content = json.dumps(body).encode()
        head = f"{self.head}X-Trajectory-Id: {trajectory}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        began = time.perf_counter()
        self.socket.sendall(head + content)
        came, first = b"", 0.0
        while not self._is_whole(came):
            part = self.socket.recv(1 << 16)
            if not part:
                raise SystemExit(f"the connection was closed: {came[:500]!r}")
            came += part
            if not first and b" word" in came:
                first = time.perf_counter() - began
        if not came.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the answer was {came[:500]!r}")
        return first * 1000, (time.perf_counter() - began) * 1000

    def _is_whole(self, came: bytes) -> bool:
        head, found, rest = came.partition(b"\r\n\r\n")
        if not found:
            return False
        head = head.lower()
        if b"content-length:" in head:
            return len(rest) >= int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        return rest.endswith(b"0\r\n\r\n")


@dataclass
class Took:
    """Milliseconds of each answer: straight from the backend, and through the gateway."""

    straight: list[float] = field(default_factory=list)
    through: list[float] = field(default_factory=list)


def measure(key: str, clients: int, *, streamed: bool, name: str) -> tuple[Took, Took]:
    """(until the first word, until the end), of `clients` at the same time."""
    ready = threading.Barrier(clients)

    def one(number: int) -> tuple[Took, Took]:
        first, end = Took(), Took()
        straight, through = Client(BACKEND_PORT, key), Client(GATEWAY_PORT, key)
        ready.wait()
        for round_ in range(ROUNDS):
            turn = round_ % TURNS
            messages: list[Json] = [{"role": "system", "content": SYSTEM}]
            for earlier in range(turn):
                messages.append({"role": "user", "content": f"question {earlier}"})
                messages.append({"role": "assistant", "content": " word" * WORDS})
            messages.append({"role": "user", "content": f"question {turn}"})
            body: Json = {"model": "tiny", "messages": messages, "stream": streamed, "temperature": 0.7}
            trajectory = f"{name}-{number}-{round_ // TURNS}"
            for client, firsts, ends in (
                (straight, first.straight, end.straight),
                (through, first.through, end.through),
            ):
                until_first, until_end = client.ask(body, trajectory)
                firsts.append(until_first)
                ends.append(until_end)
        return first, end

    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(one, range(clients)))
    first, end = Took(), Took()
    for some_first, some_end in found:
        for whole, some in ((first, some_first), (end, some_end)):
            whole.straight += some.straight
            whole.through += some.through
    return first, end


def tell(what: str, took: Took) -> None:
    straight, through = statistics.median(took.straight), statistics.median(took.through)
    tails = [statistics.quantiles(some, n=100)[98] for some in (took.straight, took.through)]
    print(
        f"gateway {what:<28} p50 {through:6.2f} ms   backend {straight:6.2f} ms   adds {through - straight:5.2f} ms   "
        f"ratio {through / straight:.2f}   p99 {tails[1]:6.2f} / {tails[0]:6.2f} ms"
    )


# --- what runs -------------------------------------------------------------------------------------------------------


@contextmanager
def services() -> Iterator[tuple[str, str]]:
    """(database, key); a backend and a gateway run."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-")))
        postgres, valkey = Postgres(folder / "postgres", folder), Valkey(folder / "valkey", folder)
        stack.callback(postgres.stop)
        stack.callback(valkey.stop)
        environment = {
            **os.environ,
            "DATABASE_URL": postgres.start(),
            "REDIS_URL": valkey.start(),
            "DATA_DIR": str(folder / "data"),
            "SECRET_KEY": "for-the-benchmark",
            "LOG_LEVEL": "WARNING",
            "TRAINING_BASE_MODEL": "tiny",
            "MODEL_SERVER_URL": f"http://127.0.0.1:{BACKEND_PORT}",
            "GATEWAY_PORT": str(GATEWAY_PORT),
        }
        manage = [sys.executable, "manage.py"]
        prepared = subprocess.run(
            [*manage, "prepare"], check=True, capture_output=True, text=True, cwd=ROOT, env=environment
        )
        key = json.loads(prepared.stdout.strip().rpartition("\n")[2])["key"]
        for command in ([sys.executable, "-m", "benchmarks.gateway", "backend"], [*manage, "gateway"]):
            process = subprocess.Popen(command, cwd=ROOT, env=environment)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        wait_for(f"http://127.0.0.1:{BACKEND_PORT}/")
        wait_for(f"http://127.0.0.1:{GATEWAY_PORT}/healthz")
        yield environment["DATABASE_URL"], key


def recorded(url: str, wanted: int) -> tuple[int, float]:
    """(calls in the database, seconds until the last was there)."""
    began = time.monotonic()
    with psycopg.connect(url, autocommit=True) as connection:
        while True:
            row = connection.execute("select coalesce(sum(n_calls), 0) from trajectories").fetchone()
            assert row is not None
            if row[0] >= wanted or time.monotonic() - began > 60:
                return int(row[0]), time.monotonic() - began
            time.sleep(0.02)


def main() -> None:
    wanted = 0
    with services() as (url, key):
        measure(key, 1, streamed=True, name="warm")
        wanted += ROUNDS
        for clients in (1, 8):
            who = "1 client" if clients == 1 else f"{clients} clients"
            for streamed in (False, True):
                first, end = measure(key, clients, streamed=streamed, name=f"{clients}-{streamed}")
                wanted += clients * ROUNDS
                if streamed:
                    tell(f"first word of a stream, {who}", first)
                tell(f"{'stream' if streamed else 'whole answer'}, {who}", end)
        there, seconds = recorded(url, wanted)
        print(f"gateway recorded {there} of {wanted} calls, the last {seconds:.2f} s after its answer")


if __name__ == "__main__":
    if sys.argv[1:] == ["backend"]:
        asyncio.run(backend())
    else:
        main()
