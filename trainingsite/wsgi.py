"""The site as granian serves it."""

import ctypes
import gc
import multiprocessing
import os
import signal
import sys

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "trainingsite.settings")

PR_SET_PDEATHSIG = 1
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's mallopt


def end_with_the_server() -> None:
    """A worker whose server was killed would go on listening beside the next one: the kernel ends it as well."""
    server = multiprocessing.parent_process()
    if server is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != server.pid:
        sys.exit("The server that started this worker has ended.")


def give_memory_back() -> None:
    """Large pieces go back to the system when they are freed, and threads share their arenas: 400 MB of trajectories of
    1 MB left 150 MB behind in sixteen of them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 256 * 1024)
        mallopt(M_ARENA_MAX, 2)


end_with_the_server()
give_memory_back()
site = get_wsgi_application()

from trajectories.front_door import FrontDoor  # noqa: E402  (Django must be set up before models are read)

application = FrontDoor(site)

# A recording is thousands of small objects that die together: looking for cycles among them every 700 allocations,
# and among all of the site's modules with them, took a quarter of ingestion's time (0.78 → 0.60 ms a trajectory).
gc.freeze()
gc.set_threshold(50_000, 20, 50)

# The writers' threads wait for Python's lock after every answer of the database; 5 ms, as it comes, is as long as
# their statement takes.
sys.setswitchinterval(0.0005)
