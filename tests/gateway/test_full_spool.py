"""What a full spool means is the project's to say; what is in the spool is recorded once, come what may."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from django.db import transaction

from gateway.models import SpoolPosition
from tests.gateway.backend import Backend
from tests.gateway.recorded import QUESTION, calls_of
from tests.gateway.running import RunningGateway, eventually
from trajectories.models import Project, Trajectory


@contextmanager
def held_up(gateway: RunningGateway) -> Iterator[None]:
    """Nothing is taken from the gateway's spool meanwhile."""
    spool = (gateway.data / "gateway-spool" / "id").read_text().strip()
    row = SpoolPosition.objects.filter(spool=spool)
    assert eventually(row.exists)
    with transaction.atomic():
        list(row.select_for_update())
        yield


def counter(gateway: RunningGateway, name: str) -> int:
    counters = gateway.health()["counters"]
    assert isinstance(counters, dict)
    return int(counters[name])


def spooled(gateway: RunningGateway) -> bytes:
    return b"".join(path.read_bytes() for path in (gateway.data / "gateway-spool").glob("*.calls"))


def test_with_a_full_spool_calls_are_served_unrecorded_and_that_is_said(
    project: Project, backend: Backend, key: str, folder: Path
) -> None:
    with RunningGateway(folder, backend.url, GATEWAY_SPOOL_BYTES="1") as gateway:
        client = gateway.client(key)
        with held_up(gateway):
            first = client.chat.completions.with_raw_response.create(
                model="tiny", messages=QUESTION, extra_headers={"X-Trajectory-Id": "first"}
            )
            assert "X-Recorded" not in first.headers
            second = client.chat.completions.with_raw_response.create(
                model="tiny", messages=QUESTION, extra_headers={"X-Trajectory-Id": "second"}
            )
            assert second.parse().choices[0].message.content == "Buy on good news."
            assert second.headers["X-Recorded"] == "no"
            streamed = client.chat.completions.with_raw_response.create(
                model="tiny", messages=QUESTION, stream=True, extra_headers={"X-Trajectory-Id": "third"}
            )
            assert streamed.headers["X-Recorded"] == "no"
            assert len(list(streamed.parse())) > 1
            health = gateway.health()
            assert counter(gateway, "unrecorded") == 2
            assert health["ok"] is False and "2 calls were served unrecorded" in str(health["detail"])
        assert len(calls_of(project, "first")) == 1
        assert eventually(lambda: SpoolPosition.objects.filter(unrecorded=2).exists())  # kept for the pages
        again = client.chat.completions.with_raw_response.create(
            model="tiny", messages=QUESTION, extra_headers={"X-Trajectory-Id": "fourth"}
        )
        assert "X-Recorded" not in again.headers  # there is room again
        calls_of(project, "fourth")
        assert gateway.health()["ok"] is False  # the alarm stays
    assert not Trajectory.objects.filter(project=project, trajectory_id__in=["second", "third"]).exists()


def test_a_project_that_wants_no_call_unrecorded_gets_503(
    project: Project, backend: Backend, key: str, folder: Path
) -> None:
    project.gateway_when_full = "refuse"
    project.save()
    with RunningGateway(folder, backend.url, GATEWAY_SPOOL_BYTES="0") as gateway:
        with pytest.raises(openai.InternalServerError, match="spool is full") as refused:
            gateway.client(key, X_Trajectory_Id="t1").chat.completions.create(model="tiny", messages=QUESTION)
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["Retry-After"]) > 0
        assert (counter(gateway, "refused_full"), counter(gateway, "unrecorded")) == (1, 0)
    assert backend.asked == []


def test_a_disk_that_fails_counts_as_a_full_spool(project: Project, backend: Backend, key: str, folder: Path) -> None:
    with RunningGateway(folder, backend.url, GATEWAY_ROUTE_SECONDS="600") as gateway:
        shutil.rmtree(folder / "gateway-spool")
        client = gateway.client(key)
        served = client.chat.completions.with_raw_response.create(model="tiny", messages=QUESTION)
        assert served.parse().choices[0].message.content and served.headers["X-Recorded"] == "no"
        assert counter(gateway, "unrecorded") == 1
        project.gateway_when_full = "refuse"
        project.save()
    with RunningGateway(folder, backend.url) as gateway:
        shutil.rmtree(folder / "gateway-spool")
        client = gateway.client(key)
        with pytest.raises(openai.InternalServerError, match="could not be recorded"):
            client.chat.completions.create(model="tiny", messages=QUESTION)
        with pytest.raises(openai.APIError, match="could not be recorded"):
            list(client.chat.completions.create(model="tiny", messages=QUESTION, stream=True))


@pytest.mark.parametrize("last", [b'"finish_reason":"stop"', b"data: [DONE]"])
def test_a_stream_is_in_the_spool_before_its_last_chunk_is_sent(
    project: Project, backend: Backend, key: str, folder: Path, last: bytes
) -> None:
    headers = {"Authorization": f"Bearer {key}", "X-Trajectory-Id": "t1"}
    body = {"model": "tiny", "messages": QUESTION, "stream": True}
    gateway = RunningGateway(folder, backend.url)
    with gateway:
        with held_up(gateway):
            with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as answer:
                came = b""
                for part in answer.iter_raw():
                    came += part
                    if last in came.replace(b': "stop"', b':"stop"'):
                        break
                on_disk = spooled(gateway)
                gateway.kill()  # at this moment
            assert b'"t1"' in on_disk and b"Answer BUY or SELL" in on_disk
            assert not Trajectory.objects.filter(project=project, n_calls__gt=0).exists()
        gateway.start()
        [call] = calls_of(project, "t1")
        assert (call.response, call.finish_reason) == ("Buy on good news.", "stop")
        assert eventually(lambda: spool_bytes(gateway) == 0)
        assert len(calls_of(project, "t1")) == 1


def spool_bytes(gateway: RunningGateway) -> int:
    spool = gateway.health()["spool"]
    assert isinstance(spool, dict)
    return int(spool["bytes"])
