"""Becomes a command that ends when the process that started it ends, even by kill -9.

    python -I -S leash.py PARENT_PID SIGNAL WHO COMMAND …

The kernel is asked for SIGNAL on the parent's death (PR_SET_PDEATHSIG) between fork and exec: Python's own
`preexec_fn` is not safe with threads. WHO is `me`; `namespace:UID`, a user namespace in which we look like
UID and may do nothing that we could not do before; or `user:UID:GID`. `me` on other systems than Linux runs
the command without the leash.

Stands alone on purpose: no imports beyond the standard library, so that it starts in about 10 ms.
"""

import ctypes
import os
import sys
import warnings  # noqa: F401  (os.execvp wants it, and another user may not reach root's standard library)

PR_SET_PDEATHSIG = 1
CLONE_NEWUSER = 0x10000000


def main(arguments: list[str]) -> None:
    parent, death_signal, who, *command = arguments
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        kind, _, ids = who.partition(":")
        if kind == "namespace":
            uid, gid = os.geteuid(), os.getegid()
            if libc.unshare(CLONE_NEWUSER) != 0:
                sys.exit(f"leash: no user namespace: {os.strerror(ctypes.get_errno())}")
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"{ids} {uid} 1")
            _write("/proc/self/gid_map", f"{ids} {gid} 1")
        elif kind == "user":
            uid, gid = (int(number) for number in ids.split(":"))
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
        # After the change of ids: that clears the setting.
        if libc.prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
            sys.exit(f"leash: no signal on the parent's death: {os.strerror(ctypes.get_errno())}")
        if os.getppid() != int(parent):
            sys.exit("leash: the process that started this one has ended")
    try:
        os.execvp(command[0], command)  # noqa: S606  (no shell is meant)
    except OSError as exc:
        sys.exit(f"leash: {command[0]}: {exc.strerror}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:  # noqa: PTH123  (pathlib would double the start-up time)
        file.write(text)


main(sys.argv[1:])
