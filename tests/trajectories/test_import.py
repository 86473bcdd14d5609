"""import_trajectories: recognises files, reports per item, never stops at a bad one, may be repeated."""

import gzip
import json
from io import StringIO
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command
from django.test import Client

from tests import builders
from tests.trajectories import recordings
from trajectories import indexing, segments, transcripts
from trajectories.models import Group, GroupState, LlmCallLog, Project, Trajectory

pytestmark = pytest.mark.django_db

Report = dict[str, object]


@pytest.fixture
def project() -> Project:
    return builders.make_project("here", held_out_share=0.0)


def run(*paths: Path, code: int = 0, **options: object) -> Report:
    out = StringIO()
    left = 0
    try:
        call_command(
            "import_trajectories", *map(str, paths), project="here", json=True, stdout=out, stderr=StringIO(), **options
        )
    except SystemExit as exc:
        left = int(exc.code or 0)
    assert left == code, out.getvalue()
    report: Report = json.loads(out.getvalue().strip().splitlines()[-1])
    assert set(report) == {"files", "trajectories", "replayed", "failed", "llm_calls", "tool_calls", "errors"}
    return report


def counts(report: Report) -> list[object]:
    return [report[name] for name in ("files", "trajectories", "replayed", "failed", "llm_calls", "tool_calls")]


def test_files_of_each_kind_are_recognised_and_may_come_again(project: Project, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(recordings.native("a")))
    (tmp_path / "list.json").write_text(json.dumps([recordings.native("b"), recordings.chat("c")]))
    lines = "\n".join(json.dumps(recordings.chat(f"d{number}")) for number in range(3))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))

    assert counts(run(tmp_path)) == [3, 6, 0, 0, 1 + 1 + 2 + 6, 4]
    assert counts(run(tmp_path)) == [3, 0, 6, 0, 0, 0]
    assert Trajectory.objects.filter(project=project).count() == 6


def test_bad_items_and_files_are_reported_and_passed_over(project: Project, tmp_path: Path) -> None:
    lines = [
        json.dumps(recordings.native("a")),
        "<PLACEHOLDER ROW>",
        json.dumps({"x": 1}),
        json.dumps(recordings.native("b")),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.json").write_text('{"trajectory_id": "n", "agent_id": "a", "steps": [{"reward": NaN}]}')
    (tmp_path / "c.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "d.json").write_text("")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines[0].encode() * 50)[:-20])

    report = run(tmp_path, code=1)

    assert counts(report)[:4] == [5, 2, 0, 6]
    errors = report["errors"]
    assert isinstance(errors, list)
    assert [(Path(one["file"]).name, one["item"]) for one in errors] == [
        ("a.jsonl", 1),
        ("a.jsonl", 2),
        ("b.json", 0),
        ("c.json", None),
        ("d.json", None),
        ("e.jsonl.gz", None),
    ]
    assert "git lfs pull" in errors[3]["detail"]
    assert "/steps/0/reward" in errors[2]["detail"]


def test_a_missing_file_and_an_unknown_project_are_said(project: Project, tmp_path: Path) -> None:
    assert counts(run(tmp_path / "nowhere.json", code=1))[3] == 1
    with pytest.raises(CommandError, match="no project 'elsewhere'"):
        call_command("import_trajectories", str(tmp_path), project="elsewhere")


@recordings.needs_data
def test_the_recorded_tau_bench_file_goes_in_whole(project: Project) -> None:
    report = run(recordings.TAU_BENCH)

    runs = json.loads(gzip.decompress(recordings.TAU_BENCH.read_bytes()))
    spoken = [message for one in runs for message in one["traj"] if message["role"] == "assistant"]
    asked = sum(len(message.get("tool_calls") or ()) for message in spoken)
    assert counts(report) == [1, 100, 0, 0, len(spoken), asked]
    assert LlmCallLog.objects.count() == len(spoken)
    assert set(Trajectory.objects.values_list("behaviour", flat=True)) == {"foreign:gpt-4o"}
    assert counts(run(recordings.TAU_BENCH)) == [1, 0, 100, 0, 0, 0]
    stored = {row.trajectory_id: row for row in Trajectory.objects.all()}
    first = stored["tau-bench/gpt-4o-airline/0/0"]
    history = transcripts.histories(segments.load(first))[0]
    assert [message["role"] for message in history.messages] == [message["role"] for message in runs[0]["traj"]]


@recordings.needs_data
def test_the_recorded_runs_go_in_by_post_as_25_groups_11_of_them_with_spread(client: Client, project: Project) -> None:
    headers = builders.bearer(builders.make_key(project)[1])
    answers = []
    for _ in range(2):
        for body in recordings.tau_bench():
            answers.append(
                client.post(
                    "/api/v1/trajectories/?format=messages",
                    json.dumps(body),
                    content_type="application/json",
                    headers=headers,
                ).status_code
            )
    indexing.drain(project)

    assert answers == [201] * 100 + [200] * 100
    groups = list(Group.objects.filter(project=project))
    assert [(one.n, one.state) for one in groups] == [(4, GroupState.CLOSED)] * 25
    assert sum(bool(one.reward_spread()) for one in groups) == 11
    assert sum(one.reward_sum for one in groups) == 31
    stored = sum(len(bytes(row.data or b"")) for one in Trajectory.objects.all() for row in one.segments.all())
    assert stored / 100 < 4_000
