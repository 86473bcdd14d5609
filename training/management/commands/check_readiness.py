"""check_readiness [--project SLUG]: is it ready to train, and if not, why and when? Exit 0 when ready, else 1."""

import json
import sys

from django.core.management.base import BaseCommand, CommandError, CommandParser

from training import readiness
from training.models import Mode
from trajectories import people
from trajectories.errors import Refused


class Command(BaseCommand):
    help = "Say whether a project is ready to train, and if not, why and when."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--project", default="default")
        parser.add_argument("--mode", choices=Mode.values, help="the policy's unless given")
        parser.add_argument("--json", action="store_true", help="the body of GET /api/v1/readiness/")

    def handle(self, *, project: str, mode: str | None, json: bool, **options: object) -> None:
        try:
            found = readiness.check(people.project(project), Mode(mode) if mode else None)
        except Refused as refusal:
            raise CommandError(str(refusal)) from refusal
        if json:
            self.stdout.write(as_json(found))
        else:
            self.stdout.write(found.reason)
            for check in found.checks:
                self.stdout.write(f"  {'ok     ' if check.ok else 'missing'} {check.detail}")
            if found.forecast:
                self.stdout.write(f"  at this rate on {found.forecast:%Y-%m-%d %H:%M} UTC")
        if not found.ready:
            sys.exit(1)


def as_json(found: readiness.Readiness) -> str:
    return json.dumps(found.body(), indent=2)
