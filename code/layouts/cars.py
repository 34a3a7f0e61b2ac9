"""Cars-196, in whichever of the three layouts of LAYOUT.by_hand lies in cars196/; each is split by class."""

from pathlib import Path

import numpy as np
from refused import Refused, one_line

from layouts.reading import AUDIT, Layout, Listing, bad_line, inside_root, read_rows, read_text


def read(home: Path) -> Listing:
    def find(name):  # some copies have the test annotations beside devkit/, some inside
        return home / name if (home / name).is_file() else home / "devkit" / name

    whole = home / "cars_annos.mat"
    if not whole.is_file() and (home / "names.csv").is_file():
        return read_kaggle(home)
    if not whole.is_file() and (home / "cars_train").is_dir():
        train, test = find("cars_train_annos.mat"), find("cars_test_annos_withlabels.mat")
        pairs = read_annotations(train, "fname", "cars_train/") + read_annotations(test, "fname", "cars_test/")
        return Listing(home, {"all": pairs}, f"{train} or {test.name}", read_names(find("cars_meta.mat")))
    return Listing(home, {"all": read_annotations(whole, "relative_im_path")}, str(whole), read_names(whole))


def read_mat(path: Path) -> dict:
    """The variables of a MATLAB file."""
    from scipy.io import loadmat  # comes with scikit-learn

    with open(path, "rb") as file:
        try:
            return loadmat(file, squeeze_me=True)
        except Exception as error:  # on a broken file, scipy raises whatever it stumbles over
            raise Refused(f"{path}: not a readable .mat file ({one_line(error)})") from None


def read_annotations(path: Path, file_field: str, folder: str = "") -> list[tuple[str, int]]:
    annotations = np.atleast_1d(read_mat(path).get("annotations"))
    try:
        files, classes = annotations[file_field], [int(class_id) for class_id in annotations["class"]]
    except (IndexError, TypeError, ValueError, OverflowError):
        raise Refused(f"{path}: `annotations` with the fields {file_field} and class (numbers) expected") from None
    files = [inside_root(f"{folder}{file}", path, number) for number, file in enumerate(files, 1)]
    return list(zip(files, classes, strict=True))


def read_names(path: Path) -> dict[int, str]:
    """Class id → name, for the eye only: empty where the file or the names are not there."""
    names = read_mat(path).get("class_names", []) if path.is_file() else []
    return {i: str(name) for i, name in enumerate(np.atleast_1d(names), 1)}


def read_kaggle(home: Path) -> Listing:
    listed = [name.strip().strip('"') for name in read_text(home / "names.csv").split("\n")]
    names = dict(enumerate(filter(None, listed), 1))
    pairs = []
    for part in ("train", "test"):
        list_file = home / f"anno_{part}.csv"
        pattern = r"(?P<path>[^,]+)(?:,[^,]*){4},\s*(?P<class>\d{1,9})"
        for number, row in read_rows(list_file, pattern, "file,x1,y1,x2,y2,class"):
            class_id = int(row["class"])
            if class_id not in names:
                raise bad_line(list_file, number, f"a class from 1 to {len(names)}, as in names.csv", row[0])
            folder = f"car_data/car_data/{part}/{names[class_id].replace('/', '-')}"
            pairs.append((f"{folder}/{row['path'].strip()}", class_id))
    return Listing(home, {"all": pairs}, str(home / "anno_*.csv"), names)


LAYOUT = Layout(
    home="cars196",
    read=read,
    published={"train": (8054, 98), "test": (8131, 98)},
    last_train_class=98,
    by_hand="""Cars-196 cannot be downloaded: its pages are gone. Put one of these under {home}:
  1. car_ims.tgz (md5 d5c8f0aa497503f355e17dc7886c3f14), unpacked to car_ims/,
     and cars_annos.mat (md5 b407c6086d669747186bd1d764ff9dbc)
  2. cars_train/ and cars_test/, car_devkit.tgz (md5 c3b158d763b6e2245038c8ad08e45376), unpacked to devkit/,
     and cars_test_annos_withlabels.mat (md5 b0a2b23655a3edd16d84508592a98d10);
     the cars_test_annos.mat of the devkit has no labels
  3. "stanford-car-dataset-by-classes-folder" from Kaggle (user jutrera), unpacked:
     names.csv, anno_train.csv, anno_test.csv and car_data/""",
    mirrors=AUDIT + "tanganke/stanford_cars on Hugging Face (revision 9abf6cf7) has the right 8,144 + 8,041 "
    "images; their bytes were not compared. Do not rely on torchvision: its downloader raises an error.",
)
