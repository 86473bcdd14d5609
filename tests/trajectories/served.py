"""The site as it is served (granian, one worker that writes by its own thread), on a PostgreSQL that may be killed."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path

from django.conf import settings

from tests.trainingsite.console import command, free_port, parent, until
from trainingsite import children
from trainingsite.embedded import Postgres, Valkey

BULK = "/api/v1/trajectories/bulk/"
SINGLE = "/api/v1/trajectories/"

Answer = tuple[int, dict[str, object]]
Body = bytes | Iterator[bytes] | None  # what an iterator gives is sent in chunks


class ServedSite:
    """One web process with its own servers below `folder`; each may be killed, and comes back."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        self.port = free_port()
        runtime = folder / "run"
        runtime.mkdir(parents=True)
        self.postgres = Postgres(folder / "postgres", runtime)
        self.valkey = Valkey(folder / "valkey", runtime)
        self.variables = variables
        self.environment: dict[str, str] = {}
        self.key = ""
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.environment = {
            **os.environ,
            "DATABASE_URL": self.postgres.start(),
            "REDIS_URL": self.valkey.start(),
            "DATA_DIR": str(self.folder / "data"),
            "SECRET_KEY": "for-tests-only",
            "LOG_LEVEL": "WARNING",
            **self.variables,
        }
        prepared = subprocess.run(
            [sys.executable, "-W", "ignore", "manage.py", "prepare"],
            check=True, capture_output=True, text=True, cwd=settings.BASE_DIR, env=self.environment,
        )  # fmt: skip
        self.key = json.loads(prepared.stdout.strip().rpartition("\n")[2])["key"]
        self.start_web()

    def start_web(self) -> None:
        granian = [sys.executable, "-m", "granian", "--interface", "wsgi", "trainingsite.wsgi:application"]
        options = ["--port", str(self.port), "--workers", "1", "--blocking-threads", "16", "--no-ws"]
        with (self.folder / "site.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*granian, *options, "--log-level", "error"],
                cwd=settings.BASE_DIR, env=self.environment, stdout=log, stderr=log,
            )  # fmt: skip
        assert until(self.answers, 90), self.said()

    def answers(self) -> bool:
        try:
            return self.ask("GET", "/healthz")[0] == 200
        except (OSError, HTTPException):
            return False

    def said(self) -> str:
        return (self.folder / "site.log").read_text()[-4000:]

    def kill_web(self) -> None:
        """The server and its worker at once; the next one starts where they were."""
        assert self.process is not None
        worker = self.worker()
        os.kill(worker, signal.SIGKILL)
        self.process.kill()
        self.process.wait(30)
        assert until(lambda: not Path(f"/proc/{worker}").exists(), 30)

    def kill_database(self) -> None:
        """All of PostgreSQL: its first process takes the others along, and nothing is flushed."""
        assert self.postgres.process is not None
        kept = children.kept(self.postgres.data / "process")
        assert kept is not None
        kept.signal(signal.SIGKILL)
        self.postgres.process.wait(30)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(20)
        self.postgres.stop()
        self.valkey.stop()

    def worker(self) -> int:
        """pid of the process that answers."""
        assert self.process is not None
        pids = [int(one.name) for one in Path("/proc").iterdir() if one.name.isdigit()]
        workers = [pid for pid in pids if parent(pid) == self.process.pid and "resource_tracker" not in command(pid)]
        assert len(workers) == 1, workers
        return workers[0]

    def peak_megabytes(self, *, reset: bool = False) -> float:
        """The most memory the worker has held since it was reset."""
        folder = Path(f"/proc/{self.worker()}")
        status = (folder / "status").read_text()
        if reset:
            (folder / "clear_refs").write_text("5")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1000

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] | None = None,
        *,
        seconds: float = 60,
        **headers: str,
    ) -> Answer:
        """(status, JSON). Raises OSError, HTTPException: no answer came."""
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=seconds)) as connection:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {"Authorization": f"Bearer {self.key}", **named})
            return _read(connection.getresponse())

    def bulk(self, body: bytes | Iterator[bytes], *, seconds: float = 120, **headers: str) -> Answer:
        return self.ask("POST", BULK, body, seconds=seconds, Content_Type="application/x-ndjson", **headers)

    def ids(self) -> list[str]:
        """All that are listed, with repetitions if there were any."""
        found: list[str] = []
        cursor = ""
        while True:
            status, page = self.ask("GET", f"{SINGLE}?limit=200{cursor}")
            assert status == 200, page
            rows = page["results"]
            assert isinstance(rows, list)
            found += [str(row["trajectory_id"]) for row in rows]
            if not page["next"]:
                return found
            cursor = f"&cursor={page['next']}"


def _read(response: HTTPResponse) -> Answer:
    raw = response.read()
    plain = response.headers.get_content_type() in ("application/json", "application/problem+json")
    found = json.loads(raw) if plain else {"raw": raw.decode(errors="replace")}
    assert isinstance(found, dict)
    return response.status, found


def raw_request(port: int, head: bytes, body: bytes, *, half_close: bool = True, seconds: float = 60) -> bytes:
    """What a server answers to bytes that no client library would send; b"" if it closes without a word."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        try:
            connection.sendall(head + b"\r\n" + body)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
        except OSError:
            return b""
        return b"".join(parts)


def rows(answer: Answer, name: str) -> list[dict[str, object]]:
    found = answer[1][name]
    assert isinstance(found, list)
    return found
