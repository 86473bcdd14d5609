"""InterCode result files: an episode is a trajectory, a turn is a call, and the best state is the reward."""

from pathlib import Path

import pytest

from tests.trajectories import recordings
from tests.trajectories.formats import outcomes
from trajectories.errors import Invalid
from trajectories.formats import intercode
from trajectories.formats.incoming import Incoming

Body = dict[str, object]


def episode(**fields: object) -> Body:
    return {
        "environment": "ic_bash",
        "dataset": "./data/nl2bash/nl2bash_fs_1.json",
        "task_id": 7,
        "query": "Count the files.",
        "turn_history": {
            "actions": ["ls", "ls | wc -l"],
            "observations": ["a b", "2"],
            "rewards": [0.33, 1.0],
            "valid_action": [False, True],
        },
        "summary": {"max_reward": 1.0, "max_reward_idx": 1, "turns_taken": 2, "turns_max": 10},
        **fields,
    }


def history(**lists: object) -> Body:
    return episode(turn_history=lists)


def test_a_turn_is_a_call_and_the_observation_is_the_next_prompt() -> None:
    value = {"7": episode()}

    payload = outcomes.one(intercode, value, "ic_bash_multiturn_gpt-4_10_turns_fs_1.json")

    assert [call.response for call in payload.calls()] == ["ls", "ls | wc -l"]
    assert {call.model for call in payload.calls()} == {"gpt-4"}
    assert outcomes.roles(payload) == [["user", "assistant", "user", "assistant", "user"]]
    assert [step.reward for step in payload.steps] == [0.33, 1.0]
    assert [step.action.success for step in payload.steps if step.action] == [False, True]
    assert payload.trajectory_id == "intercode/ic_bash_multiturn_gpt-4_10_turns_fs_1/7"
    assert payload.scenario_ref() == "intercode/ic_bash/nl2bash_fs_1/7"
    assert not outcomes.lost(value, payload)


def test_the_reward_is_the_best_state_which_the_summary_names_never_a_sum() -> None:
    payload = outcomes.one(intercode, episode())

    assert (payload.reward, payload.reward_components) == (1.0, {"max_reward": 1.0})


@pytest.mark.parametrize("summary", [{}, {"max_reward": None}, {"max_reward": "NaN"}])
def test_a_summary_without_a_reward_leaves_it_to_the_steps(summary: Body) -> None:
    payload = outcomes.one(intercode, episode(summary=summary))

    assert payload.reward is None
    assert [step.reward for step in payload.steps] == [0.33, 1.0]


def test_a_blocked_answer_is_a_failed_call() -> None:
    value = history(actions=["ls", "blocked"], observations=["a"], rewards=[0.33, 0], valid_action=[True])

    payload = outcomes.one(intercode, value)

    assert [call.response for call in payload.calls()] == ["ls", None]
    assert list(payload.calls())[1].error is not None
    assert payload.final_status == "agent_error"


def test_lists_of_different_length_lose_nothing() -> None:
    value = history(
        actions=["a1"],
        observations=["o1", "o2", "o3"],
        rewards=[0.5],
        valid_action=[None, "yes"],
        thoughts=["t1", "t2"],
        steps="the whole plan",
        odd=["kept"],
    )

    payload = outcomes.one(intercode, value)

    assert len(payload.steps) == 3
    assert next(payload.calls()).reasoning == "t1"
    assert not outcomes.lost(value, payload)


def test_plan_and_solve_files_are_wrapped_and_name_no_model() -> None:
    lists = {"actions": ["ls"], "observations": ["a"], "rewards": [1.0], "valid_action": [True], "steps": ["1. look"]}
    value = {"meta": {"env": "bash"}, "logs": {"0": episode(turn_history=lists, info={"plan": "1. look"})}}

    payload = outcomes.one(intercode, value, "ic_bash_plan_solve_fs_1.json")

    assert payload.agent_id == "intercode/ic_bash/plan_solve"
    assert next(payload.calls()).model is None
    assert not outcomes.lost(value, payload)


def test_what_a_person_played_has_actions_and_no_calls() -> None:
    value = {
        "3": {
            "environment": "ic_sql",
            "query_idx": 3,
            "query": "Which?",
            "gold": "SELECT 1",
            "reward": 0.0,
            "trajectory": [{"action": "show tables;", "observation": "('city',)"}],
            "info": {"x": "y"},
        }
    }

    found = outcomes.read(intercode, value, "ic_sql_multiturn_human_10_turns.json")

    assert outcomes.counts(found)[:2] == (1, 0)
    assert (len(found[0].payload.steps), found[0].payload.reward) == (1, 0.0)
    assert not outcomes.lost(value, found[0].payload)


def test_a_run_that_did_nothing_has_no_call_and_keeps_what_it_tells() -> None:
    value = history(actions=[], observations=[], rewards=[0.5], valid_action=[True], steps=[])
    value["summary"] = {"max_reward": 0.5, "max_reward_idx": -1}

    payload = outcomes.one(intercode, {"93": value}, "ic_sql_plan_solve.json")

    assert (payload.steps, payload.reward) == ((), 0.5)
    assert payload.extra["turn_history"] == {"rewards": [0.5], "valid_action": [True]}


def test_a_bad_episode_costs_its_neighbours_nothing() -> None:
    value = {"0": episode(), "1": "nothing", "2": {"task_id": 2}, "3": episode(task_id=3)}

    found = list(intercode.read(value, source="x.json"))

    assert [isinstance(one, Invalid) for one in found] == [False, True, True, False]


def test_ids_without_a_file_name_follow_the_content() -> None:
    first, again, other = (
        outcomes.one(intercode, value, "").trajectory_id for value in (episode(), episode(), episode(query="Else?"))
    )
    assert first == again != other


@pytest.mark.parametrize("value", [{}, [], {"0": 1}, {"meta": 1, "logs": 2}, {"query": "x"}, None])
def test_other_documents_are_not_recognised(value: object) -> None:
    assert not intercode.recognises(value)


@recordings.needs_data
@pytest.mark.parametrize(
    "path", sorted((recordings.DATA / "intercode_bash_fs3").glob("*.json.gz")), ids=lambda path: path.name[:-11]
)
def test_the_recorded_files_are_read_whole(path: Path) -> None:
    value = outcomes.document(path)
    assert isinstance(value, dict)
    episodes = list(value.get("logs", value).values()) if isinstance(value.get("logs", value), dict) else value["logs"]
    found = outcomes.read(intercode, value, path.name)

    turns = sum(len(one["turn_history"]["actions"]) for one in episodes)
    assert outcomes.counts(found)[:3] == (len(episodes), turns, 0)
    assert [one.payload.reward for one in found] == [one["summary"]["max_reward"] for one in episodes]
    stepwise = [[step.reward for step in one.payload.steps] for one in found]
    assert stepwise == [one["turn_history"]["rewards"] for one in episodes]
    assert len({one.payload.scenario_ref() for one in found}) == len(episodes)
    assert len({one.payload.trajectory_id for one in found}) == len(found)
    for one, sent in zip(found, episodes, strict=True):
        assert isinstance(one, Incoming)
        assert not outcomes.lost(sent, one.payload, structural=frozenset({"blocked"}))
