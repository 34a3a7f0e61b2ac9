"""Folders of images: which files in one are images, and how one is written whole."""

import contextlib
import functools
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

# Camera raw, which Pillow takes for a TIFF file with a small preview, and JPEG XL
TO_CONVERT = set(
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .fff .iiq .jxl .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 "
    ".rwl .sr2 .srf .srw .x3f".split()
)


@functools.cache
def open_heif() -> None:
    """Let Pillow open HEIC and HEIF, the format of iPhones."""
    import pillow_heif  # takes 0.05 s

    pillow_heif.register_heif_opener(decode_threads=1)  # workers decode side by side


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the formats Pillow can open; it knows a few more by name, but cannot decode them."""
    open_heif()
    only_by_name = {"BUFR", "GRIB", "HDF5", "MPEG"}
    known = Image.registered_extensions()  # also loads Pillow's plugins
    return frozenset(s for s, name in known.items() if name in Image.OPEN and name not in only_by_name)


def suffix_of(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def kind_of(entry: os.DirEntry) -> str:
    """'folder', 'image' (a file, or a link to one, with such a suffix), or what else it is, for tell_skipped."""
    with contextlib.suppress(OSError):  # a link that leads to itself
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            suffix = suffix_of(entry.name)
            return "image" if suffix in image_suffixes() else suffix or "without a suffix"
    return "broken links or pipes"


def tell_skipped(kinds: Iterable[str]) -> str:
    """What is skipped in words, the most frequent first: '3 files that are no images (2 .mov, 1 without a suffix)'."""
    said, counts = [], Counter(kinds).most_common()
    for what, converted in (("pictures that have to be converted first", True), ("files that are no images", False)):
        if found := [(kind, n) for kind, n in counts if (kind in TO_CONVERT) == converted]:
            total = sum(n for _, n in found)
            said.append(f"{total:,} {what} ({shorten([f'{n:,} {kind}' for kind, n in found])})")
    return " and ".join(said)


def shorten(names: list[str]) -> str:
    """The first three names, for a line to the user."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def scan(folder: str | Path) -> list[os.DirEntry]:
    """What the folder holds, sorted by name. Hidden names are left out: macOS puts a ._name next to each name."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def find_images(folder: Path) -> tuple[list[str], list[str]]:
    """(sorted paths of all images under the folder, relative to it; kinds of what is neither image nor folder)

    Links are followed, but each folder is read once.
    """
    found, others, seen = [], [], set()
    remaining = [""]
    while remaining:
        inside = remaining.pop()
        path = os.path.realpath(os.path.join(folder, inside))
        if path in seen:
            continue
        seen.add(path)
        for entry in reversed(scan(path)):  # the first folder is read next
            kind = kind_of(entry)
            if kind == "folder":
                remaining.append(f"{inside}{entry.name}/")
            elif kind == "image":
                found.append(inside + entry.name)
            else:
                others.append(kind)
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
