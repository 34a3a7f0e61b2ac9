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

# What gives no image
NO_FILE = "broken link, pipe, socket or device"
UNREADABLE = "folder that cannot be read"
READ_ALREADY = "link to a folder that is read already"


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the formats Pillow can open; it knows a few more by name, but cannot decode them."""
    only_by_name = {"BUFR", "GRIB", "HDF5", "MPEG"}
    known = Image.registered_extensions()  # also loads Pillow's plugins
    return frozenset(s for s, name in known.items() if name in Image.OPEN and name not in only_by_name)


def has_image_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in image_suffixes()


def describe_skipped(folder: Path, skipped: Counter) -> str:
    """One line for the user; skipped counts what find_images passed over by why."""
    return f"{folder}: skipped {' and '.join(f'{number:,} × {why}' for why, number in sorted(skipped.items()))}"


def shorten(names: list[str]) -> str:
    """The first three names, for a line to the user."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def scan(folder: str | Path) -> list[os.DirEntry]:
    """What the folder holds, sorted by name. Hidden names are left out: macOS puts a ._name next to each name."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def kind_of(entry: os.DirEntry) -> str:
    """folder or file, whatever links lead there, or else NO_FILE. Opens nothing."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else NO_FILE
    except OSError:  # a link to itself
        return NO_FILE


def file_id(path: str | Path) -> tuple[int, int] | None:
    """The same for all names of a file or folder, None if it cannot be told."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found.st_ino else None  # some network drives give no numbers


def find_images(folder: Path, prefix: str, above: tuple[Path, ...] = ()) -> tuple[list[str], Counter]:
    """All images under folder in sorted order, as prefix/name, and how many entries were skipped, by why.

    An image is a regular file whose suffix stands for a format that Pillow opens, in any letter case; whether it can
    be decoded is not looked at. Links are followed, but each folder is read once, and none of those in `above`.
    """
    found, skipped, seen = [], Counter(), {file_id(path) for path in above}
    remaining = [(prefix, os.fspath(folder))]  # not by recursion: folders may lie deeper than Python's stack
    while remaining:
        prefix, path = remaining.pop()
        identity = file_id(path)
        if identity and identity in seen:
            skipped[READ_ALREADY] += 1
            continue
        seen.add(identity)
        try:
            entries = scan(path)
        except OSError:
            skipped[UNREADABLE] += 1
            continue
        for entry in reversed(entries):  # the first folder is read next
            kind, name = kind_of(entry), f"{prefix}/{entry.name}"
            if kind == "folder":
                remaining.append((name, entry.path))
            elif kind == "file" and has_image_suffix(entry.name):
                found.append(name)
            else:
                skipped["not an image" if kind == "file" else kind] += 1
    return sorted(found, key=lambda name: name.split("/")), skipped


def class_folders(folder: Path) -> list[str]:
    return [entry.name for entry in scan(folder) if kind_of(entry) == "folder"]


@contextlib.contextmanager
def written_whole(target: Path):
    """A folder to write into, which becomes `target` at the end of the block, or is removed if the block fails.

    Nobody ever sees half of it. If another process was faster, its folder stays: it holds the same. What is written
    beside the folder is removed, and so is what a kill left there a day ago.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(".hist-unfinished-*"):
        with contextlib.suppress(FileNotFoundError):  # its process is done with it
            if time.time() - left.stat().st_mtime > 24 * 3600:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".hist-unfinished-", dir=target.parent) as scratch:
        half_written = Path(scratch, target.name)
        half_written.mkdir()
        yield half_written
        try:
            os.rename(half_written, target)
        except OSError:
            if not target.is_dir():
                raise
