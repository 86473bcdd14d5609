"""A site of its own for a benchmark: PostgreSQL and a broker as `make run` has them, and Django in this process."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trainingsite.embedded import Postgres, Valkey

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def site(name: str) -> Iterator[None]:
    """Its database is `BENCHMARK_DATABASE_URL` too, for a floor that asks it past Django."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{name}-")))
        postgres, valkey = Postgres(folder / "postgres", folder), Valkey(folder / "valkey", folder)
        stack.callback(postgres.stop)
        stack.callback(valkey.stop)
        os.environ |= {
            "DATABASE_URL": postgres.start(),
            "REDIS_URL": valkey.start(),
            "DATA_DIR": str(folder / "data"),
            "SECRET_KEY": "for-the-benchmark",
            "LOG_LEVEL": "ERROR",
            "DJANGO_SETTINGS_MODULE": "trainingsite.settings",
        }
        os.environ["BENCHMARK_DATABASE_URL"] = os.environ["DATABASE_URL"]
        subprocess.run([sys.executable, "manage.py", "prepare"], check=True, capture_output=True, cwd=ROOT)
        import django

        django.setup()
        yield
