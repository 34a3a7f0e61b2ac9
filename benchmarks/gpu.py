"""Checks and measures on a GPU, in one run, everything that this project does on one.

    python benchmarks/gpu.py                        # under ten minutes on one GPU
    python benchmarks/gpu.py --only step,loss       # some of the parts
    python benchmarks/gpu.py --device cpu --quick   # does it run? small sizes, on any machine (Linux)

Nothing is downloaded, and all data are drawn. The tables are printed and written to gpu.md, their numbers to gpu.json.
A part that fails says why, and the others go on; the exit status is 1 if any part failed. `ok` is a check that must
hold; `goal` is a figure to reach and fails nothing.
"""

import argparse
import contextlib
import gc
import importlib.util
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

CODE = Path(__file__).resolve().parent.parent / "code"
sys.path.insert(0, str(CODE))

import checkpoint  # noqa: E402
import dataset  # noqa: E402
import distributed  # noqa: E402
import export  # noqa: E402
import flags  # noqa: E402
import metrics  # noqa: E402
import processes  # noqa: E402
import retrieval  # noqa: E402
import run  # noqa: E402
from layouts import glyphs  # noqa: E402
from loss import FORMS, bytes_needed, problem, relative_differences, results  # noqa: E402
from measure import Memory, Operations, free_memory, machine, table, timed, waits  # noqa: E402
from train_step import ALL, BF16, OPTIONS, PLAIN, Step, measure  # noqa: E402


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


# ---------------------------------------------------------------- does it compute the same?


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


# ---------------------------------------------------------------- how fast is it?


def measure_step(sizes: Sizes, device: torch.device) -> Rows:
    """The whole training step: plain float32, each option, all of them"""
    few, many = sizes.classes
    for batch in sizes.batches:
        words = [*sizes.large.split(), "--batch-size", str(batch)]
        options = OPTIONS if batch == sizes.batches[0] else {"plain": PLAIN, "all of them": ALL}
        plain = {}
        for name, (more, fused) in options.items():
            made = Step(words + more, fused, few, device, sizes.backend)
            bare = None
            if name == "all of them":
                bare = float(np.median(measure(made.run_network, sizes.warm_up, sizes.steps, device)[0]))
                yield {"batch": batch, "classes": "none", "options": "network alone, all of them", **rate(batch, bare)}
            for classes in (few, many) if name in ("plain", "all of them") else (few,):
                made.use_classes(classes)
                seconds, loss, gib = measure(made.train, sizes.warm_up, sizes.steps, device)
                found, share = float(np.median(seconds)), float(np.median(loss / seconds))
                plain.setdefault(classes, found)
                row = {"batch": batch, "classes": classes, "options": name, **rate(batch, found)}
                row |= {"times plain": plain[classes] / found, "loss %": 100 * share, "peak GiB": gib}
                waited = waits(made.train, device)
                row |= {"waits": waited, "ok": waited in (0, None)}
                yield row | goals_of_step(batch, classes, sizes, plain[classes] / found, share, bare and bare / found)
            del made


def rate(batch: int, seconds: float) -> dict:
    return {"ms": 1000 * seconds, "images/s": batch / seconds}


def goals_of_step(batch: int, classes: int, sizes: Sizes, speed: float, share: float, of_bare: float | None) -> dict:
    """What the fastest step has to reach; of_bare: its speed over that of the network alone, None for other steps."""
    if of_bare is None:
        return {}
    limit = 0.05 if classes == sizes.classes[0] else 0.15
    said = [goal(f"loss < {100 * limit:.0f} %", share < limit)]
    if batch == sizes.batches[0]:
        said += [goal("≥ 3 times plain", speed >= 3), goal("≥ 85 % of the network alone", of_bare >= 0.85)]
    return {"% of network alone": 100 * of_bare, "goal": "; ".join(said)}


def measure_loss(sizes: Sizes, device: torch.device) -> Rows:
    """The loss, forward and backward, against the textbook form with its (N, C, D) tensor"""
    for size in sizes.losses:
        row = {"N × C × D": " × ".join(f"{n:,}" for n in size)}
        for form in ("ours", "textbook"):
            if bytes_needed(form, *size) > 0.85 * free_memory(device):
                row |= {f"{form} ms": "too large"}
                continue
            row |= {f"{form} {name}": value for name, value in measure_form(form, size, device).items()}
        if "textbook MB" in row:
            row |= {"times as fast": row["textbook ms"] / row["ours ms"]}
        yield row


def measure_form(form: str, size: tuple[int, int, int], device: torch.device) -> dict:
    """Milliseconds, MB over parameters and their gradients, operations: of one forward and backward pass."""
    criterion, X, T = problem(*size, device)

    def step() -> None:
        criterion.zero_grad()
        X.grad = None
        FORMS[form](criterion, X, T).backward()

    milliseconds = 1000 * timed(step, device, repeats=5, warm_up=3)
    step()
    memory = Memory(device)
    FORMS[form](criterion, X, T).backward()
    used = memory.extra() / 1e6 if device.type == "cuda" else None  # a CPU's needs a process of its own: loss.py
    criterion.zero_grad()
    X.grad = None
    with Operations() as operations:
        FORMS[form](criterion, X, T).backward()
    return {"ms": milliseconds, "MB": used, "operations": operations.count}


def measure_evaluation(sizes: Sizes, device: torch.device) -> Rows:
    """The search behind the retrieval figures"""
    images, size, classes, noise, ks = retrieval.SETS[sizes.embeddings]
    X, T = map(torch.from_numpy, retrieval.make_embeddings(images, size, classes, noise))
    for name in retrieval.OURS:
        memory = Memory(device)
        arguments = (X, T, ks, device.type, torch.get_num_threads(), 1.0)
        seconds = timed(lambda name=name, arguments=arguments: retrieval.METHODS[name](*arguments), device, repeats=1)
        row = {"": name, "embeddings": f"{images:,} × {size}", "seconds": seconds}
        yield row | {"peak MB": memory.extra() / 1e6 if device.type == "cuda" else None}


def measure_loader(sizes: Sizes, device: torch.device) -> Rows:
    """From files to trained network: images per second by number of workers, all options on"""
    batch = sizes.batches[0]
    with tempfile.TemporaryDirectory() as folder:
        root = glyphs.ensure_glyphs(Path(folder), *sizes.letters, progress=False) / "images"
        images = dataset.load_benchmark("folder", root).train
        words = [*sizes.large.split(), "--batch-size", str(batch)]
        made = Step(words + ALL[0], ALL[1], images.num_classes, device, sizes.backend)
        alone = batch / float(np.median(measure(made.train, sizes.warm_up, sizes.steps, device)[0]))
        yield {"workers": "no files", "images/s": alone}
        for workers in sorted({min(count, dataset.available_cores()) for count in sizes.workers}):
            batches = dataset.make_train_loader(
                images,
                dataset.train_transform(made.args.image_size),
                batch,
                seed=1,
                workers=workers,
                pin_memory=device.type == "cuda",
            )
            made.epoch(batches)  # starts the workers
            batches.batch_sampler.set_epoch(1)
            found = made.epoch(batches)["images_per_s"]
            limit = "the step" if found > 0.9 * alone else "the loader"
            yield {"workers": workers, "images/s": found, "% of no files": 100 * found / alone, "limited by": limit}


def measure_several_gpus(sizes: Sizes, device: torch.device) -> Rows:
    """Several GPUs (torchrun, nccl, SyncBatchNorm) against one, the same batch dealt out; found: change of the loss"""
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count < 2:
        yield {"GPUs": f"{'one' if count else 'no'} GPU: not run"}
        return
    first = None
    for gpus in (1, count):
        words = f"{processes.COMMON} {processes.NETWORKS['ResNet-50, 224 pixels'][1]} --gpu-id 0 --batch-size 128"
        words += f" --workers {dataset.available_cores() // gpus}"
        rows = processes.run(gpus, words.split(), None)
        speed, loss = float(rows["images_per_s"].median()), float(rows["loss"].iloc[0])
        first = first or (speed, loss)
        times = speed / first[0]
        row = {"GPUs": gpus, "images/s": speed, "times one": times, "efficiency %": 100 * times / gpus}
        yield row | {"loss of epoch 2": loss} | at_most(abs(loss / first[1] - 1), 0.05)


PARTS = {
    "values": check_values,
    "training": check_training,
    "scores": check_scores,
    "bf16": check_bf16,
    "labels": check_labels,
    "onnx": check_onnx,
    "determinism": check_determinism,
    "step": measure_step,
    "loss": measure_loss,
    "evaluation": measure_evaluation,
    "loader": measure_loader,
    "gpus": measure_several_gpus,
}

# ---------------------------------------------------------------- the report


def run_part(name: str, sizes: Sizes, device: torch.device) -> dict:
    """The part's rows as far as it came, and why it failed, None if it did not."""
    started, rows, error = time.monotonic(), [], None
    title = PARTS[name].__doc__.splitlines()[0]
    print(f"{name}: {title}", file=sys.stderr, flush=True)
    try:
        gc.collect()  # what the part before left on the device
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for row in PARTS[name](sizes, device):
            rows.append(row)
        wrong = sum(row.get("ok") is False for row in rows)
        error = f"{wrong} of {len(rows)} checks do not hold" if wrong else None
    except Exception as problem:
        error = f"{type(problem).__name__}: {flags.one_line(problem)}"
    return {"part": name, "title": title, "seconds": time.monotonic() - started, "error": error, "rows": rows}


def cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else value
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def part_markdown(part: dict) -> str:
    head = list(dict.fromkeys(name for row in part["rows"] for name in row))
    lines = [[cell(row.get(name)) for name in head] for row in part["rows"]]
    said = [f"### {part['part']}", f"{part['title']}. {part['seconds']:.0f} s."]
    said += [table(head, lines)] if lines else []
    said += [f"FAILED: {part['error']}"] if part["error"] else []
    return "\n\n".join(said)


def head_markdown(report: dict) -> str:
    return f"## On a GPU\n\n`{report['command']}`: {report['machine']}, commit {report['commit']}"


def markdown(report: dict) -> str:
    return "\n\n".join([head_markdown(report), *map(part_markdown, report["parts"])]) + "\n"


def names_of_parts(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"there is no part {name!r}, there are {', '.join(PARTS)}")
    return names


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=gpu, help="default cuda if there is a GPU")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument(
        "--only", type=names_of_parts, default=list(PARTS), metavar="PART,…", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="for gpu.md and gpu.json, default .")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    return args


def main() -> None:
    args = parse_flags()
    checkpoint.require_folder(args.output, "--output")
    args.output.mkdir(parents=True, exist_ok=True)
    device = distributed.choose_device(0 if args.device == "cuda" else -1)
    report = {
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "machine": machine(device, torch.get_num_threads()),
        "commit": run.environment(device)["commit"],
        "parts": [],
    }
    print(head_markdown(report), flush=True)
    for name in args.only:
        part = run_part(name, QUICK if args.quick else FULL, device)
        report["parts"].append(part)
        print("\n" + part_markdown(part), flush=True)
        # After every part: whoever stops the script keeps what there is.
        checkpoint.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", args.output / "gpu.json")
        checkpoint.write_text(markdown(report), args.output / "gpu.md")
    failed = [part["part"] for part in report["parts"] if part["error"]]
    if failed:
        sys.exit(f"gpu.py: failed: {', '.join(failed)}")


if __name__ == "__main__":
    flags.run_script(main)
