"""Parts above the limit lie in blob storage: nothing is cut, all comes back, nothing is left behind."""

import base64
import hashlib
import json
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from django.core.files.storage import storages
from django.test import Client
from django.utils import timezone
from pytest_django import Settings

from tests import builders
from tests.trajectories import recordings
from trajectories import archive, blobs, indexing, ingestion, limits, running, segments
from trajectories.errors import Away
from trajectories.formats import incoming_value
from trajectories.models import Blob, BlobUse, LooseFile, Project, Role, Trajectory, TrajectorySegment
from trajectories.payloads import StepPayload

pytestmark = pytest.mark.django_db

URL = "/api/v1/trajectories/"
LARGE = limits.PART_BYTES + 1
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 1200
IMAGE = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.fixture
def project() -> Project:
    return builders.make_project()


@pytest.fixture
def headers(project: Project) -> dict[str, str]:
    return builders.bearer(builders.make_key(project)[1])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, settings: Settings) -> Path:
    """A blob storage of its own."""
    settings.STORAGES = {
        **settings.STORAGES,
        "default": {"BACKEND": "trajectories.durable_files.DurableFiles", "OPTIONS": {"location": tmp_path / "blobs"}},
    }
    return tmp_path / "blobs"


def post(client: Client, headers: dict[str, str], body: object, url: str = URL) -> int:
    return client.post(url, json.dumps(body), content_type="application/json", headers=headers).status_code


def files(folder: Path) -> list[Path]:
    return [one for one in folder.rglob("*") if one.is_file()]


def large_body(trajectory_id: str = "large") -> recordings.Body:
    """An image in a message, a text in an answer, a value in a state, each too large, and some that look like marks."""
    call = recordings.call(
        messages=[
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "?"}],
            }
        ],
        response="wörds \u0000 \U0001f600" * 30_000,
        tools=[{"type": "function", "function": {"name": "f", "description": "d" * LARGE}}],
    )
    state = {
        "screen": {"rows": [{"n": n, "text": "x" * 10} for n in range(20_000)]},
        "again": IMAGE,
        "small": "blob:0:0",
    }
    return recordings.native(
        trajectory_id,
        steps=[recordings.step(llm_calls=[call], environment_state=state, action={"result": ["y" * LARGE, 1.5, None]})],
        metadata={"mark": "blob:00:0", "deep": {"er": "z" * LARGE}},
    )


def test_what_is_too_large_lies_in_the_storage_and_comes_back_as_it_was(
    client: Client, headers: dict[str, str], folder: Path
) -> None:
    body = large_body()
    assert post(client, headers, body) == 201

    assert sum(row.raw_size for row in TrajectorySegment.objects.all()) < 10_000
    answer = client.get(URL + "large/", headers=headers).json()
    for field in ("steps", "metadata"):
        assert answer[field] == body[field]
    line = json.loads(client.get("/api/v1/export/", headers=headers).getvalue())
    assert line["steps"] == body["steps"]
    kinds = sorted(Blob.objects.values_list("kind", "media_type"))
    assert kinds == [("json", ""), ("text", ""), ("text", ""), ("text", ""), ("text", "image/png")]
    assert len(files(folder)) == 5
    image = Blob.objects.get(media_type="image/png")
    assert (image.raw_size, bytes(image.content_hash)) == (len(IMAGE), hashlib.sha256(IMAGE.encode()).digest())
    assert image.preview == IMAGE[: blobs.PREVIEW]
    assert not LooseFile.objects.exists()


def test_round_trip_to_another_project_keeps_the_identity(client: Client, headers: dict[str, str]) -> None:
    post(client, headers, large_body())
    line = client.get("/api/v1/export/", headers=headers).getvalue()
    other = builders.make_project()
    ingestion.record(other, incoming_value(json.loads(line)))

    assert Trajectory.objects.filter(raw_size=Trajectory.objects.earliest("pk").raw_size).count() == 2
    assert Blob.objects.filter(project=other).count() == 5


@pytest.mark.parametrize("text", ["x", "ü", "😀"])
def test_exactly_the_limit_stays_in_the_database(client: Client, headers: dict[str, str], text: str) -> None:
    size = len(text.encode())
    fitting = text * (limits.PART_BYTES // size)
    filling = [recordings.step(environment_state={"a": "y" * 1000})]  # so that the whole is above it
    post(client, headers, recordings.native("at", steps=[*filling, {"environment_state": {"a": fitting}}]))
    assert not Blob.objects.exists()

    post(client, headers, recordings.native("above", steps=[*filling, {"environment_state": {"a": fitting + text}}]))
    assert Blob.objects.count() == 1


def test_equal_parts_are_stored_once_a_project(client: Client, headers: dict[str, str], folder: Path) -> None:
    for name in ("a", "b"):
        post(client, headers, recordings.native(name, metadata={"image": IMAGE, "again": IMAGE}))
    other = builders.bearer(builders.make_key(builders.make_project())[1])
    post(client, other, recordings.native("a", metadata={"image": IMAGE}))

    assert Blob.objects.count() == 2
    assert len(files(folder)) == 2
    assert BlobUse.objects.count() == 3


def test_messages_and_their_actions_hold_the_same_part(client: Client, headers: dict[str, str]) -> None:
    result = "r" * LARGE
    body = recordings.chat("chat")
    messages = body["messages"]
    assert isinstance(messages, list)
    messages[3]["content"] = result
    post(client, headers, body, URL + "?format=messages")

    loaded = segments.load(Trajectory.objects.get())
    assert Blob.objects.count() == 1
    assert loaded.steps[0].action is not None
    assert loaded.steps[0].action.calls[0].result == result
    assert loaded.steps[1].llm_calls[0].prompt_ref is not None
    assert loaded.steps[1].llm_calls[0].prompt_ref.append[0]["content"] == result


def test_the_same_again_is_a_replay_and_other_content_a_conflict(client: Client, headers: dict[str, str]) -> None:
    body = large_body()
    other = {**body, "metadata": {"x": "other " * LARGE}}

    assert [post(client, headers, one) for one in (body, body, other)] == [201, 200, 409]
    Blob.objects.update(created_at=timezone.now() - timedelta(hours=2))
    BlobUse.objects.update(used_at=timezone.now() - timedelta(hours=2))
    assert blobs.sweep() == 1  # what only the refused one held
    assert client.get(URL + "large/", headers=headers).json()["steps"] == body["steps"]


def test_open_trajectories_hold_parts_too(client: Client, headers: dict[str, str], project: Project) -> None:
    step = {"index": 0, "environment_state": {"screen": IMAGE}}
    post(client, headers, recordings.native("open", steps=[], final_status="running", ended_at=None))
    post(client, headers, {"steps": [step]}, URL + "open/steps/")
    post(client, headers, {"steps": [step]}, URL + "open/steps/")  # a replay
    assert segments.load(Trajectory.objects.get()).steps[0].environment_state == {"screen": IMAGE}
    assert TrajectorySegment.objects.filter(raw_size__gt=10_000).count() == 0

    post(client, headers, {}, URL + "open/end/")

    indexing.drain(project)
    row = Trajectory.objects.get()
    assert segments.load(row).steps[0].environment_state == {"screen": IMAGE}
    assert Blob.objects.count() == 1
    BlobUse.objects.update(used_at=timezone.now() - timedelta(hours=2))
    blobs.sweep()
    assert BlobUse.objects.get().content_hash == row.content_hash


def test_redaction_comes_before_the_hash_and_the_storage(client: Client, project: Project, folder: Path) -> None:
    Project.objects.filter(pk=project.pk).update(redaction_rules=[{"name": "card", "pattern": "4111-1111"}])
    headers = builders.bearer(builders.make_key(project)[1])
    post(client, headers, recordings.native("a", metadata={"x": "pay 4111-1111 " + "y" * LARGE}))

    row = Blob.objects.get()
    assert blobs.read(row).startswith(b"pay [redacted: card] yyy")
    assert "4111" not in row.preview


def test_an_archived_trajectory_still_finds_its_parts(client: Client, headers: dict[str, str]) -> None:
    post(client, headers, large_body())
    row = Trajectory.objects.get()
    whole = segments.load(row)
    archive.archive(row)
    row.refresh_from_db()

    assert segments.load(row).steps == whole.steps


def test_a_page_can_leave_them_closed(client: Client, headers: dict[str, str]) -> None:
    post(client, headers, large_body())

    loaded = segments.load(Trajectory.objects.get(), open_blobs=False)

    assert len(loaded.marks) == 5
    assert loaded.steps[0].llm_calls[0].response in loaded.marks
    assert len(msgspec.json.encode(loaded.steps[0].environment_state)) < 1000


def test_a_part_that_is_lost_or_changed_is_said_and_not_made_up(
    client: Client, headers: dict[str, str], folder: Path
) -> None:
    post(client, headers, recordings.native("a", metadata={"image": IMAGE}))
    files(folder)[0].write_bytes(storages["default"].open(Blob.objects.get().location).read()[:-10])
    answer = client.get(URL + "a/", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (503, "away")

    files(folder)[0].unlink()
    answer = client.get(URL + "a/", headers=headers)
    assert (answer.status_code, "cannot be read" in answer.json()["detail"]) == (503, True)


# --- what is left behind -------------------------------------------------------------------------------------------


def test_the_last_trajectory_takes_its_parts_along(client: Client, headers: dict[str, str], folder: Path) -> None:
    for name in ("a", "b"):
        post(client, headers, recordings.native(name, metadata={"image": IMAGE}))
    later = timedelta(0)

    Trajectory.objects.get(trajectory_id="a").delete()
    assert blobs.sweep(later) == 0
    Trajectory.objects.get(trajectory_id="b").delete()
    assert blobs.sweep(later) == 1

    assert files(folder) == []
    assert not Blob.objects.exists()
    assert not LooseFile.objects.exists()


def test_what_a_crash_left_is_swept_after_an_hour(project: Project, folder: Path) -> None:
    part = blobs.Part("text", b"x" * 10, hashlib.sha256(b"x" * 10).digest())
    blobs._write(project, part)  # killed before its row
    blobs._keep(project, [blobs.Part("text", b"y", hashlib.sha256(b"y").digest())], "never-written", b"h")

    assert blobs.sweep() == 0
    LooseFile.objects.update(since=timezone.now() - timedelta(hours=2))
    Blob.objects.update(created_at=timezone.now() - timedelta(hours=2))
    BlobUse.objects.update(used_at=timezone.now() - timedelta(hours=2))
    assert blobs.sweep() == 2
    assert files(folder) == []


def test_a_writer_whose_file_was_swept_is_told_to_begin_again(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = blobs._write

    def slowly(project: Project, part: blobs.Part) -> Blob:
        row = write(project, part)
        LooseFile.objects.update(since=timezone.now() - timedelta(hours=2))
        blobs.sweep()
        return row

    monkeypatch.setattr(blobs, "_write", slowly)
    with pytest.raises(Away):
        blobs._keep(project, [blobs.Part("text", b"y", hashlib.sha256(b"y").digest())], "a", b"h")


@pytest.mark.django_db(transaction=True)
def test_a_blob_that_somebody_begins_to_use_is_not_swept(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep chose it while nobody used it; the use comes first to its commit."""
    part = blobs.Part("text", b"y", hashlib.sha256(b"y").digest())
    pk = blobs._keep(project, [part], "a", b"h")[0]
    BlobUse.objects.all().delete()
    chosen = Blob.objects.exclude(pk__in=BlobUse.objects.values("blob"))
    assert list(chosen) == [Blob.objects.get(pk=pk)]
    create = LooseFile.objects.bulk_create

    def used_meanwhile(*args: object, **kwargs: object) -> object:
        BlobUse.objects.create(blob_id=pk, trajectory_ref="b", content_hash=b"h")  # in the end it is a foreign key
        return create(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(LooseFile.objects.all()), "bulk_create", used_meanwhile)
    blobs.sweep(timedelta(0))

    assert Blob.objects.filter(pk=pk).exists()
    assert blobs.read(Blob.objects.get(pk=pk)) == b"y"


@pytest.mark.django_db(transaction=True)
def test_steps_that_are_rolled_back_leave_files_that_are_known(
    client: Client, project: Project, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    ingestion.record(
        project, incoming_value(recordings.native("open", steps=[], final_status="running", ended_at=None))
    )

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "_add_pieces", killed)
    step = msgspec.convert({"index": 0, "environment_state": {"screen": IMAGE}}, StepPayload)
    with pytest.raises(KeyboardInterrupt):
        running.append_steps(project, "open", [step])

    assert len(files(folder)) == 1
    assert Blob.objects.count() == 1
    BlobUse.objects.update(used_at=timezone.now() - timedelta(hours=2))
    Blob.objects.update(created_at=timezone.now() - timedelta(hours=2))
    assert blobs.sweep() == 1
    assert files(folder) == []


# --- on the page ---------------------------------------------------------------------------------------------------


def test_the_page_shows_the_beginning_and_hands_out_the_whole(
    client: Client, headers: dict[str, str], project: Project
) -> None:
    post(client, headers, large_body())
    row = Trajectory.objects.get()
    client.force_login(builders.make_member(project, Role.READER))

    page = client.get(f"/admin/trajectories/trajectory/{row.pk}/change/").content.decode()

    assert "blob:" not in page.replace("blob:0:0", "").replace("blob:00:0", "")  # the sender's own words stay
    assert len(page) < 100_000
    assert "[image/png, " in page
    picture = Blob.objects.get(media_type="image/png")
    url = f"/admin/trajectories/trajectory/{row.pk}/blob/{picture.pk}/"
    assert f'<img src="{url}"' in page
    answer = client.get(url)
    assert (answer.content, answer.headers["Content-Type"]) == (PNG, "image/png")
    assert answer.headers["Content-Disposition"].startswith("attachment")
    assert "sandbox" in answer.headers["Content-Security-Policy"]


def test_only_those_who_may_see_the_trajectory_get_its_parts(
    client: Client, headers: dict[str, str], project: Project
) -> None:
    post(client, headers, recordings.native("a", metadata={"image": IMAGE}))
    post(client, headers, recordings.native("b", metadata={"other": "x" * LARGE}))
    a, b = Trajectory.objects.order_by("pk")
    pk = Blob.objects.get(media_type="image/png").pk
    outsider = builders.make_member(builders.make_project(), Role.OPERATOR)

    def status(path: str) -> int:
        return client.get(path).status_code

    assert status(f"/admin/trajectories/trajectory/{a.pk}/blob/{pk}/") == 302  # to the login
    client.force_login(outsider)
    assert status(f"/admin/trajectories/trajectory/{a.pk}/blob/{pk}/") in (302, 403, 404)
    client.force_login(builders.make_member(project, Role.READER))
    assert status(f"/admin/trajectories/trajectory/{a.pk}/blob/{pk}/") == 200
    assert status(f"/admin/trajectories/trajectory/{b.pk}/blob/{pk}/") == 404


@pytest.mark.parametrize(
    "hostile", ["data:text/html,<script>alert(1)</script>", "data:image/svg+xml;base64,", "<script>alert(1)</script>"]
)
def test_hostile_parts_are_files_and_never_pages(
    client: Client, headers: dict[str, str], project: Project, hostile: str
) -> None:
    post(client, headers, recordings.native("a", metadata={"x": hostile + "A" * LARGE}))
    row, blob = Trajectory.objects.get(), Blob.objects.get()
    client.force_login(builders.make_member(project, Role.READER))

    answer = client.get(f"/admin/trajectories/trajectory/{row.pk}/blob/{blob.pk}/")
    page = client.get(f"/admin/trajectories/trajectory/{row.pk}/change/").content.decode()

    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert "<script>alert" not in page
    assert "<img" not in page
