"""Train a recipe with several seeds, and put the runs into report.py's table.

    python code/reproduce.py glyphs                      # seeds 1 to 5; called again, it goes on where it was
    python code/reproduce.py cub --without-hypergraph    # also each seed with --ls 0, and the difference
    python code/reproduce.py SOP --gpus 0 1 2 3          # one run on each GPU
    python code/reproduce.py cars --seeds 1 2 3 -- --data-root /data
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
from queue import SimpleQueue

import dataset
import flags
import pandas as pd
from refused import Refused
from scipy.stats import ttest_1samp

RECIPES = {path.stem: path for path in sorted((flags.CODE / "recipes").glob("*.args"))}
OURS = {"seed", "log_dir", "run_num", "resume", "overwrite"}  # flags of train.py that this script sets


class Run:
    """A recipe with one seed: its flags, its folder, and the command line that it still takes."""

    def __init__(self, words: list[str], seed: int, logs: Path):
        parser = flags.train_parser()
        self.words = [*words, "--seed", str(seed), "--log-dir", str(logs), "--run-num", str(seed)]
        self.args = parser.parse(self.words)[0]
        self.folder = logs / self.args.dataset / f"run_{seed}"
        self.finished = False
        if (self.folder / "last.pth").exists():
            made_by = self.folder / "args.json"
            names = set(vars(self.args)) - flags.BOOKKEEPING - {"image_size"} * (self.args.image_size is None)
            parser.refuse_changes(self.args, names, json.loads(made_by.read_text())["flags"], made_by)
            self.finished = pd.read_csv(self.folder / "results.csv")["epoch"].max() >= self.args.nb_epochs

    def command(self, gpu: int | None = None) -> list[str]:
        words = self.words + ["--overwrite"] * self.folder.exists()  # of a run that has not come to saving anything
        if (self.folder / "last.pth").exists():
            words = ["--resume", str(self.folder)]
        return [sys.executable, str(flags.CODE / "train.py"), *words, *(["--gpu-id", str(gpu)] * (gpu is not None))]


class Work:
    """Runs one after another, or one on each GPU; SIGTERM and Ctrl-C stop those under way after their batch."""

    def __init__(self, runs: list[Run], gpus: list[int | None]):
        self.runs, self.gpus, self.free = runs, gpus, SimpleQueue()
        self.stopped_by, self.processes, self.failed, self.seconds = 0, [], [], []
        for gpu in gpus:
            self.free.put(gpu)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, number: int, frame) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL if self.stopped_by else signal.SIGTERM)
        self.stopped_by = number

    def do(self) -> None:
        with ThreadPoolExecutor(len(self.gpus)) as pool:
            list(pool.map(self.train, range(1, len(self.runs) + 1), self.runs))

    def train(self, number: int, run: Run) -> None:
        if self.stopped_by:
            return
        gpu, started, last = self.free.get(), time.monotonic(), ""
        rest = f"; {self.rest()} to go" if self.seconds else ""
        print(f"run {number} of {len(self.runs)}: {run.folder}{rest}", flush=True)
        # In a session of its own, Ctrl-C reaches a run through this process alone.
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        options |= dict(start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        process = subprocess.Popen(run.command(gpu), **options)
        self.processes.append(process)
        if self.stopped_by:  # while it was started
            process.terminate()
        for line in process.stdout:
            last = line.strip() or last
            print(f"{run.folder.name}: " * (len(self.gpus) > 1) + line, end="", flush=True)
        if process.wait() and not self.stopped_by:
            self.failed.append(f"{run.folder}: {last}")
        self.processes.remove(process)
        self.seconds.append(time.monotonic() - started)
        self.free.put(gpu)

    def rest(self) -> str:
        left = (len(self.runs) - len(self.seconds)) * sum(self.seconds) / len(self.seconds) / len(self.gpus)
        return f"about {left / 3600:.1f} hours" if left > 5400 else f"about {left / 60:.0f} minutes"


def main() -> None:
    parser = flags.Parser(__doc__.partition("\n\n")[0], epilog="Flags of train.py behind -- go to every run.")
    names = ", ".join(RECIPES)
    parser.add_argument("recipe", type=str.lower, choices=RECIPES, metavar="RECIPE", help=f"one of {names}")
    parser.add_argument("--seeds", nargs="+", type=flags.whole(1), default=[1, 2, 3, 4, 5], metavar="N")
    parser.add_argument("--without-hypergraph", action="store_true", help="also train each seed with --ls 0")
    parser.add_argument("--gpus", nargs="+", type=flags.whole(0), default=[None], metavar="N", help="a run on each")
    parser.add_argument("--print", action="store_true", help="only print the command lines of what is not finished")
    logs = flags.CODE.parent / "logs" / "reproduce"
    parser.add_argument("--log-dir", type=Path, default=logs, metavar="DIR", help="where the runs are kept")
    words = sys.argv[1:]
    own = words.index("--") if "--" in words else len(words)
    args, further = parser.parse_args(words[:own]), words[own + 1 :]

    # The runs, and what is left of them
    words = [f"@{RECIPES[args.recipe]}", *further]
    if given := flags.train_parser().parse(further)[1] & OURS:
        raise Refused(f"--{min(given).replace('_', '-')} is set by this script; leave it out behind --")
    sides = [(args.log_dir.absolute() / args.recipe, words)]
    if args.without_hypergraph:
        sides.append((sides[0][0].with_name(f"{args.recipe}_without_hypergraph"), [*words, "--ls", "0"]))
    runs = [Run(words, seed, logs) for seed in dict.fromkeys(args.seeds) for logs, words in sides]
    left = [run for run in runs if not run.finished]
    if args.print:
        print("".join(f"{shlex.join(run.command())}\n" for run in left), end="")
        return

    # Train them. What train.py would say of the data, it would say of each run.
    first = runs[0].args
    dataset.load_benchmark(first.dataset, first.data_root, first.train_classes)
    print(f"{args.recipe}: {len(runs) - len(left)} of {len(runs)} runs are finished", flush=True)
    work = Work(left, args.gpus)
    work.do()
    if work.stopped_by:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + work.stopped_by)

    # The table
    folders = [logs / first.dataset for logs, _ in sides]
    output = sides[0][0]
    done = subprocess.run([sys.executable, str(flags.CODE / "report.py"), *folders, "--output", output])
    if args.without_hypergraph and not done.returncode:
        compare(pd.read_csv(output / "report.csv"), *map(str, folders))
    for line in work.failed:
        print(f"failed: {line}", file=sys.stderr)
    sys.exit(1 if work.failed else done.returncode)


def compare(table: pd.DataFrame, whole: str, without: str) -> None:
    """Print what the hypergraph changes: the mean over pairs of runs of one seed, and its 95 % interval (t)."""
    for epoch, column in (("best", "R@1 (%)"), ("last", "last R@1 (%)")):
        sides = [table[table["dataset"] == folder].set_index("seed")[column] for folder in (whole, without)]
        pairs = (sides[0] - sides[1]).dropna()
        said = f"R@1 with the hypergraph minus without, at the {epoch} epochs: {pairs.mean():+.2f} points"
        if len(pairs) > 1:
            low, high = ttest_1samp(pairs, 0).confidence_interval()
            said += f" ({len(pairs)} pairs of seeds, 95 % interval {low:+.2f} to {high:+.2f})"
        print(said)


if __name__ == "__main__":
    flags.run_script(main)
