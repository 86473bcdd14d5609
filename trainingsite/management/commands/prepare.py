"""prepare: migrations that are due and, on an empty site, its first accounts. Safe to run at any time.

The last line is one JSON object: what is to be shown once, empty when nothing was made.
"""

import json
import secrets

from django.conf import settings
from django.contrib.auth.models import User
from django.core.management import call_command
from django.core.management.base import BaseCommand
from django.db import connection, transaction

from trajectories import people
from trajectories.models import Project, Role, Scope

LOCK = 7_201_942  # of PostgreSQL's advisory locks: two sites on one database prepare it one after the other


class Command(BaseCommand):
    help = "Run the migrations that are due and make the first accounts of an empty site."

    def handle(self, *args: object, **options: object) -> None:
        settings.STATIC_ROOT.mkdir(parents=True, exist_ok=True)  # whitenoise warns at every start without it
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(%s)", [LOCK])
        try:
            # Also when none is due (0.1 s): it puts in the default schedules that a new release brings.
            call_command("migrate", interactive=False, stdout=self.stderr)
            shown = {} if User.objects.exists() else first_accounts()
        finally:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_advisory_unlock(%s)", [LOCK])
        self.stdout.write(json.dumps(shown))


@transaction.atomic
def first_accounts() -> dict[str, str]:
    """The project `default`, an admin, an approver, and a key; the passwords and the key in the clear."""
    shown = {"admin": secrets.token_urlsafe(12), "approver": secrets.token_urlsafe(12)}
    project = Project.objects.filter(slug="default").first() or people.create_project("default")
    User.objects.create_superuser("admin", password=shown["admin"])
    people.create_user("approver", project, Role.APPROVER, shown["approver"])
    scopes = [Scope.INGEST, Scope.READ, Scope.OPERATE]
    _, shown["key"] = people.create_api_key(project, "first start", scopes)
    return shown
