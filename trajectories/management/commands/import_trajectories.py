"""Import files of recordings, recognised by what is in them. May be repeated: what is there already is a replay."""

import sys
from pathlib import Path

from django.core.management.base import BaseCommand, CommandError, CommandParser

from trajectories import importing, indexing
from trajectories.models import Project


class Command(BaseCommand):
    help = __doc__ or ""

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files, or folders of them")
        parser.add_argument("--project", default="default", metavar="SLUG")
        parser.add_argument("--format", choices=importing.NAMES, default=None, help="recognised unless given")
        parser.add_argument("--json", action="store_true", help="end with one line of JSON")

    def handle(self, *args: object, **options: object) -> None:
        paths, slug, name = options["paths"], options["project"], options["format"]
        assert isinstance(paths, list)
        project = Project.objects.filter(slug=str(slug)).first()
        if project is None:
            raise CommandError(f"There is no project {slug!r}. Make it with create_project {slug}.")
        report = importing.Report()
        for path in importing.files(paths):
            before = (report.trajectories, report.replayed, report.failed)
            if path.exists():
                importing.load(project, path, report, str(name) if name else None)
            else:
                report.failed += 1
                report.errors.append(importing.Failure(str(path), None, "There is no such file."))
            new, replayed, failed = (
                now - was
                for now, was in zip((report.trajectories, report.replayed, report.failed), before, strict=True)
            )
            self.stderr.write(f"{path}: {new} new, {replayed} there already, {failed} failed")
        indexing.drain(project)
        if options["json"]:
            self.stdout.write(importing.last_line(report))
        else:
            for error in report.errors[:50]:
                self.stderr.write(f"{error.file} {'' if error.item is None else error.item}: {error.detail}")
            self.stdout.write(
                f"{report.files} files: {report.trajectories} trajectories with {report.llm_calls} calls, "
                f"{report.replayed} there already, {report.failed} failed."
            )
        if report.failed:
            sys.exit(1)
