"""Parts of gpu.py: does a GPU compute what the CPU computes, and the same bits each time?"""

import contextlib
import copy
import gc
import importlib.util
import io
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import retrieval
import torch
from loss import problem, relative_differences, results
from measure import launches, waits
from train_step import BF16, CHANNELS_LAST, RECORDED, Step, measure

CODE = Path(__file__).resolve().parent.parent / "code"
sys.path.insert(0, str(CODE))
import checkpoint  # noqa: E402
import evaluate  # noqa: E402
import flags  # noqa: E402
import metrics  # noqa: E402
import recorded  # noqa: E402
import train  # noqa: E402
from layouts import glyphs  # noqa: E402
from refused import Refused  # noqa: E402


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
    photographs: tuple[int, int, int, int]  # arguments of make_photographs: training, test, seed, classes
    loaded: tuple[int, int, int, int]  # those of the loader's part
    workers: tuple[int, ...]
    recipe: str  # flags of train.py on top of recipes/cub.args


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
    photographs=(5_864, 5_924, 0, 200),
    loaded=(3_200, 100, 0, 200),
    workers=(4, 16),
    recipe="",
)
QUICK = Sizes(
    small="--model timm:test_resnet --image-size 32 --batch-size 8 --lr 1e-4",
    training_steps=6,
    large="--model timm:test_resnet --image-size 32",
    batches=(8,),
    classes=(10, 100),
    warm_up=1,
    steps=2,
    backend="eager",  # compiles nothing: compiling would take longer than everything else together
    losses=((32, 100, 64),),
    embeddings="quick",
    run="--model timm:test_resnet --epochs 2 --image-size 32 --embedding-size 16 --hgnn-hidden 16 --batch-size 8 "
    "--workers 0",
    run_letters=(4, 8, 32),
    photographs=(24, 8, 0, 8),
    loaded=(32, 4, 0, 8),
    workers=(1, 2),
    recipe="--model timm:test_resnet --image-size 32 --embedding-size 16 --hgnn-hidden 16 --batch-size 8",
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
    steps = sizes.training_steps
    batches = random_batches(sizes, steps)

    def losses(place: torch.device, nudged: bool = False) -> np.ndarray:
        step = Step(sizes.small.split(), True, CLASSES, place)
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


CLASSES = 20  # of random batches


class Batches(list):
    """Stands in for a training loader, with what a message about a diverged step asks it for."""

    dataset = SimpleNamespace(images=SimpleNamespace(paths=["a picture"]))
    batch_sampler = SimpleNamespace(whole=lambda: [[(0, 0)]] * 100)


def random_batches(sizes: Sizes, steps: int) -> Batches:
    """For the small network."""
    generator = torch.Generator().manual_seed(1)
    args = flags.train_parser().parse(sizes.small.split())[0]
    shape = (args.sz_batch, 3, args.image_size, args.image_size)
    return Batches(
        (
            torch.randint(256, shape, dtype=torch.uint8, generator=generator),
            torch.randint(CLASSES, shape[:1], generator=generator),
        )
        for _ in range(steps)
    )


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

    same = all(torch.equal(criterion(X, labels), criterion(X, T)) for labels in (T.cpu(), T.int()))
    yield {"check": "labels on the CPU, or of another type, give the same", "found": same, "ok": same}

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
        evaluate.to_onnx(step.network.cpu(), step.args.image_size, Path(folder, "network.onnx"))
    yield {"check": said.getvalue().strip().rpartition("network.onnx ")[2].strip("()"), "ok": True}


def check_determinism(sizes: Sizes, device: torch.device) -> Rows:
    """train.py --deterministic, started several times at once: tensors of last.pth that differ in any bit"""
    killed = "killed (SIGKILL) and resumed"
    runs, resumed = {"once": [], killed: []}, {killed: []}
    if device.type == "cuda":
        float32 = ["--amp", "off", *RECORDED]
        runs |= {"run twice": [], "once, float32": float32[:2]}
        for way, more in (("", []), (" eagerly", ["--cuda-graphs", "0"])):
            runs[f"recorded, {killed}{way}"], resumed[f"recorded, {killed}{way}"] = float32, more
    for name, found in train_at_once(sizes, device, runs, resumed).items():
        if isinstance(found, str):
            yield {"run": name, "found": found, "ok": False}
        elif name.startswith("once"):
            once = found
        else:
            yield {"run": name, "tensors": len(once)} | at_most(count_differing(once, found), 0)


def count_differing(one: list[torch.Tensor], two: list[torch.Tensor]) -> int:
    return sum(not torch.equal(a, b) for a, b in zip(one, two, strict=True))


def train_at_once(sizes: Sizes, device: torch.device, runs: dict, resumed: dict) -> dict[str, list[torch.Tensor] | str]:
    """By name of a run of train.py the tensors in its last.pth, or why it failed. All start at once.

    runs: their flags; resumed: names of those that are killed after an epoch, and flags to resume them with
    """

    def outcome(name: str) -> list[torch.Tensor] | str:
        try:
            wait_for(running[name], logs[name])
            return tensors(checkpoint.load(saved[name]))
        except RuntimeError as error:
            return str(error)

    with tempfile.TemporaryDirectory() as folder:
        images = glyphs.ensure_glyphs(Path(folder), *sizes.run_letters) / "images"
        words = ["@recipes/glyphs.args", *sizes.run.split(), "--dataset", "folder", "--data-root", str(images)]
        words += ["--deterministic", "--gpu-id", "-1" if device.type == "cpu" else "0"]
        logs = {name: Path(folder, str(number)) for number, name in enumerate(runs)}
        saved = {name: path / "folder" / "run_1" / "last.pth" for name, path in logs.items()}
        running = {name: start([*words, *runs[name], "--log-dir", str(logs[name])], logs[name]) for name in runs}
        try:
            for name, more in resumed.items():
                if killed_after_an_epoch(running[name], saved[name].with_name("results.csv")):
                    running[name] = start(["--resume", str(saved[name]), *more], logs[name])
            return {name: outcome(name) for name in runs}
        finally:
            for process in running.values():
                process.kill()


def start(words: list[str], logs: Path) -> subprocess.Popen:
    logs.mkdir(exist_ok=True)
    with open(logs / "output.txt", "w") as output:
        return subprocess.Popen([sys.executable, str(CODE / "train.py"), *words], stdout=output, stderr=output)


def wait_for(process: subprocess.Popen, logs: Path) -> None:
    if process.wait():
        said = (logs / "output.txt").read_text().strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"train.py ended with status {process.returncode}: {said[-1]}")


def killed_after_an_epoch(process: subprocess.Popen, results: Path) -> bool:
    """False if it failed before that. Raises RuntimeError if it was through before it could be killed."""
    while not (results.exists() and len(results.read_text().splitlines()) > 2):  # names, untrained, one epoch
        if process.poll() is not None:
            break
        time.sleep(0.005)
    process.kill()
    if process.wait() == 0:
        raise RuntimeError("train.py ended before it could be killed")
    return process.returncode == -signal.SIGKILL


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# ---------------------------------------------------------------- the recorded step


def check_graph(sizes: Sizes, device: torch.device) -> Rows:
    """The recorded step (--cuda-graphs 1) against the eager one"""
    yield {"of": "steps on this device", "found": recorded.way(device)}
    steps = max(1 + recorded.EAGER_STEPS, sizes.training_steps // 5)
    for name, words, limit in (("float32", [], 0.0), ("bf16, channels last", BF16 + CHANNELS_LAST, 0.1)):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            eager, again = (trajectory(sizes, device, words + more, steps) for more in ([], RECORDED))
        refused = " ".join(said.getvalue().split())  # without this row, the others would compare eager with eager
        yield {"of": f"{name}: what could not be recorded", "found": refused or "nothing", "ok": not refused}
        row = {"of": f"{name}: loss in the warm-up and at falling rates, {len(eager[0])} steps (relative)"}
        yield row | at_most(float(np.abs(again[0] / eager[0] - 1).max()), limit)
        differ, row = count_differing(eager[1], again[1]), {"of": f"{name}: tensors that differ, random state included"}
        yield row | (at_most(differ, 0) if limit == 0 else {"found": differ})
    once, again = (trajectory(sizes, device, RECORDED, steps, resumed)[1] for resumed in (False, True))
    yield {"of": "float32: tensors that differ when it is resumed"} | at_most(count_differing(once, again), 0)
    yield {"of": "a loss that is not finite"} | stopped_by_divergence(sizes, device)
    yield from graph_costs(sizes, device)


def trajectory(sizes: Sizes, device: torch.device, words: list[str], steps: int, resumed: bool = False) -> tuple:
    """Losses of a warm-up and two epochs whose rates are halved after each, and all tensors at their end.

    resumed: before the last epoch, everything goes on in new objects, as from a checkpoint.
    """

    def make() -> tuple[Step, list]:
        made = Step([*sizes.small.split(), "--bn-freeze", "0", *words], True, CLASSES, device)
        train.seed_everything(1, deterministic=True)
        return made, [made.network, made.criterion, made.optimizer]

    (made, parts), batches, losses = make(), random_batches(sizes, steps), []
    try:
        for backbone, fresh in ((False, False), (True, False), (True, resumed)):
            if fresh:
                states = [copy.deepcopy(part.state_dict()) for part in parts]
                made, parts = make()
                for part, state in zip(parts, states, strict=True):
                    part.load_state_dict(state)
            made.start_phase(backbone)
            losses += [made.epoch([batch])["loss"] for batch in batches]
            for group in made.optimizer.param_groups:
                group["lr"] /= 2
    finally:
        torch.use_deterministic_algorithms(False)
    random = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if device.type == "cuda" else [])
    return np.array(losses), tensors([[part.state_dict() for part in parts], random])


def stopped_by_divergence(sizes: Sizes, device: torch.device) -> dict:
    """What train_epoch makes of it in a recorded step: it names the step and leaves every parameter as it was."""
    made, batches = Step([*sizes.small.split(), *RECORDED], True, CLASSES, device), random_batches(sizes, 6)
    made.epoch(batches)
    with torch.no_grad():
        made.criterion.hgnn.theta2.bias[0] = torch.inf
    parameters = [parameter for group in made.optimizer.param_groups for parameter in group["params"]]
    before, said = [parameter.detach().clone() for parameter in parameters], "not noticed"
    try:
        made.epoch(batches)
    except Refused as error:
        said = str(error).partition(" (")[0]
    changed = count_differing(before, parameters)
    return {"found": f"{said}; {changed} parameters changed", "ok": "step 1 of 6" in said and not changed}


def graph_costs(sizes: Sizes, device: torch.device) -> Rows:
    """Time, memory and launches of the large network's step at the first of the batch sizes, eager and recorded."""
    words, costs = [*sizes.large.split(), "--batch-size", str(sizes.batches[0]), *BF16, *CHANNELS_LAST], []
    for more in ([], RECORDED):
        made = Step(words + more, True, sizes.classes[0], device)
        seconds, loss, _ = measure(made.train, sizes.warm_up, sizes.steps, device)
        cost = {"ms a step": 1000 * float(np.median(seconds)), "ms of it the loss": 1000 * float(np.median(loss))}
        cost["GiB held, scoring in between"] = memory_with_scoring(made)
        costs.append(cost | {"launches a step": launches(made.train, device)})
        del made
    for what, eager in costs[0].items():
        row = {"of": f"bf16, channels last: {what}", "eager": eager, "recorded": costs[1][what]}
        if what.startswith("GiB") and device.type == "cuda":
            row["goal"] = goal("≤ 2.5 GiB", row["recorded"] <= 2.5)
        yield row


def memory_with_scoring(made: Step) -> float | None:
    """GiB that torch held at most: what is recorded stays in a pool of its own, which scoring cannot use."""
    if made.device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(made.device)
    made.train(3)
    made.score()
    made.train(3)
    return torch.cuda.max_memory_reserved(made.device) / 2**30
