"""Check, download and look at the benchmarks; make large pictures of your own small.

python code/prepare.py check cub --decode          # is it complete, is it the right edition?
python code/prepare.py download cub                # fetch it (cub, SOP), or say how to get it
python code/prepare.py show cub --output cub.png   # look at it before training
python code/prepare.py shrink folder --data-root my_pictures --output my_pictures_512
"""

import http.client
import os
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import dataset
import layouts
import numpy as np
from flags import DATA, Parser, dataset_name, real, run_script, whole
from folders import written_whole
from loader import available_cores
from refused import Refused, one_line
from shrink import shrink
from torchvision.datasets.utils import calculate_md5
from tqdm import tqdm

WEIGHTS = "efficientnet_lite0"  # no data set, but downloaded like one
DOWNLOADS = (*(name for name in layouts.DATASETS if name != "folder"), WEIGHTS)


# ---------------------------------------------------------------- check


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
        problems += dataset.drop_unreadable(listing, listing.splits, available_cores())
    for problem in problems:
        print(f"problem: {problem}")
    if not problems:
        print(f"{name}: no problems found{'' if decode else ' (images were not opened; --decode opens them)'}")
    return not problems


# ---------------------------------------------------------------- download


def fetch(url: str, part: Path) -> None:
    """Appends the missing rest of a file to `part`, asking the server only for that. Raises Refused if none comes."""
    start = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-", "User-Agent": "Mozilla/5.0"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            if answer.status != 206:  # the server sends everything from the start
                start = 0
            rest = int(answer.headers.get("Content-Length") or 0)
            bar = tqdm.wrapattr(answer, "read", rest or None, desc=part.stem, disable=None)
            with open(part, "ab" if start else "wb") as file, bar as reading:
                shutil.copyfileobj(reading, file)
            if rest and part.stat().st_size < start + rest:
                raise ConnectionError("the connection breaks")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == 416:
            return  # nothing is left to send; the md5 tells whether it is right
        kept = f"; run the same command to go on from what is in {part}" if part.exists() else ""
        raise Refused(f"{url}: {one_line(error)}{kept}") from error


def fetch_archive(whole: Path, md5: str, url: str) -> None:
    """Downloads the archive `whole` unless it is there, going on where an earlier call stopped; compares its md5."""
    file = whole
    if not whole.exists():
        file = whole.with_name(f"{whole.name}.part")
        fetch(url, file)
    if (found := calculate_md5(file)) != md5:
        raise Refused(f"{file}: its md5 is {found}, not {md5}; remove the file to download it again")
    os.replace(file, whole)


def extract(archive: Path, home: Path) -> None:
    """Unpacks the archive's folder named like `home` to `home`, which appears whole or not at all.

    Raises Refused if the archive is broken, lacks that folder, or holds what leads out of it.
    """
    print(f"unpacking {archive}")
    with written_whole(home) as folder:
        try:
            if archive.suffix == ".zip":
                with zipfile.ZipFile(archive) as zipped:  # leaves out what would lead out of the folder
                    zipped.extractall(folder.parent, tqdm(zipped.namelist(), "unpack", disable=None))
            else:
                with tarfile.open(archive) as tar:
                    tar.extractall(folder.parent, tqdm(tar, "unpack", disable=None), filter="data")
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise Refused(f"{archive}: broken archive ({one_line(error)}); nothing was unpacked") from None
        if not any(folder.iterdir()):
            raise Refused(f"{archive}: there is no {home.name} in it")


def download(name: str, data_root: Path, url: str | None = None) -> None:
    """Fetches and unpacks a benchmark, or draws it. Raises Refused where it cannot be had, and says where it can."""
    if name == WEIGHTS:
        import weights  # imports the networks, which takes a second

        print(f"{name}: {weights.download_efficientnet_lite0(data_root)}")
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
        home.parent.mkdir(parents=True, exist_ok=True)
        try:
            fetch_archive(archive, md5, url or published)
        except Refused as error:
            raise Refused(f"{error}. {layout.mirrors}") from None
        extract(archive, home)
        print(f"{home} is ready; {archive} can be deleted")


# ---------------------------------------------------------------- show


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


# ---------------------------------------------------------------- command line


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
        where = f"{yours}" if command == "shrink" else "folder that holds the benchmarks"
        where += f"; for folder, {yours}" * (command in ("check", "show"))
        sub.add_argument("--data-root", type=Path, default=DATA, metavar="DIR", help=where)
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
        print(f"{args.output} is ready" + f" but for {len(failed):,} pictures" * bool(failed))
        sys.exit(1 if failed else 0)
    else:
        show(args.name, args.data_root, args.output or Path(f"{args.name}.png"), args.train_classes)


if __name__ == "__main__":
    run_script(main)
