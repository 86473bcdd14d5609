"""Processes of ours: started so that they end with us, and found again after a kill -9.

A pid alone names nobody: the kernel gives it to the next process. So what is kept about a process is its pid
and the moment it started, and only a process for which both hold is ever sent a signal.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

LEASH = Path(__file__).with_name("leash.py")


@dataclass(frozen=True)
class Process:
    """One process, for as long as it lives."""

    pid: int
    started: str  # boot and clock tick (Linux), else what `ps` says

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """The process with this pid; None when there is none, or only its zombie."""
        started = _started(pid)
        return cls(pid, started) if started else None

    def alive(self) -> bool:
        return _started(self.pid) == self.started

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal, to its whole process group when `group`; no error when it has ended."""
        if not self.alive():
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if group and os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)

    def keep(self, path: Path) -> None:
        """Write it down for a later `kept`."""
        write_private(path, json.dumps({"pid": self.pid, "started": self.started}))


def kept(path: Path) -> Process | None:
    """The process written down at `path`, if it still lives."""
    try:
        facts = json.loads(path.read_text())
        process = Process(int(facts["pid"]), str(facts["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return process if process.alive() else None


def spawn(
    command: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: int | IO[bytes] | None = subprocess.DEVNULL,
    output: int | IO[bytes] | None = None,
    errors: int | IO[bytes] | None = subprocess.STDOUT,
    when_parent_ends: int = signal.SIGKILL,
    who: str = "me",
) -> "subprocess.Popen[bytes]":
    """Start a command in its own session; the kernel sends it `when_parent_ends` when we end.

    Args:
        output: where its standard output goes, and its errors unless told otherwise; None: where ours go.
        who: `me`, `namespace:UID` or `user:UID:GID`, see leash.py.

    Raises:
        RuntimeError: not in the main thread. The kernel's "parent" is the thread that forked: a child of a
            thread that ends would end with that thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("Start processes from the main thread: one started in a thread ends with that thread.")
    leash = [sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), str(int(when_parent_ends)), who]
    return subprocess.Popen(
        [*leash, *(os.fspath(word) for word in command)],
        env=None if env is None else dict(env),
        cwd=cwd,
        stdin=stdin,
        stdout=output,
        stderr=None if output is None else errors,
        start_new_session=True,
    )


def end(process: Process, steps: Iterable[tuple[int, float]] = ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))) -> bool:
    """End a process that may not be our child: each (signal, seconds to wait) until it is gone.

    Returns:
        Whether it is gone.
    """
    for number, seconds in steps:
        process.signal(number, group=number == signal.SIGKILL)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)  # if it is ours after all, its zombie is ours to collect
            if not process.alive():
                return True
            time.sleep(0.02)
    return not process.alive()


def end_child(process: "subprocess.Popen[bytes]", steps: Iterable[tuple[int, float]]) -> None:
    """The same for a child of ours."""
    for number, seconds in steps:
        if process.poll() is None:
            process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return


def carrying(mark: str) -> list[Process]:
    """Every process of ours whose environment holds `mark` (`NAME=value`): children and their children, whatever
    session they are in. Linux only; elsewhere none are found."""
    found: list[Process] = []
    needle = mark.encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = entry.read_bytes()
        except OSError:  # ended meanwhile, or another user's
            continue
        if needle in environment.split(b"\0"):
            process = Process.of(int(entry.parent.name))
            if process is not None and process.pid != os.getpid():
                found.append(process)
    return found


def write_private(path: Path, text: str) -> None:
    """Write a file that only we can read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    new.replace(path)


def _started(pid: int) -> str:
    """When the process started; empty when it has ended."""
    if sys.platform != "linux":
        listed = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True)
        state, _, since = listed.stdout.strip().partition(" ")
        return "" if not state or state.startswith("Z") else since.strip()
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    fields = status.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    state, tick = fields[0], fields[19]
    return "" if state in "ZX" else f"{boot} {tick}"
