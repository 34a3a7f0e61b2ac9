"""Every benchmark in every layout, own folders of every kind, and what is said when something is wrong."""

import json
import os
import shutil
import socket
import warnings
from pathlib import Path

import dataset
import folders
import layouts
import numpy as np
import pandas as pd
import pytest
import run
import trees
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import glyphs
from PIL import Image
from trees import make_cars, make_folder, make_inshop, make_sop, pairs

SMALL_EVAL = dataset.eval_transform(16)


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
    layouts.split_by_class(listing, 0.5, {"cub": 100, "cars": 98}.get(name))
    assert [c for _, c in listing.splits["train"]] == classes[:train]
    assert [c for _, c in listing.splits["test"]] == classes[train:] and len(classes) == train + test


def test_the_published_boundary_is_that_of_the_benchmark(tmp_path):
    home = trees.make_cub(tmp_path, classes=5)
    (home / "images" / "005.Bird_5").rename(home / "images" / "101.Bird_5")
    benchmark = dataset.load_benchmark("cub", tmp_path)
    assert (benchmark.train.num_classes, benchmark.query.class_names) == (4, ["101.Bird_5"])
    trees.make_cars(tmp_path, classes=4)
    assert layouts.get("cars").last_train_class == 98


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
    assert (benchmark.query.num_classes, benchmark.gallery.num_classes) == (3, 2)
    summary = run.summary_of({"gallery": dataset.fingerprint(benchmark.gallery)})
    assert (summary["gallery"]["images"], summary["gallery"]["classes"]) == (2, 2)
    assert any("line 1 promises 18 images, 17 follow" in line for line in benchmark.warnings)


def test_glyphs(tmp_path, monkeypatch):
    small = glyphs.ensure_glyphs(tmp_path, 6, 4, 16, progress=False)
    trees.patch(monkeypatch, "glyphs", home=small.name)
    monkeypatch.setattr(glyphs, "ensure_glyphs", lambda root: None)
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


# ---------------------------------------------------------------- folders that are not what they seem


def rename_splits(root, change):
    for folder in list(root.iterdir()):
        folder.rename(folder.with_name(change(folder.name)))


@pytest.mark.parametrize("change", [str.upper, str.title, lambda name: name[0] + name[1:].upper()])
@pytest.mark.parametrize("layout", ["train+test", "train+query+gallery"])
def test_splits_are_found_in_any_letter_case(tmp_path, layout, change):
    trees.make_folder(tmp_path, layout, classes=6, images=4, size=8)
    expected = dataset.load_benchmark("folder", tmp_path)
    rename_splits(tmp_path, change)
    benchmark = dataset.load_benchmark("folder", tmp_path)
    assert_sound(benchmark)
    assert benchmark.warnings == () and benchmark.train.class_names == expected.train.class_names
    assert [len(images) for images in (benchmark.train, benchmark.query)] == [len(expected.train), len(expected.query)]


def test_two_spellings_of_one_split(tmp_path):
    trees.make_folder(tmp_path, "train+test", 4, 2, 8)
    trees.save(tmp_path / "Test" / "thing_9" / "0.png", 9, 0, 8)
    if len(list(tmp_path.iterdir())) == 3:  # not on a file system that ignores letter case
        with pytest.raises(ValueError, match="Test and test are the same split; merge them"):
            dataset.load_benchmark("folder", tmp_path)


@pytest.mark.parametrize("kind", ["folder", "csv"])
@pytest.mark.parametrize("layout", ["train+test", "train+query+gallery"])
def test_data_without_train_can_be_scored_but_not_trained_on(tmp_path, kind, layout):
    trees.make_folder(tmp_path, layout, classes=6, images=4, size=8)
    expected = dataset.load_benchmark("folder", tmp_path)
    if kind == "csv":
        files = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*.png")) if "train" not in path.parts]
        rows = [f"{path},{path.parts[1]},{path.parts[0].upper()}" for path in files]
        (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    shutil.rmtree(tmp_path / "train")
    root = tmp_path / "list.csv" if kind == "csv" else tmp_path
    with pytest.raises(ValueError) as caught:
        dataset.load_benchmark("folder", root)
    assert str(caught.value).startswith(f"{root}: there is no split 'train', so it can be scored")
    benchmark = dataset.load_benchmark("folder", root, training=False)
    assert benchmark.train is None and benchmark.warnings == () and benchmark.query.own
    assert pairs(benchmark.query) == pairs(expected.query)
    assert (benchmark.gallery is None) == (expected.gallery is None)
    if benchmark.gallery is not None:
        assert pairs(benchmark.gallery) == pairs(expected.gallery)


def test_scoring_needs_no_full_train_but_takes_it_if_it_is_there(tmp_path):
    trees.make_folder(tmp_path, "train+test", 4, 2, 8)
    assert len(dataset.load_benchmark("folder", tmp_path, training=False).train) == 4
    for folder in (tmp_path / "train").iterdir():
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="no image in the split 'train'"):
        dataset.load_benchmark("folder", tmp_path)
    assert len(dataset.load_benchmark("folder", tmp_path, training=False).query) == 4


@pytest.mark.parametrize(
    "names, words",
    [
        (["train", "bus"], "beside train there must be test, or query and gallery"),
        (["QUERY", "bus", "car"], "beside QUERY there must be gallery.*if QUERY is a class, rename it"),
        (["gallery", "bus", "car"], "beside gallery there must be query"),
        (["train", "query"], "beside train there must be test, or query and gallery"),
    ],
)
def test_splits_that_lack_others(tmp_path, names, words):
    for name in names:
        trees.save(tmp_path / name / "a" / "0.png", 1, 0, 8)
    for training in (True, False):
        with pytest.raises(ValueError, match=words):
            dataset.load_benchmark("folder", tmp_path, training=training)


def test_class_folders_one_level_too_deep(tmp_path):
    for n, kind in enumerate(("animals/cat", "animals/dog", "animals/emu", "animals/fox", "cars/x/bus", "cars/x/van")):
        trees.save(tmp_path / kind / "0.png", n, 0, 8)
        trees.save(tmp_path / kind / "1.png", n, 1, 8)
    trees.save(tmp_path / "plants" / "more" / "0.png", 7, 0, 8)  # one folder more, nothing mistaken
    trees.save(tmp_path / "tools" / "0.png", 8, 0, 8)
    trees.save(tmp_path / "tools" / "old" / "0.png", 8, 1, 8)
    trees.save(tmp_path / "tools" / "new" / "0.png", 8, 2, 8)
    (line,) = (line for line in dataset.load_benchmark("folder", tmp_path).warnings if "one class;" in line)
    assert line == (
        f"{tmp_path / 'animals'} (and 1 more class folders like it): holds no images itself but 4 folders of them "
        f"(cat, dog, emu, …), all taken as one class; if each of these is a class, move them into {tmp_path}"
    )


def test_a_single_folder_around_the_classes(tmp_path):
    trees.make_folder(tmp_path / "unpacked" / "pictures", "classes", 4, 2, 8)
    words = (
        f"{tmp_path / 'unpacked'}: it has 1 folders .*; is it --data-root {tmp_path / 'unpacked' / 'pictures'}, which"
    )
    with pytest.raises(ValueError, match=words):
        dataset.load_benchmark("folder", tmp_path / "unpacked")


def test_deep_class_folders_inside_a_split(tmp_path):
    trees.make_folder(tmp_path, "train+test", 4, 2, 8)
    for name in ("cat", "dog"):
        trees.save(tmp_path / "train" / "animals" / name / "0.png", 9, 0, 8)
    (line,) = dataset.load_benchmark("folder", tmp_path).warnings
    assert line.startswith(f"{tmp_path / 'train' / 'animals'}: holds no images itself but 2 folders of them (cat, dog)")
    assert line.endswith(f"move them into {tmp_path / 'train'}")


@pytest.mark.parametrize(
    "make, name", [(trees.make_cub, "cub"), (trees.make_sop, "SOP"), (trees.make_inshop, "Inshop")]
)
@pytest.mark.parametrize("beside", [True, False])
def test_a_data_root_of_benchmarks_is_not_taken_for_classes(tmp_path, make, name, beside):
    make(tmp_path, classes=4, images=4, size=8)
    if beside:
        trees.make_folder(tmp_path / "mine", "classes", 2, 2, 8)
    for training in (True, False):
        with pytest.raises(ValueError) as caught:
            dataset.load_benchmark("folder", tmp_path, training=training)
        assert f"--dataset {name}" in str(caught.value) and "--data-root" in str(caught.value)
    if beside:
        assert len(dataset.load_benchmark("folder", tmp_path / "mine").train) == 2


def test_a_class_may_be_called_glyphs(tmp_path):
    trees.save(tmp_path / "glyphs" / "0.png", 1, 0, 8)
    trees.save(tmp_path / "photos" / "0.png", 2, 0, 8)
    assert dataset.load_benchmark("folder", tmp_path).train.class_names == ["glyphs"]


# ---------------------------------------------------------------- links, pipes, and what cannot be read


@pytest.fixture
def own(tmp_path):
    return trees.make_folder(tmp_path / "own", "classes", classes=4, images=3, size=8)


def test_what_is_no_regular_file_is_skipped_and_counted(own, tmp_path):
    clean = dataset.load_benchmark("folder", own)
    victim = own / "thing_1"
    (victim / "self.jpg").symlink_to(victim / "self.jpg")
    (victim / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(victim / "pipe.jpg")
    (victim / "null.jpg").symlink_to("/dev/null")
    (victim / "loop").symlink_to(own)
    (victim / "README").write_text("no suffix")
    (victim / "deep").mkdir()
    (victim / "deep" / "loop").symlink_to(victim)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(victim / "socket.jpg"))
    for name in ("self", "loop.jpg"):
        (own / name).symlink_to(own / name)  # next to the classes, too
    benchmark = dataset.load_benchmark("folder", own)
    assert benchmark.warnings == (
        f"{own}: 1 file that is not an image and 4 broken links and 3 pipes, sockets or devices and "
        "2 links to folders that are read already were skipped",
    )
    assert benchmark.train.paths == clean.train.paths and benchmark.query.paths == clean.query.paths


def test_a_csv_that_names_a_pipe_is_refused_and_reading_one_does_not_hang(tmp_path):
    trees.make_folder(tmp_path, "csv", 4, 2, 8)
    (tmp_path / "pictures/0/1.png").unlink()
    os.mkfifo(tmp_path / "pictures/0/1.png")
    with pytest.raises(FileNotFoundError, match="names 1 images that are not there.*pictures/0/1.png"):
        dataset.load_benchmark("folder", tmp_path)
    for own in (True, False):
        with pytest.raises(dataset.UnreadableImage, match=r"1.png: cannot be decoded \(not a regular file\)"):
            dataset.read_rgb(str(tmp_path / "pictures/0/1.png"), own)


def test_folders_that_cannot_be_read_are_skipped_and_counted(own, monkeypatch):
    trees.make_folder(own, "classes", classes=5, images=3, size=8)
    (own / "thing_2" / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) in ("locked", "thing_1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(layouts.os, "scandir", refuse)
    benchmark = dataset.load_benchmark("folder", own)
    assert benchmark.warnings == (f"{own}: 2 folders that cannot be read were skipped",)
    assert benchmark.train.class_names == ["thing_2", "thing_3"]


def test_a_thousand_nested_folders(own):
    deepest, above = own / "thing_1", []
    for _ in range(1000):
        above.append(deepest)
        deepest = Path(f"{deepest}/d")
        os.mkdir(deepest)
    try:
        trees.picture(1, 1, 8).save(f"{deepest}/deep.png")
        paths = dataset.load_benchmark("folder", own).train.paths
        assert len(paths) == 7 and paths[3] == "thing_1/" + 1000 * "d/" + "deep.png"
    finally:  # pytest's own clearing away would be recursive
        os.unlink(f"{deepest}/deep.png")
        for folder in reversed(above):
            os.rmdir(f"{folder}/d")


def test_many_links_across_folders_do_not_multiply(own):
    places = [own / "thing_1" / str(i) for i in range(12)]
    for folder in places:
        folder.mkdir()
    for one in places:
        for other in places:
            (one / f"to {other.name}").symlink_to(other)
    found, skipped = folders.find_images(own / "thing_1", "x")
    assert found == ["x/0.png", "x/1.png", "x/2.png"] and skipped.keys() == {"again"}


# ---------------------------------------------------------------- the same file twice


def hard(link, target):
    os.link(target, link)


def soft(link, target):
    link.symlink_to(target)


def relative(link, target):
    link.symlink_to(os.path.relpath(target, link.parent))


@pytest.mark.parametrize("make_link", [hard, soft, relative])
@pytest.mark.parametrize(
    "layout, one, other",
    [
        ("train+test", "train/thing_1/0.png", "test/thing_4/new.png"),
        ("train+query+gallery", "query/thing_4/0.png", "gallery/thing_4/new.png"),
        ("train+test", "test/thing_4/0.png", "test/thing_4/new.png"),
        ("classes", "thing_1/0.png", "thing_4/new.png"),
    ],
)
def test_one_file_in_two_places_is_found_through_links(tmp_path, layout, one, other, make_link):
    trees.make_folder(tmp_path, layout, classes=4, images=4, size=8)
    shutil.copy(tmp_path / one, tmp_path / "copy.png")
    make_link(tmp_path / other, tmp_path / one)
    for training in (True, False):
        with pytest.raises(ValueError) as caught:
            dataset.load_benchmark("folder", tmp_path, training=training)
        message = str(caught.value)
        assert one in message and other in message and "are the same file, listed twice, in " in message
    (tmp_path / other).unlink()
    (tmp_path / "copy.png").rename(tmp_path / other)  # a copy of the bytes is no mistake
    dataset.load_benchmark("folder", tmp_path)


def test_a_linked_class_folder_is_named_with_how_many_it_repeats(own):
    (own / "thing_5").symlink_to(own / "thing_4")
    words = r"thing_4/0.png and thing_5/0.png are the same file, listed twice, in test \(and 2 more\); keep one"
    with pytest.raises(ValueError, match=words):
        dataset.load_benchmark("folder", own)


@pytest.mark.parametrize("spelling", ["./pictures/0/1.png", "pictures//0/1.png", "pictures/./0/.//1.png"])
def test_one_file_under_two_spellings_in_a_csv(tmp_path, spelling):
    trees.make_folder(tmp_path, "csv", 4, 2, 8)
    with open(tmp_path / "list.csv", "a") as file:
        file.write(f"{spelling},thing_4,test\n")
    with pytest.raises(ValueError) as caught:
        dataset.load_benchmark("folder", tmp_path)
    assert f"pictures/0/1.png and {spelling} are the same file, listed twice, in train and test" in str(caught.value)


def test_spellings_are_compared_in_published_lists_too_and_no_file_is_looked_at(tmp_path, monkeypatch):
    home = trees.make_sop(tmp_path, 4, 4, 8)
    monkeypatch.setattr(layouts, "file_id", None)
    assert len(dataset.load_benchmark("SOP", tmp_path).train) == 8
    with open(home / "Ebay_test.txt", "a") as file:
        file.write("17 4 2 ./bicycle_final//111000000001_0.JPG\n")
    with pytest.raises(ValueError, match="bicycle_final/111000000001_0.JPG and ./bicycle.* in train and test"):
        dataset.load_benchmark("SOP", tmp_path)


# ---------------------------------------------------------------- tests that say little


def test_one_class_to_test_on_and_queries_without_positive(tmp_path):
    trees.make_folder(tmp_path, "classes", classes=4, images=2, size=8)
    assert dataset.load_benchmark("folder", tmp_path).warnings == ()
    (tmp_path / "thing_3" / "1.png").unlink()
    assert dataset.load_benchmark("folder", tmp_path).warnings == (
        f"{tmp_path}: 1 of 3 queries have no other image of their class; they are left out of the figures",
    )
    (tmp_path / "thing_4" / "1.png").unlink()
    assert dataset.load_benchmark("folder", tmp_path).warnings == (
        f"{tmp_path}: none of the 2 queries has another image of its class",
    )
    only = f"{tmp_path}: only one class to test on, figures say nothing; is it the right folder?"
    trees.save(tmp_path / "thing_4" / "1.png", 4, 1, 8)
    assert dataset.load_benchmark("folder", tmp_path, 0.75).warnings == (only,)


def test_queries_without_an_image_of_their_class_in_the_gallery(tmp_path):
    trees.make_folder(tmp_path, "train+query+gallery", classes=6, images=5, size=8)
    shutil.rmtree(tmp_path / "gallery" / "thing_4")
    assert dataset.load_benchmark("folder", tmp_path, training=False).warnings == (
        f"{tmp_path}: 2 of 6 queries have no other image of their class in the gallery; "
        "they are left out of the figures",
    )
    for name in ("thing_5", "thing_6"):
        (tmp_path / "gallery" / name).rename(tmp_path / "gallery" / f"other {name}")
    words = f"{tmp_path}: none of the 6 queries has another image of its class in the gallery"
    assert dataset.load_benchmark("folder", tmp_path).warnings == (words,)


@pytest.mark.parametrize("name", ["cub", "cars", "SOP", "Inshop"])
def test_whole_benchmarks_are_silent_even_if_classes_have_one_training_image(tmp_path, monkeypatch, name):
    make = {"cub": trees.make_cub, "cars": trees.make_cars, "SOP": trees.make_sop, "Inshop": trees.make_inshop}[name]
    home = make(tmp_path, classes=6, images=4, size=8)
    if name == "Inshop":  # as twelve of the published ones
        list_file = home / "Eval" / "list_eval_partition.txt"
        count, header, *lines = list_file.read_text().splitlines()
        lines = [line for line in lines if "id_00000001/" not in line or "02_0_" in line]
        list_file.write_text("\n".join([str(len(lines)), header, *lines]))
    trees.publish(monkeypatch, name, tmp_path)
    assert dataset.load_benchmark(name, tmp_path).warnings == ()


# ---------------------------------------------------------------- names and facts


@pytest.mark.parametrize(
    "text, name",
    [("sop", "SOP"), ("SOP", "SOP"), ("inshop", "Inshop"), ("INSHOP", "Inshop"), ("In-Shop", "Inshop")]
    + [("CUB", "cub"), ("Cars", "cars"), ("Glyphs", "glyphs"), ("FOLDER", "folder"), ("folder", "folder")],
)
def test_names_in_any_letter_case(text, name):
    assert layouts.dataset_name(text) == name


@pytest.mark.parametrize("text", ["", "birds", "cub200", "ſop", " cub"])
def test_names_that_are_none(text):
    with pytest.raises(ValueError, match="is not a dataset; choose from cub, cars, SOP, Inshop, glyphs, "):
        layouts.dataset_name(text)


def test_facts():
    known = {name: layouts.get(name) for name in layouts.DATASETS}
    totals = {name: sum(n for n, _ in layout.published.values()) for name, layout in known.items()}
    assert (totals["cub"], totals["cars"], totals["SOP"], totals["Inshop"]) == (11788, 16185, 120053, 52712)
    for layout in known.values():
        assert not (layout.archive or layout.by_hand) or "an independent audit found" in layout.mirrors
        assert all(len(text.split()) in (1, len(layout.results_at)) for _, _, text in layout.results)


@pytest.mark.parametrize("layout", ["train+test", "train+query+gallery", "csv"])
def test_a_share_from_a_checkpoint_gives_way_to_a_split(tmp_path, layout):
    trees.make_folder(tmp_path, layout, classes=4, images=4, size=8)
    with pytest.raises(ValueError, match="--train-classes 0.75.*has a split of its own; leave the flag out"):
        dataset.load_benchmark("folder", tmp_path, 0.75)
    ignored = dataset.load_benchmark("folder", tmp_path, 0.75, share_given=False)
    assert pairs(ignored.train) == pairs(dataset.load_benchmark("folder", tmp_path).train)
    trees.make_folder(tmp_path / "flat", "classes", classes=4, images=2, size=8)
    for share_given in (True, False):
        flat = dataset.load_benchmark("folder", tmp_path / "flat", 0.75, share_given=share_given)
        assert flat.train.num_classes == 3
    assert dataset.load_benchmark("folder", tmp_path / "flat", None).train.num_classes == 2


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
    "SOP class 0": (
        "SOP",
        lambda home: spoil(home / SOP_LIST, " 3 1 ", " 0 1 "),
        ["line 2", "expected image_id"],
    ),
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
    "csv shared class": ("csv", lambda home: spoil(home / "list.csv", "thing_3", "thing_1"), ["share 1", "thing_1"]),
    "csv file missing": ("csv", remove("pictures/0/1.png"), ["list.csv names 1 images", "pictures/0/1.png"]),
    "two csv": ("csv", lambda home: shutil.copy(home / "list.csv", home / "more.csv"), ["2 lists"]),
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
        ("CUB", 0.5, "'CUB' is not a dataset; choose from cub, cars"),
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


# ---------------------------------------------------------------- through the scripts

TREES = {
    "cars 1": ("cars", lambda root: make_cars(root, layout=1)),
    "cars 2": ("cars", lambda root: make_cars(root, layout=2)),
    "cars 3": ("cars", lambda root: make_cars(root, layout=3)),
    "SOP": ("SOP", make_sop),
    "Inshop": ("Inshop", make_inshop),
    "folder train+test": ("folder", lambda root: make_folder(root, "train+test")),
    "folder classes": ("folder", lambda root: make_folder(root, "classes")),
    "folder train+query+gallery": ("folder", lambda root: make_folder(root, "train+query+gallery")),
    "folder csv": ("folder", lambda root: make_folder(root, "csv")),
}
KS = {"SOP": [1, 10, 100, 1000], "Inshop": [1, 10, 20, 30, 40, 50]}


@pytest.mark.parametrize(
    "one, other", [("Cat", "cat"), ("\u00e9", "e\u0301"), ("cat", "cat "), ("STRASSE", "stra\u00dfe")]
)
def test_class_names_that_look_alike_are_pointed_out(tmp_path, one, other):
    trees.make_folder(tmp_path, "train+test", 8, 2, 8)
    (tmp_path / "train" / "thing_1").rename(tmp_path / "train" / one)
    (tmp_path / "test" / "thing_5").rename(tmp_path / "test" / other)
    (line,) = dataset.load_benchmark("folder", tmp_path).warnings
    assert f"{one!a} (train)" in line and f"{other!a} (test)" in line and "taken as two classes;" in line


def test_pictures_beside_the_class_folders_are_counted(tmp_path):
    trees.make_folder(tmp_path, "train+test", 8, 2, 8)
    trees.save(tmp_path / "train" / "loose.png", 1, 1)
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    expected = f"{tmp_path / 'train'}: images beside the class folders have no class, not used: 1 (loose.png)"
    assert dataset.load_benchmark("folder", tmp_path).warnings == (expected,)


@pytest.mark.slow
@pytest.mark.parametrize("layout", TREES)
def test_trains_and_scores(call, tmp_path, layout):
    name, make = TREES[layout]
    root = tmp_path / "data"
    make(root)
    words = ["--dataset", name, "--data-root", root, "--log-dir", tmp_path / "logs", "--epochs", 1]
    trained = call("train.py", *TINY, *words)
    assert trained.code == 0, trained.err
    run, figures = tmp_path / "logs" / name / "run_1", tmp_path / "figures.json"
    scored = call("evaluate.py", "--model-path", run, "--data-root", root, "--gpu-id", -1, "--json", figures)
    assert scored.code == 0, scored.err
    found = json.loads(figures.read_text())
    row = pd.read_csv(run / "results.csv").iloc[-1]
    assert found["figures"] == {f"R@{k}": row[f"R@{k}"] for k in KS.get(name, [1, 2, 4, 8, 16, 32])}
    assert (found["gallery"] is not None) == (layout in ("Inshop", "folder train+query+gallery"))
