"""Measures the data side, each figure against what one would use instead, in one run (Linux, no GPU needed):

- setting up Stanford Online Products, 120,053 files: seconds until the first batch is drawn up, and the
  memory that this takes on top of the imported libraries, each in a process of its own; against the reader
  of pytorch-metric-learning and torchvision's ImageFolder on the same tree;
- one worker process: images per second of its CPU time, which other load on the machine hardly touches, for what
  the training loader hands over (bytes, normalised on the device) and for ImageFolder with torchvision's usual
  transforms, which normalise in the worker;
- decoding and augmenting: images per second of the training loader by number of workers, against a plain ImageFolder
  loader with the usual transforms and the same batch size, taking turns. benchmarks/train_step.py measures what the
  training step takes;
- photographs of 12 megapixels, as they are and after prepare.py shrink.

    python benchmarks/loader.py                          # some minutes on two cores
    python benchmarks/loader.py --images 5864            # as many as CUB trains on
    python benchmarks/loader.py --quick                  # does it run? half a minute
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))


def write_sop(root: Path, num_images: int, num_classes: int = 22_634) -> None:
    """The lists of Stanford Online Products, its 12 folders and its file names; the files are empty."""
    home = root / "Stanford_Online_Products"
    for product in range(12):
        (home / f"product_{product:02d}_final").mkdir(parents=True)
    rows = {"train": [], "test": []}
    for i in range(num_images):
        class_id = 1 + i * num_classes // num_images
        product = class_id % 12
        path = f"product_{product:02d}_final/1112{class_id:08d}_{i % 7}.JPG"
        (home / path).touch()
        split = "train" if class_id <= 11_318 else "test"
        rows[split].append(f"{i + 1} {class_id} {product + 1} {path}")
    for split, lines in rows.items():
        text = "\n".join(["image_id class_id super_class_id path", *lines])
        (home / f"Ebay_{split}.txt").write_text(text + "\n")


def memory(field: str) -> float:
    """MB of VmRSS (now) or VmHWM (highest) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def set_up_ours(root: Path):
    import dataset

    transform = dataset.train_transform()
    yield
    benchmark = dataset.load_benchmark("SOP", root)
    train = dataset.make_train_loader(benchmark.train, transform, 32, seed=1)
    next(iter(train.batch_sampler))
    yield benchmark, train, dataset.make_eval_loader(benchmark.query, transform, 32)


def set_up_metric_learning(root: Path):
    from pytorch_metric_learning.datasets import StanfordOnlineProducts
    from torch.utils.data import DataLoader

    yield
    train, test = (StanfordOnlineProducts(str(root), split=split) for split in ("train", "test"))
    loader = DataLoader(train, 32, shuffle=True)
    next(iter(loader.batch_sampler))
    yield train, test, loader


def set_up_image_folder(root: Path):
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    yield
    images = ImageFolder(str(root / "Stanford_Online_Products"))  # 12 classes: it knows nothing of the lists
    loader = DataLoader(images, 32, shuffle=True)
    next(iter(loader.batch_sampler))
    yield images, loader


def measure_set_up(kind: str, root: Path, results) -> None:
    steps = {
        "this project": set_up_ours,
        "pytorch-metric-learning": set_up_metric_learning,
        "ImageFolder (no split)": set_up_image_folder,
    }[kind](root)
    next(steps)  # imports
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from here
    start = time.perf_counter()
    kept = next(steps)  # named, or else it would be freed before its memory is measured
    seconds = time.perf_counter() - start
    results.put((seconds, memory("VmHWM") - before, memory("VmRSS") - before, before))
    del kept


def bench_set_up(root: Path, num_files: int, repeats: int) -> None:
    write_sop(root, num_files)
    print(f"\nset-up, Stanford Online Products, {num_files:,} files (median of {repeats}, files in the page cache)")
    print(f"{'':<26}{'seconds':>9}{'peak MB':>9}{'kept MB':>9}{'imports alone MB':>18}")
    context = multiprocessing.get_context("spawn")
    for kind in ("this project", "pytorch-metric-learning", "ImageFolder (no split)"):
        rows = []
        for _ in range(repeats):
            results = context.Queue()
            process = context.Process(target=measure_set_up, args=(kind, root, results))
            process.start()
            rows.append(results.get(timeout=300))
            process.join()
        seconds, peak, kept, imports = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{kind:<26}{seconds:>9.2f}{peak:>9.0f}{kept:>9.0f}{imports:>18.0f}")


def usual_transform(size: int):
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def stamped(batch):
    """Collates, and adds the CPU seconds that this worker process has used so far."""
    from torch.utils.data import default_collate

    return default_collate(batch), time.process_time()


def bench_worker(folder: Path, size: int, repeats: int) -> None:
    from dataset import ImageDataset, ImageList, RandomBatches, train_transform
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    plain = ImageFolder(str(folder), usual_transform(size))
    paths = [os.path.relpath(path, folder) for path, _ in plain.samples]
    images = ImageList(folder, paths, np.array(plain.targets), plain.classes)
    options = {"num_workers": 1, "persistent_workers": True, "collate_fn": stamped}
    batches = RandomBatches(images.labels, 32, seed=1)
    loaders = {
        "this project: bytes": DataLoader(
            ImageDataset(images, train_transform(size)), batch_sampler=batches, **options
        ),
        "ImageFolder: floats": DataLoader(plain, 32, shuffle=True, drop_last=True, **options),
    }
    rates = {kind: [] for kind in loaders}
    for turn in range(repeats + 1):
        for kind, loader in loaders.items():
            seconds = [now for _, now in loader]
            if turn > 0:  # the first turn starts the workers and fills the page cache
                rates[kind].append(32 * (len(seconds) - 1) / (seconds[-1] - seconds[0]))
    print(f"\none worker, {size}×{size}, batch 32 ({repeats} epochs of {len(images):,} images each, taking turns)")
    print(f"{'':<26}{'images per CPU s':>18}{'lowest':>9}{'highest':>9}")
    for kind, values in rates.items():
        print(f"{kind:<26}{statistics.median(values):>18.0f}{min(values):>9.0f}{max(values):>9.0f}")


def bench_large(photos: Path, root: Path, count: int, repeats: int) -> None:
    import prepare
    from PIL import Image

    random = np.random.RandomState(0)
    for number, path in enumerate(sorted(photos.rglob("*.jpg"))[:count]):
        pixels = np.asarray(Image.open(path).resize((4000, 3000), Image.Resampling.BICUBIC), np.float32)
        pixels += random.normal(0, 6, (3000, 4000, 1))  # as sensors have it: without it they would decode too fast
        (folder := root / "large" / str(number % 4)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / path.name, quality=90)
    megabytes, start = sum(p.stat().st_size for p in root.rglob("*.jpg")) / count / 1e6, time.perf_counter()
    prepare.shrink(root / "large", root / "large_512", 512)
    print(f"\n{count} photographs of 4000×3000 ({megabytes:.1f} MB each) shrunk to 512 pixels on all cores: "
          f"{count / (time.perf_counter() - start):.1f} a second; one worker before, then after")  # fmt: skip
    for folder in ("large", "large_512"):
        bench_worker(root / folder, 224, repeats)


def images_per_second(loader) -> float:
    start = time.perf_counter()
    images = sum(len(batch) for batch, _ in loader)
    return images / (time.perf_counter() - start)


def bench_loading(root: Path, repeats: int) -> None:
    from dataset import available_cores, load_benchmark, make_train_loader, train_transform
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    images = load_benchmark("cub", root).train
    plain = ImageFolder(str(root / "CUB_200_2011" / "images"), usual_transform(224))
    print(f"\ntraining loader, 224×224, batch 32 ({repeats} epochs each, taking turns)")
    print(f"{'':<26}{'workers':>9}{'images/s':>9}{'lowest':>9}{'highest':>9}")
    workers = 0
    while workers <= available_cores():  # the loader starts no more than that
        options = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
        options |= {"num_workers": workers, "shuffle": True, "drop_last": True}
        loaders = {
            "this project": make_train_loader(images, train_transform(224), 32, seed=1, workers=workers),
            "ImageFolder loader": DataLoader(plain, 32, **options),
        }
        rates = {kind: [] for kind in loaders}
        for _ in range(repeats + 1):
            for kind, loader in loaders.items():
                rates[kind].append(images_per_second(loader))
        for kind, (_, *values) in rates.items():  # the first turn starts the workers and fills the page cache
            figures = (workers, statistics.median(values), min(values), max(values))
            print(f"{kind:<26}" + "".join(f"{figure:>9.0f}" for figure in figures), flush=True)
        workers = max(1, 2 * workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=1600, help="JPEGs for the loaders (default 1600)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of every figure (default 5)")
    parser.add_argument("--quick", action="store_true", help="few files, one repetition: does it run?")
    parser.set_defaults(files=120_053)
    if parser.parse_args().quick:
        parser.set_defaults(files=2_000, images=128, repeats=1)
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory() as scratch:
        bench_set_up(Path(scratch) / "sop", args.files, args.repeats)
        import torch  # none at the top: each process that measures the set-up imports this file, too
        from layouts.glyphs import ensure_glyphs
        from photographs import make_photographs

        half = max(1, args.images // 50)
        photos = make_photographs(Path(scratch) / "photos", args.images, test=half, classes=2 * half)
        print(f"\n{args.images:,} JPEGs of about 500×375 for the loaders")

        torch.set_num_threads(1)  # matters with 0 workers only: workers have one thread each anyway
        letters = ensure_glyphs(Path(scratch), args.images // 20)
        bench_worker(photos / "CUB_200_2011" / "images", 224, args.repeats)
        bench_worker(letters / "images", 64, args.repeats)
        bench_loading(photos, args.repeats)
        bench_large(photos, Path(scratch) / "phone", min(128, args.images), args.repeats)


if __name__ == "__main__":
    main()
