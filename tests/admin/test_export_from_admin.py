"""The list's button: what its filters match goes out as a file, of the person's projects alone."""

import json

import pytest
from django.test import Client

from tests import builders
from tests.trajectories import recordings
from trajectories import export, formats, ingestion, preparing
from trajectories.models import Project, Role, Trajectory

pytestmark = pytest.mark.django_db

URL = "/admin/trajectories/trajectory/"


def record(project: Project, **rewards: float) -> None:
    private = {"metadata": {"private": {"answer": "gold"}}}
    bodies = [recordings.chat(name, reward=reward, **private) for name, reward in rewards.items()]
    recorded = ingestion.record_many(project, [formats.incoming_value(body, "messages") for body in bodies])
    assert all(isinstance(one, preparing.Recorded) for one in recorded), recorded


@pytest.fixture
def project() -> Project:
    return builders.make_project()


@pytest.fixture
def reader(client: Client, project: Project) -> Client:
    client.force_login(builders.make_member(project, Role.READER))
    return client


def ids(client: Client, query: str = "", **form: str) -> list[str]:
    answer = client.post(f"{URL}export/{query}", {"format": "native", **form})
    assert answer.streaming, answer.content
    return [json.loads(line)["trajectory_id"] for line in b"".join(answer).splitlines()]


def test_what_the_filters_of_the_list_match_is_exported_all_pages(reader: Client, project: Project) -> None:
    record(project, **{f"run-{number:02}": number / 100 for number in range(60)})
    Trajectory.objects.filter(trajectory_id="run-07").update(is_excluded=True)
    page = reader.get(f"{URL}?excluded=0&q=run-").content.decode()
    address = f"{URL}export/?excluded=0&amp;q=run-"
    assert f'href="{address}"' in page
    asked = reader.get(address.replace("&amp;", "&")).content.decode()
    assert "59 trajectories match the filters" in asked
    assert ids(reader, "?excluded=0&q=run-") == [f"run-{number:02}" for number in range(60) if number != 7]
    assert ids(reader, "?q=run-5&o=4&p=2") == [f"run-{number}" for number in range(50, 60)]


@pytest.mark.parametrize("name", export.FORMATS)
def test_every_format_is_a_file_without_gold_answers(reader: Client, project: Project, name: str) -> None:
    record(project, one=0.5, two=1.0)
    answer = reader.post(f"{URL}export/", {"format": name})
    assert f'filename="trajectories.{name}.' in answer["Content-Disposition"]
    assert b"gold" not in b"".join(answer)


def test_another_project_s_trajectories_stay_where_they_are(reader: Client, project: Project) -> None:
    record(project, mine=1.0)
    record(builders.make_project(), theirs=1.0)
    assert ids(reader) == ["mine"]
    assert "1 trajectory matches the filters" in reader.get(f"{URL}export/").content.decode()


def test_nonsense_is_said_on_the_page(reader: Client, project: Project) -> None:
    said = reader.post(f"{URL}export/", {"format": "trl-preference", "margin": "-1"}).content.decode()
    assert "argin must be a number from 0 on" in said
    assert '<option value="trl-preference" selected>' in said
    assert "There is no export format" in reader.post(f"{URL}export/", {"format": "csv"}).content.decode()
    assert reader.get(f"{URL}export/?nonsense=1").status_code == 302


def test_nobody_exports_without_signing_in(project: Project) -> None:
    assert Client().post(f"{URL}export/", {"format": "native"}).status_code == 302


def test_a_person_without_a_membership_exports_nothing(client: Client, project: Project) -> None:
    client.force_login(builders.make_user())
    assert client.post(f"{URL}export/", {"format": "native"}).status_code == 403
