"""Who lets a version serve: request, gate, a second person, rollout, rollback."""

import json
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.utils import timezone

from tests.builders import bearer, make_agent, make_evaluation, make_key, make_member, make_project, make_user
from tests.training.candidates import candidate, evaluated
from tests.training.model_server import FakeModelServer
from training import deployments, model_life, routing, tasks
from training.models import Approval, Deployment, DeploymentState, ModelStatus, ServingInterval, TrainedModel
from trajectories import history
from trajectories.errors import Invalid, Refused
from trajectories.history import SYSTEM, Actor
from trajectories.models import Membership, Project, Role

pytestmark = pytest.mark.django_db

NO_BETTER = ((1.0, 0.0) * 6, (0.0, 1.0) * 6)
WORSE = ((0.0,) * 12, (1.0,) * 12)


@pytest.fixture
def project() -> Project:
    return make_project()


@pytest.fixture
def approver(project: Project) -> Actor:
    return person(project, Role.APPROVER)


def person(project: Project, role: str) -> Actor:
    user = make_member(project, role)
    return Actor(user.get_username(), user)


def requested(project: Project, folder: Path, version: str = "v1.0.0", **fields: object) -> Deployment:
    """A request by an operator for a version that is shown to be better than what serves."""
    model = candidate(project, folder, version)
    evaluated(model, routing.serving_now(project))
    return deployments.request(model, by=person(project, Role.OPERATOR), **fields)  # type: ignore[arg-type]  # a table


def rolled_out(project: Project, folder: Path, version: str, approver: Actor, **fields: object) -> Deployment:
    deployment = requested(project, folder, version, **fields)
    deployments.approve(deployment, by=approver)
    deployments.roll_out(deployment)
    assert deployment.state == DeploymentState.ACTIVE, deployment.error
    return deployment


def status_of(deployment: Deployment) -> str:
    return TrainedModel.objects.get(pk=deployment.model_id).status


def checks(deployment: Deployment) -> dict[str, bool]:
    return {row["name"]: row["ok"] for row in deployment.gates}


# --- from request to serving --------------------------------------------------------------------------------------


def test_a_request_keeps_its_evidence_and_the_gates_rows(project: Project, tmp_path: Path) -> None:
    deployment = requested(project, tmp_path, reason="better on all")

    assert deployment.state == DeploymentState.REQUESTED
    assert checks(deployment) == dict.fromkeys(
        ("ready", "adapter", "learned", "evaluated", "enough_scenarios", "better", "not_worse"), True
    )
    assert {"name", "ok", "value", "threshold", "detail"} <= set(deployment.gates[0])
    assert deployment.evidence["result"]["gain"]["lower"] == 1.0
    assert deployment.evaluation is not None


def test_the_evidence_stays_as_it_was_when_asked(project: Project, tmp_path: Path) -> None:
    deployment = requested(project, tmp_path)
    evaluated(deployment.model, None, WORSE)
    deployment.refresh_from_db()

    assert deployment.evidence["result"]["gain"]["mean"] == 1.0


def test_an_approved_version_is_loaded_answers_and_then_serves(
    project: Project, tmp_path: Path, approver: Actor, model_server: FakeModelServer
) -> None:
    deployment = requested(project, tmp_path)
    deployments.approve(deployment, by=approver, reason="looks good")

    tasks.roll_out(deployment.pk)

    deployment.refresh_from_db()
    interval = ServingInterval.objects.get()
    assert deployment.state == DeploymentState.ACTIVE
    assert model_server.asked == [deployment.model.serving_name]
    assert (interval.model, interval.slot, interval.by_name) == (deployment.model, "stable", approver.name)
    assert status_of(deployment) == ModelStatus.DEPLOYED
    assert [one.to for one in history.of(deployment)] == ["active", "rolling_out", "approved", "requested"]
    assert str(Approval.objects.get()) == f"approved by {approver.name}"


def test_the_next_version_supersedes_the_last(
    project: Project, tmp_path: Path, approver: Actor, model_server: FakeModelServer
) -> None:
    first = rolled_out(project, tmp_path, "v1.0.0", approver)
    second = rolled_out(project, tmp_path, "v1.0.1", approver)
    first.refresh_from_db()

    assert (first.state, status_of(first)) == (DeploymentState.SUPERSEDED, ModelStatus.RETIRED)
    assert (second.replaces, routing.serving_now(project)) == (first.model, second.model)
    old, new = ServingInterval.objects.order_by("pk")
    assert old.ends_at is not None
    assert new.starts_at >= old.ends_at
    assert new.ends_at is None


def test_a_rollout_that_runs_twice_switches_once(
    project: Project, tmp_path: Path, approver: Actor, model_server: FakeModelServer
) -> None:
    deployment = requested(project, tmp_path)
    deployments.approve(deployment, by=approver)
    stale = Deployment.objects.get(pk=deployment.pk)

    deployments.roll_out(deployment)
    deployments.roll_out(stale)
    tasks.roll_out_waiting()

    assert ServingInterval.objects.count() == 1
    assert Deployment.objects.get().state == DeploymentState.ACTIVE


def test_a_rollout_that_was_killed_is_taken_up_by_the_sweep(
    project: Project, tmp_path: Path, approver: Actor, model_server: FakeModelServer
) -> None:
    deployment = requested(project, tmp_path)
    deployments.approve(deployment, by=approver)
    Deployment.objects.update(state=DeploymentState.ROLLING_OUT)  # as a worker leaves it that dies while loading

    tasks.roll_out_waiting()

    assert Deployment.objects.get().state == DeploymentState.ACTIVE


def test_it_waits_for_a_model_server_that_is_away_and_fails_after_a_while(
    project: Project, tmp_path: Path, approver: Actor, model_server: FakeModelServer
) -> None:
    first = rolled_out(project, tmp_path, "v1.0.0", approver)
    deployment = requested(project, tmp_path, "v1.0.1")
    deployments.approve(deployment, by=approver)
    model_server.away = True

    tasks.roll_out(deployment.pk)
    deployment.refresh_from_db()
    assert deployment.state == DeploymentState.ROLLING_OUT

    Deployment.objects.filter(pk=deployment.pk).update(
        state_since=timezone.now() - deployments.PATIENCE - timedelta(seconds=1)
    )
    tasks.roll_out_waiting()
    deployment.refresh_from_db()

    assert deployment.state == DeploymentState.FAILED
    assert "away" in deployment.error
    assert routing.serving_now(project) == first.model


def test_a_version_that_the_server_refuses_fails_and_the_old_one_stays(
    project: Project, tmp_path: Path, approver: Actor, model_server: FakeModelServer
) -> None:
    first = rolled_out(project, tmp_path, "v1.0.0", approver)
    deployment = requested(project, tmp_path, "v1.0.1")
    model_server.refuse.add(deployment.model.serving_name)
    deployments.approve(deployment, by=approver)

    deployments.roll_out(deployment)

    assert deployment.state == DeploymentState.FAILED
    assert "size mismatch" in deployment.error
    assert status_of(deployment) == ModelStatus.READY
    assert routing.serving_now(project) == first.model


def test_without_a_model_server_a_rollout_fails_with_a_sentence(
    project: Project, tmp_path: Path, approver: Actor
) -> None:
    deployment = requested(project, tmp_path)
    deployments.approve(deployment, by=approver)

    deployments.roll_out(deployment)

    assert deployment.state == DeploymentState.FAILED
    assert "MODEL_SERVER_URL" in deployment.error


# --- the gate -----------------------------------------------------------------------------------------------------


def test_the_gate_refuses_what_is_not_shown_to_be_better(project: Project, tmp_path: Path, approver: Actor) -> None:
    model = candidate(project, tmp_path)
    evaluated(model, rewards=NO_BETTER)
    deployment = deployments.request(model, by=SYSTEM)
    assert checks(deployment)["better"] is False

    with pytest.raises(Refused, match="not shown to be better") as refusal:
        deployments.approve(deployment, by=approver, reason="let it through")

    assert [row["check"] for row in refusal.value.reasons] == ["better"]
    assert Deployment.objects.get().state == DeploymentState.REQUESTED
    assert not Approval.objects.exists()


def test_a_version_that_fell_is_refused_whatever_anyone_says(project: Project, tmp_path: Path, approver: Actor) -> None:
    model = candidate(project, tmp_path)
    evaluated(model, rewards=WORSE)
    deployment = deployments.request(model, by=SYSTEM)

    with pytest.raises(Refused, match="is worse than the base"):
        deployments.approve(deployment, by=approver, reason="I insist", override=True)


def test_too_little_evidence_may_be_overridden_with_a_reason(project: Project, tmp_path: Path, approver: Actor) -> None:
    model = candidate(project, tmp_path)
    evaluated(model, rewards=((1.0,) * 3, (0.0,) * 3))
    deployment = deployments.request(model, by=SYSTEM)

    with pytest.raises(Refused, match="3 shared scenarios, 10 are needed"):
        deployments.approve(deployment, by=approver, reason="it is obvious")
    with pytest.raises(Refused, match="takes a reason"):
        deployments.approve(deployment, by=approver, override=True)
    deployments.approve(deployment, by=approver, reason="it is obvious", override=True)

    assert deployment.state == DeploymentState.APPROVED


def test_without_an_evaluation_the_gate_names_the_way_out(project: Project, tmp_path: Path, approver: Actor) -> None:
    deployment = deployments.request(candidate(project, tmp_path), by=SYSTEM)

    with pytest.raises(Refused, match="POST /api/v1/evaluations/ starts that"):
        deployments.approve(deployment, by=approver)


def test_evidence_against_another_version_than_serves_is_not_enough(
    project: Project, tmp_path: Path, approver: Actor, model_server: FakeModelServer
) -> None:
    rolled_out(project, tmp_path, "v1.0.0", approver)
    model = candidate(project, tmp_path, "v1.0.1")
    evaluated(model, None)
    deployment = deployments.request(model, by=SYSTEM)

    with pytest.raises(Refused, match=r"against the base, while v1\.0\.0 serves now"):
        deployments.approve(deployment, by=approver)


def test_the_gate_is_asked_again_at_the_approval(project: Project, tmp_path: Path, approver: Actor) -> None:
    deployment = requested(project, tmp_path)
    Path(deployment.model.adapter_path).rmdir()

    with pytest.raises(Refused, match="There is no adapter"):
        deployments.approve(deployment, by=approver, reason="now", override=True)


@pytest.mark.parametrize("summary", [{"steps_done": 0, "weight_change": 0.4}, {"steps_done": 9, "weight_change": 0.0}])
def test_a_run_that_came_to_nothing_is_refused(
    project: Project, tmp_path: Path, approver: Actor, summary: dict[str, object]
) -> None:
    model = candidate(project, tmp_path, summary=summary)
    evaluated(model)
    deployment = deployments.request(model, by=SYSTEM)

    with pytest.raises(Refused, match="the weights moved by"):
        deployments.approve(deployment, by=approver, reason="so what", override=True)


def test_an_evaluation_under_way_is_no_evidence(project: Project, tmp_path: Path, approver: Actor) -> None:
    model = candidate(project, tmp_path)
    make_evaluation(model, state="running")

    with pytest.raises(Refused, match="The evaluation is running"):
        deployments.approve(deployments.request(model, by=SYSTEM), by=approver)


# --- the second person --------------------------------------------------------------------------------------------


def test_nobody_approves_their_own_request(project: Project, tmp_path: Path) -> None:
    user = make_member(project, Role.OPERATOR)
    Membership.objects.create(project=project, user=user, role=Role.APPROVER)
    me = Actor(user.get_username(), user)
    model = candidate(project, tmp_path)
    evaluated(model)
    deployment = deployments.request(model, by=me)

    with pytest.raises(Refused, match="a second person decides"):
        deployments.approve(deployment, by=me)
    with pytest.raises(Refused, match="a second person decides"):
        deployments.reject(deployment, by=me, reason="changed my mind")


def test_not_even_a_superuser_does(project: Project, tmp_path: Path) -> None:
    root = make_user("root", superuser=True)
    model = candidate(project, tmp_path)
    evaluated(model)
    deployment = deployments.request(model, by=Actor("root", root))

    with pytest.raises(Refused, match="a second person decides"):
        deployments.approve(deployment, by=Actor("root", root))


@pytest.mark.parametrize("role", [Role.READER, Role.RESEARCHER, Role.OPERATOR])
def test_only_an_approver_of_the_project_decides(project: Project, tmp_path: Path, role: str) -> None:
    deployment = requested(project, tmp_path)
    elsewhere = person(make_project(), Role.APPROVER)

    for by in (person(project, role), elsewhere):
        with pytest.raises(Refused, match="is no approver of"):
            deployments.approve(deployment, by=by)


def test_a_key_without_owner_decides_nothing(project: Project, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="this key has no owner"):
        deployments.approve(requested(project, tmp_path), by=Actor("key robot"))


def test_a_rejection_takes_a_reason_and_rejects_the_version(project: Project, tmp_path: Path, approver: Actor) -> None:
    deployment = requested(project, tmp_path)
    with pytest.raises(Refused, match="takes a reason"):
        deployments.reject(deployment, by=approver, reason="  ")

    deployments.reject(deployment, by=approver, reason="answers rudely")

    assert (deployment.state, status_of(deployment)) == (DeploymentState.REJECTED, ModelStatus.REJECTED)
    model = TrainedModel.objects.get()
    with pytest.raises(Refused, match="only a version that is ready can be deployed"):
        deployments.request(model, by=SYSTEM)
    model_life.take_back_rejection(model, by=approver)
    assert deployments.request(model, by=SYSTEM).state == DeploymentState.REQUESTED


def test_a_request_can_be_withdrawn_and_not_decided_after(project: Project, tmp_path: Path, approver: Actor) -> None:
    deployment = requested(project, tmp_path)

    deployments.withdraw(deployment, by=SYSTEM)

    with pytest.raises(Refused, match="decided already: withdrawn"):
        deployments.approve(deployment, by=approver)


@pytest.mark.django_db(transaction=True)
def test_of_two_who_approve_at_once_the_second_is_told(tmp_path: Path) -> None:
    project = make_project()
    deployment = requested(project, tmp_path)
    two = [person(project, Role.APPROVER), person(project, Role.APPROVER)]
    start, said = threading.Barrier(2), {}

    def approve(by: Actor) -> None:
        mine = Deployment.objects.select_related("project", "model", "evaluation").get(pk=deployment.pk)
        start.wait(10)
        try:
            deployments.approve(mine, by=by)
            said[by.name] = "done"
        except Refused as refusal:
            said[by.name] = str(refusal)
        finally:
            connection.close()

    threads = [threading.Thread(target=approve, args=(by,)) for by in two]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    approval = Approval.objects.get()
    loser = next(by.name for by in two if by.name != approval.by_name)
    assert said == {
        approval.by_name: "done",
        loser: f"{deployment} is decided already: approved by {approval.by_name}.",
    }


# --- strategies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ab", "shadow"])
def test_what_is_not_built_is_refused_with_a_way_out(project: Project, tmp_path: Path, strategy: str) -> None:
    with pytest.raises(Refused, match="not built"):
        deployments.request(candidate(project, tmp_path), by=SYSTEM, strategy=strategy)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"strategy": "yolo"}, "there are immediate"),
        ({"strategy": "gradual", "weight": 0.0}, "above 0 and below 1"),
        ({"strategy": "gradual", "weight": float("nan")}, "above 0 and below 1"),
        ({"strategy": "immediate", "weight": 0.5}, "goes with `gradual`"),
        ({"strategy": "test"}, "give its agent_id"),
        ({"strategy": "immediate", "audience": "agent-1"}, "goes with the strategy `test`"),
    ],
    ids=str,
)
def test_a_wish_that_makes_no_sense_is_named(
    project: Project, tmp_path: Path, wish: dict[str, object], said: str
) -> None:
    with pytest.raises(Invalid, match=said):
        deployments.request(candidate(project, tmp_path), by=SYSTEM, **wish)  # type: ignore[arg-type]  # a table


def test_a_gradual_one_leaves_the_stable_one_in_place(
    project: Project, tmp_path: Path, approver: Actor, model_server: FakeModelServer
) -> None:
    first = rolled_out(project, tmp_path, "v1.0.0", approver)
    second = rolled_out(project, tmp_path, "v1.0.1", approver, strategy="gradual", weight=0.25)
    first.refresh_from_db()

    assert first.state == DeploymentState.ACTIVE
    assert (status_of(first), status_of(second)) == (ModelStatus.DEPLOYED, ModelStatus.DEPLOYED)
    assert {(one.slot, one.weight) for one in ServingInterval.objects.filter(ends_at=None)} == {
        ("stable", 1.0),
        ("canary", 0.25),
    }


def test_a_larger_share_keeps_the_agents_and_everyone_ends_it(
    project: Project, tmp_path: Path, approver: Actor, model_server: FakeModelServer
) -> None:
    first = rolled_out(project, tmp_path, "v1.0.0", approver)
    small = rolled_out(project, tmp_path, "v1.0.1", approver, strategy="gradual", weight=0.2)
    salt = ServingInterval.objects.get(slot="canary", ends_at=None).salt
    again = deployments.request(small.model, by=SYSTEM, strategy="gradual", weight=0.6)
    deployments.approve(again, by=approver)
    deployments.roll_out(again)
    assert ServingInterval.objects.get(slot="canary", ends_at=None).salt == salt

    everyone = deployments.request(small.model, by=SYSTEM)
    deployments.approve(everyone, by=approver)
    deployments.roll_out(everyone)

    states = [Deployment.objects.get(pk=one.pk).state for one in (first, small, again, everyone)]
    assert states == ["superseded", "superseded", "superseded", "active"]
    assert [one.slot for one in ServingInterval.objects.filter(ends_at=None)] == ["stable"]
    assert (status_of(first), status_of(everyone)) == (ModelStatus.RETIRED, ModelStatus.DEPLOYED)


def test_a_test_serves_one_agent_and_ends_with_its_rollback(
    project: Project, tmp_path: Path, approver: Actor, model_server: FakeModelServer
) -> None:
    first = rolled_out(project, tmp_path, "v1.0.0", approver)
    tester, other = make_agent(project, "tester"), make_agent(project, "other")

    trial = rolled_out(project, tmp_path, "v1.0.1", approver, strategy="test", audience="tester")
    assert (routing.model_for(tester).version, routing.model_for(other).version) == ("v1.0.1", "v1.0.0")
    assert routing.serving_now(project) == first.model

    deployments.roll_back(trial, by=approver)
    assert routing.model_for(tester).version == "v1.0.0"
    assert (status_of(trial), status_of(first)) == (ModelStatus.RETIRED, ModelStatus.DEPLOYED)


def test_a_version_waits_for_one_decision_at_a_time(project: Project, tmp_path: Path) -> None:
    deployment = requested(project, tmp_path)

    with pytest.raises(Refused, match="waits for a decision already"):
        deployments.request(deployment.model, by=SYSTEM)


def test_what_serves_is_not_deployed_again(
    project: Project, tmp_path: Path, approver: Actor, model_server: FakeModelServer
) -> None:
    deployment = rolled_out(project, tmp_path, "v1.0.0", approver)

    with pytest.raises(Refused, match="serves already"):
        deployments.request(deployment.model, by=SYSTEM)


# --- rollback -----------------------------------------------------------------------------------------------------


def test_a_rollback_brings_the_earlier_version_back_in_one_action(
    project: Project, tmp_path: Path, approver: Actor, model_server: FakeModelServer
) -> None:
    first = rolled_out(project, tmp_path, "v1.0.0", approver)
    second = rolled_out(project, tmp_path, "v1.0.1", approver)
    model_server.restart()

    deployments.roll_back(second, by=approver, reason="rude")

    assert second.state == DeploymentState.ROLLED_BACK
    assert routing.serving_now(project) == first.model
    assert (status_of(first), status_of(second)) == (ModelStatus.DEPLOYED, ModelStatus.RETIRED)
    assert first.model.serving_name in model_server.adapters


def test_the_first_version_rolls_back_to_the_bare_base(
    project: Project, tmp_path: Path, approver: Actor, model_server: FakeModelServer
) -> None:
    first = rolled_out(project, tmp_path, "v1.0.0", approver)

    deployments.roll_back(first, by=approver)

    assert routing.serving_now(project) is None
    assert ServingInterval.objects.get(ends_at=None).model is None
    assert status_of(first) == ModelStatus.RETIRED


def test_a_rollback_does_not_wait_for_a_model_server_that_is_away(
    project: Project, tmp_path: Path, approver: Actor, model_server: FakeModelServer
) -> None:
    first = rolled_out(project, tmp_path, "v1.0.0", approver)
    second = rolled_out(project, tmp_path, "v1.0.1", approver)
    model_server.away = True

    deployments.roll_back(second, by=approver)

    assert routing.serving_now(project) == first.model


def test_a_share_rolls_back_to_what_everyone_has(
    project: Project, tmp_path: Path, approver: Actor, model_server: FakeModelServer
) -> None:
    first = rolled_out(project, tmp_path, "v1.0.0", approver)
    second = rolled_out(project, tmp_path, "v1.0.1", approver, strategy="gradual", weight=0.5)

    deployments.roll_back(second, by=approver)

    assert [one.model for one in ServingInterval.objects.filter(ends_at=None)] == [first.model]
    assert status_of(second) == ModelStatus.RETIRED


def test_what_serves_no_more_cannot_be_rolled_back(
    project: Project, tmp_path: Path, approver: Actor, model_server: FakeModelServer
) -> None:
    first = rolled_out(project, tmp_path, "v1.0.0", approver)
    rolled_out(project, tmp_path, "v1.0.1", approver)
    first.refresh_from_db()

    with pytest.raises(Refused, match="only what serves can be rolled back"):
        deployments.roll_back(first, by=approver)


def test_a_rollout_under_way_can_be_called_off(
    project: Project, tmp_path: Path, approver: Actor, model_server: FakeModelServer
) -> None:
    deployment = requested(project, tmp_path)
    deployments.approve(deployment, by=approver)
    model_server.away = True
    tasks.roll_out(deployment.pk)
    deployment.refresh_from_db()
    late = Deployment.objects.get(pk=deployment.pk)  # as the worker holds it that is still loading

    deployments.roll_back(deployment, by=approver, reason="stop")
    model_server.away = False
    deployments.roll_out(late)

    assert Deployment.objects.get().state == DeploymentState.ROLLED_BACK
    assert not ServingInterval.objects.exists()
    assert status_of(deployment) == ModelStatus.READY


# --- by HTTP ------------------------------------------------------------------------------------------------------


def post(client: Client, path: str, key: str, **body: object) -> tuple[int, dict[str, object]]:
    answer = client.post(
        f"/api/v1/deployments/{path}", json.dumps(body), content_type="application/json", headers=bearer(key)
    )
    return answer.status_code, answer.json()


def owned_key(project: Project, user: User) -> str:
    return make_key(project, owner=user)[1]


def test_the_whole_way_by_http(client: Client, project: Project, tmp_path: Path, model_server: FakeModelServer) -> None:
    operator, decider = make_member(project, Role.OPERATOR), make_member(project, Role.APPROVER)
    model = candidate(project, tmp_path)
    evaluated(model)

    status, made = post(client, "", owned_key(project, operator), version="v1.0.0", reason="please")
    assert (status, made["version"], made["strategy"], made["state"]) == (201, "v1.0.0", "immediate", "requested")

    own, refusal = post(client, f"{made['id']}/approve/", owned_key(project, operator))
    assert (own, "no approver" in str(refusal["detail"])) == (409, True)

    status, approved = post(client, f"{made['id']}/approve/", owned_key(project, decider), reason="yes")
    assert (status, approved["state"]) == (200, "approved")
    tasks.roll_out_waiting()
    status, again = post(client, f"{made['id']}/approve/", owned_key(project, decider))
    assert (status, f"decided already: approved by {decider.username}" in str(again["detail"])) == (409, True)

    status, back = post(client, f"{made['id']}/rollback/", owned_key(project, operator), reason="no")
    assert (status, back["state"]) == (200, "rolled_back")


def test_a_refused_gate_is_a_409_with_its_rows(client: Client, project: Project, tmp_path: Path) -> None:
    model = candidate(project, tmp_path)
    evaluated(model, rewards=WORSE)
    _, made = post(client, "", make_key(project)[1], version="v1.0.0")

    status, problem = post(
        client, f"{made['id']}/approve/", owned_key(project, make_member(project, Role.APPROVER)), reason="x"
    )

    assert status == 409
    assert {row["check"] for row in problem["reasons"]} == {"better", "not_worse"}  # type: ignore[attr-defined]


def test_another_projects_deployment_is_a_404(client: Client, project: Project, tmp_path: Path) -> None:
    deployment = requested(project, tmp_path)
    other = make_project()
    key = owned_key(other, make_member(other, Role.APPROVER))

    assert client.get(f"/api/v1/deployments/{deployment.pk}/", headers=bearer(key)).status_code == 404
    for action in ("approve", "reject", "withdraw", "rollback"):
        assert post(client, f"{deployment.pk}/{action}/", key, reason="x")[0] == 404
    assert post(client, "", key, version="v1.0.0")[0] == 404
    assert client.get(f"/api/v1/deployments/{2**70}/", headers=bearer(key)).status_code == 404


def test_deciding_takes_the_scope(client: Client, project: Project, tmp_path: Path) -> None:
    deployment = requested(project, tmp_path)
    _, key = make_key(project, "operate", "read", owner=make_member(project, Role.APPROVER))

    assert post(client, f"{deployment.pk}/approve/", key)[0] == 403
