"""Whatever an agent hands over: the agent goes on, and the recording is JSON that the site can take."""

import json
from collections.abc import Iterator, Mapping
from itertools import count
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recorder.plain import DEEPEST, Notes, Size, plain
from tests.recorder.site import Site, recorder

JSON = dict[str, object]


class Raises:
    """Every question to it raises."""

    def __getattribute__(self, name: str) -> object:
        raise RuntimeError(name)

    def __str__(self) -> str:
        raise RuntimeError("str")

    def __repr__(self) -> str:
        raise RuntimeError("repr")


class Lies(dict[str, object]):
    def items(self) -> Iterator[tuple[str, object]]:  # type: ignore[override]  # what is tested
        raise RuntimeError("items")


class Endless(Mapping[str, object]):
    def __getitem__(self, key: str) -> object:
        return self

    def __iter__(self) -> Iterator[str]:
        return (str(n) for n in count())

    def __len__(self) -> int:
        return 3


class Ring:
    """pydantic's way, into itself."""

    def model_dump(self) -> JSON:
        return {"self": self}


def knot() -> list[object]:
    ring: list[object] = []
    ring.append(ring)
    return ring


def deep(levels: int) -> list[object]:
    nested: list[object] = []
    for _ in range(levels):
        nested = [nested]
    return nested


def branches() -> list[object]:
    tree: list[object] = ["leaf"]
    for _ in range(60):
        tree = [tree, tree]
    return tree


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(codec=None)),
    st.binary(),
    st.complex_numbers(),
    st.decimals(),
    st.datetimes(),
    st.uuids(),
    st.builds(object),
    st.builds(Raises),
    st.builds(Lies, st.just({"a": 1})),
    st.builds(Ring),
    st.builds(knot),
    st.builds(lambda n: n * 10**5000, st.sampled_from([1, -1])),
    st.sampled_from([int, print, iter([1]), ..., NotImplemented, {1, "a"}, range(3)]),
)
keys = st.one_of(st.text(st.characters(codec=None)), st.integers(), st.none(), st.binary(), st.tuples(st.integers()))
values = st.recursive(
    odd, lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(keys, inner), max_leaves=20
)


@given(values)
@settings(max_examples=300, deadline=None)
def test_any_value_becomes_json_that_survives_the_wire(value: object) -> None:
    notes: Notes = []
    found = plain(value, notes, "/at")
    wire = json.dumps([found, notes], ensure_ascii=False, allow_nan=False).encode()  # utf-8: no lone surrogates
    assert json.loads(wire) == [found, notes]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)  # fmt: skip
def test_what_json_can_say_is_kept_as_it_is(value: object) -> None:
    notes: Notes = []
    assert plain(value, notes) == value
    assert notes == []


@given(values, values, values, st.text(st.characters(codec=None)))
@settings(max_examples=50, deadline=None)
def test_an_agent_may_hand_over_anything_anywhere(state: object, result: object, extra: object, name: str) -> None:
    site = Site()
    with recorder(site) as recording:

        @recording.action(name=name)
        def act(given: object) -> object:
            return result

        with recording.start_trajectory(metadata={"extra": extra}) as trajectory:
            with trajectory.start_step(cast(JSON, state)) as step:
                step.log_provider_access(name, extra)
                step.log_llm_call(model=name, messages=cast(list[JSON], extra), response=cast(str, state))
                step.log_completion(cast(JSON, state), extra)
                assert act(extra) is result
            trajectory.end(reward=cast(float, state), metrics=cast(JSON, result))
        recording.reward(trajectory.trajectory_id, cast(float, state), reason=name)
        assert recording.counts.dropped == 0
    assert json.loads(site.taken[trajectory.trajectory_id])["agent_id"] == "agent"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (knot(), "inside itself"),
        (Ring(), "inside itself"),
        (deep(DEEPEST + 1), f"nested deeper than {DEEPEST} levels"),
        (2**64, "beyond 64 bits"),
        (Lies(a=1), "cannot be read (RuntimeError)"),
        (Raises(), "a Raises that cannot be read (RuntimeError)"),
        ({1: "a", "1": "b"}, "two keys that read '1'"),
        (float("inf"), "inf, recorded as unknown"),
        (b"\xff", "base64"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_was_changed_is_said(value: object, said: str) -> None:
    notes: Notes = []
    plain(value, notes, "/state")
    assert any(said in note and note.startswith("/state") for note in notes), notes


def test_size_is_bounded_whatever_is_given() -> None:
    for value in (branches(), Endless(), "x" * 10**6, ["x" * 1000] * 1000, dict.fromkeys(range(10**5)), b"x" * 10**6):
        notes: Notes = []
        found = plain(value, notes, "/at", Size(items=1000, characters=10_000))
        assert len(json.dumps(found)) < 200_000
        assert notes, type(value)


def test_token_ids_of_a_long_context_are_kept_whole() -> None:
    notes: Notes = []
    ids = list(range(300_000))
    assert plain({"token_ids": ids, "logprobs": [-0.5] * 300_000}, notes) == {
        "token_ids": ids,
        "logprobs": [-0.5] * 300_000,
    }
    assert notes == []
