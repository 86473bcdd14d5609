"""Make call rows, search texts and group counters anew from the recordings."""

from django.core.management.base import BaseCommand, CommandError, CommandParser

from trajectories import indexing
from trajectories.models import Project


class Command(BaseCommand):
    help = __doc__ or ""

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--project", metavar="SLUG", help="all projects unless given")

    def handle(self, *args: object, **options: object) -> None:
        slug = options["project"]
        projects = Project.objects.filter(slug=str(slug)) if slug else Project.objects.all()
        if slug and not projects:
            raise CommandError(f"There is no project {slug!r}.")
        for project in projects:
            count = indexing.reindex(project)
            indexing.drain(project)
            self.stdout.write(f"{project}: {count} trajectories indexed.")
