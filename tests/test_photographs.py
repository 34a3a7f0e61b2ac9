"""Pictures as phones and cameras make them: HEIC, camera raw, large files; prepare.py shrink."""

import os
import re
import shutil

import dataset
import decoding
import folders
import layouts
import numpy as np
import pandas as pd
import pillow_heif
import prepare
import pytest
from conftest import TINY
from PIL import Image, ImageCms
from trees import make_classes, make_cub, pairs, picture, save

pillow_heif.register_heif_opener()


def corner(size=(90, 60)):
    """Black but for a white rectangle in the upper left."""
    image = Image.new("RGB", size)
    image.paste("white", (0, 0, 30, 20))
    return image


def heic(path, image, orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "HEIF", quality=-1, exif=exif.tobytes())


def read(path, **options):
    return np.asarray(decoding.read_rgb(path, own=True, **options)).astype(int)


@pytest.mark.parametrize("name", ["a.HEIC", "a.heif", "a.jpg"])  # some exports keep the old name
def test_heic_is_read_and_turned_once(tmp_path, name):
    for orientation, white in ((1, np.s_[:20, :30]), (3, np.s_[40:, 60:]), (6, np.s_[:30, 40:]), (8, np.s_[60:, :20])):
        heic(tmp_path / name, corner(), orientation)
        pixels = read(tmp_path / name)
        assert pixels.shape == ((60, 90, 3) if orientation in (1, 3) else (90, 60, 3))
        assert pixels[white].min() > 250 and pixels.sum() < 255.5 * 3 * 600


def test_more_than_eight_bits_and_transparency(tmp_path):
    values = (np.arange(64 * 64 * 3).reshape(64, 64, 3) * 5 % 65536).astype(np.uint16)
    pillow_heif.from_bytes("RGB;16", (64, 64), values.tobytes()).save(tmp_path / "deep.heic", quality=-1)
    assert abs(read(tmp_path / "deep.heic") - values // 257).max() <= 1
    clear = corner().convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 0))
    heic(tmp_path / "clear.heic", clear)
    assert read(tmp_path / "clear.heic").min() == 255  # on white


def test_a_folder_of_heic_trains_and_is_searched(call, tmp_path):
    for c in range(4):
        for i in range(4):
            heic(tmp_path / "mine" / f"class {c}" / f"IMG_{i}.HEIC", picture(c, i))
    (tmp_path / "mine" / "class 0" / "IMG_0.mov").write_text("a film")
    words = [*TINY, "--dataset", "folder", "--data-root", tmp_path / "mine", "--log-dir", tmp_path, "--warm", 0]
    done = call("train.py", *words, "--epochs", 1)
    assert done.code == 0 and "skipped 1 files that are no images (1 .mov)" in done.err, done.err
    query = tmp_path / "mine" / "class 3" / "IMG_0.HEIC"
    words = ["--model-path", tmp_path / "folder" / "run_1", "--gallery", tmp_path / "mine", "--query", query]
    found = call("retrieve.py", *words, "--output", tmp_path / "out", "--workers", 0)
    assert found.code == 0 and "cannot be decoded" not in (tmp_path / "out" / "neighbours.html").read_text()
    assert "skipped 1 files that are no images (1 .mov)" in found.err and "gallery: 16 images" in found.out


def test_published_benchmarks_are_no_heic(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "open_heif", None)
    home = make_cub(tmp_path, 2, 5)
    for path in home.glob("images/*/B*"):
        decoding.read_rgb(path)


def test_what_is_skipped_is_named():
    kinds = [".aae"] * 2 + [".mov"] * 6 + ["without a suffix", ".dng", ".jxl", ".dng"]
    said = "3 pictures that have to be converted first (2 .dng, 1 .jxl) and "
    assert folders.tell_skipped(kinds) == said + "9 files that are no images (6 .mov, 2 .aae, 1 without a suffix)"
    assert folders.tell_skipped([]) == ""


def test_camera_raw_is_no_picture_of_its_preview(refused, tmp_path):
    """Pillow would take it for a TIFF file."""
    make_classes(tmp_path / "mine", 4, 2)
    save(tmp_path / "photo.tif", 1, 1)
    raw = (tmp_path / "photo.tif").rename(tmp_path / "photo.NEF")
    with pytest.raises(decoding.UnreadableImage, match="it has to be converted first, to JPEG or TIFF"):
        decoding.read_rgb(raw, own=True)
    (tmp_path / "mine" / "class 9").mkdir()
    raw.rename(tmp_path / "mine" / "class 9" / "photo.NEF")
    line = refused(
        "train.py", "--dataset", "folder", "--data-root", tmp_path / "mine", match="holds no image but 1 pict"
    )
    assert "1 pictures that have to be converted first (1 .nef)" in line


def test_links_to_themselves_are_skipped_and_counted(tmp_path):
    make_classes(tmp_path, 4, 2)
    for place in (tmp_path, tmp_path / "class 1"):
        (place / "loop").symlink_to("loop")
    benchmark = dataset.load_benchmark("folder", tmp_path)
    assert benchmark.warnings == (f"{tmp_path}: skipped 2 files that are no images (2 broken links or pipes)",)
    assert folders.find_images(tmp_path)[1] == ["broken links or pipes"] * 2


def test_large_pictures_are_said_with_the_way_out(call, tmp_path, capsys):
    for size, said in ((40, False), (2100, True)):
        root = tmp_path / f"of {size}"
        for c in range(2):
            for i in range(4):
                path = root / f"class {c}" / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(c, i).resize((size, size)).save(path)
        words = [*TINY, "--dataset", "folder", "--data-root", root, "--log-dir", tmp_path, "--warm", 0, "--epochs", 0]
        done = call("train.py", *words, "--batch-size", 4)
        assert done.code == 0 and ("note: the pictures have 4 megapixels; decoding takes" in done.out) == said
        assert (f"shrink folder --data-root '{root}' --output '{root}_512'" in done.out) == said


@pytest.fixture
def mixed(tmp_path):
    """Pictures of two classes and more, of all kinds."""
    root = tmp_path / "mine"
    for c in range(4):
        make = root / f"class {c}"
        heic(make / "IMG_1.HEIC", picture(c, 1, 200))
        heic(make / "IMG_2.jpg", corner((300, 200)), 6)
        picture(c, 3, 200).save(make / "IMG_1.jpg", quality=95)
        picture(c, 4, 30).save(make / "small.png")
        picture(c, 5, 30).save(make / "small.jpg")
    return root


def test_shrink_keeps_names_labels_and_splits(call, mixed, tmp_path):
    before = {path: path.read_bytes() for path in mixed.rglob("*.*")}
    words = ["prepare.py", "shrink", "folder", "--data-root", mixed, "--output", tmp_path / "small", "--side", 60]
    assert call(*words).code == 0
    names = ["IMG_1.jpg", "IMG_1.jpg.jpg", "IMG_2.jpg", "small.jpg", "small.png.png"]
    sizes = [(60, 60), (60, 60), (60, 90), (30, 30), (30, 30)]
    for name, size in zip(names, sizes, strict=True):
        with Image.open(tmp_path / "small" / "class 2" / name) as image:
            assert image.size == size and image.format == ("PNG" if name == "small.png.png" else "JPEG")
            assert "icc_profile" not in image.info and set(image.getexif()) == {prepare.DESCRIPTION}
    turned = read(tmp_path / "small" / "class 2" / "IMG_2.jpg")
    assert turned[2, -2].min() > 200 and turned[2, 2].max() < 50  # the white corner is now on the right
    large, small = (dataset.load_benchmark("folder", root) for root in (mixed, tmp_path / "small"))
    assert (small.train.class_names, len(small.train), len(small.query)) == (large.train.class_names, 10, 10)
    assert {path: path.read_bytes() for path in mixed.rglob("*.*")} == before
    # what is there is kept, what is newer is done again
    made = {path: path.stat().st_ctime_ns for path in (tmp_path / "small").rglob("*.*")}
    (tmp_path / "small" / "class 1" / "IMG_1.jpg").unlink()
    save(mixed / "class 3" / "small.png", 9, 9)
    assert call(*words).code == 0
    changed = {path.relative_to(tmp_path) for path, time in made.items() if path.stat().st_ctime_ns != time}
    assert {str(path) for path in changed} == {"small/class 1/IMG_1.jpg", "small/class 3/small.png.png"}
    # a copy is that of its own original, and one without an original is said
    (mixed / "class 0" / "IMG_2.jpg").rename(mixed / "class 1" / "IMG_3.jpg")
    (mixed / "class 2" / "small.jpg").rename(mixed / "class 2" / "SMALL.jpg")
    done = call(*words)
    problems = re.findall(r"problem: .*small/(.*): its original is gone or has changed", done.out)
    assert done.code == 1 and problems == ["class 0/IMG_2.jpg", "class 2/small.jpg"]
    times = (mixed / "class 2" / "IMG_2.jpg").stat()
    shutil.copy(mixed / "class 2" / "SMALL.jpg", mixed / "class 2" / "IMG_2.jpg")  # another of the same name and time
    os.utime(mixed / "class 2" / "IMG_2.jpg", ns=(times.st_atime_ns, times.st_mtime_ns))
    call(*words)
    with Image.open(tmp_path / "small" / "class 2" / "IMG_2.jpg") as image:
        assert image.size == (30, 30)


def test_shrink_names_what_it_leaves_out_and_refuses_other_places(call, refused, mixed, tmp_path):
    mixed = mixed.rename(mixed.with_name("mine \udce9"))  # a name that is no text
    for name in ("class 0", "class 9"):  # the other has nothing else
        (mixed / name).mkdir(exist_ok=True)
        (mixed / name / "IMG_1.HEIC").write_bytes(b"no picture")
    words = ["prepare.py", "shrink", "folder", "--data-root", mixed, "--output"]
    for _ in range(2):  # it goes on
        done = call(*words, tmp_path / "small")
        assert done.code == 1 and done.out.count("/IMG_1.HEIC: cannot be decoded") == 2
    assert not (tmp_path / "small" / "class 9").exists()
    assert len(list((tmp_path / "small").rglob("*.*g"))) == 19
    refused(*words, mixed / "class 1" / "small", match="the pictures are in .*mine .*; name a folder outside it")
    refused(*words, tmp_path, match="the pictures are in")
    refused(*words, tmp_path / "small", "--side", 100, match="holds something else than .* at --side 100")
    save(tmp_path / "other" / "class 0" / "IMG_1.jpg", 1, 1)
    refused(*words, tmp_path / "other", match="holds something else")


def test_a_list_is_shrunk_to_a_list(call, tmp_path):
    rows = []
    for c, split in ((0, "train"), (1, "train"), (2, "test"), (3, "test")):
        for i, folder in enumerate(("in/photos", "elsewhere")):
            for suffix in (".png", ".bmp"):
                save(tmp_path / folder / f"{c}{suffix}", c, i, 90)
                path = f"photos/{c}{suffix}" if i == 0 else f"../elsewhere/{c}{suffix}"
                rows.append({"path": path, "label": f"class {c}", "split": split, "more": i})
    rows[0]["path"] = str(tmp_path / "in" / rows[0]["path"])  # absolute
    pd.DataFrame(rows).to_csv(tmp_path / "in" / "my list.tsv", sep="\t", index=False)
    where = ["--data-root", tmp_path / "in" / "my list.tsv", "--output", tmp_path / "in" / "small"]
    assert call("prepare.py", "shrink", "folder", *where, "--side", 50).code == 0
    large = dataset.load_benchmark("folder", tmp_path / "in" / "my list.tsv")
    small = dataset.load_benchmark("folder", tmp_path / "in" / "small" / "my list.csv")
    for before, after in ((large.train, small.train), (large.query, small.query)):
        assert before.class_names == after.class_names and before.labels.tolist() == after.labels.tolist()
        assert [Image.open(after.file(row)).size for row in range(len(after))] == [(50, 50)] * 8
        assert len({path for path, _ in pairs(after)}) == 8 and not any(".." in path for path in after.paths)
    assert layouts.get("folder").read(tmp_path / "in" / "small" / "my list.csv").splits.keys() == {"train", "test"}


def test_colours_are_those_that_the_profile_means(tmp_path):
    """Only where it is not sRGB; damaged ones are passed over."""
    image = Image.new("RGB", (600, 600), (200, 60, 60))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile, same in ((None, True), (lab, True), (b"damaged", True), (swapped(lab), False)):
        image.save(tmp_path / "a.png", icc_profile=profile)
        as_it_is, as_meant = read(tmp_path / "a.png"), read(tmp_path / "a.png", srgb=True)
        assert (as_it_is == as_meant).all() == same and (as_it_is[0, 0] == (200, 60, 60)).all()
    assert as_meant[0, 0, 2] > 150 > as_meant[0, 0, 0]
    image.quantize(4).save(tmp_path / "a.png", icc_profile=profile)
    assert (read(tmp_path / "a.png", srgb=True) == as_meant).all()
    image.save(tmp_path / "a.png", transparency=(200, 60, 60), icc_profile=profile)
    assert (read(tmp_path / "a.png", srgb=True) == 255).all()


def swapped(profile):
    """An sRGB profile that calls red blue, under another name."""
    swap = profile.replace(b"rXYZ", b"tmp_").replace(b"bXYZ", b"rXYZ").replace(b"tmp_", b"bXYZ")
    return swap.replace(b"sRGB", b"BGRs").replace("sRGB".encode("utf-16-be"), "BGRs".encode("utf-16-be"))


def test_new_names_are_never_equal():
    paths = ["a/1.jpg", "a/1.HEIC", "a/1.heic", "A/1.jpg", "a/1.heic.png", "/x/../a/./1.tif", "b/1.jpg"]
    stems = ["a/1", "a/1.HEIC", "a/1.heic_2", "A/1.jpg", "a/1.heic.png", "x/a/1", "b/1"]
    assert prepare.new_stems(paths) == stems
