"""`manage.py archive`: payloads to the archive storage and back."""

from datetime import timedelta
from io import StringIO

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from tests import builders
from trajectories.models import Project, StateChange, Trajectory

pytestmark = pytest.mark.django_db


@pytest.fixture
def project() -> Project:
    return builders.make_project("shop")


def run(*words: str) -> str:
    out = StringIO()
    call_command("archive", "--project", "shop", *words, stdout=out, stderr=out)
    return out.getvalue()


def archived() -> int:
    return Trajectory.objects.filter(archived_at__isnull=False).count()


def test_old_ones_go_and_come_back(project: Project) -> None:
    old, new = builders.make_trajectory(project), builders.make_trajectory(project)
    Trajectory.objects.filter(pk=old.pk).update(received_at=timezone.now() - timedelta(days=40))
    assert "1 would be archived" in run("--older-than", "30", "--dry-run")
    assert archived() == 0
    assert "1 archived, 0 refused" in run("--older-than", "30", "--reason", "disk")
    assert Trajectory.objects.get(archived_at__isnull=False).pk == old.pk
    assert StateChange.objects.get(object_id=old.pk, field="archived_at").reason == "disk"
    assert "0 archived" in run("--older-than", "30")
    assert "1 restored" in run("--all", "--restore")
    assert archived() == 0
    assert new.pk


def test_what_is_meant_has_to_be_said(project: Project) -> None:
    builders.make_trajectory(project)
    with pytest.raises(CommandError, match="Say which"):
        run()
    with pytest.raises(CommandError, match="no project"):
        call_command("archive", "--project", "nowhere", "--all")
    with pytest.raises(CommandError, match="colour"):
        run("--filter", "colour=red")
    assert archived() == 0


def test_filters_are_those_of_the_list(project: Project) -> None:
    builders.make_trajectory(project, reward=0.0)
    builders.make_trajectory(project, reward=1.0)
    assert "1 archived" in run("--filter", "reward_min=0.5")


def test_running_ones_stay(project: Project) -> None:
    builders.make_trajectory(project, state="open")
    assert "0 archived" in run("--all")


def test_what_a_live_version_learned_from_stays_unless_told(project: Project) -> None:
    group = builders.make_group(project, (0.0, 1.0))
    batch = builders.make_batch(project, status="completed", groups=(group,))
    builders.make_model(project, batch=batch, status="deployed")
    told = run("--all")
    assert "0 archived, 2 refused" in told
    assert "2 × v" in told
    assert "learned from it" in told
    assert "2 archived" in run("--all", "--even-if-needed")
    group.refresh_from_db()
    assert group.n == 0  # archived attempts do not count, as the pages say
