"""What could not be taken in is taken in once its cause is mended: each record once, and each file is accounted for."""

from io import StringIO
from pathlib import Path

import httpx
import pytest
from django.core.management import CommandError, call_command
from pytest_django import Settings

from tests.gateway.backend import Backend
from tests.gateway.recorded import QUESTION, calls_of, row_of
from tests.gateway.running import RunningGateway, eventually
from trajectories.models import Project, State, Trajectory

BROKEN = [{"name": "broken", "pattern": "("}]


@pytest.fixture
def aside(gateway: RunningGateway, settings: Settings) -> Path:
    settings.GATEWAY_SPOOL_DIR = gateway.data / "gateway-spool"
    return gateway.data / "gateway-spool" / "set-aside"


def retried(*words: object) -> list[str]:
    out = StringIO()
    call_command("retry_set_aside", *map(str, words), stdout=out)
    return out.getvalue().splitlines()


def ask(gateway: RunningGateway, key: str, trajectory_id: str) -> None:
    gateway.client(key, X_Trajectory_Id=trajectory_id).chat.completions.create(model="tiny", messages=QUESTION)


def test_calls_are_taken_in_once_their_cause_is_mended(
    gateway: RunningGateway, backend: Backend, key: str, project: Project, aside: Path
) -> None:
    Project.objects.filter(pk=project.pk).update(redaction_rules=BROKEN)
    for name in ("t1", "t1", "t2"):
        ask(gateway, key, name)
    assert eventually(lambda: len(list(aside.glob("*.json"))) == 3)
    assert "3 records could not be taken in" in str(gateway.health()["detail"])
    shown = retried("--list")
    assert len(shown) == 3 and all("'broken'" in line for line in shown)
    with pytest.raises(CommandError, match="3 of 3 could not be taken in"):
        retried()
    assert len(list(aside.glob("*.json"))) == 3

    Project.objects.filter(pk=project.pk).update(redaction_rules=[])
    first, *rest = sorted(aside.glob("*.json"))
    copy = first.read_bytes()
    assert retried(first) == [f"taken in  {first}: A call of t1, as its step 0."]
    first.write_bytes(copy)  # as after a kill between the database and the folder
    assert retried() == [
        f"taken in  {first}: A call of t1, which holds it already.",
        f"taken in  {rest[0]}: A call of t1, as its step 1.",
        f"taken in  {rest[1]}: A call of t2, as its step 0.",
    ]
    assert list(aside.iterdir()) == []
    assert gateway.health()["ok"] is True
    assert retried() == [f"Nothing is set aside in {aside.parent}."]

    ask(gateway, key, "t1")  # the gateway goes on behind them
    one, two, three = calls_of(project, "t1", 3)
    assert (one.response, two.response, three.response) == ("Buy on good news.",) * 3
    assert one.token_ids == [100, 101, 102, 103, 104]
    assert row_of(project, "t2").source_format == "gateway"


def test_an_end_is_taken_in_behind_its_calls_and_what_comes_too_late_stays(
    gateway: RunningGateway, backend: Backend, key: str, project: Project, aside: Path
) -> None:
    Project.objects.filter(pk=project.pk).update(redaction_rules=BROKEN)
    ask(gateway, key, "t1")
    assert eventually(lambda: len(list(aside.glob("*.json"))) == 1)
    [path] = aside.glob("*.json")
    late = path.with_name(f"{path.stem}-late.json")
    late.write_bytes(path.read_bytes().replace(b'"ended":"2', b'"ended":"1'))  # another call of t1
    end = path.with_name(f"{path.stem}-end.json")
    end.write_bytes(
        b'{"type":"end","id":"e","project":%d,"trajectory_id":"t1","body":{"final_status":"completed","reward":1.0}}'
        % project.pk
    )
    junk = path.with_name(f"{path.stem}-junk.json")
    junk.write_bytes(b"0123abcd {cut off")
    Project.objects.filter(pk=project.pk).update(redaction_rules=[])

    out = StringIO()
    with pytest.raises(CommandError, match="of 4"):
        call_command("retry_set_aside", str(path), str(end), str(junk), str(late), stdout=out)

    print(out.getvalue())
    one, two, three, four = out.getvalue().splitlines()
    assert one.startswith("taken in") and two == f"taken in  {end}: The end of t1 (sealed)."
    assert three.startswith(f"still set aside  {junk}: It cannot be read")
    assert four.startswith(f"still set aside  {late}: ") and "was sealed before" in four
    assert "was sealed before" in late.with_suffix(".why").read_text()
    row = row_of(project, "t1")
    assert (row.state, row.n_calls, row.reward) == (State.SEALED, 1, 1.0)
    for left in (junk, late, late.with_suffix(".why")):
        left.unlink()
    assert httpx.get(f"{gateway.url}/healthz").json()["spool"]["set_aside"] == 0


def test_what_belongs_to_no_project_stays(gateway: RunningGateway, db: None, aside: Path) -> None:
    aside.mkdir(exist_ok=True)
    path = aside / "1-1.json"
    path.write_bytes(b'{"type":"end","id":"e","project":999999,"trajectory_id":"t1","body":{}}')
    with pytest.raises(CommandError):
        retried()
    assert "project 999999 is not there" in path.with_suffix(".why").read_text()
    with pytest.raises(CommandError):
        retried(aside / "never.json")
    assert not Trajectory.objects.filter(trajectory_id="t1", project=999999).exists()
    path.unlink()
    path.with_suffix(".why").unlink()
