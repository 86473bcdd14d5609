"""Which version comes next, and giving it to a batch."""

import threading

import pytest
from django.db import connection

from tests import builders
from training import policies, versions
from training.models import TrainedModel
from trajectories.models import KnownVersion, Project

pytestmark = pytest.mark.django_db


@pytest.fixture
def project() -> Project:
    return builders.make_project("trading")


def test_v1_0_0_when_there_is_none(project: Project) -> None:
    assert versions.next_version(project) == "v1.0.0"


def test_the_patch_increments(project: Project) -> None:
    builders.make_model(project, "v1.0.0")

    assert versions.next_version(project) == "v1.0.1"


def test_v1_0_9_is_followed_by_v1_0_10(project: Project) -> None:
    builders.make_model(project, "v1.0.9")

    assert versions.next_version(project) == "v1.0.10"


def test_versions_are_compared_as_numbers_not_as_text(project: Project) -> None:
    for version in ("v1.0.10", "v1.0.9", "v1.0.2"):
        builders.make_model(project, version)

    assert versions.next_version(project) == "v1.0.11"


def test_a_higher_minor_counts_above_any_patch(project: Project) -> None:
    for version in ("v1.0.99", "v1.2.0"):
        builders.make_model(project, version)

    assert versions.next_version(project) == "v1.2.1"


def test_another_projects_versions_do_not_count(project: Project) -> None:
    builders.make_model(builders.make_project(), "v1.0.7")

    assert versions.next_version(project) == "v1.0.0"


def test_a_version_that_failed_leaves_a_gap(project: Project) -> None:
    builders.make_model(project, "v1.0.0", status="failed", adapter_path="")

    assert versions.next_version(project) == "v1.0.1"


def test_a_batch_gets_its_version_and_ingestion_knows_it(project: Project) -> None:
    policy = policies.of(project)
    policy.model_name_prefix = "trader"
    policy.save()
    batch = builders.make_batch(project, parent=builders.make_model(project, "v1.0.0"))

    model = versions.allocate(batch)

    assert (model.version, model.status, model.parent, model.batch) == ("v1.0.1", "training", batch.parent, batch)
    assert model.serving_name == "trader-v1.0.1"
    known = KnownVersion.objects.get(project=project, version="v1.0.1")
    assert (known.serving_name, known.ordinal) == ("trader-v1.0.1", model.ordinal)


@pytest.mark.django_db(transaction=True)
def test_two_that_allocate_at_once_get_two_versions(project: Project) -> None:
    batches = [builders.make_batch(project, status=status) for status in ("training", "completed")]
    gate = threading.Barrier(2)

    def allocate(batch_number: int) -> None:
        try:
            gate.wait(30)
            versions.allocate(batches[batch_number])
        finally:
            connection.close()

    threads = [threading.Thread(target=allocate, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    found = TrainedModel.objects.filter(project=project).order_by("ordinal")
    assert [(model.version, model.ordinal) for model in found] == [("v1.0.0", 1), ("v1.0.1", 2)]
