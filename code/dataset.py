"""Images, labels, splits, transforms, sampler, loaders; layouts/ knows where the files lie under the data root."""

import contextlib
import functools
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import distributed
import layouts
import numpy as np
import torch
from decoding import UnreadableImage, read_rgb
from folders import shorten
from PIL import Image
from refused import Refused, warn_once
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms
from tqdm import tqdm


@dataclass(frozen=True, eq=False)
class ImageList:
    """The images of one split: labels (N,) int64 in 0..C-1, paths relative to root with '/' between.

    own marks the user's own pictures, which are decoded as people see them; see decoding.decode.
    """

    root: Path
    paths: list[str]
    labels: np.ndarray
    class_names: list[str]
    own: bool = False

    @property
    def num_classes(self) -> int:
        """Classes that have an image here; class_names of a gallery also holds those of the queries."""
        return len(np.unique(self.labels))

    def file(self, row: int) -> str:
        return os.path.join(self.root, self.paths[row])

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, eq=False)
class Benchmark:
    """What is trained on, and what is retrieved from what; train and test share no class.

    train is None for a folder that can only be scored, gallery where the queries search among themselves; else both
    share one label space. recall_at are the K of R@K. unreadable has a line about each image that was left out.
    """

    name: str
    train: ImageList | None
    query: ImageList
    gallery: ImageList | None
    recall_at: tuple[int, ...]
    warnings: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


# ---------------------------------------------------------------- from lists to a benchmark


def make_image_list(listing: layouts.Listing, splits: Iterable[str]) -> dict[str, ImageList]:
    """Image lists of the splits with labels 0..C-1 over the classes of all of them together."""
    classes = sorted({class_id for split in splits for _, class_id in listing.splits[split]})
    label = {class_id: i for i, class_id in enumerate(classes)}
    class_names = [listing.names.get(class_id, str(class_id)) for class_id in classes]
    lists = {}
    for split in splits:
        paths, labels = [path for path, _ in listing.splits[split]], [label[c] for _, c in listing.splits[split]]
        lists[split] = ImageList(listing.root, paths, np.array(labels, np.int64), class_names, listing.own)
    return lists


def load_benchmark(
    name: str, data_root: Path, train_classes=None, training=True, share_given=True, skip_bad=False, workers=0
) -> Benchmark:
    """Reads the lists of one data set; no image is opened unless skip_bad asks for it.

    train_classes, share_given: as in layouts.read_splits. With training=False a `folder` may lack train. With skip_bad
    every image is decoded once, by so many worker processes (those of train only if training). What fails is as if it
    had not been listed, and a class of nothing else, too.
    """
    listing = layouts.read_splits(name, data_root, train_classes, share_given)
    found = layouts.examine(name, listing, training)
    test, unreadable = [split for split in listing.splits if split != "train"], []
    if skip_bad and not found.obstacles:
        unreadable = drop_unreadable(listing, listing.splits if training else test, workers)
        found = layouts.examine(name, listing, training)
    if found.obstacles:
        dropped = f"; {len(unreadable):,} images were left out, the first: {unreadable[0]}" if unreadable else ""
        raise Refused(found.obstacles[0] + dropped)
    lists = make_image_list(listing, test) | make_image_list(listing, listing.splits.keys() & {"train"})
    query, gallery = lists.get("query", lists.get("test")), lists.get("gallery")
    warnings = (*found.notes, *found.doubts)
    return Benchmark(name, lists.get("train"), query, gallery, layouts.get(name).recall_at, warnings, tuple(unreadable))


def drop_unreadable(listing: layouts.Listing, splits: Iterable[str], workers: int) -> list[str]:
    """Takes the images that cannot be decoded out of some splits of a listing; one line about each.

    All processes share the work, each with so many worker processes.
    """
    rank, count = distributed.processes()
    listed = [(split, pair) for split in splits for pair in listing.splits[split]]
    files = [os.path.join(listing.root, path) for _, (path, _) in listed]
    work, rows = functools.partial(undecodable, files, listing.own), range(rank, len(files), count)
    mine = in_workers(work, rows, workers, "decode")
    why = dict(sorted(item for part in distributed.from_all(mine) for item in part.items()))
    for split in splits:
        listing.splits[split] = [pair for row, (of, pair) in enumerate(listed) if of == split and row not in why]
    return list(why.values())


def in_workers(work: Callable[[list[int]], dict], rows: Sequence[int], workers: int, title: str) -> dict:
    """All that work finds, each part of the rows in one of so many worker processes."""
    found, loader = {}, Loader(rows, workers, pin_memory=False, batch_size=8, collate_fn=work)
    for part in tqdm(loader, title, unit="batch", disable=None, leave=False):
        found |= part
    return found


def undecodable(files: list[str], own: bool, rows: Iterable[int]) -> dict[int, str]:
    """{row: why it cannot be decoded} of those that cannot"""
    why = {}
    for row in rows:
        try:
            read_rgb(files[row], own)
        except UnreadableImage as error:
            why[row] = str(error)
    return why


def decoding_cost(images: ImageList) -> tuple[float, float]:
    """(megapixels, seconds to decode it) of the image of median size among four; zeros if none can be decoded."""
    found = [(0.0, 0.0)]
    for row in range(0, len(images), max(1, len(images) // 3)):
        started = time.monotonic()
        with contextlib.suppress(UnreadableImage):  # it is met soon enough
            image = read_rgb(images.file(row), images.own)
            found.append((image.width * image.height / 1e6, time.monotonic() - started))
    return sorted(found)[len(found) // 2]


def split_validation(images: ImageList, share: float, seed: int) -> tuple[ImageList, ImageList]:
    """Holds out whole classes: (the others, the held out), both relabelled to 0...

    round(share * C) classes are held out; the seed chooses which.
    """
    count = images.num_classes
    held_out = round(share * count)
    if not 2 <= held_out <= count - 2:
        raise Refused(
            f"--val-classes {share:g} holds out {held_out} of the {count} training classes of {images.root}: at least "
            "2 are needed, and 2 to train on"
        )
    order = torch.randperm(count, generator=generator_for(seed)).numpy()
    parts = []
    for chosen in (order[held_out:], order[:held_out]):
        rows = np.flatnonzero(np.isin(images.labels, chosen))
        classes, labels = np.unique(images.labels[rows], return_inverse=True)
        paths, names = [images.paths[row] for row in rows], [images.class_names[c] for c in classes]
        parts.append(replace(images, paths=paths, labels=labels, class_names=names))
    return tuple(parts)


# ---------------------------------------------------------------- from a file to a tensor


class ImageDataset(Dataset):
    """Images as (transformed tensor, label).

    dataset[i] transforms with the random state as it is. dataset[i, seed] seeds torch's CPU generator for the
    transform and restores its state afterwards, so the result depends only on the seed, in any process.
    """

    def __init__(self, images: ImageList, transform):
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def bytes_of(self, batch_size: int) -> int:
        """What the images of a batch take, transformed."""
        with torch.random.fork_rng(devices=[]):  # the transform may draw numbers
            return batch_size * self.transform(Image.new("RGB", (9, 9))).nbytes

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        index, seed = item if isinstance(item, tuple) else (item, None)
        try:
            image = read_rgb(self.images.file(index), self.images.own)
        except UnreadableImage as error:
            raise UnreadableImage(f"{error} (--skip-bad-images leaves such images out)") from None
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs, too
            return self.transform(image), int(self.images.labels[index])


def train_transform(image_size=224):
    """Random crop of 8 to 100 % of the area, resized to image_size, flipped half of the time: (3, H, W) uint8, RGB.

    Bytes, because that is a quarter of what a worker would copy as floats; the network's normalise() does the rest
    on its device, a whole batch at a time.
    """
    steps = [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    return transforms.Compose(steps)


def eval_transform(image_size=224):
    """Shorter side resized to image_size · 256/224, centre crop of image_size: (3, H, W) uint8, RGB."""
    shorter_side = round(image_size * 256 / 224)
    steps = [transforms.Resize(shorter_side), transforms.CenterCrop(image_size), transforms.PILToTensor()]
    return transforms.Compose(steps)


# ---------------------------------------------------------------- from images to batches


def generator_for(*key: int) -> torch.Generator:
    """A separate generator for each tuple of integers; those of neighbouring tuples are unrelated."""
    words = np.random.SeedSequence([k % 2**64 for k in key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]))


class RandomBatches(Sampler):
    """Batches of an epoch as lists of (index, seed): a function of the labels, the sizes and (seed, epoch).

    images_per_class = 0: all images, shuffled. k: each batch has batch_size/k classes, drawn without replacement, and
    k images of each, all different if the class has k. Either way an epoch has N // batch_size batches.

    shard = (number of this process, number of processes): each gets an equal part of every batch. The parts joined in
    order are the batch that a single process would get.

    The seed next to each index determines its augmentation. So batches and augmentations are the same for any number
    of workers, whatever else draws random numbers, and after a resume. Call set_epoch before each epoch.
    """

    def __init__(self, labels: np.ndarray, batch_size: int, seed: int, images_per_class: int = 0, shard=(0, 1)):
        labels = np.asarray(labels)
        if batch_size > len(labels):
            raise Refused(f"--batch-size {batch_size}: there are only {len(labels)} training images")
        if images_per_class and batch_size % images_per_class:
            raise Refused(f"--IPC {images_per_class}: so many images per class do not divide --batch-size {batch_size}")
        rank, count = shard
        if batch_size % count:
            raise Refused(
                f"--batch-size {batch_size} is the whole batch, it cannot be dealt out to {count} processes evenly"
            )
        self.part = slice(rank * batch_size // count, (rank + 1) * batch_size // count)
        order = np.argsort(labels, kind="stable")
        boundaries = np.flatnonzero(np.diff(labels[order])) + 1
        self.members = [torch.from_numpy(part) for part in np.split(order, boundaries)]  # indices of a class
        if images_per_class and batch_size // images_per_class > len(self.members):
            raise Refused(
                f"--batch-size {batch_size} with --IPC {images_per_class} images per class needs "
                f"{batch_size // images_per_class} classes, there are {len(self.members)}"
            )
        self.num_images, self.batch_size, self.images_per_class = len(labels), batch_size, images_per_class
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (batch[self.part] for batch in self.whole())

    def whole(self) -> Iterator[list[tuple[int, int]]]:
        """The batches of all processes together. Every process draws all of them, so that all draw the same."""
        generator = generator_for(self.seed, self.epoch)
        shuffled = torch.randperm(self.num_images, generator=generator)
        for step in range(len(self)):
            batch = shuffled[step * self.batch_size : (step + 1) * self.batch_size]
            if self.images_per_class:
                batch = self.balanced_batch(generator)
            seeds = torch.randint(2**63 - 1, (self.batch_size,), generator=generator)
            yield list(zip(batch.tolist(), seeds.tolist(), strict=True))

    def balanced_batch(self, generator: torch.Generator) -> torch.Tensor:
        """(batch_size,) indices, class by class"""
        k = self.images_per_class
        chosen = []
        for c in torch.randperm(len(self.members), generator=generator)[: self.batch_size // k].tolist():
            members = self.members[c]
            # A class with fewer than k images gives all of them, then starts again.
            rounds = [torch.randperm(len(members), generator=generator) for _ in range(-(-k // len(members)))]
            chosen.append(members[torch.cat(rounds)[:k]])
        return torch.cat(chosen)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_that_fit(workers: int, batch_bytes: int) -> tuple[int, int]:
    """(workers, batches ahead of each) of at most so many, and 4, whose batches fit into what /dev/shm has free.

    In containers that is 64 MB by default. One batch more is in use. macOS has its shared memory elsewhere.
    """
    ahead, free = 4, 0.0
    if sys.platform != "linux":
        return workers, ahead
    with contextlib.suppress(OSError):  # not even a /dev/shm
        found = os.statvfs("/dev/shm")
        free = 0.9 * found.f_bavail * found.f_frsize / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    while workers and (workers * ahead + 1) * batch_bytes > free:
        workers, ahead = (workers, ahead - 1) if ahead > 1 else (workers - 1, 1)
    return workers, ahead


class Loader(DataLoader):
    """A DataLoader whose worker processes obey their parent's SIGTERM, and only their parent's.

    batch_bytes: what a batch takes on its way from a worker.
    """

    def __init__(self, data, workers: int, pin_memory: bool, batch_bytes: int = 4096, **options):
        wanted = min(workers, available_cores())  # more would only compete for the cores
        workers, ahead = workers_that_fit(wanted, batch_bytes)
        if (workers, ahead) < (wanted, 4):
            fit = f"{workers} of {wanted} workers load batches" + f", each {ahead} ahead instead of 4" * (workers > 0)
            warn_once(f"/dev/shm is small, so {fit}; docker run --shm-size=8g makes it larger")
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
    """In each worker process: Ctrl-C and SIGTERM may reach the whole group, but the parent finishes its step first.

    It still needs its workers. When it exits on an error it sends them SIGTERM, and waits: not to obey would hang it.
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


def make_train_loader(
    images: ImageList, transform, batch_size, seed, images_per_class=0, workers=0, pin_memory=False, shard=(0, 1)
) -> Loader:
    """Batches of (N, 3, H, W) uint8 and (N,) int64; loader.batch_sampler is the RandomBatches that draws them."""
    batches = RandomBatches(images.labels, batch_size, seed, images_per_class, shard)
    data = ImageDataset(images, transform)
    return Loader(data, workers, pin_memory, data.bytes_of(batch_size // shard[1]), batch_sampler=batches)


def make_eval_loader(images: ImageList, transform, batch_size, workers=0, pin_memory=False, shard=(0, 1)) -> Loader:
    """All images in order, none dropped; process shard[0] of shard[1] gets every shard[1]-th, from shard[0] on."""
    data, mine = ImageDataset(images, transform), range(shard[0], len(images), shard[1])
    batch_bytes = data.bytes_of(min(batch_size, len(mine)))
    return Loader(data, workers, pin_memory, batch_bytes, batch_size=batch_size, sampler=mine)


def fingerprint(images: ImageList) -> dict:
    """What identifies the images of a split, as plain data to be kept with a run.

    {'images': N, 'classes': names of the C classes, 'sizes': images of each class, 'class_digests': C short digests of
    the paths of each class, 'digest': one of the whole list, order included}. Paths count relative to the root; with
    those of own pictures count the sizes of the files in bytes, which tells most pictures that were replaced.
    """
    paths, labels = images.paths, images.labels.tolist()
    if images.own:
        paths = [f"{path} {os.path.getsize(images.file(row))}" for row, path in enumerate(paths)]
    members = [[] for _ in images.class_names]
    for path, label in zip(paths, labels, strict=True):
        members[label].append(path)
    return {
        "images": len(images),
        "classes": list(images.class_names),
        "sizes": [len(part) for part in members],
        "class_digests": [_digest(sorted(part))[:8] for part in members],
        "digest": _digest(f"{label} {path}" for label, path in zip(labels, paths, strict=True)),
    }


def digest_of_classes(*parts: dict) -> str:
    """Of the classes of several fingerprints together, however they are divided between them and called."""
    return _digest(sorted(digest for part in parts for digest in part["class_digests"]))


def _digest(lines: Iterable[str]) -> str:
    text = "\0".join(lines).encode("utf-8", "surrogateescape")  # file names may hold bytes that are not text
    return hashlib.sha256(text).hexdigest()[:16]


def classes_as_now(then: dict, now: dict) -> list[str]:
    """The classes of a fingerprint; those whose images are still the same under the names that they have in another.

    A class is its images: the names of Cars-196 come from a file that may be missing, a list's may be spelled anew.
    """
    named = zip(now["class_digests"], now["classes"], now["sizes"], strict=True)
    by_images = {digest: name for digest, name, size in named if size}
    return [by_images.get(*old) for old in zip(then["class_digests"], then["classes"], strict=True)]


def changes(then: dict, now: dict) -> str:
    """What differs between two fingerprints of one split, in words for one line; '' if nothing does."""
    if then["digest"] == now["digest"]:
        return ""
    old = dict(zip(classes_as_now(then, now), then["class_digests"], strict=True))
    new = dict(zip(now["classes"], now["class_digests"], strict=True))
    kinds = {
        "removed": [repr(name) for name in old if name not in new],
        "added": [repr(name) for name in new if name not in old],
        "with images added, removed or replaced": [repr(name) for name in old if old[name] != new.get(name, old[name])],
    }
    found = [f"classes {how}: {len(names):,} ({shorten(names)})" for how, names in kinds.items() if names]
    return "; ".join(found) or "the same classes and images come in another order"
