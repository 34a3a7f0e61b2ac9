"""The pictures: they exist whole, have their size and show what they are given, for every odd size of input."""

import math
import os
import re
import subprocess
import sys

import inference
import numpy as np
import pictures
import pytest
from PIL import Image
from trees import picture

KS = (1, 2, 4, 8, 16, 32)
real_save = pictures._save


def read(path):
    """(H, W, 3) of a picture that was written whole, with nothing left beside it."""
    assert [name for name in os.listdir(path.parent) if name.endswith(".tmp")] == []
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def share(pixels, colour, tolerance=12):
    """Share of the pixels that have about that colour, '#rrggbb'."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(pixels - wanted).max(axis=2) <= tolerance).mean()


def history(trained, warm=1, **more):
    """Rows as train.py keeps them."""
    rows = [{"phase": "untrained", "epoch": -warm}]
    rows += [{"phase": "warm-up" if epoch < 1 else "train", "epoch": epoch} for epoch in range(1 - warm, trained + 1)]
    for number, row in enumerate(rows):
        row |= {f"R@{k}": 1 - 0.5 / (number + k) for k in KS} | more
        if number:
            row |= {"loss": 9 / number, "dist_loss": 5 / number, "ce_loss": 4 / number, "lr": 1e-4}
    return rows


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, instead of files."""
    drawn = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: drawn.append(figure))
    return drawn


@pytest.mark.parametrize("trained, warm, validation", [(1, 0, False), (1, 1, True), (60, 3, False), (0, 2, False)])
def test_curves(tmp_path, figures, trained, warm, validation):
    more = {"val R@1": 0.4} if validation else {}
    pictures.curves(history(trained, warm, **more), tmp_path / "curves.png", best=trained)
    real_save(figures[0], tmp_path / "curves.png")
    pixels = read(tmp_path / "curves.png")
    assert pixels.shape == (810, 1110, 3)
    star = share(pixels, "#bf8700") > 2e-4  # on the best epoch
    assert share(pixels, "#0969da") > 1e-4 and share(pixels, "#bc4c00") > 1e-4 and star == (trained > 0)
    assert (share(pixels, "#eeeeee", 0) > 1e-3) == (warm > 0)
    assert (share(pixels, pictures.RED) > 1e-4) == validation
    ticks = [label.get_text() for label in figures[0].axes[1].get_xticklabels() if label.get_text()]
    assert all(int(tick) >= 1 for tick in ticks) and (ticks or not trained)  # what came before is no epoch


def test_curves_say_which_run_and_what_chance_is_and_cut_nothing_at_100_percent(figures):
    pictures.curves(history(3), "c.png", title="glyphs/run_1 $x_{", chance=4.6)
    assert figures[0].get_suptitle() == r"glyphs/run_1 \$x_{" and len(figures[0].axes) == 2
    line = figures[0].axes[0].lines[-1]
    assert line.get_label() == "chance: ln C" and line.get_linestyle() == "--" and set(line.get_ydata()) == {4.6}
    rows = [{"phase": "train", "epoch": epoch, "R@1": recall} for epoch, recall in ((1, 1.0), (2, 0.6), (3, 0.7))]
    for best, title in ((3, "R@1 70.00 % in epoch 3, the best by test R@1"), (0, ""), (None, "")):
        pictures.curves(rows, "c.png", best=best, chance=4.6)
        losses, axes = figures[-1].axes
        assert axes.get_title() == title and len(losses.lines) == 1  # of another loss chance says nothing
        assert not any(line.get_clip_on() for line in axes.lines) and axes.get_ylim()[1] > 100


def test_curves_of_the_hypergraph_are_there_if_the_rows_have_them(figures):
    rows = history(2) + history(4, incidence=0.4, variance=1.25)[4:]  # resumed: the first rows are older
    pictures.curves(rows, "c.png")
    left, right = figures[0].axes[2:]
    assert [set(line.get_ydata()) for axes in (left, right) for line in axes.lines] == [{0.4}, set(), {1.25}]
    assert "membership in other\nclasses' hyperedges" in [text.get_text() for text in left.get_legend().get_texts()]


def test_chosen_queries_are_the_worst_and_random_others():
    scores = np.linspace(0, 1, 50)
    scores[[3, 4]] = np.nan
    worst, others = inference.choose_queries(scores, 4, seed=1)
    assert worst.tolist() == [0, 1, 2, 5]
    assert len(set(others)) == 4 and not set(others) & {*worst, 3, 4}
    assert others.tolist() == inference.choose_queries(scores, 4, seed=1)[1].tolist()
    assert others.tolist() != inference.choose_queries(scores, 4, seed=2)[1].tolist()
    equal = [inference.choose_queries(np.zeros(1000), 5, seed)[0].tolist() for seed in (0, 1, 0)]
    assert equal[0] == equal[2] != equal[1] and equal[0] != [0, 1, 2, 3, 4]
    few = inference.choose_queries(np.array([0.5, np.nan, 0.1]))
    assert few[0].tolist() == [2, 0] and few[1].tolist() == []


@pytest.fixture
def images(tmp_path):
    """Image files of all kinds, one that is cut and one that is not there."""
    folder = tmp_path / "images"
    folder.mkdir()
    for mode, suffix in (("RGB", "jpg"), ("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg")):
        picture(1, 1, 60, mode).save(folder / f"{mode}.{suffix}")
    picture(1, 2, 300).crop((0, 0, 300, 40)).save(folder / "wide.png")
    Image.fromarray(np.full((40, 40), 40000, np.uint16)).save(folder / "deep.png")
    (folder / "cut.jpg").write_bytes((folder / "RGB.jpg").read_bytes()[:300])
    names = ("RGB.jpg", "L.png", "P.png", "RGBA.png", "CMYK.jpg", "wide.png", "deep.png", "cut.jpg", "absent.png")
    return [folder / name for name in names]


def test_neighbours(tmp_path, images):
    path = tmp_path / "neighbours.png"
    queries, k = 3, len(images)
    right = np.zeros((queries, k), bool)
    right[:, :4] = True
    similar = np.linspace(1, -1, queries * k).reshape(queries, k)
    found = [list(zip(images, *row, strict=True)) for row in zip(similar, right.tolist(), strict=True)]
    pictures.neighbours(list(zip(["a $ b", "c" * 500, "日本 $x_{"], images, found, strict=False)), path)
    pixels = read(path)
    assert pixels.shape[1] > pixels.shape[0] > 400
    assert share(pixels, pictures.GREEN) > share(pixels, pictures.RED) * 0.8 > 0.002  # solid against dashed frames
    assert share(pixels, pictures.GREY, 0) > 0.02  # two placeholders a row
    assert share(pixels, "#9c9c9c", 1) > 0.01  # 40000 of 65535, not clipped to white
    grey = []  # right and wrong differ without colour, too; a query may have found nothing
    for right in (True, False):
        pictures.neighbours([("query", images[0], [(images[0], 0.5, right)]), ("none", images[1], [])], path)
        grey.append(read(path).mean(axis=2) < 200)
    assert (grey[0] != grey[1])[70:].sum() > 500


def test_neighbours_captions_do_not_overlap(figures, images):
    captions = ["W" * 60 + ".jpg", "猫" * 40 + ".jpg", "short $.png", "عصفور" * 9]
    pictures.neighbours([("query", images[0], [(name, 0.5, None) for name in captions])], "n.png", named=True)
    figures[0].canvas.draw()
    texts = [text for text in figures[0].axes[0].texts if text.get_fontsize() == 6.5]
    assert len(texts) == 4 and all("…" in text.get_text() for text in texts[:2])
    assert texts[0].get_text().endswith("W.jpg") and texts[2].get_text() == r"short \$.png"
    boxes = [text.get_window_extent() for text in texts]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))  # noqa: B905


def test_long_names_fit_and_keep_their_ends():
    names = [f"Chevrolet Silverado {kind} Regular Cab 2012" for kind in ("1500", "2500HD")]
    names += [pattern + str(number) for pattern in ("a_bird_from_" * 9, "猫" * 30) for number in range(1000)]
    short = [pictures.label(name, pictures.NAME_LENGTH) for name in names]
    assert len(set(short)) == len(names) and all("…" in name for name in short)
    assert max(len(name) + name.count("猫") for name in short) <= pictures.NAME_LENGTH  # which is twice as wide
    assert pictures.label("007.a_$_b", 40) == r"007.a_\$_b"


INTERNATIONAL = ["鸟类", "鳥類", "日本語の猫", "고양이", "عصفور", "🐶", "हिन्दी", "ไทย", "Ä $5 $x_{"]
INTERNATIONAL += ["\ud800", "\U00020000", "a\nb\x07"]


def test_names_in_other_scripts_are_drawn_or_numbered():
    for name in ["鸟类", "鳥類", "日本語の猫", "عصفور"]:
        assert pictures.label(name, 40) == name
    assert pictures.label("이 🐶", 40) == "U+C774  U+1F436 "


@pytest.mark.slow
def test_no_name_sets_off_a_warning_and_no_setting_is_left(tmp_path, images):
    """Neither imports nor drawing change matplotlib's settings, and pyplot is never imported."""
    code = f"""if True:
        import sys, matplotlib, numpy as np
        before = matplotlib.rcParams["font.family"]
        import pictures
        names, image = {INTERNATIONAL!r}, {str(images[0])!r}
        pictures.hypergraph(np.eye(12), np.arange(12), names, "h.png")
        pictures.embedding_map(np.ones((1, 1)), [image], "one.png")
        pictures.neighbours([(name, image, [(x, 0.5, None) for x in names]) for name in names], "n.png", named=True)
        pictures.curves([], "c.png", title=" ".join(names))
        assert matplotlib.rcParams["font.family"] == before and "matplotlib.pyplot" not in sys.modules
    """
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(pictures.__file__), "PYTHONWARNINGS": "always"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, timeout=120, capture_output=True)
    said = done.stderr.decode()
    assert done.returncode == 0 and not re.search("lyph|findfont|pictures", said), said


@pytest.mark.parametrize("batch, classes", [(1, 1), (32, 100), (180, 11318)])
def test_hypergraph(tmp_path, batch, classes):
    labels = np.random.default_rng(1).integers(0, classes, batch)
    own = labels[:, None] == np.unique(labels)
    names = [f"{c:05d}.A_rather_long_name_of_a_class_$" for c in range(classes)]
    pictures.hypergraph(np.where(own, 1, np.linspace(0.05, 0.4, own.shape[1])), labels, names, tmp_path / "h.png")
    pixels = read(tmp_path / "h.png")
    assert pixels.shape == (900, 1110, 3)
    assert share(pixels, "#fde725") > 0.0005 and share(pixels, "#ffffff", 0) < 0.8  # membership 1, and margins


def test_hypergraph_groups_the_samples_by_class(figures):
    labels = np.array([3, 1, 3, 1])
    pictures.hypergraph(np.array([[0.5, 1], [1, 0.25], [0.4, 1], [1, 0.75]]), labels, list("abcd"), "h.png")
    [axes, bar] = figures[0].axes
    assert axes.images[0].get_array().tolist() == [[1, 0.25], [1, 0.75], [0.5, 1], [0.4, 1]]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["b", "d"]
    assert "other classes' hyperedges: 0.475 on average" in axes.get_title()
    pictures.hypergraph(np.ones((2, 1)), np.array([1, 1]), list("abcd"), "h.png")
    assert "average" not in figures[1].axes[0].get_title()  # there is no other class


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Files of ten colours, four of each, the first one wide, the second one tall; and embeddings close by colour."""
    folder, files = tmp_path_factory.mktemp("colours"), []
    for hue in range(10):
        for number, size in enumerate([(60, 20), (20, 60), (40, 40), (200, 200)]):
            files.append(folder / f"{hue}_{number}.png")
            Image.new("HSV", size, (25 * hue, 255, 255)).convert("RGB").save(files[-1])
    embeddings = np.eye(10, 16).repeat(4, axis=0) + 0.05 * np.random.default_rng(0).normal(size=(40, 16))
    return files, 1e3 * embeddings


def shown_on(figure, count):
    """Which cells of a map (rows, columns) show a picture, and the colours (rows, columns, 3) in their middle."""
    canvas, side = figure.images[0].get_array().astype(int), min(pictures.MAP_CELLS, 3 * math.ceil(count**0.5))
    pixels = len(canvas) // side
    colours = canvas[pixels // 2 :: pixels, pixels // 2 :: pixels]
    return (colours < 255).any(axis=2), colours


@pytest.mark.parametrize("method, count, at_least", [("t-SNE", 40, 0.9), ("PCA", 28, 0.7)])
def test_embedding_map_shows_similar_pictures_side_by_side(tmp_path, figures, colours, method, count, at_least):
    files, embeddings = colours
    pictures.embedding_map(embeddings, files, tmp_path / "map.png", max_points=count)
    shown, hues = shown_on(figures[0], count)
    title = f"{method} of {count} of 40 images, {shown.sum()} of them shown"
    assert [text.get_text() for text in figures[0].texts] == [title] and shown.sum() > count / 3
    places, hues = np.argwhere(shown), hues[shown]
    apart = np.linalg.norm(places[:, None] - places, axis=2) + 1e9 * np.eye(len(places))
    assert (np.abs(hues[apart.argmin(axis=1)] - hues).max(axis=1) < 3).mean() > at_least
    real_save(figures[0], tmp_path / "map.png")
    assert (read(tmp_path / "map.png") < 128).any()
    pictures.embedding_map(embeddings, files, tmp_path / "map.png", max_points=count)
    assert np.array_equal(*(figure.images[0].get_array() for figure in figures))


@pytest.mark.parametrize(
    "embeddings, readable, shown",
    [(np.ones((1, 8)), 1, 1), (np.ones((1, 1)), 1, 1), (np.ones((40, 1)), 40, 1), (np.ones((40, 3)), 9, 1),
     (np.zeros((3, 2)), 3, 1), (np.eye(2), 2, 2), (np.eye(2, dtype=np.float16), 1, 1), (np.eye(40), 0, 0)],
)  # fmt: skip
def test_embedding_map_of_hardly_anything(tmp_path, figures, colours, embeddings, readable, shown):
    """Equal embeddings share a cell; a file that cannot be read leaves it to the next."""
    files = [*colours[0][:readable], *[tmp_path / "absent.png"] * (len(embeddings) - readable)]
    pictures.embedding_map(embeddings, files, tmp_path / "map.png")
    assert figures[0].texts[0].get_text().endswith(f" images, {shown} of them shown")
    assert shown_on(figures[0], len(embeddings))[0].sum() == shown
