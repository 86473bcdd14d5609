"""create_user NAME --project SLUG --role ROLE: a person in a project."""

import getpass
import os
import sys

from django.contrib.auth.models import User
from django.core.management.base import BaseCommand, CommandError, CommandParser

from trajectories import people
from trajectories.errors import Refused
from trajectories.models import Role


class Command(BaseCommand):
    help = "Make a user with a role in a project, or give one who exists another role."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name")
        parser.add_argument("--project", required=True, metavar="SLUG")
        parser.add_argument("--role", required=True, choices=Role.values)
        parser.add_argument(
            "--password-env", metavar="VAR", help="read the password from this variable, not the terminal"
        )

    def handle(self, *, name: str, project: str, role: str, password_env: str | None, **options: object) -> None:
        password: str | None = None
        if password_env is not None:
            password = os.environ.get(password_env, "")
            if not password:
                raise CommandError(f"{password_env} is not set. It should hold the password.")
        elif sys.stdin.isatty() and not User.objects.filter(username=name).exists():
            password = getpass.getpass(f"Password for {name} (empty: none, the user only owns keys): ") or None
        try:
            user = people.create_user(name, people.project(project), role, password)
        except Refused as refusal:
            raise CommandError(str(refusal)) from refusal
        self.stdout.write(f"{user} is {role} of {project}.")
        if not user.has_usable_password():
            self.stdout.write(f"{user} has no password yet. Set one with `manage.py changepassword {user}`.")
