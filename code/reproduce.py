"""Train a recipe with several seeds, and put the runs into report.py's table.

    python code/reproduce.py glyphs                      # seeds 1 to 5; called again, it goes on where it was
    python code/reproduce.py cub --without-hypergraph    # also each seed with --ls 0, and the difference
    python code/reproduce.py SOP --gpus 0 1 2 3 -- --data-root /data   # one run on each GPU
    python code/reproduce.py cub --print                 # the command lines, one each, for xargs or a batch system

The runs are those of train.py, in logs/reproduce/RECIPE/DATASET/run_SEED, with --ls 0 below RECIPE_without_hypergraph.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dataset
import flags
import pandas as pd
from refused import Refused
from scipy.stats import ttest_1samp

RECIPES = {path.stem: path for path in sorted((flags.CODE / "recipes").glob("*.args")) if path.stem != "pictures"}
TRAIN, REPORT = flags.CODE / "train.py", flags.CODE / "report.py"
PYTHON = (sys.executable, "-u")  # what it prints is passed on line by line


def plan(logs: Path, words: list[str], seed: int) -> tuple[Path, list[str]]:
    """(folder, command line) of a run, none if it is finished. Raises Refused if it was trained with other flags."""
    parser = flags.train_parser()
    words = [*words, "--seed", str(seed), "--log-dir", str(logs), "--run-num", str(seed)]
    args = parser.parse(words)[0]
    folder = logs / args.dataset / f"run_{seed}"
    if (folder / "last.pth").exists():
        made_by = folder / "args.json"
        origin = json.loads(made_by.read_text(encoding="utf-8"))
        names = {name for name, value in vars(args).items() if value is not None} - flags.BOOKKEEPING
        names |= {"image_size"} if "--image-size" in origin["made_by"]["command"] else set()  # not that of the network
        parser.refuse_changes(args, names, origin["flags"], made_by)
        results = folder / "results.csv"
        if results.exists() and pd.read_csv(results)["epoch"].max() >= args.nb_epochs:
            return folder, []
        words += ["--resume", str(folder)]
    elif folder.exists():  # killed before it saved anything
        words.append("--overwrite")
    return folder, [*PYTHON, str(TRAIN), *words]


class Work:
    """Runs one after another, or on each GPU. A signal stops those under way after their batch, a second Ctrl-C now."""

    def __init__(self, runs: list[tuple[Path, list[str]]], gpus: list[int | None]):
        self.left, self.count, self.gpus = iter(enumerate(runs)), len(runs), gpus
        self.stopped_by, self.processes, self.seconds, self.failed = 0, [], [], []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
                signal.signal(number, self.stop)
        with ThreadPoolExecutor(len(gpus)) as pool:
            list(pool.map(self.train, gpus))

    def stop(self, number: int, frame=None) -> None:
        again, self.stopped_by = number == self.stopped_by == signal.SIGINT, number
        for process in [*self.processes]:  # train() stops those that start now
            process.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    def train(self, gpu: int | None) -> None:
        # Of a session of its own, a run gets Ctrl-C through this process alone. Runs side by side share /dev/shm.
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        options |= dict(start_new_session=True, env=os.environ | {"LOCAL_WORLD_SIZE": str(len(self.gpus))})
        for number, (folder, command) in self.left:
            if self.stopped_by:
                return
            started, last, rest = time.monotonic(), "", ""
            if self.seconds:
                mean = sum(self.seconds) / len(self.seconds) / len(self.gpus)
                rest = f", about {(self.count - len(self.seconds)) * mean / 60:.0f} minutes to go"
            print(f"run {number + 1} of {self.count}{rest}: {folder}", flush=True)
            with subprocess.Popen(command + ["--gpu-id", str(gpu)] * (gpu is not None), **options) as process:
                self.processes.append(process)
                if self.stopped_by:  # while it was started
                    process.terminate()
                for line in process.stdout:
                    last = line.strip() or last
                    print(f"{folder.name}: " * (len(self.gpus) > 1) + line, end="", flush=True)
            if process.returncode and not self.stopped_by:
                self.failed.append(f"{folder}: {last}")
            self.seconds.append(time.monotonic() - started)


def compare(table: pd.DataFrame, whole: str, without: str) -> None:
    """Print what the hypergraph changes: the mean over pairs of runs of one seed, and its 95 % interval (t)."""
    for epoch, column in (("best", "R@1 (%)"), ("last", "last R@1 (%)")):
        sides = [table[table["dataset"] == folder].set_index("seed")[column] for folder in (whole, without)]
        pairs = (sides[0] - sides[1]).dropna()
        said = f"R@1 with the hypergraph minus without, at the {epoch} epochs: "
        said += f"{pairs.mean():+.2f} points" if len(pairs) else "no seed was trained in both ways"
        if len(pairs) > 1:
            low, high = ttest_1samp(pairs, 0).confidence_interval()
            said += f" ({len(pairs)} pairs of seeds, 95 % interval {low:+.2f} to {high:+.2f})"
        print(said)


def main() -> None:
    parser = flags.Parser(__doc__.partition("\n")[0], epilog="Flags of train.py after -- go to every run.")
    names, logs = ", ".join(RECIPES), flags.CODE.parent / "logs" / "reproduce"
    parser.add_argument("recipe", type=str.lower, choices=RECIPES, metavar="RECIPE", help=f"one of {names}")
    parser.add_argument("--seeds", nargs="+", type=flags.whole(1), default=[1, 2, 3, 4, 5], metavar="N", help="which")
    parser.add_argument("--without-hypergraph", action="store_true", help="also train each seed with --ls 0")
    parser.add_argument("--gpus", nargs="+", type=flags.whole(0), metavar="N", help="a run on each of these GPUs")
    parser.add_argument("--print", action="store_true", help="only print the command lines of what is not finished")
    parser.add_argument("--log-dir", type=Path, default=logs, metavar="DIR", help="where the runs are kept")
    words = [*sys.argv[1:], "--"]
    args, further = parser.parse_args(words[: words.index("--")]), words[words.index("--") + 1 : -1]

    # The runs, and what is left of them
    words, logs = [f"@{RECIPES[args.recipe]}", *further], args.log_dir.resolve() / args.recipe
    first, given = flags.train_parser().parse(words)
    if ours := given & {"seed", "log_dir", "run_num", "resume", "overwrite"}:
        raise Refused(f"--{min(ours).replace('_', '-')} is set by this script, leave it out")
    sides = {logs: words}
    if args.without_hypergraph:
        sides[logs.with_name(f"{args.recipe}_without_hypergraph")] = [*words, "--ls", "0"]
    runs = [plan(*side, seed) for seed in dict.fromkeys(args.seeds) for side in sides.items()]
    left = [run for run in runs if run[1]]
    if args.print:
        return print("".join(f"{shlex.join(command)}\n" for _, command in left), end="")

    # Train. What train.py would say of the data, it would say for each run.
    dataset.load_benchmark(first.dataset, first.data_root, first.train_classes)
    print(f"{args.recipe}: {len(runs) - len(left)} of {len(runs)} runs are finished", flush=True)
    work = Work(left, args.gpus or [None])
    if work.stopped_by:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + work.stopped_by)

    # The table
    folders = [str(side / first.dataset) for side in sides]
    report = subprocess.run([*PYTHON, str(REPORT), *folders, "--output", str(logs)])
    if args.without_hypergraph and report.returncode == 0:
        compare(pd.read_csv(logs / "report.csv"), *folders)
    print("".join(f"failed: {line}\n" for line in work.failed), end="", file=sys.stderr)
    sys.exit(1 if work.failed else report.returncode)


if __name__ == "__main__":
    flags.run_script(main)
