"""Small copies of large pictures of your own, made once: prepare.py shrink.

The pictures of phones and cameras take longer to decode than a network to train on them.
"""

import csv
import functools
import io
import os
import re
from pathlib import Path

import checkpoint
import decoding
import layouts
from loader import Loader, available_cores
from PIL import Image
from refused import Refused
from tqdm import tqdm

MADE_BY = ".shrunk"  # file in an output that says of what it was made, and how
LOSSLESS = (".bmp", ".gif", ".png", ".tif", ".tiff", ".webp")  # of these, pictures that are small already stay lossless


def shrink(data_root: Path, output: Path, side: int) -> list[str]:
    """Writes each picture of a folder or list as users see it, its shorter side at most `side`; lines about failures.

    Names, folders, labels and splits stay; a list is written anew. What an earlier call has written is kept. Raises
    Refused for an output that lies in the original, or that this command did not make.
    """
    listing = layouts.get("folder").read(data_root)
    original, made_by = Path(listing.root).resolve(), f"{data_root.resolve()} {side}\n"
    inside = data_root.is_dir() and output.resolve().is_relative_to(original)  # beside a list there is room
    if inside or original.is_relative_to(output.resolve()):
        raise Refused(f"--output {output}: the pictures are in {original}; name a folder outside it")
    marker = output / MADE_BY
    if output.exists() and any(output.iterdir()) and not (marker.is_file() and marker.read_text() == made_by):
        raise Refused(f"--output {output}: holds something else than {data_root} at --side {side}: name another folder")
    output.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(made_by, marker)

    pairs = [(split, *pair) for split, listed in listing.splits.items() for pair in listed]
    files = [os.path.join(listing.root, path) for _, path, _ in pairs]
    targets = [os.path.join(output, stem) for stem in new_stems([path for _, path, _ in pairs])]
    for folder in {os.path.dirname(target) for target in targets}:
        os.makedirs(folder, exist_ok=True)
        checkpoint.remove_leftovers(Path(folder))
    work, why, names = functools.partial(shrink_some, files, targets, side), {}, {}
    loader = Loader(range(len(files)), available_cores(), False, batch_size=4, collate_fn=work)
    with tqdm(total=len(files), desc="shrink", unit="img", disable=None) as bar:
        for written, failed in loader:
            names |= written
            why |= failed
            bar.update(len(written) + len(failed))
    if listing.source:
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("path", "label", "split")[: 2 if "all" in listing.splits else 3])
        for row, name in sorted(names.items()):
            split, _, label = pairs[row]
            table.writerow((os.path.relpath(name, output), label, split)[: 2 if split == "all" else 3])
        checkpoint.write_text(text.getvalue(), output / f"{Path(listing.source).stem}.csv")
    return list(why.values())


def new_stems(paths: list[str]) -> list[str]:
    """For each path one inside the output, without a suffix: IMG_1.HEIC and IMG_1.jpg are told apart by theirs."""
    stems, taken = [], set()
    for path in paths:
        inside = re.sub(r"(^|/)(\.?\.?/)+", r"\1", path)  # a list may lead out of its folder
        candidate, number = os.path.splitext(inside)[0], 1
        while candidate.lower() in taken:  # also where letter case does not count
            candidate, number = f"{inside}_{number}" if number > 1 else inside, number + 1
        taken.add(candidate.lower())
        stems.append(candidate)
    return stems


def shrink_some(files: list[str], targets: list[str], side: int, rows: list[int]) -> tuple[dict, dict]:
    """({row: file written}, {row: why it cannot be decoded}); files are written whole or not at all."""
    written, failed = {}, {}
    for row in rows:
        file, there = files[row], [targets[row] + suffix for suffix in (".jpg", ".png")]
        there = [path for path in there if os.path.exists(path)]
        if there and os.path.getmtime(there[0]) >= os.path.getmtime(file):
            written[row] = there[0]
            continue
        try:
            image = decoding.read_rgb(file, own=True, enough=2 * side, srgb=True)
        except decoding.UnreadableImage as error:
            failed[row] = str(error)
            continue
        lossless = min(image.size) <= side and file.lower().endswith(LOSSLESS)
        if min(image.size) > side:
            size = [max(side, round(length * side / min(image.size))) for length in image.size]
            image = image.resize(size, Image.Resampling.LANCZOS)
        lossless = lossless or max(image.size) > 65_500  # more than a JPEG can have
        written[row] = f"{targets[row]}.{'png' if lossless else 'jpg'}"
        options = dict(format="PNG") if lossless else dict(format="JPEG", quality=95)
        checkpoint.write(functools.partial(image.save, **options), Path(written[row]))
    return written, failed
