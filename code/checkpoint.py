"""Files that a run leaves behind: written whole or not at all, and read without running what is in them."""

import contextlib
import errno
import fcntl
import glob
import os
import random
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from folders import shorten
from refused import Refused

TEMPORARY = ".hist-tmp"  # suffix of files that are being written


def write(content: Callable[[Any], None], path: Path) -> None:
    """Let content(file) write, under a temporary name in the same folder; then force it to the disk and rename it.

    A reader sees the old file or the new one; a crash, a full disk or a pulled plug leaves the old one. Until then the
    file is locked: remove_leftovers leaves it alone. Raises Refused if it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with open(temporary, "xb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content(file)
            file.flush()
            force(file.fileno())
            os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            force(folder)  # the new name, too, has to survive a power cut
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # A write that fails inside torch.save surfaces as a RuntimeError of its archive writer.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            reason = cause.strerror
            raise Refused(f"{path}: cannot be written ({reason}); what was saved before is untouched") from error
        raise


def force(number: int) -> None:
    """fsync of an open file or folder. Some network drives (CIFS, FUSE) cannot do that, and are trusted without."""
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise


def save(content: dict, path: Path) -> None:
    """Save a checkpoint. Raises Refused, the file that was there before intact."""
    write(lambda file: torch.save(content, file), path)


def write_text(text: str, path: Path) -> bool:
    """Write a text file unless it holds just that; gives whether it did not. Raises Refused, the old file intact."""
    content = text.encode(errors="backslashreplace")  # flags may hold bytes that are no text
    if path.is_file() and path.read_bytes() == content:
        return False
    write(lambda file: file.write(content), path)
    return True


def remove_leftovers(folder: Path, beginning: str = "") -> None:
    """Remove what kills in the middle of write() left in a folder, of files whose names begin so, and nothing else.

    A file that a living process is writing is locked and stays. Where there are no locks to tell, it goes after a day.
    """
    for path in folder.glob(f".{glob.escape(beginning)}*{TEMPORARY}"):
        with contextlib.suppress(OSError), open(path, "r+b") as file:  # or another user's, beside a shared gallery
            if time.time() - os.fstat(file.fileno()).st_mtime < 24 * 3600:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def require_writable(path: Path | None, option: str, folder: bool = False) -> None:
    """Find out before the work, not after it, that a file, or a folder, named by an option cannot be written.

    None is no file. The folder is not made yet, nor need the ones above it be there.
    """
    if path is None:
        return
    if path.exists() and path.is_dir() != folder:
        raise Refused(f"{option} {path}: this is a {'file, name a folder' if folder else 'folder, name a file'}")
    place = path.absolute() if folder else path.absolute().parent
    while folder and not place.exists():
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise Refused(f"{option} {path}: cannot be written, {place} is no folder that can be written to")


def best_name(dataset: str, model: str) -> str:
    """File name of a run's best checkpoint; characters of timm's names that file names cannot hold become '_'."""
    return f"{dataset}_{model.replace(':', '_').replace('/', '_')}_best.pth"


def find(model_path: str, name: str, only: bool) -> Path:
    """The checkpoint that --model-path means: a file, or in a folder the file `name` (DATASET_MODEL_best.pth).

    Without that file the only *_best.pth there; with `only`, just where a last.pth shows that the folder is a run's.
    Raises Refused for no path, and for a folder without such a file, with what is there instead.
    """
    if not model_path:
        raise Refused("--model-path is needed: a checkpoint, or a folder that holds DATASET_MODEL_best.pth")
    path = Path(model_path)
    if not path.is_dir():
        return path
    if (path / name).exists():
        return path / name
    candidates = sorted(path.glob("*_best.pth"))
    if len(candidates) == 1 and (not only or (path / "last.pth").exists()):
        return candidates[0]
    below = candidates or [*path.glob("*/*_best.pth"), *path.glob("*/*/*_best.pth")]
    there = shorten(sorted(map(str, below))) or "no *_best.pth at all"
    wanted = path / (name if only else "*_best.pth")
    raise Refused(f"{wanted}: there is no such checkpoint, the folder holds {there}; give --model-path a file")


def load(path: Path) -> dict:
    """Read a checkpoint or a .safetensors file onto the CPU. Nothing in it is run: weights_only refuses code.

    Raises Refused: no such file, not a checkpoint, a damaged one, or one that holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise Refused(f"{path}: there is no such checkpoint file")
    try:
        with open(path, "rb") as file:  # says why a file cannot be opened, which safetensors does not
            if path.suffix == ".safetensors":
                content = safetensors.torch.load_file(path)
            else:
                content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror or 'input/output error'})") from error
    except Exception as error:  # what a damaged file sets off in unpickling and unzipping has no common type
        name = re.search(r"GLOBAL (\S+)", str(error))  # of what would be run
        if name:
            raise Refused(
                f"{path}: refused, it holds more than tensors and plain values ({name[1]}); save the state dict alone "
                "where the file was made: torch.save(network.state_dict(), FILE)"
            ) from error
        raise Refused(f"{path}: not a checkpoint, or a damaged one ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise Refused(f"{path}: not a checkpoint, it holds a {type(content).__name__}")
    return content


def network_state(content: dict, path: Path) -> dict[str, torch.Tensor]:
    """The network's state dict in what load() returned, by the names of this project: 'model.conv1.weight'.

    It is found under 'model_state_dict', 'state_dict' or 'model', or is the whole content, its names with or without
    the 'module.' and '_orig_mod.' of torch's wrappers and with or without 'model.'. Raises Refused if there is none.
    """
    state = content
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    if not state or not all(isinstance(name, str) and isinstance(state[name], torch.Tensor) for name in state):
        raise Refused(f"{path}: holds no state dict of tensors, nor a model_state_dict, state_dict or model of them")
    wrappers = "(?:module[.]|_orig_mod[.])*"
    named = {re.sub(f"^{wrappers}(?:model[.])?{wrappers}", "model.", name): value for name, value in state.items()}
    if len(named) < len(state):
        raise Refused(f"{path}: holds some weights twice, with and without a prefix of their names")
    return named


def stored_flags(content: dict) -> dict[str, Any]:
    """Flags that made a checkpoint, by destination; empty for published checkpoints. Plain data, never executed."""
    flags = content.get("flags")
    return {str(name): value for name, value in flags.items()} if isinstance(flags, dict) else {}


def random_states() -> dict:
    """States of the random generators of this process and its GPU, as plain values and tensors.

    Of several processes all have drawn the same: the first one's states are everybody's.
    """
    algorithm, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (algorithm, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def restore_random_states(states: dict) -> None:
    """Set what random_states() returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        number = torch.cuda.current_device()  # earlier versions kept the states of all GPUs
        torch.cuda.set_rng_state(states["cuda"][number if number < len(states["cuda"]) else 0])
