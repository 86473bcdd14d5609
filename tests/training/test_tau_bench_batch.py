"""A hundred real runs of a foreign model: refused where they would be passed off as our policy's, trained where not."""

import json
import time
from pathlib import Path

import pytest
from django.test import Client
from pytest_django import Settings

from tests import builders
from tests.trajectories.recordings import needs_data, tau_bench
from training import batches, policies, shim
from training.models import BatchStatus, TrainedModel, TrainingBatch
from trajectories import indexing
from trajectories.models import Group, Project, Trajectory

pytestmark = [pytest.mark.django_db, needs_data]


class Recorded:
    """A project that holds the recordings, sent through the API."""

    def __init__(self) -> None:
        self.project: Project = builders.make_project()
        policy = policies.of(self.project)
        policy.base_model = "tiny-test"
        policy.save()
        _, key = builders.make_key(self.project)
        self.headers = builders.bearer(key)
        self.client = Client()

    def send(self) -> dict[str, list[dict[str, object]]]:
        lines = []
        for body in tau_bench():
            body["scenario"] = {"id": body.pop("scenario_id"), "split": "train"}
            lines.append(json.dumps(body))
        answer = self.client.post(
            "/api/v1/trajectories/bulk/?format=messages",
            "\n".join(lines),
            content_type="application/x-ndjson",
            headers=self.headers,
        )
        assert answer.status_code == 207
        indexing.drain(self.project)
        found: dict[str, list[dict[str, object]]] = answer.json()
        return found

    def trigger(self, **body: object) -> tuple[int, dict[str, object]]:
        answer = self.client.post(
            "/api/v1/batches/", json.dumps(body), content_type="application/json", headers=self.headers
        )
        return answer.status_code, answer.json()

    def model(self) -> dict[str, object]:
        found: dict[str, object] = self.client.get("/api/v1/models/v1.0.0/", headers=self.headers).json()
        return found


@pytest.fixture
def recorded(settings: Settings, tmp_path: Path) -> Recorded:
    settings.JOBS_DIR = tmp_path / "jobs"
    settings.ADAPTERS_DIR = tmp_path / "adapters"
    settings.MODEL_SERVER_URL = ""
    settings.TRAINER_COMMAND = ["external"]
    made = Recorded()
    answer = made.send()
    assert answer["errors"] == [] and len(answer["successes"]) == 100
    return made


def test_they_are_25_groups_of_4_of_which_11_have_spread(recorded: Recorded) -> None:
    groups = list(Group.objects.filter(project=recorded.project, state="closed"))

    assert [group.n for group in groups] == [4] * 25
    assert sum(bool(group.reward_spread()) for group in groups) == 11
    assert {group.behaviour for group in groups} == {"foreign:gpt-4o"}


def test_sending_them_again_changes_nothing(recorded: Recorded) -> None:
    before = list(Trajectory.objects.filter(project=recorded.project).order_by("pk").values_list("pk", "content_hash"))

    answer = recorded.send()

    after = list(Trajectory.objects.filter(project=recorded.project).order_by("pk").values_list("pk", "content_hash"))
    assert (answer["errors"], after) == ([], before)
    assert Group.objects.filter(project=recorded.project).count() == 25


def test_grpo_is_refused_with_the_reason_even_when_forced(recorded: Recorded) -> None:
    status, answer = recorded.trigger(mode="grpo", force=True)

    assert status == 409
    assert "25 groups: not played by a version of this project" in str(answer["detail"])
    assert "filtered and sft (off-policy, uncorrected)" in str(answer["detail"])


def test_filtered_freezes_the_11_groups_and_trains_what_is_above_the_mean(recorded: Recorded) -> None:
    status, answer = recorded.trigger(mode="filtered", force=True)
    assert (status, answer["groups"], answer["trajectories"]) == (201, 11, 44)
    batch = TrainingBatch.objects.get(batch_id=answer["batch_id"])

    batches.tend(batch)

    assert (batch.status, batch.off_policy) == (BatchStatus.TRAINING, True)
    trained = batch.items.filter(is_trained=True)
    assert {item.reward for item in trained} == {1.0}
    assert trained.count() == batch.items.filter(reward=1.0).count()


@pytest.mark.slow
@pytest.mark.django_db(transaction=True)
def test_a_filtered_batch_trains_a_version_that_says_off_policy_and_shows_which(
    recorded: Recorded, settings: Settings
) -> None:
    settings.TRAINER_COMMAND = []
    # The tiny base reads bytes: most of these runs have more than 20,000, so the short ones stand for all.
    settings_of_the_run = {"max_sequence_tokens": 12_000, "trajectories_per_step": 64, "epochs": 1}
    status, answer = recorded.trigger(mode="filtered", force=True, hyperparameters=settings_of_the_run)
    assert status == 201
    batch = TrainingBatch.objects.get(batch_id=answer["batch_id"])

    until = time.monotonic() + 240
    while batch.status not in (BatchStatus.COMPLETED, BatchStatus.FAILED) and time.monotonic() < until:
        batches.tend(batch)
        batch.refresh_from_db()
        time.sleep(0.5)
    shim.stop_all(Path(settings.JOBS_DIR))

    assert (batch.status, batch.error) == (BatchStatus.COMPLETED, "")
    model = TrainedModel.objects.get(batch=batch)
    assert model.off_policy and model.summary["uncorrected"]
    shown = recorded.model()
    assert "Off-policy, uncorrected" in str(shown["notes"])
    lineage = shown["lineage"]
    assert isinstance(lineage, dict)
    assert [row["behaviour"] for row in lineage["data"]["behaviours"]] == ["foreign:gpt-4o"]
