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

import atexit
import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import checkpoint
import dataset
import distributed
import flags
import net
import pictures
import summary
import tracking
from refused import Refused, one_line, warn_once
from tqdm import tqdm

# What a run carries from one process to the next, each an attribute of Run and an entry of last.pth
CARRIED = ("flags", "made_by", "data", "wandb_id", "epoch", "history", "best", "first_flags", "resumptions")
# What last.pth holds beside what every checkpoint does
PROGRESS = {"criterion_state_dict", "optimizer_state_dict", "scheduler_state_dict", "random_states"}
PAST = {"first_flags", "resumptions"}
PROGRESS |= {"history", "best", *PAST}
LOCK = ".lock"  # file in a run's folder that its process holds
# Flags that a resumption does not change
OF_THE_CALL = {"resume", "overwrite", "run_num", "log_dir", "allow_changed_images"}


def parse_flags() -> tuple[Namespace, dict | None]:
    """(flags, the last.pth of the run to resume or None).

    The run's folder is locked before last.pth is read: nobody else takes the run further.
    Raises Refused or OSError where flags and run do not fit each other.
    """
    parser = flags.train_parser()
    args, given = parser.parse()
    if args.overwrite and (args.resume is not None or "run_num" not in given):
        raise Refused("--overwrite needs --run-num N, the run to replace, and cannot be combined with --resume")
    if args.resume is None:
        if args.allow_changed_images:
            raise Refused("--allow-changed-images requires --resume")
        if args.dataset == "folder" and "data_root" not in given:
            raise Refused(flags.NO_FOLDER)
        args.run_num = args.run_num if "run_num" in given else None
        return args, None
    path = last_checkpoint(args, given)
    if distributed.is_first():
        lock(path.parent)
    state = checkpoint.load(path)
    stored = checkpoint.stored_flags(state)
    if missing := (PROGRESS | {"flags", "epoch", "data"}) - PAST - state.keys():
        raise Refused(f"{path}: cannot be resumed from, it lacks {', '.join(sorted(missing))}; give a run's last.pth")
    if PAST - state.keys():  # of version 1.0.0, whose runs only have it there
        origin = {"flags": stored}
        with contextlib.suppress(OSError, ValueError):  # missing or damaged
            origin |= json.loads((path.parent / "args.json").read_text(encoding="utf-8"))
        # A resumption that completed no epoch leaves no mark.
        kept = [entry for entry in origin.get("resumptions", []) if entry["after_epoch"] != state["epoch"]]
        state |= {"first_flags": origin["flags"], "resumptions": kept}
    parser.refuse_changes(args, given - flags.BOOKKEEPING - {"nb_epochs"}, stored, path)
    return parser.parse([*parser.command_line(stored), *sys.argv[1:], f"--resume={path}"])[0], state


def last_checkpoint(args: Namespace, given: set[str]) -> Path:
    """The last.pth that --resume means: of its RUN, else of run_N of --run-num, else of the newest. Raises Refused."""
    runs = args.log_dir / args.dataset
    path = Path(args.resume) if args.resume else runs / f"run_{args.run_num}"
    if not args.resume and "run_num" not in given:
        path = next((folder for folder in reversed(run_folders(runs)) if (folder / "last.pth").exists()), path)
    path = path / "last.pth" if path.is_dir() else path
    if not path.is_file():
        raise Refused(
            f"{path}: there is no such checkpoint; --resume takes a run's folder or its last.pth, or finds the newest "
            "run of --dataset in --log-dir"
        )
    folder = path.absolute().parent
    other_run = "run_num" in given and folder.name != f"run_{args.run_num}"
    if other_run or ("log_dir" in given and folder.parent.parent.resolve() != args.log_dir.resolve()):
        raise Refused(f"--resume {args.resume}: --run-num or --log-dir name another run: leave them out")
    return path


def run_folders(parent: Path) -> list[Path]:
    """The folders run_N in order of N."""
    found = [path for path in parent.glob("run_*") if re.fullmatch("run_[0-9]+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("run_")))


def data_changes(state: dict, data: dict, args: Namespace) -> str:
    """What differs between a run's data and what is there now, {split: dataset.fingerprint(…)} both; '' if nothing.

    Another class, or another order of the classes, would pair every label with the learned mean of another class.
    Raises Refused, unless only images changed and --allow-changed-images says to go on.
    """
    empty = dict(images=0, classes=[], sizes=[], class_digests=[], digest="")
    splits = [(split, state["data"].get(split, empty), data.get(split, empty)) for split in {**state["data"], **data}]
    differing = "; ".join(f"{split}: {what}" for split, old, new in splits if (what := dataset.changes(old, new)))
    only_images = all(dataset.classes_as_now(old, new) == new["classes"] for _, old, new in splits)
    if not differing or (only_images and args.allow_changed_images):
        return differing
    way_out = "--allow-changed-images resumes anyway" if only_images else "restore it, or start a new run"
    raise Refused(f"{args.resume} was trained on other data than {args.data_root} now holds: {differing}; {way_out}")


def new_run_folder(parent: Path, run_num: int | None, overwrite: bool = False) -> Path:
    """Make, lock and return parent/run_N: the next free number, or the given one. Raises Refused if that is taken.

    Making a folder either succeeds or finds it there, so two runs that start at once never share one. overwrite clears
    the run that is there.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1) if run_num is None else [run_num]:
        folder = parent / f"run_{number}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(exist_ok=overwrite)
            lock(folder, new=True)
            clear(folder)
            return folder
    raise Refused(
        f"{folder} exists: give --resume to go on with it, --overwrite to replace it, "
        "or no --run-num for the next free number"
    )


def clear(folder: Path) -> None:
    """Remove a run's files, and what wandb keeps of it."""
    for path in folder.iterdir():
        if path.name == "wandb" and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK and (path.is_file() or path.is_symlink()):
            path.unlink()


def lock(folder: Path, new: bool = False) -> None:
    """Keep other processes out of a run's folder until this one leaves it. Raises Refused where one is in it.

    A lock of fcntl's lockf: unlike flock's, worker processes that outlive a killed parent do not inherit it. The file
    is not closed, which would end the lock. A file system without locks gets a warning.
    """
    path = folder / LOCK
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            owner = os.read(file, 1000).decode().strip() or "which has just begun"
            raise Refused(f"{folder}: another process ({owner}) is using this run") from None
        warn_once(f"{folder}: its file system has no locks ({error.strerror}): start no second process in this run")
    if os.fstat(file).st_nlink == 0:  # its owner removed it between our two calls: others lock a new one
        return lock(folder, new)
    atexit.register(leave, folder, new)
    os.truncate(file, 0)
    os.write(file, f"{platform.node()}, process {os.getpid()}\n".encode())


def leave(folder: Path, new: bool) -> None:
    """Release a run's folder; if it is a new one in which nothing was saved that could be resumed, remove it."""
    atexit.unregister(leave)  # the folder may be another process's by then
    unused = new and not (folder / "last.pth").exists()
    with contextlib.suppress(OSError):  # gone already, or holds what is not ours
        if unused:
            clear(folder)
        (folder / LOCK).unlink(missing_ok=True)
        if unused:
            folder.rmdir()


class Run:
    """A run's folder and state. The state is what last.pth holds; of several processes only process 0 writes it.

    parts     {'network', 'criterion', 'optimizer', 'scheduler'}: what checkpoints hold the state of
    flags, made_by, data, wandb_id     what made the run; data is {split: dataset.fingerprint(images)}
    first_flags, resumptions           what made it first, and what every resumption changed
    epoch     the last completed one. Warm-up epochs count up to 0, training epochs from 1
    history   rows, from the untrained network on; best: the row of the best training epoch so far, or None
    """

    def __init__(self, args: Namespace, image_size, device, parts: dict, data: dict, state: dict | None, changed=""):
        """state: last.pth of the run to go on with, whose folder is locked, or None; changed: see data_changes."""
        self.args, self.device, self.parts = args, device, parts
        self.wandb, self.drawing_seconds, self.started = None, 0.0, time.monotonic()
        self.doubt = ""  # why the last scores say little
        here = {**summary.environment(device), "command": shlex.join(sys.argv)}
        self.stamp = {"seed": args.seed, "commit": here["commit"], "torch": here["torch"]}  # of the rows to come
        if state is None:
            where = args.log_dir / args.dataset, args.run_num, args.overwrite
            self.folder = distributed.from_all(new_run_folder(*where) if distributed.is_first() else None)[0]
            number = int(self.folder.name.removeprefix("run_"))
            first = flags.plain(args) | {"overwrite": False, "run_num": number, "image_size": image_size}
            state = {"flags": first, "made_by": here, "data": data, "wandb_id": None, "epoch": -args.warm}
            state |= {"history": [], "best": None, "first_flags": first, "resumptions": []}
        else:
            self.folder = Path(args.resume).resolve().parent
            self._restore(state)
        for name in CARRIED:
            setattr(self, name, state[name])
        self.best_path = self.folder / checkpoint.best_name(args.dataset, args.model)
        if distributed.is_first():
            checkpoint.remove_leftovers(self.folder)
            self._mend_best(state)
        if args.resume:
            self._note_resumption(data, changed, here)
        if not distributed.is_first():
            return
        if not (self.done and self.history):
            self.wandb = tracking.start(args, self.folder, self.flags | self.made_by, self.wandb_id)
            self.wandb_id = self.wandb.id if self.wandb else self.wandb_id
        if self._write_texts():
            self._draw_curves()

    @property
    def done(self) -> bool:
        return self.epoch >= self.args.nb_epochs

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
            raise Refused(f"{path}: does not fit this run: {one_line(error)[:200]}") from error

    def _note_resumption(self, data: dict, data_changed: str, here: dict) -> None:
        """List this call beside what made the run first; last.pth has it from the first completed epoch on."""
        if max(self.args.nb_epochs, self.flags["nb_epochs"]) <= self.epoch:
            return  # it was complete, and stays as it is
        parser = flags.train_parser()
        changed = {
            name: value
            for name, value in flags.plain(self.args).items()
            if name not in OF_THE_CALL and value != self.flags.get(name, parser.get_default(name))
        }
        entry = {"after_epoch": self.epoch}
        if not self.done:
            if data_changed:
                entry["data_before"] = summary_of(self.data)
                self._forget_best(data_changed)
            self.data = data  # with the names that classes have now
        self.flags = self.flags | changed
        self.resumptions = [*self.resumptions, entry | {"flags": changed, **here}]

    def _forget_best(self, changed: str) -> None:
        """The best so far was scored on other images. Its checkpoint is kept, under another name."""
        kept = self.best_path.with_name(f"{self.best_path.stem}_until_epoch_{self.epoch}.pth")
        said = "the best epoch is chosen among those from here on"
        if self.best and self.best_path.exists():
            said += f"; epoch {self.best['epoch']}, the best before, is kept in {kept}"
            if distributed.is_first():
                checkpoint.write(lambda file: file.write(self.best_path.read_bytes()), kept)
        print(f"warning: the data changed since the run began ({changed}); {said}", file=sys.stderr)
        self.best = None

    def add(self, row: dict) -> None:
        """Save what an epoch reached, and print its row."""
        self.history.append(row | self.stamp)
        self.epoch = row["epoch"]
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
        tqdm.write(summary.console_line(row, self.args.nb_epochs))
        if self.wandb:
            tracking.log(self.wandb, row, self.best)

    def state(self) -> dict:
        """What last.pth holds."""
        parts = {f"{name}_state_dict": part.state_dict() for name, part in self.parts.items() if name != "network"}
        network = self.parts["network"].state_dict()
        parts["model_state_dict"] = {name: value.cpu() for name, value in network.items()}  # to be read anywhere
        carried = {name: getattr(self, name) for name in CARRIED}
        figures = summary.recalls(self.history[-1])
        return parts | carried | {"figures": figures, "random_states": checkpoint.random_states()}

    def _save_best(self, state: dict) -> None:
        checkpoint.save({name: value for name, value in state.items() if name not in PROGRESS}, self.best_path)

    def _mend_best(self, state: dict) -> None:
        """Make the best checkpoint from the last one where it is missing and of that epoch; warn where it is not."""
        with contextlib.suppress(OSError, Refused):  # missing or damaged
            if self.best is None or checkpoint.load(self.best_path).get("epoch") == self.best["epoch"]:
                return
        if self.best["epoch"] == self.epoch:
            self._save_best(state)
        else:
            print(f"warning: {self.best_path} does not hold the network of epoch {self.best['epoch']}, the best so "
                  "far, which is lost", file=sys.stderr)  # fmt: skip

    def _write_texts(self) -> bool:
        """Write args.json, table and results where they are not up to date; gives whether the table was not."""
        origin = {"flags": self.first_flags, "made_by": self.made_by, "data": summary_of(self.data)}
        origin |= {"wandb_id": self.wandb_id} | ({"resumptions": self.resumptions} if self.resumptions else {})
        checkpoint.write_text(json.dumps(origin, indent=2) + "\n", self.folder / "args.json")
        if self.best:
            checkpoint.write_text(summary.results_text(self), self.folder / f"{self.best_path.stem}_results.txt")
        return bool(self.history) and checkpoint.write_text(summary.csv_text(self.history), self.folder / "results.csv")

    def close(self) -> None:
        if self.wandb:
            tracking.finish(self.wandb)
        if distributed.is_first():
            leave(self.folder, new=self.args.resume is None)

    def draw(self, draw: Callable[[Path, int], None]) -> None:
        """Draw the curves and the rest; anew while that takes little of the time, in full at the end.

        draw(folder, number of pictures on the map) draws the rest.
        """
        begun = time.monotonic()
        if self.drawing_seconds > 0.03 * (begun - self.started) and not self.done:
            return
        self._draw_curves()
        draw(self.folder, 2000 if self.done else 400)  # t-SNE of 2,000 takes ten seconds, of 400 one
        if self.wandb:
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


def summary_of(data: dict) -> dict:
    """The counts and digests of fingerprints, for args.json."""
    summary = {
        split: {"images": found["images"], "classes": sum(map(bool, found["sizes"])), "digest": found["digest"]}
        for split, found in data.items()
    }
    if "validation" in data:  # the seed draws the held-out classes: this one is the same for all seeds
        summary["train"]["digest_with_validation"] = dataset.digest_of_classes(data["train"], data["validation"])
    return summary
