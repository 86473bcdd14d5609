"""Write a project's trajectories as lines of native JSON, oldest first."""

import sys

from django.core.management.base import BaseCommand, CommandError, CommandParser

from trajectories import export
from trajectories.models import Project, Trajectory


class Command(BaseCommand):
    help = __doc__ or ""

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--project", default="default", metavar="SLUG")
        parser.add_argument("--format", choices=export.FORMATS, default="native")
        parser.add_argument("--output", default="-", metavar="FILE", help="a file, or - for standard output")

    def handle(self, *args: object, **options: object) -> None:
        project = Project.objects.filter(slug=str(options["project"])).first()
        if project is None:
            raise CommandError(f"There is no project {options['project']!r}.")
        lines = export.lines(Trajectory.objects.filter(project=project))
        if options["output"] == "-":
            for line in lines:
                sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            return
        with open(str(options["output"]), "wb") as out:  # noqa: PTH123  # a name given on the command line
            for line in lines:
                out.write(line)
