"""What a run tells about itself: one row per epoch for console and CSV, its folder, and what made it."""

import csv
import io
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy
import torch
import torchvision

CODE = Path(__file__).resolve().parent


def environment(device: torch.device) -> dict[str, str]:
    """Commit, versions and device that made a run, for its checkpoints and files."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which weights_only refuses
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "device": describe_device(device),
    }


def _commit() -> str:
    """Commit of the code, '+changes' where the tree differs from it; 'unknown' outside git."""
    try:
        git = ["git", "-C", str(CODE)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, check=True)
        return commit + ("+changes" if changes.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.get_num_threads()} threads"


def choose_device(gpu_id: int) -> torch.device:
    """The GPU of that number if there is any GPU, else the CPU. Raises ValueError for a number out of range."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu_id < 0 or count == 0:
        return torch.device("cpu")
    if gpu_id >= count:
        raise ValueError(f"--gpu-id {gpu_id}: there are {count} GPUs, numbered from 0; -1 is the CPU")
    torch.cuda.set_device(gpu_id)
    # Loss and search are exact in float32. It is the default, unless an environment variable that some containers set
    # says otherwise.
    torch.set_float32_matmul_precision("highest")
    return torch.device("cuda", gpu_id)


def new_run_folder(parent: Path, run_num: int | None) -> Path:
    """Make and return parent/run_N: the next free number, or the given one.

    Making a folder either succeeds or finds it there, so two runs that start at once never share one.

    Raises:
        FileExistsError: the given number is taken.
    """
    parent.mkdir(parents=True, exist_ok=True)
    numbers = [run_num] if run_num is not None else range(1, sys.maxsize)
    for number in numbers:
        try:
            (parent / f"run_{number}").mkdir()
            return parent / f"run_{number}"
        except FileExistsError:
            continue
    raise FileExistsError(
        f"{parent / f'run_{run_num}'} exists: give --resume to go on with it, --overwrite to replace it, "
        "or no --run-num for the next free number"
    )


def best_name(dataset: str, model: str) -> str:
    """Name of a run's best checkpoint; what timm puts into names and files cannot hold becomes '_'."""
    return f"{dataset}_{model.replace(':', '_').replace('/', '_')}_best.pth"


def newest_run_folder(parent: Path) -> Path:
    """The run_N of the highest N that can be resumed. Raises FileNotFoundError."""
    runs = [folder for folder in parent.glob("run_*") if (folder / "last.pth").exists() and folder.name[4:].isdigit()]
    if not runs:
        raise FileNotFoundError(f"{parent}: no run to resume, none of its run_N folders holds a last.pth")
    return max(runs, key=lambda folder: int(folder.name[4:]))


def csv_text(rows: list[dict]) -> str:
    """Rows as CSV with one header; a row may lack columns that others have."""
    fullest_first = sorted(rows, key=len, reverse=True)
    columns = list(dict.fromkeys(name for row in fullest_first for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def percent(figures: dict[str, float]) -> str:
    """{'R@1': 0.714, …} -> 'R@1 71.40  …', in percent."""
    return "  ".join(f"{name} {100 * value:.2f}" for name, value in figures.items())


def recalls(row: dict) -> dict[str, float]:
    """The R@K of a row."""
    return {name: value for name, value in row.items() if name.startswith("R@")}


def epoch_title(row: dict, num_epochs: int) -> str:
    if row["phase"] == "train":
        return f"epoch {row['epoch']}/{num_epochs}"
    return row["phase"]


def console_line(row: dict, num_epochs: int) -> str:
    """One epoch in one line: loss and HIST's two terms, R@K in percent, learning rate, images per second."""
    parts = [f"{epoch_title(row, num_epochs):>12}"]
    if "loss" in row:
        terms = f" = dist {row['dist_loss']:.4f} + ls · ce {row['ce_loss']:.4f}" if "ce_loss" in row else ""
        parts.append(f"loss {row['loss']:.4f}{terms}")
    if "val R@1" in row:
        parts.append(f"val R@1 {100 * row['val R@1']:.2f}")
    parts.append(percent(recalls(row)))
    if "loss" in row:
        parts.append(f"lr {row['lr']:.3g}  {row['images_per_s']:.0f} img/s")
    parts.append(f"{row['seconds']:.1f} s")
    return "   ".join(parts)


def start_wandb(mode: str | None, dataset: str, folder: Path, config: dict, tags: list[str], run_id: str | None):
    """A wandb run, or None where it is off: project hist_DATASET, run run_N, kept in the run's folder.

    mode: off, offline, online, or None for what WANDB_MODE says. run_id continues an earlier run. Never asks for a
    key: online without one, or without the network, becomes offline and says so.

    Raises:
        ValueError: wandb was asked for and is not installed.
    """
    if mode is None:
        mode = {"online": "online", "offline": "offline", "dryrun": "offline"}.get(os.environ.get("WANDB_MODE"), "off")
    if mode == "off":
        return None
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"--wandb {mode}: wandb is not installed (pip install wandb, or --wandb off)") from error
    tags = [tag[:64] for tag in tags]  # wandb takes no longer ones
    options = dict(project=f"hist_{dataset}", name=folder.name, config=config, tags=tags, dir=str(folder), id=run_id,
                   resume="allow", settings=wandb.Settings(silent=True))  # fmt: skip
    run = None
    if mode == "online":
        try:
            run = wandb.init(mode="online", **options) if wandb.login(prompt=False) else None
        except wandb.errors.Error as error:
            print(f"wandb: {' '.join(str(error).split())[:100]}")
        if run is None:
            print("wandb: no key or no connection, recording offline; `wandb sync` sends it later")
    run = run or wandb.init(mode="offline", **options)
    run.define_metric("*", step_metric="epoch")
    return run


def log_to_wandb(run, row: dict, best: dict | None) -> None:
    """One row; the summary keeps the best R@K and its epoch."""
    if run is None:
        return
    run.log(row)
    if best:
        run.summary.update({f"best {name}": value for name, value in recalls(best).items()})
        run.summary["best epoch"] = best["epoch"]


def pictures_to_wandb(run, folder: Path) -> None:
    if run is not None:
        import wandb

        run.log({path.stem: wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))})


def clear_folder(folder: Path, pattern: str = "*") -> None:
    """Remove the files of a run that is to be replaced; with ".*.tmp" only what a kill in mid-write left behind."""
    for path in folder.glob(pattern):
        if path.is_file() or path.is_symlink():
            path.unlink()
