"""What differs between two attempts and between two texts: nothing lost, marked to the word, and never slow."""

from hypothesis import given
from hypothesis import strategies as st

from training import differences, pairs
from training.differences import Piece, Work
from training.turns import Turn

WORDS = st.lists(st.sampled_from(["a ", "b ", "\n", "see ", ", ", "7"]), max_size=40).map("".join)


def whole(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def unmarked(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces if not piece.changed)


@given(WORDS, WORDS)
def test_the_pieces_are_the_texts(one: str, other: str) -> None:
    mine, others = differences.texts(one, other, Work())
    assert (whole(mine), whole(others)) == (one, other)


@given(WORDS, WORDS)
def test_what_is_not_marked_is_in_both_or_nothing_is(one: str, other: str) -> None:
    mine, others = differences.texts(one, other, Work())
    if any(piece.changed for piece in (*mine, *others)):
        assert unmarked(mine) == unmarked(others)


def test_words_are_marked_not_letters() -> None:
    mine, others = differences.texts("pay the fee of 40 dollars", "pay the fee of 55 dollars", Work())
    assert [piece.text for piece in mine if piece.changed] == ["40 "]
    assert [piece.text for piece in others if piece.changed] == ["55 "]


def test_texts_that_have_little_in_common_are_not_marked_all_over() -> None:
    mine, _ = differences.texts("I book the flight now.", "Sorry, no: policies forbid it!", Work())
    assert mine == [Piece("I book the flight now.", False)]


def test_long_texts_are_compared_by_line_and_longer_ones_not_at_all() -> None:
    lines = [f"line {number} of the file" for number in range(200)]
    changed = [*lines[:100], "another line", *lines[101:]]
    changed[3] = "a third"
    _, others = differences.texts("\n".join(lines), "\n".join(changed), Work())
    assert [piece.text for piece in others if piece.changed] == ["a third\n", "another line\n"]
    huge = ["\n".join(str(number * step) for number in range(5_000)) for step in (3, 7)]
    assert all(not piece.changed for piece in differences.texts(huge[0], huge[1], Work())[0])


def test_a_page_spends_no_more_work_than_it_has() -> None:
    work = Work(pairs=5)
    one, other = "a b c d\ne f g h\ni", "d c b a\nh g f e\nj"
    assert differences.texts(one, other, work) == ([Piece(one, False)], [Piece(other, False)])
    assert work.left == 5
    differences.texts("a b c", "a x c", work)
    assert work.left == 4


def turn(said: str, role: str = "assistant", step: int = 0, tool: str = "") -> Turn:
    message: dict[str, object] = {"role": role, "content": said}
    if tool:
        message["tool_calls"] = [{"function": {"name": tool, "arguments": "{}"}}]
    return Turn(f"{role} {said} {tool}".encode(), step, role, message)


TURNS = st.lists(
    st.builds(turn, st.sampled_from(["x", "y"]), st.sampled_from(["user", "assistant", "tool"])), max_size=12
)


@given(TURNS, TURNS)
def test_the_rows_give_back_every_turn_of_both_in_order(one: list[Turn], other: list[Turn]) -> None:
    pair = pairs.compare(one, other, ("/one/", "/other/"))
    rows = [row for stretch in pair.stretches for row in stretch.rows]
    for side, told in ((0, one), (1, other)):
        shown = [
            (line.role, whole(list(line.pieces))) for row in rows if (own := row.sides[side]) for line in own.lines
        ]
        assert shown == [(turn.role, turn.said["content"]) for turn in told if isinstance(turn.said, dict)]
    assert pair.in_common + pair.only_one == len(one)
    assert all(row.same == stretch.same for stretch in pair.stretches for row in stretch.rows)


def test_what_each_did_in_the_others_place_stands_side_by_side() -> None:
    one = [turn("hello"), turn("I look", tool="find"), turn("found", "tool"), turn("bye")]
    other = [turn("hello"), turn("I ask", tool="ask"), turn("bye")]
    pair = pairs.compare(one, other, ("/one/", "/other/"))
    assert [(stretch.same, len(stretch.rows)) for stretch in pair.stretches] == [(True, 1), (False, 2), (True, 1)]
    asked, found = pair.stretches[1].rows
    assert asked.one is not None
    assert asked.other is not None
    assert found.other is None
    assert {(called.name, called.one, called.other) for called in pair.called} == {("find", 1, 0), ("ask", 0, 1)}
