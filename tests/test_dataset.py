"""Every benchmark in every layout, what is wrong with them when something is, and batches to the bit."""

import multiprocessing
import shutil
import signal
import warnings
from pathlib import Path

import dataset
import flags
import layouts
import numpy as np
import pytest
import torch
import trees
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

SMALL = dataset.train_transform(16)
SMALL_EVAL = dataset.eval_transform(16)


def pairs(images):
    """(path, class name) of every image, sorted"""
    return sorted((path, images.class_names[label]) for path, label in zip(images.paths, images.labels, strict=True))


def assert_sound(benchmark):
    """Labels 0..C-1 of int64, every file there, no class and no image in train and test."""
    lists = [images for images in (benchmark.train, benchmark.query, benchmark.gallery) if images is not None]
    for images in lists:
        assert len(images) == len(images.paths) == len(images.labels) > 0
        assert images.labels.dtype == np.int64
        assert 0 <= images.labels.min() and images.labels.max() < images.num_classes == len(images.class_names)
        assert all((Path(images.root) / path).is_file() for path in images.paths)
    assert sorted(set(benchmark.train.labels)) == list(range(benchmark.train.num_classes))
    for images in lists[1:]:
        assert not set(benchmark.train.class_names) & set(images.class_names)
        assert not set(benchmark.train.paths) & set(images.paths)


# ---------------------------------------------------------------- the benchmarks, known by eye


def test_cub(tmp_path):
    trees.make_cub(tmp_path, classes=5, images=5)
    benchmark = dataset.load_benchmark("cub", tmp_path)
    assert_sound(benchmark)
    assert benchmark.train.class_names == ["001.Bird_1", "002.Bird_2"]
    assert benchmark.query.class_names == ["003.Bird_3", "004.Bird_4", "005.Bird_5"]
    assert benchmark.train.paths[-1] == "images/002.Bird_2/Bird_2_0004.jpg"
    assert benchmark.query.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert benchmark.gallery is None and benchmark.recall_at == (1, 2, 4, 8, 16, 32)
    assert benchmark.warnings == (
        "cub: the counts differ from the published ones: train 10 images of 2 classes (published 5,864 of 100), "
        "test 15 images of 3 classes (published 5,924 of 100)",
    )


def test_cub_class_id_is_the_number_of_the_folder(tmp_path):
    home = trees.make_cub(tmp_path, classes=3)
    (home / "images" / "003.Bird_3").rename(home / "images" / "10.Zebra_finch")
    (home / "images" / "001.Bird_1").rename(home / "images" / "9.Yellowhammer")
    benchmark = dataset.load_benchmark("cub", tmp_path)
    assert benchmark.train.class_names == ["002.Bird_2", "9.Yellowhammer"]
    assert benchmark.query.class_names == ["10.Zebra_finch"]


@pytest.mark.parametrize(
    ("name", "classes", "train", "test"),
    [
        ("cub", [1, 2, 3, 101, 102], 3, 2),
        ("cub", [1, 150, 151, 200], 1, 3),
        ("cub", [1, 2, 99, 100], 2, 2),  # none of the published test classes: the first half trains
        ("cub", [101, 102, 103, 104], 2, 2),
        ("cars", [1, 97, 98, 99], 3, 1),
        ("glyphs", [1, 2, 101, 102, 103, 104], 3, 3),
    ],
)
def test_no_class_crosses_the_published_boundary_where_others_are_missing(name, classes, train, test):
    listing = layouts.Listing(Path("root"), {"all": [(f"{c}.jpg", c) for c in classes]})
    listing.last_train_class = {"cub": 100, "cars": 98}.get(name)
    layouts.split_by_class(listing, 0.5)
    assert [c for _, c in listing.splits["train"]] == classes[:train]
    assert [c for _, c in listing.splits["test"]] == classes[train:] and len(classes) == train + test


def test_the_published_boundary_is_that_of_the_benchmark(tmp_path):
    home = trees.make_cub(tmp_path, classes=5)
    (home / "images" / "005.Bird_5").rename(home / "images" / "101.Bird_5")
    benchmark = dataset.load_benchmark("cub", tmp_path)
    assert (benchmark.train.num_classes, benchmark.query.class_names) == (4, ["101.Bird_5"])
    trees.make_cars(tmp_path, classes=4)
    assert layouts.read_listing("cars", tmp_path).last_train_class == 98


def test_counts_as_published_give_no_warning_and_the_2010_edition_one(monkeypatch, tmp_path):
    trees.make_cub(tmp_path, classes=4, images=3)
    assert trees.publish(monkeypatch, "cub", tmp_path) == {"train": (6, 2), "test": (6, 2)}
    assert dataset.load_benchmark("cub", tmp_path).warnings == ()
    listing = layouts.Listing(tmp_path, {"train": [("a", 1)] * 3000, "test": [("b", 2)] * 3033})
    assert "2010 edition" in layouts.compare_counts("cub", listing)[1]


@pytest.mark.parametrize("layout", [1, 2, 3])
def test_cars_in_three_layouts(tmp_path, layout):
    home = trees.make_cars(tmp_path, layout, classes=6, images=4)
    benchmark = dataset.load_benchmark("cars", tmp_path)
    assert_sound(benchmark)
    assert len(benchmark.train) == len(benchmark.query) == 12
    assert benchmark.train.num_classes == benchmark.query.num_classes == 3
    names = {1: "Car 4", 2: "4", 3: "Car 4 Type a/b"}  # layout 2 carries names in devkit/cars_meta.mat only
    assert benchmark.query.class_names[0] == names[layout]
    assert benchmark.gallery is None and benchmark.recall_at == (1, 2, 4, 8, 16, 32)
    # whatever the layout, the pixels under a label are those of its class
    for images in (benchmark.train, benchmark.query):
        offset = 1 if images is benchmark.train else 4
        for path, label in list(zip(images.paths, images.labels, strict=True))[:4]:
            pixels = np.asarray(Image.open(home / path), dtype=float).mean((0, 1))
            colour = np.random.RandomState(offset + label).uniform(60, 200, 3)
            assert np.abs(pixels - colour).max() < 20


def test_cars_names_and_labels_beside_or_inside_the_devkit(tmp_path):
    home = trees.make_cars(tmp_path, 2, classes=4)
    shutil.move(home / "cars_test_annos_withlabels.mat", home / "devkit")
    trees.write_annotations(
        home / "devkit" / "cars_meta.mat",
        [],
        [],
        class_names=np.array([[f"Car {i}" for i in range(1, 5)]], dtype=object),
    )
    benchmark = dataset.load_benchmark("cars", tmp_path)
    assert benchmark.train.class_names + benchmark.query.class_names == ["Car 1", "Car 2", "Car 3", "Car 4"]
    assert sorted({path.partition("/")[0] for path in benchmark.train.paths}) == ["cars_test", "cars_train"]


def test_sop(tmp_path):
    trees.make_sop(tmp_path, classes=6, images=3)
    benchmark = dataset.load_benchmark("SOP", tmp_path)
    assert_sound(benchmark)
    assert benchmark.train.class_names == ["1", "2", "3"] and benchmark.query.class_names == ["4", "5", "6"]
    assert benchmark.query.paths[0] == "cabinet_final/111000000004_0.JPG"
    assert benchmark.gallery is None and benchmark.recall_at == (1, 10, 100, 1000)


def test_inshop(tmp_path):
    trees.make_inshop(tmp_path, classes=6, images=5)
    benchmark = dataset.load_benchmark("Inshop", tmp_path)
    assert_sound(benchmark)
    assert (len(benchmark.train), len(benchmark.query), len(benchmark.gallery)) == (15, 6, 9)
    assert benchmark.query.class_names == benchmark.gallery.class_names == [f"id_{i:08d}" for i in (4, 5, 6)]
    assert benchmark.query.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert benchmark.gallery.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert benchmark.recall_at == (1, 10, 20, 30, 40, 50)


def test_inshop_query_and_gallery_share_labels_where_a_class_is_in_one_only(tmp_path):
    home = trees.make_inshop(tmp_path, classes=6, images=3)
    list_file = home / "Eval" / "list_eval_partition.txt"
    lines = [line for line in list_file.read_text().splitlines() if not ("00000004" in line and "gallery" in line)]
    list_file.write_text("\n".join(lines))
    benchmark = dataset.load_benchmark("Inshop", tmp_path)
    assert benchmark.query.labels.tolist() == [0, 0, 1, 1, 2, 2] and benchmark.gallery.labels.tolist() == [1, 2]
    assert any("line 1 promises 18 images, 17 follow" in line for line in benchmark.warnings)


def test_glyphs(tmp_path, monkeypatch):
    small = layouts.ensure_glyphs
    monkeypatch.setattr(layouts, "ensure_glyphs", lambda root: small(root, 6, 4, 16, progress=False))
    benchmark = dataset.load_benchmark("glyphs", tmp_path)
    assert_sound(benchmark)
    assert (len(benchmark.train), benchmark.train.num_classes, benchmark.query.num_classes) == (12, 3, 3)


# ---------------------------------------------------------------- own pictures


@pytest.mark.parametrize("layout", ["train+test", "classes", "csv", "train+query+gallery"])
def test_folder_layouts(tmp_path, layout):
    trees.make_folder(tmp_path, layout, classes=6, images=4)
    benchmark = dataset.load_benchmark("folder", tmp_path)
    assert_sound(benchmark)
    assert benchmark.train.class_names == ["thing_1", "thing_2", "thing_3"]
    assert benchmark.query.class_names == ["thing_4", "thing_5", "thing_6"]
    assert (benchmark.gallery is not None) == (layout == "train+query+gallery")
    assert len(benchmark.query) == (6 if benchmark.gallery else 12)
    assert benchmark.warnings == () and benchmark.recall_at == (1, 2, 4, 8, 16, 32)


def test_folder_csv_by_its_name_with_query_and_gallery_and_without_split(tmp_path):
    trees.make_folder(tmp_path, "csv", classes=4, images=4)
    rows = (tmp_path / "list.csv").read_text().splitlines()[1:]
    three = [row.replace("test", "query" if i % 2 else "gallery") for i, row in enumerate(rows)]
    (tmp_path / "three.csv").write_text(
        "\ufeffLabel,Path,SPLIT\r\n"
        + "\r\n".join(",".join([label, f'"{path}"', split]) for path, label, split in (row.split(",") for row in three))
    )
    benchmark = dataset.load_benchmark("folder", tmp_path / "three.csv")
    assert_sound(benchmark)
    assert len(benchmark.query) == len(benchmark.gallery) == 4
    (tmp_path / "two.csv").write_text("path,label\n" + "\n".join(row.rpartition(",")[0] for row in rows))
    benchmark = dataset.load_benchmark("folder", tmp_path / "two.csv", train_classes=0.75)
    assert_sound(benchmark)
    assert (benchmark.train.num_classes, benchmark.query.num_classes) == (3, 1)


@pytest.mark.parametrize("share, expected", [(0.5, 2), (0.75, 4), (0.01, 1), (0.99, 4), (0.6, 3)])
def test_folder_share_of_training_classes(tmp_path, share, expected):
    trees.make_folder(tmp_path, "classes", classes=5, images=1, size=8)
    benchmark = dataset.load_benchmark("folder", tmp_path, share)
    assert (benchmark.train.num_classes, benchmark.query.num_classes) == (expected, 5 - expected)


def test_folder_takes_what_pillow_opens_and_counts_the_rest(tmp_path):
    trees.make_folder(tmp_path, "classes", classes=4, images=2)
    for name in ("a.webp", "b.BMP", "c.tiff", "deeper/still/d.gif", "e.ppm", "f.JPEG"):
        trees.save(tmp_path / "thing_1" / name, 1, 0)
    for name in ("Thumbs.db", "readme.txt", "deeper/list.h5", "._a.webp", ".DS_Store"):
        (tmp_path / "thing_1" / name).write_text("not an image")
    benchmark = dataset.load_benchmark("folder", tmp_path)
    assert benchmark.train.paths[:-2] == [
        "thing_1/" + name
        for name in ("0.png", "1.png", "a.webp", "b.BMP", "c.tiff", "deeper/still/d.gif", "e.ppm", "f.JPEG")
    ]
    assert benchmark.warnings == (f"{tmp_path}: 3 files that are not images were skipped",)
    loader = dataset.make_eval_loader(benchmark.train, SMALL_EVAL, 10)
    assert next(iter(loader))[0].shape == (10, 3, 16, 16)


def test_folder_says_what_it_does_not_use(tmp_path):
    trees.make_folder(tmp_path, "train+test", classes=4, images=2)
    (tmp_path / "val").mkdir()
    (tmp_path / "list.csv").write_text("path,label,split\n")
    lines = dataset.load_benchmark("folder", tmp_path).warnings
    assert len(lines) == 2 and "list.csv is not read" in lines[0] and "val is not used" in lines[1]


# ---------------------------------------------------------------- what is wrong with the files


def spoil(path, old, new):
    """Replaces the first `old` in a text file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def remove(*names):
    return lambda home: [shutil.rmtree(home / n) if (home / n).is_dir() else (home / n).unlink() for n in names]


def unlabelled(home):
    (home / "cars_test_annos_withlabels.mat").unlink()
    trees.write_annotations(home / "devkit" / "cars_test_annos.mat", ["00001.jpg"], None, "fname")


def renamed_unlabelled(home):
    trees.write_annotations(home / "cars_test_annos_withlabels.mat", ["00001.jpg"], None, "fname")


SOP_LIST, INSHOP_LIST = "Ebay_test.txt", "Eval/list_eval_partition.txt"
BROKEN = {
    "cub missing": ("cub", remove("images"), ["images is not there", "download cub", "CUB_200_2011"]),
    "cub empty class": (
        "cub",
        lambda home: [p.unlink() for p in (home / "images/002.Bird_2").iterdir()],
        ["images/002.Bird_2", "no image"],
    ),
    "cub folder without number": ("cub", lambda home: (home / "images/Sparrow").mkdir(), ["Sparrow", "number"]),
    "cub number twice": ("cub", lambda home: (home / "images/1.Sparrow").mkdir(), ["a second", "number"]),
    "cub one class": ("cub", remove(*(f"images/00{i}.Bird_{i}" for i in (2, 3, 4))), ["1 class", "2 are needed"]),
    "cars missing": ("cars1", remove("cars_annos.mat"), ["cars_annos.mat", "names.csv", "download cars"]),
    "cars not a mat": (
        "cars1",
        lambda home: (home / "cars_annos.mat").write_text("<html>"),
        ["cars_annos.mat: not a readable .mat"],
    ),
    "cars cut mat": (
        "cars1",
        lambda home: (home / "cars_annos.mat").write_bytes((home / "cars_annos.mat").read_bytes()[:300]),
        ["cars_annos.mat: not a readable .mat"],
    ),
    "cars other mat": (
        "cars1",
        lambda home: trees.write_annotations(home / "cars_annos.mat", ["a"], [1], "x"),
        ["cars_annos.mat", "no field 'relative_im_path'"],
    ),
    "cars class out of range": (
        "cars1",
        lambda home: trees.write_annotations(home / "cars_annos.mat", ["car_ims/000001.jpg"], [197]),
        ["annotation 1", "class 197", "196"],
    ),
    "cars class 0": (
        "cars1",
        lambda home: trees.write_annotations(home / "cars_annos.mat", ["car_ims/000001.jpg"], [0]),
        ["annotation 1", "class 0"],
    ),
    "cars leaves": (
        "cars1",
        lambda home: trees.write_annotations(home / "cars_annos.mat", ["../000001.jpg"], [1]),
        ["cars_annos.mat, line 1", "inside", "../000001.jpg"],
    ),
    "cars image missing": (
        "cars1",
        remove("car_ims/000003.jpg", "car_ims/000005.jpg"),
        ["cars_annos.mat names 2 images", "car_ims/00000"],
    ),
    "cars unlabelled": (
        "cars2",
        unlabelled,
        ["cars_test_annos_withlabels.mat is not there", "cars_test_annos.mat has no labels", "download cars"],
    ),
    "cars unlabelled, renamed": ("cars2", renamed_unlabelled, ["cars_test_annos_withlabels.mat", "'class'"]),
    "cars no train list": ("cars2", remove("devkit/cars_train_annos.mat"), ["cars_train_annos.mat is not there"]),
    "kaggle no list": ("cars3", remove("anno_test.csv"), ["anno_test.csv is not there"]),
    "kaggle class": (
        "cars3",
        lambda home: spoil(home / "anno_train.csv", "31,1\n", "31,5\n"),
        ["anno_train.csv, line 1", "1 to 4"],
    ),
    "kaggle columns": (
        "cars3",
        lambda home: spoil(home / "anno_test.csv", ",1,2,", ","),
        ["anno_test.csv, line 1", "expected file,x1,y1,x2,y2,class"],
    ),
    "SOP no list": ("SOP", remove(SOP_LIST), ["Ebay_test.txt is not there", "download SOP"]),
    "SOP empty list": ("SOP", lambda home: (home / SOP_LIST).write_text(""), ["Ebay_test.txt, line 1", "header"]),
    "SOP no header": (
        "SOP",
        lambda home: spoil(home / SOP_LIST, "image_id class_id super_class_id path\n", ""),
        ["Ebay_test.txt, line 1", "header"],
    ),
    "SOP header alone": (
        "SOP",
        lambda home: (home / SOP_LIST).write_text("image_id class_id super_class_id path"),
        ["no image in the split 'test'"],
    ),
    "SOP columns": ("SOP", lambda home: spoil(home / SOP_LIST, " 3 1 ", " 3 "), ["Ebay_test.txt, line 2", "found '"]),
    "SOP no number": ("SOP", lambda home: spoil(home / SOP_LIST, " 3 1 ", " three 1 "), ["line 2", "three"]),
    "SOP class 0": ("SOP", lambda home: spoil(home / SOP_LIST, " 3 1 ", " 0 1 "), ["line 2", "1 to 22634"]),
    "SOP class 22635": ("SOP", lambda home: spoil(home / SOP_LIST, " 3 1 ", " 22635 1 "), ["line 2", "1 to 22634"]),
    "SOP leaves": ("SOP", lambda home: spoil(home / SOP_LIST, "bicycle_final/", "../other/"), ["line 2", "inside"]),
    "SOP absolute": ("SOP", lambda home: spoil(home / SOP_LIST, "bicycle_final/", "/etc/"), ["line 2", "inside"]),
    "SOP file missing": ("SOP", remove("bicycle_final/111000000003_1.JPG"), ["names 1 images", "000003_1.JPG"]),
    "SOP folder missing": ("SOP", remove("bicycle_final"), ["names 8 images", "bicycle_final"]),
    "SOP shared class": ("SOP", lambda home: spoil(home / SOP_LIST, " 3 1 ", " 1 1 "), ["share 1 class", "as 1"]),
    "SOP listed twice": ("SOP", lambda home: spoil(home / SOP_LIST, "000003_0", "000003_1"), ["listed twice"]),
    "SOP binary": ("SOP", lambda home: (home / SOP_LIST).write_bytes(b"\xff\xfe\x00"), ["Ebay_test.txt", "text"]),
    "Inshop no list": ("Inshop", remove(INSHOP_LIST), ["list_eval_partition.txt is not there", "download Inshop"]),
    "Inshop no count": ("Inshop", lambda home: spoil(home / INSHOP_LIST, "16\n", ""), ["line 1", "number of images"]),
    "Inshop no header": ("Inshop", lambda home: spoil(home / INSHOP_LIST, "image_name", "name"), ["line 2", "header"]),
    "Inshop count alone": ("Inshop", lambda home: (home / INSHOP_LIST).write_text("16"), ["line 2", "header"]),
    "Inshop status": ("Inshop", lambda home: spoil(home / INSHOP_LIST, " query", " val"), ["line 11", "gallery"]),
    "Inshop id": ("Inshop", lambda home: spoil(home / INSHOP_LIST, " id_", " item_"), ["line 3", "id_NNNNNNNN"]),
    "Inshop shared class": ("Inshop", lambda home: spoil(home / INSHOP_LIST, " gallery", " train"), ["share 1"]),
    "Inshop no gallery": (
        "Inshop",
        lambda home: (home / INSHOP_LIST).write_text((home / INSHOP_LIST).read_text().replace(" gallery", " query")),
        ["no image in the split 'gallery'"],
    ),
    "folder missing": ("folder", lambda home: shutil.rmtree(home), ["is not there", "--data-root"]),
    "folder train alone": ("folder", remove("test"), ["needed are"]),
    "folder train and val": ("folder", lambda home: (home / "test").rename(home / "val"), ["beside train"]),
    "folder empty class": ("folder", lambda home: (home / "test/nothing").mkdir(), ["test/nothing", "no image"]),
    "folder empty split": (
        "folder",
        lambda home: [shutil.rmtree(p) for p in (home / "test").iterdir()],
        ["no image in the split 'test'"],
    ),
    "folder shared class": (
        "folder",
        lambda home: (home / "test/thing_4").rename(home / "test/thing_1"),
        ["share 1 classes", "thing_1", "unseen"],
    ),
    "csv columns": ("csv", lambda home: spoil(home / "list.csv", "label", "class"), ["line 1", "path,label,split"]),
    "csv empty": ("csv", lambda home: (home / "list.csv").write_text(""), ["line 1", "path,label,split"]),
    "csv short row": ("csv", lambda home: spoil(home / "list.csv", ",thing_1,", ","), ["line 2", "found '"]),
    "csv split": ("csv", lambda home: spoil(home / "list.csv", ",train", ",val"), ["line 2", "train, test"]),
    "csv only train": (
        "csv",
        lambda home: (home / "list.csv").write_text((home / "list.csv").read_text().replace(",test", ",train")),
        ["the splits in it are train"],
    ),
    "csv leaves": ("csv", lambda home: spoil(home / "list.csv", "pictures/", "pictures/../../"), ["line 2", "inside"]),
    "csv shared class": ("csv", lambda home: spoil(home / "list.csv", "thing_3", "thing_1"), ["share 1", "thing_1"]),
    "csv file missing": ("csv", remove("pictures/0/1.png"), ["list.csv names 1 images", "pictures/0/1.png"]),
    "two csv": ("csv", lambda home: shutil.copy(home / "list.csv", home / "more.csv"), ["2 .csv files"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said_in_one_line(tmp_path, case):
    kind, break_it, words = BROKEN[case]
    if kind.startswith("cars"):
        home = trees.make_cars(tmp_path, int(kind[-1]), classes=4, images=4, size=8)
    elif kind in ("folder", "csv"):
        home = trees.make_folder(tmp_path / "own", "csv" if kind == "csv" else "train+test", 4, 4, 8)
    else:
        maker = {"cub": trees.make_cub, "SOP": trees.make_sop, "Inshop": trees.make_inshop}[kind]
        home = maker(tmp_path, classes=4, images=4, size=8)
    name = {"csv": "folder"}.get(kind, kind.rstrip("123"))
    root = home if name == "folder" else tmp_path
    dataset.load_benchmark(name, root)  # nothing is wrong yet
    break_it(home)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        dataset.load_benchmark(name, root)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "name, share, words",
    [
        ("CUB", 0.5, "'CUB' is no dataset; there are cub, cars"),
        ("cub", 0.4, "split of its own"),
        ("folder", 0.4, "of its own"),
        ("folder", 1.0, "between 0 and 1"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, name, share, words):
    trees.make_cub(tmp_path, 2, 1, 8)
    trees.make_folder(tmp_path / "own", "train+test", 2, 1, 8)
    with pytest.raises(ValueError, match=words):
        dataset.load_benchmark(name, tmp_path / "own" if name == "folder" else tmp_path, share)


# scipy can crash on damage to an uncompressed .mat; trees.py writes compressed ones, as MATLAB does.
FUZZED = {
    "SOP": "Stanford_Online_Products/Ebay_train.txt",
    "Inshop": "Inshop_Clothes/Eval/list_eval_partition.txt",
    "cars": "cars196/cars_annos.mat",
    "kaggle": "cars196/anno_train.csv",
    "folder": "list.csv",
}


@pytest.fixture(scope="module")
def fuzz_trees(tmp_path_factory):
    roots = {name: tmp_path_factory.mktemp(name) for name in FUZZED}
    trees.make_sop(roots["SOP"], 4, 2, 8)
    trees.make_inshop(roots["Inshop"], 4, 3, 8)
    trees.make_cars(roots["cars"], 1, 4, 2, 8)
    trees.make_cars(roots["kaggle"], 3, 4, 2, 8)
    trees.make_folder(roots["folder"], "csv", 4, 2, 8)
    return {name: (root, root / FUZZED[name], (root / FUZZED[name]).read_bytes()) for name, root in roots.items()}


def load_fuzzed(name, fuzz_trees, content):
    """Anything but ValueError and OSError with one line fails."""
    root, list_file, _ = fuzz_trees[name]
    list_file.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy's, about damaged files
            assert_sound(
                dataset.load_benchmark({"kaggle": "cars"}.get(name, name), list_file if name == "folder" else root)
            )
    except (ValueError, OSError) as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", FUZZED)
@settings(max_examples=40, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_lists(name, fuzz_trees, data):
    """The true list with a stretch of it replaced, and bytes out of nowhere."""
    original = fuzz_trees[name][2]
    start = data.draw(st.integers(0, len(original)))
    length = data.draw(st.integers(0, 40))
    text = st.text("019 ,\"'\n\r\t_idtrainquery./\\:\0é", max_size=40).map(str.encode)
    patch = data.draw(st.one_of(st.binary(max_size=40), text))
    load_fuzzed(name, fuzz_trees, original[:start] + patch + original[start + length :])
    load_fuzzed(name, fuzz_trees, original[:start])
    load_fuzzed(name, fuzz_trees, patch)


# ---------------------------------------------------------------- validation


def test_split_validation_holds_out_whole_classes(tmp_path):
    trees.make_cub(tmp_path, classes=20, images=3, size=8)
    images = dataset.load_benchmark("cub", tmp_path).train  # 10 classes
    train, held_out = dataset.split_validation(images, 0.3, seed=0)
    assert (train.num_classes, held_out.num_classes) == (7, 3)
    assert sorted(pairs(train) + pairs(held_out)) == pairs(images)
    assert train.labels.tolist() == np.repeat(np.arange(7), 3).tolist()
    assert held_out.labels.tolist() == np.repeat(np.arange(3), 3).tolist()
    again = dataset.split_validation(images, 0.3, seed=0)[1].class_names
    assert again == held_out.class_names
    assert len({tuple(dataset.split_validation(images, 0.3, seed)[1].class_names) for seed in range(9)}) > 3
    assert dataset.split_validation(images, 0.2, 0)[1].num_classes == 2
    assert dataset.split_validation(images, 0.8, 0)[0].num_classes == 2


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_split_validation_refuses(tmp_path, share):
    trees.make_cub(tmp_path, classes=8, images=1, size=8)
    images = dataset.load_benchmark("cub", tmp_path).train
    with pytest.raises(ValueError, match="validation share"):
        dataset.split_validation(images, share, 0)
    two_classes = dataset.split_validation(images, 0.5, 0)[0]
    with pytest.raises(ValueError, match=r"has 2 training classes, at least 2 \+ 2 are needed"):
        dataset.split_validation(two_classes, 0.5, 0)


@pytest.mark.parametrize(
    "classes, share, words, enough",
    [
        (60, 0.02, "--val-classes 0.02 of 60 classes holds out 1; at least 2 are needed: 0.034 or more", 0.034),
        (60, 0.001, "--val-classes 0.001 of 60 classes holds out 0; at least 2 are needed: 0.034 or more", 0.034),
        (60, 0.98, "--val-classes 0.98 of 60 classes leaves 1; at least 2 are needed: 0.966 or less", 0.966),
        (4, 0.3, "--val-classes 0.3 of 4 classes holds out 1; at least 2 are needed: 0.5 or more", 0.5),
        (4, 0.9, "--val-classes 0.9 of 4 classes leaves 0; at least 2 are needed: 0.5 or less", 0.5),
        (11318, 1e-4, "--val-classes 0.0001 of 11318 classes holds out 1; at least 2 are needed: 0.000177 or more",
         0.000177),
    ],
)  # fmt: skip
def test_split_validation_says_which_share_would_do(classes, share, words, enough):
    names = [str(c) for c in range(classes)]
    images = dataset.ImageList(Path("root"), names, np.arange(classes), names, own=True)
    with pytest.raises(ValueError) as caught:
        dataset.split_validation(images, share, 0)
    assert str(caught.value) == words
    train, held_out = dataset.split_validation(images, enough, 0)
    assert min(train.num_classes, held_out.num_classes) >= 2 and train.own and held_out.own


# ---------------------------------------------------------------- pixels


def test_all_kinds_of_images_become_rgb(tmp_path):
    """A red, a grey and a 16-bit image, each in the modes that can hold it."""
    red = Image.new("RGB", (4, 4), (200, 0, 0))
    kinds = {
        "rgb.png": red,
        "rgba.png": red.convert("RGBA"),
        "palette.png": red.convert("P"),
        "palette.gif": red.convert("P"),
        "cmyk.tif": red.convert("CMYK"),
        "ycbcr.tif": red.convert("YCbCr"),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
        pixels = np.asarray(dataset.read_rgb(str(tmp_path / name)), dtype=int)
        assert pixels.shape == (4, 4, 3)
        assert np.abs(pixels - [200, 0, 0]).max() <= 4, name
    clear = Image.new("P", (4, 4))
    clear.putpalette([200, 0, 0, 0, 0, 0])
    clear.save(tmp_path / "clear.png", transparency=b"\x80\x00")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.asarray(dataset.read_rgb(str(tmp_path / "clear.png")))[0, 0].tolist() == [200, 0, 0]
    for mode, value in (("L", 77), ("LA", (77, 255)), ("1", 1), ("I;16", 77 * 257), ("I", 77 * 257)):
        Image.new(mode, (4, 4), value).save(tmp_path / "grey.png" if mode != "I" else tmp_path / "grey.tif")
        path = tmp_path / ("grey.png" if mode != "I" else "grey.tif")
        expected = 255 if mode == "1" else 77
        assert np.unique(np.asarray(dataset.read_rgb(str(path)))).tolist() == [expected], mode


def test_transforms_give_the_range_and_the_channels_of_the_network(tmp_path):
    colour = Image.new("RGB", (50, 40), (255, 102, 0))
    plain = dataset.eval_transform(32)(colour)
    assert plain.shape == (3, 32, 32)
    expected = [(1 - 0.485) / 0.229, (0.4 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    torch.testing.assert_close(plain[:, 5, 5], torch.tensor(expected))
    inception = {"mean": (104, 117, 128), "std": (1, 1, 1), "bgr": True, "scale": 255}
    for transform in (dataset.eval_transform(32, **inception), dataset.train_transform(32, **inception)):
        values = transform(colour)  # blue, green, red
        assert values.shape == (3, 32, 32)
        torch.testing.assert_close(values[:, 5, 5], torch.tensor([0.0 - 104, 102 - 117, 255 - 128]), atol=1e-3, rtol=0)


def test_evaluation_takes_the_centre_at_its_scale():
    size = dataset.eval_transform(224).transforms[0].size
    assert size == 256 and dataset.eval_transform(64).transforms[0].size == 73
    image = Image.new("RGB", (512, 256), "black")
    image.paste("white", (144, 16, 368, 240))  # the centre 224×224 of 512×256
    assert dataset.eval_transform(224, (0, 0, 0), (1, 1, 1))(image).min() == 1


# ---------------------------------------------------------------- batches

LABELS = np.repeat(np.arange(7), [10, 3, 5, 8, 1, 6, 9])  # 42 images


def batches(epoch=0, **options):
    sampler = dataset.RandomBatches(LABELS, **({"batch_size": 8, "seed": 1} | options))
    sampler.set_epoch(epoch)
    return list(sampler)


def test_shuffled_batches_hold_every_image_once():
    epoch = batches()
    assert [len(batch) for batch in epoch] == [8] * 5 and len(dataset.RandomBatches(LABELS, 8, 1)) == 5
    indices = [i for batch in epoch for i, _ in batch]
    assert len(set(indices)) == 40 and set(indices) < set(range(42)) and indices != sorted(indices)
    assert len({seed for batch in epoch for _, seed in batch}) == 40
    assert len(batches(batch_size=42)) == 1


@pytest.mark.parametrize("k", [2, 4, 8])
def test_balanced_batches(k):
    epoch = batches(images_per_class=k)
    assert len(epoch) == 5
    drawn = set()
    for batch in epoch:
        indices = np.array([i for i, _ in batch])
        classes, counts = np.unique(LABELS[indices], return_counts=True)
        assert len(classes) == 8 // k and set(counts) == {k}
        for c in classes:
            members = indices[LABELS[indices] == c]
            assert len(set(members)) == min(k, (LABELS == c).sum())  # repeats only where there are too few
        drawn |= set(classes)
    assert len(drawn) > 1


def test_batches_are_a_function_of_seed_and_epoch():
    for options in ({}, {"images_per_class": 4}):
        assert batches(3, **options) == batches(3, **options)
        assert batches(3, **options) != batches(4, **options)
        assert batches(3, **options) != batches(3, seed=2, **options)
        assert batches(1, seed=2, **options) != batches(2, seed=1, **options)
        sampler = dataset.RandomBatches(LABELS, 8, 1, **options)
        for epoch in (0, 1, 2, 3):
            sampler.set_epoch(epoch)
            torch.rand(3)
            last = list(sampler)
        assert last == batches(3, **options)
    assert batches(seed=-1) != batches(seed=1)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"batch_size": 43}, "batch size 43: it must be 1 to 42, the training images"),
        ({"batch_size": 0}, "batch size 0"),
        ({"images_per_class": 3}, "3 images per class do not divide the batch size 8"),
        ({"images_per_class": -1}, "-1 images per class"),
        ({"images_per_class": 1}, "needs 8 classes, there are 7"),
    ],
)
def test_sizes_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        dataset.RandomBatches(LABELS, **({"batch_size": 8, "seed": 1} | options))


@pytest.fixture(scope="module")
def cub(tmp_path_factory):
    root = tmp_path_factory.mktemp("cub")
    trees.make_cub(root, classes=8, images=6)
    return dataset.load_benchmark("cub", root)


def epochs(images, numbers, workers=0, **options):
    """All (images, labels) batches of the epochs."""
    loader = dataset.make_train_loader(images, SMALL, 8, 5, workers=workers, **options)
    result = []
    for number in numbers:
        loader.batch_sampler.set_epoch(number)
        result.append([(x.clone(), y.clone()) for x, y in loader])
    return result


def same(one, other):
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True))


def test_epochs_are_the_same_bits_for_any_number_of_workers_and_when_resumed(cub):
    alone = epochs(cub.train, [1, 2, 3])
    assert not same(alone[1], alone[2])
    for workers in (1, 2):
        torch.rand(workers)  # what else draws does not matter
        together = epochs(cub.train, [1, 2, 3], workers)
        assert all(same(one, other) for one, other in zip(alone, together, strict=True))
    assert same(epochs(cub.train, [3])[0], alone[2])
    balanced = epochs(cub.train, [3], images_per_class=4)[0]
    assert same(epochs(cub.train, [3], 2, images_per_class=4)[0], balanced)
    assert not same(balanced, alone[2])


def test_loaders_leave_the_global_random_state_alone(cub):
    before = torch.get_rng_state()
    epochs(cub.train, [1])
    epochs(cub.train, [1], workers=1)
    list(dataset.make_eval_loader(cub.query, SMALL_EVAL, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_differs_between_images_and_epochs(cub):
    loaded = dataset.ImageDataset(cub.train, SMALL)
    assert torch.equal(loaded[3, 11][0], loaded[3, 11][0])
    assert not torch.equal(loaded[3, 11][0], loaded[3, 12][0])


def test_evaluation_loader_keeps_order_and_drops_nothing(cub):
    for workers in (0, 2):
        loader = dataset.make_eval_loader(cub.query, SMALL_EVAL, 7, workers)
        assert torch.cat([y for _, y in loader]).tolist() == cub.query.labels.tolist()
        assert torch.cat([x for x, _ in loader]).shape == (24, 3, 16, 16)


@pytest.mark.parametrize("images_per_class", [0, 4])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_parts_of_all_processes_are_the_batches_of_one(cub, count, images_per_class):
    options = dict(images_per_class=images_per_class)
    whole, parts = dataset.make_train_loader(cub.train, SMALL, 8, 5, **options), []
    for rank in range(count):
        parts.append(dataset.make_train_loader(cub.train, SMALL, 8, 5, shard=(rank, count), **options))
    for epoch in (1, 2):
        for loader in (whole, *parts):
            loader.batch_sampler.set_epoch(epoch)
            assert len(loader) == 3
        for batch, *shares in zip(whole.batch_sampler, *(loader.batch_sampler for loader in parts), strict=True):
            assert {len(share) for share in shares} == {8 // count}
            assert sum(shares, []) == batch
        images, labels = next(iter(whole))
        shares = [next(iter(loader)) for loader in parts]
        assert torch.equal(torch.cat([x for x, _ in shares]), images)
        assert torch.equal(torch.cat([y for _, y in shares]), labels)


def test_batches_that_cannot_be_dealt_out(cub):
    message = "^--batch-size 10 is the whole batch, it cannot be dealt out to 4 processes evenly$"
    with pytest.raises(ValueError, match=message):
        dataset.make_train_loader(cub.train, SMALL, 10, 5, shard=(3, 4))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 5, 25])  # 24 images: the last shards are shorter, or there is none left
def test_processes_share_the_evaluation_without_gap_or_overlap(cub, count, workers):
    found = torch.full((24,), -1)
    for rank in range(count) if workers == 0 else [0, count - 1]:
        loader = dataset.make_eval_loader(cub.query, SMALL_EVAL, 3, workers, shard=(rank, count))
        labels = [y for _, y in loader]
        assert len(loader.dataset) == 24 and len(labels) == len(loader) == -(-len(range(rank, 24, count)) // 3)
        mine = torch.cat([torch.empty(0, dtype=torch.long), *labels])
        assert mine.tolist() == cub.query.labels[rank::count].tolist()
        found[rank::count] = mine
    if workers == 0:
        assert found.tolist() == cub.query.labels.tolist()


def test_worker_options():
    assert dataset.worker_options(0, False).keys() == {"num_workers", "pin_memory", "generator"}
    options = dataset.worker_options(2, True)
    assert options["persistent_workers"] and options["prefetch_factor"] and options["pin_memory"]


def test_no_more_workers_than_cores(cub):
    """Each would make torch warn, and none would make anything faster."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dataset.make_eval_loader(cub.query, SMALL_EVAL, 8, 1000).num_workers == dataset.available_cores()


def worker_threads(_):
    return torch.tensor(torch.get_num_threads())


def test_workers_run_one_thread_each(cub):
    loader = dataset.make_eval_loader(cub.query, worker_threads, 8, workers=1)
    assert {int(n) for x, _ in loader for n in x} == {1}


def handler_of_the_trainer(number, frame):
    pass


def signals_are_the_workers_own(_):
    interrupt, terminate = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    return torch.tensor(interrupt == signal.SIG_IGN and terminate != handler_of_the_trainer)


def test_workers_outlive_ctrl_c_and_leave_quietly_when_told_to(cub):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handler_of_the_trainer) for number in numbers]
    others = multiprocessing.active_children()
    try:
        loader = dataset.make_eval_loader(cub.query, signals_are_the_workers_own, 8, workers=1)
        assert all(x.all() for x, _ in loader)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    (worker,) = (process for process in multiprocessing.active_children() if process not in others)
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


# ---------------------------------------------------------------- images that cannot be decoded


@pytest.fixture
def damaged(tmp_path):
    """8 classes of 6; in the third an image cut in the middle, one that is text and one that is gone."""
    home = trees.make_cub(tmp_path, classes=8, images=6)
    benchmark = dataset.load_benchmark("cub", tmp_path)
    bad = [home / "images" / "003.Bird_3" / f"Bird_3_{i:04d}.jpg" for i in (0, 2, 5)]
    bad[0].write_bytes(bad[0].read_bytes()[:-200])
    bad[1].write_text("not an image")
    bad[2].unlink()
    return benchmark, bad


def test_unreadable_image_is_named_in_one_line(damaged):
    benchmark, bad = damaged
    whys = ("truncated", "not an image", "No such file")
    for path, why in zip(bad, whys, strict=True):
        with pytest.raises(dataset.UnreadableImage) as caught:
            dataset.read_rgb(str(path))
        message = str(caught.value)
        assert message.startswith(f"{path}: cannot be decoded (") and why in message and "\n" not in message
    for workers in (0, 2):
        loader = dataset.make_train_loader(benchmark.train, SMALL, 8, 1, workers=workers)
        with pytest.raises(dataset.UnreadableImage) as caught:
            list(loader)
        message = flags.one_line(caught.value)
        assert any(message.startswith(f"{path}: cannot be decoded (") for path in bad), message
        assert "\n" not in message and message.endswith(")")


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_bad_images_in_training(damaged, workers):
    """Others of the same class take their places: labels and batches stay what they would have been."""
    benchmark, bad = damaged
    loader = dataset.make_train_loader(benchmark.train, SMALL, 24, 1, workers=workers, skip_bad=True)
    assert loader.dataset.num_bad == 0 and loader.dataset.bad_paths == []
    for _ in range(2):
        ((x, y),) = loader
        assert sorted(y.tolist()) == sorted(benchmark.train.labels.tolist())
        assert x.shape == (24, 3, 16, 16)
    assert loader.dataset.num_bad == 3  # images, not attempts
    assert [benchmark.train.root / path for path in loader.dataset.bad_paths] == bad
    alone = dataset.make_train_loader(benchmark.train, SMALL, 24, 1, skip_bad=True)
    assert torch.equal(next(iter(alone))[0], x)


def test_skipping_where_a_whole_class_is_bad_takes_the_next_class(damaged):
    benchmark, bad = damaged
    for path in bad[0].parent.iterdir():
        path.write_text("not an image")
    loaded = dataset.ImageDataset(benchmark.train, SMALL, skip_bad=True)
    index = benchmark.train.labels.tolist().index(2)
    assert loaded[index, 1][1] == 3
    for path in benchmark.train.paths:
        (benchmark.train.root / path).write_text("not an image")
    with pytest.raises(dataset.UnreadableImage, match="none of its 24 images"):
        loaded[0, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_bad_images_in_evaluation(tmp_path, workers):
    home = trees.make_cub(tmp_path, classes=4, images=4)
    benchmark = dataset.load_benchmark("cub", tmp_path)
    (home / "images" / "003.Bird_3" / "Bird_3_0001.jpg").write_text("not an image")
    loader = dataset.make_eval_loader(benchmark.query, SMALL_EVAL, 3, workers, skip_bad=True)
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert y.tolist() == [0, -1, 0, 0, 1, 1, 1, 1]
    assert x[1].abs().sum() == 0 and all(x[i].abs().sum() > 0 for i in range(8) if i != 1)
    assert loader.dataset.bad_paths == ["images/003.Bird_3/Bird_3_0001.jpg"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(["jpg", "png", "gif", "bmp", "webp", "tiff"]),
    position=st.floats(0, 1),
    patch=st.binary(min_size=1, max_size=30),
    cut=st.booleans(),
)
def test_damaged_images_decode_or_are_named(tmp_path, suffix, position, patch, cut):
    path = tmp_path / f"image.{suffix}"
    trees.picture(1, 1, 24).save(path)
    content = path.read_bytes()
    place = int(position * len(content))
    path.write_bytes(content[:place] + (b"" if cut else patch + content[place + len(patch) :]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert dataset.read_rgb(str(path)).mode == "RGB"
        except dataset.UnreadableImage as error:
            assert str(error).startswith(f"{path}: cannot be decoded (") and "\n" not in str(error)
