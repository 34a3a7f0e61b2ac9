"""What lies on disk: the table of data sets, their division into splits, and what is wrong with one.

A module of this package describes each data set, as LAYOUT. It is imported when its data set is asked for, so that a
run on CUB needs neither matplotlib nor scipy. A new benchmark is a new module and its name in DATASETS.
"""

import contextlib
import importlib
import os
import posixpath
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from folders import file_identity, shorten
from refused import Refused

from layouts.reading import Layout, Listing

DATASETS = ("cub", "cars", "SOP", "Inshop", "glyphs", "emoji", "folder")  # in small letters the names of the modules


def get(name: str) -> Layout:
    """What is known about a data set."""
    return importlib.import_module(f"layouts.{name.lower()}").LAYOUT


def read_splits(name: str, data_root: Path, train_classes: float | None = None, share_given: bool = True) -> Listing:
    """The listing of one data set, its classes divided into train and test unless it has a split of its own.

    train_classes is the share of the classes that trains, None for half of them. Where it has nothing to divide it is
    refused, or with share_given=False, for a share that comes from a checkpoint, ignored.
    """
    layout = get(name)
    home = Path(data_root, layout.home)
    try:
        listing = layout.read(home)
    except FileNotFoundError as error:
        raise Refused(
            f"{error.filename} is not there; `python code/prepare.py download {name}` fetches it or says where to get "
            f"it, and --data-root names the folder that holds {layout.home}"
        ) from None
    if name != "folder" or "all" not in listing.splits:
        if share_given and train_classes not in (None, 0.5):
            raise Refused(f"--train-classes {train_classes}: {listing.root} has a split of its own; leave the flag out")
        train_classes = None
    if "all" in listing.splits:
        split_by_class(listing, train_classes or 0.5, layout.last_train_class)
    return listing


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


@dataclass
class Findings:
    """Lines about what is odd about a listing."""

    notes: list[str]  # good to know
    doubts: list[str]  # why the figures may say nothing, or something else than they seem to
    obstacles: list[str]  # why the splits are useless


def examine(name: str, listing: Listing, training: bool = True) -> Findings:
    """What is odd about a data set, to train on or else only to score."""
    where, splits = listing.source or str(listing.root), listing.splits
    classes = {split: {class_id for _, class_id in pairs} for split, pairs in splits.items()}
    found = Findings(listing.notes + similar_names(where, classes), compare_counts(name, listing), [])
    listed = (path for pairs in splits.values() for path, _ in pairs if listing.source)
    missing = [path for path in listed if not os.path.isfile(os.path.join(listing.root, path))]
    if missing:
        files = f"{len(missing):,} images that are not in {listing.root}: {shorten(missing)}"
        found.obstacles.append(f"{where} names {files}")
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
    found.obstacles += repeated_files(where, listing)
    queries = splits.get("query", splits.get("test", []))
    searched = Counter(class_id for _, class_id in splits.get("gallery", queries))
    at_least, place = (1, " in the gallery") if "gallery" in splits else (2, "")
    lonely = sum(searched[class_id] < at_least for _, class_id in queries)
    if len(searched.keys() | {class_id for _, class_id in queries}) == 1:
        found.doubts.append(f"{where}: only one class to test on, figures say nothing; is it the right folder?")
    if lonely:
        (found.doubts if lonely == len(queries) else found.notes).append(
            f"{where}: {lonely:,} of {len(queries):,} queries have no other image of their class{place}; "
            "they are left out of the figures"
        )
    return found


def compare_counts(name: str, listing: Listing) -> list[str]:
    """A line if the counts differ from the published ones, none if they agree."""
    found, published, mirrors = listing.counts(), get(name).published, get(name).mirrors
    if not published or found == published:
        return []
    parts = [
        f"{split} {images:,} images of {classes:,} classes "
        f"(published {published[split][0]:,} of {published[split][1]:,})"
        for split, (images, classes) in found.items()
    ]
    return [f"{name}: the counts differ from the published ones: {', '.join(parts)}{'. ' * bool(mirrors)}{mirrors}"]


def similar_names(where: str, classes: dict[str, set]) -> list[str]:
    """A line if class names differ in letter case, in blanks around them or in how Unicode writes them, and only so."""
    seen: dict[str, tuple[str, str]] = {}
    for split, names in classes.items():
        for name in sorted(name for name in names if isinstance(name, str)):
            plain = unicodedata.normalize("NFC", name).strip().casefold()
            other, other_split = seen.setdefault(plain, (name, split))
            if other != name:
                return [
                    f"{where}: {other!a} ({other_split}) and {name!a} ({split}) are taken as two classes; if they are "
                    "one, give both the same name: classes to test on must not be trained on"
                ]
    return []


def repeated_files(where: str, listing: Listing) -> list[str]:
    """A line if a file is listed twice, also spelled otherwise (./a.jpg) or, of own pictures, through a link."""
    seen: dict[object, tuple[str, str]] = {}
    for split, pairs in listing.splits.items():
        for path, _ in pairs:
            key = posixpath.normpath(path)
            if listing.own:
                with contextlib.suppress(OSError):  # it is not there, and named as missing
                    key = file_identity(os.path.join(listing.root, path))
            if key in seen:
                other, other_split = seen[key]
                files = f"{other} ({other_split}) and {path} ({split})"
                return [f"{where}: {files} are the same file, listed twice; keep one of the two"]
            seen[key] = path, split
    return []
