"""What of a trajectory becomes searchable: what was said in it, each thing once, capped; whatever it says."""

import json
from unittest import mock

import pytest
from django.core.management import call_command
from django.db import connection

from tests import builders
from tests.trajectories import recordings
from trajectories import formats, indexing, ingestion, preparing, search_texts
from trajectories.models import IndexingWork, Project, SearchText, Trajectory

pytestmark = pytest.mark.django_db


@pytest.fixture
def project() -> Project:
    return builders.make_project()


def record(project: Project, *bodies: recordings.Body, name: str = "native") -> None:
    found = ingestion.record_many(project, [formats.incoming(json.dumps(body).encode(), name) for body in bodies])
    assert all(isinstance(one, preparing.Recorded) for one in found), found
    indexing.drain(project)


def parts(row: SearchText) -> list[search_texts.Said]:
    return search_texts.parted(search_texts.opened(row.body))


def words(row: SearchText) -> set[str]:
    with connection.cursor() as cursor:
        cursor.execute(
            "select tsvector_to_array(words) from search_texts where trajectory_id = %s", [row.trajectory_id]
        )
        found: list[str] = cursor.fetchone()[0]
    return set(found)


def one_call(**fields: object) -> recordings.Body:
    return recordings.native(steps=[recordings.step(llm_calls=[recordings.call(**fields)])])


def test_what_was_said_is_kept_in_order_with_its_step_and_speaker(project: Project) -> None:
    record(project, recordings.chat(), name="messages")

    row = SearchText.objects.get()
    assert parts(row) == [
        (0, "user", "Trade ACME."),
        (0, "call", 'headline {"of":"ACME"}'),
        (1, "tool", "ACME doubles its profit."),
        (1, "assistant", "BUY"),
        (1, "user", "Done."),
    ]
    assert (row.is_cut, row.project_id) == (False, project.pk)
    assert row.n_characters == sum(len(part.text) for part in parts(row))


def test_reasoning_errors_and_actions_are_said_and_system_prompts_and_metadata_are_not(project: Project) -> None:
    spoken = recordings.call(reasoning="weighing", error={"code": "overloaded"}, tools=[{"name": "unsaid1"}])
    done = {"action_type": "sell_all", "parameters": {"ticker": "acme"}, "result": {"filled": 3}, "error": "halted"}
    record(
        project,
        recordings.native(
            steps=[recordings.step(llm_calls=[spoken], action=done, environment_state={"x": "unsaid2"})],
            metadata={"private": {"gold": "unsaid3"}},
            scenario={"id": "s", "description": "unsaid4", "metadata": {"private": "unsaid5"}},
        ),
    )

    found = words(SearchText.objects.get())
    assert {"weighing", "overloaded", "sell", "all", "ticker", "filled", "3", "halted", "profit", "buy"} <= found
    assert not {"shares", "answer", "gold"} & found
    assert not [word for word in found if word.startswith("unsaid")]


def test_what_graders_say_is_not_kept(project: Project) -> None:
    graded = recordings.call(purpose="grading", response="the gold answer is SELL", messages=None, user_prompt="grade")
    record(project, recordings.native(steps=[recordings.step(llm_calls=[recordings.call(), graded])]))

    assert not {"gold", "grade"} & words(SearchText.objects.get())


def test_a_conversation_that_each_call_sends_whole_is_kept_once(project: Project) -> None:
    said: list[recordings.Body] = [{"role": "system", "content": "rules"}, {"role": "user", "content": "question 0"}]
    steps = []
    for number in range(30):
        steps.append(recordings.step(llm_calls=[recordings.call(messages=list(said), response=f"answer {number}")]))
        said += [
            {"role": "assistant", "content": f"answer {number}"},
            {"role": "user", "content": f"question {number + 1}"},
        ]
    record(project, recordings.native(steps=steps))

    texts = [part.text for part in parts(SearchText.objects.get()) if part.role != "action"]
    assert texts == [text for number in range(30) for text in (f"question {number}", f"answer {number}")]


def test_long_messages_and_long_runs_are_cut_and_say_so(project: Project) -> None:
    long = one_call(user_prompt="first " + "x " * 20_000 + "last", messages=None)
    runs = [
        recordings.step(llm_calls=[recordings.call(messages=None, user_prompt=f"turn{number} " + "word " * 200)])
        for number in range(100)
    ]
    record(project, long)
    record(project, recordings.native(steps=runs))

    one, many = SearchText.objects.order_by("pk")
    assert (one.is_cut, many.is_cut) == (True, True)
    assert {"first", "last"} <= words(one)
    assert one.n_characters <= search_texts.PART + 100
    assert many.n_characters <= search_texts.LIMIT
    assert {"turn0", "turn10", "turn99"} <= words(many)
    assert "turn50" not in words(many)


HOSTILE = [
    "a\x00b NUL and \x1e\x1f parting marks",
    "it's 'quoted' \\ & | ! ( ) :* <-> :ABCD \\' ''",
    "<script>alert(1)</script> \x1b[31mred\x1b[0m \u202eevil\u202c",
    "x" * 1_000_000,
    "'" * 5_000 + "\\" * 5_000,
    "\ufffe \U0010ffff \u0130stanbul stra\u00dfe e\u0301t\u00e9 \u65e5\u672c \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "data:image/png;base64," + "QUJD" * 20_000,
    " ".join(f"w{number}" for number in range(8_000)),
    "\U0001f600" * 3_000,
    "",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_stops_the_pass(project: Project, text: str) -> None:
    record(project, one_call(response=text, tool_calls=[{"function": {"name": text[:50], "arguments": text}}]))

    row = SearchText.objects.get()
    assert "profit" in words(row)
    assert all("\x00" not in part.text for part in parts(row))
    assert not IndexingWork.objects.exists()


def test_a_text_cannot_claim_another_project_or_block(project: Project) -> None:
    record(project, one_call(response="@1 @2 #0.1 '#0.1' project @99 block #2.77"))

    row = SearchText.objects.get()
    marks = {word for word in words(row) if not word.isalnum()}
    assert marks == set(search_texts.marks_of(Trajectory.objects.get()))


def test_a_recording_that_cannot_be_searched_does_not_hold_up_the_others(project: Project) -> None:
    real = search_texts.said

    def broken(payload: object, previews: object = None) -> object:
        if getattr(payload, "trajectory_id", "") == "bad":
            raise ValueError("nobody thought of this")
        return real(payload)  # type: ignore[arg-type]  # what it was called with

    with mock.patch.object(search_texts, "said", broken):
        record(project, recordings.native("bad"), recordings.native("good"))

    found = SearchText.objects.values_list("trajectory__trajectory_id", "n_characters", "is_cut")
    assert {name: (size > 0, cut) for name, size, cut in found} == {"bad": (False, True), "good": (True, False)}


def test_redacted_words_are_not_kept() -> None:
    project = builders.make_project(redaction_rules=[{"name": "secret", "pattern": "swordfish"}])
    record(project, one_call(response="the password is swordfish"))

    row = SearchText.objects.get()
    assert "password" in words(row)
    assert "swordfish" not in words(row)
    assert not [part for part in parts(row) if "swordfish" in part.text]


def test_a_pass_that_dies_leaves_its_work_to_the_next(project: Project) -> None:
    with mock.patch.object(search_texts, "vector", side_effect=MemoryError), pytest.raises(MemoryError):
        record(project, recordings.native())
    assert not SearchText.objects.exists()

    indexing.drain(project)

    assert SearchText.objects.count() == 1


def test_reindexing_makes_them_anew_and_once(project: Project) -> None:
    record(project, recordings.native(), recordings.native())
    SearchText.objects.order_by("pk")[0].delete()
    SearchText.objects.update(n_characters=0)

    call_command("reindex", project=project.slug)

    assert [row.n_characters > 0 for row in SearchText.objects.all()] == [True, True]


def test_a_deleted_trajectory_takes_its_text_along(project: Project) -> None:
    record(project, recordings.native())

    Trajectory.objects.all().delete()

    assert not SearchText.objects.exists()


def test_words_are_cut_alike_for_texts_with_and_without_other_letters() -> None:
    plain = "get_user(id=3668) src/main.py v1.0.3 it's UPPER"

    cut = ["get", "user", "id", "3668", "src", "main", "py", "v1", "0", "3", "it", "s", "upper"]
    assert search_texts.words_of(plain) == cut
    assert search_texts.words_of(plain + " \u65e5\u672c \u00c9TE\u0301") == [*cut, "\u65e5", "\u672c", "\u00e9t\u00e9"]
    assert search_texts.words_of("A" * 100) == ["a" * search_texts.WORD]
