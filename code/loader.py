"""Worker processes that load images: as many as there are cores and shared memory for, and who may stop them."""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading

import torch
from refused import warn_once
from torch.utils.data import DataLoader


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_memory() -> float:
    """Bytes that this process may have in flight from its workers: a share of what is free in /dev/shm.

    Infinite where there is no such file system: macOS takes them from elsewhere.
    """
    if sys.platform != "linux":
        return math.inf
    with contextlib.suppress(OSError):  # not even a /dev/shm
        found = os.statvfs("/dev/shm")
        # A tenth is for labels and the rest of what multiprocessing keeps there.
        return 0.9 * found.f_bavail * found.f_frsize / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 0.0


def that_fit(workers: int, batch_bytes: int, room: float) -> tuple[int, int]:
    """(workers, batches ahead of each), of at most so many and 4; there is one batch more, which is in use."""
    ahead = 4
    while workers and (workers * ahead + 1) * batch_bytes > room:
        ahead, workers = (ahead - 1, workers) if ahead > 1 else (1, workers - 1)
    return workers, ahead


class Loader(DataLoader):
    """A DataLoader whose worker processes obey their parent's SIGTERM, and only their parent's.

    batch_bytes: what a batch takes on its way from a worker. Where shared memory is short, as in containers, fewer are
    on their way.
    """

    def __init__(self, data, workers: int, pin_memory: bool, batch_bytes: int = 4096, **options):
        workers = min(workers, available_cores())  # more would only compete for the cores
        fitting, ahead = that_fit(workers, batch_bytes, shared_memory())
        if (fitting, ahead) < (workers, 4):
            warn_once("/dev/shm is small, so fewer batches are loaded ahead, which may be slower; docker run "
                      "--shm-size=8g gives more")  # fmt: skip
        workers = fitting
        if workers > 0:
            options |= dict(persistent_workers=True, prefetch_factor=ahead, worker_init_fn=leave_stopping_to_the_parent)
        # With its own generator, a loader does not draw from the global one every epoch.
        super().__init__(data, num_workers=workers, pin_memory=pin_memory, generator=torch.Generator(), **options)

    def __iter__(self):
        # All threads of a worker have to block the signal. Torch starts some before worker_init_fn: they inherit this.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_stopping_to_the_parent(worker: int) -> None:
    """Runs in each worker process.

    Ctrl-C and SIGTERM may reach the whole process group, but the parent finishes its step first and still needs its
    workers. It sends them SIGTERM when it exits on an error, and waits for them: not to obey would hang it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return
    parent = multiprocessing.parent_process().pid  # who started it; in the system's eyes that may be a forkserver

    def obey_the_parent():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)  # torch would complain about a worker that a signal killed

    threading.Thread(target=obey_the_parent, daemon=True).start()
