"""Rule judges: exact functions, which say "cannot say" rather than guess."""

import pytest

from training import rules


def seen(**fields: object) -> rules.Seen:
    values: dict[str, object] = {
        "reward": None,
        "final_status": "completed",
        "answer": "BUY",
        "last_action": None,
        "gold": "BUY",
        "valid_answers": ("BUY", "SELL"),
        "n_steps": 1,
    }
    return rules.Seen(**{**values, **fields})  # type: ignore[arg-type]  # a test names only what it is about


@pytest.mark.parametrize(
    ("fields", "score"),
    [
        ({}, 1.0),
        ({"answer": " BUY\n"}, 1.0),
        ({"answer": "SELL"}, 0.0),
        ({"answer": "BUY or SELL"}, 0.0),
        ({"answer": "buy"}, 0.0),
        ({"answer": "I will.", "last_action": "BUY"}, 1.0),
        ({"answer": None}, 0.0),
        ({"gold": None}, None),
        ({"gold": 7, "answer": "7"}, 1.0),
        ({"gold": {"side": "BUY"}, "answer": '{"side": "BUY"}'}, 1.0),
    ],
)
def test_exact_answer(fields: dict[str, object], score: float | None) -> None:
    assert rules.exact_answer(seen(**fields)).score == score


@pytest.mark.parametrize(
    ("fields", "score"),
    [({}, 1.0), ({"answer": "PERHAPS"}, 0.0), ({"answer": None}, 0.0), ({"valid_answers": ()}, None)],
)
def test_valid_format(fields: dict[str, object], score: float | None) -> None:
    assert rules.valid_format(seen(**fields)).score == score


def test_completed() -> None:
    assert rules.completed(seen()).score == 1.0
    assert rules.completed(seen(final_status="agent_error")).score == 0.0


@pytest.mark.parametrize(("reward", "score"), [(0.4, 0.4), (-3.0, 0.0), (12.0, 1.0), (None, None)])
def test_recorded_reward(reward: float | None, score: float | None) -> None:
    assert rules.recorded_reward(seen(reward=reward)).score == score


@pytest.mark.parametrize(("n_steps", "score"), [(1, 1.0), (4, 0.25), (0, None)])
def test_brevity(n_steps: int, score: float | None) -> None:
    assert rules.brevity(seen(n_steps=n_steps)).score == score


@pytest.mark.parametrize("name", sorted(rules.RULES))
def test_every_rule_gives_its_reason(name: str) -> None:
    assert rules.RULES[name](seen(reward=0.5)).reasoning
