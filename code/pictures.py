"""Pictures of a run: each function draws plain values into a PNG file, which appears whole or not at all.

Figures are drawn off screen without matplotlib's pyplot: nothing is shared between calls, and no window is needed.
"""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import checkpoint
import decoding
import lettering
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

DPI = 150
GREEN, RED, GREY = "#1a7f37", "#cf222e", "#d0d0d0"
# Two colours that colour-blind readers tell apart (Okabe and Ito, "Color Universal Design", 2008)
BLUE, ORANGE = "#0072b2", "#d55e00"
THUMBNAIL = 128  # pixels of the longer side of a picture among the neighbours, and at most of one on the map
MAP_SIDE, MAP_CELLS = 1440, 40  # of the map: pixels, and cells, of its longer side
MOST_NAMES = 32  # class names beside an incidence matrix; of more classes every second, third, … is named
CAPTION_LENGTH = 18  # characters of a file name as wide as a picture among the neighbours
FEWEST_FOR_TSNE = 30  # t-SNE of fewer points shows nothing that PCA does not

MARKS = {True: "✓ ", False: "✗ ", None: ""}
FRAMES = {
    True: dict(color=GREEN, linewidth=4),
    False: dict(color=RED, linewidth=3, linestyle=(0, (2.5, 1.5))),
    None: dict(color="#57606a", linewidth=1),
    "query": dict(color="black", linewidth=1.5),
}


# ---------------------------------------------------------------- the course of a run


@lettering.in_our_fonts
def curves(
    history: Sequence[dict], path: Path, title: str = "", chance: float | None = None, best: int | None = None
) -> None:
    """Loss, with HIST its two terms, and R@K in percent, over the epochs of a run.

    Args:
        history: rows as train.py keeps them, from the first on: 'phase' (untrained, warm-up or train), 'epoch', in all
            but the untrained one 'loss', with HIST 'dist_loss', 'ce_loss' and perhaps 'incidence' (off-diagonal mean
            of H) and 'variance' (mean variance of the classes), which get axes of their own; and R@K as fractions:
            'R@1', …, with held-out classes 'val R@1'.
        title: which run this is.
        chance: cross-entropy of guessing, the logarithm of the number of training classes.
        best: the epoch that was chosen, 0 for none; without it the one of the highest R@1, or 'val R@1'.
    """
    hypergraph_rows = any("incidence" in row or "variance" in row for row in history)
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
            label = "warm-up" if axes is all_axes[0] else None
            axes.axvspan(min(warm) - 0.5, max(warm) + 0.5, color="#eeeeee", zorder=0, label=label)
        axes.grid(alpha=0.3)
        beside = 1.0 if axes.get_ylabel() != "mean of H" else 1.08
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(beside, 1.04), frameon=False, fontsize=9)
    _name_epochs(all_axes[-1], history)
    figure.suptitle(lettering.label(title, 90), fontsize=11)
    _save(figure, path)


def _name_epochs(axes, history: Sequence[dict]) -> None:
    """Ticks at some epochs of training, and words, one line lower, at what came before."""
    epochs = [row["epoch"] for row in history] or [0]
    locator = MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    ticks = {int(t): f"{t:.0f}" for t in locator.tick_values(0, max(epochs)) if 1 <= t <= max(epochs)}
    untrained = [row["epoch"] for row in history if row["phase"] == "untrained"]
    warm = [row["epoch"] for row in history if row["phase"] == "warm-up"]
    ticks |= {epoch: "\nuntrained" for epoch in untrained}
    if warm:
        ticks[(min(warm) + max(warm)) / 2] = "\nwarm-up"
    axes.set_xticks(list(ticks), list(ticks.values()))
    if warm:  # the two words are apart however close the epochs are
        for label in axes.get_xticklabels():
            label.set_ha({"\nuntrained": "right", "\nwarm-up": "left"}.get(label.get_text(), "center"))
    axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    axes.set_xlabel("epoch")


def _draw_losses(axes, history: Sequence[dict], chance: float | None) -> None:
    two_terms = any("ce_loss" in row for row in history)
    lines = [
        ("loss", r"$L_D$ + $\lambda_s$ $L_{CE}$" if two_terms else "loss", "black", 2),
        ("dist_loss", "distribution loss $L_D$", "#0969da", 1.5),
        ("ce_loss", "cross-entropy $L_{CE}$", "#bc4c00", 1.5),
    ]
    for name, label, color, linewidth in lines if two_terms else lines[:1]:
        _plot(axes, history, name, 1, label=label, color=color, linewidth=linewidth)
    if two_terms and chance is not None:
        axes.axhline(chance, color="#bc4c00", linewidth=1, linestyle="--", label="chance: ln C")
    axes.set_ylabel("loss (nats)" if two_terms else "loss")
    axes.set_ylim(bottom=0)
    if not any("loss" in row for row in history):
        axes.set_ylim(0, 1)
        axes.text(0.5, 0.5, "no epoch trained yet", transform=axes.transAxes, ha="center", color="grey")


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
    trained = [row for row in history if row["phase"] == "train" and "R@1" in row and best in (None, row["epoch"])]
    if trained:
        chosen = max(trained, key=lambda row: row.get("val R@1", row["R@1"]))
        chosen_by = "R@1 of held-out classes" if "val R@1" in chosen else "test R@1"
        star = {"s": 200, "marker": "*", "color": "#bf8700", "zorder": 5, "clip_on": False}
        axes.scatter(chosen["epoch"], 100 * chosen["R@1"], label=f"best epoch {chosen['epoch']}", **star)
        title = f"R@1 {100 * chosen['R@1']:.2f} % in epoch {chosen['epoch']}, the best by {chosen_by}"
        axes.set_title(title, fontsize=10)
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
    rows = [row for row in history if name in row]
    marker = "o" if len(history) <= 30 else None
    values = [scale * row[name] for row in rows]
    axes.plot([row["epoch"] for row in rows], values, marker=marker, markersize=3.5, **look)


# ---------------------------------------------------------------- a search


@lettering.in_our_fonts
def neighbours(
    query_paths: Sequence[Path | str],
    neighbour_paths: Sequence[Sequence[Path | str]],
    neighbour_right: Sequence[Sequence[bool]] | None,
    similarities: Sequence[Sequence[float]],
    titles: Sequence[str],
    path: Path,
    *,
    captions: Sequence[Sequence[str]] | None = None,
    own: bool = False,
) -> None:
    """One row per query: the image, then its nearest ones, the right ones in a green frame, the others in red dashes.

    Args:
        query_paths: Q image files.
        neighbour_paths: for each query the files of its nearest images, nearest first; as many as there are.
        neighbour_right: whether each of these is of the query's class; None where classes are not known.
        similarities: cosine similarity of each to the query, written below it.
        titles: a line of text above each row.
        captions: a name for each nearest image, written below its similarity.
        own: they are the user's own pictures, which are turned as their EXIF orientation says.

    An image that cannot be read becomes a grey square that says so.
    """
    right = [[None] * len(row) for row in neighbour_paths] if neighbour_right is None else neighbour_right
    below = [[""] * len(row) for row in neighbour_paths] if captions is None else captions

    # Everything stands in one coordinate system whose unit, an inch, is the side of a picture.
    step, first, row_height = 1.08, 1.3, 1.66 if captions is None else 1.78
    width = max(7.2, first + step * max(len(row) for row in neighbour_paths))
    height = row_height * len(query_paths) + 0.5
    figure = Figure(figsize=(width + 0.08, height), dpi=125)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.08, width), ylim=(height, 0))
    axes.set_axis_off()
    _draw_frame_legend(axes, first, known=neighbour_right is not None)
    digits = _digits(similarities)
    rows = zip(query_paths, titles, neighbour_paths, right, similarities, below, strict=True)
    for number, (query, title, *found) in enumerate(rows):
        top = 0.5 + number * row_height
        axes.text(0, top + 0.11, lettering.label(title, int(width * 11)), va="center", fontsize=11)
        _draw_image(axes, query, 0.0, top + 0.26, FRAMES["query"], own)
        for place, (file, is_right, similarity, caption) in enumerate(zip(*found, strict=True)):
            x = first + place * step
            _draw_image(axes, file, x, top + 0.26, FRAMES[is_right], own)
            text = dict(ha="center", va="center", color=FRAMES[is_right]["color"])
            axes.text(x + 0.5, top + 1.39, f"{MARKS[is_right]}{similarity:.{digits}f}", fontsize=10, **text)
            text |= dict(fontsize=6.5, family=["DejaVu Sans Mono", *lettering.FONTS])
            axes.text(x + 0.5, top + 1.54, lettering.label(caption, CAPTION_LENGTH), **text)
    _save(figure, path)


def _draw_frame_legend(axes, first: float, known: bool) -> None:
    """What the frames and numbers mean, above the rows; first is where the nearest images begin."""
    legend = [("query", 0.0, FRAMES["query"])]
    if known:
        legend += [("✓ same class", first, FRAMES[True]), ("✗ another class", first + 1.7, FRAMES[False])]
    else:
        legend.append(("nearest images", first, FRAMES[None]))
    for text, x, look in legend:
        axes.add_patch(Rectangle((x, 0.12), 0.17, 0.17, fill=False, **look))
        axes.text(x + 0.28, 0.21, text, va="center", fontsize=10)
    axes.text(first + 3.7, 0.21, "number: cosine similarity", va="center", fontsize=10)


def _digits(rows: Sequence[Sequence[float]]) -> int:
    """Decimals that tell neighbouring values apart: at least 3, at most the 7 that float32 has."""
    pairs = [(a, b) for row in rows for a, b in itertools.pairwise(row) if a != b]
    return next((n for n in range(3, 7) if all(f"{a:.{n}f}" != f"{b:.{n}f}" for a, b in pairs)), 7)


def _draw_image(axes, file: Path | str, x: float, y: float, frame: dict, own: bool) -> None:
    """The image in the unit square whose upper left corner is (x, y), in its proportions, and a frame around it."""
    pixels = read_thumbnail(file, THUMBNAIL, own)
    if pixels is None:
        axes.add_patch(Rectangle((x, y), 1, 1, color=GREY))
        axes.text(x + 0.5, y + 0.5, "cannot\nbe read", ha="center", va="center", fontsize=9)
    else:
        h, w = (side / max(pixels.shape[:2]) for side in pixels.shape[:2])
        left, top = x + (1 - w) / 2, y + (1 - h) / 2
        axes.imshow(pixels, extent=(left, left + w, top + h, top), aspect="auto")
        axes.add_patch(Rectangle((x, y), 1, 1, color="#f4f4f4", zorder=-1))
    axes.add_patch(Rectangle((x, y), 1, 1, fill=False, zorder=3, **frame))


@lettering.in_our_fonts
def contact_sheet(columns: Sequence[tuple[str, Sequence]], path: Path, own: bool = False) -> None:
    """Classes of each split side by side, their images in rows.

    Args:
        columns: (title, [(caption, image files), …]) of each split.
        own: they are the user's own pictures, as in neighbours().
    """
    step, gap, title_height, caption_height = 1.04, 0.2, 0.4, 0.22  # inches; the side of a picture is 1
    widths = [step * max([4, *(len(files) for _, files in rows)]) for _, rows in columns]
    width = sum(widths) + gap * (len(columns) + 1)
    height = title_height + (step + caption_height) * max(len(rows) for _, rows in columns) + 0.1
    figure = Figure(figsize=(width, height), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    left = gap
    for (title, rows), column in zip(columns, widths, strict=True):
        title = lettering.label(title, int(column * 10))
        axes.text(left, title_height / 2, title, va="center", fontsize=11)
        top = title_height
        for caption, files in rows:
            caption = lettering.label(caption, int(column * 12))
            axes.text(left, top + caption_height / 2, caption, va="center", fontsize=8.5)
            for place, file in enumerate(files):
                _draw_image(axes, file, left + place * step, top + caption_height, dict(linewidth=0), own)
            top += step + caption_height
        left += column + gap
    _save(figure, path)


def read_thumbnail(file: Path | str, side: int = THUMBNAIL, own: bool = False) -> np.ndarray | None:
    """(H, W, 3) bytes, the longer side at most that many pixels; None if the file holds no image.

    own: the user's own picture, which is turned as its EXIF orientation says.
    """
    try:
        with Image.open(file) as opened:
            opened.draft("RGB", (2 * side, 2 * side))  # large JPEGs: decode no more than needed
            image = decoding.decode(opened, own)
        image.thumbnail((side, side))
        return np.asarray(image)
    except Exception:  # what Pillow raises depends on where the file is broken
        return None


# ---------------------------------------------------------------- a batch


@lettering.in_our_fonts
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

    every = -(-len(classes) // MOST_NAMES)
    named = np.arange(0, len(classes), every)
    names = lettering.short_names([class_names[label] for label in classes[named]])
    ends = np.cumsum(sizes)  # of the rows of each class
    axes.set_yticks((ends - (sizes + 1) / 2)[named], [lettering.plain(name) for name in names], fontsize=8)
    axes.set_xticks([])
    if len(classes) <= 2 * MOST_NAMES:  # of more, the lines would hide what they divide
        axes.hlines(ends[:-1] - 0.5, -0.5, len(classes) - 0.5, color="white", linewidth=0.6)
        axes.vlines(np.arange(len(classes) - 1) + 0.5, -0.5, len(labels) - 0.5, color="white", linewidth=0.6)
    thinned = "" if every == 1 else f", one class in {every} named"
    axes.set_xlabel(f"hyperedges of the {len(classes)} classes, in the same order")
    axes.set_ylabel(f"{len(labels)} samples, grouped by class{thinned}")
    others = H[labels[:, None] != classes]
    mean = f"\nmembership in other classes' hyperedges: {others.mean():.3f} on average" if others.size else ""
    axes.set_title(f"Incidence matrix H of one batch{mean}", fontsize=11)
    _save(figure, path)


# ---------------------------------------------------------------- embeddings on a plane


@lettering.in_our_fonts
def embedding_map(
    embeddings: np.ndarray,
    files: Sequence[Path | str],
    path: Path,
    own: bool = False,
    max_points: int = 2000,
    seed: int = 0,
) -> None:
    """The pictures themselves on a plane: those that are close are similar by cosine.

    The plane is cut into cells as large as a thumbnail, and each shows the first picture that falls into it. The title
    says how many of how many are shown. By t-SNE; of few points by PCA.

    Args:
        embeddings: (N, D) of any finite length.
        files: the N image files; those that cannot be read are left out.
        own: they are the user's own pictures, as in neighbours().
        max_points: of more pictures as many are drawn at random, by the seed.
    """
    points = np.random.default_rng(seed).permutation(len(embeddings))[:max_points]
    X = np.asarray(embeddings)[points].astype(np.float64)
    X = (X / np.linalg.norm(X, axis=1, keepdims=True).clip(min=1e-12)).astype(np.float32)
    plane, method = _project(X, seed)

    side = min(MAP_CELLS, 3 * int(np.ceil(np.sqrt(len(X)))))  # cells: few pictures are shown larger
    pixels = min(THUMBNAIL, MAP_SIDE // side)
    extent = max(np.ptp(plane, axis=0).max(), 1e-12)
    cells = np.minimum((plane - plane.min(axis=0)) / extent * side, side - 1).astype(int)
    thumbnails: dict[tuple[int, int], np.ndarray] = {}
    for cell, point in zip(map(tuple, cells.tolist()), points, strict=True):
        if cell not in thumbnails:
            thumbnail = read_thumbnail(files[point], pixels - 2, own)
            thumbnails |= {} if thumbnail is None else {cell: thumbnail}

    columns, rows = cells.max(axis=0) + 1
    canvas = np.full((rows * pixels, columns * pixels, 3), 255, np.uint8)
    for (column, row), thumbnail in thumbnails.items():
        h, w = thumbnail.shape[:2]
        top, left = (rows - 1 - row) * pixels + (pixels - h) // 2, column * pixels + (pixels - w) // 2
        canvas[top : top + h, left : left + w] = thumbnail

    margin, title = 20, 60  # pixels
    height, width = canvas.shape[0] + title + margin, max(canvas.shape[1] + 2 * margin, 720)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.figimage(canvas, (width - canvas.shape[1]) // 2, margin)
    of_how_many = f"{len(X):,} of {len(embeddings):,} images, {len(thumbnails):,} of them shown"
    figure.text(0.5, 1 - title / 2 / height, f"{method} of {of_how_many}", ha="center", va="center", fontsize=11)
    _save(figure, path)


def _project(X: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
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
        return TSNE(perplexity=perplexity, metric="cosine", init=start, random_state=seed).fit_transform(X), "t-SNE"


def _save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    checkpoint.write(lambda file: file.write(content.getbuffer()), path)
