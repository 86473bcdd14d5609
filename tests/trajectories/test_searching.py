"""Finding trajectories by what was said: words, phrases, prefixes, exclusions; newest first, each once."""

import json
from collections.abc import Sequence

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from tests import builders
from tests.trajectories import recordings
from trajectories import formats, indexing, ingestion, preparing, search_texts, searching
from trajectories.listing import TimeIsUp
from trajectories.models import Agent, Project, SearchText, Trajectory

pytestmark = pytest.mark.django_db


@pytest.fixture
def project() -> Project:
    return builders.make_project()


def say(project: Project, **answers: str) -> None:
    """A trajectory for each name, in which the agent gave that answer."""
    for name, answer in answers.items():
        body = recordings.native(name, steps=[recordings.step(llm_calls=[recordings.call(response=answer)])])
        [found] = ingestion.record_many(project, [formats.incoming(json.dumps(body).encode(), "native")])
        assert isinstance(found, preparing.Recorded), found
    indexing.drain(project)


def found(project: Project, text: str, *, size: int = 25) -> list[str]:
    rows = Trajectory.objects.filter(project=project)
    return [hit.trajectory.trajectory_id for hit in searching.search(rows, text, projects=[project.pk], size=size).hits]


def marked(excerpts: Sequence[searching.Excerpt]) -> str:
    pieces = [piece for one in excerpts for piece in one.pieces]
    return "".join(f"[{text}]" if is_hit else text for text, is_hit in pieces)


def test_all_words_must_occur_in_whatever_case_and_the_newest_comes_first(project: Project) -> None:
    say(project, a="The QUICK brown fox", b="a quick dog", c="quick, slow; fox?")

    assert found(project, "quick") == ["c", "b", "a"]
    assert found(project, "fox Quick") == ["c", "a"]
    assert found(project, "fox cat") == []


def test_a_phrase_stands_side_by_side_and_what_code_joins_is_a_phrase(project: Project) -> None:
    say(
        project,
        a="call get_user_details(id) in src/main.py",
        b="details of the user: get them",
        c="get the user",
        d="the widget user details",
    )

    assert found(project, '"get user"') == ["a"]
    assert found(project, "get_user") == ["a"]
    assert found(project, "main.py") == ["a"]
    assert found(project, "user details") == ["d", "b", "a"]
    assert found(project, '"user details" -widget') == ["a"]
    assert found(project, '"the user" -"of the user"') == ["c"]


def test_a_phrase_does_not_reach_from_one_message_into_the_next(project: Project) -> None:
    say(project, a="BUY")

    assert found(project, "sell buy") == ["a"]
    assert found(project, '"sell buy"') == []


def test_prefixes_and_exclusions(project: Project) -> None:
    say(project, a="reservation made", b="reserve now", c="preserve it", d="reservations of mia_li_3668")

    assert found(project, "reserv*") == ["d", "b", "a"]
    assert found(project, "reserv* -reservations") == ["b", "a"]
    assert found(project, "acme -reserv*") == ["c"]
    assert found(project, "mia_li_36*") == ["d"]
    assert found(project, '"mia li"* made') == []
    assert found(project, "-reserve -made -preserve") == ["d"]


def test_a_prefix_that_too_many_words_have_is_looked_for_in_the_texts(project: Project) -> None:
    say(project, a="reservation made", b="preserve it")
    question = searching.read("reserv*")

    slow = searching.Question(question.text, question.terms, slow_prefixes=True)

    hits = searching.search(Trajectory.objects.filter(project=project), slow).hits
    assert [hit.trajectory.trajectory_id for hit in hits] == ["a"]


def test_a_prefix_for_which_the_index_has_no_time_is_asked_for_otherwise(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(project, a="reservation made", b="preserve it")
    real = searching._Walk.go

    def slow(walk: searching._Walk, cursor: object) -> None:
        if not walk.question.slow_prefixes:
            raise TimeIsUp
        real(walk, None)

    monkeypatch.setattr(searching._Walk, "go", slow)

    assert found(project, "reserv*") == ["a"]


def test_languages_without_spaces_and_letters_that_fold(project: Project) -> None:
    say(
        project,
        a="\u6771\u4eac\u90fd\u3067\u3059",
        b="\u4eac\u6771",
        c="Stra\u00dfe nach \u0130stanbul",
        d="e\u0301te\u0301 fini",
    )

    assert found(project, "\u6771\u4eac") == ["a"]
    assert found(project, "STRASSE") == ["c"]
    assert found(project, "\u00e9t\u00e9") == ["d"]
    rows = Trajectory.objects.filter(project=project)
    [hit] = searching.search(rows, "strasse \u0130stanbul").hits
    assert marked(hit.excerpts) == "[Stra\u00dfe] nach [\u0130stanbul]"


GARBAGE = ["", "   ", "-", '"', '""', "*", "-*", "!!! ??? ...", "a*", "\x00", "&|!()<->:*", '-"" *', "\U0001f600"]
ODD = [
    "'",
    "\\'a",
    "a & b | !c",
    "profit:A",
    "<-> profit",
    '"unclosed profit',
    "-" * 300,
    "x" * 5_000,
    "@1",
    "#0.0",
    "profit\x00",
]


@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_asks_for_nothing(project: Project, text: str) -> None:
    say(project, a="x")

    told = searching.search(Trajectory.objects.all(), text)

    assert (told.question.terms, told.hits, told.older) == ((), (), None)


@pytest.mark.parametrize("text", [*ODD, *(f"profit {one}" for one in GARBAGE)])
def test_no_question_is_an_error(project: Project, text: str) -> None:
    say(project, a="x")

    told = searching.search(Trajectory.objects.all(), text)

    assert len(told.hits) <= 1


def test_nobody_finds_what_is_not_among_the_rows(project: Project) -> None:
    other = builders.make_project()
    say(project, mine="needle")
    say(other, theirs="needle")

    assert found(project, "needle") == ["mine"]
    hits = searching.search(Trajectory.objects.filter(project=project), "needle").hits  # no hint for the index
    assert [hit.trajectory.trajectory_id for hit in hits] == ["mine"]
    assert found(project, f"needle @{other.pk}") == []
    agent = Agent.objects.create(project=project, agent_id="someone else")
    assert not searching.search(Trajectory.objects.filter(agent=agent), "needle").hits


@pytest.mark.parametrize("question", ["profit", '"doubles its profit"', "prof* -absent", "-absent"])
def test_a_walk_over_blocks_finds_each_once_and_ends(
    project: Project, question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_texts, "LEVELS", (16, 4, 2))
    monkeypatch.setattr(searching, "LEVELS", (16, 4, 2))
    monkeypatch.setattr(searching, "WINDOW", 4)
    monkeypatch.setattr(searching, "READ", 3)
    other = builders.make_project()
    for number in range(40):
        say(other if number % 7 == 0 else project, **{f"t{number}": "other" if number % 3 == 0 else f"n{number}"})
    rows = Trajectory.objects.filter(project=project)

    met: list[int] = []
    cursor, pages = None, 0
    while pages == 0 or cursor is not None:
        told = searching.search(rows, f"{question} -other", cursor, 4, projects=[project.pk])
        assert len(told.hits) <= 4
        met += [hit.trajectory.pk for hit in told.hits]
        cursor, pages = told.older, pages + 1

    wanted = rows.exclude(trajectory_id__in=[f"t{number}" for number in range(0, 40, 3)])
    assert met == list(wanted.order_by("-pk").values_list("pk", flat=True))
    assert pages < 30


def test_when_the_time_is_up_the_rest_comes_with_the_next_page(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    for levels in (search_texts, searching):
        monkeypatch.setattr(levels, "LEVELS", (16, 4, 2))
    monkeypatch.setattr(searching, "WINDOW", 2)
    say(project, old="needle", **{f"t{number}": "hay" for number in range(10)})
    rows = Trajectory.objects.filter(project=project)

    told = searching.search(rows, "needle", budget=0.0)

    assert (told.hits, told.was_cut) == ([], True)
    pages = 0
    while told.older is not None:
        told = searching.search(rows, "needle", told.older, budget=0.0)
        pages += 1
    assert [hit.trajectory.trajectory_id for hit in told.hits] == ["old"]
    assert pages > 2


def test_blocks_are_covered_by_the_fewest(monkeypatch: pytest.MonkeyPatch) -> None:
    for levels in (search_texts, searching):
        monkeypatch.setattr(levels, "LEVELS", (16, 4, 2))

    assert searching._blocks(0, 16) == ["#0.0"]
    assert searching._blocks(2, 23) == ["#2.1", "#1.1", "#1.2", "#1.3", "#1.4", "#2.10", "#2.11"]


def test_an_excerpt_shows_where_it_was_said_by_whom_and_escapes_nothing(project: Project) -> None:
    say(project, a="x " * 400 + "<b>needle</b> here, Needle there" + " y" * 400)

    [hit] = searching.search(Trajectory.objects.filter(project=project), "needle").hits

    [excerpt] = hit.excerpts
    assert (excerpt.step, excerpt.role) == (0, "assistant")
    assert "x <b>[needle]</b> here, [Needle] there y" in marked(hit.excerpts)
    assert len(marked(hit.excerpts)) < searching.EXCERPT + 20
    assert (excerpt.pieces[0], excerpt.pieces[-1]) == (("… ", False), (" …", False))


def test_excerpts_are_of_the_messages_that_have_most_of_it(project: Project) -> None:
    body = recordings.chat("chat")
    [one] = ingestion.record_many(project, [formats.incoming(json.dumps(body).encode(), "messages")])
    assert isinstance(one, preparing.Recorded)
    indexing.drain(project)

    [hit] = searching.search(Trajectory.objects.filter(project=project), "acme profit").hits

    assert [(one.step, one.role) for one in hit.excerpts] == [(0, "user"), (1, "tool")]
    assert marked(hit.excerpts[1:]) == "[ACME] doubles its [profit]."


def test_a_question_is_a_few_queries_and_reads_no_payload(project: Project) -> None:
    say(project, **{f"t{number}": f"needle {number}" for number in range(12)})
    rows = Trajectory.objects.filter(project=project).select_related("agent", "scenario")

    with CaptureQueriesContext(connection) as queries:
        hits = searching.search(rows, '"needle"', projects=[project.pk]).hits
        [(hit.trajectory.agent.agent_id, hit.trajectory.scenario) for hit in hits]

    said = [one["sql"] for one in queries if not one["sql"].startswith(("SAVEPOINT", "RELEASE"))]
    assert len(hits) == 12
    assert len(said) <= 6
    assert not [sql for sql in said if "trajectory_segments" in sql]


def test_the_index_answers_even_of_a_large_table(project: Project) -> None:
    say(project, needle="needle")
    [text] = SearchText.objects.all()
    agent = Agent.objects.get()
    with connection.cursor() as cursor:
        cursor.execute(
            """insert into trajectories select (jsonb_populate_record(t, jsonb_build_object('id', t.id + i,
                   'trajectory_id', 'copy' || i))).* from trajectories t, generate_series(1, 20000) i
               where t.id = %s""",
            [text.pk],
        )
        cursor.execute(
            """insert into search_texts (trajectory_id, project_id, words, body, n_characters, is_cut)
               select id, project_id, array_to_tsvector(array['hay', 'word' || id, '@' || project_id,
                   '#0.' || id / 262144, '#1.' || id / 16384, '#2.' || id / 1024]), %s, 3, false
               from trajectories where id > %s""",
            [search_texts.packed([search_texts.Said(0, "user", "hay")]), text.pk],
        )
        cursor.execute("analyze search_texts")
        walk = searching._Walk(Trajectory.objects.all(), searching.read("needle"), [project.pk], 25, 1.0)
        with CaptureQueriesContext(connection) as queries:
            walk._candidates(0, 20_000)
        cursor.execute("explain " + queries[-1]["sql"])
        plan = "\n".join(line for (line,) in cursor.fetchall())
    assert "search_texts_words" in plan, plan
    assert found(project, "needle") == ["needle"]
    assert len(found(project, "hay", size=30)) == 30
    assert agent.project_id == project.pk
