"""What the benchmarks share: a piece in a process of its own, its time, memory, operations and waits (Linux)."""

import gc
import itertools
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def alone(piece: Callable, *arguments):
    """piece(*arguments), called in a fresh process -> what it returns. A killed process is an error that says so.

    piece is at the top level of a module, so that the process can import it.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(piece, *arguments).result()


def timed(step: Callable[[], object], device: torch.device | str, repeats: int, warm_up: int = 1) -> float:
    """Median of the seconds that step() takes, the first few calls not counted, the device waited for.

    Steps of milliseconds are repeated for a second, however few repeats were asked for: their first calls are slow.
    """
    on_gpu = torch.device(device).type == "cuda"
    seconds = []
    while len(seconds) < warm_up + repeats or (sum(seconds) < 1 and len(seconds) < 1000):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm_up:])


class Stopwatch:
    """Notes moments, on a GPU in its own queue of work: nothing waits for it until they are read."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.moments = device.type == "cuda", []

    def mark(self) -> None:
        if self.on_gpu:
            self.moments.append(torch.cuda.Event(enable_timing=True))
            self.moments[-1].record()
        else:
            self.moments.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each moment to the next."""
        pairs = itertools.pairwise(self.moments)
        if not self.on_gpu:
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def waits(run: Callable[[int], object], device: torch.device | str, steps: int = 10) -> int | None:
    """How often the host waits for the GPU in `steps` steps of run(steps); None on the CPU.

    What run does once, however many steps there are, is not counted. Nor is waiting for an event, such as the one
    after which the step's loss has arrived on the host.
    """
    if torch.device(device).type != "cuda":
        return None

    def count(steps: int) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run(steps)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in caught)

    return count(steps + 2) - count(2)


def launches(run: Callable[[int], object], device: torch.device | str) -> int | None:
    """How often the host gives the GPU something to do in one step of run(steps): kernels, copies, whole recordings."""
    if torch.device(device).type != "cuda":
        return None

    def count(steps: int) -> int:
        with torch.profiler.profile() as profile:
            run(steps)
        names = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")
        return sum(event.count for event in profile.key_averages() if event.key.startswith(names))

    return (count(6) - count(1)) // 5


class Operations(TorchDispatchMode):
    """Counts the operations that compute something, forward and backward: about as many kernels as a GPU launches."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view
        return operation(*args, **(kwargs or {}))


class Memory:
    """Highest memory from its making on, in bytes.

    On the CPU it is what the whole process holds resident, on a GPU what torch has allocated there.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.on_gpu = torch.device(device).type == "cuda"
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from here
            self.before = _kib("/proc/self/status", "VmRSS")

    def peak(self) -> int:
        """Highest in all, with what was there before."""
        return torch.cuda.max_memory_allocated() if self.on_gpu else _kib("/proc/self/status", "VmHWM")

    def extra(self) -> int:
        """Highest over what was there before."""
        return self.peak() - self.before


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that could be had now."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _kib("/proc/meminfo", "MemAvailable")


def _kib(file: str, field: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{file} has no {field}")


def machine(device: torch.device | str, threads: int) -> str:
    """One line that says what the figures were measured on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    parts = [f"{model}, {os.cpu_count()} cores, {threads} threads"]
    if torch.device(device).type == "cuda":
        parts.insert(0, torch.cuda.get_device_name())
        parts.append(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    return ", ".join(
        [*parts, f"Python {sys.version.split()[0]}", f"torch {torch.__version__}", time.strftime("%Y-%m-%d")]
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column to the left, the others to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
