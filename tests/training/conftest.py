"""Fixtures of several files here."""

from collections.abc import Iterator

import pytest
from pytest_django import Settings

from tests.training.model_server import FakeModelServer


@pytest.fixture
def model_server(settings: Settings) -> Iterator[FakeModelServer]:
    """The site's model server, faked at the wire."""
    server = FakeModelServer()
    settings.MODEL_SERVER_URL = server.url
    settings.MODEL_SERVER_PUBLIC_URL = server.url
    settings.MODEL_SERVER_TIMEOUT_SECONDS = 5.0
    yield server
    server.close()
