"""Folders of images: which files in one are images, what is passed over, and how one is written whole."""

import contextlib
import functools
import os
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

from PIL import Image


@functools.lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Suffixes of the formats Pillow can open; it knows a few more by name, but cannot decode them."""
    only_by_name = {"BUFR", "GRIB", "HDF5", "MPEG"}
    known = Image.registered_extensions()  # also loads Pillow's plugins
    return frozenset(s for s, name in known.items() if name in Image.OPEN and name not in only_by_name)


def has_image_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in image_suffixes()


# Why an entry of a folder gives no image: one of them, several of them
SKIPPED = {
    "other": ("file that is not an image", "files that are not images"),
    "broken": ("broken link", "broken links"),
    "special": ("pipe, socket or device", "pipes, sockets or devices"),
    "unreadable": ("folder that cannot be read", "folders that cannot be read"),
    "again": ("link to a folder that is read already", "links to folders that are read already"),
}


def describe_skipped(folder: Path, skipped: Counter) -> str:
    """One line for the user; skipped counts entries by the keys of SKIPPED."""
    parts = [f"{skipped[why]:,} {SKIPPED[why][skipped[why] > 1]}" for why in SKIPPED if skipped[why]]
    return f"{folder}: {' and '.join(parts)} {'were' if skipped.total() > 1 else 'was'} skipped"


def shorten(names: list[str]) -> str:
    """The first three names, for a line to the user."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def scan(folder: str | Path) -> list[os.DirEntry]:
    """What the folder holds, sorted by name. Hidden names are left out: macOS puts a ._name next to each name."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def kind_of(entry: os.DirEntry) -> str:
    """folder or file, whatever links lead there; else broken or special, as in SKIPPED. Opens nothing."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "special" if os.path.exists(entry.path) else "broken"
    except OSError:  # a link to itself
        return "broken"


def file_id(path: str | Path) -> tuple[int, int] | None:
    """The same for all names of a file or folder, None if it cannot be told."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found.st_ino else None  # some network drives give no numbers


def find_images(folder: Path, prefix: str, above: tuple[Path, ...] = ()) -> tuple[list[str], Counter]:
    """All images under folder in sorted order, as prefix/name, and how many entries were skipped, by SKIPPED's keys.

    An image is a regular file whose suffix stands for a format that Pillow opens, in any letter case; whether it can
    be decoded is not looked at. Links are followed, but each folder is read once, and none of those in `above`.
    """
    found, skipped, seen = [], Counter(), {file_id(path) for path in above}

    def entries(path):
        identity = file_id(path)
        if identity and identity in seen:
            skipped["again"] += 1
            return iter(())
        seen.add(identity)
        try:
            return iter(scan(path))
        except OSError:
            skipped["unreadable"] += 1
            return iter(())

    levels = [(prefix, entries(folder))]  # not by recursion: folders may lie deeper than Python's stack
    while levels:
        prefix, remaining = levels[-1]
        entry = next(remaining, None)
        if entry is None:
            levels.pop()
            continue
        kind, name = kind_of(entry), f"{prefix}/{entry.name}"
        if kind == "folder":
            levels.append((name, entries(entry.path)))
        elif kind != "file":
            skipped[kind] += 1
        elif has_image_suffix(entry.name):
            found.append(name)
        else:
            skipped["other"] += 1
    return found, skipped


def class_folders(folder: Path) -> list[str]:
    return [entry.name for entry in scan(folder) if kind_of(entry) == "folder"]


@contextlib.contextmanager
def scratch_folder(parent: Path):
    """A hidden folder in `parent`, removed at the end of the block. Those that kills left there a day ago go, too."""
    for left in parent.glob(".hist-unfinished-*"):
        with contextlib.suppress(FileNotFoundError):  # its process is done with it
            if time.time() - left.stat().st_mtime > 24 * 3600:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".hist-unfinished-", dir=parent) as scratch:
        yield Path(scratch)


@contextlib.contextmanager
def written_whole(target: Path):
    """A folder to write into, which becomes `target` at the end of the block, or is removed if the block fails.

    Nobody ever sees half of it. If another process was faster, its folder stays: it holds the same.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target.parent) as scratch:
        half_written = scratch / target.name
        half_written.mkdir()
        yield half_written
        try:
            os.rename(half_written, target)
        except OSError:
            if not target.is_dir():
                raise
