"""Parts of gpu.py: how fast is a GPU, and what bounds it?"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import processes
import retrieval
import torch
from gpu_checks import Rows, Sizes, at_most, goal
from loss import FORMS, bytes_needed, problem
from measure import Memory, Operations, free_memory, timed, waits
from train_step import ALL, OPTIONS, PLAIN, Step, measure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))
import dataset  # noqa: E402
from layouts import glyphs  # noqa: E402


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
