"""The driver against the real small server, and against what servers do when they are unwell."""

from pathlib import Path

import httpx
import pytest
from pytest_django import Settings

from tests.builders import make_model, make_project
from tests.serving.conftest import cache
from tests.serving.running import BASE, KEY, RunningServer
from training import reconcile
from training.models import ServingInterval
from training.serving import ModelServer, ServingRefused, ServingUnavailable

HELLO = [{"role": "user", "content": "BUY or SELL?"}]


def answering(status: int, body: object) -> ModelServer:
    """A driver whose server answers everything alike."""
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    return ModelServer(
        "http://model-server", transport=httpx.MockTransport(lambda _: httpx.Response(status, **content))
    )


# --- the real one -------------------------------------------------------------------------------------------------


def test_it_loads_asks_and_unloads(model_server: RunningServer, adapters: tuple[Path, Path]) -> None:
    with ModelServer(f"{model_server.url}/v1/", KEY) as server:
        assert server.load("driver-v1.0.0", str(adapters[0])) is True
        assert server.load("driver-v1.0.0", str(adapters[0])) is False
        assert {one.id: one.root for one in server.models()} == {BASE: BASE, "driver-v1.0.0": str(adapters[0])}

        answer = server.chat(
            "driver-v1.0.0", HELLO, max_tokens=3, n=2, seed=1, logprobs=True, return_token_ids=True, temperature=0.5
        )

        assert (answer.model, len(answer.choices)) == ("driver-v1.0.0", 2)
        first = answer.choices[0]
        assert first.token_ids is not None and first.logprobs is not None and first.logprobs.content is not None
        assert len(first.token_ids) == len(first.logprobs.content)
        assert answer.prompt_token_ids
        assert server.unload("driver-v1.0.0") is True
        assert server.unload("driver-v1.0.0") is False


def test_it_tells_what_will_never_work(model_server: RunningServer, tmp_path: Path) -> None:
    with ModelServer(model_server.url, KEY) as server:
        for wrong, status in (
            (lambda: server.load("driver-v1.0.0", str(tmp_path)), 404),
            (lambda: server.chat("nobody", HELLO, max_tokens=1), 404),
            (lambda: server.chat(BASE, HELLO, max_tokens=0), 400),
        ):
            with pytest.raises(ServingRefused) as refusal:
                wrong()
            assert refusal.value.status == status
    with ModelServer(model_server.url, "wrong") as stranger, pytest.raises(ServingRefused):
        stranger.models()


@pytest.mark.django_db
def test_a_server_that_was_restarted_gets_its_adapters_again(
    tmp_path: Path, adapters: tuple[Path, Path], settings: Settings
) -> None:
    model = make_model(make_project(), adapter_path=str(adapters[0]), base_model=BASE)
    ServingInterval.objects.create(
        project=model.project, model=model, starts_at=model.created_at, by_name="test", audience="*"
    )
    settings.MODEL_SERVER_API_KEY = KEY
    with RunningServer(cache(), tmp_path / "log") as server, ModelServer(server.url, KEY) as driver:
        settings.MODEL_SERVER_URL = server.url
        reconcile.reconcile_all()
        before = driver.chat(model.serving_name, HELLO, max_tokens=4, temperature=0).text
        server.stop()
        with pytest.raises(ServingUnavailable):
            driver.models()
        assert "does not answer" in reconcile.reconcile_all()[0].error
        server.start()
        with pytest.raises(ServingRefused):
            driver.chat(model.serving_name, HELLO, max_tokens=4)

        report = reconcile.reconcile_all()[0]

        assert report.loaded == [model.serving_name]
        assert driver.chat(model.serving_name, HELLO, max_tokens=4, temperature=0).text == before


# --- servers that are unwell --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, {"error": {"message": "out of memory"}}),
        (502, b"<html>bad gateway</html>"),
        (429, {"error": {"message": "too many"}}),
        (200, b"<html>not a model server</html>"),
        (200, b'{"data": 3}'),
        (200, b"\xff"),
    ],
)
def test_what_may_pass_is_unavailable(status: int, body: object) -> None:
    with pytest.raises(ServingUnavailable):
        answering(status, body).models()


def test_nobody_there_is_unavailable() -> None:
    with pytest.raises(ServingUnavailable, match=r"http://127\.0\.0\.1:9 does not answer"):
        ModelServer("http://127.0.0.1:9").models()


def test_an_address_that_is_none_is_unavailable() -> None:
    with pytest.raises(ServingUnavailable):
        ModelServer("http://[").models()


def test_a_vllm_without_runtime_adapters_is_named() -> None:
    with pytest.raises(ServingRefused, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING") as refusal:
        answering(404, {"detail": "Not Found"}).load("p-v1.0.0", "/adapters/p-v1.0.0")
    assert refusal.value.status == 501
    with pytest.raises(ServingRefused):
        answering(404, {"detail": "Not Found"}).unload("p-v1.0.0")


def test_an_adapter_that_is_not_there_is_unloaded_already() -> None:
    gone = {"error": {"message": "The lora adapter 'p-v1.0.0' cannot be found.", "type": "NotFoundError"}}

    assert answering(404, gone).unload("p-v1.0.0") is False
