"""What recording a run costs: seconds of a glyph epoch that go into the log, beside checkpoints and pictures.

Runs train.py's own main on the first command's recipe with wandb offline and a terminal to draw progress bars on, and
adds up the time inside the functions that record. Differences between whole runs would drown in noise.

    python benchmarks/run_log.py                # three epochs: under a minute on two cores
"""

import io
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from measure import machine, table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))
import checkpoint  # noqa: E402
import distributed  # noqa: E402
import run  # noqa: E402
import train  # noqa: E402

PIECES = {
    "loss and terms read, progress bar (every step)": [
        (distributed, "to_host"),
        (tqdm, "set_postfix"),
        (tqdm, "update"),
    ],
    "console, results.csv, text files": [(run, "console_line"), (tqdm, "write"), (run, "csv_text")]
    + [(checkpoint, "write_text")],
    "wandb offline": [(run, "log_to_wandb")],
    "checkpoints (last.pth, best)": [(checkpoint, "save")],
    "pictures": [(run.Run, "draw")],
}
LOG = 3  # how many of them are the log


class Terminal(io.StringIO):
    def isatty(self):
        return True


def time_calls(owner, name: str, spent: dict, piece: str) -> None:
    """Let every call of owner.name add its seconds to spent[piece]."""
    function = getattr(owner, name)

    def timed(*arguments, **options):
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent[piece] += time.perf_counter() - started

    setattr(owner, name, timed)


def main() -> None:
    epochs, spent = 3, dict.fromkeys(PIECES, 0.0)
    for piece, functions in PIECES.items():
        for owner, name in functions:
            time_calls(owner, name, spent, piece)
    with tempfile.TemporaryDirectory() as logs:
        sys.argv = ["train.py", "@recipes/glyphs.args", "--epochs", str(epochs), "--log-dir", logs]
        sys.argv += ["--wandb", "offline", "--gpu-id", "-1"]
        stderr, sys.stderr = sys.stderr, Terminal()
        try:
            train.main()
        finally:
            sys.stderr = stderr
        rows = pd.read_csv(Path(logs) / "glyphs" / "run_1" / "results.csv").query("phase == 'train'")
    seconds = rows["seconds"].sum()  # training and scoring of the epochs, without what comes behind
    print("\n" + machine("cpu", torch.get_num_threads()))
    print(f"{epochs} epochs of {seconds / epochs:.1f} s\n")
    lines = [[piece, f"{1000 * s / epochs:.1f}", f"{s / seconds:.2%}"] for piece, s in spent.items()]
    log = sum(list(spent.values())[:LOG])
    lines.insert(LOG, ["**the log in all**", f"{1000 * log / epochs:.1f}", f"{log / seconds:.2%}"])
    print(table(["", "ms an epoch", "of the epoch"], lines))


if __name__ == "__main__":
    main()
