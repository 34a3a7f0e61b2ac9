"""What the benchmarks that train share: one run of train.py for each setting and seed, trained only once.

    OUTPUT/SETTING/DATASET/run_SEED

A finished run is read, not repeated; an unfinished one is resumed; one that was made with other flags is refused. So a
benchmark that was stopped goes on where it was when the same command is given again.
"""

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from measure import machine

BENCHMARKS = Path(__file__).resolve().parent
CODE = BENCHMARKS.parent / "code"
sys.path.insert(0, str(CODE))
import checkpoint  # noqa: E402
import flags  # noqa: E402
import report  # noqa: E402

# What a benchmark itself says to train.py, by destination, and so nobody may say after --.
OURS = {"seed", "run_num", "log_dir", "remark", "resume", "overwrite", "nb_epochs"}


def parser_of(description: str, output: str) -> flags.Parser:
    """The flags that these benchmarks share; output: name of their default folder under logs/."""
    parser = flags.Parser(f"{description}\n\nFlags after -- go to train.py: … -- --data-root my_data --gpu-id -1")
    parser.add_argument("--recipe", default="glyphs", help="name of a shipped recipe, or a file of flags")
    parser.add_argument("--seeds", type=flags.whole(0), nargs="+", default=[1, 2, 3], metavar="N", help="one run each")
    parser.add_argument("--epochs", type=flags.whole(1), metavar="N", help="default: those of the recipe")
    parser.add_argument("--threads", type=flags.whole(1), metavar="N", help="CPU threads of a run; default: torch's")
    parser.add_argument("--output", type=Path, default=CODE.parent / "logs" / output, help="folder of runs and tables")
    return parser


class Experiments:
    """Runs around one recipe. Raises ValueError for flags after -- that the benchmark sets itself.

    flags: those of the recipe, as train.py understands them
    """

    def __init__(self, parser: flags.Parser):
        words = sys.argv[1:]
        own, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
        self.args = parser.parse_args(own)
        self.args.seeds = list(dict.fromkeys(self.args.seeds))
        checkpoint.require_folder(self.args.output, "--output")
        self.args.output.mkdir(parents=True, exist_ok=True)
        if taken := flags.train_parser().parse(more)[1] & OURS:
            raise ValueError(
                f"the benchmark sets {', '.join(sorted(taken))} itself (--seeds, --epochs, --output): not after --"
            )
        recipe = self.args.recipe
        is_file = recipe.endswith(".args") or Path(recipe).is_file()
        self.words = [f"@{recipe}" if is_file else f"@recipes/{recipe}.args", *more]
        if self.args.epochs:
            self.words += ["--epochs", str(self.args.epochs)]
        self.flags = flags.train_parser().parse(self.words)[0]

    def folder(self, setting: str, seed: int) -> Path:
        return self.args.output / setting / self.flags.dataset / f"run_{seed}"

    def train(self, setting: str, words: list, seed: int, variant: str = "") -> list[dict] | None:
        """The training epochs of a run, rows of its results.csv; None if its training diverged.

        setting names the run's folder; words are added to the recipe's flags; variant: see variants.py.
        Raises ValueError where the run exists with other flags or with more epochs, and where train.py fails.
        """
        words = [*self.words, *map(str, words), "--seed", str(seed), "--run-num", str(seed)]
        words += ["--log-dir", str(self.args.output / setting), "--remark", setting]
        wanted, folder = flags.train_parser().parse(words)[0], self.folder(setting, seed)
        refuse_other_flags(folder, wanted)
        rows = trained_epochs(folder)
        if len(rows) > wanted.nb_epochs:
            raise ValueError(f"{folder} has {len(rows)} epochs, not {wanted.nb_epochs}: give another --output")
        if len(rows) == wanted.nb_epochs:
            return rows
        if (folder / "last.pth").exists():
            words = ["--resume", str(folder), "--epochs", str(wanted.nb_epochs)]
        elif folder.exists():
            words.append("--overwrite")  # stopped before anything was kept
        print(f"\n{setting}, seed {seed}", flush=True)
        script = [str(BENCHMARKS / "variants.py"), variant] if variant else [str(CODE / "train.py")]
        return trained_epochs(folder) if launch([sys.executable, *script, *words], self.args.threads) else None

    def evaluate(self, setting: str, seed: int, metric: str) -> dict[str, float]:
        """The scores of a run's best checkpoint by evaluate.py, kept beside it in scores.json."""
        folder, options = self.folder(setting, seed), self.flags
        path = next(folder.glob("*_best.pth"))
        scores = folder / "scores.json"
        if not scores.exists() or scores.stat().st_mtime < path.stat().st_mtime:
            words = ["--model-path", path, "--metrics", "recall", metric, "--json", scores]
            words += ["--data-root", options.data_root, "--workers", options.nb_workers, "--gpu-id", options.gpu_id]
            launch([sys.executable, str(CODE / "evaluate.py"), *map(str, words)], self.args.threads)
        return json.loads(scores.read_text())["figures"]

    def provenance(self, runs: list[list[dict]]) -> str:
        """Lines for above a table: the command, what made the runs, and this machine."""
        on_gpu = torch.cuda.is_available() and self.flags.gpu_id >= 0
        rows = [row for history in runs for row in history]
        made_by = {name: ", ".join(sorted({row.get(name, "unknown") for row in rows})) for name in report.MADE_BY}
        command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        return (
            f"`{command}`: {self.flags.dataset}, {self.flags.nb_epochs} epochs, seeds {self.args.seeds}, each run at "
            f"its best epoch. Runs made by commit {made_by['commit']}, torch {made_by['torch']}.\n"
            f"Tables by: {machine('cuda' if on_gpu else 'cpu', self.args.threads or torch.get_num_threads())}\n"
        )


def refuse_other_flags(folder: Path, wanted) -> None:
    """Raises ValueError where a run is in the folder that was made with other flags."""
    if not (folder / "args.json").exists():
        return
    stored, now = json.loads((folder / "args.json").read_text())["flags"], flags.plain(wanted)
    free = flags.BOOKKEEPING - ({"data_root"} if wanted.dataset == "folder" else set()) | {"nb_epochs"}
    changed = [
        f"{name} {stored[name]} instead of {value}"
        for name, value in now.items()
        if name in stored and name not in free and value is not None and stored[name] != value
    ]
    if changed:
        raise ValueError(f"{folder} was made with other flags ({'; '.join(changed)}): give another --output")


def trained_epochs(folder: Path) -> list[dict]:
    """The rows of a run's training epochs; none where there is no run."""
    path = folder / "results.csv"
    return [row for row in report.read_history(path) if row["phase"] == "train"] if path.exists() else []


def launch(command: list[str], threads: int | None) -> bool:
    """Run a script: True if it ended well, False if it says that training diverged. Raises ValueError otherwise.

    Ctrl-C and SIGTERM are passed on, and end the benchmark when the script has stopped.
    """
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace", env=environment)
    stopped, said = [], ""

    def pass_on(number, frame):
        stopped.append(number)
        process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    for line in process.stderr:
        said += line
        print(line, end="", file=sys.stderr, flush=True)
    code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if stopped:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + stopped[0])
    if code and "training diverged" not in said:
        raise ValueError(f"exit status {code} of {shlex.join(command)}")
    return code == 0


def best(rows: list[dict]) -> dict:
    """The epoch that train.py chooses: by the held-out classes if there are any, else by the test split."""
    return max(rows, key=lambda row: row["val R@1" if "val R@1" in row else "R@1"])


def mean_std(values: list[float]) -> str:
    """Shares in percent: mean ± standard deviation (n - 1), the mean only for one value, 'diverged' for none."""
    if not values:
        return "diverged"
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{spread}"
