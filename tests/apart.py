"""The scripts in processes of their own, alone or as torchrun starts them, without the seconds of importing torch.

Every process is forked from one that has imported them: as that one trains nothing and scores nothing, a process is as
good as new. What it prints is read from files.
"""

import importlib
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch.distributed

ROOT = Path(__file__).resolve().parent.parent
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["apart", "train", "evaluate", "timm", "torch.distributed"])
_numbers = itertools.count()


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


class Apart:
    """work(*arguments) in a process of its own. Functions only: the other process imports them by name."""

    folder = tempfile.TemporaryDirectory(prefix="hist_tests_")

    def __init__(self, work, *arguments, **environment):
        number = next(_numbers)
        self.files = [Path(self.folder.name, f"{number}.{stream}") for stream in ("out", "err")]
        environment = {name: str(value) for name, value in environment.items()}
        # A forked server would keep the place of the test that started it.
        os.environ["PYTHONPATH"] = f"{ROOT / 'code'}:{ROOT / 'tests'}"
        self.process = _context.Process(target=_run, args=(self.files, environment, work, arguments))
        self.process.start()

    @property
    def out(self) -> str:
        return self.files[0].read_text() if self.files[0].exists() else ""

    def wait_for(self, text: str) -> None:
        """Until it has printed that."""
        deadline = time.monotonic() + 200
        while text not in self.out:
            assert self.process.is_alive() and time.monotonic() < deadline, self.files[1].read_text()
            time.sleep(0.01)

    def end(self, timeout: float = 200) -> Outcome:
        """Waits for its end, which has to come."""
        self.process.join(timeout)
        ended = self.process.exitcode is not None
        if not ended:
            self.process.kill()
            self.process.join()
        out, err = (path.read_text() for path in self.files)
        assert ended, f"still running after {timeout} seconds: {out}{err}"
        return Outcome(self.process.exitcode, out, err)


def _run(files, environment, work, arguments):
    multiprocessing.set_start_method("fork", force=True)  # as usual, for the workers of its loaders
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts with &
    os.setsid()  # its workers and it are a group that a test can signal
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # a loader that started the server has it blocked
    os.environ.update(environment)
    sys.stdout, sys.stderr = (open(path, "w", buffering=1) for path in files)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(stream.fileno(), 1 if stream is sys.stdout else 2)
    work(*arguments)


def run_script(name: str, *arguments) -> None:
    """A script's main with these arguments."""
    import flags

    sys.argv = [name, *map(str, arguments)]
    flags.run_script(importlib.import_module(name.removesuffix(".py")).main)


def run_undrawn(name: str, *arguments) -> None:
    """The same without pictures, which take most of a tiny run's time."""
    import run

    run.Run.draw = lambda *_: None
    run_script(name, *arguments)


def group(count: int, work, *arguments, **environment) -> list[Apart]:
    """As many processes as torchrun starts on one machine; like it, this process keeps the store where they meet."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": count}
    environment |= {"LOCAL_WORLD_SIZE": count, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    processes = [Apart(work, *arguments, RANK=rank, LOCAL_RANK=rank, **environment) for rank in range(count)]
    processes[0].store = store  # kept as long as they are
    return processes


def killed_while_writing(name: str, number: int, *arguments) -> None:
    """train.py, killed when half of that checkpoint is written for the number-th time."""
    replace, times = os.replace, itertools.count(1)

    def kill(written, path):
        if path.name == name and next(times) == number:
            os.truncate(written, written.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(written, path)

    os.replace = kill
    run_undrawn("train.py", *arguments)


def on_a_full_disk(*arguments) -> None:
    """train.py where a file has at most 400 kilobytes: writing more fails half-way, in the same call."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
    run_undrawn("train.py", *arguments)


def write_slowly(path: Path) -> None:
    import checkpoint

    checkpoint.write(lambda file: (file.write(b"half"), file.flush(), print("half"), time.sleep(60)), path)


def run_started_by(method: str, *arguments) -> None:
    """train.py, whose workers are started in that way."""
    multiprocessing.set_start_method(method, force=True)
    run_undrawn("train.py", *arguments)


def reproduce_with(stand_in: Path, *arguments) -> None:
    """reproduce.py, with another script for train.py."""
    import reproduce

    reproduce.TRAIN = stand_in
    run_script("reproduce.py", *arguments)


def wait_for_signals() -> None:
    import distributed

    distributed.StopSignals()
    print("ready")
    time.sleep(60)
    time.sleep(60)


def hold_lock(folder: Path) -> None:
    import run

    run.lock(folder)
    print("held")
    time.sleep(60)


def make_run_folders(parent: Path, count: int) -> None:
    import run

    for _ in range(count):
        folder = run.new_run_folder(parent, None)
        (folder / "last.pth").touch()  # else it is removed at exit
        print(folder)


def search_and_embed(all_sets: list, path: Path) -> None:
    """The figures of metrics.retrieval in little memory, one file for each process; then few images.

    Fewer images than processes are embedded, and BatchNorm statistics are the first's.
    """
    import distributed
    import inference
    import metrics
    import torch

    class Network(torch.nn.Flatten):
        embedding_size = 2
        normalise = staticmethod(lambda images: images)

    distributed.start(-1)
    rank, count = distributed.processes()
    found = [metrics.retrieval(*sets, ks=(1, 3), precision=True, memory_gib=1e-5) for sets in all_sets]
    torch.save([retrieval.figures() for retrieval in found], f"{path}.{rank}")

    data = torch.utils.data.TensorDataset(torch.arange(4.0).view(2, 2, 1, 1), torch.tensor([7, 8]))
    loader = torch.utils.data.DataLoader(data, sampler=range(rank, 2, count), batch_size=1)
    batches = []
    embedded = inference.embed(Network(), loader, "cpu", after_batch=lambda: batches.append(1))
    assert embedded.embeddings.tolist() == [[0.0, 1.0], [2.0, 3.0]] and embedded.labels.tolist() == [7, 8], embedded
    assert len(batches) == 1  # also where there is none: all ask for signals equally often
    statistics = torch.nn.BatchNorm1d(2)
    statistics.running_mean += rank
    distributed.share_buffers(statistics)
    assert statistics.running_mean.tolist() == [0.0, 0.0], rank
    distributed.stop()


def twenty_steps(mode: str, loss_name: str, path: Path) -> None:
    """Twenty training steps on the same global batches, by as many processes as there are.

    mode is "ours" (train.py's way), or one of two ways that change the method, for the tests to tell apart:
    "local": every process builds the hypergraph of its own share; "unscaled": embeddings are gathered, but the gradient
    that comes back is not scaled to the average that DistributedDataParallel takes, as library wrappers leave it.
    """
    import distributed
    import flags
    import net
    import torch
    import train

    # In float32 rounding grows a thousandfold within as many steps, and how it does depends on the CPU.
    torch.set_default_dtype(torch.float64)
    device = distributed.start(-1)
    rank, count = distributed.processes()
    words = "--lr 1e-5 --lr-ds 1e-3 --optimizer sgd --embedding-size 16 --hgnn-hidden 8 --loss"
    args = flags.train_parser().parse([*words.split(), loss_name])[0]
    torch.manual_seed(0)
    network, criterion = net.build("timm:test_resnet", 16, "none", bn_freeze=True), train.make_criterion(6, args)
    network.set_backbone_trainable(True)
    optimizer = train.make_optimizer(network, criterion, args)
    network.train()
    network.freeze_batchnorm_statistics()
    forward, loss_of = distributed.wrap(network, device), distributed.wrap(criterion, device)
    if mode == "unscaled":
        distributed._GatherEmbeddings.backward = staticmethod(lambda ctx, grad: grad[ctx.rows])
    batches = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(20):
        images = torch.randn(8, 3, 32, 32, generator=batches)
        labels = torch.randint(6, (8,), generator=batches)
        labels[:2] = 5  # a class that only the first process sees
        labels[2:] %= 5
        share = slice(rank * 8 // count, (rank + 1) * 8 // count)
        embeddings, labels = forward(images[share]), labels[share]
        if mode != "local":
            embeddings, labels = distributed.gather_batch(embeddings, labels)
        loss = loss_of(embeddings, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if rank == 0:
        states = {"network": network.state_dict(), "criterion": criterion.state_dict()}
        torch.save({"losses": losses, **states}, path)
    distributed.stop()
