"""Validation classes, pixels, batches to the bit, and images that cannot be decoded."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import dataset
import decoding
import numpy as np
import pytest
import torch
import trees
from PIL import Image
from refused import Refused, one_line
from trees import pairs

SMALL = dataset.train_transform(16)
SMALL_EVAL = dataset.eval_transform(16)


def classes_of_one(count):
    """A list of so many own pictures, each of a class of its own."""
    names = [str(c) for c in range(count)]
    return dataset.ImageList(Path("root"), names, np.arange(count), names, own=True)


def test_split_validation_holds_out_whole_classes(tmp_path):
    trees.make_cub(tmp_path, classes=20, images=3, size=8)
    images = dataset.load_benchmark("cub", tmp_path).train  # 10 classes
    train, held_out = dataset.split_validation(images, 0.3, seed=0)
    assert sorted(pairs(train) + pairs(held_out)) == pairs(images)
    assert train.labels.tolist() == np.repeat(np.arange(7), 3).tolist()
    assert held_out.labels.tolist() == np.repeat(np.arange(3), 3).tolist()
    train, held_out = dataset.split_validation(classes_of_one(20), 0.3, seed=0)
    assert held_out.class_names == ["3", "6", "9", "12", "16", "17"] and train.own and held_out.own
    assert len({tuple(dataset.split_validation(images, 0.3, seed)[1].class_names) for seed in range(9)}) > 3
    for classes, share, sizes in ((10, 0.2, (8, 2)), (10, 0.8, (2, 8)), (4, 0.5, (2, 2))):
        assert tuple(map(len, dataset.split_validation(classes_of_one(classes), share, 0))) == sizes
    for classes, share, count in ((60, 0.02, 1), (60, 0.98, 59), (4, 0.9, 4), (3, 0.5, 2)):
        with pytest.raises(Refused, match=f"--val-classes {share} holds out {count} of the {classes} training"):
            dataset.split_validation(classes_of_one(classes), share, 0)


def read(path, own=False):
    return np.asarray(decoding.read_rgb(str(path), own), dtype=int)


def test_all_kinds_of_images_become_rgb(tmp_path):
    """A red and a grey image, each in the modes that can hold it."""
    red = Image.new("RGB", (4, 4), (200, 0, 0))
    kinds = [("RGB", "png"), ("RGBA", "png"), ("P", "png"), ("P", "gif"), ("CMYK", "tif"), ("YCbCr", "tif")]
    for mode, suffix in kinds:
        # Compressed: Pillow 12.3, the last for Python 3.10, cannot read the plain YCbCr files that it writes.
        options = {"compression": "tiff_lzw"} if suffix == "tif" else {}
        red.convert(mode).save(tmp_path / f"red.{suffix}", **options)
        pixels = read(tmp_path / f"red.{suffix}")
        assert pixels.shape == (4, 4, 3) and np.abs(pixels - [200, 0, 0]).max() <= 4, mode
    for mode, value, suffix in (
        ("L", 77, "png"), ("LA", (77, 255), "png"), ("1", 1, "png"), ("I;16", 77 * 257, "png"), ("I", 77 * 257, "tif")
    ):  # fmt: skip
        Image.new(mode, (4, 4), value).save(tmp_path / f"grey.{suffix}")
        assert np.unique(read(tmp_path / f"grey.{suffix}")).tolist() == [255 if mode == "1" else 77], mode


UPRIGHT = np.array([[1, 2, 3], [4, 5, 6]]) * 40  # grey values, 2×3
AS_STORED = {  # by EXIF orientation: how a camera stores what lies upright as above
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT),
    7: UPRIGHT[::-1, ::-1].T,
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_own_pictures_are_turned_upright_and_published_ones_stay_as_stored(tmp_path, suffix):
    exif, path = Image.Exif(), tmp_path / f"image.{suffix}"
    for number, values in AS_STORED.items():
        exif[0x0112] = number
        stored = Image.fromarray(np.kron(values, np.ones((16, 16))).astype(np.uint8)).convert("RGB")
        stored.save(path, exif=exif, **({"quality": 95} if suffix == "jpg" else {}))
        expected = [(True, UPRIGHT)]
        if suffix != "tif":  # Pillow itself turns TIFFs, and no benchmark has any
            expected.append((False, values))
        for own, wanted in expected:
            found = read(path, own)[8::16, 8::16, 0]
            assert found.shape == wanted.shape and np.abs(found - wanted).max() < 8, (number, own)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_that_makes_no_sense_turns_nothing_and_drafts_are_turned(tmp_path):
    exif, path = Image.Exif(), tmp_path / "a.jpg"
    exif[0x0112] = 9
    for nonsense in (exif, b"Exif\0\0MM\0*\0\0\xff\xff no table"):
        Image.new("RGB", (3, 2), "red").save(path, exif=nonsense)
        assert read(path, own=True).shape == (2, 3, 3)
    exif[0x0112] = 6
    Image.new("RGB", (800, 400), "red").save(path, exif=exif)
    with Image.open(path) as image:  # as thumbnails are read
        image.draft("RGB", (100, 100))
        assert decoding.decode(image, own=True).size == (100, 200)


def transparent(kind):
    """(image, saving options): dark red, or grey, of which the left half can be seen through."""
    image = Image.new("RGB", (8, 8), (100, 0, 0))
    if kind in ("RGBA", "LA"):
        image = image if kind == "RGBA" else Image.new("L", (8, 8), 100)
        alpha = Image.new("L", (8, 8), 255)
        alpha.paste(0, (0, 0, 4, 8))
        image.putalpha(alpha)
        return image, {}
    if kind == "colour key":
        image.paste((7, 7, 7), (0, 0, 4, 8))
        return image, {"transparency": (7, 7, 7)}
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([7, 7, 7, 100, 0, 0])
    palette.paste(0, (0, 0, 4, 8))
    return palette, {"transparency": 0 if kind == "P" else b"\x80\xff"}


def test_own_pictures_lie_on_white_where_they_are_transparent(tmp_path):
    kinds = [(kind, "png") for kind in ("RGBA", "LA", "P", "P half", "colour key")]
    kinds += [("RGBA", "webp"), ("RGBA", "tif"), ("RGBA", "gif"), ("LA", "tif"), ("P", "gif")]
    for kind, suffix in kinds:
        image, options = transparent(kind)
        path = tmp_path / f"image.{suffix}"
        image.save(path, **(options | ({"lossless": True} if suffix == "webp" else {})))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            own, plain = read(path, own=True), read(path)
        expected = [100, 100, 100] if kind == "LA" else [100, 0, 0]
        assert own[0, 7].tolist() == plain[0, 7].tolist() == expected, (kind, suffix)
        assert own[0, 0].tolist() == ([131] * 3 if kind == "P half" else [255] * 3), (kind, suffix)
        assert plain[0, 0].max() <= 100  # what convert("RGB") gives, with which the published figures were made


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.float32([0, 0.5, 1]), [0, 128, 255]),
        (np.float32([-3, 0, 3]), [0, 128, 255]),
        (np.float32([np.nan, 1, np.inf]), [127, 127, 127]),
        (np.float32([np.nan, 1, 2]), [0, 0, 255]),
        (np.float32([0.3, 0.3, 0.3]), [127, 127, 127]),
        (np.int32([0, 100_000, 200_000]), [0, 128, 255]),
        (np.int32([-5, 0, 5]), [0, 128, 255]),
        (np.int32([0, 64, 128]), [0, 128, 255]),  # 8 bits in 32
        (np.int32([0, 257 * 100, 65535]), [0, 100, 255]),
        (np.uint16([0, 257 * 3, 65535]), [0, 3, 255]),
        (np.uint16([0, 1, 300]), [0, 0, 1]),
    ],
)
def test_floats_and_wide_integers_are_never_black(tmp_path, values, expected):
    Image.fromarray(np.tile(values, (2, 1))).save(tmp_path / "a.tif")
    for own in (True, False):
        found = read(tmp_path / "a.tif", own)
        assert found.shape == (2, 3, 3) and found[0, :, 0].tolist() == expected


def test_files_that_are_not_what_their_names_say(tmp_path):
    """Another format under the suffix does not matter; what cannot be decoded is named in one line that says why."""
    trees.picture(1, 1, 8).save(tmp_path / "a.jpg", format="PNG")
    trees.picture(1, 1, 8).save(tmp_path / "b.png", format="JPEG")
    assert np.array_equal(read(tmp_path / "a.jpg"), np.asarray(trees.picture(1, 1, 8)))
    assert read(tmp_path / "b.png").shape == (8, 8, 3)
    Image.new("RGB", (1, 1000)).save(tmp_path / "just.png")
    assert read(tmp_path / "just.png").shape == (1000, 1, 3)
    Image.new("RGB", (1001, 1)).save(tmp_path / "strip.png")
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(tmp_path / "nan.tif")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    trees.picture(1, 1, 64).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-100])
    os.mkfifo(tmp_path / "pipe.png")
    for name, why in {
        "strip.png": "1,001 × 1 pixels are narrower than 1 to 1,000",
        "nan.tif": "no pixel has a finite value",
        "empty.jpg": "cannot identify image file",
        "text.jpg": "cannot identify image file",
        "cut.jpg": "image file is truncated",
        "gone.jpg": "No such file or directory",
        "pipe.png": "not a regular file",
        ".": "not a regular file",
    }.items():
        with pytest.raises(decoding.UnreadableImage) as caught:
            read(tmp_path / name)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / name}: cannot be decoded ({why}") and "\n" not in message


def test_own_travels_from_the_folder_to_the_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, make in (("cub", trees.make_cub), ("folder", lambda root: trees.make_folder(root, "classes"))):
        make(tmp_path / name)
        benchmark = dataset.load_benchmark(name, tmp_path / name)
        own = name == "folder"
        parts = [benchmark.train, benchmark.query, *dataset.split_validation(benchmark.train, 0.5, 0)]
        assert [part.own for part in parts] == 4 * [own]
        Image.new("RGB", (60, 20), "red").save(benchmark.train.file(0), format="JPEG", exif=exif)
        loaded = dataset.ImageDataset(benchmark.train, lambda image: image.size)
        assert loaded[0][0] == loaded[0, 1][0] == ((20, 60) if own else (60, 20))


def test_transforms_give_the_bytes_of_the_image_and_scoring_takes_its_centre():
    for transform in (dataset.train_transform(32), dataset.eval_transform(32)):
        values = transform(Image.new("RGB", (50, 40), (255, 102, 0)))
        assert values.shape == (3, 32, 32) and values.dtype == torch.uint8
        assert values[:, 5, 5].tolist() == [255, 102, 0]
    assert dataset.eval_transform(64).transforms[0].size == 73
    image = Image.new("RGB", (512, 256), "black")
    image.paste("white", (144, 16, 368, 240))  # the centre 224×224 of 512×256
    assert dataset.eval_transform(224)(image).min() == 255


# ---------------------------------------------------------------- batches

LABELS = np.repeat(np.arange(7), [10, 3, 5, 8, 1, 6, 9])  # 42 images


def batches(epoch=0, **options):
    sampler = dataset.RandomBatches(LABELS, **({"batch_size": 8, "seed": 1} | options))
    sampler.set_epoch(epoch)
    return list(sampler)


def test_shuffled_batches_hold_every_image_once():
    epoch = batches()
    assert [len(batch) for batch in epoch] == [8] * 5 and len(dataset.RandomBatches(LABELS, 8, 1)) == 5
    indices, seeds = ({item[part] for batch in epoch for item in batch} for part in (0, 1))
    assert len(indices) == len(seeds) == 40 and indices < set(range(42))
    assert len(batches(batch_size=42)) == 1


@pytest.mark.parametrize("k", [2, 4, 8])
def test_balanced_batches(k):
    epoch = batches(images_per_class=k)
    assert len(epoch) == 5
    for batch in epoch:
        indices = np.array([i for i, _ in batch])
        classes, counts = np.unique(LABELS[indices], return_counts=True)
        assert len(classes) == 8 // k and set(counts) == {k}
        for c in classes:  # repeats only where there are too few
            assert len(set(indices[LABELS[indices] == c])) == min(k, (LABELS == c).sum())
    assert len({LABELS[i] for batch in epoch for i, _ in batch}) > 1


def test_batches_are_a_function_of_seed_and_epoch():
    """And those of earlier versions, whose runs can be resumed."""
    for options, digest in (({}, "972ebbc4953bbb8a"), ({"images_per_class": 4}, "181628109d0ade3a")):
        assert hashlib.sha256(repr(batches(3, **options)).encode()).hexdigest()[:16] == digest
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


@pytest.mark.parametrize("images_per_class", [0, 4])
def test_parts_of_all_processes_are_the_batches_of_one(images_per_class):
    whole = batches(2, images_per_class=images_per_class)
    for count in (2, 4, 8):
        parts = [batches(2, images_per_class=images_per_class, shard=(rank, count)) for rank in range(count)]
        for batch, *shares in zip(whole, *parts, strict=True):
            assert {len(share) for share in shares} == {8 // count} and sum(shares, []) == batch


def test_sizes_that_do_not_fit():
    for options, words in (
        ({"batch_size": 43}, "--batch-size 43: there are only 42 training images"),
        ({"images_per_class": 3}, "--IPC 3: so many images per class do not divide --batch-size 8"),
        ({"images_per_class": 1}, "needs 8 classes, there are 7"),
        ({"batch_size": 10, "shard": (3, 4)}, "^--batch-size 10 is the whole batch, .* to 4 processes evenly$"),
    ):
        with pytest.raises(Refused, match=words):
            batches(**options)


@pytest.fixture(scope="session")
def birds(cub):
    return dataset.load_benchmark("cub", cub)  # 8 classes of 6 images


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


def test_epochs_are_the_same_bits_for_any_number_of_workers_and_when_resumed(birds):
    before = torch.get_rng_state()
    alone = epochs(birds.train, [1, 2, 3])
    list(dataset.make_eval_loader(birds.query, SMALL_EVAL, 8))
    assert torch.equal(torch.get_rng_state(), before)  # the global state is left alone
    assert not same(alone[1], alone[2])
    for workers in (1, 2):
        torch.rand(workers)  # what else draws does not matter
        together = epochs(birds.train, [1, 2, 3], workers)
        assert all(same(one, other) for one, other in zip(alone, together, strict=True))
    assert same(epochs(birds.train, [3])[0], alone[2])
    balanced = epochs(birds.train, [3], images_per_class=4)[0]
    assert not same(balanced, alone[2])
    shares = [epochs(birds.train, [3], 2, images_per_class=4, shard=(rank, 2))[0] for rank in (0, 1)]
    joined = [[torch.cat(parts) for parts in zip(*batch, strict=True)] for batch in zip(*shares, strict=True)]
    assert same(joined, balanced)


@pytest.mark.parametrize("count, workers", [(1, 0), (1, 2), (2, 1), (5, 0), (25, 0)])  # 24 images
def test_processes_share_the_evaluation_without_gap_or_overlap(birds, count, workers):
    found = torch.full((24,), -1)
    for rank in range(count):
        loader = dataset.make_eval_loader(birds.query, SMALL_EVAL, 3, workers, shard=(rank, count))
        labels = [y for _, y in loader]
        assert len(loader.dataset) == 24 and len(labels) == len(loader) == -(-len(range(rank, 24, count)) // 3)
        found[rank::count] = torch.cat([torch.empty(0, dtype=torch.long), *labels])
    assert found.tolist() == birds.query.labels.tolist()


def worker_threads(_):
    return torch.tensor(torch.get_num_threads())


def test_workers_run_one_thread_each_and_are_no_more_than_the_cores(birds):
    loader = dataset.make_eval_loader(birds.query, worker_threads, 8, workers=1)
    assert {int(n) for x, _ in loader for n in x} == {1}
    with warnings.catch_warnings():  # with more of them torch would warn, and none would make anything faster
        warnings.simplefilter("error")
        assert dataset.make_eval_loader(birds.query, SMALL_EVAL, 8, 1000).num_workers == dataset.available_cores()


def signals_are_the_workers_own(_):
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    return torch.tensor(signal.getsignal(signal.SIGINT) == signal.SIG_IGN and signal.SIGTERM in blocked)


def test_workers_outlive_signals_to_the_group_and_leave_quietly_when_the_trainer_tells_them_to(birds):
    others = multiprocessing.active_children()
    loader = dataset.make_eval_loader(birds.query, signals_are_the_workers_own, 8, workers=1)
    loader.multiprocessing_context = "fork"  # a forkserver, Python 3.14's default, would be the one of apart.py
    assert all(x.all() for x, _ in loader)
    (worker,) = (process for process in multiprocessing.active_children() if process not in others)
    for _ in range(2):
        subprocess.run(["sh", "-c", f"kill {worker.pid}"], check=True)  # not from the trainer, which still needs it
        worker.join(1)
        assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.slow
def test_an_unforeseen_error_ends_a_script_that_has_workers(tmp_path):
    """At exit Python sends the workers SIGTERM and waits for them, without end."""
    trees.make_cub(tmp_path, classes=4, images=6, size=8)
    script = f"""
import dataset, pathlib
images = dataset.load_benchmark("cub", pathlib.Path({str(tmp_path)!r})).train
for batch in dataset.make_train_loader(images, dataset.train_transform(8), 4, 1, workers=1):
    raise TypeError("unforeseen")
"""
    code = Path(dataset.__file__).parent
    ended = subprocess.run([sys.executable, "-c", script], cwd=code, capture_output=True, text=True, timeout=90)
    assert ended.returncode == 1 and ended.stderr.endswith("TypeError: unforeseen\n")


def spoil(images, rows):
    """Makes some of the images text, and gives their paths."""
    paths = [images.file(row) for row in rows]
    for path in paths:
        Path(path).write_text("not an image")
    return paths


def without(listed, paths):
    """The (path, class name) of the images but for some files."""
    return [pair for pair in pairs(listed) if str(listed.root / pair[0]) not in paths]


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_decoded_stop_the_loader_or_are_left_out(tmp_path, workers):
    trees.make_cub(tmp_path, classes=8, images=6)
    whole, skip = dataset.load_benchmark("cub", tmp_path), {"skip_bad": True, "workers": workers}
    train, query = whole.train, whole.query
    bad = spoil(train, [12, 14])
    with pytest.raises(decoding.UnreadableImage) as caught:
        list(dataset.make_train_loader(train, SMALL, 8, 1, workers=workers))
    message = one_line(caught.value)
    assert message.split(": cannot be decoded (")[0] in bad and "\n" not in message
    assert message.endswith("(--skip-bad-images leaves such images out)")

    kept = dataset.load_benchmark("cub", tmp_path, **skip)
    assert [line.split(": cannot be decoded (")[0] for line in kept.unreadable] == bad
    assert pairs(kept.train) == without(train, bad) and pairs(kept.query) == pairs(query)
    assert len(list(dataset.make_train_loader(kept.train, SMALL, 7, 1, workers=workers))) == 3

    bad += spoil(train, range(6, 12))  # a whole class, which is as if it had never been listed
    spoilt = spoil(query, range(6, 12))
    kept = dataset.load_benchmark("cub", tmp_path, **skip)
    assert len(kept.unreadable) == 8 + 6
    assert pairs(kept.train) == without(train, bad) and pairs(kept.query) == without(query, spoilt)
    assert kept.train.class_names == [train.class_names[c] for c in (0, 2, 3)]
    assert kept.train.labels.tolist() == np.repeat([0, 1, 2], [6, 4, 6]).tolist()
    scored = dataset.load_benchmark("cub", tmp_path, training=False, **skip)
    assert pairs(scored.train) == pairs(train) and len(scored.unreadable) == 6

    spoil(train, range(24))
    words = "no image in the split 'train'; 30 images were left out, the first: .*Bird_1_0000.jpg: cannot be decoded"
    with pytest.raises(Refused, match=words):
        dataset.load_benchmark("cub", tmp_path, **skip)


def test_queries_and_gallery_keep_their_common_labels_when_a_class_is_left_out(tmp_path):
    trees.make_inshop(tmp_path)
    whole = dataset.load_benchmark("Inshop", tmp_path)
    bad = spoil(whole.query, [2, 3])
    kept = dataset.load_benchmark("Inshop", tmp_path, skip_bad=True)
    assert len(kept.unreadable) == 2 and sorted(set(kept.query.labels)) == [0, 2, 3]
    assert pairs(kept.gallery) == pairs(whole.gallery) and pairs(kept.query) == without(whole.query, bad)
