"""A candidate against what serves, on scenarios kept apart."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
from django.test import Client
from django.utils import timezone

from tests.builders import bearer, make_key, make_member, make_model, make_project, make_scenario, make_user
from tests.training.candidates import attempt, candidate, held_out
from tests.training.model_server import FakeModelServer
from training import evaluation, tasks
from training.models import Evaluation, EvaluationState, LockedSetOpening, Side, TrainedModel
from trajectories import history
from trajectories.errors import Invalid, Refused
from trajectories.history import SYSTEM, Actor
from trajectories.models import Scenario, Split, Trajectory

pytestmark = pytest.mark.django_db

Pair = tuple[TrainedModel, TrainedModel]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """v1.0.0, which serves nobody here, and the candidate v1.0.1."""
    project = make_project()
    return candidate(project, tmp_path, "v1.0.0"), candidate(project, tmp_path, "v1.0.1")


def running(pair: Pair, scenarios: int = 3, attempts: int = 1) -> tuple[Evaluation, list[Scenario]]:
    """An evaluation of the pair whose work has gone out."""
    baseline, ours = pair
    chosen = held_out(ours.project, scenarios)
    one = evaluation.request(ours.project, ours, by=SYSTEM, against=baseline, attempts=attempts)
    evaluation.hand_out(one, 1000)
    return one, chosen


def all_in(one: Evaluation, scenarios: list[Scenario], ours: float = 1.0, theirs: float = 0.0) -> None:
    for scenario in scenarios:
        for _ in range(one.attempts):
            attempt(one, scenario, "v1.0.1", ours)
            attempt(one, scenario, "v1.0.0", theirs)


# --- what it does -------------------------------------------------------------------------------------------------


def test_both_sides_get_every_scenario(pair: Pair, model_server: FakeModelServer) -> None:
    baseline, ours = pair
    scenarios = held_out(ours.project, 3)
    make_scenario(ours.project, split=Split.TRAIN)
    one = evaluation.request(ours.project, ours, by=SYSTEM, against=baseline, attempts=2)

    given = evaluation.hand_out(one, 100)

    assert {(work.scenario.scenario_id, work.side, work.name, work.n) for work in given} == {
        (scenario.scenario_id, side, model.serving_name, 2)
        for scenario in scenarios
        for side, model in ((Side.CANDIDATE, ours), (Side.BASELINE, baseline))
    }


def test_both_sides_are_loaded_and_answer_before_work_goes_out(pair: Pair, model_server: FakeModelServer) -> None:
    baseline, ours = pair

    one, _ = running(pair)

    assert one.state == EvaluationState.RUNNING
    assert model_server.adapters == {m.serving_name: m.adapter_path for m in pair}
    assert set(model_server.asked) == {baseline.serving_name, ours.serving_name}


def test_the_bare_base_is_the_other_side_when_nothing_serves(pair: Pair, model_server: FakeModelServer) -> None:
    ours = pair[1]
    held_out(ours.project, 1)
    one = evaluation.request(ours.project, ours, by=SYSTEM, attempts=1)

    given = evaluation.hand_out(one, 100)
    for work in given:
        attempt(one, work.scenario, "foreign:tiny" if work.side == Side.BASELINE else "v1.0.1", 1.0)
    evaluation.advance(one)

    assert {(work.side, work.name) for work in given} == {("candidate", ours.serving_name), ("baseline", "tiny")}
    assert one.state == EvaluationState.DONE


def test_work_that_is_out_is_not_handed_out_twice(pair: Pair, model_server: FakeModelServer) -> None:
    one, _ = running(pair, scenarios=2)

    assert evaluation.hand_out(one, 100) == []


def test_work_that_does_not_come_back_goes_out_again_with_what_is_missing(
    pair: Pair, model_server: FakeModelServer
) -> None:
    one, scenarios = running(pair, scenarios=1, attempts=3)
    attempt(one, scenarios[0], "v1.0.1", 1.0)
    one.work.update(handed_out_at=timezone.now() - evaluation.HAND_OUT_AGAIN - timedelta(seconds=1))

    again = evaluation.hand_out(one, 100)

    assert {(work.side, work.n) for work in again} == {(Side.CANDIDATE, 2), (Side.BASELINE, 3)}


def test_it_is_done_when_all_attempts_are_in(pair: Pair, model_server: FakeModelServer) -> None:
    one, scenarios = running(pair, scenarios=3, attempts=2)
    all_in(one, scenarios)

    tasks.advance_evaluations()

    one.refresh_from_db()
    assert one.state == EvaluationState.DONE
    assert one.result is not None
    assert (one.result["scenarios"], one.result["attempts"]) == (3, 12)
    assert one.result["gain"] == {"mean": 1.0, "lower": 1.0, "upper": 1.0}
    assert (one.result["better"], one.result["worse"], one.result["ties"]) == (3, 0, 0)
    assert [change.to for change in history.of(one)] == ["done", "running", "pending"]
    assert "v1.0.1 has 1.000 against 0.000 of v1.0.0 on 3 scenarios" in evaluation.sentence(one)


def test_more_attempts_than_asked_for_change_nothing(pair: Pair, model_server: FakeModelServer) -> None:
    one, scenarios = running(pair, scenarios=1)
    all_in(one, scenarios, ours=1.0)
    attempt(one, scenarios[0], "v1.0.1", -100.0)

    evaluation.advance(one)

    assert one.result is not None
    assert one.result["candidate"]["mean"] == 1.0


@pytest.mark.parametrize(
    "fields",
    [
        {"state": "open"},
        {"is_excluded": True},
        {"is_superseded": True},
        {"final_status": "environment_error"},
        {"behaviour": "foreign:gpt-4o"},
        {"reward": None},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_is_no_attempt_of_either_side_does_not_count(
    pair: Pair, model_server: FakeModelServer, fields: dict[str, object]
) -> None:
    one, scenarios = running(pair, scenarios=1)
    attempt(one, scenarios[0], "v1.0.0", 0.0)
    attempt(one, scenarios[0], **{"behaviour": "v1.0.1", "reward": 1.0, **fields})  # type: ignore[arg-type]  # a table

    evaluation.advance(one)

    assert one.state == EvaluationState.RUNNING
    assert evaluation.progress(one).done == 1


def test_a_second_finish_changes_nothing(pair: Pair, model_server: FakeModelServer) -> None:
    one, scenarios = running(pair)
    all_in(one, scenarios)
    stale = Evaluation.objects.get(pk=one.pk)

    evaluation.advance(one)
    evaluation.advance(stale)

    assert stale.state == EvaluationState.DONE
    assert len(history.of(one)) == 3


# --- the numbers --------------------------------------------------------------------------------------------------


def test_a_scenario_counts_once_however_often_it_was_tried() -> None:
    result = evaluation.compare({"a": ([1, 1, 1, 1], [0, 0]), "b": ([0], [0])}, seed=0)

    assert result["gain"]["mean"] == 0.5  # type: ignore[index]  # the result is JSON
    assert (result["better"], result["worse"], result["ties"]) == (1, 0, 1)


def test_the_interval_is_that_of_the_paired_differences() -> None:
    """Gains of 1, 1, 0, 0: the mean of four draws lies at or below 0 with probability 1/16, above 2.5 %."""
    pairs = {name: ([gain + level], [level]) for name, gain, level in
             (("a", 1.0, 0.0), ("b", 1.0, 50.0), ("c", 0.0, -50.0), ("d", 0.0, 7.0))}  # fmt: skip

    gain = evaluation.compare(pairs, seed=1)["gain"]

    assert gain == {"mean": 0.5, "lower": 0.0, "upper": 1.0}  # the levels, 100 apart, do not widen it


def test_the_interval_matches_the_normal_one_where_that_holds() -> None:
    """400 gains, half 1 and half 0: standard error 0.5 / 20, so 0.5 ± 1.96 × 0.025."""
    gain = evaluation.compare({f"{i:03}": ([float(i % 2)], [0.0]) for i in range(400)}, seed=2)["gain"]

    assert gain["lower"] == pytest.approx(0.451, abs=0.006)  # type: ignore[index]
    assert gain["upper"] == pytest.approx(0.549, abs=0.006)  # type: ignore[index]


def test_the_same_attempts_give_the_same_interval() -> None:
    pairs = {f"{i}": ([float(i % 3)], [float(i % 2)]) for i in range(20)}

    assert evaluation.compare(pairs, seed=5) == evaluation.compare(pairs, seed=5)


def test_the_five_worst_regressions_are_named() -> None:
    pairs = {f"s{i}": ([1.0 - 0.1 * i], [1.0]) for i in range(8)}

    worst = evaluation.compare(pairs, seed=0)["regressions"]

    assert [row["scenario"] for row in worst] == ["s7", "s6", "s5", "s4", "s3"]  # type: ignore[attr-defined]


# --- what it refuses, and what fails ------------------------------------------------------------------------------


def test_without_held_out_scenarios_there_is_nothing_to_do_it_on(pair: Pair) -> None:
    with pytest.raises(Refused, match="no held-out scenario"):
        evaluation.request(pair[1].project, pair[1], by=SYSTEM)


@pytest.mark.parametrize("status", ["training", "failed", "rejected", "archived"])
def test_only_a_version_that_is_ready_is_evaluated(status: str) -> None:
    model = make_model(status=status)
    held_out(model.project, 1)

    with pytest.raises(Refused, match="only a version that is ready"):
        evaluation.request(model.project, model, by=SYSTEM)


def test_a_version_is_not_compared_with_itself(pair: Pair) -> None:
    held_out(pair[1].project, 1)

    with pytest.raises(Refused, match="Name another version"):
        evaluation.request(pair[1].project, pair[1], by=SYSTEM, against=pair[1])


@pytest.mark.parametrize("wish", [{"attempts": 0}, {"attempts": 65}, {"scenarios": 0}, {"split": "train"}], ids=str)
def test_numbers_out_of_range_are_named(pair: Pair, wish: dict[str, object]) -> None:
    held_out(pair[1].project, 1)

    with pytest.raises(Invalid, match=next(iter(wish))):
        evaluation.request(pair[1].project, pair[1], by=SYSTEM, **wish)  # type: ignore[arg-type]  # a table


def test_the_locked_set_is_opened_by_a_person_with_a_reason_and_counted(
    pair: Pair, model_server: FakeModelServer
) -> None:
    baseline, ours = pair
    scenario = make_scenario(ours.project, split=Split.LOCKED)
    person = Actor("ada", make_user("ada"))
    for by, reason in ((SYSTEM, "because"), (person, " ")):
        with pytest.raises(Refused, match="opened by a person, with a reason"):
            evaluation.request(ours.project, ours, by=by, against=baseline, split="locked", reason=reason)

    one = evaluation.request(
        ours.project, ours, by=person, against=baseline, split="locked", reason="last look", attempts=1
    )
    evaluation.begin(one)
    all_in(one, [scenario])
    evaluation.advance(one)

    assert LockedSetOpening.objects.get().by_name == "ada"
    assert one.result is not None
    assert one.result["locked_openings"] == 1


def test_it_waits_for_a_model_server_that_is_away(pair: Pair, model_server: FakeModelServer) -> None:
    model_server.away = True
    one, _ = running(pair)
    assert one.state == EvaluationState.PENDING

    model_server.away = False
    tasks.advance_evaluation(one.pk)

    one.refresh_from_db()
    assert one.state == EvaluationState.RUNNING


def test_it_fails_when_the_candidate_cannot_be_loaded(pair: Pair, model_server: FakeModelServer) -> None:
    model_server.refuse.add(pair[1].serving_name)

    one, _ = running(pair)

    assert one.state == EvaluationState.FAILED
    assert "size mismatch" in one.error


def test_it_fails_when_work_does_not_come_back_and_may_be_tried_again(
    pair: Pair, model_server: FakeModelServer
) -> None:
    one, scenarios = running(pair, scenarios=2)
    attempt(one, scenarios[0], "v1.0.1", 1.0)
    attempt(one, scenarios[0], "v1.0.0", None)
    Evaluation.objects.filter(pk=one.pk).update(deadline_at=timezone.now() - timedelta(seconds=1))

    tasks.advance_evaluations()

    one.refresh_from_db()
    assert one.state == EvaluationState.FAILED
    assert one.error.startswith("Only 1 of 4 attempts came back")
    assert "1 came back without a reward" in one.error

    evaluation.retry(one, by=SYSTEM, reason="more time")
    given = evaluation.hand_out(one, 100)
    assert one.deadline_at is not None
    assert one.deadline_at > timezone.now()
    assert sum(work.n for work in given) == 2  # the third waits for its reward, the first is in


def test_a_done_evaluation_stays_done(pair: Pair, model_server: FakeModelServer) -> None:
    one, scenarios = running(pair)
    all_in(one, scenarios)
    evaluation.advance(one)

    with pytest.raises(Refused, match="cannot become"):
        evaluation.retry(one, by=SYSTEM)


# --- by HTTP ------------------------------------------------------------------------------------------------------


def test_work_goes_out_and_comes_back_by_http(client: Client, pair: Pair, model_server: FakeModelServer) -> None:
    ours = pair[1]
    make_scenario(ours.project, "up-or-down", split=Split.HELD_OUT, metadata={"level": 1, "private": {"answer": "BUY"}})
    _, key = make_key(ours.project)
    started = client.post(
        "/api/v1/evaluations/",
        json.dumps({"version": "v1.0.1", "baseline": "v1.0.0", "attempts": 2}),
        content_type="application/json",
        headers=bearer(key),
    )
    assert started.status_code == 201, started.content
    where = f"/api/v1/evaluations/{started.json()['evaluation_id']}/"

    work = client.get(f"{where}work/?limit=10", headers=bearer(key)).json()["results"]
    assert [row["n"] for row in work] == [2, 2]
    assert work[0]["scenario"]["metadata"] == {"level": 1}
    for row in work:
        assert row["base_url"] == f"{model_server.url}/v1"
        for number in range(row["n"]):
            sent = client.post(
                "/api/v1/trajectories/",
                json.dumps(
                    {
                        "trajectory_id": f"{row['side']}-{number}",
                        "agent_id": "evaluator",
                        "scenario_id": row["scenario_id"],
                        "evaluation_id": started.json()["evaluation_id"],
                        "started_at": f"2026-01-05T10:0{number}:00Z",
                        "steps": [{"llm_calls": [{"model": row["model"], "user_prompt": "?", "response": "BUY"}]}],
                        "reward": 1.0 if row["side"] == "candidate" else 0.0,
                    }
                ),
                content_type="application/json",
                headers=bearer(key),
            )
            assert sent.status_code == 201, sent.content

    answer = client.get(where, headers=bearer(key)).json()
    assert (answer["state"], answer["progress"], answer["result"]["gain"]["mean"]) == ("done", 1.0, 1.0)
    assert Trajectory.objects.filter(is_evaluation=True).count() == 4


def test_another_projects_evaluation_is_a_404(client: Client, pair: Pair, model_server: FakeModelServer) -> None:
    one, _ = running(pair)
    _, stranger = make_key(make_project())

    for path in ("", "work/"):
        answer = client.get(f"/api/v1/evaluations/{one.evaluation_id}/{path}", headers=bearer(stranger))
        assert answer.status_code == 404
    assert client.get("/api/v1/evaluations/", headers=bearer(stranger)).json()["results"] == []
    body = json.dumps({"version": "v1.0.1"})
    started = client.post("/api/v1/evaluations/", body, content_type="application/json", headers=bearer(stranger))
    assert started.status_code == 404


def test_a_reading_key_starts_no_evaluation(client: Client, pair: Pair) -> None:
    _, key = make_key(pair[1].project, "read", owner=make_member(pair[1].project))
    body = json.dumps({"version": "v1.0.1"})

    answer = client.post("/api/v1/evaluations/", body, content_type="application/json", headers=bearer(key))

    assert answer.status_code == 403
