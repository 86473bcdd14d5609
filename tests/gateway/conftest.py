"""One gateway for the tests of a file, on the session's database; each test has a project of its own.

A gateway outlives a test, so the tables must: `db` empties them after the file, not after each test.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pytest_django import DjangoDbBlocker

from tests.gateway.backend import Backend
from tests.gateway.running import RunningGateway

if TYPE_CHECKING:  # Django is not set up yet when pytest reads this file
    from trajectories.models import Project

_number = itertools.count(1)


@pytest.fixture(scope="module")
def db(django_db_setup: None, django_db_blocker: DjangoDbBlocker) -> Iterator[None]:
    from django.core.management import call_command

    with django_db_blocker.unblock():
        yield
        call_command("flush", interactive=False, verbosity=0)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Backend]:
    one = Backend()
    yield one
    one.close()


@pytest.fixture
def backend(endpoint: Backend) -> Backend:
    endpoint.reset()
    return endpoint


@pytest.fixture(scope="module")
def gateway(db: None, endpoint: Backend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with RunningGateway(tmp_path_factory.mktemp("gateway") / "data", endpoint.url) as running:
        yield running


@pytest.fixture
def project(db: None, backend: Backend) -> "Project":
    from training.models import TrainingPolicy
    from trajectories.models import Project

    found = Project.objects.create(slug=f"acting-{next(_number)}")
    TrainingPolicy.objects.update_or_create(project=found, defaults={"base_model": "tiny"})
    return found


@pytest.fixture
def key(project: "Project") -> str:
    from trajectories.auth import make_key

    return make_key(project, "trader")[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a gateway that a test has for itself."""
    return tmp_path / "data"


@pytest.fixture
def backend_alone(endpoint: Backend) -> Backend:
    """For a gateway on a database of its own."""
    endpoint.reset()
    return endpoint
