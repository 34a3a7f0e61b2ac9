"""What lies on disk: each benchmark's layout, read into a listing and compared with what was published.

Places under the data root (data/ next to code/ unless --data-root says otherwise):

    cub      CUB_200_2011/images/NNN.Name/*.jpg
    cars     cars196/, in one of the three layouts described at read_cars
    SOP      Stanford_Online_Products/{Ebay_train.txt, Ebay_test.txt, *_final/*.JPG}
    Inshop   Inshop_Clothes/{Img/img/..., Eval/list_eval_partition.txt}
    glyphs   glyphs/, drawn on first use
    emoji    emoji/, drawn by `python code/prepare.py download emoji`
    folder   the data root is the folder (or CSV file) itself, see read_folder
"""

import csv
import io
import os
import posixpath
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from facts import BENCHMARKS, DATASETS
from folders import (
    SKIPPED,
    class_folders,
    describe_skipped,
    file_id,
    find_images,
    has_image_suffix,
    kind_of,
    scan,
    shorten,
)
from refused import Refused

from layouts.emoji import ensure_emoji
from layouts.glyphs import ensure_glyphs


@dataclass
class Listing:
    """What a reader found: per split, pairs of (path relative to root, class id).

    The splits are train + test, or train + query + gallery, or all (still to be split by class, see read_splits);
    a folder of your own may lack train. source names the list files that gave the paths, None if the folders
    themselves were walked. last_train_class is the published boundary, for class ids that are numbers. own marks the
    user's own pictures, which nobody has published figures on.
    """

    root: Path
    splits: dict[str, list[tuple[str, int | str]]]
    source: str | None = None
    names: dict[int | str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    last_train_class: int | None = None
    own: bool = False


def not_there(name: str, path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"{path} is not there; `python code/prepare.py download {name}` fetches it or says where to get it, "
        f"and --data-root names the folder that holds {BENCHMARKS[name].home}"
    )


def bad_line(list_file: Path, number: int, expected: str, found: str) -> Refused:
    return Refused(f"{list_file}, line {number}: expected {expected}, found {found[:80]!r}")


def is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def read_lines(path: Path, name: str) -> list[str]:
    """The lines of a list file of the benchmark `name`, without blanks around them."""
    if not path.is_file():
        raise not_there(name, path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: not a text file (byte {error.start} is no UTF-8)") from None
    return [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]


def inside_root(path: str, list_file: Path, line: int) -> str:
    """The path as it is; ValueError if it leads out of the data folder."""
    if not path or "\0" in path or re.match(r"[A-Za-z]:|[\\/]", path) or ".." in re.split(r"[\\/]", path):
        raise bad_line(list_file, line, "a path inside the data folder", path)
    return path


def read_class_folders(root: Path, inside: str, notes: list[str]) -> list[tuple[str, str]]:
    """The images of root/inside/<class>/ with the folder's name as the class id (inside may be '')."""
    top, pairs, nested = root / inside, [], []
    entries = [(entry.name, kind_of(entry)) for entry in scan(top)]
    skipped = Counter(kind for _, kind in entries if kind in SKIPPED)
    loose = [name for name, kind in entries if kind == "file" and has_image_suffix(name)]
    if loose:
        notes.append(
            f"{top}: images beside the class folders have no class, not used: {len(loose):,} ({shorten(loose)})"
        )
    for name in (name for name, kind in entries if kind == "folder"):
        prefix = f"{inside}/{name}" if inside else name
        found, more = find_images(top / name, prefix, (root, top))
        if not found and not more["unreadable"] and not more["again"]:
            raise Refused(f"{top / name}: the class folder holds no image; fill it or remove it")
        pairs += [(path, name) for path in found]
        skipped += more
        folders = sorted({posixpath.dirname(path) for path in found})
        if len(folders) > 1 and posixpath.commonpath(folders) not in folders:
            nested.append((top / name, [posixpath.basename(path) for path in folders]))
    if skipped:
        notes.append(describe_skipped(top, skipped))
    if nested:
        folder, inner = nested[0]
        others = f" (and {len(nested) - 1:,} more class folders like it)" if len(nested) > 1 else ""
        notes.append(
            f"{folder}{others}: holds no images itself but {len(inner):,} folders of them ({shorten(inner)}), all "
            f"taken as one class; if each of these is a class, move them into {top}"
        )
    return pairs


# ---------------------------------------------------------------- readers, one per layout


def read_cub(root: Path, name: str) -> Listing:
    """root/images/NNN.Name/*: the class id is the folder's number. The layout of glyphs and emoji, too."""
    if not (root / "images").is_dir():
        raise not_there(name, root / "images")
    num_classes, numbers = BENCHMARKS[name].num_classes, {}
    for folder in class_folders(root / "images"):
        number = folder.partition(".")[0]
        if not is_number(number) or int(number) < 1:
            raise Refused(f"{root / 'images' / folder}: a class folder begins with its number: 001.Name")
        if num_classes and int(number) > num_classes:
            raise Refused(f"{root / 'images' / folder}: class {number}, they go from 1 to {num_classes}; take it out")
        if int(number) in numbers.values():
            raise Refused(f"{root / 'images' / folder}: a second class folder with the number {number}")
        numbers[folder] = int(number)
    notes = []
    pairs = [(path, numbers[folder]) for path, folder in read_class_folders(root, "images", notes)]
    return Listing(root, {"all": pairs}, names={i: folder for folder, i in numbers.items()}, notes=notes)


def read_mat(path: Path) -> dict:
    """The variables of a MATLAB file."""
    from scipy.io import loadmat  # comes with scikit-learn; only Cars needs it

    if not path.is_file():
        raise not_there("cars", path)
    try:
        return loadmat(path)
    except Exception as error:  # on a broken file, scipy raises whatever it stumbles over
        why = " ".join(str(error).split()) or type(error).__name__
        raise Refused(f"{path}: not a readable .mat file ({why})") from None


def read_car_annotations(path: Path, file_field: str, folder: str = "") -> list[tuple[str, int]]:
    annotations, num_classes = read_mat(path).get("annotations", np.empty(0)), BENCHMARKS["cars"].num_classes
    for wanted in (file_field, "class"):
        if wanted not in (annotations.dtype.names or ()):
            raise Refused(f"{path}: its `annotations` have no field {wanted!r}")
    pairs = []
    for number, row in enumerate(annotations.ravel(), 1):
        try:
            # Each value is a 1×1 array; int() of one is an error in newer NumPy.
            file, class_id = str(row[file_field].item()), int(row["class"].item())
        except (AttributeError, TypeError, ValueError, OverflowError):
            raise Refused(f"{path}: annotation {number} is malformed") from None
        if not 1 <= class_id <= num_classes:
            raise Refused(f"{path}: annotation {number} has class {class_id}, not 1 to {num_classes}")
        pairs.append((inside_root(folder + file, path, number), class_id))
    return pairs


def read_car_names(path: Path) -> dict[int, str]:
    """Class id → name, for the eye only: empty where the file or the names are not there."""
    names = np.asarray(read_mat(path).get("class_names", []) if path.is_file() else [], dtype=object)
    return {
        i: str(name.item())
        for i, name in enumerate(names.ravel(), 1)
        if isinstance(name, np.ndarray) and name.size == 1
    }


def read_cars(root: Path) -> Listing:
    """Cars-196 in whichever of its layouts is there:

    1. cars_annos.mat, car_ims/NNNNNN.jpg;
    2. cars_train/, cars_test/, devkit/cars_train_annos.mat, and cars_test_annos_withlabels.mat here or in
       devkit/: both parts together are split by class;
    3. Kaggle's "by classes folder": names.csv, anno_train.csv, anno_test.csv,
       car_data/car_data/{train,test}/<class name>/.
    """
    if (root / "cars_annos.mat").is_file():
        annotations = root / "cars_annos.mat"
        return Listing(
            root,
            {"all": read_car_annotations(annotations, "relative_im_path")},
            str(annotations),
            read_car_names(annotations),
        )
    if (root / "names.csv").is_file():
        return read_kaggle_cars(root)
    if not any((root / name).is_dir() for name in ("devkit", "cars_train", "cars_test")):
        raise not_there("cars", root / "cars_annos.mat (or names.csv, or devkit/)")

    def find(name):  # some copies have the test annotations beside devkit/, some inside
        return root / name if (root / name).is_file() else root / "devkit" / name

    test_file = find("cars_test_annos_withlabels.mat")
    if not test_file.is_file() and find("cars_test_annos.mat").is_file():
        raise FileNotFoundError(
            f"{root / test_file.name} is not there, {find('cars_test_annos.mat')} has no labels; "
            "`python code/prepare.py download cars` says where to get it"
        )
    train_file = find("cars_train_annos.mat")
    pairs = read_car_annotations(train_file, "fname", "cars_train/")
    pairs += read_car_annotations(test_file, "fname", "cars_test/")
    return Listing(root, {"all": pairs}, f"{train_file} or {test_file.name}", read_car_names(find("cars_meta.mat")))


def read_kaggle_cars(root: Path) -> Listing:
    names = [name.strip('"') for name in read_lines(root / "names.csv", "cars") if name]
    pairs = []
    for part in ("train", "test"):
        list_file = root / f"anno_{part}.csv"
        for number, line in enumerate(read_lines(list_file, "cars"), 1):
            columns = [column.strip() for column in line.split(",")]
            if not line:
                continue
            if len(columns) != 6 or not is_number(columns[5]):
                raise bad_line(list_file, number, "file,x1,y1,x2,y2,class", line)
            class_id = int(columns[5])
            if not 1 <= class_id <= len(names):
                raise bad_line(list_file, number, f"a class from 1 to {len(names)}, as in names.csv", line)
            folder = names[class_id - 1].replace("/", "-")
            path = inside_root(f"car_data/car_data/{part}/{folder}/{columns[0]}", list_file, number)
            pairs.append((path, class_id))
    return Listing(root, {"all": pairs}, str(root / "anno_*.csv"), dict(enumerate(names, 1)))


def read_sop(root: Path) -> Listing:
    """root/Ebay_train.txt and Ebay_test.txt: a header, then `image_id class_id super_class_id path`."""
    header = "image_id class_id super_class_id path"
    splits, num_classes = {}, BENCHMARKS["SOP"].num_classes
    for split in ("train", "test"):
        list_file = root / f"Ebay_{split}.txt"
        lines = read_lines(list_file, "SOP")
        if lines[0].split() != header.split():
            raise bad_line(list_file, 1, f"the header {header!r}", lines[0])
        splits[split] = []
        for number, line in enumerate(lines[1:], 2):
            columns = line.split()
            if not columns:
                continue
            if len(columns) != 4 or not all(is_number(column) for column in columns[:3]):
                raise bad_line(list_file, number, repr(header), line)
            class_id = int(columns[1])
            if not 1 <= class_id <= num_classes:
                raise bad_line(list_file, number, f"a class_id from 1 to {num_classes}", line)
            splits[split].append((inside_root(columns[3], list_file, number), class_id))
    return Listing(root, splits, str(root / "Ebay_*.txt"))


def read_inshop(root: Path) -> Listing:
    """root/Eval/list_eval_partition.txt: a count, a header, then `image_name item_id evaluation_status` in
    columns padded with blanks; the images lie under root/Img."""
    list_file = root / "Eval" / "list_eval_partition.txt"
    header = "image_name item_id evaluation_status"
    lines = read_lines(list_file, "Inshop")
    if not is_number(lines[0]):
        raise bad_line(list_file, 1, "the number of images", lines[0])
    if "".join(lines[1:2]).split() != header.split():
        raise bad_line(list_file, 2, f"the header {header!r}", "".join(lines[1:2]))
    splits = {"train": [], "query": [], "gallery": []}
    for number, line in enumerate(lines[2:], 3):
        columns = line.split()
        if not columns:
            continue
        if len(columns) != 3 or not re.fullmatch(r"id_[0-9]{1,9}", columns[1]) or columns[2] not in splits:
            raise bad_line(list_file, number, "a path, id_NNNNNNNN and train, query or gallery", line)
        splits[columns[2]].append((inside_root(f"Img/{columns[0]}", list_file, number), columns[1]))
    listed = sum(len(pairs) for pairs in splits.values())
    notes = []
    if listed != int(lines[0]):
        notes.append(f"{list_file}: line 1 promises {lines[0]} images, {listed} follow")
    return Listing(root, splits, str(list_file), notes=notes)


SPLIT_NAMES = ("train", "test", "query", "gallery")
# Which of them belong together in a folder of one's own; without train it can be scored, but not trained on.
SPLITS = (("train", "query", "gallery"), ("train", "test"), ("query", "gallery"), ("test",))


def read_folder(root: Path) -> Listing:
    """Your own images, under any names:

    DIR/train/<class>/..., DIR/test/<class>/...             the test images search among themselves
    DIR/train/<class>/..., DIR/query/..., DIR/gallery/...   the queries search in the gallery
    DIR/<class>/...                                         split by class, the first in sorted order train
    FILE.csv, or a DIR with one and at most one folder      see read_csv

    train, test, query and gallery may be written in any letter case. test alone, or query and gallery, can be scored.

    All files below a class folder, however deep, whose suffix is that of a format Pillow opens (jpg, png, webp, tiff,
    gif, bmp and more, in any letter case) are images of the class. Files without a suffix or with another one are
    skipped and counted, as are broken links, pipes and folders that cannot be read. When an image is decoded only its
    content counts, not its suffix: a PNG named .jpg is fine. A CSV file may name images with any suffix or none.

    Raises ValueError for a folder in none of these layouts, FileNotFoundError if there is none.
    """
    if root.is_file():
        return read_csv(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not there; --data-root names your folder of images or .csv file")
    folders = class_folders(root)
    refuse_benchmarks(root, folders)
    lists = sorted(path for path in root.glob("*.csv") if path.is_file() and not path.name.startswith("."))
    if len(folders) < 2 and len(lists) == 1:  # a single folder holds what the list names
        return read_csv(lists[0])
    notes = [f"{path} is not read, the folders next to it are; --data-root {path} reads it" for path in lists]
    parts = split_folders(root, folders)
    if parts:
        notes += [f"{root / name} is not used" for name in folders if name not in parts.values()]
        splits = {split: read_class_folders(root, name, notes) for split, name in parts.items()}
        return Listing(root, splits, notes=notes, own=True)
    if len(folders) < 2:
        inner = class_folders(root / folders[0]) if folders else []
        advice = f"; is it --data-root {root / folders[0]}, which holds {len(inner)} folders?" if len(inner) > 1 else ""
        raise Refused(
            f"{root}: it has {len(folders)} folders and {len(lists)} .csv files; needed are the folders "
            f"train and test, or train, query and gallery, or one per class, or one .csv file{advice}"
        )
    return Listing(root, {"all": read_class_folders(root, "", notes)}, notes=notes, own=True)


def refuse_benchmarks(root: Path, folders: list[str]) -> None:
    """Raises ValueError where the benchmarks themselves would be taken for classes."""
    names = {facts.home.lower(): name for name, facts in BENCHMARKS.items()}
    found = [folder for folder in folders if folder.lower() in names and class_folders(root / folder)]
    if found:
        raise Refused(
            f"{root}: it holds benchmarks ({', '.join(found)}), not classes; give --dataset "
            f"{names[found[0].lower()]}, or for pictures of your own --data-root {root / 'FOLDER'}, their folder"
        )


def split_folders(root: Path, folders: list[str]) -> dict[str, str]:
    """{split: folder}, empty if no folder is named like a split. Raises ValueError for splits that lack others."""
    found: dict[str, str] = {}
    for name in folders:
        if name.lower() in SPLIT_NAMES and found.setdefault(name.lower(), name) != name:
            raise Refused(f"{root}: {found[name.lower()]} and {name} are the same split; merge them into one folder")
    for parts in SPLITS:
        if set(parts) <= set(found):
            return {part: found[part] for part in parts}
    if found:
        lacking = {"train": "test, or query and gallery", "query": "gallery", "gallery": "query"}
        first = next(name for name in lacking if name in found)
        raise Refused(
            f"{root}: beside {found[first]} there must be {lacking[first]}; needed are train and test, or train, query "
            f"and gallery (if {found[first]} is a class, rename it)"
        )
    return {}


def read_csv(list_file: Path) -> Listing:
    """Columns path, label and split (train, test, query or gallery, together as in read_folder); without a column
    split the classes are split, the first in alphabetical order train. Paths are relative to the file's folder.

    Raises ValueError with the line that is wrong.
    """
    rows = csv.reader(io.StringIO("\n".join(read_lines(list_file, "folder"))))
    splits: dict[str, list] = {}
    try:
        columns = [name.strip().lower() for name in next(rows, [])]
        if sorted(columns) not in (["label", "path"], ["label", "path", "split"]):
            raise bad_line(list_file, 1, "the columns path,label,split", ",".join(columns))
        for row in filter(None, rows):
            values = dict(zip(columns, (value.strip() for value in row), strict=False))
            split = values.get("split", "all").lower()
            known = split in SPLIT_NAMES or "split" not in columns
            if len(row) != len(columns) or not values["label"] or not known:
                raise bad_line(
                    list_file,
                    rows.line_num,
                    "path,label" if "split" not in columns else "path,label,split (train, test, query or gallery)",
                    ",".join(row),
                )
            path = inside_root(values["path"], list_file, rows.line_num)
            splits.setdefault(split, []).append((path, values["label"]))
    except csv.Error as error:
        raise Refused(f"{list_file}, line {rows.line_num}: {error}") from None
    for parts in (("all",), *SPLITS):
        if set(splits) == set(parts):
            return Listing(list_file.parent, {part: splits[part] for part in parts}, str(list_file), own=True)
    raise Refused(
        f"{list_file}: the splits in it are {', '.join(splits) or 'none'}; needed are train and test, "
        "or train, query and gallery"
    )


# ---------------------------------------------------------------- a listing, its splits, what is wrong with it


def find_home(name: str, data_root: Path) -> Path:
    """The folder of a benchmark, which need not be there yet; glyphs are drawn now, emoji must have been downloaded."""
    if name == "glyphs":
        return ensure_glyphs(Path(data_root))
    if name == "emoji":
        return ensure_emoji(Path(data_root))
    return Path(data_root) / BENCHMARKS[name].home


def read_listing(name: str, data_root: Path) -> Listing:
    """The listing of one data set; whether listed files are there is not looked at."""
    if name == "folder":
        return read_folder(Path(data_root))
    readers = {"cars": read_cars, "SOP": read_sop, "Inshop": read_inshop}
    if name not in BENCHMARKS:
        raise Refused(f"{name!r} is not a dataset; choose from {', '.join(DATASETS)}")
    home = find_home(name, data_root)
    listing = readers[name](home) if name in readers else read_cub(home, name)
    listing.last_train_class = BENCHMARKS[name].last_train_class
    return listing


def read_splits(name: str, data_root: Path, train_classes: float | None = None, share_given: bool = True) -> Listing:
    """The listing of one data set, its classes divided into train and test unless it has a split of its own.

    train_classes is the share of the classes that trains, None for half of them. Where it has nothing to divide it is
    refused, or with share_given=False, for a share that comes from a checkpoint, ignored.

    Raises ValueError or FileNotFoundError with one line that names the thing, the place and the way out.
    """
    if train_classes is not None and not 0 < train_classes < 1:
        raise Refused(f"--train-classes is {train_classes}, it must lie between 0 and 1")
    listing = read_listing(name, data_root)
    if name != "folder" or "all" not in listing.splits:
        if share_given and train_classes not in (None, 0.5):
            raise Refused(f"--train-classes {train_classes}: {listing.root} has a split of its own; leave the flag out")
        train_classes = None
    if "all" in listing.splits:
        split_by_class(listing, train_classes or 0.5)
    return listing


def split_by_class(listing: Listing, train_classes: float) -> None:
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
    boundary = listing.last_train_class
    if boundary and classes[0] <= boundary < classes[-1]:
        train = {class_id for class_id in classes if class_id <= boundary}
    else:
        train = set(classes[: min(max(round(train_classes * len(classes)), 1), len(classes) - 1)])
    listing.splits["train"] = [pair for pair in pairs if pair[1] in train]
    listing.splits["test"] = [pair for pair in pairs if pair[1] not in train]


def count(pairs: list[tuple[str, int | str]]) -> tuple[int, int]:
    """(images, classes)"""
    return len(pairs), len({class_id for _, class_id in pairs})


def compare_counts(name: str, listing: Listing) -> list[str]:
    """Lines about counts that differ from the published ones, none if they agree."""
    found = {split: count(pairs) for split, pairs in listing.splits.items()}
    published = BENCHMARKS[name].published if name in BENCHMARKS else {}
    if not published or found == published:
        return []
    parts = [
        f"{split} {found[split][0]:,} images of {found[split][1]:,} classes "
        f"(published {published[split][0]:,} of {published[split][1]:,})"
        for split in found
    ]
    lines = [f"{name}: the counts differ from the published ones: {', '.join(parts)}"]
    if name == "cub" and sum(images for images, _ in found.values()) == 6033:
        lines.append(
            "cub: 6,033 images are the 2010 edition, CUB-200, on which R@1 is lower; "
            "the benchmark is CUB-200-2011 with 11,788"
        )
    return lines


def missing_files(listing: Listing) -> list[str]:
    """Listed paths that are not files, found with one directory listing per folder: no stat for each file."""
    files: dict[str, set[str]] = {}
    missing = []
    for pairs in listing.splits.values():
        for path, _ in pairs:
            folder, _, name = path.rpartition("/")
            if folder not in files:
                try:
                    files[folder] = {e.name for e in os.scandir(listing.root / folder) if e.is_file()}
                except OSError:
                    files[folder] = set()
            # The second look is for file systems that take another spelling for the same name.
            if name not in files[folder] and not os.path.isfile(listing.root / path):
                missing.append(path)
    return missing


def similar_names(listing: Listing) -> list[str]:
    """A line if class names differ in letter case, in blanks around them or in how Unicode writes them, and only so."""
    alike: dict[str, dict[str, str]] = {}
    for split, pairs in listing.splits.items():
        for name in {class_id for _, class_id in pairs if isinstance(class_id, str)}:
            alike.setdefault(unicodedata.normalize("NFC", name).strip().casefold(), {}).setdefault(name, split)
    found = [names for names in alike.values() if len(names) > 1]
    if not found:
        return []
    (name, split), (other, other_split) = sorted(found[0].items())[:2]
    more = f" (and {len(found) - 1:,} more such names)" if len(found) > 1 else ""
    return [
        f"{listing.source or listing.root}: {name!a} ({split}) and {other!a} ({other_split}) are taken as two classes"
        f"{more}; if they are one, give both the same name: classes to test on must not be trained on"
    ]


def split_problems(listing: Listing, training: bool = True) -> list[str]:
    """Lines about what makes the splits useless for training, or else for scoring; none if all is well."""
    source = listing.source or listing.root
    problems = []
    if training and "train" not in listing.splits:
        problems.append(
            f"{source}: there is no split 'train', so it can be scored (evaluate.py) but not trained on; "
            "add the training classes as train"
        )
    needed = [split for split in listing.splits if training or split != "train"]
    problems += [f"{source}: no image in the split {split!r}" for split in needed if not listing.splits[split]]
    train = {class_id for _, class_id in listing.splits.get("train", ())}
    for split, pairs in listing.splits.items():
        shared = train & {class_id for _, class_id in pairs} if split != "train" else set()
        if shared:
            problems.append(
                f"{source}: train and {split} share {len(shared):,} classes, as {min(shared)!r}; "
                "retrieval is tested on unseen classes: put each class into one of the two"
            )
    return problems + repeated_files(listing)


def repeated_files(listing: Listing) -> list[str]:
    """A line if a file is listed twice, under one spelling of its path or two (./a.jpg), none if all differ.

    The user's own pictures are also compared by their numbers in the file system, through links of any kind. That
    looks at every file (60,000 take 0.7 seconds on a local disk); the published lists are trusted. Copies are fine.
    """
    seen: dict[object, tuple[str, str]] = {}
    repeats = []
    for split, pairs in listing.splits.items():
        for path, _ in pairs:
            identity = file_id(f"{listing.root}/{path}") if listing.own else None
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
    return [f"{listing.source or listing.root}: {what}, {where}{more}; keep one of the two"]


def look_at_test_split(listing: Listing) -> tuple[list[str], list[str]]:
    """(notes, problems): lines about images that cannot count in the figures, and about figures that say nothing."""
    queries = listing.splits.get("query", listing.splits.get("test", []))
    searched = Counter(class_id for _, class_id in listing.splits.get("gallery", queries))
    at_least, where = (1, " in the gallery") if "gallery" in listing.splits else (2, "")
    lonely = sum(searched[class_id] < at_least for _, class_id in queries)
    notes, problems = similar_names(listing), []
    if len(searched.keys() | {class_id for _, class_id in queries}) == 1:
        problems.append(f"{listing.root}: only one class to test on, figures say nothing; is it the right folder?")
    if lonely and lonely == len(queries):
        problems.append(f"{listing.root}: none of the {lonely:,} queries has another image of its class{where}")
    elif lonely:
        notes.append(
            f"{listing.root}: {lonely:,} of {len(queries):,} queries have no other image of their class{where}; "
            "they are left out of the figures"
        )
    return notes, problems
