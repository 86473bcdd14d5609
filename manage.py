#!/usr/bin/env python
"""The site's command line: `manage.py up` brings all of it up on one machine."""

import os
import sys


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "trainingsite.settings")
    if sys.argv[1:] == ["up"]:
        from trainingsite import supervisor  # before Django: its database is yet to be started

        sys.exit(supervisor.main())
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
