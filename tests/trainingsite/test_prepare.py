"""`manage.py prepare`: what a site needs before its first page, and nothing twice."""

import io
import json

import pytest
from django.contrib.auth import authenticate
from django.contrib.auth.models import User
from django.core.management import call_command
from django_celery_beat.models import PeriodicTask

from trajectories.auth import hash_of
from trajectories.models import ApiKey, Membership, Project

pytestmark = pytest.mark.django_db


def prepare() -> dict[str, str]:
    out = io.StringIO()
    call_command("prepare", stdout=out, stderr=io.StringIO())
    shown: dict[str, str] = json.loads(out.getvalue().splitlines()[-1])
    return shown


def test_an_empty_site_gets_two_people_a_project_and_a_key() -> None:
    shown = prepare()

    admin = authenticate(username="admin", password=shown["admin"])
    approver = authenticate(username="approver", password=shown["approver"])
    assert isinstance(admin, User)
    assert isinstance(approver, User)
    assert admin.is_superuser
    assert not approver.is_superuser
    assert Membership.objects.get(user=approver).role == "approver"
    key = ApiKey.objects.get(key_hash=hash_of(shown["key"]))
    assert key.project == Project.objects.get(slug="default")
    assert "approve" not in key.scopes  # it has no owner


def test_a_second_run_shows_and_makes_nothing() -> None:
    first = prepare()

    assert prepare() == {}
    assert User.objects.count() == 2
    assert ApiKey.objects.count() == 1
    assert authenticate(username="admin", password=first["admin"]) is not None


def test_a_site_that_has_people_gets_no_more() -> None:
    User.objects.create_superuser("ada", password="correct horse battery")

    assert prepare() == {}
    assert not Project.objects.exists()


def test_default_schedules_that_are_missing_come_back() -> None:
    names = set(PeriodicTask.objects.values_list("name", flat=True))
    assert names
    PeriodicTask.objects.all().delete()

    prepare()

    assert set(PeriodicTask.objects.values_list("name", flat=True)) == names
