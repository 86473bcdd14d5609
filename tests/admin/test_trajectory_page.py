"""A trajectory's page: each thing once and in its place, long runs as cheap as short ones."""

import base64
import json
import re

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from tests import builders
from tests.trajectories import recordings
from tests.trajectories.recordings import Body
from training.models import JudgeKind, RewardJudgment
from trajectories import archive, formats, indexing, ingestion, running, segments
from trajectories.history import SYSTEM
from trajectories.models import Project, Role, Trajectory
from trajectories.payloads import EndBody, StepsBody, decode
from trajectories.trajectory_pages import STEPS_A_PAGE

pytestmark = pytest.mark.django_db

URL = "/admin/trajectories/trajectory/"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
IMAGE = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
SVG = "data:image/svg+xml;base64," + base64.b64encode(b"<svg onload='alert(1)'/>" + b" " * 100).decode()


@pytest.fixture
def project() -> Project:
    return builders.make_project()


@pytest.fixture
def reader(client: Client, project: Project) -> Client:
    client.force_login(builders.make_member(project, Role.READER))
    return client


def record(project: Project, body: Body, name: str = "native") -> Trajectory:
    found = ingestion.record(project, formats.incoming_value(body, name))
    indexing.drain(project)
    return Trajectory.objects.get(project=project, trajectory_id=found.trajectory_id)


def page(client: Client, row: Trajectory, question: str = "") -> str:
    answer = client.get(f"{URL}{row.pk}/change/{question}")
    assert answer.status_code == 200
    return str(answer.content.decode())


def long_run(count: int) -> Body:
    steps = [
        recordings.step(
            environment_state={"tick": f"tick-{number}.", "noise": f"{number}" * 60},
            llm_calls=[
                recordings.call(
                    messages=[{"role": "system", "content": "s" * 900}, {"role": "user", "content": f"ask-{number}."}],
                    latency_ms=100.0 + number,
                )
            ],
            reward=0.5 if number % 2 else -0.25,
        )
        for number in range(count)
    ]
    return recordings.native(steps=steps)


def asks(*names: str, prefix: str = "c") -> list[Body]:
    return [
        {"id": f"{prefix}{at}", "type": "function", "function": {"name": name, "arguments": json.dumps({"of": name})}}
        for at, name in enumerate(names)
    ]


# --- long runs ---------------------------------------------------------------------------------------------------


def test_a_page_of_a_long_run_opens_as_few_segments_as_that_of_a_short_one(
    reader: Client, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = record(project, long_run(10)), record(project, long_run(2000))
    assert long.segments.count() == 5
    opened: list[object] = []
    real = segments.raw_of

    def raw_of(row: segments.Stored) -> bytes:
        opened.append(row)
        return real(row)

    monkeypatch.setattr(segments, "raw_of", raw_of)
    counts = {}
    for name, row, question in (
        ("short", short, ""), ("long", long, ""), ("middle", long, "?step=1234"), ("end", long, "?step=1999"),
    ):  # fmt: skip
        opened.clear()
        page(reader, row, question)  # what is read once a process is read
        opened.clear()
        with CaptureQueriesContext(connection) as queries:
            text = page(reader, row, question)
        counts[name] = (len(opened), len(queries))
        first = int(question.partition("=")[2] or 0)
        assert f"tick-{first}." in text
        assert f"tick-{first + STEPS_A_PAGE}." not in text
    assert max(segments_opened for segments_opened, _ in counts.values()) <= 3, counts
    assert max(n for _, n in counts.values()) <= 12, counts


def test_a_run_is_shown_at_a_glance(reader: Client, project: Project) -> None:
    text = page(reader, record(project, long_run(2000)))

    assert text.count('<rect class="took') == 154  # 13 steps a column
    assert "steps 0 to 12, 13 calls, 1.4 s" in text
    assert "how long each stretch's slowest call took (slowest " in text.replace("&#x27;", "'")
    assert 'href="?step=1989#step-1989"' in text
    assert "in the end 250" in text  # 1000 × 0.5 - 1000 × 0.25
    assert 'class="sum"' in text
    assert "Steps 0 to 39 of 2000" in text


def test_rewards_that_nobody_knows_are_not_drawn(reader: Client, project: Project) -> None:
    row = record(project, recordings.native(steps=[recordings.step(), recordings.step()]))
    assert 'class="sum"' not in page(reader, row)


def test_a_step_can_be_asked_for(reader: Client, project: Project) -> None:
    row = record(project, long_run(100))
    text = page(reader, row, "?step=77")
    assert 'id="step-77"' in text
    assert 'id="step-76"' not in text
    for wrong in ("?step=-1", "?step=x", "?step=", "?step=99999999999999999999", "?step=1e3", "?step=%00"):
        assert reader.get(f"{URL}{row.pk}/change/{wrong}").status_code == 200


def test_steps_that_are_too_much_for_one_page_go_on_on_the_next(reader: Client, project: Project) -> None:
    steps = [recordings.step(environment_state={"text": f"{number}:" + "x" * 50_000}) for number in range(60)]
    row = record(project, recordings.native(steps=steps))
    seen: list[int] = []
    question = ""
    for _ in range(60):
        text = page(reader, row, question)
        assert len(text) < 2_000_000
        seen += [int(one) for one in re.findall(r'id="step-(\d+)"', text)]
        found = re.search(r'href="(\?step=\d+)#steps">Later', text)
        if not found:
            break
        question = found[1]
    assert seen == list(range(60))


def test_a_text_of_a_megabyte_is_cut_with_a_way_to_the_whole(reader: Client, project: Project) -> None:
    row = record(project, recordings.native(steps=[recordings.step(action={"result": "y" * 200_000})]))
    text = page(reader, row)
    assert len(text) < 120_000
    assert "more characters" in text
    assert reader.get(f"{URL}{row.pk}/raw/?step=0").json()[0]["action"]["result"] == "y" * 200_000


# --- each thing once, in its place ---------------------------------------------------------------------------------


def below(text: str, call: str) -> str:
    """What stands in the box below a tool call."""
    start = text.index(f'class="name">{call}</bdi>')
    box = text.index('<div class="results">', start)
    following = text.find('class="name">', start + 20)
    following = text.find('<span class="role"><bdi>call</bdi>', start)
    end = following if following > 0 else text.index("</article>", start)
    assert box < end, f"{call} has no results"
    return text[box:end]


def conversation(*, repeat_ids: bool = False, named: bool = True) -> list[Body]:
    first, second = asks("headline", "price"), asks("volume", prefix="c" if repeat_ids else "d")
    answers = [("answer-headline", first[0]), ("answer-price", first[1])]

    def answer(words: str, call: Body) -> Body:
        return {"role": "tool", "content": words} | ({"tool_call_id": call["id"]} if named else {})

    return [
        {"role": "system", "content": "Trade shares. " * 40},
        {"role": "user", "content": "Trade ACME."},
        {"role": "assistant", "content": None, "tool_calls": first},
        *(answer(words, call) for words, call in (answers if not named else reversed(answers))),
        {"role": "assistant", "content": "One more.", "tool_calls": second},
        answer("answer-volume", second[0]),
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": "BUY"},
        {"role": "user", "content": "the-end"},
    ]


@pytest.mark.parametrize("repeat_ids", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_what_a_tool_answered_stands_below_its_call(
    repeat_ids: bool, named: bool, reader: Client, project: Project
) -> None:
    body: Body = {"trajectory_id": "t", "agent_id": "a", "messages": conversation(repeat_ids=repeat_ids, named=named)}
    text = page(reader, record(project, body, "messages"))

    for name in ("headline", "price", "volume"):
        assert f"answer-{name}" in below(text, name)
        assert text.count(f"answer-{name}") == 1
    for once in ("Trade ACME.", "One more.", "Go on.", "BUY", "the-end"):
        assert text.count(once) == 1, once
    assert len(re.findall(r"<details><summary><bdi>Trade shares", text)) == 1


def native_steps(*, messages: bool) -> list[Body]:
    """A growing prompt in every call, and the results once more as the action's."""
    said = conversation()
    steps: list[Body] = []
    for at, message in enumerate(said):
        if message["role"] != "assistant":
            continue
        step: Body = {
            "llm_calls": [
                {"model": "m", "messages": said[:at], "response": message["content"]}
                | ({"tool_calls": message["tool_calls"]} if "tool_calls" in message else {})
            ]
        }
        called = message.get("tool_calls")
        if isinstance(called, list):
            results = {str(one["tool_call_id"]): one["content"] for one in said if one["role"] == "tool"}
            step["action"] = {
                "action_type": "tools",
                "calls": [{"tool_call_id": one["id"], "result": results[one["id"]]} for one in called],
            }
        steps.append(step)
    return steps


def test_an_actions_results_are_not_said_twice(reader: Client, project: Project) -> None:
    text = page(reader, record(project, recordings.native(steps=native_steps(messages=True))))
    for name in ("headline", "price", "volume"):
        assert f"answer-{name}" in below(text, name)
        assert text.count(f"answer-{name}") == 1
    assert text.count("Trade ACME.") == 1


def test_an_open_run_shows_each_thing_once_too(reader: Client, project: Project) -> None:
    body = recordings.native("run", steps=[], final_status="running", ended_at=None, reward=None)
    ingestion.record(project, formats.incoming_value(body))
    for index, step in enumerate(native_steps(messages=True)):
        sent = decode(json.dumps({"steps": [{**step, "index": index}]}).encode(), StepsBody).steps
        running.append_steps(project, "run", sent)
    row = Trajectory.objects.get()

    before = page(reader, row, "?step=0")
    part = reader.get(f"{URL}{row.pk}/live/?after=1").content.decode()
    running.end(project, "run", EndBody(final_status="completed", reward=0.5))
    indexing.drain(project)
    after = page(reader, Trajectory.objects.get())

    for text in (before, after):
        for once in ("Trade ACME.", "One more.", "Go on.", "answer-price", "answer-volume"):
            assert text.count(once) == 1, once
    assert "Trade ACME." not in part
    assert "Go on." in part


def test_a_page_that_begins_in_the_middle_repeats_nothing_of_before(reader: Client, project: Project) -> None:
    said: list[Body] = [{"role": "system", "content": "s" * 500}, {"role": "user", "content": "begin-here"}]
    steps = []
    for number in range(120):
        steps.append({"llm_calls": [{"model": "m", "messages": list(said), "response": f"said-{number}."}]})
        said += [{"role": "assistant", "content": f"said-{number}."}, {"role": "user", "content": f"asked-{number}."}]
    row = record(project, recordings.native(steps=steps))
    text = page(reader, row, "?step=80")
    assert "begin-here" not in text
    assert text.count("asked-79.") == 1
    assert "asked-78." not in text
    assert text.count("said-80.") == 1


def test_json_is_folded_and_hostile_words_in_it_are_words(reader: Client, project: Project) -> None:
    value = {"<b>key</b>": ["<script>alert(1)</script>"] * 40, "deep": {"a": {"b": {"c": ["long text " * 20] * 3}}}}
    text = page(reader, record(project, recordings.native(steps=[recordings.step(environment_state=value)])))
    assert '<details class="json" open>' in text
    assert "40 items" in text
    assert "&lt;b&gt;key&lt;/b&gt;" in text
    assert "<script>alert" not in text


# --- files -----------------------------------------------------------------------------------------------------------


def with_images() -> Body:
    content = [
        {"type": "text", "text": "Look at this."},
        {"type": "image_url", "image_url": {"url": IMAGE}},
        {"type": "image_url", "image_url": {"url": "https://elsewhere.example/pixel.gif"}},
        {"type": "image_url", "image_url": {"url": SVG}},
    ]
    steps = [
        recordings.step(),
        recordings.step(
            llm_calls=[recordings.call(messages=[{"role": "user", "content": content}])],
            environment_state={"screens": [{"png": IMAGE + "A"}]},
        ),
    ]
    return recordings.native(steps=steps)


def test_images_are_shown_from_our_own_address(reader: Client, project: Project) -> None:
    row = record(project, with_images())
    text = page(reader, row)

    assert "data:image" not in text
    assert '"https://elsewhere' not in text
    assert "https://elsewhere.example/pixel.gif" in text  # told, not asked for
    shown = re.findall(r'<img src="([^"]+)"', text)
    assert len(shown) == 2
    answers = [reader.get(url) for url in shown]
    assert {answer.headers["Content-Type"] for answer in answers} == {"image/png"}
    assert PNG in [answer.content for answer in answers]
    for answer in answers:
        assert "sandbox" in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    links = set(re.findall(r'href="([^"]+/file/[^"]+)"', text)) - set(shown)
    assert len(links) == 1
    svg = reader.get(links.pop())
    assert svg.headers["Content-Type"] == "application/octet-stream"
    assert svg.headers["Content-Disposition"].startswith("attachment")


def test_files_of_others_and_files_that_are_none_are_not_found(
    reader: Client, project: Project, client: Client
) -> None:
    row = record(project, with_images())
    url = re.findall(r'<img src="([^"]+)"', page(reader, row))[0]
    assert reader.get(url.replace("/file/1/", "/file/7/")).status_code == 404
    assert reader.get(re.sub(r"/[0-9a-f]{64}/", f"/{'0' * 64}/", url)).status_code == 404
    assert reader.get(url.replace("/file/1/", f"/file/{10**30}/")).status_code == 404
    outsider = Client()
    outsider.force_login(builders.make_member(builders.make_project(), Role.OPERATOR))
    for path in (url, f"{URL}{row.pk}/raw/", f"{URL}{row.pk}/checks/", f"{URL}{row.pk}/next/"):
        answer = outsider.get(path)
        assert answer.status_code in (302, 404), path
        assert row.trajectory_id not in answer.headers.get("Location", "")
        assert PNG not in answer.content


# --- raw JSON --------------------------------------------------------------------------------------------------------


def test_the_raw_json_is_one_click_away(reader: Client, project: Project) -> None:
    row = record(project, long_run(100))
    assert f'href="{URL}{row.pk}/raw/"' in page(reader, row)
    answer = reader.get(f"{URL}{row.pk}/raw/")
    assert answer.headers["Content-Type"] == "application/json"
    assert len(answer.json()["steps"]) == 100
    assert answer.json()["trajectory_id"] == row.trajectory_id
    [step] = reader.get(f"{URL}{row.pk}/raw/?step=42").json()
    assert step["environment_state"]["tick"] == "tick-42."
    assert reader.get(f"{URL}{row.pk}/raw/?download").headers["Content-Disposition"].startswith("attachment")
    assert reader.get(f"{URL}{row.pk}/raw/?step=4242").json() == []


def test_every_check_of_a_long_run_is_there_when_asked_for(reader: Client, project: Project) -> None:
    row = record(project, long_run(2000))
    assert f'href="{URL}{row.pk}/checks/"' in page(reader, row)
    text = reader.get(f"{URL}{row.pk}/checks/").content.decode()
    assert "actions_have_results" in text
    assert "has_steps" in page(reader, record(project, long_run(3)))


def test_a_payload_that_is_lost_says_so_everywhere(reader: Client, project: Project) -> None:
    row = record(project, long_run(5))
    row.segments.all().delete()
    assert "has no payload" in page(reader, row)
    assert reader.get(f"{URL}{row.pk}/raw/").status_code == 503
    assert "has no payload" in reader.get(f"{URL}{row.pk}/checks/").content.decode()


def test_an_archived_one_is_opened_on_demand(reader: Client, project: Project) -> None:
    row = record(project, long_run(2000))
    archive.archive(row, by=SYSTEM, reason="old")
    assert "tick-1500." in page(reader, row, "?step=1500")


# --- around it -------------------------------------------------------------------------------------------------------


def test_who_called_whom_is_found_from_both_sides(reader: Client, project: Project) -> None:
    parent = record(project, recordings.native("parent", episode_id="e1"))
    child = record(
        project,
        recordings.native("child", parent_trajectory_id="parent", parent_call=3, role="critic", episode_id="e1"),
    )
    again = record(project, recordings.native("again", retry_of="parent"))
    lost = record(project, recordings.native("lost", parent_trajectory_id="never-sent"))
    record(builders.make_project(), recordings.native("stranger", parent_trajectory_id="parent", episode_id="e1"))

    text = page(reader, parent)
    assert f"{URL}{child.pk}/change/" in text
    assert "was tried again by" in text and f"{URL}{again.pk}/change/" in text
    assert "stranger" not in text
    text = page(reader, child)
    assert "called by, call 3" in text and f"{URL}{parent.pk}/change/" in text
    assert text.count(f'href="{URL}{parent.pk}/change/"') == 1  # not once more as of the same episode
    assert "which is not recorded here" in page(reader, lost)


def test_what_is_said_of_others_is_noted_once(project: Project) -> None:
    row = record(project, recordings.native("child", parent_trajectory_id="parent", episode_id="e1"))
    indexing.reindex(project)
    indexing.drain(project)
    assert sorted(row.relations.values_list("kind", "name")) == [("episode", "e1"), ("parent", "parent")]


def test_feedback_on_a_step_stands_at_the_step(reader: Client, project: Project) -> None:
    row = record(project, long_run(5))
    RewardJudgment.objects.create(
        project=project, trajectory=row, kind=JudgeKind.HUMAN, source="people", score=-1.0, step=3, author="ada",
        reasoning="wrong <turn>", counts=False,
    )  # fmt: skip
    text = page(reader, row)
    start = text.index('id="step-3"')
    assert "wrong &lt;turn&gt;" in text[start : text.index("</article>", start)]


def chain(client: Client, row: Trajectory, way: str, question: str = "") -> int:
    """The pk that a click leads to."""
    answer = client.get(f"{URL}{row.pk}/{way}/{question}")
    assert answer.status_code == 302
    found = re.match(rf"{URL}(\d+)/change/", answer.headers["Location"])
    assert found
    return int(found[1])


def test_next_and_previous_go_through_the_list_that_was_filtered(reader: Client, project: Project) -> None:
    rows = [record(project, recordings.native(reward=float(number % 2))) for number in range(6)]
    assert chain(reader, rows[3], "next") == rows[2].pk  # newest first
    assert chain(reader, rows[3], "previous") == rows[4].pk
    kept = "?_changelist_filters=reward_min%3D1"
    assert chain(reader, rows[3], "next", kept) == rows[1].pk
    answer = reader.get(f"{URL}{rows[3].pk}/next/{kept}")
    assert answer.headers["Location"].endswith(kept)
    assert chain(reader, rows[1], "next", kept) == rows[1].pk  # the last one
    assert "last trajectory of the list" in page(reader, rows[1], kept)
    by_reward = "?_changelist_filters=o%3Dreward"
    walked = [rows[0].pk]
    while (following := chain(reader, Trajectory.objects.get(pk=walked[-1]), "next", by_reward)) != walked[-1]:
        walked.append(following)
    assert walked == [rows[0].pk, rows[2].pk, rows[4].pk, rows[1].pk, rows[3].pk, rows[5].pk]


@pytest.mark.parametrize("kept", ["reward_min%3Dnonsense", "password%3Dx", "%00", "project%3D999999999", "p%3Dgarbage"])
def test_filters_that_are_none_lead_nowhere(kept: str, reader: Client, project: Project) -> None:
    row = record(project, recordings.native())
    record(builders.make_project(), recordings.native())
    assert chain(reader, row, "next", f"?_changelist_filters={kept}") == row.pk


def test_calls_are_numbered_through_the_run_also_where_steps_have_none_or_two(reader: Client, project: Project) -> None:
    steps = [recordings.step(llm_calls=[recordings.call(response=f"answer {number}")]) for number in range(60)]
    steps[0] = recordings.step(llm_calls=[])
    steps[59] = recordings.step(llm_calls=[recordings.call(response="one"), recordings.call(response="two")])
    text = page(reader, record(project, recordings.native(steps=steps)), "?step=50")
    assert "call 49 ·" in text  # of step 50
    assert "call 59 ·" in text  # the second of step 59
    assert "call 60 ·" not in text
