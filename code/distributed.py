"""The device, and several processes, started by torchrun, that together compute what one would.

    torchrun --standalone --nproc-per-node=4 code/train.py @recipes/sop.args

The hypergraph is made of the whole batch. If each process built one from its own share of the images, that would be
another method, with smaller batches. So the embeddings of all processes are gathered, and every process computes the
loss of the whole batch. On one process the functions here do nothing.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections import namedtuple

import torch
import torch.distributed as dist
from refused import Refused, one_line
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Interrupted(Exception):
    """SIGTERM or Ctrl-C came, and the batch under way is done."""


Lost = dist.DistError  # only says that another process has ended, or cannot be reached
Processes = namedtuple("Processes", "rank count")  # this process's number, and how many there are


def processes() -> Processes:
    return Processes(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Processes(0, 1)


def several() -> bool:
    """Whether torchrun started this process beside others; they have not met before start(). Raises Refused."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    if missing := {"RANK", "LOCAL_RANK"} - os.environ.keys():
        raise Refused(f"WORLD_SIZE is set, but not {min(missing)}: start several processes with torchrun, or unset it")
    return True


def is_first() -> bool:
    """Whether this is process 0, the one that writes and speaks; known before start(), too."""
    return not several() or os.environ["RANK"] == "0"


def start(gpu_id: int) -> torch.device:
    """Join the process group if torchrun started this process, and choose the device.

    gpu_id: as --gpu-id says, -1 for the CPU; of several processes on one machine each takes the GPU of its own number.
    From here on only process 0 speaks. Raises Refused: no GPU of that number, fewer GPUs than processes on this
    machine, an environment that is not torchrun's, or processes that cannot reach each other.
    """
    if not several():
        return choose_device(gpu_id)
    local_rank = int(os.environ["LOCAL_RANK"])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    on_gpu, count = torch.cuda.is_available() and gpu_id >= 0, torch.cuda.device_count()
    if on_gpu and here > count:  # seen by all processes of the machine, so that the first one says it
        raise Refused(f"{here} processes were started on this machine, which has {count} GPU{'s' * (count != 1)}: "
                         "start fewer with --nproc-per-node, or use --gpu-id -1")  # fmt: skip
    device = choose_device(local_rank if on_gpu else -1)
    # What the hosts tell each other stays off the GPUs: asking one for a number would make the host wait for it.
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        all_gather(torch.zeros(1))  # one that ended before all had met would be waited for without an end
    except RuntimeError as error:  # gloo adds a whole stack
        raise Refused(f"the processes cannot reach each other: {str(error).splitlines()[0]}") from error
    if not is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # a progress bar shows itself on a terminal only
    return device


def choose_device(gpu_id: int) -> torch.device:
    """The GPU of that number if there is any GPU, else the CPU. Raises Refused for a number out of range."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu_id < 0 or count == 0:
        return torch.device("cpu")
    if gpu_id >= count:
        raise Refused(f"--gpu-id {gpu_id}: there are {count} GPUs, numbered from 0; -1 is the CPU")
    torch.cuda.set_device(gpu_id)
    # Loss and search are exact in float32. It is the default, unless an environment variable that some containers set
    # says otherwise.
    torch.set_float32_matmul_precision("highest")
    return torch.device("cuda", gpu_id)


def announce(device: torch.device, gpu_id: int) -> None:
    """Print what computes, and why not the NVIDIA GPU that is there: else one finds out after a night.

    The driver may be too old, or torch built for the CPU; torch says which.
    """
    count, unused = processes().count, ""
    wanted = device.type == "cpu" and gpu_id >= 0 and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    if wanted and (torch.cuda.device_count() or os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi")):
        try:
            torch.cuda.init()
        except Exception as error:
            unused = f"; torch {torch.__version__} can use no GPU here: {one_line(error)[:300]}"
    print(f"device: {describe(device)}" + f", {count} processes" * (count > 1) + unused)


def describe(device: torch.device) -> str:
    """The device in words: 'cuda:0 NVIDIA H100' or 'cpu, 2 threads'."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.get_num_threads()} threads"


def reports_errors() -> bool:
    """Whether this process should say why the run ends: always on one process, only the first to fail of several.

    Until the processes have met, all fail alike, and the first of each machine speaks. After that the first one that
    asks the store through which they met speaks; the others mostly fail because it did.
    """
    if not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("hist/errors", 1) == 1
    except RuntimeError:  # the store went with the process that failed first
        return dist.get_rank() == 0


@contextlib.contextmanager
def together():
    """Around what all processes do at the same time: raises Lost where one of them is missing.

    nccl raises it, a DistError. gloo raises a plain RuntimeError, from each collective and from both passes of
    DistributedDataParallel, and names its source file in it, which no error of another origin does.
    """
    try:
        yield
    except RuntimeError as error:
        if dist.is_initialized() and "/gloo/" in str(error):
            raise Lost(error) from error
        raise


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@together()
def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """The module in DistributedDataParallel, which averages gradients; itself on one process, or with nothing to train.

    Must be done again whenever parameters are frozen or un-frozen.
    """
    if not dist.is_initialized() or not any(p.requires_grad for p in module.parameters()):
        return module
    wrapped = DistributedDataParallel(module, [device] if device.type == "cuda" else None)
    wrapped.broadcast_buffers = False  # BatchNorm's statistics before every step: share_buffers does it once an epoch
    return wrapped


@together()
def share_buffers(network: nn.Module) -> None:
    """Give all processes the first one's BatchNorm statistics, which checkpoints keep: all score the same network.

    Without synchronised BatchNorm each has those of its own images.
    """
    if dist.is_initialized():
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


class _GatherEmbeddings(torch.autograd.Function):
    """All processes' (n, D) as one (count · n, D), in order of process.

    Every process computes the same loss, so the gradient of the whole batch is known everywhere: a process needs its
    own rows of it. DistributedDataParallel divides by the number of processes; multiplied by it, what is left after the
    average is the sum over the rows of all processes, which is the gradient that a single process would have.
    """

    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        ctx.rows = slice(dist.get_rank() * len(local), (dist.get_rank() + 1) * len(local))
        return torch.cat(all_gather(local))

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad[ctx.rows] * dist.get_world_size()


class StopSignals:
    """Notes the first SIGTERM or Ctrl-C, for the loops to stop after a batch; another Ctrl-C ends at once.

    One request can arrive twice: `timeout` signals its child and then the whole process group, torchrun passes on what
    the processes have received already. So SIGTERM is only ever noted, and a second Ctrl-C counts after a moment.
    """

    def __init__(self):
        self.number, self.since = 0, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        now, moment = time.monotonic(), 5.0 if several() else 0.2
        if self.number and number == signal.SIGINT and now - self.since > moment:
            os._exit(128 + number)
        self.number, self.since = self.number or number, self.since or now

    def check(self) -> None:
        """Raise Interrupted once a signal came. All processes have to call it after each of their batches.

        A signal may reach one process only, or each at another moment. They agree, so that all stop after the same
        batch; the largest number received wins.
        """
        agreed = int(max(all_gather(torch.tensor([self.number])))) if dist.is_initialized() else self.number
        if agreed:
            # This process's own signal may be yet to come.
            self.number, self.since = agreed, self.since or time.monotonic()
            raise Interrupted


def gather_batch(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The whole batch from each process's share: embeddings (N, D), and labels (N,) beside them."""
    if not dist.is_initialized():
        return embeddings, labels
    labels = torch.cat(all_gather(labels))
    if embeddings.is_cuda:  # DistributedDataParallel would move them, and make the host wait for the device
        labels = labels.pin_memory().to(embeddings.device, non_blocking=True)
    return _GatherEmbeddings.apply(embeddings), labels


@together()
def from_all(value) -> list:
    """The plain values of all processes, in their order, on every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@together()
def all_reduce(values: Tensor, how: str) -> None:
    """The sum or maximum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[how])


@together()
def all_gather(values: Tensor) -> list[Tensor]:
    """The values of every process, of one shape everywhere, in order of process."""
    if not dist.is_initialized():
        return [values]
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return parts


def gather_shares(share: Tensor, total: int) -> Tensor:
    """Rows that were dealt out in turn (process r has rows r, r + count, …), back in order (total, …), everywhere."""
    if not dist.is_initialized():
        return share
    padded = share.new_zeros(-(-total // dist.get_world_size()), *share.shape[1:])
    padded[: len(share)] = share
    return torch.stack(all_gather(padded), dim=1).flatten(0, 1)[:total]
