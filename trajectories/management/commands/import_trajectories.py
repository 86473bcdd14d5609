"""Import files of recordings, recognised by what is in them. May be repeated: what is there already is a replay."""

import sys
import time
from pathlib import Path

from django.core.management.base import BaseCommand, CommandError, CommandParser, OutputWrapper

from trajectories import formats, importing, indexing
from trajectories.errors import Invalid
from trajectories.models import Project

EVERY = 5.0  # seconds between two lines of progress; a terminal's line is rewritten more often
EVERY_ON_TERMINAL = 0.2


class Command(BaseCommand):
    help = __doc__ or ""

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files, or folders of them")
        parser.add_argument("--project", default="default", metavar="SLUG")
        parser.add_argument(
            "--format", default=None, metavar="FORMAT", help=f"recognised unless given: {', '.join(formats.NAMES)}"
        )
        parser.add_argument("--json", action="store_true", help="end with one line of JSON")

    def handle(self, *args: object, **options: object) -> None:
        paths, slug, name = options["paths"], options["project"], options["format"]
        assert isinstance(paths, list)
        project = Project.objects.filter(slug=str(slug)).first()
        if project is None:
            raise CommandError(f"There is no project {slug!r}. Make it with create_project {slug}.")
        try:
            wanted = formats.check_name(str(name)) if name else None
        except Invalid as problem:
            raise CommandError(problem.detail) from None
        report = importing.Report()
        progress = Progress(self.stderr)
        for path in importing.found(paths):
            before = (report.trajectories, report.replayed, report.failed)
            if path.exists():
                progress.path = path
                importing.load(project, path, report, wanted, progress)
            else:
                report.files += 1
                report.failed += 1
                report.errors.append(importing.Failure(str(path), None, "There is no such file."))
            new, replayed, failed = (
                now - was
                for now, was in zip((report.trajectories, report.replayed, report.failed), before, strict=True)
            )
            progress.clear()
            self.stderr.write(f"{path}: {new} new, {replayed} there already, {failed} failed")
        indexing.drain(project)
        if options["json"]:
            self.stdout.write(importing.last_line(report))
        else:
            for one in report.errors:
                place = "" if one.item is None else f" item {one.item}"
                self.stderr.write(f"{one.file}{place}: {one.detail}")
            self.stdout.write(
                f"{report.trajectories} new trajectories with {report.llm_calls} LLM calls and {report.tool_calls} "
                f"tool calls, {report.replayed} there already, {report.failed} failed, of {report.files} files"
            )
        if report.failed:
            sys.exit(1)


class Progress:
    """How far a long file is: one line that is rewritten on a terminal, else a line every few seconds."""

    def __init__(self, out: OutputWrapper) -> None:
        self.out = out
        self.on_terminal = out.isatty()
        self.path = Path()
        self.shown = time.monotonic()

    def __call__(self, report: importing.Report) -> None:
        now = time.monotonic()
        if now - self.shown < (EVERY_ON_TERMINAL if self.on_terminal else EVERY):
            return
        self.shown = now
        line = f"{self.path.name}: {report.trajectories} new, {report.replayed} there already, {report.failed} failed"
        self.out.write(
            f"\r\x1b[2K{line} …" if self.on_terminal else f"{line}, going on", ending="" if self.on_terminal else "\n"
        )
        self.out.flush()

    def clear(self) -> None:
        if self.on_terminal:
            self.out.write("\r\x1b[2K", ending="")
