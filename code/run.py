"""What a run leaves behind, and how it goes on: its folder, rows, checkpoints, pictures and wandb.

    logs/DATASET/run_N/
        DATASET_MODEL_best.pth, DATASET_MODEL_best_results.txt    the best epoch: network, and its scores as text
        last.pth                                                  all that resuming takes, after every epoch
        results.csv                                               a row per epoch
        args.json                                                 what made the run: flags, commit, versions, data
        curves.png, neighbours.png, hypergraph.png, embedding.png

Every file appears whole or not at all. After an epoch last.pth is written first. If a kill, or a full disk, keeps the
other files from following, they are made from it when the run is resumed.
"""

import csv
import fcntl
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import checkpoint
import dataset
import distributed
import flags
import metrics
import net
import numpy
import pictures
import torch
import torchvision
from refused import Refused
from torch.utils.data import DataLoader
from tqdm import tqdm

STATE = {
    "flags",
    "criterion_state_dict",
    "optimizer_state_dict",
    "scheduler_state_dict",
    "random_states",
    "history",
    "best",
    "epoch",
}  # what last.pth holds and other checkpoints do not all have

# ---------------------------------------------------------------- flags of a run, new or resumed


def parse_flags() -> tuple[Namespace, dict | None]:
    """(flags, what is to be resumed or None). Raises ValueError or OSError where they do not fit each other."""
    parser = flags.train_parser()
    args, given = parser.parse()
    if args.resume is None:
        if args.overwrite and "run_num" not in given:
            raise Refused("--overwrite needs --run-num N, the run to replace")
        if args.allow_changed_images:
            raise Refused("--allow-changed-images requires --resume")
        args.run_num = args.run_num if "run_num" in given else None
        if args.dataset == "folder" and "data_root" not in given:
            raise Refused(flags.NO_FOLDER)
        return args, None
    if args.overwrite:
        raise Refused("--resume and --overwrite cannot be combined")
    path = last_checkpoint(args, given)
    if args.resume and "run_num" in given and path.absolute().parent.name != f"run_{args.run_num}":
        raise Refused(f"--resume {args.resume} names another run than --run-num {args.run_num}: leave one of them out")
    state = checkpoint.load(path)
    if missing := STATE - state.keys():
        raise Refused(f"{path}: cannot be resumed from, it lacks {', '.join(sorted(missing))}; give a run's last.pth")
    stored = checkpoint.stored_flags(state)
    changed = [
        f"{name} {getattr(args, name)} instead of {stored[name]}"
        for name in sorted(given - flags.BOOKKEEPING - {"nb_epochs"})
        if name in stored and getattr(args, name) != stored[name]
    ]
    if changed:
        raise Refused(
            f"{path} was made with other flags ({'; '.join(changed)}): leave them out to resume it, or start a new run"
        )
    args, _ = parser.parse(parser.command_line(stored) + sys.argv[1:])
    args.resume = str(path)
    return args, state


def last_checkpoint(args: Namespace, given: set[str]) -> Path:
    """The last.pth that --resume means. Raises FileNotFoundError."""
    if not args.resume:
        runs = args.log_dir / args.dataset
        return (runs / f"run_{args.run_num}" if "run_num" in given else newest_run_folder(runs)) / "last.pth"
    path = Path(args.resume)
    if not path.is_dir():
        return path
    if (path / "last.pth").exists():
        return path / "last.pth"
    runs = [folder.name for folder in run_folders(path)]
    there = f"it holds the runs {', '.join(runs)}: give one of them" if runs else "give a run's folder or its last.pth"
    raise FileNotFoundError(f"--resume {path}: there is no last.pth in it; {there}")


def run_folders(parent: Path) -> list[Path]:
    """The folders run_N in order of N."""
    found = [path for path in parent.glob("run_*") if path.name[4:].isascii() and path.name[4:].isdigit()]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name[4:]))


def newest_run_folder(parent: Path) -> Path:
    """The run_N of the highest N that can be resumed. Raises FileNotFoundError."""
    runs = [folder for folder in run_folders(parent) if (folder / "last.pth").exists()]
    if not runs:
        raise FileNotFoundError(
            f"{parent}: no run to resume (no run_N/last.pth); give --dataset, --log-dir or --resume RUN"
        )
    return runs[-1]


def refuse_other_data(state: dict, data: dict, args: Namespace) -> None:
    """Compare the data of a run with what is there now, fingerprint by fingerprint: {split: dataset.fingerprint(…)}.

    Another class, or another order of the classes, would pair every label with the learned mean of another class.
    Raises ValueError, unless only images changed and --allow-changed-images says to go on. Then the best epoch is
    chosen among those to come: the earlier ones were scored on other images.
    """
    then = state.get("data")
    if then is None:
        print(f"warning: {args.resume} is of an earlier version and does not say what it was trained on: not compared",
              file=sys.stderr)  # fmt: skip
        return
    empty = dict(images=0, classes=[], sizes=[], class_digests=[], digest="")
    splits = [(split, then.get(split) or empty, data.get(split) or empty) for split in {**then, **data}]
    differing = [f"{split}: {what}" for split, old, new in splits if (what := dataset.changes(old, new))]
    if not differing:
        return
    only_images = all(old["classes"] == new["classes"] for _, old, new in splits)
    if only_images and args.allow_changed_images:
        print(f"warning: the data changed since the run began ({'; '.join(differing)}); the best epoch is chosen among "
              "those from here on", file=sys.stderr)  # fmt: skip
        return
    stored_root = checkpoint.stored_flags(state).get("data_root")
    moved = f"it was {stored_root}" if stored_root != str(args.data_root.absolute()) else "it changed since"
    way_out = "--allow-changed-images resumes anyway" if only_images else "restore it, or start a new run"
    raise Refused(
        f"{args.resume} was trained on other data than {args.data_root} now holds ({moved}): {'; '.join(differing)}; "
        f"{way_out}"
    )


# ---------------------------------------------------------------- the folder


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


def lock(folder: Path) -> TextIO:
    """Keep other processes out of a run's folder until unlock(), or until this process ends in any way.

    A lock of fcntl's lockf: unlike flock's, worker processes that outlive a killed parent do not inherit it.
    Returns what unlock() takes. Raises ValueError when another process holds it.
    """
    path = folder / ".lock"
    while True:
        file = open(path, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            file.close()
            raise Refused(f"{folder}: another process{f' ({owner})' * bool(owner)} is using this run") from None
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        file.close()  # its owner removed it between our two calls: another process may hold a new one
    file.truncate(0)
    file.write(f"{platform.node()}, process {os.getpid()}\n")
    file.flush()
    return file


def unlock(file: TextIO) -> None:
    """Let others in, and leave nothing behind."""
    Path(file.name).unlink(missing_ok=True)
    file.close()


def command() -> str:
    """The command line that makes a run, for its files."""
    return shlex.join(sys.argv)


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
    try:
        git = ["git", "-C", str(flags.CODE)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, check=True)
        return commit + ("+changes" if changes.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Run:
    """A run's folder and what was reached so far. Of several processes only process 0 writes.

    args      the flags
    parts     {'network', 'criterion', 'optimizer', 'scheduler'}: what checkpoints hold the state of
    data      {split: dataset.fingerprint(images)}
    state     the checkpoint to go on from, or None for a new run

    history   rows, from the untrained network on; best: the row of the best training epoch so far, or None
    epoch     the last completed one. Warm-up epochs count up to 0, training epochs from 1
    """

    def __init__(self, args: Namespace, device: torch.device, parts: dict, data: dict, state: dict | None):
        self.args, self.device, self.parts, self.data = args, device, parts, data
        self.epoch, self.history, self.best = -args.warm, [], None
        self.made_by = {**environment(device), "command": command()}
        self.wandb, self.wandb_id, self.lock = None, None, None
        self.drawing_seconds, self.started = 0.0, time.monotonic()
        self.one_point = False  # whether the last embeddings lay almost at one point
        writes = distributed.processes().rank == 0
        if state:
            self._resume(state)
        elif writes:
            self._begin()
        self.folder = distributed.from_first(self.folder if writes else None)
        self.best_path = self.folder / checkpoint.best_name(args.dataset, args.model)
        self.results_path = self.folder / f"{self.best_path.stem}_results.txt"
        if not writes:
            return
        finished, has_best = self.done and bool(self.history), self._has_best()
        if finished and has_best and self._files_are_complete():
            return
        self.lock = self.lock or lock(self.folder)
        if state and checkpoint.load(Path(args.resume))["epoch"] != state["epoch"]:
            unlock(self.lock)
            raise Refused(f"{self.folder}: another process went on with this run meanwhile; give the command again")
        checkpoint.remove_leftovers(self.folder)
        if not has_best:
            self._mend_best(state)
        if not finished:
            self._start_wandb()
        self._write_origin()
        self._write_results()
        if self.history:
            pictures.curves(self.history, self.folder / "curves.png", **self._curve_options())

    @property
    def done(self) -> bool:
        return self.epoch >= self.args.nb_epochs

    def _begin(self):
        parent = self.args.log_dir / self.args.dataset
        self.folder = parent / f"run_{self.args.run_num}"
        if self.args.overwrite and self.folder.is_dir():
            self.lock = lock(self.folder)
            for path in self.folder.iterdir():
                if path.name != ".lock" and (path.is_file() or path.is_symlink()):
                    path.unlink()
        else:
            self.folder = new_run_folder(parent, self.args.run_num)
        stored = flags.plain(self.args) | {"resume": None, "overwrite": False}
        self.flags = stored | {"run_num": int(self.folder.name.removeprefix("run_"))}
        self.first_flags, self.resumptions = self.flags, []

    def _resume(self, state):
        """Put a checkpoint back. What made the run first is kept; this call is listed beside it."""
        path = Path(self.args.resume)
        self.folder = path.resolve().parent
        self._restore(state, path)
        self.epoch, self.history, self.best = state["epoch"], list(state["history"]), state["best"]
        here = {"after_epoch": self.epoch}
        then = state.get("data")
        if then and then != self.data and not self.done:
            here |= {"data_before": summary_of(then)}
            self.best = None  # it was scored on other images
        stored = checkpoint.stored_flags(state)
        self.wandb_id = state.get("wandb_id")
        now = flags.plain(self.args)
        kept = {"resume", "overwrite", "run_num", "allow_changed_images"}
        changed = {name: now[name] for name in stored if name in now and name not in kept and now[name] != stored[name]}
        self.flags = stored | changed
        self.first_flags, listed = self._read_origin() or (stored, [])
        # A resumption that completed no epoch leaves no mark.
        self.resumptions = [entry for entry in listed if entry.get("after_epoch") != self.epoch]
        cut_short = self.done and stored.get("nb_epochs", 0) > self.epoch  # it was to be longer, and is complete now
        if cut_short or not self.done:
            self.resumptions.append(here | {"flags": changed, **self.made_by})
        self.origin_is_written = not cut_short and self.resumptions == listed
        self.made_by = state.get("made_by") or self.made_by

    def _read_origin(self):
        """(flags that made the run, list of its resumptions) of args.json, or None where that is not to be had."""
        try:
            content = json.loads((self.folder / "args.json").read_text(encoding="utf-8"))
            resumptions = [entry for entry in content.get("resumptions", []) if isinstance(entry, dict)]
            return dict(content["flags"]), resumptions
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def _restore(self, state, path):
        net.load_network_state(self.parts["network"], checkpoint.network_state(state, path), path)
        try:
            for name in ("criterion", "optimizer", "scheduler"):
                self.parts[name].load_state_dict(state[f"{name}_state_dict"])
            checkpoint.restore_random_states(state["random_states"])
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise Refused(f"{path}: does not fit this run: {' '.join(str(error).split())[:200]}") from error

    def _start_wandb(self):
        args = self.args
        tags = [args.dataset, args.model, f"seed {args.seed}", *args.remark.split()]
        config = self.flags | self.made_by
        self.wandb = start_wandb(args.wandb, args.dataset, self.folder, config, tags, self.wandb_id)
        if self.wandb:
            self.wandb_id = self.wandb.id

    # ------------------------------------------------------------ rows and checkpoints

    def add(self, row: dict) -> None:
        """Print the row of an epoch and save what it reached."""
        here = self.resumptions[-1] if self.resumptions else self.made_by  # this process
        self.history.append(row | {"seed": self.args.seed, "commit": here["commit"], "torch": here["torch"]})
        self.epoch = row["epoch"]
        tqdm.write(console_line(row, self.args.nb_epochs))
        common = {
            # on the CPU, for readers elsewhere that do not say where to
            "model_state_dict": {name: value.cpu() for name, value in self.parts["network"].state_dict().items()},
            "epoch": row["epoch"],
            "figures": recalls(row),
            "flags": self.flags,
            "made_by": self.made_by,
            "data": self.data,
            "wandb_id": self.wandb_id,
        }
        chosen_by = "val R@1" if self.args.val_classes > 0 else "R@1"
        is_best = row["phase"] == "train" and (self.best is None or row[chosen_by] > self.best[chosen_by])
        if is_best:
            self.best = self.history[-1]
        progress = {
            f"{name}_state_dict": self.parts[name].state_dict() for name in ("criterion", "optimizer", "scheduler")
        }
        progress |= {"random_states": checkpoint.random_states(), "history": self.history, "best": self.best}
        # last.pth goes first: a best.pth that a kill or a full disk kept from following can be made from it.
        checkpoint.save(common | progress, self.folder / "last.pth")
        if is_best:
            checkpoint.save(common, self.best_path)
            checkpoint.write_text(self._results_text(), self.results_path)
        self._write_table()
        log_to_wandb(self.wandb, row, self.best)

    def _write_origin(self) -> None:
        content = {"flags": self.first_flags, "made_by": self.made_by, "data": summary_of(self.data)}
        content |= {"wandb_id": self.wandb_id}
        content |= {"resumptions": self.resumptions} if self.resumptions else {}
        checkpoint.write_text(json.dumps(content, indent=2) + "\n", self.folder / "args.json")

    def _write_table(self) -> None:
        checkpoint.write_text(csv_text(self.history), self.folder / "results.csv")

    def _write_results(self) -> None:
        """Table and text from the history: a run killed after last.pth was written lacks its last row in them."""
        if self.history:
            self._write_table()
        if self.best:
            checkpoint.write_text(self._results_text(), self.results_path)

    def _has_best(self) -> bool:
        """Whether the best checkpoint is that of the best epoch so far."""
        try:
            return self.best is None or checkpoint.load(self.best_path).get("epoch") == self.best["epoch"]
        except (OSError, ValueError):
            return False

    def _mend_best(self, state: dict) -> None:
        """Make the best checkpoint from the state, the last one, if it is of that epoch; warn where it is not."""
        if self.best["epoch"] == self.epoch:
            progress = STATE - {"flags", "epoch"}
            checkpoint.save({name: state[name] for name in state if name not in progress}, self.best_path)
        else:
            print(f"warning: {self.best_path} does not hold the network of epoch {self.best['epoch']}, the best so "
                  "far, which is lost", file=sys.stderr)  # fmt: skip

    def _files_are_complete(self) -> bool:
        table = self.folder / "results.csv"
        return (
            self.origin_is_written
            and table.is_file()
            and table.read_bytes() == csv_text(self.history).encode()
            and (self.best is None or self.results_path.is_file())
        )

    def _results_text(self) -> str:
        lines = [f"Best epoch: {self.best['epoch']}", f"Chosen by: {self.protocol()}"]
        lines += [f"{name}: {100 * value:.4f}" for name, value in self.best.items() if "R@" in name]
        lines += [f"Seed: {self.args.seed}", f"Remark: {self.flags.get('remark', '')}"]
        # The command stays out: a run that was resumed leaves the same text as one that was not.
        made_by = self.made_by | {name: self.best[name] for name in ("commit", "torch") if name in self.best}
        lines += [f"{what.capitalize()}: {value}" for what, value in made_by.items() if what != "command"]
        return "\n".join(lines) + "\n"

    def protocol(self) -> str:
        if self.args.val_classes > 0:
            return f"R@1 on {self.args.val_classes:g} of the training classes, held out (--val-classes)"
        return "R@1 on the test split, the paper's protocol (optimistic; --val-classes 0.1 is not)"

    # ------------------------------------------------------------ pictures

    def draw(self, train_loader: DataLoader, draw_search: Callable[[Path, int], None]) -> None:
        """Draw curves, a hypergraph and the search; anew while that takes little of the time, in full at the end.

        draw_search(folder, number of pictures on the map) draws neighbours and a map of embeddings.
        """
        begun = time.monotonic()
        if self.drawing_seconds > 0.03 * (begun - self.started) and not self.done:
            return
        pictures.curves(self.history, self.folder / "curves.png", **self._curve_options())
        draw_search(self.folder, 2000 if self.done else 400)  # t-SNE of 2,000 takes ten seconds, of 400 one
        if self.args.loss == "hist":
            self._draw_hypergraph(train_loader)
        if self.wandb:
            log_pictures_to_wandb(self.wandb, self.folder)
        self.drawing_seconds += time.monotonic() - begun

    def _curve_options(self) -> dict:
        """Title, the cross-entropy of guessing where there is an HGNN to compare with it, and the best epoch."""
        args = self.args
        title = f"{args.dataset}/{self.folder.name}: {args.model}, {args.loss}, seed {args.seed}"
        return {"title": title, "chance": self.chance(), "best": self.best["epoch"] if self.best else 0}

    def chance(self) -> float | None:
        """ln C, the HGNN's cross-entropy while it only guesses; None without an HGNN."""
        if self.args.loss != "hist" or not self.args.ls:
            return None
        return math.log(len(self.data["train"]["classes"]))

    def _draw_hypergraph(self, train_loader: DataLoader) -> None:
        items = next(train_loader.batch_sampler.whole())
        images, labels = zip(*(train_loader.dataset[item] for item in items), strict=True)
        network, criterion = self.parts["network"], self.parts["criterion"]
        with torch.no_grad():
            network.eval()
            at_once = self.args.sz_batch // distributed.processes().count  # as in training: that much fits the memory
            parts = torch.stack(images).to(self.device).split(at_once)
            X = torch.cat([network(network.normalise(part)) for part in parts])
            labels = torch.tensor(labels, device=self.device)
            H = criterion.cds2hg(X, labels)[1]
        class_names = train_loader.dataset.images.class_names
        pictures.hypergraph(H.cpu().numpy(), labels.cpu().numpy(), class_names, self.folder / "hypergraph.png")

    # ------------------------------------------------------------ what the user is told

    def finish(self) -> None:
        if self.wandb:
            where = Path(self.wandb.dir).parent
            self.wandb.finish()
            if self.wandb.settings.mode == "offline":
                print(f"wandb: {os.path.relpath(where)}; `wandb sync` sends it")
        if self.lock:
            unlock(self.lock)

    def kept(self) -> str:
        if not self.history:
            return f"No epoch was completed, so there is nothing to resume in {self.folder}."
        resume = command_for("train.py", "--resume", os.path.relpath(self.folder / "last.pth"))
        last = self.history[-1]
        return f"Kept: {last['phase']} epoch {last['epoch']} in {self.folder}. Resume with: {resume}"

    def summary(self) -> str:
        args, best, last, untrained = self.args, self.best, self.history[-1], self.history[0]
        lines = [""]
        if best:
            lines.append(f"best   epoch {best['epoch']:<4} {percent(recalls(best))}")
            lines.append(f"       chosen by {self.protocol()}")
        lines.append(f"last   epoch {last['epoch']:<4} {percent(recalls(last))}")
        lines.append(f"untrained {' ':<8}{percent(recalls(untrained))}")
        if best and best["R@1"] < untrained["R@1"]:
            lines.append("       better than the best epoch: train longer (--epochs), or look at the learning rates")
        if self.one_point:
            lines.append(f"       {metrics.ONE_POINT}; from random weights, train with --bn-freeze 0")
        lowest, chance = min((row["ce_loss"] for row in self.history if "ce_loss" in row), default=0), self.chance()
        if chance and lowest > 0.95 * chance:
            lines.append(
                f"       the HGNN's cross-entropy stayed at chance (lowest {lowest:.2f}; ln C is {chance:.2f}): the "
                "hypergraph did nothing in this run; try a larger --alpha or a smaller --lr-ds"
            )
        lines.append(f"files  {os.path.relpath(self.folder)}")
        if best:
            words = ["--model-path", os.path.relpath(self.best_path)]
            if args.data_root != flags.DATA:
                words += ["--data-root", args.data_root]
            if args.skip_bad_images:
                words.append("--skip-bad-images")
            lines.append(f"score  {command_for('evaluate.py', *words)}")
        if best and args.dataset == "folder" and args.data_root.is_dir():
            words = ["--model-path", os.path.relpath(self.folder), "--gallery", args.data_root]
            lines.append(f"search {command_for('retrieve.py', *words)} --query IMAGE_OR_FOLDER")
        return "\n".join(lines)


def summary_of(data: dict) -> dict:
    """The counts and digests of fingerprints, for args.json."""
    summary = {
        split: {"images": found["images"], "classes": sum(map(bool, found["sizes"])), "digest": found["digest"]}
        for split, found in data.items()
    }
    if "validation" in data:  # the seed draws the held-out classes: this one is the same for all seeds
        summary["train"]["digest_with_validation"] = dataset.digest_of_classes(data["train"], data["validation"])
    return summary


def command_for(script: str, *words) -> str:
    path = os.path.relpath(Path(__file__).parent / script)
    return shlex.join(["python", path, *map(str, words)])


# ---------------------------------------------------------------- rows as text


def csv_text(rows: list[dict]) -> str:
    """Rows as CSV with one header; a row may lack columns that others have."""
    fullest_first = sorted(rows, key=len, reverse=True)
    columns = list(dict.fromkeys(name for row in fullest_first for name in row))
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


# ---------------------------------------------------------------- wandb


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
        raise Refused(f"--wandb {mode}: wandb is not installed (pip install wandb, or --wandb off)") from error
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


def log_pictures_to_wandb(run, folder: Path) -> None:
    import wandb

    run.log({path.stem: wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))})
