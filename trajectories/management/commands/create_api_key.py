"""create_api_key --project SLUG --name NAME: a key of the API, printed once."""

from django.core.management.base import BaseCommand, CommandError, CommandParser

from trajectories import people
from trajectories.errors import Refused
from trajectories.models import Scope


class Command(BaseCommand):
    help = "Make an API key. The last line is the key alone; it is not kept and cannot be shown again."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--project", required=True, metavar="SLUG")
        parser.add_argument("--name", required=True, help="to tell keys apart")
        parser.add_argument("--scopes", default="ingest,read", help=f"of {','.join(Scope.values)}")
        parser.add_argument("--user", default="", metavar="NAME", help="the owner; approving needs one")
        parser.add_argument("--expires-days", type=int, metavar="N", help="without it the key does not expire")
        parser.add_argument(
            "--requests-per-minute",
            type=int,
            metavar="N",
            help="more are answered 429; 0: any number; else the default",
        )

    def handle(
        self,
        *,
        project: str,
        name: str,
        scopes: str,
        user: str,
        expires_days: int | None,
        requests_per_minute: int | None,
        **options: object,
    ) -> None:
        wanted = [scope.strip() for scope in scopes.split(",") if scope.strip()]
        try:
            row, key = people.create_api_key(
                people.project(project),
                name,
                wanted,
                owner=user,
                expires_days=expires_days,
                requests_per_minute=requests_per_minute,
            )
        except Refused as refusal:
            raise CommandError(str(refusal)) from refusal
        until = f"until {row.expires_at:%Y-%m-%d}" if row.expires_at else "until it is revoked"
        self.stdout.write(f"Key {row.name} of {project} for {', '.join(row.scopes)}, good {until}:")
        self.stdout.write(key)
