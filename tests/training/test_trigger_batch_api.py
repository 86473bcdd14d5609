"""Batches and versions by HTTP: what is triggered, what is refused and why, and the data for trainers of others."""

import hashlib
import json
from pathlib import Path

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from pytest_django import Settings

from tests import builders
from tests.training.recorded import recorded_group
from tests.training.scripted_trainer import safetensors
from training import batches, policies
from training.models import BatchStatus, Mode, ModelStatus, TrainedModel, TrainingBatch
from training.trainer import job as wire
from trajectories.models import GroupState, Project, Scope, Trajectory

pytestmark = pytest.mark.django_db

CONFIG = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "tiny"}
WEIGHTS = safetensors({"lora_A": [1.0] * 4, "lora_B": [0.5] * 4})


class Api:
    """The API as one key of one project sees it."""

    def __init__(self, project: Project, *scopes: str) -> None:
        _, key = builders.make_key(project, *scopes)
        self.headers = builders.bearer(key)
        self.client = Client()

    def post(self, path: str, body: object = None) -> tuple[int, dict[str, object]]:
        answer = self.client.post(
            f"/api/v1/{path}", json.dumps(body or {}), content_type="application/json", headers=self.headers
        )
        return answer.status_code, answer.json()

    def get(self, path: str) -> tuple[int, dict[str, object]]:
        answer = self.client.get(f"/api/v1/{path}", headers=self.headers)
        return answer.status_code, answer.json()

    def send_adapter(
        self, batch_id: str, *, weights: bytes = WEIGHTS, config: object = CONFIG
    ) -> tuple[int, dict[str, object]]:
        form = {
            "batch_id": batch_id,
            "config": SimpleUploadedFile("adapter_config.json", json.dumps(config).encode()),
            "adapter": SimpleUploadedFile("adapter_model.safetensors", weights),
        }
        answer = self.client.post("/api/v1/models/", form, headers=self.headers)
        return answer.status_code, answer.json()


@pytest.fixture(autouse=True)
def folders(settings: Settings, tmp_path: Path) -> None:
    settings.JOBS_DIR = tmp_path / "jobs"
    settings.ADAPTERS_DIR = tmp_path / "adapters"
    settings.MODEL_SERVER_URL = ""
    settings.TRAINER_COMMAND = ["external"]


@pytest.fixture
def project() -> Project:
    project = builders.make_project()
    policy = policies.of(project)
    policy.base_model = "tiny"
    policy.min_trajectories = 8
    policy.min_scenario_groups = 2
    policy.save()
    builders.make_model(project, "v1.0.0", status="deployed")
    return project


@pytest.fixture
def api(project: Project) -> Api:
    return Api(project)


def triggered(api: Api, **body: object) -> TrainingBatch:
    status, answer = api.post("batches/", body)
    assert status == 201, answer
    return TrainingBatch.objects.get(batch_id=answer["batch_id"])


def frozen(api: Api, **body: object) -> TrainingBatch:
    """A batch that waits in training for an adapter from outside."""
    batch = triggered(api, **body)
    batches.tend(batch)
    assert batch.status == BatchStatus.TRAINING, batch.error
    return batch


# --- trigger --------------------------------------------------------------------------------------------------------


def test_a_ready_project_gets_a_batch(project: Project, api: Api) -> None:
    recorded_group(project)
    recorded_group(project)

    status, answer = api.post("batches/")

    assert status == 201
    assert (answer["status"], answer["trajectories"], answer["groups"]) == ("pending", 8, 2)


@pytest.mark.parametrize("path", ["batches", "batches/"])
def test_paths_answer_with_and_without_the_slash(project: Project, api: Api, path: str) -> None:
    recorded_group(project)

    assert api.post(path, {"force": True})[0] == 201


def test_the_batch_keeps_whose_word_it_was_and_what_the_checks_said(project: Project, api: Api) -> None:
    recorded_group(project)

    batch = triggered(api, force=True, purpose="a try")

    assert batch.forced and batch.purpose == "a try"
    assert batch.requested_by_name.startswith("key ")
    assert batch.readiness["ready"] is False


def test_not_ready_is_409_with_every_reason(project: Project, api: Api) -> None:
    recorded_group(project)

    status, answer = api.post("batches/")

    assert status == 409
    reasons = answer["reasons"]
    assert isinstance(reasons, list)
    missing = {row["check"]: (row["value"], row["threshold"]) for row in reasons if not row["ok"]}
    assert missing == {"trajectories": (4, 8), "scenario_groups": (1, 2)}
    assert not TrainingBatch.objects.exists()


def test_force_waives_amounts(project: Project, api: Api) -> None:
    recorded_group(project)

    assert api.post("batches/", {"force": True})[0] == 201


@pytest.mark.parametrize("state", [GroupState.EXCLUDED, GroupState.HELD])
def test_force_never_waives_validity(project: Project, api: Api, state: str) -> None:
    group = recorded_group(project)
    group.state = state
    group.save()

    status, answer = api.post("batches/", {"force": True})

    assert status == 409
    assert f"1 group: {state}" in str(answer["detail"])


def test_foreign_data_is_refused_in_grpo_with_the_way_out(project: Project, api: Api) -> None:
    recorded_group(project, model="gpt-4o")

    status, answer = api.post("batches/", {"force": True, "mode": "grpo"})

    assert status == 409
    assert "1 group: not played by a version of this project" in str(answer["detail"])
    assert "filtered and sft (off-policy, uncorrected)" in str(answer["detail"])
    assert api.post("batches/", {"force": True, "mode": "filtered"})[0] == 201


def test_one_batch_at_a_time(project: Project, api: Api) -> None:
    recorded_group(project)
    recorded_group(project)
    first = triggered(api, force=True, limit=4)

    status, answer = api.post("batches/", {"force": True})

    assert status == 409
    assert f"Batch {first.batch_id} of this project is pending" in str(answer["detail"])


def test_limit_counts_trajectories_and_takes_whole_groups(project: Project, api: Api) -> None:
    recorded_group(project)
    recorded_group(project)

    assert api.post("batches/", {"force": True, "limit": 3})[0] == 409
    status, answer = api.post("batches/", {"force": True, "limit": 7})

    assert status == 201
    assert (answer["groups"], answer["trajectories"]) == (1, 4)


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"limit": 0}, "/limit"),
        ({"limit": "many"}, "/limit"),
        ({"mode": "magic"}, "/mode"),
        ({"force": "yes"}, "/force"),
        ({"hyperparameters": {"epochs": "two"}}, "/hyperparameters"),
        ({"hyperparameters": {"learning_rat": 1e-3}}, "/hyperparameters"),
    ],
)
def test_a_wrong_body_is_400_with_the_place(api: Api, body: dict[str, object], pointer: str) -> None:
    status, answer = api.post("batches/", body)

    assert (status, answer["pointer"]) == (400, pointer)


def test_nul_and_broken_json_are_400(api: Api) -> None:
    for body in ('{"purpose": "a\\u0000b"}', "{", "\ufeff[]"):
        answer = api.client.post("/api/v1/batches/", body, content_type="application/json", headers=api.headers)
        assert answer.status_code == 400
        assert answer["Content-Type"] == "application/problem+json"


def test_a_key_that_only_reads_triggers_nothing(project: Project) -> None:
    assert Api(project, Scope.READ, Scope.INGEST).post("batches/", {"force": True})[0] == 403


def test_a_version_is_not_trained_on_under_another_base(project: Project, api: Api) -> None:
    recorded_group(project)

    status, answer = api.post("batches/", {"force": True, "base_model": "another", "parent": "v1.0.0"})

    assert status == 409
    assert answer["detail"] == "v1.0.0 is an adapter of tiny, so it cannot be trained on as another."


def test_the_bare_base_is_asked_for_by_null(project: Project, api: Api) -> None:
    recorded_group(project)

    assert triggered(api, force=True, mode="sft", parent=None).parent is None


# --- look, cancel, retry --------------------------------------------------------------------------------------------


def test_unknown_and_other_projects_batches_are_404_alike(project: Project, api: Api) -> None:
    recorded_group(project)
    batch = triggered(api, force=True)
    stranger = Api(builders.make_project())

    for path in ("", "cancel/", "retry/"):
        ask = stranger.get if not path else stranger.post
        assert ask(f"batches/{batch.batch_id}/{path}")[0] == 404
        assert ask(f"batches/nothing/{path}")[0] == 404
    assert stranger.get(f"batches/{batch.batch_id}/data/")[0] == 404
    assert api.get("batches/%00/")[0] == 404


def test_a_failed_batch_says_why(project: Project, api: Api) -> None:
    recorded_group(project)
    batch = triggered(api, force=True)
    batches.fail(batch, "the disk was full")

    status, answer = api.get(f"batches/{batch.batch_id}/")

    assert status == 200
    assert (answer["status"], answer["error"], answer["progress"]) == ("failed", "the disk was full", 0.0)


def test_cancel_and_retry(project: Project, api: Api) -> None:
    recorded_group(project)
    batch = triggered(api, force=True)

    assert api.post(f"batches/{batch.batch_id}/retry/")[0] == 409
    batches.fail(batch, "the disk was full")
    status, answer = api.post(f"batches/{batch.batch_id}/retry/", {"reason": "there is room again"})
    assert (status, answer["status"]) == (200, "pending")
    status, answer = api.post(f"batches/{batch.batch_id}/cancel/", {"reason": "wrong one"})
    assert (status, answer["status"]) == (200, "cancelled")
    assert api.post(f"batches/{batch.batch_id}/cancel/")[0] == 409


def test_batches_are_listed_newest_first(project: Project, api: Api) -> None:
    made = [builders.make_batch(project, status="failed").batch_id for _ in range(3)]

    _, first = api.get("batches/?limit=2")
    _, second = api.get(f"batches/?limit=2&cursor={first['next']}")

    ids = [row["batch_id"] for page in (first, second) for row in page["results"]]  # type: ignore[attr-defined]  # JSON
    assert ids == made[::-1]
    assert second["next"] is None


# --- what is frozen -------------------------------------------------------------------------------------------------


def test_advantages_are_frozen_by_value(project: Project, api: Api) -> None:
    recorded_group(project, (0.0, 0.0, 1.0, 1.0))

    batch = frozen(api, force=True)

    assert [round(item.advantage, 3) for item in batch.items.order_by("trajectory_ref")] == [-1, -1, 1, 1]
    assert [item.reward for item in batch.items.order_by("trajectory_ref")] == [0.0, 0.0, 1.0, 1.0]
    assert not batch.off_policy


def test_a_reward_that_changes_later_changes_nothing_frozen(project: Project, api: Api) -> None:
    recorded_group(project)
    batch = frozen(api, force=True)
    before = data_of(api, batch)

    Trajectory.objects.filter(project=project).update(reward=7.0)

    assert data_of(api, batch) == before


def test_filtered_trains_what_is_above_the_mean_and_says_off_policy(project: Project, api: Api) -> None:
    recorded_group(project, (0.0, 0.0, 1.0, 1.0), model="gpt-4o")

    batch = frozen(api, force=True, mode="filtered")

    assert [item.is_trained for item in batch.items.order_by("trajectory_ref")] == [False, False, True, True]
    assert batch.off_policy
    assert TrainedModel.objects.get(batch=batch).off_policy


def test_imitation_of_the_good_ones_alone(project: Project, api: Api) -> None:
    recorded_group(project, (0.0, None, 1.0, 1.0), model="oracle")

    batch = frozen(api, force=True, mode="sft", hyperparameters={"min_reward": 1.0})

    items = {item.trajectory_ref[-1]: item for item in batch.items.all()}
    assert {name: item.is_trained for name, item in items.items()} == {"0": False, "1": False, "2": True, "3": True}
    assert items["1"].why_not == "reward unknown, min_reward is 1"
    assert {item.advantage for item in items.values()} == {1.0}


def test_imitation_takes_what_has_no_scenario(project: Project, api: Api) -> None:
    group = recorded_group(project, (1.0,), model="oracle")
    Trajectory.objects.filter(group=group).update(group=None, scenario=None)

    batch = frozen(api, force=True, mode="sft")

    assert batch.items.get().is_trained
    assert b"alone-" in data_of(api, batch)


def test_a_cut_run_stands_in_the_baseline_without_gradient(project: Project, api: Api) -> None:
    recorded_group(project, (0.0, 1.0), final_status="truncated_steps", scenario_id="cut")
    recorded_group(project)

    batch = frozen(api, force=True)

    left_out = batch.groups.get(is_used=False)
    assert left_out.scenario_ref == "cut" and "cut at the step limit" in left_out.left_out


def test_a_fault_of_the_environment_is_in_no_baseline(project: Project, api: Api) -> None:
    group = recorded_group(project, (0.0, 0.0, 1.0, 1.0))
    Trajectory.objects.filter(group=group, reward=0.0).update(final_status="environment_error")
    recorded_group(project, (0.0, 1.0))

    batch = frozen(api, force=True)

    assert batch.groups.get(is_used=False).left_out == "no spread in the rewards"
    assert batch.n_trajectories == 2


def test_a_group_excluded_after_the_trigger_is_left_out(project: Project, api: Api) -> None:
    first, second = recorded_group(project), recorded_group(project)
    batch = triggered(api, force=True)
    first.state = GroupState.EXCLUDED
    first.save()

    batches.tend(batch)

    assert list(batch.groups.filter(is_used=True).values_list("group", flat=True)) == [second.pk]
    assert api.get(f"batches/{batch.batch_id}/")[1]["left_out"] == [{"reason": "excluded", "groups": 1}]


def test_when_nothing_is_left_to_learn_the_batch_fails_with_the_reason(project: Project, api: Api) -> None:
    group = recorded_group(project)
    batch = triggered(api, force=True)
    Trajectory.objects.filter(group=group).update(reward=1.0)

    batches.tend(batch)

    assert batch.status == BatchStatus.FAILED
    assert "no spread in the rewards" in batch.error
    assert not TrainedModel.objects.filter(batch=batch).exists()  # no version was spent on it


def test_a_placebo_shuffles_the_same_rewards_inside_each_group(project: Project, api: Api) -> None:
    for number in range(6):
        recorded_group(project, (0.0, 0.25, 0.5, 1.0), scenario_id=f"s{number}")

    batch = frozen(api, force=True, shuffle_rewards=True, seed=1)

    shuffled = 0
    for row in batch.groups.all():
        items = list(row.items.select_related("trajectory"))
        assert sorted(item.reward or 0.0 for item in items) == [0.0, 0.25, 0.5, 1.0]
        shuffled += [item.reward for item in items] != [item.trajectory and item.trajectory.reward for item in items]
    assert shuffled > 3


# --- bring your own trainer -----------------------------------------------------------------------------------------


def data_of(api: Api, batch: TrainingBatch) -> bytes:
    answer = api.client.get(f"/api/v1/batches/{batch.batch_id}/data/", headers=api.headers)
    assert answer.status_code == 200
    return b"".join(answer.streaming_content)  # type: ignore[attr-defined]  # a streaming answer


def test_the_data_are_what_our_trainer_reads_with_a_hash_that_can_be_checked(project: Project, api: Api) -> None:
    recorded_group(project)
    recorded_group(project)
    batch = frozen(api, force=True)

    first, *lines = data_of(api, batch).splitlines(keepends=True)

    groups = wire.read_groups(b"".join(lines))
    manifest = hashlib.sha256()
    for group in groups:
        for one in group.trajectories:
            said = [one.trajectory_id, one.content_hash, one.reward, one.advantage, one.weight, one.train]
            manifest.update(json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    header = json.loads(first)
    assert header["manifest_hash"] == batch.manifest_hash == manifest.hexdigest()
    assert (header["groups"], header["trajectories"], header["mode"]) == (2, 8, "grpo")


def test_recorded_tokens_and_log_probabilities_go_along_for_our_own_policy_alone(project: Project, api: Api) -> None:
    group = recorded_group(project)
    foreign = recorded_group(project, model="gpt-4o")
    batch = frozen(api, force=True, mode="filtered")

    _, *lines = data_of(api, batch).splitlines()
    calls = {
        line.group: [call for one in line.trajectories for history in one.histories for call in history.calls]
        for line in wire.read_groups(b"\n".join(lines))
    }

    assert all(call.token_ids and call.logprobs for call in calls[str(group.pk)])
    assert not any(call.token_ids or call.logprobs for call in calls[str(foreign.pk)])


def test_data_before_the_freeze_are_refused(project: Project, api: Api) -> None:
    recorded_group(project)
    batch = triggered(api, force=True)

    status, answer = api.get(f"batches/{batch.batch_id}/data/")

    assert (status, answer["code"]) == (409, "refused")


def test_an_adapter_sent_for_a_batch_becomes_its_version(project: Project, api: Api) -> None:
    recorded_group(project)
    batch = frozen(api, force=True)

    status, answer = api.send_adapter(batch.batch_id)

    assert status == 201, answer
    assert (answer["status"], answer["origin"], answer["version"]) == ("ready", "external", "v1.0.1")
    assert (answer["parent"], answer["batch_id"]) == ("v1.0.0", batch.batch_id)
    batch.refresh_from_db()
    assert batch.status == BatchStatus.COMPLETED
    assert api.get(f"batches/{batch.batch_id}/")[1]["model_version"] == "v1.0.1"


def test_an_adapter_is_taken_once(project: Project, api: Api) -> None:
    recorded_group(project)
    batch = frozen(api, force=True)
    api.send_adapter(batch.batch_id)

    status, answer = api.send_adapter(batch.batch_id)

    assert status == 409
    assert "is completed" in str(answer["detail"])


@pytest.mark.parametrize(
    ("weights", "config", "said"),
    [
        (b"\x80\x04pickle", CONFIG, "no safetensors file"),
        (WEIGHTS[:-4], CONFIG, "Was it cut off?"),
        (WEIGHTS + b"more", CONFIG, "Was it cut off?"),
        (safetensors({"lora_A": [1.0] * 4, "lora_B": [0.0] * 4}), CONFIG, "changes nothing"),
        (safetensors({"lora_A": [1.0] * 4, "lora_B": [float("nan")] * 4}), CONFIG, "NaN or an infinity"),
        (b"\xff" * 64, CONFIG, "its header would have"),
        (WEIGHTS, {"peft_type": "IA3"}, "Only LORA"),
        (WEIGHTS, ["not", "an", "object"], "not a JSON object"),
        (WEIGHTS, {**CONFIG, "auto_mapping": {"base_model_class": "os.system"}}, "names code to load"),
    ],
)
def test_what_is_no_adapter_is_400_and_the_batch_waits_on(
    project: Project, api: Api, weights: bytes, config: object, said: str
) -> None:
    recorded_group(project)
    batch = frozen(api, force=True)

    status, answer = api.send_adapter(batch.batch_id, weights=weights, config=config)

    assert status == 400
    assert said in str(answer["detail"])
    batch.refresh_from_db()
    assert batch.status == BatchStatus.TRAINING


def test_a_form_that_lacks_a_part_is_400(project: Project, api: Api) -> None:
    recorded_group(project)
    batch = frozen(api, force=True)

    answer = api.client.post("/api/v1/models/", {"batch_id": batch.batch_id}, headers=api.headers)

    assert (answer.status_code, answer.json()["pointer"]) == (400, "/config")
    assert api.post("models/", {"batch_id": batch.batch_id})[0] == 415


# --- versions -------------------------------------------------------------------------------------------------------


def test_versions_are_listed_newest_first(project: Project, api: Api) -> None:
    builders.make_model(project, "v1.0.9")
    builders.make_model(project, "v1.0.10", status="rejected")

    _, first = api.get("models/?limit=2")
    _, second = api.get(f"models/?limit=2&cursor={first['next']}")

    versions = [row["version"] for page in (first, second) for row in page["results"]]  # type: ignore[attr-defined]  # JSON
    assert versions == ["v1.0.10", "v1.0.9", "v1.0.0"]
    assert [row["version"] for row in api.get("models/?status=rejected")[1]["results"]] == ["v1.0.10"]  # type: ignore[attr-defined]  # JSON
    assert api.get("models/?cursor=nonsense")[0] == 400


def test_a_version_tells_where_it_comes_from(project: Project, api: Api) -> None:
    recorded_group(project, model="gpt-4o")
    recorded_group(project)
    batch = frozen(api, force=True, mode=Mode.FILTERED.value)
    api.send_adapter(batch.batch_id)

    status, answer = api.get("models/v1.0.1/")

    assert (status, answer["status"], answer["off_policy"]) == (200, ModelStatus.READY, True)
    lineage = answer["lineage"]
    assert isinstance(lineage, dict)
    assert lineage["ancestors"] == ["v1.0.0"]
    assert [(row["behaviour"], row["trajectories"], row["off_policy"]) for row in lineage["data"]["behaviours"]] == [
        ("foreign:gpt-4o", 4, True),
        ("v1.0.0", 4, False),
    ]
    assert lineage["data"]["manifest_hash"] == batch.manifest_hash
    assert "off-policy" in str(answer["notes"]).lower()
    assert api.get("models/v9.9.9/")[0] == 404
