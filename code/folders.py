"""Folders of images: which files in one are images, and how one is written whole."""

import contextlib
import functools
import os
import tempfile
from pathlib import Path

from PIL import Image


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the formats Pillow can open; it knows a few more by name, but cannot decode them."""
    only_by_name = {"BUFR", "GRIB", "HDF5", "MPEG"}
    known = Image.registered_extensions()  # also loads Pillow's plugins
    return frozenset(s for s, name in known.items() if name in Image.OPEN and name not in only_by_name)


def is_image(entry: os.DirEntry) -> bool:
    """Whether it is a regular file, or a link to one, with such a suffix in any letter case. Opens nothing."""
    return os.path.splitext(entry.name)[1].lower() in image_suffixes() and entry.is_file()


def shorten(names: list[str]) -> str:
    """The first three names, for a line to the user."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def scan(folder: str | Path) -> list[os.DirEntry]:
    """What the folder holds, sorted by name. Hidden names are left out: macOS puts a ._name next to each name."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def find_images(folder: Path) -> tuple[list[str], int]:
    """(sorted paths of all images under the folder, relative to it; how many entries are neither image nor folder)

    Links are followed, but each folder is read once.
    """
    found, others, seen = [], 0, set()
    remaining = [""]
    while remaining:
        inside = remaining.pop()
        path = os.path.realpath(os.path.join(folder, inside))
        if path in seen:
            continue
        seen.add(path)
        for entry in reversed(scan(path)):  # the first folder is read next
            if entry.is_dir():
                remaining.append(f"{inside}{entry.name}/")
            elif is_image(entry):
                found.append(inside + entry.name)
            else:
                others += 1
    return sorted(found, key=lambda name: name.split("/")), others


def file_identity(path: str) -> tuple[int, int] | str:
    """The same for all names of a file, through links of any kind."""
    stat = os.stat(path)
    return (stat.st_dev, stat.st_ino) if stat.st_ino else os.path.realpath(path)  # some network drives give no numbers


@contextlib.contextmanager
def written_whole(target: Path):
    """A folder to write into, which becomes `target` at the end of the block, or is removed if the block fails.

    Nobody ever sees half of it. If another process was faster, its folder stays: it holds the same. What is written
    beside the folder is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hist-unfinished-", dir=target.parent) as scratch:
        half_written = Path(scratch, target.name)
        half_written.mkdir()
        yield half_written
        try:
            os.rename(half_written, target)
        except OSError:
            if not target.is_dir():
                raise
