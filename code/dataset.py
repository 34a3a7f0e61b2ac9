"""Images, labels, splits, transforms, sampler, loaders.

    python code/dataset.py check cub --decode          # is it complete, is it the right edition?
    python code/dataset.py download cub                # fetch it (cub, SOP), or say where to get it
    python code/dataset.py show cub --output cub.png   # look at it before training

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from glyphs import ensure_glyphs
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

DATA_ROOT = Path(__file__).resolve().parent.parent / "data"
DATASETS = ("cub", "cars", "SOP", "Inshop", "glyphs", "folder")

# (images, classes) of each split as published
PUBLISHED = {
    "cub": {"train": (5864, 100), "test": (5924, 100)},
    "cars": {"train": (8054, 98), "test": (8131, 98)},
    "SOP": {"train": (59551, 11318), "test": (60502, 11316)},
    "Inshop": {"train": (25882, 3997), "query": (14218, 3985), "gallery": (12612, 3985)},
    "glyphs": {"train": (2000, 100), "test": (2000, 100)},
}
RECALL_AT = {"SOP": (1, 10, 100, 1000), "Inshop": (1, 10, 20, 30, 40, 50)}  # all others: 1 2 4 8 16 32
HOMES = {
    "cub": "CUB_200_2011",
    "cars": "cars196",
    "SOP": "Stanford_Online_Products",
    "Inshop": "Inshop_Clothes",
}
CARS_CLASSES, SOP_CLASSES = 196, 22634

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class UnreadableImage(ValueError):
    """An image is missing, cut or none. The message is one line: '<path>: cannot be decoded (<why>)'."""


@dataclass(frozen=True, eq=False)
class ImageList:
    """The images of one split: labels (N,) int64 in 0..C-1, paths relative to root with '/' between."""

    root: Path
    paths: list[str]
    labels: np.ndarray
    class_names: list[str]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, eq=False)
class Benchmark:
    """What is trained on and what is retrieved from what; train and test share no class.

    gallery is None where the queries search among themselves; else query and gallery share one label space.
    recall_at are the K of R@K. warnings are lines for the user, e.g. counts that differ from the published.
    """

    name: str
    train: ImageList
    query: ImageList
    gallery: ImageList | None
    recall_at: tuple[int, ...]
    warnings: tuple[str, ...] = ()


# ---------------------------------------------------------------- reading what lies on disk

@dataclass
class Listing:
    """What a reader found: per split, pairs of (path relative to root, class id).

    The splits are train + test, or train + query + gallery, or all (then split by class, first half trains).
    source names the list files that gave the paths, None if the folders themselves were walked.
    """

    root: Path
    splits: dict[str, list[tuple[str, int | str]]]
    source: str | None = None
    names: dict[int | str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def not_there(name: str, path: Path) -> FileNotFoundError:
    return FileNotFoundError(f"{path} is not there; `python code/dataset.py download {name}` fetches it or "
                             f"says where it is, --data-root names the folder that holds {HOMES[name]}")


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


def find_images(folder: Path, prefix: str) -> tuple[list[str], int]:
    """All images under folder in sorted order, as prefix/name, and the number of other files."""
    found, others = [], 0
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):  # macOS leaves a ._name beside each name
            continue
        if entry.is_dir(follow_symlinks=False):
            deeper, more = find_images(Path(entry.path), f"{prefix}/{entry.name}")
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
        found, more = find_images(root / inside / name, f"{inside}/{name}" if inside else name)
        if not found:
            raise ValueError(f"{root / inside / name}: the class folder holds no image; fill it or remove it")
        pairs += [(path, name) for path in found]
        others += more
    if others:
        notes.append(f"{root / inside}: {others:,} files that are not images were skipped")
    return pairs


def read_cub(root: Path) -> Listing:
    """root/images/NNN.Name/*: the class id is the folder's number. The layout of glyphs, too."""
    if not (root / "images").is_dir():
        raise not_there("cub", root / "images")
    numbers = {}
    for name in class_folders(root / "images"):
        number = name.partition(".")[0]
        if not is_number(number) or int(number) < 1:
            raise ValueError(f'{root / "images" / name}: a class folder begins with its number: 001.Name')
        if int(number) in numbers.values():
            raise ValueError(f'{root / "images" / name}: a second class folder with the number {number}')
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
        raise ValueError(f"{path}: not a readable .mat file ({one_line(error)})") from None


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
    return {i: str(name.item()) for i, name in enumerate(names.ravel(), 1)
            if isinstance(name, np.ndarray) and name.size == 1}


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
        return Listing(root, {"all": read_car_annotations(annotations, "relative_im_path")}, str(annotations),
                       read_car_names(annotations))
    if (root / "names.csv").is_file():
        return read_kaggle_cars(root)
    if not any((root / name).is_dir() for name in ("devkit", "cars_train", "cars_test")):
        raise not_there("cars", root / "cars_annos.mat (or names.csv, or devkit/)")

    def find(name):  # some copies have the test annotations beside devkit/, some inside
        return root / name if (root / name).is_file() else root / "devkit" / name

    test_file = find("cars_test_annos_withlabels.mat")
    if not test_file.is_file() and find("cars_test_annos.mat").is_file():
        raise FileNotFoundError(f'{root / test_file.name} is not there, {find("cars_test_annos.mat")} has '
                                'no labels; `python code/dataset.py download cars` says where to get it')
    train_file = find("cars_train_annos.mat")
    pairs = read_car_annotations(train_file, "fname", "cars_train/")
    pairs += read_car_annotations(test_file, "fname", "cars_test/")
    return Listing(root, {"all": pairs}, f"{train_file} or {test_file.name}",
                   read_car_names(find("cars_meta.mat")))


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
        raise ValueError(f"{root}: it has {len(folders)} folders and {len(lists)} .csv files; needed are the "
                         "folders train and test, or train, query and gallery, or one per class, or one .csv "
                         "file")
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
                raise bad_line(list_file, rows.line_num, "path,label" if "split" not in columns else
                               "path,label,split (train, test, query or gallery)", ",".join(row))
            path = inside_root(values["path"], list_file, rows.line_num)
            splits.setdefault(split, []).append((path, values["label"]))
    except csv.Error as error:
        raise ValueError(f"{list_file}, line {rows.line_num}: {error}") from None
    for parts in (("all",), ("train", "test"), ("train", "query", "gallery")):
        if set(splits) == set(parts):
            return Listing(list_file.parent, {part: splits[part] for part in parts}, str(list_file))
    raise ValueError(f'{list_file}: the splits in it are {", ".join(splits) or "none"}; needed are train '
                     'and test, or train, query and gallery')


def read_listing(name: str, data_root: Path) -> Listing:
    """The listing of one benchmark; whether listed files are there is not looked at."""
    data_root = Path(data_root)
    if name == "glyphs":
        return read_cub(ensure_glyphs(data_root))
    if name == "folder":
        return read_folder(data_root)
    readers = {"cub": read_cub, "cars": read_cars, "SOP": read_sop, "Inshop": read_inshop}
    if name not in readers:
        raise ValueError(f'{name!r} is no dataset; there are {", ".join(DATASETS)}')
    return readers[name](data_root / HOMES[name])


def split_by_class(listing: Listing, train_classes: float) -> None:
    """Turns the split `all` into train and test: the first classes in sorted order train."""
    pairs = listing.splits.pop("all")
    classes = sorted({class_id for _, class_id in pairs})
    if len(classes) < 2:
        raise ValueError(f"{listing.root}: {len(classes)} class with images found, at least 2 are needed: "
                         "one to train on, another to test on")
    train = set(classes[:min(max(round(train_classes * len(classes)), 1), len(classes) - 1)])
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
    parts = [f"{split} {found[split][0]:,} images of {found[split][1]:,} classes "
             f"(published {published[split][0]:,} of {published[split][1]:,})" for split in found]
    lines = [f'{name}: the counts differ from the published ones: {", ".join(parts)}']
    if name == "cub" and sum(images for images, _ in found.values()) == 6033:
        lines.append("cub: 6,033 images are the 2010 edition, CUB-200, on which R@1 is lower; the benchmark "
                     "is CUB-200-2011 with 11,788")
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
            raise ValueError(f"{source}: train and {split} share {len(shared)} classes, as {min(shared)!r}; "
                             "retrieval is tested on unseen classes: put each class into one of the two")
    seen = set()
    for pairs in listing.splits.values():
        for path, _ in pairs:
            if path in seen:
                raise ValueError(f"{source}: {path} is listed twice")
            seen.add(path)


def make_image_list(listing: Listing, splits: Iterable[str]) -> dict[str, ImageList]:
    """Image lists of the splits with labels 0..C-1 over the classes of all of them together."""
    classes = sorted({class_id for split in splits for _, class_id in listing.splits[split]})
    label = {class_id: i for i, class_id in enumerate(classes)}
    class_names = [listing.names.get(class_id, str(class_id)) for class_id in classes]
    lists = {}
    for split in splits:
        paths = [path for path, _ in listing.splits[split]]
        labels = np.fromiter((label[c] for _, c in listing.splits[split]), np.int64, len(paths))
        lists[split] = ImageList(listing.root, paths, labels, class_names)
    return lists


def load_benchmark(name: str, data_root: Path, train_classes: float = 0.5) -> Benchmark:
    """Reads the lists of one benchmark; no image is opened.

    train_classes is the share of the classes that trains, for `folder` without a split of its own.

    Raises ValueError or FileNotFoundError with one line that names the thing, the place and the way out.
    """
    if not 0 < train_classes < 1:
        raise ValueError(f"train_classes is {train_classes}, it must lie between 0 and 1")
    listing = read_listing(name, data_root)
    if train_classes != 0.5 and (name != "folder" or "all" not in listing.splits):
        raise ValueError(f"train_classes is {train_classes}, but {listing.root} has a split of its own")
    if "all" in listing.splits:
        split_by_class(listing, train_classes)
    check_splits(listing)
    if listing.source:
        missing = missing_files(listing)
        if missing:
            raise FileNotFoundError(f"{listing.source} names {len(missing):,} images that are not there, "
                                    f"the first is {listing.root / missing[0]}; `python code/dataset.py "
                                    f"check {name}` names more")
    train = make_image_list(listing, ["train"])["train"]
    if "test" in listing.splits:
        query, gallery = make_image_list(listing, ["test"])["test"], None
    else:
        test = make_image_list(listing, ["query", "gallery"])
        query, gallery = test["query"], test["gallery"]
    notes = (*listing.notes, *compare_counts(name, listing))
    return Benchmark(name, train, query, gallery, RECALL_AT.get(name, (1, 2, 4, 8, 16, 32)), notes)


def split_validation(images: ImageList, share: float, seed: int) -> tuple[ImageList, ImageList]:
    """Holds out whole classes: (the others, the held out), both relabelled to 0...

    round(share * C) classes are held out, at least 1 and at most C - 1; the seed chooses which.
    Raises ValueError for a share outside ]0, 1[ or fewer than 2 classes.
    """
    if not 0 < share < 1:
        raise ValueError(f"the validation share is {share}, it must lie between 0 and 1")
    if images.num_classes < 2:
        raise ValueError(f"{images.root}: one training class, validation needs at least 2")
    held_out = min(max(round(share * images.num_classes), 1), images.num_classes - 1)
    order = torch.randperm(images.num_classes, generator=generator_for(seed)).numpy()
    halves = []
    for classes in (np.sort(order[held_out:]), np.sort(order[:held_out])):
        chosen = np.flatnonzero(np.isin(images.labels, classes))
        labels = np.searchsorted(classes, images.labels[chosen])
        names = [images.class_names[c] for c in classes]
        halves.append(ImageList(images.root, [images.paths[i] for i in chosen], labels, names))
    return halves[0], halves[1]


# ---------------------------------------------------------------- from a file to a tensor

def read_rgb(path: str) -> Image.Image:
    """Decodes any image to 8-bit RGB. Raises UnreadableImage."""
    try:
        with Image.open(path) as image:
            if image.mode == "RGB":  # most are: no copy of the pixels
                image.load()
                return image
            if image.mode.startswith("I"):  # 16 bit: Pillow would clip to 255 instead of scaling
                high = np.asarray(image, dtype=np.int64).clip(0, 65535) // 257
                return Image.fromarray(high.astype(np.uint8)).convert("RGB")
            if image.mode == "P" and "transparency" in image.info:  # else Pillow warns on every such image
                return image.convert("RGBA").convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # what Pillow raises depends on where the file is broken
        why = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            why = error.strerror
        elif isinstance(error, Image.UnidentifiedImageError):
            why = "not an image that Pillow knows"
        raise UnreadableImage(f'{path}: cannot be decoded ({" ".join(why.split())})') from None


class ImageDataset(Dataset):
    """Images as (transformed tensor, label).

    dataset[i] transforms with whatever random state there is; dataset[i, seed] seeds torch's CPU generator
    for the transform and puts its state back, so that the result depends on the seed alone, in any process.

    An image that cannot be decoded raises UnreadableImage. With skip_bad it is remembered (bad_paths and
    num_bad count over all workers) and replaced: dataset[i, seed], which trains, gives another image, of the
    same class if that has a readable one; dataset[i], which scores, gives zeros and the label -1, and whoever
    computes figures drops the rows with label -1.
    """

    def __init__(self, images: ImageList, transform, skip_bad: bool = False):
        self.images = images
        self.transform = transform
        # One byte per image in shared memory: marking one twice, or from two processes, still counts it once.
        self.bad = torch.zeros(len(images), dtype=torch.uint8).share_memory_() if skip_bad else None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def bad_paths(self) -> list[str]:
        """Paths of the images that could not be decoded so far, relative to the root of the list."""
        if self.bad is None:
            return []
        return [self.images.paths[i] for i in self.bad.nonzero().flatten().tolist()]

    @property
    def num_bad(self) -> int:
        return 0 if self.bad is None else int(self.bad.sum())

    def read(self, index: int) -> Image.Image:
        try:
            return read_rgb(os.path.join(self.images.root, self.images.paths[index]))
        except UnreadableImage:
            if self.bad is not None:
                self.bad[index] = 1
            raise

    def substitutes(self, index: int) -> Iterator[int]:
        """The other images of the class from index onwards, then all others, going round at the end."""
        everything = (index + 1 + np.arange(len(self) - 1)) % len(self)
        same_class = self.images.labels[everything] == self.images.labels[index]
        yield from everything[same_class].tolist()
        yield from everything[~same_class].tolist()

    def read_or_replace(self, index: int) -> tuple[Image.Image, int]:
        """The image, or a readable one in its place, and the label of what it gives."""
        try:
            return self.read(index), int(self.images.labels[index])
        except UnreadableImage:
            if self.bad is None:
                raise
        for other in self.substitutes(index):
            try:
                return self.read(other), int(self.images.labels[other])
            except UnreadableImage:
                continue
        raise UnreadableImage(f"{self.images.root}: cannot be decoded (none of its {len(self):,} images can)")

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        if isinstance(item, tuple):
            index, seed = item
            image, label = self.read_or_replace(index)
            state = torch.default_generator.get_state()
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs, too
            try:
                return self.transform(image), label
            finally:
                torch.default_generator.set_state(state)
        try:
            return self.transform(self.read(item)), int(self.images.labels[item])
        except UnreadableImage:
            if self.bad is None:
                raise
            return torch.zeros_like(self.transform(Image.new("RGB", (256, 256)))), -1


def one_line(error: BaseException) -> str:
    """The message of an error on one line. torch wraps an error of a worker process in its whole traceback:
    of this, the original message."""
    text = str(error).strip()
    _, wrapped, traceback = text.rpartition("Traceback (most recent call last):\n")
    if text.startswith("Caught ") and wrapped:
        message = "\n".join(line for line in traceback.splitlines() if not line.startswith(" "))
        text = re.sub(r"^[\w.]+: ", "", message)
    return " ".join(text.split()) or type(error).__name__


def reverse_channels(image: torch.Tensor) -> torch.Tensor:
    return image.flip(0)  # (3, H, W)


def to_network_input(mean, std, bgr: bool, scale: float) -> list:
    """PIL image → (3, H, W): values of 0..scale, channels reversed if bgr, then (x - mean) / std."""
    # (scale·x - mean) / std, without another pass over the pixels
    normalise = transforms.Normalize([m / scale for m in mean], [s / scale for s in std])
    return [transforms.ToTensor(), *([reverse_channels] if bgr else []), normalise]


def train_transform(image_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, bgr=False, scale=1.0):
    """Random crop of 8 to 100 % of the area, resized to image_size, flipped half of the time.

    mean and std belong to values of 0..scale and to the order of the channels after bgr: for BN-Inception
    scale is 255, bgr True, mean (104, 117, 128) and std (1, 1, 1).
    """
    return transforms.Compose([
        transforms.RandomResizedCrop(image_size),
        transforms.RandomHorizontalFlip(),
        *to_network_input(mean, std, bgr, scale),
    ])


def eval_transform(image_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, bgr=False, scale=1.0):
    """Shorter side to image_size · 256/224, of that the centre; otherwise as train_transform."""
    return transforms.Compose([
        transforms.Resize(round(image_size * 256 / 224)),
        transforms.CenterCrop(image_size),
        *to_network_input(mean, std, bgr, scale),
    ])


# ---------------------------------------------------------------- from images to batches

def generator_for(*key: int) -> torch.Generator:
    """A generator of its own for each tuple of integers, neighbouring ones unrelated."""
    words = np.random.SeedSequence([k % 2**64 for k in key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]))


class RandomBatches(Sampler):
    """Batches of an epoch as lists of (index, seed): a function of the labels, the sizes and (seed, epoch).

    images_per_class = 0: all images shuffled; the last ones that fill no batch are dropped.
    images_per_class = k: each batch is batch_size/k classes drawn without replacement and k images of each,
    all different where the class has k. Either way an epoch has N // batch_size batches.

    The seed beside each index makes its augmentation: so batches and augmentations are the same for any
    number of workers, whatever else draws random numbers, and in a resumed run. Call set_epoch before each
    epoch.

    Raises ValueError when the sizes do not fit.
    """

    def __init__(self, labels: np.ndarray, batch_size: int, seed: int, images_per_class: int = 0):
        labels = np.asarray(labels)
        if not 1 <= batch_size <= len(labels):
            raise ValueError(f"batch size {batch_size}: it must be 1 to {len(labels)}, the training images")
        if images_per_class < 0 or images_per_class and batch_size % images_per_class:
            raise ValueError(f"{images_per_class} images per class do not divide the batch size {batch_size}")
        order = np.argsort(labels, kind="stable")
        boundaries = np.flatnonzero(np.diff(labels[order])) + 1
        self.members = [torch.from_numpy(part) for part in np.split(order, boundaries)]  # indices of a class
        if images_per_class and batch_size // images_per_class > len(self.members):
            raise ValueError(f"batch size {batch_size} with {images_per_class} images per class needs "
                             f"{batch_size // images_per_class} classes, there are {len(self.members)}")
        self.num_images, self.batch_size, self.images_per_class = len(labels), batch_size, images_per_class
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = generator_for(self.seed, self.epoch)
        shuffled = torch.randperm(self.num_images, generator=generator)
        for step in range(len(self)):
            batch = shuffled[step * self.batch_size:(step + 1) * self.batch_size]
            if self.images_per_class:
                batch = self.balanced_batch(generator)
            seeds = torch.randint(2**63 - 1, (self.batch_size,), generator=generator)
            yield list(zip(batch.tolist(), seeds.tolist(), strict=True))

    def balanced_batch(self, generator: torch.Generator) -> torch.Tensor:
        """(batch_size,) indices, class after class"""
        k = self.images_per_class
        chosen = []
        for c in torch.randperm(len(self.members), generator=generator)[:self.batch_size // k].tolist():
            members = self.members[c]
            # A class with fewer than k images gives all of them and begins again.
            rounds = [torch.randperm(len(members), generator=generator) for _ in range(-(-k // len(members)))]
            chosen.append(members[torch.cat(rounds)[:k]])
        return torch.cat(chosen)


def worker_options(workers: int, pin_memory: bool) -> dict:
    """Loader options. torch sets its threads to 1 in each worker process by itself."""
    options = {"num_workers": workers, "pin_memory": pin_memory}
    if workers > 0:
        options |= {"persistent_workers": True, "prefetch_factor": 4}
    # A generator of its own, or else every epoch would draw a number from the global one.
    return options | {"generator": torch.Generator()}


def make_train_loader(images: ImageList, transform, batch_size: int, seed: int, images_per_class: int = 0,
                      workers: int = 0, pin_memory: bool = False, skip_bad: bool = False) -> DataLoader:
    """Batches of (N, 3, H, W) and (N,). Before each epoch call loader.batch_sampler.set_epoch(epoch).

    Raises ValueError as RandomBatches does; iterating raises UnreadableImage (see one_line) unless skip_bad.
    """
    batches = RandomBatches(images.labels, batch_size, seed, images_per_class)
    return DataLoader(ImageDataset(images, transform, skip_bad), batch_sampler=batches,
                      **worker_options(workers, pin_memory))


def make_eval_loader(images: ImageList, transform, batch_size: int, workers: int = 0,
                     pin_memory: bool = False, skip_bad: bool = False) -> DataLoader:
    """All images in order, none dropped. With skip_bad the scorer has to drop the rows with label -1."""
    return DataLoader(ImageDataset(images, transform, skip_bad), batch_size=batch_size,
                      **worker_options(workers, pin_memory))


if __name__ == "__main__":
    from datatools import main
    main()
