"""Run the demo: the whole loop in a project of its own, by HTTP against the running site."""

import fcntl
import time
from argparse import ArgumentParser
from dataclasses import replace
from datetime import timedelta
from typing import IO

from django.conf import settings
from django.contrib.auth.models import User
from django.core.management.base import BaseCommand, CommandError
from django.db import transaction
from django.utils import timezone

from training import demo_recipe, policies
from training.demo import Demo
from training.demo_wire import DemoStopped, Site
from trajectories import auth
from trajectories.models import ApiKey, Membership, Project, Role, Scope

SLUG = "demo"
KEYS_LIVE = timedelta(hours=12)


class Command(BaseCommand):
    help = "Play the whole loop in a project `demo` (again: demo-2, …), against the running site."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--url", default=f"http://127.0.0.1:{settings.PORT}", help="the running site")
        parser.add_argument("--model", choices=sorted(demo_recipe.RECIPES), default="tiny", help="the base model")
        parser.add_argument("--approve", action="store_true", help="approve the last version instead of waiting")
        parser.add_argument("--wait", type=float, default=1800.0, help="seconds to wait for your decision at the end")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--versions", type=int, default=0, help="how many GRPO versions; 0: as the recipe has it")

    def handle(
        self, *, url: str, model: str, approve: bool, wait: float, seed: int, versions: int, **options: object
    ) -> None:
        lock = only_one()
        recipe = replace(demo_recipe.RECIPES[model], seed=seed)
        if versions:
            recipe = replace(recipe, versions=versions)
        project = fresh_project(recipe.base_model)
        keys = make_keys(project)
        site = Site(url, agents=keys["agents"], operator=keys["operator"], approver=keys["approver"])
        demo = Demo(site, recipe, self.say, run=f"{project.slug}-{int(time.time()):x}")
        self.say(f"Project {project.slug}, base model {recipe.base_model}: {url}/admin/")
        if model != "tiny":
            self.say("This base is experimental here: docs/demo.md says what was measured with it.")
        try:
            demo.play(approve=approve, wait_seconds=wait, told=lambda: done(lock))
        except DemoStopped as stopped:
            raise CommandError(f"The demo stopped: {stopped}") from stopped
        finally:
            demo.close()
            site.close()
            ApiKey.objects.filter(project=project, revoked_at=None, name__startswith="demo ").update(
                revoked_at=timezone.now()
            )

    def say(self, line: str) -> None:
        self.stdout.write(line)
        self.stdout.flush()


def only_one() -> IO[str]:
    """Hold the demo's lock until this process ends, however it ends.

    Raises:
        CommandError: another demo plays on this machine's data folder.
    """
    settings.DATA_DIR.mkdir(parents=True, exist_ok=True)
    lock = (settings.DATA_DIR / "demo-lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise CommandError(
            "A demo plays already. Two at once would share two cores and learn nothing faster."
        ) from None
    return lock


def done(lock: IO[str]) -> None:
    """Let the next demo begin, and tell `manage.py up` that it need not by itself: what is left waits for a person."""
    lock.close()
    if settings.DATA_DIR.is_dir():
        (settings.DATA_DIR / "demo-done").touch()


@transaction.atomic
def fresh_project(base_model: str) -> Project:
    """A project that nobody has used: demo, else demo-2, demo-3, …; everyone who decides elsewhere may here too."""
    taken = set(Project.objects.filter(slug__startswith=SLUG).values_list("slug", flat=True))
    slug = SLUG if SLUG not in taken else next(f"{SLUG}-{n}" for n in range(2, 10_000) if f"{SLUG}-{n}" not in taken)
    project = Project.objects.create(slug=slug, name="Demo", description="Agents trade on headlines: BUY or SELL.")
    policy = policies.of(project)
    policy.base_model = base_model
    policy.auto_trigger = False  # the demo asks for each batch itself
    policy.min_trajectories = 500
    policy.rule_judges = []
    policy.gate_attempts = 4
    policy.save()
    for user in User.objects.filter(is_active=True, memberships__isnull=False).distinct():
        for role in set(user.memberships.values_list("role", flat=True)):
            Membership.objects.get_or_create(project=project, user=user, role=role)
    return project


def make_keys(project: Project) -> dict[str, str]:
    """Keys for agents, a requester, and a second person: two accounts that cannot sign in."""
    until = timezone.now() + KEYS_LIVE
    people = {}
    for name, role in (("demo-operator", Role.OPERATOR), ("demo-approver", Role.APPROVER)):
        user, made = User.objects.get_or_create(username=name, defaults={"is_staff": False})
        if made:
            user.set_unusable_password()
            user.save()
        Membership.objects.get_or_create(project=project, user=user, role=role)
        people[name] = user
    agents = auth.make_key(project, "demo agents", (Scope.INGEST, Scope.READ), expires_at=until)
    operator = auth.make_key(
        project, "demo operator", (Scope.READ, Scope.OPERATE), owner=people["demo-operator"], expires_at=until
    )
    approver = auth.make_key(
        project, "demo approver", (Scope.READ, Scope.APPROVE), owner=people["demo-approver"], expires_at=until
    )
    return {"agents": agents[1], "operator": operator[1], "approver": approver[1]}
