"""Check, download and look at the benchmarks.

python code/prepare.py check cub --decode          # is it complete, is it the right edition?
python code/prepare.py download cub                # fetch it (cub, SOP), or say how to get it
python code/prepare.py show cub --output cub.png   # look at it before training
"""

import contextlib
import functools
import http.client
import os
import re
import shutil
import signal
import ssl
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import BinaryIO

import layouts
import numpy as np
from dataset import available_cores, load_benchmark
from decoding import UnreadableImage, read_rgb
from flags import DATA, Parser, one_line, real, run_script
from folders import scratch_folder
from layouts import (
    Listing,
    compare_counts,
    count,
    look_at_test_split,
    missing_files,
    read_splits,
    split_problems,
)
from layouts.reading import Archive
from refused import Refused
from torchvision.datasets.utils import calculate_md5
from tqdm import tqdm

WEIGHTS = "efficientnet_lite0"  # no data set, but downloaded like one
DOWNLOADS = (*(name for name in layouts.DATASETS if name != "folder"), WEIGHTS)


# ---------------------------------------------------------------- check


def try_decode(path: str, own: bool) -> str | None:
    """What is wrong with the image, if anything."""
    try:
        read_rgb(path, own)
    except UnreadableImage as error:
        return str(error)
    return None


def decode_all(listing: Listing) -> list[str]:
    """Decodes every image of the listing on all cores; a line for each that fails."""
    paths = [os.path.join(listing.root, path) for pairs in listing.splits.values() for path, _ in pairs]
    # Ctrl-C reaches the whole process group; if it ended a worker, the pool would wait for ever.
    ignore_interrupts = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    with ProcessPoolExecutor(available_cores(), **ignore_interrupts) as pool:
        results = pool.map(functools.partial(try_decode, own=listing.own), paths, chunksize=16)
        return [result for result in tqdm(results, "decoding", len(paths), unit="image", disable=None) if result]


def print_counts(name: str, listing: Listing) -> None:
    print(f"{'split':<10}{'images':>10}{'classes':>10}{'published images':>20}{'classes':>10}")
    published_counts = layouts.get(name).published
    for split, pairs in listing.splits.items():
        published = published_counts.get(split, ("-", "-"))
        cells = [f"{n:,}" if isinstance(n, int) else n for n in (*count(pairs), *published)]
        print(f"{split:<10}{cells[0]:>10}{cells[1]:>10}{cells[2]:>20}{cells[3]:>10}")


def check(name: str, data_root: Path, decode: bool = False, train_classes: float | None = None) -> bool:
    """Prints a table of the counts and a line for each problem; True if there is none.

    Whatever training would refuse is one. train_classes: as in load_benchmark.

    Raises ValueError or OSError if the lists cannot be read at all.
    """
    listing = read_splits(name, data_root, train_classes)
    print(f"{name} in {listing.root}")
    print_counts(name, listing)
    notes, problems = look_at_test_split(listing)
    for note in listing.notes + notes:
        print(f"note: {note}")
    problems = compare_counts(name, listing) + split_problems(listing) + problems
    missing = missing_files(listing)
    problems += [f"{listing.root / path}: the file is not there" for path in missing[:5]]
    if len(missing) > 5:
        problems.append(f"... and {len(missing) - 5:,} more files that are not there")
    if decode:
        problems += decode_all(listing)
    for problem in problems:
        print(f"problem: {problem}")
    if not problems:
        print(f"{name}: no problems found{'' if decode else ' (images were not opened; --decode opens them)'}")
    return not problems


# ---------------------------------------------------------------- download


def fetch(url: str, part: Path, bar: tqdm) -> bool:
    """Appends the missing rest of a file to `part`, asking the server only for that; True if it is now complete.

    Raises OSError if the server refuses; a broken connection is no error but returns False.
    """
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-", "User-Agent": "Mozilla/5.0"})
    try:
        with contextlib.closing(urllib.request.urlopen(request, timeout=30)) as answer:
            if answer.status != 206:  # the server sends everything from the start
                start = 0
            length = answer.headers.get("Content-Length")
            total = start + int(length) if length else None
            bar.total, bar.n = total, start
            with open(part, "ab" if start else "wb") as file:
                while chunk := answer.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
            return total is None or part.stat().st_size == total
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing is left to send; the md5 tells whether it is right
            return True
        raise OSError(f"{url}: the server says {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise OSError(f"{url}: {error.reason}") from None
    except (http.client.InvalidURL, UnicodeError) as error:
        raise Refused(f"{url}: not a valid address ({error})") from None
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError):
        return False


def fetch_archive(archive: Archive, url: str, data_root: Path, attempts: int = 5, pause: float = 2) -> Path:
    """The archive under data_root, downloaded unless it is there, with the right md5.

    Continues where an earlier call stopped. Tries again when the connection breaks, until `attempts` in a row, `pause`
    seconds or more apart, have brought nothing. Raises OSError, or ValueError if the md5 is wrong.
    """
    whole = data_root / archive.file_name
    if not whole.exists():
        part = data_root / f"{archive.file_name}.part"
        with tqdm(desc=archive.file_name, unit="B", unit_scale=True, disable=None) as bar:
            size = part.stat().st_size if part.exists() else 0
            in_vain = 0
            while not fetch(url, part, bar):
                size, earlier = part.stat().st_size if part.exists() else 0, size
                in_vain = 0 if size > earlier else in_vain + 1
                if in_vain == attempts:
                    raise OSError(
                        f"{url}: the connection broke {attempts} times; {size:,} bytes are in {part}, "
                        "run the same command to go on from there"
                    )
                time.sleep(pause * (in_vain + 1))
        found = calculate_md5(part)
        if found != archive.md5:
            part.unlink()
            raise Refused(f"{url}: the file has the md5 {found}, not {archive.md5}; it was deleted")
        os.replace(part, whole)
    elif calculate_md5(whole) != archive.md5:
        raise Refused(f"{whole}: its md5 is not {archive.md5}; remove the file to download it again")
    return whole


def archive_members(archive: Path, file: BinaryIO) -> Iterator[tuple[str, BinaryIO]]:
    """(name, content) of the files in a .zip or a (compressed) .tar; a link or device is a ValueError."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(file) as zipped:
            for info in zipped.infolist():
                if not info.is_dir():
                    yield info.filename, zipped.open(info)
    else:
        with tarfile.open(fileobj=file) as tar:
            for member in tar:
                if member.isfile():
                    yield member.name, tar.extractfile(member)
                elif not member.isdir():
                    raise Refused(f"{archive}: {member.name!r} is no file or folder; nothing was unpacked")


def extract(archive: Path, home: Path) -> None:
    """Unpacks the archive's folder named like `home` to `home`, which appears whole or not at all.

    Raises ValueError if the archive is broken, lacks that folder, or holds a path that leads out of it.
    """
    with scratch_folder(home.parent) as scratch:
        try:
            size = archive.stat().st_size
            bar = tqdm(desc="unpacking", total=size, unit="B", unit_scale=True, disable=None)
            with bar, open(archive, "rb") as file:
                for name, content in archive_members(archive, file):
                    if re.match(r"[A-Za-z]:|[\\/]", name) or ".." in re.split(r"[\\/]", name):
                        raise Refused(f"{archive}: {name!r} leads out of the folder; nothing was unpacked")
                    target = scratch / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with content, open(target, "wb") as out:
                        shutil.copyfileobj(content, out)
                    bar.update(file.tell() - bar.n)
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise Refused(f"{archive}: broken archive ({one_line(error)}); nothing was unpacked") from None
        if not (scratch / home.name).is_dir():
            raise Refused(f"{archive}: there is no {home.name} in it")
        os.rename(scratch / home.name, home)


def download(name: str, data_root: Path, url: str | None = None) -> None:
    """Fetches and unpacks a benchmark, or says how to get it and where to put it; draws those that are drawn.

    Raises ValueError or OSError with one line, which also names other places where the download failed.
    """
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
        return
    if layout.by_hand:
        print(f"{layout.by_hand.format(home=home)}\n{layout.mirrors}")
        raise Refused(f"{name} cannot be downloaded; get it by hand as said above and put it under {home}")
    if not layout.archive:
        raise Refused(f"{name!r} cannot be downloaded; there are {', '.join(DOWNLOADS)}")
    if home.exists():
        print(f"{home} is there already; `python code/prepare.py check {name}` says whether it is complete")
        return
    home.parent.mkdir(parents=True, exist_ok=True)
    try:
        archive = fetch_archive(layout.archive, url or layout.archive.url, home.parent)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's trouble, not the server's
            raise
        kind = OSError if isinstance(error, OSError) else Refused
        raise kind(f"{error}. {layout.mirrors}") from None
    extract(archive, home)
    print(f"{home} is ready; {archive} can be deleted")


# ---------------------------------------------------------------- show


def spread(number: int, wanted: int) -> list[int]:
    """Up to `wanted` of 0..number-1, evenly spread."""
    return np.unique(np.linspace(0, number - 1, min(number, wanted)).round().astype(int)).tolist()


def rows_of(images, num_classes: int, images_per_class: int) -> list[tuple[str, list[Path]]]:
    """(name, some image files) of some classes, for a contact sheet."""
    present, rows = np.unique(images.labels), []
    for c in present[spread(len(present), num_classes)]:
        members = np.flatnonzero(images.labels == c)
        chosen = members[spread(len(members), images_per_class)]
        rows.append((f"{images.class_names[c]} ({len(members)})", [Path(images.root, images.paths[i]) for i in chosen]))
    return rows


def show(name: str, data_root: Path, output: Path, train_classes: float | None = None) -> None:
    """Draw a contact sheet (PNG): 8 classes of each split, 6 images of each. train_classes: as in load_benchmark."""
    import pictures  # matplotlib takes a second

    benchmark = load_benchmark(name, data_root, train_classes, training=False)
    test = "test" if benchmark.gallery is None else "query"
    parts = {"train": benchmark.train, test: benchmark.query, "gallery": benchmark.gallery}
    columns = [
        (f"{name} {part}: {len(images):,} images, {len(np.unique(images.labels)):,} classes", rows_of(images, 8, 6))
        for part, images in parts.items()
        if images is not None
    ]
    pictures.contact_sheet(columns, output, benchmark.query.own)
    print(output)


# ---------------------------------------------------------------- command line


def build_parser() -> Parser:
    parser = Parser("Check, download and look at the benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (
        ("check", "compare what is on disk with what was published; exit status 1 if anything is off"),
        ("download", f"fetch cub, SOP, emoji or {WEIGHTS} (ImageNet weights); say how to get cars and Inshop"),
        ("show", "draw a contact sheet of some classes of each split"),
    ):
        sub = commands.add_parser(command, help=text, description=text)
        names = DOWNLOADS if command == "download" else layouts.DATASETS
        sub.add_argument("name", metavar="NAME", help=f"one of {', '.join(names)}")
        sub.add_argument(
            "--data-root",
            type=Path,
            default=DATA,
            metavar="DIR",
            help="folder that holds the benchmarks; for folder, your folder or .csv file",
        )
        if command in ("check", "show"):
            sub.add_argument(
                "--train-classes",
                type=real(0, 1, positive=True),
                metavar="SHARE",
                help="share of the sorted classes that trains when a folder has no split of its own (default 0.5)",
            )
        if command == "check":
            sub.add_argument("--decode", action="store_true", help="also decode every image, on all cores")
        if command == "download":
            sub.add_argument("--url", help="fetch the same archive from another place (its md5 is checked)")
        if command == "show":
            sub.add_argument("--output", type=Path, metavar="FILE.png", help="default: NAME.png, here")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    name = args.name if args.name == WEIGHTS else layouts.dataset_name(args.name)
    if args.command == "check":
        if not check(name, args.data_root, args.decode, args.train_classes):
            sys.exit(1)
    elif args.command == "download":
        download(name, args.data_root, args.url)
    else:
        show(name, args.data_root, args.output or Path(f"{name}.png"), args.train_classes)


if __name__ == "__main__":
    run_script(main)
