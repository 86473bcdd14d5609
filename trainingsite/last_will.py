"""Ends what a killed supervisor leaves behind: `python -I -S last_will.py MARK`, standard input a pipe from it.

The kernel ends the supervisor's own children (leash.py). Their children, such as a trainer in a session of its
own, are not on that leash. This process sleeps on the pipe; when the supervisor is gone, by whatever death, the
pipe ends and every process whose environment holds MARK is asked to end, and after `GRACE` seconds made to.
"""

import os
import signal
import sys
import time

GRACE = 5.0


def main(mark: str) -> None:
    sys.stdin.buffer.read()
    needle = mark.encode()
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 2.0)):
        deadline = time.monotonic() + seconds
        left = carrying(needle)
        for pid in left:
            try:
                os.kill(pid, number)
            except OSError:
                continue
        while left and time.monotonic() < deadline:
            time.sleep(0.1)
            left = carrying(needle)


def carrying(needle: bytes) -> list[int]:
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208  (no pathlib: this starts in 10 ms and stays small)
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:  # noqa: PTH123
                    if needle in file.read().split(b"\0"):
                        found.append(int(name))
            except OSError:
                continue
    return found


main(sys.argv[1])
