"""Real sockets in place of the site: silent, dead, babbling, endless. The agent never notices, nothing is lost."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from recorder import Client, Limits, Recorder, Unavailable
from recorder.spool import READY

Manners = Callable[[socket.socket, threading.Event], None]
PATIENT = Limits(linger=0.0, first_wait=0.001, longest_wait=0.01)


@contextmanager
def listening(manners: Manners) -> Iterator[tuple[str, threading.Event]]:
    """Whoever comes is treated so, until the end. (address, somebody came)"""
    came, over = threading.Event(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as door:

        def receive() -> None:
            while True:
                try:
                    caller, _ = door.accept()
                except OSError:
                    return
                came.set()
                threading.Thread(target=treat, args=(caller,), daemon=True).start()

        def treat(caller: socket.socket) -> None:
            with caller, suppress(OSError):
                manners(caller, over)

        threading.Thread(target=receive, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{door.getsockname()[1]}", came
        finally:
            over.set()
            door.shutdown(socket.SHUT_RDWR)


def silent(caller: socket.socket, over: threading.Event) -> None:
    over.wait()


def hangs_up(caller: socket.socket, over: threading.Event) -> None:
    caller.recv(1)


def says(raw: bytes) -> Manners:
    def manners(caller: socket.socket, over: threading.Event) -> None:
        caller.recv(65536)
        caller.sendall(raw)

    return manners


def endless(caller: socket.socket, over: threading.Event) -> None:
    caller.recv(65536)
    caller.sendall(b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\n\r\n")
    while not over.is_set():
        caller.sendall(b" " * 65536)


def drips(caller: socket.socket, over: threading.Event) -> None:
    caller.recv(65536)
    caller.sendall(b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\n\r\n")
    while not over.wait(0.01):
        caller.sendall(b" ")


def answer(content: bytes, status: str = "201 Created", *headers: str) -> Manners:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", "Connection: close", *headers, "", ""]
    return says("\r\n".join(lines).encode() + content)


BAD = {
    "silent": silent,
    "hangs up": hangs_up,
    "no HTTP": says(b"\x00\xff SSH-2.0 hello\r\n\r\n"),
    "half an answer": says(b"HTTP/1.1 201 Created\r\nContent-Length: 100\r\n\r\n{"),
    "endless": endless,
    "a byte at a time": drips,
    "a page": answer(b"<html>It works!</html>", "200 OK"),
    "JSON of another kind": answer(b'["created"]'),
    "deep JSON": answer(b"[" * 100_000),
    "no gzip": answer(b"not packed", "201 Created", "Content-Encoding: gzip"),
    "a redirect to nowhere": answer(b"", "307 Temporary Redirect", "Location: http://[::bad"),
    "a status that there is not": answer(b"{}", "799 Whatever"),
    "an absurd Retry-After": answer(b"{}", "503 Later", "Retry-After: nan"),
}


def play(recording: Recorder, n: int) -> None:
    for _ in range(n):
        with recording.start_trajectory() as trajectory:
            trajectory.start_step().complete("ACT")


@pytest.mark.parametrize("manners", BAD.values(), ids=BAD.keys())
def test_whatever_stands_in_the_sites_place_nothing_counts_as_delivered(manners: Manners) -> None:
    with listening(manners) as (url, came):
        recording = Recorder(url, "ts_key", limits=PATIENT, timeout=0.3)
        play(recording, 2)
        assert came.wait(20)
        play(recording, 2)
        assert not recording.flush(0.5)
        counts = recording.counts
        assert (counts.recorded, counts.waiting, counts.delivered, counts.rejected, counts.faults) == (4, 4, 0, 0, 0)
        recording.close(0.0)
        assert recording.counts.dropped == 4


@pytest.mark.parametrize(
    ("name", "said"), [("endless", "longer than 1000000 bytes"), ("a byte at a time", "takes longer")]
)
def test_an_answer_without_end_is_not_read_to_it(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("recorder.courier.MOST_ANSWER", 1_000_000)
    monkeypatch.setattr("recorder.courier.LONGEST_ANSWER", 0.05 if name != "endless" else 60.0)
    with listening(BAD[name]) as (url, _):
        recording = Recorder(url, "ts_key", limits=PATIENT, exit_seconds=0.0)
        play(recording, 1)
        told = threading.Event()
        monkeypatch.setattr("recorder.courier.Courier._pause", lambda *args: told.set())  # returns None: it ends there
        assert told.wait(20)
        assert said in caplog.text
        recording.close()


@pytest.mark.parametrize("manners", BAD.values(), ids=BAD.keys())
def test_with_a_spool_all_of_it_stays_on_disk(manners: Manners, tmp_path: Path) -> None:
    with listening(manners) as (url, came):
        recording = Recorder(url, "ts_key", limits=PATIENT, timeout=0.3, spool=tmp_path)
        play(recording, 2)
        assert came.wait(20)
        recording.close(0.1)
        assert recording.counts.dropped == 0
        assert len(list(tmp_path.rglob(f"*{READY}"))) == 2


@pytest.mark.parametrize("name", ["silent", "hangs up", "no HTTP", "half an answer", "no gzip"])
def test_the_client_says_that_there_is_no_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recorder.client.TRIES", 1)
    with listening(BAD[name]) as (url, _), Client(url, "ts_key", timeout=0.3) as client, pytest.raises(Unavailable):
        client.status()
