"""The bar follows the loop and leads only where somebody may go."""

import pytest
from django.contrib import admin
from django.contrib.auth.models import User
from django.test import Client

from tests import builders
from trainingsite import navigation
from trajectories.models import Role

pytestmark = pytest.mark.django_db


def page(client: Client, path: str, user: User) -> str:
    client.force_login(user)
    answer = client.get(path)
    assert answer.status_code == 200
    return answer.content.decode()


def test_the_stages_stand_in_the_order_of_the_loop(client: Client) -> None:
    told = page(client, "/admin/", builders.make_member(builders.make_project("shop"), Role.READER))
    places = [told.index(f">{stage.label}</a>") for stage in navigation.STAGES]
    assert places == sorted(places)


def test_a_list_shows_the_other_lists_of_its_stage_and_itself_as_here(client: Client) -> None:
    user = builders.make_member(builders.make_project("shop"), Role.READER)
    told = page(client, "/admin/trajectories/group/", user)
    assert 'href="/admin/trajectories/group/" class="here" aria-current="page">Groups</a>' in told
    assert ">Judge calls</a>" in told
    assert ">Batches</a>" not in told


def test_a_member_is_not_led_to_users(client: Client) -> None:
    project = builders.make_project("shop")
    told = page(client, "/admin/trajectories/project/", builders.make_member(project, Role.READER))
    assert 'href="/admin/auth/user/"' not in told
    assert ">API keys</a>" in told


def test_who_is_no_member_anywhere_sees_no_stage(client: Client) -> None:
    told = page(client, "/admin/", builders.make_user())
    assert 'id="loop"' not in told


def test_every_noun_has_its_place() -> None:
    named = {name for stage in navigation.STAGES for name in stage.models}
    registered = {model._meta.label_lower for model in admin.site._registry}
    assert named <= registered
    assert {name for name in registered - named if not name.startswith("django_celery_beat.")} == set()


def test_no_page_has_anything_inline(client: Client) -> None:
    user = builders.make_member(builders.make_project("shop"), Role.APPROVER)
    for path in ("/admin/", "/admin/trajectories/trajectory/", "/admin/training/trainingpolicy/"):
        told = page(client, path, user)
        assert " style=" not in told
        assert "<style" not in told
        assert "javascript:" not in told
        assert not [part for part in told.split("<script")[1:] if not part.lstrip().startswith("src=")]
