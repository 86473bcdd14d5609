"""How pages write times, ids and numbers."""

from datetime import UTC, datetime, timedelta

import pytest
from django.template import Context, Template
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st

from trajectories import shown


def test_a_time_is_told_as_people_say_it_and_exactly_in_utc() -> None:
    told = shown.ago(timezone.now() - timedelta(hours=3, minutes=1))
    assert "hours ago</time>" in told
    exact = shown.ago(datetime(2026, 3, 1, 12, 5, 9, tzinfo=UTC))
    assert 'datetime="2026-03-01T12:05:09Z"' in exact
    assert 'title="2026-03-01 12:05:09 UTC"' in exact
    assert shown.ago(None) == "–"


def test_a_long_id_is_shortened_and_can_be_copied_whole() -> None:
    told = shown.short("0123456789abcdef0123456789abcdef")
    assert ">0123456789…abcdef<" in told
    assert 'data-copy="0123456789abcdef0123456789abcdef"' in told
    assert "run-7<" in shown.short("run-7")


def test_an_id_that_an_agent_chose_stays_text() -> None:
    told = shown.short('"><script>alert(1)</script>\x00')
    assert "<script>" not in told
    assert "\x00" not in told.split("data-copy")[0]
    assert "<bdi>" in told  # a right-to-left mark ends with it


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0"),
        (1234, "1,234"),
        (99_999, "99,999"),
        (123_456, "about 123 k"),
        (1_234_567, "about 1.23 M"),
        (None, "unknown"),
    ],
)
def test_a_large_number_is_told_by_its_size(count: int | None, said: str) -> None:
    assert shown.about(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.25, "250 ms"),
        (9.5, "9.5 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (125, "2 min 5 s"),
        (7_500, "2 h 5 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_a_length_of_time_has_two_units_at_most(seconds: float, said: str) -> None:
    assert shown.span(seconds) == said


@pytest.mark.parametrize(("count", "said"), [(12, "12 B"), (3_400, "3.4 kB"), (1_200_000, "1.2 MB"), (None, "unknown")])
def test_bytes_have_their_unit(count: int | None, said: str) -> None:
    assert shown.size(count) == said


@given(st.text(max_size=40))
def test_no_text_leaves_its_quotes(text: str) -> None:
    told = shown.short(text)
    assert told.count("<") == told.count(">") == 6  # span, bdi, button, each opened and closed


def test_templates_have_them_as_filters() -> None:
    template = Template("{% load site %}{{ n|about }} {{ s|span }} {{ b|size }} {{ i|short }} {{ t|ago }}")
    told = template.render(Context({"n": 5, "s": 61, "b": 5, "i": "x", "t": None}))
    assert told.startswith("5 1 min 1 s 5 B <span")
