"""A run in words: what makes it, the line of an epoch, the table, the best epoch's results, the last lines.

run is a run.Run; rows are those of its history.
"""

import csv
import io
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import distributed
import numpy
import torch
import torchvision


def environment(device: torch.device) -> dict[str, str]:
    """Commit, versions and device that make a run or a score, for its files."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which weights_only refuses
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "device": distributed.describe(device),
        "processes": str(distributed.processes().count),
    }


def _commit() -> str:
    """Commit of the code, '+changes' where the tree differs from it; 'unknown' outside git."""
    git, options = ["git", "-C", str(Path(__file__).parent)], dict(capture_output=True, text=True, check=True)
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "--", "."], **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + "+changes" * bool(changes)


def csv_text(rows: list[dict]) -> str:
    """Rows as CSV with one header; a row may lack columns that others have."""
    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def percent(scores: dict[str, float]) -> str:
    """{'R@1': 0.714, …} -> 'R@1 71.40  …', in percent."""
    return "  ".join(f"{name} {100 * value:.2f}" for name, value in scores.items())


def recalls(row: dict) -> dict[str, float]:
    """The R@K of a row."""
    return {name: value for name, value in row.items() if name.startswith("R@")}


def describe_data(name: str, images: dict) -> str:
    """images: {split: dataset.ImageList}."""
    test = {} if "gallery" in images else {"query": "test"}
    return f"data: {name}, " + ", ".join(
        f"{test.get(split, split)} {len(listed):,} images of {listed.num_classes:,} classes"
        for split, listed in images.items()
    )


def epoch_title(row: dict, num_epochs: int) -> str:
    return f"epoch {row['epoch']}/{num_epochs}" if row["phase"] == "train" else row["phase"]


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
    if row.get("data_time", 0) > 0.1:
        parts.append(f"{100 * row['data_time']:.0f} % waiting for images")
    parts.append(f"{row['seconds']:.1f} s")
    return "   ".join(parts)


def protocol(run) -> str:
    """How the best epoch is chosen."""
    if run.args.val_classes > 0:
        return f"R@1 on {run.args.val_classes:g} of the training classes, held out (--val-classes)"
    return "R@1 on the test split, the paper's protocol (optimistic; --val-classes 0.1 is not)"


def results_text(run) -> str:
    """The text beside the best checkpoint."""
    lines = [f"Best epoch: {run.best['epoch']}", f"Chosen by: {protocol(run)}"]
    lines += [f"{name}: {100 * value:.4f}" for name, value in run.best.items() if "R@" in name]
    lines += [f"Seed: {run.args.seed}", f"Remark: {run.flags.get('remark', '')}"]
    # The command stays out: a run that was resumed leaves the same text as one that was not.
    made_by = run.made_by | {name: run.best[name] for name in ("commit", "torch") if name in run.best}
    lines += [f"{what.capitalize()}: {value}" for what, value in made_by.items() if what != "command"]
    return "\n".join(lines) + "\n"


def kept(run) -> str:
    """What is left of a run that was stopped."""
    if not run.history:
        return f"No epoch was completed, so nothing is left of {run.folder}."
    resume = command_for("train.py", "--resume", os.path.relpath(run.folder / "last.pth"), starter=starter())
    last = run.history[-1]
    return f"Kept: {last['phase']} epoch {last['epoch']} in {run.folder}. Resume with: {resume}"


def starter() -> list[str]:
    """What starts as many processes as there are."""
    count, here, where = distributed.processes().count, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), ["--standalone"]
    if count > here:
        meeting = f"--rdzv-endpoint={os.environ['MASTER_ADDR']}:29500"
        where = [f"--nnodes={count // here}", "--rdzv-backend=c10d", meeting]
    return ["torchrun", *where, f"--nproc-per-node={here}"] if count > 1 else ["python"]


def summary(run, usual_root: Path, cores: int) -> str:
    """What a run reached, advice, and the commands that go on from it; usual_root: default of --data-root."""
    args, best, last, untrained = run.args, run.best, run.history[-1], run.history[0]
    lines = [""]
    if best:
        lines.append(f"best   epoch {best['epoch']:<4} {percent(recalls(best))}")
        lines.append(f"       chosen by {protocol(run)}")
    lines.append(f"last   epoch {last['epoch']:<4} {percent(recalls(last))}")
    lines.append(f"untrained {' ':<8}{percent(recalls(untrained))}")
    if best and best["R@1"] < untrained["R@1"]:
        lines.append("       better than the best epoch: train longer (--epochs), or look at the learning rates")
    if run.doubt:
        way_out = "; train random weights with --bn-freeze 0" * (args.weights == "none" and args.bn_freeze)
        lines.append(f"       {run.doubt}{way_out}")
    lowest, chance = min((row["ce_loss"] for row in run.history if "ce_loss" in row), default=0), run.chance()
    if best and chance and lowest > 0.95 * chance:
        way_out = "try a larger --alpha" + " or a smaller --lr-ds" * (args.lr_ds > 0)
        if args.lr * args.lr_hgnn_factor == 0:
            way_out = "the HGNN's learning rate, --lr times --lr-hgnn-factor, is 0"
        lines.append(
            f"       the HGNN's cross-entropy stayed at chance (lowest {lowest:.2f}; ln C is {chance:.2f}): the "
            f"hypergraph did nothing in this run; {way_out}"
        )
    waited = [row["data_time"] for row in run.history if "data_time" in row]
    if waited and (share := sum(waited) / len(waited)) > 1 / 3:
        ways_out = [f"give it more --workers ({args.nb_workers} now, {cores} cores)"] * (args.nb_workers < cores)
        if args.dataset == "folder":
            ways_out.append(f"shrink the pictures once ({shrink(args.data_root)})")
        waited_for = f"       training waited for images {100 * share:.0f} % of the time"
        lines.append(": ".join([waited_for, *([", or ".join(ways_out)] * bool(ways_out))]))
    lines.append(f"files  {os.path.relpath(run.folder)}")
    if best:
        words = ["--model-path", os.path.relpath(run.best_path)]
        words += ["--data-root", args.data_root] * (args.data_root != usual_root)
        words += ["--skip-bad-images"] * args.skip_bad_images
        lines.append(f"score  {command_for('evaluate.py', *words)}")
    if best and args.dataset == "folder" and args.data_root.is_dir():
        words = ["--model-path", os.path.relpath(run.folder), "--gallery", args.data_root]
        lines.append(f"search {command_for('retrieve.py', *words)} --query IMAGE_OR_FOLDER")
    return "\n".join(lines)


def shrink(data_root: Path) -> str:
    """The command that makes large pictures small, once."""
    data_root = data_root if data_root.name.strip(".") else data_root.resolve()  # . and ..
    output = f"{data_root.with_suffix('') if data_root.is_file() else data_root}_512"
    return command_for("prepare.py", "shrink", "folder", "--data-root", data_root, "--output", output)


def command_for(script: str, *words, starter: Sequence[str] = ("python",)) -> str:
    path = os.path.relpath(Path(__file__).parent / script)
    return shlex.join([*starter, path, *map(str, words)])
