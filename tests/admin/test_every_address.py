"""Every address that an admin has beside Django's own, asked by people who have nothing to look for there."""

from collections.abc import Iterator

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import URLPattern

from tests import builders
from tests.admin.test_walk_admin import address, furnish, nouns, rows_of
from trajectories.models import Project, Role

pytestmark = pytest.mark.django_db


def sign_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def own_addresses(project: Project) -> Iterator[str]:
    """Each custom route of each noun that names a row, with the row's number in every place that wants one."""
    for model, model_admin in nouns():
        pk = str(rows_of(model, model_admin, project)[0].pk)
        for pattern in model_admin.get_urls():
            route = str(pattern.pattern)
            if not isinstance(pattern, URLPattern) or "<" not in route:
                continue
            names = [part.partition(">")[0] for part in route.split("<")[1:]]
            for name in names:
                route = route.replace(f"<{name}>", pk)
            yield address(model) + route


def test_there_are_some(project: Project) -> None:
    found = list(own_addresses(project))
    assert any("/live/" in one for one in found)
    assert any("/blob/" in one for one in found)


@pytest.fixture
def project() -> Project:
    project = builders.make_project()
    furnish(project)
    return project


@pytest.mark.parametrize("method", ["get", "post"])
def test_another_project_s_members_find_nothing_at_any_of_them(project: Project, method: str) -> None:
    client = sign_in(builders.make_member(builders.make_project(), Role.OPERATOR))
    for one in own_addresses(project):
        answer = getattr(client, method)(one)
        assert answer.status_code in (302, 403, 404), one
        if answer.status_code == 302:
            assert answer.headers["Location"].startswith(("/admin/", "../")), one


@pytest.mark.parametrize("method", ["get", "post"])
def test_who_has_not_signed_in_is_sent_to_do_so(project: Project, method: str) -> None:
    for one in own_addresses(project):
        answer = getattr(Client(), method)(one)
        assert answer.status_code == 302, one
        assert answer.headers["Location"].startswith("/admin/login/"), one


def test_a_number_that_is_none_is_not_found(project: Project) -> None:
    client = sign_in(builders.make_member(project, Role.OPERATOR))
    for model, model_admin in nouns():
        pk = str(rows_of(model, model_admin, project)[0].pk)
        for one in own_addresses(project):
            if not one.startswith(address(model)):
                continue
            for wrong in ("99999999999999999999999", "-1", "%00", "%F0%9F%92%A9"):
                asked = one.replace(f"/{pk}/", f"/{wrong}/", 1)
                assert client.get(asked).status_code in (302, 400, 403, 404), asked
