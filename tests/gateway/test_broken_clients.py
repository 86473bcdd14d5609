"""A client that breaks off in the middle breaks nothing; where its call had reached a backend, that is recorded."""

import json
import socket
import threading

import pytest

from tests.gateway.backend import Backend, Reply
from tests.gateway.recorded import QUESTION, calls_of
from tests.gateway.running import RunningGateway, eventually
from trajectories.models import Project, Trajectory

BODY = json.dumps({"model": "tiny", "messages": QUESTION}).encode()


def begin(gateway: RunningGateway, key: str, head: str, body: bytes) -> socket.socket:
    """Send so much of a request."""
    one = socket.create_connection(("127.0.0.1", gateway.port), timeout=20)
    told = f"Host: gateway\r\nAuthorization: Bearer {key}\r\nX-Trajectory-Id: broken\r\nContent-Type: application/json"
    one.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{told}\r\n{head}\r\n\r\n".encode() + body)
    return one


def still_serves(gateway: RunningGateway, key: str, project: Project) -> bool:
    client = gateway.client(key, X_Trajectory_Id="next")
    answer = client.chat.completions.create(model="tiny", messages=QUESTION)
    return answer.choices[0].message.content == "Buy on good news." and len(calls_of(project, "next")) == 1


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (f"Content-Length: {len(BODY) + 100}", BODY),
        (f"Content-Length: {len(BODY)}", b""),
        ("Transfer-Encoding: chunked", f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n"),
        ("Transfer-Encoding: chunked", f"{len(BODY):x}\r\n".encode() + BODY[:20]),
    ],
    ids=["shorter than its length", "never begun", "without a last chunk", "cut inside a chunk"],
)
def test_half_a_body_is_no_call(
    gateway: RunningGateway, backend: Backend, key: str, project: Project, head: str, body: bytes
) -> None:
    said = len(gateway.log.read_bytes())
    begin(gateway, key, head, body).close()
    assert still_serves(gateway, key, project)
    assert len(backend.asked) == 1  # the good one
    assert list(Trajectory.objects.filter(project=project).values_list("trajectory_id", flat=True)) == ["next"]
    assert gateway.log.read_bytes()[said:] == b""


def test_chunks_that_are_none_are_refused(
    gateway: RunningGateway, backend: Backend, key: str, project: Project
) -> None:
    with begin(gateway, key, "Transfer-Encoding: chunked", b"zz\r\nno chunk\r\n") as one:
        assert one.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert still_serves(gateway, key, project)
    assert len(backend.asked) == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_hangs_up_before_anything_is_answered_is_recorded_as_such(
    gateway: RunningGateway, backend: Backend, key: str, project: Project, stream: bool
) -> None:
    gate = threading.Event()
    backend.replies = [Reply(gates={-1: gate} if stream else {0: gate}), Reply()]
    body = json.dumps({"model": "tiny", "messages": QUESTION, "stream": stream}).encode()
    one = begin(gateway, key, f"Content-Length: {len(body)}", body)
    assert eventually(lambda: len(backend.asked) == 1)
    one.close()
    [call] = calls_of(project, "broken")
    gate.set()
    assert (call.response, call.finish_reason, call.trainable) == (None, "cancelled", False)
    assert call.error == {"message": "The client hung up before anything was answered.", "type": "cancelled"}
    gateway_said = call.extra["gateway"]
    assert isinstance(gateway_said, dict) and gateway_said["cancelled"] is True
    assert still_serves(gateway, key, project)
