"""Parts of gpu.py: does a GPU compute what the CPU computes, and the same bits each time?"""

import contextlib
import importlib.util
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import retrieval
import torch
from loss import problem, relative_differences, results
from measure import waits
from train_step import BF16, Step

CODE = Path(__file__).resolve().parent.parent / "code"
sys.path.insert(0, str(CODE))
import checkpoint  # noqa: E402
import export  # noqa: E402
import flags  # noqa: E402
import metrics  # noqa: E402
from layouts import glyphs  # noqa: E402


class Sizes(NamedTuple):
    """How much is computed. The small network trains on the CPU too, the large one is what is measured."""

    small: str  # flags of train.py
    training_steps: int
    large: str
    batches: tuple[int, ...]
    classes: tuple[int, int]
    warm_up: int
    steps: int
    backend: str  # of torch.compile
    losses: tuple[tuple[int, int, int], ...]  # N, C, D
    embeddings: str  # a key of retrieval.SETS
    run: str  # flags of train.py on top of recipes/glyphs.args
    run_letters: tuple[int, int, int]  # classes, images of each, pixels
    letters: tuple[int, int, int]
    workers: tuple[int, ...]


FULL = Sizes(
    small="--model resnet18 --image-size 64 --batch-size 32 --lr 1e-4",
    training_steps=50,
    large="--model resnet50 --image-size 224",
    batches=(32, 128),
    classes=(100, 11_318),
    warm_up=10,
    steps=30,
    backend="inductor",
    losses=((32, 100, 512), (32, 11_318, 512), (180, 11_318, 512)),
    embeddings="sop",
    run="--epochs 6",
    run_letters=(40, 20, 64),
    letters=(400, 16, 224),
    workers=(4, 8, 16),
)
QUICK = Sizes(
    small="--model resnet18 --image-size 32 --batch-size 8 --lr 1e-4",
    training_steps=6,
    large="--model resnet18 --image-size 32",
    batches=(8,),
    classes=(10, 100),
    warm_up=1,
    steps=2,
    backend="eager",  # compiles nothing: compiling would take longer than everything else together
    losses=((32, 100, 64),),
    embeddings="quick",
    run="--epochs 2 --image-size 32 --embedding-size 16 --hgnn-hidden 16 --batch-size 8 --workers 0",
    run_letters=(4, 8, 32),
    letters=(8, 8, 32),
    workers=(1, 2),
)
Rows = Iterator[dict]


def at_most(found: float, limit: float) -> dict:
    return {"found": found, "at most": limit, "ok": bool(found <= limit)}


def goal(text: str, reached: bool) -> str:
    return f"{text}: {'reached' if reached else 'not reached'}"


def check_values(sizes: Sizes, device: torch.device) -> Rows:
    """The loss and its gradients, device against CPU (relative; theta 1 is what the BatchNorm after it cancels)"""
    limits = {"loss": 1e-5, "all gradients": 1e-4, "worst but theta 1": 1e-3, "theta 1": 1e-2}
    for size in sizes.losses:
        computed = []
        for place in (device, "cpu"):
            criterion, X, T = problem(*size, place)
            loss = criterion(X, T)
            loss.backward()
            computed.append(results(loss, criterion, X))
        for name, found in relative_differences(*computed).items():
            yield {"N × C × D": " × ".join(f"{n:,}" for n in size), "of": name} | at_most(found, limits[name])


def check_training(sizes: Sizes, device: torch.device) -> Rows:
    """Training in float32, device against CPU: relative difference of the loss of a step, beside that of rounding

    Training amplifies rounding. How much shows a CPU run whose first layer is nudged to the next float32 numbers.
    """
    steps, generator = sizes.training_steps, torch.Generator().manual_seed(1)
    args = flags.train_parser().parse(sizes.small.split())[0]
    shape, classes = (args.sz_batch, 3, args.image_size, args.image_size), 20
    batches = [
        (
            torch.randint(256, shape, dtype=torch.uint8, generator=generator),
            torch.randint(classes, shape[:1], generator=generator),
        )
        for _ in range(steps)
    ]

    def losses(place: torch.device, nudged: bool = False) -> np.ndarray:
        step = Step(sizes.small.split(), True, classes, place)
        if nudged:
            weight = next(step.network.parameters()).data
            weight.copy_(weight.nextafter(weight.new_tensor(torch.inf)))
        return np.array([step.epoch([batch])["loss"] for batch in batches])

    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        on_device = losses(device)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    on_cpu, rounded = losses(torch.device("cpu")), losses(torch.device("cpu"), nudged=True)
    for first, last in ((1, 3), (4, 10), (11, 25), (26, 50)):
        if first <= steps:
            part = slice(first - 1, last)
            drift, rounding = (np.abs(found / on_cpu - 1)[part].max() for found in (on_device, rounded))
            row = {"steps": f"{first} to {min(last, steps)}", "nudged CPU": float(rounding), "device": float(drift)}
            yield row | ({"at most": 1e-4, "ok": bool(drift <= 1e-4)} if first == 1 else {})


def check_scores(sizes: Sizes, device: torch.device) -> Rows:
    """Retrieval figures (R@K, R-precision, MAP@R), device against CPU: largest difference"""
    images, size, classes, noise, ks = retrieval.SETS["quick"]
    random = torch.Generator().manual_seed(0)
    corners = torch.randint(2, (1000, 16), generator=random) * 2.0 - 1  # every similarity exact, most of them tied
    sets = {
        "classes around centres": (*map(torch.from_numpy, retrieval.make_embeddings(images, size, classes, noise)), ks),
        "corners of a cube, full of ties": (corners, torch.randint(20, (1000,), generator=random), (1, 2, 4, 8)),
    }
    for name, (X, T, ks) in sets.items():
        one, two = (metrics.retrieval(X, T, ks=ks, precision=True, device=place).figures() for place in (device, "cpu"))
        # Rounding may swap two neighbours that are nearly as close. It cannot where similarities are exact.
        limit = 1 / len(X) if X is not corners else 1e-12
        yield {"embeddings": name} | at_most(max(abs(one[key] - two[key]) for key in two), limit)


def check_bf16(sizes: Sizes, device: torch.device) -> Rows:
    """bf16 autocast on the device against float32 on the CPU, untrained network (relative)"""
    step = Step([*sizes.large.split(), "--batch-size", "8", *BF16], True, sizes.classes[0], torch.device("cpu"))
    network, images, labels = step.network.eval(), step.images, step.labels
    with torch.no_grad():
        exact, criterion = network(network.normalise(images)), step.criterion.eval()
        expected = criterion(exact, labels)
        network.to(device), criterion.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            embeddings = network(network.normalise(images.to(device)))
            loss = criterion(embeddings, labels)
        again = criterion(embeddings.float(), labels)
    difference = (embeddings.float().cpu() - exact).norm() / exact.norm()
    yield {"of": "embeddings"} | at_most(float(difference), 0.05)
    yield {"of": "loss"} | at_most(abs(float(loss) / float(expected) - 1), 0.02)
    yield {"of": "loss, from these embeddings in float32"} | at_most(abs(float(loss) / float(again) - 1), 0.0)


def check_labels(sizes: Sizes, device: torch.device) -> Rows:
    """The loss checks labels that are on the device without waiting for it"""
    criterion, X, T = problem(*sizes.losses[0], device)
    for impossible in (-1, criterion.num_classes):
        wrong, caught_by = T.clone(), "no call"
        wrong[0] = impossible
        for call, batch in (("this call", wrong), ("the next call", T)):
            try:
                criterion(X, batch)
            except ValueError:
                caught_by = call
                break
        expected = "the next call" if device.type == "cuda" else "this call"
        yield {"check": f"label {impossible}, reported by", "found": caught_by, "ok": caught_by == expected}

    def steps(count: int) -> None:
        for _ in range(count):
            criterion(X, T).backward()

    found = waits(steps, device)
    yield {"check": "waits in ten calls, backward included", "found": found, "ok": found in (0, None)}


def check_onnx(sizes: Sizes, device: torch.device) -> Rows:
    """ONNX export after training on the device"""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        yield {"check": f"not run: {missing[0]} is not installed"}
        return
    step = Step(sizes.small.split(), True, sizes.classes[0], device)
    step.train(2)
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said):
        export.to_onnx(step.network.cpu(), step.args.image_size, Path(folder, "network.onnx"))
    yield {"check": said.getvalue().strip().rpartition("network.onnx ")[2].strip("()"), "ok": True}


def check_determinism(sizes: Sizes, device: torch.device) -> Rows:
    """train.py --deterministic, started three times at once: tensors of last.pth that differ in any bit"""
    with tempfile.TemporaryDirectory() as folder:
        images = glyphs.ensure_glyphs(Path(folder), *sizes.run_letters, progress=False) / "images"
        words = ["@recipes/glyphs.args", *sizes.run.split(), "--dataset", "folder", "--data-root", str(images)]
        words += ["--deterministic", "--gpu-id", "-1" if device.type == "cpu" else "0"]
        logs = {name: Path(folder, name) for name in ("once", "again", "killed")}
        saved = {name: path / "folder" / "run_1" / "last.pth" for name, path in logs.items()}
        running = {name: start([*words, "--log-dir", str(path)], path) for name, path in logs.items()}
        try:
            kill_after_an_epoch(running["killed"], saved["killed"].with_name("results.csv"))
            running["killed"] = start(["--resume", str(saved["killed"])], logs["killed"])
            for name, process in running.items():
                if process.wait():
                    raise RuntimeError(f"train.py ended with status {process.returncode}: {last_line(logs[name])}")
        finally:
            for process in running.values():
                process.kill()
        once, *others = (tensors(path) for path in saved.values())
        for name, other in zip(("run twice", "killed (SIGKILL) and resumed"), others, strict=True):
            differ = sum(not torch.equal(a, b) for a, b in zip(once, other, strict=True))
            yield {"run": name, "tensors": len(once)} | at_most(differ, 0)


def start(words: list[str], logs: Path) -> subprocess.Popen:
    logs.mkdir(exist_ok=True)
    with open(logs / "output.txt", "w") as output:
        return subprocess.Popen([sys.executable, str(CODE / "train.py"), *words], stdout=output, stderr=output)


def last_line(logs: Path) -> str:
    return ((logs / "output.txt").read_text().strip().splitlines() or ["it said nothing"])[-1]


def kill_after_an_epoch(process: subprocess.Popen, results: Path) -> None:
    while not (results.exists() and len(results.read_text().splitlines()) > 2):  # names, untrained, one epoch
        if process.poll() is not None:
            raise RuntimeError(f"train.py ended before it could be killed: {last_line(results.parents[2])}")
        time.sleep(0.005)
    process.kill()
    process.wait()


def tensors(path: Path) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(checkpoint.load(path))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
