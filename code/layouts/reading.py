"""What the layouts share: what is known about one, what a reader finds, and how folders and lists are read."""

import codecs
import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from folders import find_images, kind_of, scan, shorten, tell_skipped
from refused import Refused

AUDIT = "As an independent audit found (this project has not fetched any of these): "


@dataclass
class Listing:
    """What a reader found."""

    root: Path
    # Pairs of (path relative to root, class id) by split: train + test, or train + query + gallery, or all, which is
    # still to be split by class; a folder of your own may lack train.
    splits: dict[str, list[tuple[str, int | str]]]
    source: str | None = None  # the list files that gave the paths, None if the folders themselves were walked
    names: dict[int | str, str] = field(default_factory=dict)  # of classes, where they are not their ids
    notes: list[str] = field(default_factory=list)
    own: bool = False  # the user's own pictures, which nobody has published figures on

    def counts(self) -> dict[str, tuple[int, int]]:
        """{split: (images, classes)}"""
        return {split: (len(pairs), len({class_id for _, class_id in pairs})) for split, pairs in self.splits.items()}


@dataclass(frozen=True)
class Layout:
    """One data set: where it lies, what was published, how to read it and where to get it."""

    home: str  # its folder under the data root
    read: Callable[[Path], Listing]  # from that folder; FileNotFoundError for a list that is not there
    published: dict[str, tuple[int, int]] = field(default_factory=dict)  # (images, classes) of each split
    recall_at: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # the K of R@K in its papers
    last_train_class: int | None = None  # where no list names the splits, the classes up to it train
    archive: tuple[str, str] | None = None  # url and md5 of its download,
    by_hand: str = ""  # or how to get it where that is not possible,
    draw: Callable[[Path], Path] | None = None  # or what makes it under a data root, unless it is there
    mirrors: str = ""  # which copies elsewhere are right or wrong


def read_text(path: Path) -> str:
    r"""The text of a UTF-8 file, or of a UTF-16 file if its byte order mark says so; its lines end in \n."""
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: not a text file (byte {error.start} is no UTF-8); save it as UTF-8") from None
    if "\0" in text:
        raise Refused(f"{path}: not a text file (it holds zero bytes)")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def bad_line(list_file: Path, number: int, expected: str, found: str) -> Refused:
    return Refused(f"{list_file}, line {number}: expected {expected}, found {found[:80]!r}")


def inside_root(path: str, list_file: Path, number: int) -> str:
    """The path as it is, unless it leads out of the data folder."""
    if re.search(r"^(?:[A-Za-z]:|[\\/])|(?:^|[\\/])\.\.(?:[\\/]|$)", path):
        raise bad_line(list_file, number, "a path inside the data folder", path)
    return path


def read_rows(list_file: Path, pattern: str, columns: str, header: int = 0) -> Iterator[tuple[int, re.Match]]:
    """(number, what the pattern finds) of each line that is not empty, below line `header` with the names of columns.

    Its group `path` must not lead out of the data folder. Blanks around a line do not matter.
    """
    lines = [line.strip() for line in read_text(list_file).split("\n")]
    named = "".join(lines[header - 1 : header])
    if header and named.split() != columns.split():
        raise bad_line(list_file, header, f"the header {columns!r}", named)
    for number, line in enumerate(lines[header:], header + 1):
        if line:
            row = re.fullmatch(pattern, line, re.ASCII)
            if not row:
                raise bad_line(list_file, number, columns, line)
            inside_root(row["path"], list_file, number)
            yield number, row


def read_class_folders(root: Path, inside: str, notes: list[str]) -> list[tuple[str, str]]:
    """The images of root/inside/<class>/ with the folder's name as the class id (inside may be '')."""
    top, pairs, nested = root / inside, [], []
    kinds = {entry.name: kind_of(entry) for entry in scan(top)}
    skipped = [kind for kind in kinds.values() if kind not in ("folder", "image")]
    for name in (name for name, kind in kinds.items() if kind == "folder"):
        found, others = find_images(top / name)
        if not found:
            holds = f" but {tell_skipped(others)}" if others else ""
            raise Refused(f"{top / name}: the class folder holds no image{holds}; fill it or remove it")
        pairs += [(posixpath.join(inside, name, path), name) for path in found]
        skipped += others
        inner = sorted({posixpath.dirname(path) for path in found})
        if len(inner) > 1 and posixpath.commonpath(inner) not in inner:
            nested.append(
                f"{top / name}: holds no images itself but {len(inner):,} folders of them ({shorten(inner)}), all "
                f"taken as one class; if each of these is a class, move them into {top}"
            )
    beside = sum(kind == "image" for kind in kinds.values())
    told = [tell_skipped(skipped), f"{beside:,} images that lie beside the class folders" * bool(beside)]
    if any(told):
        notes.append(f"{top}: skipped {' and '.join(filter(None, told))}")
    notes += nested[:1]
    return pairs


def read_numbered_folders(home: Path) -> Listing:
    """home/images/NNN.Name/*: the class id is the folder's number, as in CUB."""
    names: dict[int, str] = {}
    notes: list[str] = []
    pairs = []
    for path, folder in read_class_folders(home, "images", notes):
        number = folder.partition(".")[0]
        if not re.fullmatch(r"0*[1-9]\d{0,8}", number, re.ASCII):
            raise Refused(f"{home / 'images' / folder}: a class folder begins with its number: 001.Name")
        if names.setdefault(int(number), folder) != folder:
            raise Refused(f"{home / 'images' / folder}: a second class folder with the number {number}")
        pairs.append((path, int(number)))
    return Listing(home, {"all": pairs}, names=names, notes=notes)
