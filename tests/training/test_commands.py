"""train, judge and check_readiness at a terminal."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command
from pytest_django import Settings

from tests import builders
from tests.training.recorded import recorded_group
from training import policies
from training.models import BatchStatus, TrainingBatch
from trajectories.models import Project

pytestmark = pytest.mark.django_db


@pytest.fixture
def project(settings: Settings, tmp_path: Path) -> Iterator[Project]:
    settings.JOBS_DIR = tmp_path
    settings.MODEL_SERVER_URL = ""
    settings.TRAINER_COMMAND = ["external"]
    project = builders.make_project("shop")
    policy = policies.of(project)
    policy.base_model = "tiny"
    policy.min_trajectories = 4
    policy.min_scenario_groups = 1
    policy.save()
    builders.make_model(project, "v1.0.0", status="deployed")
    yield project


def run(*words: str) -> str:
    out = io.StringIO()
    call_command(*words, stdout=out)
    return out.getvalue()


def test_train_starts_a_batch_and_says_its_id(project: Project) -> None:
    recorded_group(project)

    said = run("train", "--project", "shop")

    batch = TrainingBatch.objects.get(project=project)
    assert said == f"Batch {batch.batch_id}: 4 trajectories, 1 groups.\n"
    assert batch.status == BatchStatus.PENDING


def test_train_says_why_not(project: Project) -> None:
    with pytest.raises(CommandError, match="Not ready to train: 0 of 4 trajectories"):
        run("train", "--project", "shop")
    with pytest.raises(CommandError, match="there are no closed groups"):
        run("train", "--project", "shop", "--force")
    with pytest.raises(CommandError, match="There is no project 'nowhere'"):
        run("train", "--project", "nowhere")
    with pytest.raises(CommandError, match="learning_rat"):
        run("train", "--project", "shop", "--hyperparameters", '{"learning_rat": 1}')


def test_check_readiness_says_what_is_missing_and_ends_with_1(project: Project) -> None:
    out = io.StringIO()

    with pytest.raises(SystemExit) as ended:
        call_command("check_readiness", "--project", "shop", stdout=out)

    assert ended.value.code == 1
    assert "missing 0 of 4 trajectories" in out.getvalue()


def test_check_readiness_as_json_is_the_apis_body(project: Project) -> None:
    recorded_group(project)

    said = json.loads(run("check_readiness", "--project", "shop", "--json"))

    assert said["ready"] is True
    assert {row["check"] for row in said["reasons"]} >= {"trajectories", "scenario_groups", "data_quality"}


def test_judge_without_a_judge_says_what_counts_then(project: Project) -> None:
    assert "the recorded reward does" in run("judge", "--project", "shop")
