"""The process that owns a trainer: `python -m training.shim --job DIR --run N --fence N --lease SECONDS -- COMMAND…`.

The worker that starts a run may die at any moment, so a process of its own holds what must never be held twice:

    the lock     a file lock on the batch's folder. The trainer and all its children inherit the open file, so the
                 lock lasts as long as any of them does, whatever became of the shim.
    the lease    a row of `training_runs`, kept alive through PostgreSQL. The fence decides: when the row no longer
                 carries this shim's fence, or the run is no longer live, the trainer is killed at once. While the
                 database is away the trainer goes on until the lease's own end, then it is killed: by then
                 someone else may have taken the run.
    the trainer  in a session of its own, killed by the kernel when the shim is killed (Linux).

What it leaves: `log.txt` (all the trainer said) and `exit.json` (`Exit`). No Django: it starts
in a moment, and it needs no settings.
"""

import argparse
import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from trainingsite.children import LEASH, Process

DSN_VARIABLE = "TRAINING_LEASE_DSN"  # libpq's form; by the environment, since arguments are visible to everyone
LOCK = "lock"
HOLDER = "holder.json"
EXIT = "exit.json"
LOG = "log.txt"

GRACE_SECONDS = 10.0  # from SIGTERM to SIGKILL, when the shim itself is asked to stop
TAIL_LINES = 20
TAIL_BYTES = 16_384

RENEW = """
UPDATE training_runs
SET heartbeat_at = now(), lease_until = now() + make_interval(secs => %(seconds)s), owner = %(owner)s
WHERE id = %(run)s AND fence = %(fence)s AND status IN ('starting', 'running', 'stalled')
"""
# Given back, so that the next look at the run need not wait for the lease's end.
RELEASE = "UPDATE training_runs SET lease_until = now() WHERE id = %(run)s AND fence = %(fence)s"


@dataclass(frozen=True)
class Exit:
    """How a trainer ended; the text of exit.json."""

    reason: str  # "ended", "lease lost", "stopped", "not started"
    code: int | None  # of the process; None when a signal ended it
    signal: int | None
    ended_at: str
    log: list[str]  # its last lines


@dataclass(frozen=True)
class Holder:
    """Who holds the lock on this machine; the text of holder.json, for the next shim to end leftovers by."""

    host: str
    fence: int
    shim: Process
    trainer: Process


class Lease:
    """The right to go on. `renew` is called by a thread, since a frozen database can hold a call for long."""

    def __init__(self, dsn: str, run: int, fence: int, seconds: float) -> None:
        self.dsn = dsn
        self.run = run
        self.fence = fence
        self.seconds = seconds
        self.owner = f"{socket.gethostname()} {os.getpid()}"
        self.ends = 0.0  # monotonic; counted from before the question, so always earlier than the row says
        self.is_lost = False

    def renew(self) -> bool:
        """Ask for more time.

        Returns:
            False when the row says that someone else has the run. When the database does not answer: True, and
            `ends` stays where it is.
        """
        asked = time.monotonic()
        try:
            kept = self._execute(RENEW)
        except OSError as exc:
            print(f"shim: the lease could not be renewed: {exc}", file=sys.stderr, flush=True)
            return True
        if kept:
            self.ends = asked + self.seconds
        else:
            self.is_lost = True
        return kept

    def keep(self, done: threading.Event) -> None:
        while not done.wait(self.seconds / 5) and self.renew():
            pass

    def is_over(self) -> bool:
        return self.is_lost or time.monotonic() >= self.ends

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self._execute(RELEASE)

    def _execute(self, statement: str) -> bool:
        import psycopg  # here, because the readers of exit.json need no database driver

        timeout = max(1, int(self.seconds / 4))
        try:
            with psycopg.connect(
                self.dsn, autocommit=True, connect_timeout=max(2, timeout), application_name="training shim"
            ) as connection:
                connection.execute(f"SET statement_timeout = {timeout * 1000}")
                given = {"run": self.run, "fence": self.fence, "seconds": self.seconds, "owner": self.owner}
                return connection.execute(statement, given).rowcount == 1
        except psycopg.Error as exc:
            raise OSError(str(exc).strip()) from exc


def take_lock(folder: Path, fence: int, patience: float) -> IO[str] | None:
    """The lock on a batch's folder, ending what an older fence left behind on this machine.

    Returns:
        The open file, to be handed on to the trainer; None when it is held by a fence that is not older, or by
        something that cannot be ended from here, after `patience` seconds.
    """
    lock = (folder / LOCK).open("w")
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _end_leftovers(folder, fence)
        else:
            return lock
        if time.monotonic() > until:
            lock.close()
            return None
        time.sleep(0.1)


def _end_leftovers(folder: Path, fence: int) -> None:
    """Kill the shim and the trainer of an older fence: our lease is the proof that theirs is gone."""
    holder = read_holder(folder)
    if holder is None or holder.fence >= fence:
        return
    if holder.trainer.alive() or Process.of(holder.trainer.pid) is None:
        # The group outlives its leader (torchrun's children), and an id that still names a group is not used again.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(holder.trainer.pid, signal.SIGKILL)
    holder.shim.signal(signal.SIGKILL)


def read_holder(folder: Path) -> Holder | None:
    """Who holds (or held) a batch's lock; None when nobody of this machine did."""
    try:
        said = json.loads((folder / HOLDER).read_text())
        shim, trainer = (Process(int(said[who]["pid"]), str(said[who]["started"])) for who in ("shim", "trainer"))
        holder = Holder(str(said["host"]), int(said["fence"]), shim, trainer)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return holder if holder.host == socket.gethostname() else None


def _write(path: Path, value: Exit | Holder) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(value)))
    temporary.replace(path)


def tail(log: Path, *, lines: int = TAIL_LINES, size: int = TAIL_BYTES) -> list[str]:
    """The last lines of a log, however long it is; `size` bytes of it are read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            text = file.read().decode(errors="replace").replace("\0", "")
    except OSError:
        return []
    return text.splitlines()[-lines:]


def own(job: Path, command: list[str], lease: Lease, environment: dict[str, str]) -> Exit:
    """Run the trainer for as long as the lease holds."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: stopping.set())
    if not lease.renew() or lease.is_over():
        return _ended(job, "lease lost" if lease.is_lost else "not started", None)
    lock = take_lock(job.parent, lease.fence, patience=lease.seconds / 2)
    if lock is None:
        return _ended(job, "not started", None, "another trainer of this batch is at work and holds its lock")
    # The leash asks the kernel to kill the trainer when we die, however that comes.
    leash = [sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), str(int(signal.SIGKILL)), "me"]
    with lock, (job / LOG).open("ab") as log:
        trainer = subprocess.Popen(
            [*leash, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )
        shim, child = Process.of(os.getpid()), Process.of(trainer.pid)
        if shim and child:  # the child may have ended already
            _write(job.parent / HOLDER, Holder(socket.gethostname(), lease.fence, shim, child))
        done = threading.Event()
        threading.Thread(target=lease.keep, args=(done,), daemon=True).start()
        reason = _wait(trainer, lease, stopping)
        done.set()
        ended = _ended(job, reason, trainer.returncode)
    if reason != "lease lost":
        releasing = threading.Thread(target=lease.release, daemon=True)  # a frozen database must not keep us here
        releasing.start()
        releasing.join(timeout=5.0)
    return ended


def _wait(trainer: subprocess.Popen[bytes], lease: Lease, stopping: threading.Event) -> str:
    """Until the trainer is gone with all it started; why it went."""
    reason = "ended"
    kill_at: float | None = None
    while trainer.poll() is None:
        if lease.is_over():
            reason = "lease lost"
            _signal(trainer, signal.SIGKILL)
        elif stopping.is_set() and kill_at is None:
            reason = "stopped"
            _signal(trainer, signal.SIGTERM)
            kill_at = time.monotonic() + GRACE_SECONDS
        elif kill_at is not None and time.monotonic() > kill_at:
            _signal(trainer, signal.SIGKILL)
        time.sleep(0.1)
    _signal(trainer, signal.SIGKILL)
    return reason


def _signal(trainer: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(trainer.pid, number)


def _ended(job: Path, reason: str, returncode: int | None, said: str = "") -> Exit:
    by_signal = returncode is not None and returncode < 0
    ended = Exit(
        reason=reason,
        code=None if by_signal else returncode,
        signal=-returncode if returncode is not None and by_signal else None,
        ended_at=datetime.now(UTC).isoformat(),
        log=[*tail(job / LOG), *([said] if said else [])],
    )
    _write(job / EXIT, ended)
    return ended


def read_exit(job: Path) -> Exit | None:
    """What the shim wrote when its trainer ended; None while there is nothing (or nothing readable) to read."""
    try:
        said = json.loads((job / EXIT).read_text())
        return Exit(said["reason"], said["code"], said["signal"], said["ended_at"], [str(line) for line in said["log"]])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stop(folder: Path) -> int | None:
    """Ask the shim of a batch's folder to stop, if it lives on this machine.

    Returns:
        Its process id. It ends its trainer, gives its lease back, and is gone within `GRACE_SECONDS`.
    """
    holder = read_holder(folder)
    if holder is None or not holder.shim.alive():
        return None
    holder.shim.signal(signal.SIGTERM)
    return holder.shim.pid


def stop_all(jobs: Path) -> list[int]:
    """The same for all of a site's jobs, when it ends in order; the runs go on from their checkpoints later."""
    asked = [stop(path.parent) for path in jobs.glob(f"*/{HOLDER}")]
    return [pid for pid in asked if pid is not None]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.shim")
    parser.add_argument("--job", type=Path, required=True, help="the folder of this attempt and fence")
    parser.add_argument("--run", type=int, required=True, help="id of the row in training_runs")
    parser.add_argument("--fence", type=int, required=True)
    parser.add_argument("--lease", type=float, required=True, help="seconds that a renewal holds")
    parser.add_argument("--detach", action="store_true", help="go on in the background, out of the caller's session")
    parser.add_argument("command", nargs="+", help="the trainer's, after --")
    given = parser.parse_args(arguments)
    environment = dict(os.environ)
    dsn = environment.pop(DSN_VARIABLE, "")  # the trainer has no business with the database
    if not dsn:
        parser.error(f"{DSN_VARIABLE} is not set: the lease cannot be kept without the database")
    if given.detach and os.fork():
        return 0  # the caller reaps this one at once; the other belongs to nobody who could leave it a zombie
    if given.detach:
        os.setsid()
    ended = own(given.job, given.command, Lease(dsn, given.run, given.fence, given.lease), environment)
    return 0 if ended.code == 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
