"""Ends what a killed supervisor leaves behind: `python -I -S last_will.py MARK`, standard input a pipe from it.

The kernel ends the supervisor's own children (leash.py). Their children, such as a trainer in a session of its
own, are not on that leash. This process sleeps on the pipe; when the supervisor is gone, by whatever death, the
pipe ends and every process whose environment holds MARK is asked to end, and after `GRACE` seconds made to. One
that was started later is another's: the next start on this data folder carries the same mark.
"""

import os
import signal
import sys
import time

GRACE = 5.0


def main(mark: str) -> None:
    sys.stdin.buffer.read()
    left = carrying(mark.encode())
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 2.0)):
        deadline = time.monotonic() + seconds
        for pid, tick in left.items():
            if started(pid) == tick:
                try:
                    os.kill(pid, number)
                except OSError:
                    continue
        while left and time.monotonic() < deadline:
            time.sleep(0.1)
            left = {pid: tick for pid, tick in left.items() if started(pid) == tick}


def carrying(needle: bytes) -> dict[int, str]:
    """The processes that carry the mark, and when each started: a pid alone may be another's a moment later."""
    found = {}
    for name in os.listdir("/proc"):  # noqa: PTH208  (no pathlib: this starts in 10 ms and stays small)
        if name.isdigit() and int(name) != os.getpid():
            tick = started(int(name))
            try:
                with open(f"/proc/{name}/environ", "rb") as file:  # noqa: PTH123
                    if tick and needle in file.read().split(b"\0"):
                        found[int(name)] = tick
            except OSError:
                continue
    return found


def started(pid: int) -> str:
    """The clock tick at which it started; empty when it has ended."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:  # noqa: PTH123
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


main(sys.argv[1])
