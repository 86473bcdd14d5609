"""up: PostgreSQL, Valkey, the site, its workers and its model server, until Ctrl-C.

manage.py hands `up` to the supervisor before Django is loaded; this is how `help` and `call_command` find it.
"""

import sys

from django.core.management.base import BaseCommand

from trainingsite import supervisor


class Command(BaseCommand):
    help = "Bring the whole site up on this machine. PORT, DATA_DIR, DEMO=0, DATABASE_URL, REDIS_URL are honoured."
    requires_system_checks = ()

    def handle(self, *args: object, **options: object) -> None:
        sys.exit(supervisor.main())
