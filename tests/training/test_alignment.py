"""Attempts beside each other: nothing is lost, nothing said twice, and those that go together stand together."""

from hypothesis import given
from hypothesis import strategies as st

from training import alignment
from training.alignment import align

ATTEMPTS = st.lists(st.lists(st.sampled_from("abc"), max_size=8), min_size=1, max_size=10)


@given(ATTEMPTS)
def test_prefix_and_columns_give_back_every_item_of_every_attempt_in_order(attempts: list[list[str]]) -> None:
    aligned = align(attempts)
    assert sorted(aligned.order) == list(range(len(attempts)))
    prefix = attempts[0][: aligned.prefix]
    for number in aligned.order:
        assert prefix + attempts[number][aligned.prefix :] == attempts[number]


@given(ATTEMPTS)
def test_the_prefix_is_as_long_as_can_be(attempts: list[list[str]]) -> None:
    at = align(attempts).prefix
    following = {tuple(own[at : at + 1]) for own in attempts}
    assert len(attempts) == 1 or len(following) > 1 or following == {()}


@given(ATTEMPTS)
def test_no_attempt_stands_between_two_that_share_more(attempts: list[list[str]]) -> None:
    aligned = align(attempts)
    assert len(aligned.shared) == len(attempts)
    for left in range(len(attempts)):
        for right in range(left + 1, len(attempts)):
            common = alignment.shared_by_all([attempts[aligned.order[left]], attempts[aligned.order[right]]], 0)
            between = aligned.shared[left + 1 : right + 1]
            assert common == min(between)


def test_families_stand_where_their_first_member_would() -> None:
    aligned = align(["ab1", "xy", "ab2", "xz", "ab2"])
    assert aligned.order == (0, 2, 4, 1, 3)
    assert aligned.shared == (0, 2, 3, 0, 1)


def test_identical_attempts_have_everything_in_common() -> None:
    assert align(["abc", "abc"]).prefix == 3


def test_an_attempt_that_is_the_beginning_of_another_is_told_from_it() -> None:
    aligned = align(["abc", "ab", "abc"])
    assert aligned.prefix == 2
    assert aligned.order == (0, 2, 1)


def test_one_attempt_shares_nothing_and_none_is_no_fault() -> None:
    assert align(["abc"]).prefix == 0
    assert align([]).order == ()
