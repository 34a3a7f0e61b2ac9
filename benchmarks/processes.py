"""How much faster several processes train and score, one thread a process, one process a core.

    python benchmarks/processes.py                   # 1 and 2 processes: some minutes
    python benchmarks/processes.py --counts 1 2 4    # where there are four cores
    python benchmarks/processes.py --gpus            # one GPU a process

Two networks: ResNet-18 at 64 pixels, as in the first command, which computes little between two sums of its gradients
over the processes, and ResNet-50 at 224 pixels, which computes a lot. The batch is 32 (on GPUs 128, from all letters)
whatever the number of processes, each has its share of it. Efficiency: how many times faster than one process, over the
number of processes. The cores of one machine share its memory's bandwidth and have no network between them: of machines
this says nothing.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from measure import machine, table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))
from layouts import glyphs  # noqa: E402

COMMON = "--weights none --warm 0 --bn-freeze 0 --epochs 3 --amp bf16 --channels-last 1 --dataset folder"
NETWORKS = {
    "ResNet-18, 64 pixels": (200, "--model resnet18 --image-size 64"),
    "ResNet-50, 224 pixels": (20, "--model resnet50 --image-size 224"),
}  # and the number of letters, half of which train


def run(count: int, words: list[str], letters: int | None) -> pd.DataFrame:
    """The training epochs of a run on that many processes, with so many of the letters, None for all."""
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "letters")
        images.mkdir()
        for letter in sorted((glyphs.ensure_glyphs(ROOT / "data") / "images").iterdir())[:letters]:
            (images / letter.name).symlink_to(letter)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command += [str(ROOT / "code" / "train.py"), *words, "--data-root", str(images), "--log-dir", folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        rows = pd.read_csv(Path(folder, "folder", "run_1", "results.csv"))
    return rows.query("phase == 'train' and epoch > 1")  # the first epoch warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2], help="numbers of processes (default 1 2)")
    parser.add_argument("--gpus", action="store_true", help="a GPU for each process instead of a core")
    args = parser.parse_args()
    print(machine("cuda" if args.gpus else "cpu", 1) + "\n")
    lines = []
    for name, (letters, flags) in NETWORKS.items():
        first = None
        for count in args.counts:
            words, used = ["--gpu-id", "-1", "--workers", "0"], letters
            if args.gpus:  # the cores prepare images
                words, used = ["--gpu-id", "0", "--workers", str(os.cpu_count() // count), "--batch-size", "128"], None
            rows = run(count, [*COMMON.split(), *flags.split(), *words], used)
            rates = [rows["images_per_s"].median(), 1 / rows["seconds"].median()]
            first = first or (count, rates)
            faster = [rate / before for rate, before in zip(rates, first[1], strict=True)]
            share = [f"{ratio * first[0] / count:.0%}" for ratio in faster]
            line = [f"{name}, {count} process" + "es" * (count > 1), f"{rates[0]:.1f}", f"{faster[0]:.2f}", share[0]]
            lines.append([*line, f"{1 / rates[1]:.1f}", f"{faster[1]:.2f}", share[1]])
    head = ["", "training images/s", "times one", "efficiency", "s an epoch with scoring", "times one", "efficiency"]
    print(table(head, lines))


if __name__ == "__main__":
    main()
