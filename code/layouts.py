"""What lies on disk: the benchmarks' layouts, read into listings, and compared with what was published.

What lies where under the data root (data/ beside code/ unless --data-root says otherwise):

    cub      CUB_200_2011/images/NNN.Name/*.jpg
    cars     cars196/, in one of the three layouts described at read_cars
    SOP      Stanford_Online_Products/{Ebay_train.txt, Ebay_test.txt, *_final/*.JPG}
    Inshop   Inshop_Clothes/{Img/img/..., Eval/list_eval_partition.txt}
    glyphs   glyphs/, written on first use
    folder   the data root is the folder (or CSV file) itself, see read_folder
"""

import csv
import functools
import io
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from glyphs import ensure_glyphs
from PIL import Image

HOMES = {
    "cub": "CUB_200_2011",
    "cars": "cars196",
    "SOP": "Stanford_Online_Products",
    "Inshop": "Inshop_Clothes",
}
CUB_CLASSES, CARS_CLASSES, SOP_CLASSES = 200, 196, 22634
LAST_TRAIN_CLASS = {"cub": 100, "cars": 98}  # of those that come without list files of their splits

# (images, classes) of each split as published
PUBLISHED = {
    "cub": {"train": (5864, 100), "test": (5924, 100)},
    "cars": {"train": (8054, 98), "test": (8131, 98)},
    "SOP": {"train": (59551, 11318), "test": (60502, 11316)},
    "Inshop": {"train": (25882, 3997), "query": (14218, 3985), "gallery": (12612, 3985)},
    "glyphs": {"train": (2000, 100), "test": (2000, 100)},
}


@dataclass
class Listing:
    """What a reader found: per split, pairs of (path relative to root, class id).

    The splits are train + test, or train + query + gallery, or all (then split by class, see split_by_class).
    source names the list files that gave the paths, None if the folders themselves were walked.
    last_train_class is the published boundary, for class ids that are numbers.
    """

    root: Path
    splits: dict[str, list[tuple[str, int | str]]]
    source: str | None = None
    names: dict[int | str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    last_train_class: int | None = None


def not_there(name: str, path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"{path} is not there; `python code/prepare.py download {name}` fetches it or says where it is, "
        f"--data-root names the folder that holds {HOMES[name]}"
    )


def bad_line(list_file: Path, number: int, expected: str, found: str) -> ValueError:
    return ValueError(f"{list_file}, line {number}: expected {expected}, found {found[:80]!r}")


def is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def read_lines(path: Path, name: str) -> list[str]:
    """The lines of a list file of the benchmark `name`, without blanks around them."""
    if not path.is_file():
        raise not_there(name, path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file (byte {error.start} is no UTF-8)") from None
    return [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]


def inside_root(path: str, list_file: Path, line: int) -> str:
    """The path as it is; ValueError if it leads out of the data folder."""
    if not path or "\0" in path or re.match(r"[A-Za-z]:|[\\/]", path) or ".." in re.split(r"[\\/]", path):
        raise bad_line(list_file, line, "a path inside the data folder", path)
    return path


@functools.lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Suffixes of the formats Pillow can open; it knows a few more by name, but cannot decode them."""
    only_by_name = {"BUFR", "GRIB", "HDF5", "MPEG"}
    known = Image.registered_extensions()  # also loads Pillow's plugins
    return frozenset(s for s, name in known.items() if name in Image.OPEN and name not in only_by_name)


def find_images(folder: Path, prefix: str, above: tuple[str, ...] = ()) -> tuple[list[str], int]:
    """All images under folder in sorted order, as prefix/name, and the number of other files.

    Links to folders are followed, but for those that lead back to a folder above.
    """
    found, others, above = [], 0, (*above, os.path.realpath(folder))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):  # macOS leaves a ._name beside each name
            continue
        if entry.is_dir():
            if os.path.realpath(entry.path) in above:
                continue
            deeper, more = find_images(Path(entry.path), f"{prefix}/{entry.name}", above)
            found += deeper
            others += more
        elif os.path.splitext(entry.name)[1].lower() in image_suffixes():
            found.append(f"{prefix}/{entry.name}")
        else:
            others += 1
    return found, others


def class_folders(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def read_class_folders(root: Path, inside: str, notes: list[str]) -> list[tuple[str, str]]:
    """The images of root/inside/<class>/ with the folder's name as the class id (inside may be '')."""
    pairs, others = [], 0
    for name in class_folders(root / inside):
        prefix = f"{inside}/{name}" if inside else name
        found, more = find_images(
            root / inside / name, prefix, (os.path.realpath(root), os.path.realpath(root / inside))
        )
        if not found:
            raise ValueError(f"{root / inside / name}: the class folder holds no image; fill it or remove it")
        pairs += [(path, name) for path in found]
        others += more
    if others:
        notes.append(f"{root / inside}: {others:,} files that are not images were skipped")
    return pairs


# ---------------------------------------------------------------- readers, one per layout


def read_cub(root: Path, num_classes: int | None = None) -> Listing:
    """root/images/NNN.Name/*: the class id is the folder's number, up to num_classes. The layout of glyphs, too."""
    if not (root / "images").is_dir():
        raise not_there("cub", root / "images")
    numbers = {}
    for name in class_folders(root / "images"):
        number = name.partition(".")[0]
        if not is_number(number) or int(number) < 1:
            raise ValueError(f"{root / 'images' / name}: a class folder begins with its number: 001.Name")
        if num_classes and int(number) > num_classes:
            raise ValueError(f"{root / 'images' / name}: class {number}, they go from 1 to {num_classes}; take it out")
        if int(number) in numbers.values():
            raise ValueError(f"{root / 'images' / name}: a second class folder with the number {number}")
        numbers[name] = int(number)
    notes = []
    pairs = [(path, numbers[name]) for path, name in read_class_folders(root, "images", notes)]
    return Listing(root, {"all": pairs}, names={i: name for name, i in numbers.items()}, notes=notes)


def read_mat(path: Path) -> dict:
    """The variables of a MATLAB file."""
    from scipy.io import loadmat  # comes with scikit-learn; only Cars needs it

    if not path.is_file():
        raise not_there("cars", path)
    try:
        return loadmat(path)
    except Exception as error:  # on a broken file, scipy raises whatever it stumbles over
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a readable .mat file ({why})") from None


def read_car_annotations(path: Path, file_field: str, folder: str = "") -> list[tuple[str, int]]:
    annotations = read_mat(path).get("annotations", np.empty(0))
    for wanted in (file_field, "class"):
        if wanted not in (annotations.dtype.names or ()):
            raise ValueError(f"{path}: its `annotations` have no field {wanted!r}")
    pairs = []
    for number, row in enumerate(annotations.ravel(), 1):
        try:
            # Each value is a 1×1 array; int() of one is an error in newer NumPy.
            file, class_id = str(row[file_field].item()), int(row["class"].item())
        except (AttributeError, TypeError, ValueError, OverflowError):
            raise ValueError(f"{path}: annotation {number} is malformed") from None
        if not 1 <= class_id <= CARS_CLASSES:
            raise ValueError(f"{path}: annotation {number} has class {class_id}, not 1 to {CARS_CLASSES}")
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
    splits = {}
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
            if not 1 <= class_id <= SOP_CLASSES:
                raise bad_line(list_file, number, f"a class_id from 1 to {SOP_CLASSES}", line)
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


def read_folder(root: Path) -> Listing:
    """Your own images, under any names:

    DIR/train/<class>/..., DIR/test/<class>/...             the test images search among themselves
    DIR/train/<class>/..., DIR/query/..., DIR/gallery/...   the queries search in the gallery
    DIR/<class>/...                                         split by class, the first in sorted order train
    FILE.csv, or a DIR with one and no class folders        see read_csv
    """
    if root.is_file():
        return read_csv(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not there; --data-root names your folder of images or .csv file")
    folders = class_folders(root)
    lists = sorted(path for path in root.glob("*.csv") if path.is_file() and not path.name.startswith("."))
    if len(folders) < 2 and len(lists) == 1:  # a single folder holds what the list names
        return read_csv(lists[0])
    if len(folders) < 2:
        raise ValueError(
            f"{root}: it has {len(folders)} folders and {len(lists)} .csv files; needed are the folders "
            "train and test, or train, query and gallery, or one per class, or one .csv file"
        )
    notes = [f"{path} is not read, the folders beside it are; --data-root {path} reads it" for path in lists]
    for parts in (("train", "query", "gallery"), ("train", "test")):
        if set(parts) <= set(folders):
            notes += [f"{root / name} is not used" for name in folders if name not in parts]
            return Listing(root, {part: read_class_folders(root, part, notes) for part in parts}, notes=notes)
    if "train" in folders:
        raise ValueError(f"{root}: beside train there must be test, or query and gallery")
    return Listing(root, {"all": read_class_folders(root, "", notes)}, notes=notes)


def read_csv(list_file: Path) -> Listing:
    """Columns path, label and split (train and test, or train, query and gallery); without a column split the
    classes are split, the first in alphabetical order train. Paths are relative to the file's folder."""
    rows = csv.reader(io.StringIO("\n".join(read_lines(list_file, "folder"))))
    splits = {}
    try:
        columns = [name.strip().lower() for name in next(rows, [])]
        if sorted(columns) not in (["label", "path"], ["label", "path", "split"]):
            raise bad_line(list_file, 1, "the columns path,label,split", ",".join(columns))
        for row in filter(None, rows):
            values = dict(zip(columns, (value.strip() for value in row), strict=False))
            split = values.get("split", "all")
            known = split in ("train", "test", "query", "gallery") or "split" not in columns
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
        raise ValueError(f"{list_file}, line {rows.line_num}: {error}") from None
    for parts in (("all",), ("train", "test"), ("train", "query", "gallery")):
        if set(splits) == set(parts):
            return Listing(list_file.parent, {part: splits[part] for part in parts}, str(list_file))
    raise ValueError(
        f"{list_file}: the splits in it are {', '.join(splits) or 'none'}; needed are train and test, "
        "or train, query and gallery"
    )


# ---------------------------------------------------------------- a listing, its splits, what is wrong with it


def read_listing(name: str, data_root: Path) -> Listing:
    """The listing of one benchmark; whether listed files are there is not looked at."""
    data_root = Path(data_root)
    if name == "glyphs":
        return read_cub(ensure_glyphs(data_root))
    if name == "folder":
        return read_folder(data_root)
    read_whole_cub = functools.partial(read_cub, num_classes=CUB_CLASSES)
    readers = {"cub": read_whole_cub, "cars": read_cars, "SOP": read_sop, "Inshop": read_inshop}
    if name not in readers:
        raise ValueError(f"{name!r} is no dataset; there are {', '.join([*readers, 'glyphs', 'folder'])}")
    listing = readers[name](data_root / HOMES[name])
    listing.last_train_class = LAST_TRAIN_CLASS.get(name)
    return listing


def split_by_class(listing: Listing, train_classes: float) -> None:
    """Turns the split `all` into train and test.

    The published boundary divides the classes, so that one that is missing moves no other over it; where all classes
    lie on one side of it, or none is published, the first ones in sorted order train, the share train_classes of them.
    """
    pairs = listing.splits.pop("all")
    classes = sorted({class_id for _, class_id in pairs})
    if len(classes) < 2:
        raise ValueError(
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
    published = PUBLISHED.get(name, found)
    if found == published:
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


def check_splits(listing: Listing) -> None:
    """Raises ValueError for an empty split, a class in train and test, an image listed twice."""
    source = listing.source or listing.root
    for split, pairs in listing.splits.items():
        if not pairs:
            raise ValueError(f"{source}: no image in the split {split!r}")
    train = {class_id for _, class_id in listing.splits["train"]}
    for split, pairs in listing.splits.items():
        shared = train & {class_id for _, class_id in pairs} if split != "train" else set()
        if shared:
            raise ValueError(
                f"{source}: train and {split} share {len(shared)} classes, as {min(shared)!r}; "
                "retrieval is tested on unseen classes: put each class into one of the two"
            )
    seen = set()
    for pairs in listing.splits.values():
        for path, _ in pairs:
            if path in seen:
                raise ValueError(f"{source}: {path} is listed twice")
            seen.add(path)
