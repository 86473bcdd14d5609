"""Take in what the gateway's spool set aside, after its cause was mended (a rule, a limit, a full disk).

Says what became of each record. It may run beside the gateway, be killed and be repeated; what still cannot be taken in
stays where it is, with the reason of now.
"""

from pathlib import Path

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from gateway import set_aside, spool


class Command(BaseCommand):
    help = __doc__ or ""

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="of set-aside/; else all of them")
        parser.add_argument("--list", action="store_true", help="say what lies there and why, change nothing")

    def handle(self, *, files: list[Path], list: bool, **options: object) -> None:
        chosen = files or spool.aside(settings.GATEWAY_SPOOL_DIR)
        if not chosen:
            self.stdout.write(f"Nothing is set aside in {settings.GATEWAY_SPOOL_DIR}.")
        if list:
            for path in chosen:
                self.stdout.write(f"{path}: {reason(path)}")
            return
        left = 0
        for one in set_aside.retry(chosen):
            left += not one.taken
            self.stdout.write(f"{'taken in' if one.taken else 'still set aside'}  {one.path}: {one.said}")
        if left:
            raise CommandError(f"{left} of {len(chosen)} could not be taken in.")


def reason(path: Path) -> str:
    try:
        return path.with_suffix(".why").read_text().strip()
    except OSError:
        return "no reason is kept beside it"
