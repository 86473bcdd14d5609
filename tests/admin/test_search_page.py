"""Finding trajectories by what was said in them, in the admin."""

import json
import re

import pytest
from django.contrib.auth.models import User
from django.test import Client
from pytest_django import DjangoAssertNumQueries

from tests import builders
from tests.trajectories import recordings
from trajectories import formats, indexing, ingestion, preparing
from trajectories.models import Project, Role

pytestmark = pytest.mark.django_db

PAGE = "/admin/trajectories/trajectory/search/"


@pytest.fixture
def project() -> Project:
    return builders.make_project("shop")


def say(project: Project, *answers: str) -> None:
    for answer in answers:
        body = recordings.native(steps=[recordings.step(llm_calls=[recordings.call(response=answer)])])
        [found] = ingestion.record_many(project, [formats.incoming(json.dumps(body).encode(), "native")])
        assert isinstance(found, preparing.Recorded)


def ask(user: User, **words: str) -> str:
    client = Client()
    client.force_login(user)
    answer = client.get(PAGE, words)
    assert answer.status_code == 200
    return answer.content.decode()


def test_a_hit_stands_with_what_was_said_around_it(project: Project) -> None:
    say(project, "the parcel went to <b>Utrecht</b>", "nothing of it")
    indexing.drain(project)
    told = ask(builders.make_member(project, Role.READER), q="utrecht")
    assert "<mark>Utrecht</mark>" in told
    assert "&lt;b&gt;" in told
    assert "step 0, assistant" in told
    assert told.count("<h3>") == 1


def test_what_members_of_another_project_ask_finds_nothing_here(project: Project) -> None:
    say(project, "the parcel went to Utrecht")
    indexing.drain(project)
    outsider = builders.make_member(builders.make_project("there"), Role.OPERATOR)
    told = ask(outsider, q="utrecht", project=str(project.pk))
    assert "Nobody said that." in told
    assert "parcel" not in told


def test_an_empty_question_says_how_to_ask(project: Project) -> None:
    user = builders.make_member(project, Role.READER)
    assert "in any order" in ask(user)
    assert "There is no word in" in ask(user, q="?! --")


@pytest.mark.parametrize("text", ["\x00", "'", '"', "a & | !", "(", "\u202e", "\\", "%", "x" * 5000, "-only", "* *"])
def test_whatever_is_typed_is_answered(project: Project, text: str) -> None:
    say(project, "some words")
    indexing.drain(project)
    user = builders.make_member(project, Role.READER)
    ask(user, q=text)
    ask(user, q="words", p=text, project=text)


def test_what_is_not_indexed_yet_is_told(project: Project) -> None:
    say(project, "some words")
    assert "1 recording is not indexed yet" in ask(builders.make_member(project, Role.READER), q="words")


def test_pages_go_on_with_older_ones(project: Project) -> None:
    say(project, *(f"some words of {number}" for number in range(30)))
    indexing.drain(project)
    user = builders.make_member(project, Role.READER)
    first = ask(user, q="words")
    assert first.count("<h3>") == 25
    [cursor] = re.findall(r'rel="next" href="\?q=words&amp;p=([^"&]+)"', first)
    second = ask(user, q="words", p=cursor)
    assert second.count("<h3>") == 5
    assert "continue" not in second


def test_it_asks_the_database_no_more_for_many_hits(
    project: Project, django_assert_max_num_queries: DjangoAssertNumQueries
) -> None:
    say(project, *(f"some words of {number}" for number in range(20)))
    indexing.drain(project)
    user = builders.make_member(project, Role.READER)
    client = Client()
    client.force_login(user)
    with django_assert_max_num_queries(12):
        client.get(PAGE, {"q": "words"})
