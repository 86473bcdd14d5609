"""The demo's task: four sets of headlines that cannot leak into one another, and a reward without partial credit."""

import pytest

from training import demo_task
from training.demo_task import ANSWERS, HELD_OUT, Kind, Task

EVERY: tuple[Kind, ...] = ("train", *HELD_OUT)


def all_of(kind: Kind) -> list[Task]:
    """Every headline of a set: the most that can be asked for."""
    with pytest.raises(ValueError) as refused:
        demo_task.scenarios(kind, 10**6)
    return demo_task.scenarios(kind, int(str(refused.value).split(" has ")[1].split()[0]))


def words(task: Task) -> tuple[str, ...]:
    """The two phrases of a headline."""
    return tuple(task.headline.removeprefix(f"{task.company} ").split(", "))


def test_the_sets_share_no_headline_and_no_id() -> None:
    headlines = [task.headline for kind in EVERY for task in all_of(kind)]
    ids = [task.scenario_id for kind in EVERY for task in all_of(kind)]
    assert len(set(headlines)) == len(headlines)
    assert len(set(ids)) == len(ids)


def test_a_new_companies_are_unknown_and_their_pairs_are_known() -> None:
    train, new = all_of("train"), all_of("new_companies")
    assert not {task.company for task in train} & {task.company for task in new}
    assert {words(task) for task in new} <= {words(task) for task in train}


def test_b_new_pairs_are_of_known_phrases() -> None:
    train, new = all_of("train"), all_of("new_pairs")
    assert not {words(task) for task in new} & {words(task) for task in train}
    assert {phrase for task in new for phrase in words(task)} <= {phrase for task in train for phrase in words(task)}


def test_c_new_phrases_are_in_no_other_set() -> None:
    known = {phrase for kind in EVERY if kind != "new_phrases" for task in all_of(kind) for phrase in words(task)}
    assert not known & {phrase for task in all_of("new_phrases") for phrase in words(task)}


@pytest.mark.parametrize("kind", EVERY)
def test_half_of_what_is_drawn_is_to_be_bought(kind: Kind) -> None:
    drawn = demo_task.scenarios(kind, 40, seed=3)
    assert sum(task.answer == "BUY" for task in drawn) == 20
    assert len({task.scenario_id for task in drawn}) == 40


def test_a_seed_draws_the_same_and_another_seed_does_not() -> None:
    assert demo_task.scenarios("train", 30, seed=1) == demo_task.scenarios("train", 30, seed=1)
    assert demo_task.scenarios("train", 30, seed=1) != demo_task.scenarios("train", 30, seed=2)


@pytest.mark.parametrize("said", ["", "BUY SELL", "buy", "BUY.", "B", "BUYBUY"])
def test_only_the_right_word_alone_is_rewarded(said: str) -> None:
    task = next(task for task in demo_task.scenarios("train", 10) if task.answer == "BUY")
    assert demo_task.reward(task, said) == 0.0
    assert demo_task.reward(task, "SELL") == 0.0
    assert demo_task.reward(task, " BUY\n") == 1.0


def test_the_answer_is_nowhere_in_what_the_agent_reads() -> None:
    for task in demo_task.scenarios("train", 20):
        read = [message for message in demo_task.messages(task) if message["role"] != "system"]
        assert not any(answer in str(message) for message in read for answer in ANSWERS)


def test_the_programs_own_call_is_marked_as_context() -> None:
    (call,) = [m for m in demo_task.messages(demo_task.scenarios("train", 2)[0]) if m["role"] == "assistant"]
    assert call["weight"] == 0
