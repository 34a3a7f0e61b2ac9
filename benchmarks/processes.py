"""How much faster several processes train and score: the glyph recipe, one thread a process, one process a core.

    python benchmarks/processes.py                   # 1 and 2 processes
    python benchmarks/processes.py --counts 1 2 4    # where there are four cores
    python benchmarks/processes.py --gpus            # one GPU a process

The batch is the same whatever the number of processes, so that each has its share of it. Efficiency: how many times
faster than one process, over the number of processes. On GPUs the number of processes is that of GPUs. Cores of one
machine share its memory's bandwidth and have no network between them: of machines this says nothing.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from measure import machine, table

TRAIN = Path(__file__).resolve().parent.parent / "code" / "train.py"


def run(count: int, words: list[str], threads: int) -> pd.DataFrame:
    """The training epochs of a run on that many processes."""
    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", TRAIN]
        command += ["@recipes/glyphs.args", "--epochs", "3", "--workers", "0", "--log-dir", logs, *words]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run([str(word) for word in command], check=True, env=environment, stdout=subprocess.DEVNULL)
        rows = pd.read_csv(Path(logs) / "glyphs" / "run_1" / "results.csv")
    return rows.query("phase == 'train' and epoch > 1")  # the first epoch warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2], help="numbers of processes (default 1 2)")
    parser.add_argument("--gpus", action="store_true", help="a GPU for each process instead of a core")
    args = parser.parse_args()
    words = [] if args.gpus else ["--gpu-id", "-1"]
    print(machine("cuda" if args.gpus else "cpu", 1) + "\n")
    lines, first = [], None
    for count in args.counts:
        rows = run(count, words, threads=1)
        rate, seconds = rows["images_per_s"].median(), rows["seconds"].median()
        first = first or (count, rate, seconds)
        faster = [rate / first[1], first[2] / seconds]
        share = [f"{ratio * first[0] / count:.0%}" for ratio in faster]
        lines.append([str(count), f"{rate:.0f}", f"{faster[0]:.2f}", share[0], f"{seconds:.1f}", f"{faster[1]:.2f}"])
        lines[-1].append(share[1])
    head = ["processes", "training images/s", "times one", "efficiency", "s an epoch with scoring", "times one"]
    print(table([*head, "efficiency"], lines))


if __name__ == "__main__":
    main()
