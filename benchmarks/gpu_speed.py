"""Parts of gpu.py: how fast is a GPU, and what bounds it?"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import processes
import retrieval
import torch
from gpu_checks import Rows, Sizes, at_most, goal, start, wait_for
from loss import FORMS, bytes_needed, problem
from measure import Memory, Operations, alone, free_memory, timed, waits
from photographs import make_photographs
from train_step import ALL, BF16, CHANNELS_LAST, OPTIONS, PLAIN, RECORDED, Step, measure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))
import dataset  # noqa: E402
import flags  # noqa: E402
import recorded  # noqa: E402

CUB_STEPS = 183  # of an epoch, at a batch of 32


# What the step with all options has to reach, by batch and classes: ms, % that the loss takes of it.
GOALS = {(32, 100): (7, 8), (32, 11_318): (8, 15), (128, 100): (16.5, 8), (128, 11_318): (16.5, 15)}


def measure_step(sizes: Sizes, device: torch.device) -> Rows:
    """The whole training step: without flags, with each option, with all of them"""
    few, many = sizes.classes
    for batch in sizes.batches:
        words = [*sizes.large.split(), "--batch-size", str(batch)]
        options = {"no flags": PLAIN, "all of them": ALL}
        if batch == sizes.batches[0]:
            left_out = "compiled network" if device.type == "cuda" else "recorded"  # it takes long, it cannot be
            options = {name: more for name, more in OPTIONS.items() if left_out not in name}
        plain = {}
        for name, (more, fused) in options.items():
            made = Step(words + more, fused, few, device, sizes.backend)
            bare = None
            if name == "all of them":
                bare = float(np.median(measure(made.run_network, sizes.warm_up, sizes.steps, device)[0]))
                yield {"batch": batch, "classes": "none", "options": "network alone, all of them", **rate(batch, bare)}
            for classes in (few, many) if name in ("no flags", "all of them") else (few,):
                made.use_classes(classes)
                seconds, loss, gib = measure(made.train, sizes.warm_up, sizes.steps, device)
                found, share = float(np.median(seconds)), float(np.median(loss / seconds))
                plain.setdefault(classes, found)
                row = {"batch": batch, "classes": classes, "options": name, **rate(batch, found)}
                row |= {"times no flags": plain[classes] / found, "loss %": 100 * share, "peak GiB": gib}
                waited = waits(made.train, device)
                row |= {"waits": waited, "ok": waited in (0, None)}
                yield row | (bare_and_goals((batch, classes), found, share, bare) if bare else {})
            del made


def rate(batch: int, seconds: float) -> dict:
    return {"ms": 1000 * seconds, "images/s": batch / seconds}


def bare_and_goals(size: tuple[int, int], found: float, share: float, bare: float) -> dict:
    """For the step with all options: what it is to the network alone, and its goals. Times in seconds, share of 1."""
    if size not in GOALS:  # of a quick run
        return {}
    most_ms, most_share = GOALS[size]
    said = [goal(f"≤ {most_ms} ms", 1000 * found <= most_ms), goal(f"loss ≤ {most_share} %", 100 * share <= most_share)]
    said += [goal("≥ 90 % of the network alone", bare / found >= 0.9)]
    return {"% of network alone": 100 * bare / found, "goal": "; ".join(said)}


def measure_loss(sizes: Sizes, device: torch.device) -> Rows:
    """The loss, forward and backward, against the textbook form with its (N, C, D) tensor"""
    for size in sizes.losses:
        row = {"N × C × D": " × ".join(f"{n:,}" for n in size)}
        for form in ("ours", "textbook") if recorded.refusal(device) else ("ours", "recorded", "textbook"):
            if bytes_needed(form, *size) > 0.85 * free_memory(device):
                row |= {f"{form} ms": "too large"}
                continue
            row |= {f"{form} {name}": value for name, value in measure_form(form, size, device).items()}
        if "textbook MB" in row:
            row |= {"times as fast": row["textbook ms"] / row["ours ms"]}
        yield row


def measure_form(form: str, size: tuple[int, int, int], device: torch.device) -> dict:
    """Milliseconds, MB over parameters and their gradients, operations: of one forward and backward pass.

    Recorded, the operations are those around the two launches.
    """
    (criterion, X, T), compute = problem(*size, device), FORMS["ours" if form == "recorded" else form]
    if form == "recorded":
        recorded.record(torch.nn.Identity(), criterion)

    def step() -> None:
        criterion.zero_grad()
        X.grad = None
        compute(criterion, X, T).backward()

    milliseconds = 1000 * timed(step, device, repeats=5, warm_up=2 + recorded.EAGER_STEPS)
    step()
    memory, used = Memory(device), None  # a CPU's needs a process of its own: loss.py; a recording's is a pool apart
    compute(criterion, X, T).backward()
    if device.type == "cuda" and form != "recorded":
        used = memory.extra() / 1e6
    criterion.zero_grad()
    X.grad = None
    with Operations() as operations:
        compute(criterion, X, T).backward()
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


def measure_convolutions(sizes: Sizes, device: torch.device) -> Rows:
    """cuDNN's search for the fastest convolutions against its heuristics: what it costs once and saves per step"""
    if device.type != "cuda":
        yield {"network": "no GPU: not run"}
        return
    networks = {
        "ResNet-50, 224 pixels, float32": "--model resnet50 --image-size 224",
        "the same, bf16, channels last": "--model resnet50 --image-size 224 --amp bf16 --channels-last 1",
        "EfficientNet-Lite0, 64 pixels": "--model timm:tf_efficientnet_lite0 --image-size 64 --channels-last 1",
    }
    for name, words in networks.items():  # each in a process of its own: cuDNN remembers what it found
        (first, usual), (first_searched, searched) = alone(time_convolutions, words.split(), sizes.warm_up, sizes.steps)
        lost, gained = first_searched - first, usual - searched
        row = {"network": name, "ms, heuristics": 1000 * usual, "ms, searched": 1000 * searched, "s lost once": lost}
        in_ten = 10 * CUB_STEPS * gained
        yield row | {"s saved in ten epochs of CUB": in_ten, "faster": "searched" if in_ten > lost else "heuristics"}


def time_convolutions(words: list[str], warm_up: int, steps: int) -> list[tuple[float, float]]:
    """(seconds of the first steps and a batch of scoring, seconds of a later step): by heuristics, then searched."""
    device, found = torch.device("cuda"), []
    Step(words, True, 100, device).train(1)  # loads what is loaded once
    for searched in (False, True):
        made = Step(words, True, 100, device)
        torch.backends.cudnn.benchmark = searched
        torch.cuda.synchronize()
        started = time.perf_counter()
        made.train(3)
        made.score()
        torch.cuda.synchronize()
        first = time.perf_counter() - started
        found.append((first, float(np.median(measure(made.train, warm_up, steps, device)[0]))))
    return found


def measure_loader(sizes: Sizes, device: torch.device) -> Rows:
    """From files of CUB's size to the trained network: images per second by number of workers, all options on"""
    batch, on_gpu = sizes.batches[0], device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        images = dataset.load_benchmark("cub", make_photographs(Path(folder), *sizes.loaded)).train
        words = [*sizes.large.split(), "--batch-size", str(batch)]
        made = Step(words + ALL[0], ALL[1], images.num_classes, device, sizes.backend)
        no_files = batch / float(np.median(measure(made.train, sizes.warm_up, sizes.steps, device)[0]))
        yield {"workers": "no files", "images/s": no_files}
        for workers in sorted({min(count, dataset.available_cores()) for count in sizes.workers}):
            transform = dataset.train_transform(made.args.image_size)
            batches = dataset.make_train_loader(images, transform, batch, seed=1, workers=workers, pin_memory=on_gpu)
            made.epoch(batches)  # starts the workers
            batches.batch_sampler.set_epoch(1)
            started = time.perf_counter()
            decoded = sum(len(labels) for _, labels in batches) / (time.perf_counter() - started)
            batches.batch_sampler.set_epoch(2)
            found = made.epoch(batches)["images_per_s"]
            row = {"workers": workers, "images/s": found, "% of no files": 100 * found / no_files}
            row |= {"loader alone images/s": decoded, "limited by": bound(1 - found / no_files)}
            reached = found >= 0.9 * min(no_files, decoded)
            yield row | {"goal": goal("≥ 90 % of no files, or of the loader alone", reached)}


def bound(waited: float) -> str:
    """What bounds an epoch that waited for images for this share of its time."""
    return "the loader" if waited > 0.1 else "the step"


def measure_epoch(sizes: Sizes, device: torch.device) -> Rows:
    """recipes/cub.args from random weights, without a warm-up, on JPEGs of CUB's number and size: train.py's epochs"""
    with tempfile.TemporaryDirectory() as folder:
        words = ["@recipes/cub.args", "--weights", "none", "--warm", "0", "--epochs", "3", *sizes.recipe.split()]
        words += [*BF16, *CHANNELS_LAST, *RECORDED, "--workers", str(dataset.available_cores()), "--log-dir", folder]
        words += ["--data-root", str(make_photographs(Path(folder), *sizes.photographs))]
        started, logs = time.monotonic(), Path(folder, "said")
        wait_for(start([*words, "--gpu-id", "0" if device.type == "cuda" else "-1"], logs), logs)
        seconds = time.monotonic() - started
        rows = pd.read_csv(Path(folder, "cub", "run_1", "results.csv")).query("phase == 'train'")
    batch = flags.train_parser().parse(words)[0].sz_batch
    images = sizes.photographs[0] // batch * batch
    for row in rows.to_dict("records"):
        to_train = images / row["images_per_s"]
        yield {
            "epoch": row["epoch"],
            "images/s": row["images_per_s"],
            "s to train": to_train,
            "s to score": row["seconds"] - to_train,
            "s in all": row["seconds"],
            "% waited for images": 100 * row["data_time"],
            "bounded by": bound(row["data_time"]),
        } | ({"goal": goal("≤ 4 s", row["seconds"] <= 4)} if row["epoch"] == 3 else {})
    yield {"epoch": "the whole command", "s in all": seconds}


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
