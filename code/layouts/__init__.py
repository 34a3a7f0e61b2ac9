"""What lies on disk: the table of data sets, their division into splits, and what is wrong with one.

A module of this package describes each data set, as LAYOUT. It is imported when its data set is asked for, so that a
run on CUB needs neither matplotlib nor scipy. A new benchmark is a new module and a line in MODULES.
"""

import functools
import importlib
import os
import posixpath
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from folders import class_folders, file_id
from refused import Refused

from layouts.reading import Layout, Listing

MODULES = {
    "cub": "cub",
    "cars": "cars",
    "SOP": "sop",
    "Inshop": "inshop",
    "glyphs": "glyphs",
    "emoji": "emoji",
    "folder": "own",
}
DATASETS = tuple(MODULES)


def get(name: str) -> Layout:
    """What is known about a data set. Raises Refused as dataset_name does."""
    return importlib.import_module(f"layouts.{MODULES[dataset_name(name)]}").LAYOUT


def dataset_name(text: str) -> str:
    """The documented name of a data set, given in any letter case, with or without hyphens: In-Shop is Inshop.

    Raises Refused with the names that there are.
    """
    for name in DATASETS:
        if name.lower() == text.lower().replace("-", ""):
            return name
    raise Refused(f"{text!r} is not a dataset; choose from {', '.join(DATASETS)}")


# ---------------------------------------------------------------- a listing and its splits


def read_splits(name: str, data_root: Path, train_classes: float | None = None, share_given: bool = True) -> Listing:
    """The listing of one data set, its classes divided into train and test unless it has a split of its own.

    Whether listed files are there is not looked at. train_classes is the share of the classes that trains, None for
    half of them. Where it has nothing to divide it is refused, or with share_given=False, for a share that comes from
    a checkpoint, ignored.

    Raises Refused with one line that names the thing, the place and the way out.
    """
    if train_classes is not None and not 0 < train_classes < 1:
        raise Refused(f"--train-classes is {train_classes}, it must lie between 0 and 1")
    layout = get(name)
    home = Path(data_root, layout.home)
    if name == "folder":
        refuse_benchmarks(home)
    try:
        listing = layout.read(home)
    except FileNotFoundError as error:
        raise Refused(
            f"{error.filename} is not there; `python code/prepare.py download {name}` fetches it or says where to get "
            f"it, and --data-root names the folder that holds {layout.home}"
        ) from None
    last = sum(classes for _, classes in layout.published.values())
    for class_id in {class_id for pairs in listing.splits.values() for _, class_id in pairs}:
        if isinstance(class_id, int) and not 1 <= class_id <= last:
            named = f"{listing.names[class_id]}: " if class_id in listing.names else ""
            raise Refused(f"{listing.where}: {named}class {class_id}, they go from 1 to {last}; take it out")
    if name != "folder" or "all" not in listing.splits:
        if share_given and train_classes not in (None, 0.5):
            raise Refused(f"--train-classes {train_classes}: {listing.root} has a split of its own; leave the flag out")
        train_classes = None
    if "all" in listing.splits:
        split_by_class(listing, train_classes or 0.5, layout.last_train_class)
    return listing


def refuse_benchmarks(root: Path) -> None:
    """Raises Refused where the benchmarks themselves would be taken for classes."""
    homes = {get(name).home.lower(): name for name in DATASETS}
    folders = class_folders(root) if root.is_dir() else []
    found = [folder for folder in folders if folder.lower() in homes and class_folders(root / folder)]
    if found:
        raise Refused(
            f"{root}: it holds benchmarks ({', '.join(found)}), not classes; give --dataset "
            f"{homes[found[0].lower()]}, or for pictures of your own --data-root {root / 'FOLDER'}, their folder"
        )


def split_by_class(listing: Listing, train_classes: float, last_train_class: int | None = None) -> None:
    """Turns the split `all` into train and test.

    The published boundary divides the classes, so that a missing class moves no other across it. Where all classes
    lie on one side of it, or none is published, the first ones in sorted order train: train_classes is their share.
    """
    pairs = listing.splits.pop("all")
    classes = sorted({class_id for _, class_id in pairs})
    if len(classes) < 2:
        raise Refused(
            f"{listing.root}: {len(classes)} class with images found, at least 2 are needed: one to train on, "
            "another to test on"
        )
    if last_train_class and classes[0] <= last_train_class < classes[-1]:
        train = {class_id for class_id in classes if class_id <= last_train_class}
    else:
        train = set(classes[: min(max(round(train_classes * len(classes)), 1), len(classes) - 1)])
    listing.splits["train"] = [pair for pair in pairs if pair[1] in train]
    listing.splits["test"] = [pair for pair in pairs if pair[1] not in train]


# ---------------------------------------------------------------- what is wrong with it


@dataclass
class Findings:
    """Lines about what is odd about a listing."""

    notes: list[str]  # good to know
    doubts: list[str]  # why the figures may say nothing, or something else than they seem to
    obstacles: list[str]  # why the splits are useless


def count(pairs: list[tuple[str, int | str]]) -> tuple[int, int]:
    """(images, classes)"""
    return len(pairs), len({class_id for _, class_id in pairs})


def missing_files(listing: Listing) -> list[str]:
    """Listed paths that are not files, found with one directory listing per folder: no stat for each file."""

    @functools.cache
    def names_in(folder: str) -> set[str]:
        try:
            return {entry.name for entry in os.scandir(listing.root / folder) if entry.is_file()}
        except OSError:
            return set()

    # The second look is for file systems that take another spelling for the same name.
    return [
        path
        for pairs in listing.splits.values()
        for path, _ in pairs
        if posixpath.basename(path) not in names_in(posixpath.dirname(path)) and not (listing.root / path).is_file()
    ]


def examine(name: str, listing: Listing, training: bool = True) -> Findings:
    """What is odd about a data set, to train on or else only to score; missing_files looks whether its files exist."""
    where, splits = listing.where, listing.splits
    classes = {split: {class_id for _, class_id in pairs} for split, pairs in splits.items()}
    found = Findings(listing.notes + similar_names(where, classes), compare_counts(name, listing), [])
    if training and "train" not in splits:
        found.obstacles.append(
            f"{where}: there is no split 'train', so it can be scored (evaluate.py) but not trained on; "
            "add the training classes as train"
        )
    needed = [split for split in splits if training or split != "train"]
    found.obstacles += [f"{where}: no image in the split {split!r}" for split in needed if not splits[split]]
    for split in splits:
        if split != "train" and (shared := classes.get("train", set()) & classes[split]):
            found.obstacles.append(
                f"{where}: train and {split} share {len(shared):,} classes, as {min(shared)!r}; "
                "retrieval is tested on unseen classes: put each class into one of the two"
            )
    found.obstacles += repeated_files(listing)
    queries = splits.get("query", splits.get("test", []))
    searched = Counter(class_id for _, class_id in splits.get("gallery", queries))
    at_least, place = (1, " in the gallery") if "gallery" in splits else (2, "")
    lonely = sum(searched[class_id] < at_least for _, class_id in queries)
    if len(searched.keys() | {class_id for _, class_id in queries}) == 1:
        found.doubts.append(f"{where}: only one class to test on, figures say nothing; is it the right folder?")
    if lonely and lonely == len(queries):
        found.doubts.append(f"{where}: none of the {lonely:,} queries has another image of its class{place}")
    elif lonely:
        found.notes.append(
            f"{where}: {lonely:,} of {len(queries):,} queries have no other image of their class{place}; "
            "they are left out of the figures"
        )
    return found


def compare_counts(name: str, listing: Listing) -> list[str]:
    """Lines about counts that differ from the published ones, none if they agree."""
    found = {split: count(pairs) for split, pairs in listing.splits.items()}
    published = get(name).published
    if not published or found == published:
        return []
    parts = [
        f"{split} {images:,} images of {classes:,} classes "
        f"(published {published[split][0]:,} of {published[split][1]:,})"
        for split, (images, classes) in found.items()
    ]
    lines = [f"{name}: the counts differ from the published ones: {', '.join(parts)}"]
    if name == "cub" and sum(images for images, _ in found.values()) == 6033:
        lines.append(
            "cub: 6,033 images are the 2010 edition, CUB-200, on which R@1 is lower; "
            "the benchmark is CUB-200-2011 with 11,788"
        )
    return lines


def similar_names(where: str, classes: dict[str, set]) -> list[str]:
    """A line if class names differ in letter case, in blanks around them or in how Unicode writes them, and only so."""
    alike: dict[str, dict[str, str]] = {}
    for split, names in classes.items():
        for name in (name for name in names if isinstance(name, str)):
            alike.setdefault(unicodedata.normalize("NFC", name).strip().casefold(), {}).setdefault(name, split)
    found = [names for names in alike.values() if len(names) > 1]
    if not found:
        return []
    one, other = (f"{name!a} ({split})" for name, split in sorted(found[0].items())[:2])
    more = f" (and {len(found) - 1:,} more such names)" if len(found) > 1 else ""
    return [
        f"{where}: {one} and {other} are taken as two classes{more}; if they are one, give both the same name: "
        "classes to test on must not be trained on"
    ]


def repeated_files(listing: Listing) -> list[str]:
    """A line if a file is listed twice, under one spelling of its path or two (./a.jpg), none if all differ.

    The user's own pictures are also compared by their numbers in the file system, through links of any kind. That
    looks at every file (60,000 take 0.7 seconds on a local disk); the published lists are trusted. Copies are fine.
    """
    seen: dict[object, tuple[str, str]] = {}
    repeats = []
    for split, pairs in listing.splits.items():
        for path, _ in pairs:
            identity = file_id(os.path.join(listing.root, path)) if listing.own else None
            key = identity or posixpath.normpath(path)
            if key in seen:
                repeats.append((*seen[key], path, split))
            seen[key] = path, split
    if not repeats:
        return []
    path, split, other, other_split = repeats[0]
    where = f"in {split}" if split == other_split else f"in {split} and {other_split}"
    what = f"{path} is listed twice" if path == other else f"{path} and {other} are the same file, listed twice"
    more = f" (and {len(repeats) - 1:,} more)" if len(repeats) > 1 else ""
    return [f"{listing.where}: {what}, {where}{more}; keep one of the two"]
