"""`manage.py up`: the whole site on one machine, and nothing of it left when it ends.

    PostgreSQL, Valkey → migrations, first accounts → site → model server, gateway, worker, beat → the demo, once

Each part runs in its own session, so Ctrl-C reaches the supervisor alone, which ends them in order. A part that
dies is started again, after a pause that doubles, and the console says so. When the supervisor is killed the
kernel ends its children (leash.py), a last will their children (last_will.py), and the next start what is left.

No Django here beyond the reading of the environment: the database that Django's settings need is started first.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

from trainingsite import children, embedded
from trainingsite.embedded import CannotStart

BASE_DIR = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
MARK = "TRAININGSITE_UP"  # in the environment of every child and theirs; its value names the data folder

FIRST_PAUSE = 0.5  # seconds before a part that died is started again; doubles up to LONGEST_PAUSE
LONGEST_PAUSE = 30.0
STEADY = 60.0  # seconds after which a part counts as running well, and its next pause is the first one again
READY_SECONDS = 60.0

# What a start needs, by module and by the name under which it is installed.
PACKAGES = {
    "django": "Django",
    "rest_framework": "djangorestframework",
    "drf_spectacular": "drf-spectacular",
    "django_celery_beat": "django-celery-beat",
    "django_htmx": "django-htmx",
    "django_stubs_ext": "django-stubs-ext",
    "whitenoise": "whitenoise",
    "celery": "celery",
    "redis": "redis",
    "psycopg": "psycopg[binary]",
    "msgspec": "msgspec",
    "zstandard": "zstandard",
    "httpx": "httpx",
    "granian": "granian",
    "uvicorn": "uvicorn",
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
}


class StopAsked(BaseException):
    """Ctrl-C, SIGTERM or a closed terminal. Not an Exception, so that nothing on the way takes it for a failure."""


@dataclass(frozen=True)
class Wishes:
    """What the environment asks for."""

    port: int
    data_dir: Path
    demo: bool
    database_url: str  # empty: our own PostgreSQL
    redis_url: str  # empty: our own Valkey
    model_server_url: str  # empty: our own small one
    gateway_port: int

    @property
    def address(self) -> str:
        return f"http://localhost:{self.port}"

    @property
    def mark(self) -> str:
        return f"{MARK}={hashlib.sha256(os.fsencode(self.data_dir)).hexdigest()[:16]}"


class Part(Protocol):
    """Something that is kept running."""

    @property
    def name(self) -> str: ...
    def start(self) -> None: ...
    def ended(self) -> str:
        """How it ended; empty while it runs."""

    def stop(self) -> None: ...


@dataclass
class Program:
    """A part that is one command; what it says goes to its log."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    log: Path
    # (signal, seconds to wait), until it has ended
    farewell: tuple[tuple[int, float], ...] = ((signal.SIGTERM, 5.0), (signal.SIGKILL, 2.0))
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        embedded.keep_short(self.log)
        with self.log.open("ab") as log:
            self.process = children.spawn(self.command, env=self.environment, cwd=BASE_DIR, output=log)

    def ended(self) -> str:
        return "" if self.process is None else _how(self.process)

    def ask_to_end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(self.farewell[0][0])

    def stop(self) -> None:
        """Wait for the end that was asked for, then insist."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(self.farewell[0][1])
            children.end_child(self.process, self.farewell[1:])


@dataclass
class Service:
    """PostgreSQL or Valkey as a part."""

    name: str
    server: embedded.Postgres | embedded.Valkey

    def start(self) -> None:
        self.server.start()

    def ended(self) -> str:
        return "" if self.server.process is None else _how(self.server.process)

    def stop(self) -> None:
        self.server.stop()


@dataclass
class Kept:
    """A part and what became of it so far."""

    part: Part
    since: float = field(default_factory=time.monotonic)
    pause: float = FIRST_PAUSE
    again_at: float | None = None  # when to start it again; None while it runs


def main() -> int:
    """Run until told to stop. Returns the exit status: 0 after an ordered stop, 1 with a sentence."""
    if sys.platform not in ("linux", "darwin"):
        return _complain(f"`manage.py up` runs on Linux and macOS, not on {sys.platform}.")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ask_to_stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # `nohup` means it
        signal.signal(signal.SIGHUP, _ask_to_stop)
    try:
        _refuse_missing_packages()
        wishes = read_wishes()
        with _alone_on(wishes):
            _end_leftovers(wishes)
            _refuse_taken_port(wishes.port)
            _refuse_taken_port(wishes.gateway_port, "GATEWAY_PORT")
            Supervisor(wishes).run()
    except CannotStart as exc:
        return _complain(str(exc))
    except StopAsked:
        return 0
    return 0


def read_wishes() -> Wishes:
    """The environment, read strictly.

    Raises:
        CannotStart: a variable does not mean anything.
    """
    from django.core.exceptions import ImproperlyConfigured

    from trainingsite.environment import Environment

    env = Environment()
    try:
        port = env.integer("PORT", 8000, at_least=1, at_most=65535)
        return Wishes(
            port=port,
            data_dir=env.path("DATA_DIR", BASE_DIR / "var"),
            demo=env.flag("DEMO", default=True),
            database_url=env.text("DATABASE_URL"),
            redis_url=env.text("REDIS_URL"),
            model_server_url=env.text("MODEL_SERVER_URL"),
            gateway_port=env.integer("GATEWAY_PORT", min(port + 1, 65535), at_least=1, at_most=65535),
        )
    except ImproperlyConfigured as exc:
        raise CannotStart(str(exc)) from exc


class Supervisor:
    """Starts the parts, keeps them running, ends them."""

    def __init__(self, wishes: Wishes) -> None:
        self.wishes = wishes
        self.logs = wishes.data_dir / "log"
        self.kept: list[Kept] = []
        self.environment = {
            **os.environ,
            **dict([wishes.mark.split("=")]),
            "DATA_DIR": str(wishes.data_dir),
            "PORT": str(wishes.port),
            "GATEWAY_PORT": str(wishes.gateway_port),
            "DJANGO_SETTINGS_MODULE": "trainingsite.settings",
            "PYTHONUNBUFFERED": "1",
        }
        # Torch's threads would otherwise spin while they wait, on cores that the site needs.
        self.environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self.logs_at = 0.0  # when to look at their sizes next
        self.demo: subprocess.Popen[bytes] | None = None
        self.will: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Until a signal comes.

        Raises:
            CannotStart: what the start needs is not there; all that was started has been ended.
            StopAsked: after the ordered end.
        """
        began = time.monotonic()
        try:
            self._leave_a_will()
            self._start_services()
            if self._is_prepared():
                self._start_site()
                self._wait_until_ready()
                self._show_once(self._prepare())
            else:
                self._show_once(self._prepare())
                self._start_site()
                self._wait_until_ready()  # before the others: three starts at once on two cores take thrice as long
            self._start_the_rest()
            self._greet(time.monotonic() - began)
            self._start_demo()
            while True:
                self._look_after()
                self._keep_logs_short()
                time.sleep(0.2)
        except StopAsked as asked:
            _say(f"{asked}. Ending …")
            raise
        finally:
            # A second Ctrl-C does not leave anything running: it shortens nothing, the end takes seconds.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            self._stop()

    def _keep(self, part: Part) -> None:
        self.kept.append(Kept(part))
        part.start()

    def _start_services(self) -> None:
        wishes, data = self.wishes, self.wishes.data_dir
        runtime = embedded.runtime_folder(data)
        if not wishes.database_url:
            postgres = embedded.Postgres(data / "postgres", runtime)
            if not postgres.cluster.exists():
                _say("Making a PostgreSQL database …")
            self._keep(Service("PostgreSQL", postgres))
            self.environment["DATABASE_URL"] = postgres.url()
        if not wishes.redis_url:
            valkey = embedded.Valkey(data / "valkey", runtime)
            self._keep(Service("Valkey", valkey))
            self.environment["REDIS_URL"] = valkey.url()

    def _is_prepared(self) -> bool:
        """Whether our own database was last prepared by this very code: then the site need not wait for it."""
        mark = self.wishes.data_dir / "postgres" / "prepared"
        return not self.wishes.database_url and mark.exists() and mark.read_text() == _schema()

    def _prepare(self) -> dict[str, str]:
        """Migrations where there are any to run, and the first accounts.

        Returns:
            What is to be shown once: passwords and a key on a first start, nothing later.
        """
        if not (self.wishes.data_dir / "secret-key").exists():
            children.write_private(self.wishes.data_dir / "secret-key", secrets.token_urlsafe(48))
        log = self.logs / "prepare.log"
        with log.open("ab") as errors:
            process = children.spawn(
                [sys.executable, "manage.py", "prepare"],
                env=self.environment, cwd=BASE_DIR, output=subprocess.PIPE, errors=errors,
            )  # fmt: skip
            out, _ = process.communicate()
        last = out.decode(errors="replace").strip().rpartition("\n")[2]
        if process.returncode:
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise CannotStart(
                f"The database could not be prepared: {said[-1] if said else last} The story is in {log}."
            )
        if not self.wishes.database_url:
            children.write_private(self.wishes.data_dir / "postgres" / "prepared", _schema())
        found = json.loads(last)
        return {str(name): str(value) for name, value in found.items()}

    def _start_site(self) -> None:
        wishes, python = self.wishes, sys.executable
        if not wishes.model_server_url:
            port = _free_port(wishes.data_dir / "model-server-port")
            self.environment["MODEL_SERVER_URL"] = f"http://{HOST}:{port}"
            # Agents on this machine may sample; what is served is changed by the site alone.
            self.environment["MODEL_SERVER_API_KEY"] = _kept_key(wishes.data_dir / "model-server-key")
        self.environment.setdefault("GATEWAY_URL", f"http://{HOST}:{wishes.gateway_port}")
        self._write_addresses()
        site = [
            python, "-m", "granian", "--interface", "wsgi", "trainingsite.wsgi:application", "--host", HOST,
            "--port", str(wishes.port), "--workers", "2", "--blocking-threads", "16", "--no-ws",
            "--respawn-failed-workers", "--respawn-interval", "0.5", "--workers-kill-timeout", "4",
            "--log-level", "warning",
        ]  # fmt: skip
        self._keep(Program("site", site, dict(self.environment), self.logs / "site.log"))

    def _start_the_rest(self) -> None:
        python, environment = sys.executable, dict(self.environment)
        celery = [python, "-m", "celery", "--app", "trainingsite.celery"]
        self._keep(
            Program(
                "worker",
                [*celery, "worker", "--loglevel", "INFO", "--concurrency", "2", "--without-gossip", "--without-mingle"],
                environment,
                self.logs / "worker.log",
                # SIGTERM waits for the tasks at hand; SIGQUIT leaves them to be sent again.
                farewell=((signal.SIGTERM, 3.0), (signal.SIGQUIT, 2.0), (signal.SIGKILL, 2.0)),
            )
        )
        self._keep(Program("gateway", [python, "manage.py", "gateway"], environment, self.logs / "gateway.log"))
        self._keep(
            Program(
                "beat",
                [*celery, "beat", "--loglevel", "INFO", "--pidfile="],
                environment,
                self.logs / "beat.log",
            )
        )
        if not self.wishes.model_server_url:
            port = int(environment["MODEL_SERVER_URL"].rpartition(":")[2])
            command = [python, "-m", "training.trainer.serve", "--host", HOST, "--port", str(port), "--open-chat"]
            self._keep(Program("model server", command, environment, self.logs / "model-server.log"))

    def _write_addresses(self) -> None:
        names = (
            *("PORT", "GATEWAY_PORT", "GATEWAY_URL", "DATABASE_URL", "REDIS_URL"),
            *("MODEL_SERVER_URL", "MODEL_SERVER_API_KEY"),
        )
        known = {name: self.environment[name] for name in names if self.environment.get(name)}
        children.write_private(self.wishes.data_dir / embedded.ADDRESSES, json.dumps(known))

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if _answers(f"http://{HOST}:{self.wishes.port}/readyz"):
                return
            self._look_after()
            time.sleep(0.05)
        _say(f"The site has not answered for {READY_SECONDS:.0f} seconds; {self.logs / 'site.log'} may say why.")

    def _show_once(self, first: Mapping[str, str]) -> None:
        """Straight to the person: neither a log nor a file keeps them."""
        if first:
            _say(
                "\n    These are shown once:\n"
                f"        admin     {first['admin']}\n"
                f"        approver  {first['approver']}\n"
                f"        API key   {first['key']}   (project default)\n"
            )
        else:
            _say("Passwords were shown at the first start; `manage.py changepassword admin` sets a new one.")

    def _greet(self, seconds: float) -> None:
        _say(f"Trainingsite is up after {seconds:.1f} s: {self.wishes.address}/admin/   (Ctrl-C ends it)")
        _say(f"Gateway for agents: OPENAI_BASE_URL=http://localhost:{self.wishes.gateway_port}/v1")
        _say(f"Data and logs: {self.wishes.data_dir}")

    def _start_demo(self) -> None:
        done = self.wishes.data_dir / "demo-done"
        if not self.wishes.demo or done.exists() or not _has_command("demo"):
            return
        _say("The demo begins; `DEMO=0` leaves it out.")
        self.demo = children.spawn(
            [sys.executable, "manage.py", "demo"], env=self.environment, cwd=BASE_DIR, output=subprocess.PIPE
        )
        threading.Thread(target=_repeat, args=(self.demo, "demo"), daemon=True).start()

    def _look_after(self) -> None:
        """Start again what has died, each after its pause."""
        now = time.monotonic()
        for kept in self.kept:
            if kept.again_at is None:
                how = kept.part.ended()
                if how:
                    if now - kept.since > STEADY:
                        kept.pause = FIRST_PAUSE
                    _say(f"{kept.part.name} {how}. Starting it again in {kept.pause:g} s.")
                    kept.again_at = now + kept.pause
                    kept.pause = min(kept.pause * 2, LONGEST_PAUSE)
            elif now >= kept.again_at:
                try:
                    kept.part.start()
                except CannotStart as exc:
                    _say(f"{exc} Trying again in {kept.pause:g} s.")
                    kept.again_at = time.monotonic() + kept.pause
                    kept.pause = min(kept.pause * 2, LONGEST_PAUSE)
                else:
                    kept.again_at, kept.since = None, time.monotonic()
        if self.demo is not None and self.demo.poll() is not None:
            if self.demo.returncode == 0:
                children.write_private(self.wishes.data_dir / "demo-done", "")
            else:
                _say(f"The demo {_how(self.demo)}. `manage.py demo` runs it again, and so does the next start.")
            self.demo = None

    def _keep_logs_short(self) -> None:
        if time.monotonic() > self.logs_at:
            self.logs_at = time.monotonic() + 60.0
            for log in (*self.logs.glob("*.log"), *self.wishes.data_dir.glob("*/*.log")):
                embedded.keep_short(log)

    def _stop(self) -> None:
        (self.wishes.data_dir / embedded.ADDRESSES).unlink(missing_ok=True)
        if self.demo is not None:
            children.end_child(self.demo, ((signal.SIGTERM, 3.0), (signal.SIGKILL, 2.0)))
        programs = [kept.part for kept in self.kept if isinstance(kept.part, Program)]
        for program in programs:  # all at once …
            program.ask_to_end()
        for program in reversed(programs):  # … then each is waited for
            program.stop()
        strays = [one for one in children.carrying(self.wishes.mark) if self.will is None or one.pid != self.will.pid]
        for stray in strays:  # a trainer and its shim, which a worker leaves behind
            stray.signal(signal.SIGTERM)
        for stray in strays:
            children.end(stray, ((signal.SIGTERM, 8.0), (signal.SIGKILL, 2.0)))
        for kept in reversed(self.kept):
            if isinstance(kept.part, Service):
                kept.part.stop()
        embedded.leave_runtime_folder(embedded.runtime_folder(self.wishes.data_dir))
        if self.will is not None and self.will.stdin is not None:
            self.will.kill()
            self.will.wait()
            self.will.stdin.close()
        if self.kept:
            _say("Trainingsite has ended.")

    def _leave_a_will(self) -> None:
        if sys.platform == "linux":
            script = Path(__file__).with_name("last_will.py")
            self.will = subprocess.Popen(
                [sys.executable, "-I", "-S", str(script), self.wishes.mark],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )


@contextlib.contextmanager
def _alone_on(wishes: Wishes) -> Iterator[None]:
    """Hold the data folder's lock; the kernel gives it back however we end."""
    try:
        wishes.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        (wishes.data_dir / "log").mkdir(exist_ok=True)
        lock = (wishes.data_dir / "up.lock").open("a+")
    except OSError as exc:
        raise CannotStart(f"{wishes.data_dir} cannot be written: {exc.strerror}. Give another DATA_DIR.") from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise CannotStart(
                f"Trainingsite already runs on {wishes.data_dir} ({lock.read().strip()}). "
                "End it first, or give another DATA_DIR."
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()}, {wishes.address}")
        lock.flush()
        yield


def _end_leftovers(wishes: Wishes) -> None:
    """End what a killed supervisor of this data folder left; PostgreSQL and Valkey see to themselves on starting."""
    left = children.carrying(wishes.mark)
    if not left:
        return
    _say(f"Ending {len(left)} processes that an earlier start left behind.")
    for process in left:
        process.signal(signal.SIGTERM)
    for process in left:
        children.end(process, ((signal.SIGTERM, 5.0), (signal.SIGKILL, 2.0)))


def _refuse_missing_packages() -> None:
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise CannotStart(
            f"Not installed: {', '.join(missing)}. `make run` installs what the site needs, "
            "and so does `pip install -r requirements.txt`."
        )


def _refuse_taken_port(port: int, variable: str = "PORT") -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                raise CannotStart(
                    f"Port {port} is in use. Give another: {variable}={min(port + 10, 65535)} make run."
                ) from exc
            raise CannotStart(f"Port {port} cannot be used: {exc.strerror}. Give another by {variable}.") from exc


def _kept_key(path: Path) -> str:
    """The key in a file that only we can read; made when there is none."""
    if not path.exists():
        children.write_private(path, secrets.token_urlsafe(32))
    return path.read_text().strip()


def _schema() -> str:
    """What the tables look like after all migrations, as a hash of those and of the packages that bring others."""
    seen = hashlib.sha256()
    for path in sorted(BASE_DIR.glob("*/migrations/*.py")):
        seen.update(f"{path.relative_to(BASE_DIR)}\n".encode() + path.read_bytes())
    for package in ("Django", "django-celery-beat"):
        seen.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    return seen.hexdigest()


def _free_port(kept: Path) -> int:
    """A free port, the same as last time where that can be: agents may still hold the address."""
    for wanted in (kept.read_text().strip() if kept.exists() else "", "0"):
        if not wanted.isdigit():
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, int(wanted)))
            port: int = probe.getsockname()[1]
            children.write_private(kept, str(port))
            return port
    raise CannotStart("There is no free port for the model server.")


def _answers(url: str) -> bool:
    """Whether anything answers there; /readyz says 503 when it cannot work."""
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:  # noqa: S310  (our own address)
            return bool(answer.status == 200)
    except urllib.error.HTTPError as exc:
        return exc.code == 404  # a site without the page is a site that answers
    except OSError:
        return False


def _has_command(name: str) -> bool:
    return any(BASE_DIR.glob(f"*/management/commands/{name}.py"))


def _repeat(process: "subprocess.Popen[bytes]", prefix: str) -> None:
    """Say what a process says, each line with a prefix."""
    assert process.stdout is not None
    for line in process.stdout:
        _say(f"{prefix} | {line.decode(errors='replace').rstrip()}")


def _how(process: "subprocess.Popen[bytes]") -> str:
    code = process.poll()
    if code is None:
        return ""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit status {code}"


def _ask_to_stop(number: int, frame: FrameType | None) -> NoReturn:
    raise StopAsked("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        print(text, flush=True)


def _complain(text: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
