"""One model server for all tests of this folder that one worker runs."""

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from django.conf import settings

from tests.serving.running import KEY, RunningServer, write_adapter


def cache() -> Path:
    return Path(os.environ.get("MODELS_CACHE") or settings.MODELS_CACHE)


@pytest.fixture(scope="session")
def model_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(cache(), tmp_path_factory.mktemp("model-server") / "log") as server:
        yield server


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters that answer unlike the base and unlike each other."""
    folder = tmp_path_factory.mktemp("adapters")
    return write_adapter(folder / "one", seed=1), write_adapter(folder / "two", seed=2)


@pytest.fixture
def http(model_server: RunningServer) -> Iterator[httpx.Client]:
    """A client with the key; what a test loads is unloaded after it."""
    with httpx.Client(base_url=model_server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield client
        for card in client.get("/v1/models").json()["data"]:
            if card["parent"]:
                client.post("/v1/unload_lora_adapter", json={"lora_name": card["id"]})
