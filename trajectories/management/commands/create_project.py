"""create_project SLUG: a new, empty project."""

from django.core.management.base import BaseCommand, CommandError, CommandParser

from trajectories import people
from trajectories.errors import Refused


class Command(BaseCommand):
    help = "Make a new, empty project."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("slug")
        parser.add_argument("--name", default="", help="shown in place of the slug")

    def handle(self, *, slug: str, name: str, **options: object) -> None:
        try:
            project = people.create_project(slug, name)
        except Refused as refusal:
            raise CommandError(str(refusal)) from refusal
        self.stdout.write(f"Project {project.slug} is there.")
