"""Pictures of a run: each function draws plain values into a PNG file, which appears whole or not at all.

Figures are drawn off screen without matplotlib's pyplot: nothing is shared between calls, and no window is needed.
"""

import functools
import importlib.util
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import checkpoint
import decoding
import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps

DPI = 150
GREEN, RED, GREY = "#1a7f37", "#cf222e", "#d0d0d0"
# Two colours that colour-blind readers tell apart (Okabe and Ito, "Color Universal Design", 2008)
BLUE, ORANGE = "#0072b2", "#d55e00"
THUMBNAIL = 128  # pixels of the longer side of a picture among the neighbours, and at most of one on the map
MAP_SIDE, MAP_CELLS = 1440, 40  # of the map: pixels, and cells, of a side
MOST_NAMES = 32  # classes whose names an incidence matrix has room for
NAME_LENGTH = 40  # columns of such a name; of Cars' names 28 would make some equal
CAPTION_LENGTH = 18  # characters of a file name as wide as a picture among the neighbours
FEWEST_FOR_TSNE = 30  # t-SNE of fewer points shows nothing that PCA does not

# True: of the query's class, False: of another, None: not known
MARKS = {True: "✓ ", False: "✗ ", None: ""}
FRAMES = {
    True: dict(color=GREEN, linewidth=4),
    False: dict(color=RED, linewidth=3, linestyle=(0, (2.5, 1.5))),
    None: dict(color="#57606a", linewidth=1),
    "query": dict(color="black", linewidth=1.5),
}

# What texts are drawn in; of zhplot, if it is installed, the font, for Chinese and Japanese names
FONTS = ["DejaVu Sans"]
if zhplot := importlib.util.find_spec("zhplot"):
    for file in Path(zhplot.origin).parent.glob("fonts/NotoSansSC-Regular.ttf"):
        fontManager.addfont(file)
        FONTS.append("Noto Sans SC")
in_our_fonts = matplotlib.rc_context({"font.family": FONTS})  # a decorator


def label(text: str, length: int) -> str:
    """Any text as one for matplotlib: on one line, at most `length` columns wide, no part of it a formula.

    Characters that the fonts lack become U+ and their number. What is too long loses its middle, as names often differ
    at their ends.
    """
    text = " ".join(str(text).encode("utf-8", "replace").decode().split())
    text = "".join(character if ord(character) in _drawable() else f"U+{ord(character):04X} " for character in text)
    widths = [1 + (unicodedata.east_asian_width(character) in "WF") for character in text]  # Chinese: twice Latin's
    if sum(widths) > length:
        head = (np.cumsum(widths) <= length // 2).sum()
        tail = (np.cumsum(widths[::-1]) <= (length - 1) // 2).sum()
        text = f"{text[:head]}…{text[len(text) - tail :]}"
    return text.replace("$", r"\$")


@functools.cache
def _drawable() -> frozenset[int]:
    """Code points that the fonts have a glyph for."""
    return frozenset().union(*(FT2Font(findfont(FontProperties(family))).get_charmap() for family in FONTS))


# ---------------------------------------------------------------- the course of a run


@in_our_fonts
def curves(
    history: Sequence[dict], path: Path, title: str = "", chance: float | None = None, best: int | None = None
) -> None:
    """Loss, with HIST its two terms, and R@K in percent, over the epochs of a run.

    history: rows as train.py keeps them, from the first on: 'phase' (untrained, warm-up or train), 'epoch', in all but
    the untrained one 'loss', with HIST 'dist_loss', 'ce_loss' and perhaps 'incidence' and 'variance', which get axes of
    their own; and R@K as fractions. title: which run this is. chance: cross-entropy of guessing. best: the epoch that
    was chosen, if one was.
    """
    hypergraph_rows = any("incidence" in row for row in history)
    heights = (1, 1, 0.5) if hypergraph_rows else (1, 1)
    figure = Figure(figsize=(7.4, 2.7 * sum(heights)), dpi=DPI, layout="constrained")
    all_axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _draw_losses(all_axes[0], history, chance)
    _draw_recalls(all_axes[1], history, best)
    if hypergraph_rows:
        _draw_classes(all_axes[2], history)
    warm = [row["epoch"] for row in history if row["phase"] == "warm-up"]
    for axes in all_axes:
        if warm:
            axes.axvspan(min(warm) - 0.5, max(warm) + 0.5, color="#eeeeee", zorder=0, label="warm-up")
        axes.grid(alpha=0.3)
        handles, texts = axes.get_legend_handles_labels()
        axes.legend(handles, texts, loc="upper left", bbox_to_anchor=(1.08, 1.04), frameon=False, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda epoch, _: f"{epoch:.0f}" if epoch >= 1 else "")  # 0 and below: not trained
    axes.set_xlabel("epoch")
    figure.suptitle(label(title, 90), fontsize=11)
    _save(figure, path)


def _draw_losses(axes, history: Sequence[dict], chance: float | None) -> None:
    two_terms = any("ce_loss" in row for row in history)
    lines = [
        ("loss", r"$L_D$ + $\lambda_s$ $L_{CE}$" if two_terms else "loss", "black", 2),
        ("dist_loss", "distribution loss $L_D$", "#0969da", 1.5),
        ("ce_loss", "cross-entropy $L_{CE}$", "#bc4c00", 1.5),
    ]
    for name, text, color, linewidth in lines if two_terms else lines[:1]:
        _plot(axes, history, name, 1, label=text, color=color, linewidth=linewidth)
    if two_terms and chance is not None:
        axes.axhline(chance, color="#bc4c00", linewidth=1, linestyle="--", label="chance: ln C")
    axes.set_ylabel("loss (nats)" if two_terms else "loss")
    axes.set_ylim(bottom=0)


def _draw_recalls(axes, history: Sequence[dict], best: int | None) -> None:
    names = list(dict.fromkeys(name for row in history for name in row if name.startswith("R@")))
    shades = colormaps["viridis"](np.linspace(0, 0.85, len(names)))
    for name, shade in reversed(list(zip(names, shades, strict=True))):  # in the legend as they lie above each other
        linewidth = 2 if name == names[0] else 1.2
        _plot(axes, history, name, 100, label=name, color=shade, linewidth=linewidth, clip_on=False)
    if any("val R@1" in row for row in history):
        look = {"color": RED, "linestyle": "--", "clip_on": False}
        _plot(axes, history, "val R@1", 100, label="R@1 of held-out\nclasses", **look)
    untrained = [(row["epoch"], 100 * row[name]) for row in history if row["phase"] == "untrained" for name in names]
    if untrained:
        hollow = {"s": 45, "marker": "s", "facecolors": "none", "edgecolors": "grey", "zorder": 3, "clip_on": False}
        axes.scatter(*zip(*untrained, strict=True), label="untrained", **hollow)
    for row in history:
        if row["phase"] == "train" and row["epoch"] == best:
            star = {"s": 200, "marker": "*", "color": "#bf8700", "zorder": 5, "clip_on": False}
            axes.scatter(best, 100 * row["R@1"], label=f"best epoch {best}", **star)
            chosen_by = "R@1 of held-out classes" if "val R@1" in row else "test R@1"
            axes.set_title(f"R@1 {100 * row['R@1']:.2f} % in epoch {best}, the best by {chosen_by}", fontsize=10)
    axes.set_ylabel("R@K, test (%)")
    axes.set_ylim(0, 102)  # a line at 100 stays whole
    axes.set_yticks(range(0, 101, 20))


def _draw_classes(axes, history: Sequence[dict]) -> None:
    """How far samples belong to other classes' hyperedges, and how wide the classes are, each on its own scale."""
    right = axes.twinx()
    variance = dict(color=ORANGE, linestyle="--")
    _plot(axes, history, "incidence", 1, label="membership in other\nclasses' hyperedges", color=BLUE)
    _plot(right, history, "variance", 1, **variance)
    axes.plot([], [], label="mean class variance\n(scale on the right)", **variance)
    axes.set_ylabel("mean of H", color=BLUE)
    axes.set_ylim(0, 1)
    right.tick_params(axis="y", colors=ORANGE)


def _plot(axes, history: Sequence[dict], name: str, scale: float, **look) -> None:
    """One column over the epochs that have it; dots on the epochs as long as they can be told apart."""
    points = [(row["epoch"], scale * row[name]) for row in history if name in row]
    axes.plot(*np.reshape(points, (-1, 2)).T, marker="o" if len(history) <= 30 else None, markersize=3.5, **look)


# ---------------------------------------------------------------- pictures in rows


@in_our_fonts
def neighbours(rows: Sequence[tuple[str, str, Sequence]], path: Path, own: bool = False, named: bool = False) -> None:
    """One row per query: the image, then its nearest ones, the right ones in a green frame, the others in red dashes.

    rows: (title, image file of the query, [(image file, cosine similarity, whether it is of the query's class, None if
    not known), …] nearest first, as many as there are). own: they are the user's own pictures, decoded as such. named:
    with file names. An image that cannot be read becomes a grey square that says so.
    """
    step, first, row_height = 1.08, 1.38, 1.78  # inches; the side of a picture is 1
    width = max(7.3, first + step * max(len(found) for _, _, found in rows))
    figure, axes = _canvas(width, row_height * len(rows) + 0.5, dpi=125)
    known = any(right is not None for _, _, found in rows for _, _, right in found)
    kinds = {"✓ same class": True, "✗ another class": False} if known else {"nearest images": None}
    kinds = {"query": "query"} | kinds
    patches = [Patch(fill=False, label=text, **FRAMES[kind] | {"linewidth": 2}) for text, kind in kinds.items()]
    axes.legend(handles=patches, loc="upper left", ncols=3, frameon=False, handlelength=1.6, handleheight=1.2)
    axes.text(width - 0.1, 0.21, "number: cosine similarity", ha="right", va="center", fontsize=10)
    for q, (title, query, found) in enumerate(rows):
        top = 0.5 + q * row_height
        axes.text(0.08, top + 0.11, label(title, int(width * 11)), va="center", fontsize=11)
        _draw_image(axes, query, 0.08, top + 0.26, FRAMES["query"], own)
        for n, (file, similarity, right) in enumerate(found):
            x = first + n * step
            _draw_image(axes, file, x, top + 0.26, FRAMES[right], own)
            text = dict(ha="center", va="center", color=FRAMES[right]["color"])
            axes.text(x + 0.5, top + 1.39, f"{MARKS[right]}{similarity:.4f}", fontsize=10, **text)
            if named:
                text |= dict(fontsize=6.5, family=["DejaVu Sans Mono", *FONTS])
                axes.text(x + 0.5, top + 1.54, label(Path(file).name, CAPTION_LENGTH), **text)
    _save(figure, path)


@in_our_fonts
def contact_sheet(columns: Sequence[tuple[str, Sequence]], path: Path, own: bool = False) -> None:
    """Classes of each split side by side, their images in rows.

    columns: (title, [(caption, image files), …]) of each split. own: as in neighbours().
    """
    step, row_height, left = 1.04, 1.26, 0.2  # inches; the side of a picture is 1
    widths = [step * max([4, *(len(files) for _, files in rows)]) for _, rows in columns]
    height = row_height * max(len(rows) for _, rows in columns) + 0.5
    figure, axes = _canvas(sum(widths) + 0.2 * (len(columns) + 1), height, dpi=100)
    for (title, rows), width in zip(columns, widths, strict=True):
        axes.text(left, 0.2, label(title, int(width * 10)), va="center", fontsize=11)
        for row, (caption, files) in enumerate(rows):
            top = 0.4 + row * row_height
            axes.text(left, top + 0.11, label(caption, int(width * 12)), va="center", fontsize=8.5)
            for place, file in enumerate(files):
                _draw_image(axes, file, left + place * step, top + 0.22, dict(linewidth=0), own)
        left += width + 0.2
    _save(figure, path)


def _canvas(width: float, height: float, dpi: int) -> tuple:
    """A figure of that many inches, and axes over all of it, whose unit is an inch and whose origin the upper left."""
    figure = Figure(figsize=(width, height), dpi=dpi)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def _draw_image(axes, file: Path | str, x: float, y: float, frame: dict, own: bool) -> None:
    """The image in the unit square whose upper left corner is (x, y), in its proportions, and a frame around it."""
    image = read_thumbnail(file, own=own)
    if image is None:
        axes.add_patch(Rectangle((x, y), 1, 1, color=GREY))
        axes.text(x + 0.5, y + 0.5, "cannot\nbe read", ha="center", va="center", fontsize=9)
    else:
        square = ImageOps.pad(image, (THUMBNAIL, THUMBNAIL), color="#f4f4f4")
        axes.imshow(square, extent=(x, x + 1, y + 1, y), aspect="auto")
    axes.add_patch(Rectangle((x, y), 1, 1, fill=False, zorder=3, **frame))


def read_thumbnail(file: Path | str, side: int = THUMBNAIL, own: bool = False) -> Image.Image | None:
    """The image in RGB, the longer side at most that many pixels; None if the file holds no image. own: as above."""
    try:
        image = decoding.read_rgb(file, own, enough=2 * side)
    except decoding.UnreadableImage:
        return None
    image.thumbnail((side, side))
    return image


# ---------------------------------------------------------------- a batch


@in_our_fonts
def hypergraph(H: np.ndarray, labels: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """The incidence matrix of a batch: how far each sample belongs to the hyperedge of each class.

    H (N, E) in [0, 1], its columns the classes present in ascending order; labels (N,) of the samples, indices into
    class_names. Samples are grouped by class.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    figure = Figure(figsize=(7.4, 6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        H[np.argsort(labels, kind="stable")], vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest"
    )
    figure.colorbar(image, label="membership H (own class: 1, else exp(−α d²))", pad=0.02)

    axes.set_xticks([])
    axes.set_yticks([])
    if len(classes) <= MOST_NAMES:  # of more, names would overlap and the lines hide what they divide
        ends = np.cumsum(sizes)  # of the rows of each class
        names = [label(class_names[c], NAME_LENGTH) for c in classes]
        axes.set_yticks(ends - (sizes + 1) / 2, names, fontsize=8)
        axes.hlines(ends[:-1] - 0.5, -0.5, len(classes) - 0.5, color="white", linewidth=0.6)
        axes.vlines(np.arange(len(classes) - 1) + 0.5, -0.5, len(labels) - 0.5, color="white", linewidth=0.6)
    axes.set_xlabel(f"hyperedges of the {len(classes)} classes, in the same order")
    axes.set_ylabel(f"{len(labels)} samples, grouped by class")
    others = H[labels[:, None] != classes]
    mean = f"\nmembership in other classes' hyperedges: {others.mean():.3f} on average" if others.size else ""
    axes.set_title(f"Incidence matrix H of one batch{mean}", fontsize=11)
    _save(figure, path)


# ---------------------------------------------------------------- embeddings on a plane


@in_our_fonts
def embedding_map(
    embeddings: np.ndarray, files: Sequence[Path | str], path: Path, own: bool = False, max_points: int = 2000
) -> None:
    """The pictures themselves on a plane: those that are close are similar by cosine.

    By t-SNE, of few points by PCA. The plane is cut into cells as large as a thumbnail; each shows the first picture
    that falls into it. embeddings (N, D) of any finite length; the N image files, of which those that cannot be read
    are left out. own: as in neighbours(). max_points: of more pictures as many are drawn, always the same ones.
    """
    points = np.random.default_rng(0).permutation(len(embeddings))[:max_points]
    X = np.asarray(embeddings)[points].astype(np.float64)
    X = (X / np.linalg.norm(X, axis=1, keepdims=True).clip(min=1e-12)).astype(np.float32)
    plane, method = _project(X)

    side = min(MAP_CELLS, 3 * int(np.ceil(np.sqrt(len(X)))))  # cells: few pictures are shown larger
    pixels = min(THUMBNAIL, MAP_SIDE // side)
    extent = np.ptp(plane, axis=0).clip(min=1e-12)
    cells = np.minimum((plane - plane.min(axis=0)) / extent * side, side - 1).astype(int)
    canvas = Image.new("RGB", (side * pixels, side * pixels), "white")
    shown = set()
    for (column, row), point in zip(cells.tolist(), points, strict=True):
        if (column, row) in shown:
            continue
        if image := read_thumbnail(files[point], pixels - 2, own):
            left = column * pixels + (pixels - image.width) // 2
            top = (side - 1 - row) * pixels + (pixels - image.height) // 2
            canvas.paste(image, (left, top))
            shown.add((column, row))

    margin, title = 20, 60  # pixels
    height, width = canvas.height + title + margin, max(canvas.width + 2 * margin, 720)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.figimage(np.asarray(canvas), (width - canvas.width) // 2, margin)
    of_how_many = f"{len(X):,} of {len(embeddings):,} images, {len(shown):,} of them shown"
    figure.text(0.5, 1 - title / 2 / height, f"{method} of {of_how_many}", ha="center", va="center", fontsize=11)
    _save(figure, path)


def _project(X: np.ndarray) -> tuple[np.ndarray, str]:
    """Unit vectors X (n, D) -> points on a plane (n, 2), and the name of the method that was used."""
    U, S, _ = np.linalg.svd(X - X.mean(axis=0), full_matrices=False)
    plane = (U * S)[:, :2]  # the first two principal components
    plane = np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))  # a single point or dimension has no second one
    spread = plane[:, 0].std()
    if len(X) < FEWEST_FOR_TSNE or spread < 1e-6:  # equal points differ by rounding
        return plane * (spread >= 1e-6), "PCA"
    from sklearn.manifold import TSNE  # slow to import, and only this needs it
    from threadpoolctl import threadpool_limits

    # Its threads wait for each other in busy loops: beside loaders at work, a single thread is several times faster.
    with threadpool_limits(1):
        perplexity = min(30, (len(X) - 1) / 3)
        start = plane / spread * 1e-4
        return TSNE(perplexity=perplexity, metric="cosine", init=start, random_state=0).fit_transform(X), "t-SNE"


def _save(figure: Figure, path: Path) -> None:
    checkpoint.write(lambda file: figure.savefig(file, format="png", metadata={"Software": None}), path)
