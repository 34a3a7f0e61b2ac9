"""Every benchmark in every layout, own folders and lists of every kind, and what is said when something is wrong."""

import json
import os
import shutil
import warnings
from functools import partial
from pathlib import Path

import dataset
import flags
import layouts
import numpy as np
import pandas as pd
import prepare
import pytest
import run
import trees
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from refused import Refused

# What is made under a data root, and the data set that it is
MAKERS = {
    "cub": ("cub", trees.make_cub),
    **{f"cars {layout}": ("cars", partial(trees.make_cars, layout=layout)) for layout in (1, 2, 3)},
    "SOP": ("SOP", trees.make_sop),
    "Inshop": ("Inshop", trees.make_inshop),
    **{
        layout: ("folder", partial(trees.make_folder, layout=layout))
        for layout in ("train+test", "train+query+gallery", "classes", "csv")
    },
}


@pytest.fixture(scope="session")
def forest(tmp_path_factory):
    """One tree of each kind with six classes of four images, by the kind; not to be changed."""
    roots = {kind: tmp_path_factory.mktemp("tree") for kind in MAKERS}
    for kind, root in roots.items():
        MAKERS[kind][1](root, classes=6, images=4, size=8)
    return roots


@pytest.fixture
def tree(forest, tmp_path):
    """tree(kind): a copy of that tree, which may be changed."""

    def copy(kind):
        return Path(shutil.copytree(forest[kind], tmp_path / "tree", symlinks=True))

    return copy


def load(root, name="folder", **options):
    return dataset.load_benchmark(name, root, **options)


def refusal(root, name="folder", **options):
    """The one line with which the tree is refused."""
    with pytest.raises(Refused) as caught:
        load(root, name, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def contents(benchmark):
    """What a benchmark holds, but for its root: to compare two."""
    lists = (benchmark.train, benchmark.query, benchmark.gallery)
    return [images and (images.paths, images.labels.tolist(), images.class_names, images.own) for images in lists]


def assert_sound(benchmark):
    """Labels 0..C-1 of int64, every file there, no class and no image in train and test."""
    lists = [images for images in (benchmark.train, benchmark.query, benchmark.gallery) if images is not None]
    for images in lists:
        assert len(images) == len(images.paths) == len(images.labels) > 0
        assert images.labels.dtype == np.int64
        assert 0 <= images.labels.min() and images.labels.max() < len(images.class_names)
        assert all((Path(images.root) / path).is_file() for path in images.paths)
    assert sorted(set(benchmark.train.labels)) == list(range(benchmark.train.num_classes))
    for images in lists[1:]:
        assert not set(benchmark.train.class_names) & set(images.class_names)
        assert not set(benchmark.train.paths) & set(images.paths)


# ---------------------------------------------------------------- the benchmarks, known by eye

# The names of classes, the last training image, the first query, the K of R@K
KNOWN = {
    "cub": ("00{}.Bird_{}", "images/003.Bird_3/Bird_3_0003.jpg", "images/004.Bird_4/Bird_4_0000.jpg", 32),
    "cars 1": ("Car {}", "car_ims/000021.jpg", "car_ims/000004.jpg", 32),
    "cars 2": ("{}", "cars_test/00009.jpg", "cars_train/00004.jpg", 32),  # names are in devkit/cars_meta.mat only
    "cars 3": ("Car {} Type a/b", "car_data/car_data/test/Car 2 Type a-b/00010.jpg",
               "car_data/car_data/train/Car 5 Type a-b/00003.jpg", 32),
    "SOP": ("{}", "bicycle_final/111000000003_3.JPG", "cabinet_final/111000000004_0.JPG", 1000),
    "Inshop": ("id_0000000{}", "Img/img/WOMEN/Dresses/id_00000003/02_3_front.jpg",
               "Img/img/WOMEN/Dresses/id_00000004/02_0_front.jpg", 50),
    "train+test": ("thing_{}", "train/thing_3/3.png", "test/thing_4/0.png", 32),
    "train+query+gallery": ("thing_{}", "train/thing_3/3.png", "query/thing_4/0.png", 32),
    "classes": ("thing_{}", "thing_3/3.png", "thing_4/0.png", 32),
    "csv": ("thing_{}", "pictures/3/3.png", "pictures/0/4.png", 32),
}  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
def test_layouts_known_by_eye(forest, monkeypatch, kind):
    name, root = MAKERS[kind][0], forest[kind]
    benchmark = load(root, name)
    assert_sound(benchmark)
    class_name, last, first, largest = KNOWN[kind]
    known = [class_name.format(c, c) for c in range(1, 7)]
    assert (benchmark.train.class_names, benchmark.query.class_names) == (known[:3], known[3:])
    assert (benchmark.train.paths[-1], benchmark.query.paths[0], benchmark.recall_at[-1]) == (last, first, largest)
    searched = benchmark.gallery
    assert (searched is not None) == (kind in ("Inshop", "train+query+gallery"))
    assert (len(benchmark.train), len(benchmark.query)) == (12, 6 if searched else 12)
    if searched:
        assert searched.class_names == known[3:] and searched.labels.tolist() == [0, 0, 1, 1, 2, 2]
    # whatever the layout, the pixels under a label are those of its class
    for images, offset in ((benchmark.train, 1), (benchmark.query, 4)):
        assert images.own == (name == "folder")
        for path, label in list(zip(images.paths, images.labels, strict=True))[-4:]:
            pixels = np.asarray(Image.open(images.root / path).convert("RGB"), dtype=float).mean((0, 1))
            assert np.abs(pixels - np.random.RandomState(offset + label).uniform(60, 200, 3)).max() < 40
    if name != "folder":
        assert len(benchmark.warnings) == 1 and "train 12 images of 3 classes (published " in benchmark.warnings[0]
        trees.publish(monkeypatch, name, root)
    assert load(root, name).warnings == ()


def test_cub_class_id_is_the_number_of_the_folder(tree):
    images = tree("cub") / "CUB_200_2011" / "images"
    for old, new in (("003.Bird_3", "10.Zebra_finch"), ("001.Bird_1", "9.Yellowhammer"), ("005.Bird_5", "101.Last")):
        (images / old).rename(images / new)
    benchmark = load(images.parent.parent, "cub")
    assert benchmark.train.class_names == "002.Bird_2 004.Bird_4 006.Bird_6 9.Yellowhammer 10.Zebra_finch".split()
    assert benchmark.query.class_names == ["101.Last"]  # the published boundary is 100


def test_no_class_crosses_the_published_boundary_where_others_are_missing():
    for name, classes, train in (
        ("cub", [1, 2, 3, 101, 102], 3),
        ("cub", [1, 150, 151, 200], 1),
        ("cub", [1, 2, 99, 100], 2),  # none of the published test classes: the first half trains
        ("cub", [101, 102, 103, 104], 2),
        ("cars", [1, 97, 98, 99], 3),
        ("glyphs", [1, 2, 101, 102, 103, 104], 3),
    ):
        listing = layouts.Listing(Path("root"), {"all": [(f"{c}.jpg", c) for c in classes]})
        layouts.split_by_class(listing, 0.5, layouts.get(name).last_train_class)
        assert [c for _, c in listing.splits["train"]] == classes[:train]
        assert [c for _, c in listing.splits["test"]] == classes[train:]


def test_cars_names_and_labels_beside_or_inside_the_devkit(tree):
    home = tree("cars 2") / "cars196"
    shutil.move(home / "cars_test_annos_withlabels.mat", home / "devkit")
    names = np.array([[f"Car {i}" for i in range(1, 7)]], dtype=object)
    trees.write_annotations(home / "devkit" / "cars_meta.mat", [], [], class_names=names)
    benchmark = load(home.parent, "cars")
    assert benchmark.train.class_names + benchmark.query.class_names == names[0].tolist()
    assert sorted({path.partition("/")[0] for path in benchmark.train.paths}) == ["cars_test", "cars_train"]


def test_inshop_query_and_gallery_share_labels_where_a_class_is_in_one_only(tree):
    root = tree("Inshop")
    list_file = root / "Inshop_Clothes" / INSHOP
    lines = [line for line in list_file.read_text().splitlines() if not ("00000004" in line and "gallery" in line)]
    list_file.write_text("\n".join(lines))
    benchmark = load(root, "Inshop")
    assert benchmark.query.labels.tolist() == [0, 0, 1, 1, 2, 2] and benchmark.gallery.labels.tolist() == [1, 1, 2, 2]
    assert (benchmark.query.num_classes, benchmark.gallery.num_classes) == (3, 2)
    summary = run.summary_of({"gallery": dataset.fingerprint(benchmark.gallery)})
    assert (summary["gallery"]["images"], summary["gallery"]["classes"]) == (4, 2)


def test_names_in_any_letter_case():
    given = ("sop", "SOP", "INSHOP", "In-Shop", "CUB", "Cars", "folder")
    assert [flags.dataset_name(name) for name in given] == "SOP SOP Inshop Inshop cub cars folder".split()
    for text in ("", "birds", "cub200", "ſop", " cub"):
        assert flags.dataset_name(text) not in layouts.DATASETS


def test_what_was_published():
    known = {name: layouts.get(name) for name in layouts.DATASETS}
    totals = {name: sum(n for n, _ in layout.published.values()) for name, layout in known.items()}
    assert (totals["cub"], totals["cars"], totals["SOP"], totals["Inshop"]) == (11788, 16185, 120053, 52712)
    listing = layouts.Listing(Path("root"), {"train": [("a", 1)] * 3000, "test": [("b", 2)] * 3033})
    assert "its 6,033 images are another benchmark" in layouts.compare_counts("cub", listing)[0]
    for layout in known.values():
        assert not (layout.archive or layout.by_hand) or "an independent audit found" in layout.mirrors


def test_share_of_training_classes(forest):
    for share, expected in ((0.5, 3), (0.75, 4), (0.01, 1), (0.99, 5), (0.6, 4)):
        benchmark = load(forest["classes"], train_classes=share, share_given=share < 0.7)
        assert (benchmark.train.num_classes, benchmark.query.num_classes) == (expected, 6 - expected)


def test_what_is_an_image_and_what_is_skipped(tree, tmp_path):
    root = tree("classes")
    victim = root / "thing_1"
    for name in ("a.webp", "b.BMP", "c.tiff", "deeper/still/d.gif", "deeper.ppm", "f.JPEG"):
        trees.save(victim / name, 1, 0, 8)
    for name in ("Thumbs.db", "readme.txt", "deeper/list.h5", "._a.webp", ".DS_Store"):
        (victim / name).write_text("not an image")
    trees.save(root / "loose.png", 1, 1)
    (victim / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(victim / "pipe.jpg")
    (victim / "null.jpg").symlink_to("/dev/null")
    places = [victim / f"deep {i}" for i in range(12)]
    for folder in places:
        folder.mkdir()
        for other in (victim, *places):  # each folder is read once, however many links lead there
            (folder / f"to {other.name}").symlink_to(other)
    benchmark = load(root)
    names = "0.png 1.png 2.png 3.png a.webp b.BMP c.tiff deeper/still/d.gif deeper.ppm f.JPEG".split()
    assert benchmark.train.paths[:11] == [*("thing_1/" + name for name in names), "thing_2/0.png"]
    told = "6 files that are no images (3 broken links or pipes, 1 .txt, 1 .db, …)"
    assert benchmark.warnings == (f"{root}: skipped {told} and 1 images that lie beside the class folders",)
    (victim / "loop").symlink_to(root)
    assert "thing_1/loop/thing_2/0.png (train) and thing_2/0.png (train) are the same file" in refusal(root)


def test_what_is_not_used_is_said(tree):
    root = tree("train+test")
    (root / "val").mkdir()
    for name in ("list.csv", "list.tsv", "list.txt"):
        (root / name).write_text("path,label,split\n")
    (root / "readme.txt").write_text("Pictures, and no list\n")
    shutil.copy(root / "train/thing_1/0.png", root / "test/thing_4/new.png")  # copies are no mistake
    notes = load(root).warnings
    assert [Path(note.split()[0]).name for note in notes] == ["list.csv", "list.tsv", "list.txt", "val"]
    assert "is not read, the folders next to it are" in notes[0] and notes[3].endswith("val is not used")


@pytest.mark.parametrize("kind", ["train+test", "train+query+gallery"])
def test_splits_are_found_in_any_letter_case(tree, forest, kind):
    root = tree(kind)
    for folder, change in zip(sorted(root.iterdir()), (str.upper, str.title, str.upper), strict=False):
        folder.rename(folder.with_name(change(folder.name)))
    found, expected = contents(load(root)), contents(load(forest[kind]))
    assert [part[1:] for part in found if part] == [part[1:] for part in expected if part]


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("kind", ["train+test", "train+query+gallery"])
def test_data_without_train_can_be_scored_but_not_trained_on(tree, forest, kind, listed):
    root, expected = tree(kind), load(forest[kind])
    for folder in (root / "train").iterdir():
        shutil.rmtree(folder)
    assert "no image in the split 'train'" in refusal(root) and load(root, training=False).query
    shutil.rmtree(root / "train")
    if listed:
        files = [path.relative_to(root) for path in sorted(root.rglob("*.png"))]
        rows = [f"{path},{path.parts[1]},{path.parts[0].upper()}" for path in files]
        (root / "list.csv").write_text("\n".join(["path,label,split", *rows]))
        root = root / "list.csv"
    assert refusal(root).startswith(f"{root}: there is no split 'train', so it can be scored")
    benchmark = load(root, training=False)
    assert benchmark.train is None and benchmark.warnings == ()
    assert contents(benchmark)[1:] == contents(expected)[1:]


@pytest.mark.parametrize("inside", ["", "train"])
def test_class_folders_one_level_too_deep(tree, inside):
    top = tree("train+test" if inside else "classes") / inside
    for n, kind in enumerate(("animals/cat", "animals/dog", "animals/emu", "animals/fox", "cars/x/bus", "cars/x/van")):
        trees.save(top / kind / "0.png", n, 0, 8)
    trees.save(top / "plants" / "more" / "0.png", 7, 0, 8)  # one folder more, nothing mistaken
    for name in ("0.png", "old/0.png", "new/0.png"):
        trees.save(top / "tools" / name, 8, 0, 8)
    assert load(top.parent if inside else top, training=False).warnings[0] == (
        f"{top / 'animals'}: holds no images itself but 4 folders of them (cat, dog, emu, …), all taken as one class; "
        f"if each of these is a class, move them into {top}"
    )


@pytest.mark.parametrize(
    "one, other", [("Cat", "cat"), ("\u00e9", "e\u0301"), ("cat", "cat "), ("STRASSE", "stra\u00dfe")]
)
def test_class_names_that_look_alike_are_pointed_out(tree, one, other):
    root = tree("train+test")
    (root / "train" / "thing_1").rename(root / "train" / one)
    (root / "test" / "thing_5").rename(root / "test" / other)
    (line,) = load(root).warnings
    assert f"{one!a} (train)" in line and f"{other!a} (test)" in line and "taken as two classes;" in line


# ---------------------------------------------------------------- lists of own pictures

LABELS = ("007", "7", "NA", "null", "1e3", 'nan, "a"; b')  # each is text, and a class of its own
# What a spreadsheet or pandas may do to the same table, as options of DataFrame.to_csv
WRITTEN = {
    "as it is": {},
    "semicolons": {"sep": ";"},
    "tabs": {"sep": "\t"},
    "everything in quotation marks": {"quoting": 1},
    "byte order mark": {"encoding": "utf-8-sig"},
    "UTF-16, tabs": {"encoding": "utf-16", "sep": "\t"},
    "UTF-16, big-endian": {"encoding": "utf-16-be"},
    "CRLF": {"lineterminator": "\r\n"},
    "CR": {"lineterminator": "\r"},
    "nameless index": {"index": True},
    "nameless index, tabs": {"index": True, "sep": "\t"},
    "letter case, order": {"columns": ["split", "label", "path"], "header": ["SPLIT", " Label ", "Path"]},
}


@pytest.fixture
def table(tree):
    """(the folder of the tree `csv`, its list as a table of text, with strange labels)"""
    root = tree("csv")
    frame = pd.read_csv(root / "list.csv", dtype=str)
    (root / "list.csv").unlink()
    frame["label"] = frame["label"].map({f"thing_{c}": label for c, label in enumerate(LABELS, 1)})
    return root, frame


def listed(frame, **splits):
    """{split: (path, label)} of a table; splits gives other names to those in it."""
    parts = frame.groupby("split", sort=False)
    return {splits.get(split, split): list(zip(part.path, part.label, strict=True)) for split, part in parts}


def read(path):
    listing = layouts.read_splits("folder", path)
    assert listing.own and listing.source == str(path)
    return listing.splits


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "TXT"])
def test_the_same_list_however_it_is_written(table, how, suffix):
    root, frame = table
    file = root / f"my list.{suffix}"
    options = {"index": False, "encoding": "utf-8"} | WRITTEN[how]
    text = frame.assign(split=frame["split"].str.upper() if "case" in how else frame["split"]).to_csv(**options)
    if suffix == "TXT":  # further columns, with what could mislead; empty lines
        more = frame.assign(note="a;b\tc,d;e\nf", Unnamed="")
        text = more.to_csv(**{key: value for key, value in options.items() if key not in ("columns", "header")}) + "\n"
        text += options.get("sep", ",") * (4 + options["index"]) + "\n"
    file.write_bytes((b"\xfe\xff" if how.endswith("endian") else b"") + text.encode(options["encoding"]))
    assert read(file) == listed(frame)
    assert layouts.read_splits("folder", root).splits == listed(frame)  # the only list in the folder
    assert load(file).query.class_names == sorted(LABELS[3:])


def test_without_splits_the_classes_are_split_and_paths_may_lead_anywhere(table):
    root, frame = table
    frame[["path", "label"]].to_csv(root / "list.csv", index=False)
    expected = sorted(LABELS)
    plain = load(root, train_classes=0.67)
    assert (plain.train.class_names, plain.query.class_names) == (expected[:4], expected[4:])
    moved = root / "lists" / "new" / "a.csv"
    moved.parent.mkdir(parents=True)
    for prefix in (f"{root}/", "../../"):
        frame[["path", "label"]].assign(path=prefix + frame.path).to_csv(moved, index=False)
        benchmark = load(moved, train_classes=0.67)
        assert_sound(benchmark)
        for found, known in ((benchmark.train, plain.train), (benchmark.query, plain.query)):
            assert found.labels.tolist() == known.labels.tolist()
            assert all(os.path.samefile(found.file(i), known.file(i)) for i in range(len(known)))
    (root / "pictures/0/1.png").unlink()
    assert "a.csv names 1 images that are not in" in refusal(moved)


@pytest.mark.parametrize("yes, no, empty", [("1", "0", ""), ("1.0", "0.0", "None"), ("True", "False", "")])
@pytest.mark.parametrize("both", [True, False])
def test_lists_of_open_metric_learning(table, yes, no, empty, both):
    root, frame = table
    tested = frame["split"] == "test"
    first = tested & (frame.index % 4 < 2)
    frame["split"] = frame["split"].replace("test", "validation")
    frame["is_query"] = np.where(tested, np.where(first | both, yes, no), empty)
    frame["is_gallery"] = np.where(tested, np.where(~first | both, yes, no), empty)
    for corner in ("x_1", "x_2", "y_1", "y_2"):
        frame[corner] = empty
    frame.to_csv(root / "df.csv")
    if not both:
        frame.loc[first, "split"], frame.loc[tested & ~first, "split"] = "query", "gallery"
    assert read(root / "df.csv") == listed(frame, validation="test")


OML = "path,label,split,is_query,is_gallery,x_1,x_2,y_1,y_2\na,A,train,,,,,,\n"
# What is in a list, and with which words it is refused
WRONG = {
    "empty": ("", "line 1: expected the columns path,label,split, each once"),
    "no header": ("a.png,cat,train\nb.png,dog,test\n", "line 1: expected the columns path,label,split"),
    "no labels": ("path,class,split\na,A,train\n", "line 1: expected the columns path,label,split"),
    "header alone": ("path,label\n", "the splits in it are none"),
    "label missing": ("path,label\na,A\nb,\n", "line 3: expected a path and a label, each on one line, found 'b,'"),
    "few fields": ("path;label;split\na;A\n", "line 2: expected 3 fields as in the header, found 'a;A'"),
    "many fields": ("path,label\n\na,A, B\n", "line 3: expected 2 fields"),
    "line after a long field": ('x,path,label\n"1\n2",a,A\n3,b\n', "line 4: expected 3 fields"),
    "unknown split": ("path,label,split\na,A,train\nb,B,dev\n", "line 3: expected a split: train, test, query"),
    "only train": ("path,label,split\na,A,train\n", "the splits in it are train; needed are train and test, or"),
    "open quotation": ('path,label\n"a,A\nb,B\n', "line 2: expected 2 fields"),
    "endless field": ('path,label\na,A\n"' + 140000 * "b" + ",B", "line 3: field larger than field limit"),
    "not UTF-8": ("path,label\na,M\udce4rz\n", "not a text file (byte 14 is no UTF-8); save it as UTF-8"),
    "zero bytes": ("path,label\na,A\0\n", "not a text file"),
    "validation alone": ("path,label,split\na,A,validation\n", "line 2: expected a split: train, test"),
    "mixture": (OML + "b,B,validation,1,1,,,,\nc,B,validation,1,0,,,,\n", "in it are train, test, query; needed are"),
    "boxes": (OML + "b,B,validation,1,1,0,9,,\n", "line 3: expected no bounding box in x_1, x_2, y_1, y_2"),
    "not there": ("path,label\na,A\nb,B\n", "list.csv names 2 images that are not in"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_a_list_is_said_with_its_line(tmp_path, case):
    text, words = WRONG[case]
    (tmp_path / "list.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    message = refusal(tmp_path / "list.csv")
    assert words in message and message.startswith(str(tmp_path / "list.csv"))


def spoil(file, old, new):
    """Replaces the first `old` in a text file."""

    def change(home):
        text = (home / file).read_text()
        assert old in text
        (home / file).write_text(text.replace(old, new.format(home=home), 1))

    return change


def remove(*names):
    return lambda home: [shutil.rmtree(home / n) if (home / n).is_dir() else (home / n).unlink() for n in names]


def write(name, content=b""):
    return lambda home: (home / name).write_bytes(content)


def annotate(name, files, classes, field="relative_im_path"):
    return lambda home: trees.write_annotations(home / name, files, classes, field)


def move(old, new):
    return lambda home: (home / old).rename(home / new)


SOP, INSHOP = "Ebay_test.txt", "Eval/list_eval_partition.txt"
BROKEN = [
    ("cub", remove("images"), "images is not there; `python code/prepare.py download cub`"),
    ("cub", move("images/002.Bird_2", "images/Sparrow"), "Sparrow: a class folder begins with its number"),
    ("cub", move("images/002.Bird_2", "images/1.Copy"), "1.Copy: a second class folder with the number 1"),
    ("cub", lambda home: (home / "images/7.None").mkdir(), "images/7.None: the class folder holds no image"),
    ("cub", remove(*(f"images/00{i}.Bird_{i}" for i in (2, 3, 4, 5, 6))), "1 class with images found, at least 2"),
    ("cars 1", remove("cars_annos.mat"), "cars_annos.mat is not there; `python code/prepare.py download cars`"),
    ("cars 1", annotate("cars_annos.mat", ["../1.jpg"], [1]), "cars_annos.mat, line 1: expected a path inside"),
    ("cars 1", annotate("cars_annos.mat", ["a"], [1], "x"), "`annotations` with the fields relative_im_path and class"),
    ("cars 1", remove("car_ims/000003.jpg", "car_ims/000005.jpg"), "cars_annos.mat names 2 images that are not in"),
    ("cars 2", remove("cars_test_annos_withlabels.mat"), "cars_test_annos_withlabels.mat is not there; "),
    ("cars 3", spoil("anno_train.csv", "31,1\n", "31,7\n"), "anno_train.csv, line 1: expected a class from 1 to 6"),
    ("SOP", write(SOP), "Ebay_test.txt, line 1: expected the header 'image_id class_id super_class_id path'"),
    ("SOP", spoil(SOP, " 4 2 ", " 4 "), "Ebay_test.txt, line 2: expected image_id class_id super_class_id path, foun"),
    ("SOP", remove("bicycle_final/111000000003_1.JPG"), "names 1 images that are not in "),
    ("SOP", spoil(SOP, "cabinet_final/", "../other/"), "line 2: expected a path inside the data folder, found '../ot"),
    ("SOP", spoil(SOP, " 4 2 ", " 1 1 "), "train and test share 1 classes, as 1; retrieval is tested on unseen"),
    ("SOP", spoil(SOP, "000004_0", "000004_1"), "000004_1.JPG (test) are the same file, listed twice; keep one"),
    ("SOP", spoil(SOP, "path\n", "path\n25 4 2 ./bicycle_final//111000000001_0.JPG\n"),
     "bicycle_final/111000000001_0.JPG (train) and ./bicycle_final//111000000001_0.JPG (test) are the same file"),
    ("SOP", write(SOP, b"\xff\xfe\x00"), "Ebay_test.txt: not a text file"),
    ("Inshop", remove(INSHOP), "list_eval_partition.txt is not there; `python code/prepare.py download Inshop`"),
    ("Inshop", spoil(INSHOP, " query", " val"), "line 15: expected image_name item_id evaluation_status, found"),
    ("train+test", shutil.rmtree, "is not there; --data-root names your folder of images or your list"),
    ("train+test", remove("test"), "it has 1 folders (train) and 0 lists (.csv, .tsv, .txt); needed are the"),
    ("classes", move("thing_1", "QUERY"), "6 folders (QUERY, thing_2, thing_3, …) and 0 lists (.csv, .tsv"),
    ("train+test", remove(*(f"test/thing_{i}" for i in (4, 5, 6))), "no image in the split 'test'"),
    ("train+test", move("test/thing_4", "test/thing_1"), "train and test share 1 classes, as 'thing_1'"),
    ("csv", spoil("list.csv", "thing_4", "thing_1"), "train and test share 1 classes, as 'thing_1'"),
    ("csv", lambda home: [remove("pictures/0/1.png")(home), os.mkfifo(home / "pictures/0/1.png")],
     "list.csv names 1 images that are not in"),
    ("csv", write("more.csv"), "it has 1 folders (pictures) and 2 lists"),
    *(("train+test", lambda home, make=make: make(home / "train/thing_1/0.png", home / "test/thing_4/new.png"),
       "train/thing_1/0.png (train) and test/thing_4/new.png (test) are the same file, listed twice; keep one of the")
      for make in (os.link, os.symlink)),
    ("classes", lambda home: (home / "thing_7").symlink_to(home / "thing_5"),
     "thing_5/0.png (test) and thing_7/0.png (test) are the same file, listed twice; keep one"),
    *(("csv", spoil("list.csv", "split\n", f"split\n{path},thing_4,test\n"), f"{path} (test) are the same file")
      for path in ("pictures/./0/.//1.png", "{home}/pictures/0/1.png")),
]  # fmt: skip


@pytest.mark.parametrize("row", range(len(BROKEN)), ids=lambda row: f"{BROKEN[row][0]}: {BROKEN[row][2][:30]}")
def test_what_is_wrong_is_said_in_one_line(tree, capsys, row):
    kind, break_it, words = BROKEN[row]
    name, root = MAKERS[kind][0], tree(kind)
    break_it(root if name == "folder" else root / layouts.get(name).home)
    message = refusal(root, name)
    assert words.replace("{home}", str(root)) in message and message == refusal(root, name, training=False)
    try:
        assert not prepare.check(name, root)  # what training refuses is a problem there
        assert message in capsys.readouterr().out
    except Refused as error:
        assert str(error) == message


TWO_LESS = ["thing_5", "thing_6", *(f"thing_3/{i}.png" for i in (1, 2, 3))]
LEFT_OUT = "queries have no other image of their class{}; they are left out of the figures"
SAYS_LITTLE = [
    ("classes", remove(*TWO_LESS), None, "1 of 5 " + LEFT_OUT.format("")),
    ("classes", remove(*TWO_LESS), 0.75, "only one class to test on, figures say nothing; is it the right folder?"),
    ("classes", remove(*TWO_LESS, *(f"thing_4/{i}.png" for i in (1, 2, 3))), None, "2 of 2 " + LEFT_OUT.format("")),
    ("train+query+gallery", remove("gallery/thing_4"), None, "2 of 6 " + LEFT_OUT.format(" in the gallery")),
    ("train+query+gallery", lambda home: [path.rename(f"{path} other") for path in (home / "gallery").iterdir()],
     None, "6 of 6 " + LEFT_OUT.format(" in the gallery")),
]  # fmt: skip


@pytest.mark.parametrize("kind, change, share, words", SAYS_LITTLE)
def test_tests_that_say_little_are_pointed_out(tree, kind, change, share, words):
    root = tree(kind)
    change(root)
    assert load(root, train_classes=share).warnings == (f"{root}: {words}",)


# scipy can crash on damage to an uncompressed .mat; trees.py writes compressed ones, as MATLAB does.
FUZZED = {
    "SOP": "Stanford_Online_Products/Ebay_train.txt",
    "Inshop": "Inshop_Clothes/Eval/list_eval_partition.txt",
    "cars 1": "cars196/cars_annos.mat",
    "cars 3": "cars196/anno_train.csv",
    "csv": "list.csv",
}


@pytest.mark.parametrize("kind", FUZZED)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_lists(kind, forest, tmp_path_factory, data):
    """The true list with a stretch of it replaced, and bytes out of nowhere: anything but one line fails."""
    root = tmp_path_factory.getbasetemp() / f"fuzzed {kind}"
    if not root.exists():
        shutil.copytree(forest[kind], root)
    original = (forest[kind] / FUZZED[kind]).read_bytes()
    start = data.draw(st.integers(0, len(original)))
    length = data.draw(st.integers(0, 40))
    text = st.text("019 ,;\"'\n\r\t_idtrainquery./\\:\0é", max_size=40).map(str.encode)
    patch = data.draw(st.one_of(st.binary(max_size=40), text))
    for content in (original[:start] + patch + original[start + length :], original[:start], patch):
        (root / FUZZED[kind]).write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # scipy's, about damaged files
                assert_sound(load(root / "list.csv" if kind == "csv" else root, MAKERS[kind][0]))
        except (Refused, OSError) as error:
            assert "\n" not in str(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["cars 1", "SOP", "Inshop", "classes", pytest.param("train+query+gallery", marks=pytest.mark.drawn), "list"]
)
def test_trains_and_scores(call, undrawn, tmp_path, kind):
    name, make = MAKERS.get(kind, MAKERS["csv"])
    root = tmp_path / "data"
    make(root, classes=8, images=6)
    if kind == "list":  # as open-metric-learning has it, beside other folders, with absolute paths
        frame = pd.read_csv(root / "list.csv")
        seen = frame["split"] == "train"
        frame = frame.assign(path=f"{root}/" + frame.path, split=np.where(seen, "train", "validation"))
        root = tmp_path / "df.tsv"
        frame.assign(is_query=(~seen).where(~seen), is_gallery=(~seen).where(~seen)).to_csv(root, sep="\t")
    words = ["--dataset", name, "--data-root", root, "--log-dir", tmp_path / "logs", "--epochs", 1]
    trained = call("train.py", *TINY, *words)
    assert trained.code == 0, trained.err
    run, figures = tmp_path / "logs" / name / "run_1", tmp_path / "figures.json"
    place = [] if name == "folder" else ["--data-root", root]  # of own pictures, a checkpoint knows it
    scored = call("evaluate.py", "--model-path", run, "--gpu-id", -1, "--json", figures, *place)
    assert scored.code == 0, scored.err
    found = json.loads(figures.read_text())
    row = pd.read_csv(run / "results.csv").iloc[-1]
    assert found["figures"] == {f"R@{k}": row[f"R@{k}"] for k in layouts.get(name).recall_at}
    assert (found["gallery"] is not None) == (kind in ("Inshop", "train+query+gallery"))
