"""A project with a key, a backend, and the gateway between them."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gateway.backend import Backend
from tests.gateway.running import RunningGateway

if TYPE_CHECKING:  # Django is not set up yet when pytest reads this file
    from trajectories.models import Project


@pytest.fixture
def project(transactional_db: None) -> "Project":
    from training.models import TrainingPolicy
    from trajectories.models import Project

    found = Project.objects.create(slug="acting")
    TrainingPolicy.objects.update_or_create(project=found, defaults={"base_model": "tiny"})
    return found


@pytest.fixture
def key(project: "Project") -> str:
    from trajectories.auth import make_key

    return make_key(project, "trader")[1]


@pytest.fixture
def backend() -> Iterator[Backend]:
    one = Backend()
    yield one
    one.close()


@pytest.fixture
def gateway(project: "Project", backend: Backend, tmp_path: Path) -> Iterator[RunningGateway]:
    with RunningGateway(tmp_path / "data", backend.url) as running:
        yield running
