"""create_project, create_user, create_api_key: what a new site's owner types first."""

import io

import pytest
from django.contrib.auth import authenticate
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command

from trajectories import people
from trajectories.auth import hash_of
from trajectories.models import ApiKey, Membership, Project, Role

pytestmark = pytest.mark.django_db


def typed(*words: str) -> list[str]:
    """The lines that a command prints."""
    out = io.StringIO()
    call_command(*words, stdout=out)
    return out.getvalue().splitlines()


def test_a_new_project_is_empty_and_has_its_own_salts() -> None:
    typed("create_project", "one")
    typed("create_project", "two", "--name", "The second")

    one, two = Project.objects.get(slug="one"), Project.objects.get(slug="two")
    assert two.name == "The second"
    assert one.split_salt != two.split_salt
    assert bytes(one.hash_key) != bytes(two.hash_key)


@pytest.mark.parametrize("slug", ["no spaces", "", "x" * 61, "a\x00b", "../up"])
def test_what_is_no_slug_is_refused(slug: str) -> None:
    with pytest.raises(CommandError, match="cannot be a project's slug"):
        typed("create_project", slug)


def test_a_project_that_exists_is_left_as_it_is() -> None:
    typed("create_project", "one")
    with pytest.raises(CommandError, match="'one' already"):
        typed("create_project", "one")


def test_the_key_stands_alone_on_the_last_line_and_only_its_hash_is_kept() -> None:
    typed("create_project", "one")

    key = typed("create_api_key", "--project", "one", "--name", "bot", "--scopes", "ingest,operate")[-1]

    row = ApiKey.objects.get(key_hash=hash_of(key))
    assert (row.project.slug, row.name, row.scopes) == ("one", "bot", ["ingest", "operate"])
    assert key not in str(ApiKey.objects.values().get())


def test_a_key_that_approves_has_an_owner() -> None:
    project = people.create_project("one")
    people.create_user("ada", project, Role.APPROVER, None)

    with pytest.raises(CommandError, match="needs an owner"):
        typed("create_api_key", "--project", "one", "--name", "k", "--scopes", "approve")
    with pytest.raises(CommandError, match="no user 'bob'"):
        typed("create_api_key", "--project", "one", "--name", "k", "--scopes", "approve", "--user", "bob")
    key = typed("create_api_key", "--project", "one", "--name", "k", "--scopes", "read,approve", "--user", "ada")[-1]

    owner = ApiKey.objects.get(key_hash=hash_of(key)).owner
    assert owner is not None
    assert owner.username == "ada"


def test_a_key_expires_when_told() -> None:
    project = people.create_project("one")
    row, _ = people.create_api_key(project, "k", ["read"], expires_days=2)
    assert row.expires_at is not None
    assert row.is_live()
    assert not row.is_live(row.expires_at)
    with pytest.raises(CommandError, match="0 days"):
        typed("create_api_key", "--project", "one", "--name", "k", "--expires-days", "0")


@pytest.mark.parametrize("scopes", ["everything", ",", "read,approve-all"])
def test_unknown_scopes_are_refused(scopes: str) -> None:
    people.create_project("one")
    with pytest.raises(CommandError, match="is not a scope"):
        typed("create_api_key", "--project", "one", "--name", "k", "--scopes", scopes)


def test_a_key_needs_a_project_that_is_there() -> None:
    with pytest.raises(CommandError, match="no project 'none'"):
        typed("create_api_key", "--project", "none", "--name", "k")


def test_a_user_signs_in_with_the_password_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    people.create_project("one")
    monkeypatch.setenv("ADAS", "correct horse battery")

    typed("create_user", "ada", "--project", "one", "--role", "operator", "--password-env", "ADAS")

    user = authenticate(username="ada", password="correct horse battery")
    assert isinstance(user, User)
    assert user.is_staff
    assert not user.is_superuser
    assert list(Membership.objects.values_list("user__username", "role")) == [("ada", "operator")]


def test_a_user_may_hold_several_roles_and_keeps_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    project = people.create_project("one")
    people.create_user("ada", project, Role.OPERATOR, "correct horse battery")

    people.create_user("ada", project, Role.APPROVER, None)
    people.create_user("ada", project, Role.APPROVER, "correct horse battery")  # a second run changes nothing

    assert sorted(Membership.objects.values_list("role", flat=True)) == ["approver", "operator"]
    monkeypatch.setenv("ADAS", "another long password")
    with pytest.raises(CommandError, match="another password"):
        typed("create_user", "ada", "--project", "one", "--role", "reader", "--password-env", "ADAS")
    assert authenticate(username="ada", password="correct horse battery") is not None


def test_a_weak_or_missing_password_makes_no_user(monkeypatch: pytest.MonkeyPatch) -> None:
    people.create_project("one")
    monkeypatch.setenv("WEAK", "password")
    with pytest.raises(CommandError, match="will not do"):
        typed("create_user", "ada", "--project", "one", "--role", "reader", "--password-env", "WEAK")
    with pytest.raises(CommandError, match="MISSING is not set"):
        typed("create_user", "ada", "--project", "one", "--role", "reader", "--password-env", "MISSING")
    assert not User.objects.exists()
