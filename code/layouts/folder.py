"""Your own images, under any names, in folders or in a list; train, test, query and gallery in any letter case.

DIR/train/<class>/..., DIR/test/<class>/...             the test images search among themselves
DIR/train/<class>/..., DIR/query/..., DIR/gallery/...   the queries search in the gallery
DIR/<class>/...                                         split by class, the first in sorted order train
LIST, or a DIR with one and at most one folder          a .csv, .tsv or .txt, see read_list

All files below a class folder, however deep, whose suffix is that of an image are of the class. A list may name images
with any suffix or none.
"""

import csv
import io
from pathlib import Path

from folders import kind_of, scan, shorten
from refused import Refused

from layouts.reading import Layout, Listing, bad_line, read_class_folders, read_text

SPLIT_NAMES = ("train", "test", "query", "gallery")
# Which of them belong together; without train they can be scored, but not trained on.
SPLITS = (("train", "query", "gallery"), ("train", "test"), ("query", "gallery"), ("test",))
NEEDED = "train and test, or train, query and gallery"
# Of open-metric-learning's lists: the split of a row of `validation` by (is_query, is_gallery), and bounding boxes
VALIDATION = {(True, True): "test", (True, False): "query", (False, True): "gallery"}
TRUTH = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
BOX = ("x_1", "x_2", "y_1", "y_2")


def read(root: Path) -> Listing:
    if root.is_file():
        return read_list(root)
    if not root.is_dir():
        raise Refused(f"{root} is not there; --data-root names your folder of images or your list (.csv, .tsv, .txt)")
    folders = [entry.name for entry in scan(root) if kind_of(entry) == "folder"]
    lists = sorted(path for path in root.iterdir() if is_list(path))
    if len(folders) < 2 and len(lists) == 1:  # a single folder holds what the list names
        return read_list(lists[0])
    notes = [f"{path} is not read, the folders next to it are; --data-root {path} reads it" for path in lists]
    found = {name.lower(): name for name in folders if name.lower() in SPLIT_NAMES}
    for parts in SPLITS:
        if set(parts) <= set(found):
            used = [found[split] for split in parts]
            notes += [f"{root / name} is not used" for name in folders if name not in used]
            splits = {split: read_class_folders(root, found[split], notes) for split in parts}
            return Listing(root, splits, notes=notes, own=True)
    if found or len(folders) < 2:
        raise Refused(
            f"{root}: it has {len(folders)} folders ({shorten(folders)}) and {len(lists)} lists (.csv, .tsv, .txt); "
            f"needed are the folders {NEEDED}, or one per class (under other names than these), or one list"
        )
    return Listing(root, {"all": read_class_folders(root, "", notes)}, notes=notes, own=True)


def is_list(path: Path) -> bool:
    """A .csv or .tsv; a .txt only if its first line names the columns, as it may well be a readme."""
    suffix = path.suffix.lower()
    if path.name.startswith(".") or suffix not in (".csv", ".tsv", ".txt") or not path.is_file():
        return False
    try:
        return suffix != ".txt" or read_header(read_text(path)) is not None
    except Refused:  # not a text
        return False


def read_header(text: str) -> tuple[str, list[str]] | None:
    """(separator, columns in lower case) if the first line names path and label, each once."""
    first_line = text[:10_000].partition("\n")[0]  # of a text without lines, not all
    for separator in ",;\t":
        header = next(csv.reader([first_line], delimiter=separator, skipinitialspace=True), [])
        columns = [name.strip().lower() for name in header]
        if columns.count("path") == columns.count("label") == 1 and columns.count("split") < 2:
            return separator, columns
    return None


def split_of(row: dict[str, str]) -> str | None:
    """all where there is no column of splits; None if the row's is none of the known ones."""
    if "split" not in row:
        return "all"
    split = row["split"].lower()
    if split == "validation":
        return VALIDATION.get(tuple(TRUTH.get(row.get(name, "").lower()) for name in ("is_query", "is_gallery")))
    return split if split in SPLIT_NAMES else None


def read_list(list_file: Path) -> Listing:
    """A table with a header, separated by commas, semicolons or tabs; everything in it is text.

    Its columns are path, label and perhaps split (as for folders), in any order and letter case; others are ignored.
    Without it the classes are split. Paths are relative to the file's folder, or absolute. Of open-metric-learning, a
    row of the split `validation` is what its is_query and is_gallery say, and both of them is test.
    """
    text = read_text(list_file)
    header = read_header(text)
    if header is None:
        expected = "the columns path,label,split, each once (split may be left out; or with semicolons or tabs)"
        raise bad_line(list_file, 1, expected, text.partition("\n")[0])
    separator, columns = header
    rows = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
    splits: dict[str, list[tuple[str, str]]] = {}
    end = 0
    try:
        for row in rows:
            number, end = end + 1, rows.line_num  # a field in quotation marks may hold line ends
            if number == 1 or not any(map(str.strip, row)):
                continue
            values = dict(zip(columns, (value.strip() for value in row), strict=False))
            split = split_of(values)
            if len(row) != len(columns):
                expected = f"{len(columns)} fields as in the header"
            elif not values["path"] or not values["label"] or "\n" in values["path"] + values["label"]:
                expected = "a path and a label, each on one line"
            elif split is None:
                expected = "a split: train, test, query, gallery, or validation with 1 or 0 as is_query and is_gallery"
            elif any(values.get(corner, "").lower() not in ("", "none", "nan") for corner in BOX):
                expected = f"no bounding box in {', '.join(BOX)} (crop the pictures yourself and drop these columns)"
            else:
                splits.setdefault(split, []).append((values["path"], values["label"]))
                continue
            raise bad_line(list_file, number, expected, separator.join(row))
    except csv.Error as error:
        raise Refused(f"{list_file}, line {end + 1}: {error}; is a quotation mark not closed?") from None
    for parts in (("all",), *SPLITS):
        if set(splits) == set(parts):
            return Listing(list_file.parent, {part: splits[part] for part in parts}, str(list_file), own=True)
    raise Refused(
        f"{list_file}: the splits in it are {', '.join(splits) or 'none'}; needed are {NEEDED} "
        "(rows of validation are what their is_query and is_gallery say: test if both, else one of them)"
    )


LAYOUT = Layout(home="", read=read)
