"""Model servers forget; what should be loaded is loaded again, and nothing else."""

from datetime import timedelta
from pathlib import Path

import pytest
from django.utils import timezone

from tests.builders import make_deployment, make_evaluation, make_project
from tests.training.candidates import candidate
from tests.training.model_server import FakeModelServer
from training import policies, reconcile, tasks
from training.models import ServingInterval, TrainedModel
from trajectories.models import Project

pytestmark = pytest.mark.django_db


@pytest.fixture
def project() -> Project:
    return make_project()


def serve(model: TrainedModel, ended: timedelta | None = None) -> None:
    now = timezone.now()
    ServingInterval.objects.create(
        project=model.project,
        model=model,
        starts_at=now - timedelta(days=1),
        ends_at=now - ended if ended is not None else None,
        by_name="test",
        audience="*" if ended is None else f"agent-of-{model}",
    )


def test_what_serves_is_loaded_again_after_a_restart(
    project: Project, tmp_path: Path, model_server: FakeModelServer
) -> None:
    model = candidate(project, tmp_path)
    serve(model)
    tasks.reconcile_servers()
    model_server.restart()

    tasks.reconcile_servers()

    assert model_server.adapters == {model.serving_name: model.adapter_path}
    assert model_server.loads == [model.serving_name] * 2


def test_all_that_is_in_use_is_loaded_and_the_rest_is_not(
    project: Project, tmp_path: Path, model_server: FakeModelServer
) -> None:
    names = ("v1.0.0", "v1.0.1", "v1.0.2", "v1.0.3", "v1.0.4", "v1.0.5", "v1.0.6")
    serving, just_ended, long_ended, rolling, asked, tried, other = (candidate(project, tmp_path, v) for v in names)
    serve(serving)
    serve(just_ended, ended=timedelta(minutes=1))
    serve(long_ended, ended=timedelta(hours=1))
    make_deployment(rolling, state="rolling_out")
    make_deployment(asked, state="requested")
    make_evaluation(tried, other, state="running")

    report = reconcile.reconcile(model_server.url)

    wanted = {model.serving_name for model in (serving, just_ended, rolling, tried, other)}
    assert set(report.loaded) == set(model_server.adapters) == wanted
    assert report.ok


def test_what_is_used_no_more_is_unloaded_and_strangers_are_left_alone(
    project: Project, tmp_path: Path, model_server: FakeModelServer
) -> None:
    old = candidate(project, tmp_path)
    model_server.adapters = {old.serving_name: old.adapter_path, "someone-elses": "/theirs"}

    report = reconcile.reconcile(model_server.url)

    assert report.unloaded == [old.serving_name]
    assert list(model_server.adapters) == ["someone-elses"]


def test_a_version_that_its_batch_tries_out_is_left_alone(
    project: Project, tmp_path: Path, model_server: FakeModelServer
) -> None:
    model = candidate(project, tmp_path, status="training")
    model_server.adapters = {model.serving_name: model.adapter_path}

    assert reconcile.reconcile(model_server.url).unloaded == []


def test_another_folder_under_our_name_is_put_right(
    project: Project, tmp_path: Path, model_server: FakeModelServer
) -> None:
    model = candidate(project, tmp_path)
    serve(model)
    model_server.adapters = {model.serving_name: "/somewhere/else"}

    reconcile.reconcile(model_server.url)

    assert model_server.adapters == {model.serving_name: model.adapter_path}


def test_an_adapter_that_cannot_be_loaded_is_drift_and_costs_no_neighbour(
    project: Project, tmp_path: Path, model_server: FakeModelServer
) -> None:
    broken, good = candidate(project, tmp_path, "v1.0.0"), candidate(project, tmp_path, "v1.0.1")
    make_evaluation(good, broken, state="running")
    model_server.refuse.add(broken.serving_name)

    report = reconcile.reconcile(model_server.url)

    assert list(model_server.adapters) == [good.serving_name]
    assert not report.ok
    assert report.drift[0].startswith(f"{broken.serving_name} cannot be loaded")


def test_a_server_that_is_away_is_said_and_nothing_raised(
    project: Project, tmp_path: Path, model_server: FakeModelServer
) -> None:
    serve(candidate(project, tmp_path))
    model_server.away = True

    report = reconcile.reconcile(model_server.url)

    assert "503" in report.error
    tasks.reconcile_servers()


def test_a_second_turn_does_nothing(project: Project, tmp_path: Path, model_server: FakeModelServer) -> None:
    serve(candidate(project, tmp_path))
    reconcile.reconcile(model_server.url)

    report = reconcile.reconcile(model_server.url)

    assert (report.loaded, report.unloaded, report.drift) == ([], [], [])


def test_a_project_with_a_server_of_its_own_is_reconciled_there(
    project: Project, tmp_path: Path, model_server: FakeModelServer
) -> None:
    own = FakeModelServer()
    try:
        policy = policies.of(project)
        policy.serving_url = own.url
        policy.save()
        model = candidate(project, tmp_path)
        serve(model)

        tasks.reconcile_servers()

        assert list(own.adapters) == [model.serving_name]
        assert model_server.adapters == {}
        assert reconcile.public_url_of(project) == f"{own.url}/v1"
    finally:
        own.close()


def test_without_a_model_server_there_is_nothing_to_do(project: Project, tmp_path: Path) -> None:
    serve(candidate(project, tmp_path))

    assert reconcile.reconcile_all() == []
    assert reconcile.public_url_of(project) == ""
