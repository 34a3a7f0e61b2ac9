"""What a run leaves behind, and how it goes on: its folder, its state, its files.

    logs/DATASET/run_N/
        DATASET_MODEL_best.pth, DATASET_MODEL_best_results.txt    the best epoch: network, and its scores as text
        last.pth                                                  all that resuming takes, after every epoch
        results.csv                                               a row per epoch
        args.json                                                 what made the run: flags, commit, versions, data
        curves.png, neighbours.png, hypergraph.png, embedding.png

Every file appears whole or not at all. After an epoch last.pth is written first. If a kill, or a full disk, keeps the
other files from following, they are made from it when the run is resumed.
"""

import contextlib
import fcntl
import itertools
import json
import math
import os
import platform
import shlex
import shutil
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
import net
import pictures
import summary
import torch
import tracking
from refused import Refused
from summary import environment
from tqdm import tqdm

# What last.pth holds beside what every checkpoint does.
PROGRESS = {"criterion_state_dict", "optimizer_state_dict", "scheduler_state_dict", "random_states", "history", "best"}
LOCK = ".lock"  # file in a run's folder that its process holds
OF_THE_CALL = {"resume", "overwrite", "run_num", "allow_changed_images"}  # flags that a resumption does not change

# ---------------------------------------------------------------- flags of a run, new or resumed


def parse_flags(locks: contextlib.ExitStack) -> tuple[Namespace, dict | None]:
    """(flags, the last.pth of the run to resume or None).

    The run's folder is locked, until `locks` closes, before last.pth is read: nobody else takes the run further.
    Raises Refused or OSError where flags and run do not fit each other.
    """
    parser = flags.train_parser()
    args, given = parser.parse()
    if args.resume is None:
        if args.overwrite and "run_num" not in given:
            raise Refused("--overwrite needs --run-num N, the run to replace")
        if args.allow_changed_images:
            raise Refused("--allow-changed-images requires --resume")
        if args.dataset == "folder" and "data_root" not in given:
            raise Refused(flags.NO_FOLDER)
        args.run_num = args.run_num if "run_num" in given else None
        return args, None
    if args.overwrite:
        raise Refused("--resume and --overwrite cannot be combined")
    path = last_checkpoint(args, given)
    if path.is_file() and distributed.is_first():
        locks.callback(unlock, lock(path.parent))
    state = checkpoint.load(path)
    if missing := (PROGRESS | {"flags", "epoch"}) - state.keys():
        raise Refused(f"{path}: cannot be resumed from, it lacks {', '.join(sorted(missing))}; give a run's last.pth")
    logs = path.resolve().parent.parent.parent
    if "log_dir" in given and logs != args.log_dir.resolve():
        raise Refused(f"--log-dir {args.log_dir}: the run goes on where it lies, in {logs}: leave --log-dir out")
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
    return parser.parse([*parser.command_line(stored), *sys.argv[1:], f"--resume={path}"])[0], state


def last_checkpoint(args: Namespace, given: set[str]) -> Path:
    """The last.pth that --resume means. Raises Refused."""
    if not args.resume:
        runs = args.log_dir / args.dataset
        return (runs / f"run_{args.run_num}" if "run_num" in given else newest_run_folder(runs)) / "last.pth"
    path = Path(args.resume)
    if path.is_dir() and not (path / "last.pth").exists():
        runs = ", ".join(folder.name for folder in run_folders(path))
        there = f"it holds the runs {runs}: give one of them" if runs else "give a run's folder or its last.pth"
        raise Refused(f"--resume {path}: there is no last.pth in it; {there}")
    path = path / "last.pth" if path.is_dir() else path
    if "run_num" in given and path.absolute().parent.name != f"run_{args.run_num}":
        raise Refused(f"--resume {args.resume} names another run than --run-num {args.run_num}: leave one of them out")
    return path


def run_folders(parent: Path) -> list[Path]:
    """The folders run_N in order of N."""
    found = [path for path in parent.glob("run_*") if path.name[4:].isascii() and path.name[4:].isdigit()]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name[4:]))


def newest_run_folder(parent: Path) -> Path:
    """The run_N of the highest N that can be resumed. Raises Refused."""
    runs = [folder for folder in run_folders(parent) if (folder / "last.pth").exists()]
    if not runs:
        raise Refused(f"{parent}: no run to resume (no run_N/last.pth); give --dataset, --log-dir or --resume RUN")
    return runs[-1]


def refuse_other_data(state: dict, data: dict, args: Namespace) -> None:
    """Compare the data of a run with what is there now, fingerprint by fingerprint: {split: dataset.fingerprint(…)}.

    Another class, or another order of the classes, would pair every label with the learned mean of another class.
    Raises Refused, unless only images changed and --allow-changed-images says to go on. Then the best epoch is
    chosen among those to come: the earlier ones were scored on other images.
    """
    then = state.get("data")
    if then is None:
        print(f"warning: {args.resume} was written by an earlier version and does not say what it was trained on: not "
              "compared with the images that are there now", file=sys.stderr)  # fmt: skip
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
    """Make and return parent/run_N: the next free number, or the given one. Raises Refused if that is taken.

    Making a folder either succeeds or finds it there, so two runs that start at once never share one.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1) if run_num is None else [run_num]:
        folder = parent / f"run_{number}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise Refused(
        f"{folder} exists: give --resume to go on with it, --overwrite to replace it, "
        "or no --run-num for the next free number"
    )


def empty_folder(folder: Path) -> None:
    """Remove the files of a run that is overwritten, and what wandb keeps of it; other folders stay."""
    for path in folder.iterdir():
        if path.name == "wandb" and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK and (path.is_file() or path.is_symlink()):
            path.unlink()


def lock(folder: Path) -> TextIO:
    """Keep other processes out of a run's folder until unlock(), or until this process ends in any way.

    A lock of fcntl's lockf: unlike flock's, worker processes that outlive a killed parent do not inherit it.
    Returns what unlock() takes. Raises Refused when another process holds it.
    """
    file = open(folder / LOCK, "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "which has just begun"
        file.close()
        raise Refused(f"{folder}: another process ({owner}) is using this run") from None
    if os.fstat(file.fileno()).st_nlink == 0:  # its owner removed it between our two calls: others lock a new one
        file.close()
        return lock(folder)
    file.truncate(0)
    file.write(f"{platform.node()}, process {os.getpid()}\n")
    file.flush()
    return file


def unlock(file: TextIO) -> None:
    """Let others in, and leave nothing behind."""
    Path(file.name).unlink(missing_ok=True)
    file.close()


class Run:
    """A run's folder and state. The state is what last.pth holds; of several processes only process 0 writes it.

    parts     {'network', 'criterion', 'optimizer', 'scheduler'}: what checkpoints hold the state of
    flags, made_by, data, wandb_id     what made the run; data is {split: dataset.fingerprint(images)}
    epoch     the last completed one. Warm-up epochs count up to 0, training epochs from 1
    history   rows, from the untrained network on; best: the row of the best training epoch so far, or None
    """

    def __init__(
        self, args: Namespace, image_size: int, device: torch.device, parts: dict, data: dict, state: dict | None, locks
    ):
        """state: last.pth of the run to go on with, whose folder is locked; None for a new run. locks: an ExitStack."""
        self.args, self.device, self.parts = args, device, parts
        self.wandb, self.drawing_seconds, self.started = None, 0.0, time.monotonic()
        self.doubt = ""  # why the last scores say little
        here = {**environment(device), "command": shlex.join(sys.argv)}
        writes = distributed.is_first()
        if state is None:
            self.folder = distributed.from_all(self._new_folder(locks) if writes else None)[0]
            number = int(self.folder.name.removeprefix("run_"))
            of_the_call = {"resume": None, "overwrite": False, "run_num": number, "image_size": image_size}
            state = {"flags": flags.plain(args) | of_the_call, "data": data}
            state |= {"epoch": -args.warm, "history": [], "best": None}
        else:
            self.folder = Path(args.resume).resolve().parent
            self._restore(state)
        self.flags, self.epoch, self.best = checkpoint.stored_flags(state), state["epoch"], state["best"]
        self.history = list(state["history"])
        self.made_by, self.wandb_id = state.get("made_by") or here, state.get("wandb_id")
        self.data = state.get("data") if self.done and state.get("data") else data
        self.best_path = self.folder / checkpoint.best_name(args.dataset, args.model)
        self.results_path = self.folder / f"{self.best_path.stem}_results.txt"
        self.first_flags, self.resumptions = self.flags, []
        if args.resume:
            self._note_resumption(state, here)
        # What stamps the rows to come: this process.
        self.stamp = {"seed": args.seed, "commit": here["commit"], "torch": here["torch"]}
        if writes:
            checkpoint.remove_leftovers(self.folder)
            self._mend_best(state)
            if not (self.done and self.history):
                self.wandb = tracking.start(args, self.folder, self.flags | self.made_by, self.wandb_id)
                self.wandb_id = self.wandb.id if self.wandb else self.wandb_id
            if self._write_texts() and self.history:
                self._draw_curves()

    @property
    def done(self) -> bool:
        return self.epoch >= self.args.nb_epochs

    def _new_folder(self, locks: contextlib.ExitStack) -> Path:
        parent = self.args.log_dir / self.args.dataset
        folder = parent / f"run_{self.args.run_num}"
        overwritten = self.args.overwrite and folder.is_dir()
        folder = folder if overwritten else new_run_folder(parent, self.args.run_num)
        locks.callback(unlock, lock(folder))
        if overwritten:
            empty_folder(folder)
        return folder

    def _restore(self, state: dict) -> None:
        path = self.args.resume
        if distributed.from_all(state["epoch"])[0] != state["epoch"]:  # only process 0 locked before it read
            raise Refused(f"{path}: another process went on with this run meanwhile; give the command again")
        net.load_network_state(self.parts["network"], checkpoint.network_state(state, Path(path)), path)
        try:
            for name in ("criterion", "optimizer", "scheduler"):
                self.parts[name].load_state_dict(state[f"{name}_state_dict"])
            checkpoint.restore_random_states(state["random_states"])
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise Refused(f"{path}: does not fit this run: {' '.join(str(error).split())[:200]}") from error

    def _note_resumption(self, state: dict, here: dict) -> None:
        """What made the run first is kept; this call is listed beside it, in args.json."""
        stored, now, parser = self.flags, flags.plain(self.args), flags.train_parser()
        changed = {
            name: value
            for name, value in now.items()
            if name not in OF_THE_CALL and value != stored.get(name, parser.get_default(name))
        }
        self.flags = stored | changed
        try:
            origin = json.loads((self.folder / "args.json").read_text(encoding="utf-8"))
            listed = [entry for entry in origin.get("resumptions", []) if isinstance(entry, dict)]
            self.first_flags = dict(origin["flags"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # missing or damaged
            self.first_flags, listed = stored, []
        # A resumption that completed no epoch leaves no mark.
        self.resumptions = [entry for entry in listed if entry.get("after_epoch") != self.epoch]
        cut_short = self.done and stored.get("nb_epochs", 0) > self.epoch  # it was to be longer, and is complete now
        if self.done and not cut_short:
            return
        entry = {"after_epoch": self.epoch}
        if (then := state.get("data")) and then != self.data:
            entry["data_before"] = summary_of(then)
            self.best = None  # it was scored on other images
        self.resumptions.append(entry | {"flags": changed, **here})

    # ------------------------------------------------------------ the state, and the files that are made of it

    def add(self, row: dict) -> None:
        """Print the row of an epoch and save what it reached."""
        self.history.append(row | self.stamp)
        self.epoch = row["epoch"]
        tqdm.write(summary.console_line(row, self.args.nb_epochs))
        chosen_by = tracking.chosen_by(row)
        is_best = row["phase"] == "train" and (self.best is None or row[chosen_by] > self.best[chosen_by])
        if is_best:
            self.best = self.history[-1]
        # last.pth goes first: a best.pth that a kill or a full disk kept from following can be made from it.
        state = self.state()
        checkpoint.save(state, self.folder / "last.pth")
        if is_best:
            self._save_best(state)
        self._write_texts()
        tracking.log(self.wandb, row, self.best)

    def state(self) -> dict:
        """What last.pth holds."""
        parts = {f"{name}_state_dict": part.state_dict() for name, part in self.parts.items() if name != "network"}
        network = self.parts["network"].state_dict()
        return parts | {
            # on the CPU, for readers elsewhere that do not say where to
            "model_state_dict": {name: value.cpu() for name, value in network.items()},
            "epoch": self.epoch,
            "figures": summary.recalls(self.history[-1]),
            "flags": self.flags,
            "made_by": self.made_by,
            "data": self.data,
            "wandb_id": self.wandb_id,
            "random_states": checkpoint.random_states(),
            "history": self.history,
            "best": self.best,
        }

    def _save_best(self, state: dict) -> None:
        checkpoint.save({name: value for name, value in state.items() if name not in PROGRESS}, self.best_path)

    def _mend_best(self, state: dict) -> None:
        """Make the best checkpoint from the last one where it is missing and of that epoch; warn where it is not."""
        try:
            if self.best is None or checkpoint.load(self.best_path).get("epoch") == self.best["epoch"]:
                return
        except (OSError, Refused):
            pass  # missing or damaged
        if self.best["epoch"] == self.epoch:
            self._save_best(state)
        else:
            print(f"warning: {self.best_path} does not hold the network of epoch {self.best['epoch']}, the best so "
                  "far, which is lost", file=sys.stderr)  # fmt: skip

    def _write_texts(self) -> bool:
        """Write args.json, table and results where they are not up to date; gives whether the table was not."""
        origin = {"flags": self.first_flags, "made_by": self.made_by, "data": summary_of(self.data)}
        origin |= {"wandb_id": self.wandb_id}
        origin |= {"resumptions": self.resumptions} if self.resumptions else {}
        write_if_new(json.dumps(origin, indent=2) + "\n", self.folder / "args.json")
        if self.best:
            write_if_new(summary.results_text(self), self.results_path)
        return bool(self.history) and write_if_new(summary.csv_text(self.history), self.folder / "results.csv")

    # ------------------------------------------------------------ pictures

    def draw(self, draw: Callable[[Path, int], None]) -> None:
        """Draw the curves and the rest; anew while that takes little of the time, in full at the end.

        draw(folder, number of pictures on the map) draws the rest.
        """
        begun = time.monotonic()
        if self.drawing_seconds > 0.03 * (begun - self.started) and not self.done:
            return
        self._draw_curves()
        draw(self.folder, 2000 if self.done else 400)  # t-SNE of 2,000 takes ten seconds, of 400 one
        tracking.log_pictures(self.wandb, self.folder)
        self.drawing_seconds += time.monotonic() - begun

    def _draw_curves(self) -> None:
        """With the cross-entropy of guessing where there is an HGNN to compare with it, and the best epoch."""
        args = self.args
        title = f"{args.dataset}/{self.folder.name}: {args.model}, {args.loss}, seed {args.seed}"
        best = self.best["epoch"] if self.best else 0
        pictures.curves(self.history, self.folder / "curves.png", title=title, chance=self.chance(), best=best)

    def chance(self) -> float | None:
        """ln C, the HGNN's cross-entropy while it only guesses; None without an HGNN."""
        hgnn = self.args.loss == "hist" and self.args.ls
        return math.log(len(self.data["train"]["classes"])) if hgnn else None


def write_if_new(text: str, path: Path) -> bool:
    """Write a text file unless it holds the text already: resuming a finished run leaves its files as they are."""
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    checkpoint.write_text(text, path)
    return True


def summary_of(data: dict) -> dict:
    """The counts and digests of fingerprints, for args.json."""
    summary = {
        split: {"images": found["images"], "classes": sum(map(bool, found["sizes"])), "digest": found["digest"]}
        for split, found in data.items()
    }
    if "validation" in data:  # the seed draws the held-out classes: this one is the same for all seeds
        summary["train"]["digest_with_validation"] = dataset.digest_of_classes(data["train"], data["validation"])
    return summary
