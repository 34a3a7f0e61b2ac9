"""Trains HIST and the losses that train.py --loss knows on the glyphs, and lets report.py make the table.

Everything is that of recipes/glyphs.args for all of them; what a loss has of its own is as in its paper (losses.py).
Proxies, centres and class weights learn at the rate of HIST's class distributions, 100 times that of the network, as
Proxy-Anchor and SoftTriple publish. Losses that compare the images of a batch get four of each class in it. Nothing
was tuned for any loss.

    python benchmarks/losses.py                          # nine losses, three seeds: about an hour on two cores
    python benchmarks/losses.py --seeds 1 --epochs 1     # only to see that it works
    python benchmarks/losses.py --output my_runs         # go on where an earlier call was stopped

Runs go to OUTPUT/glyphs, the tables to OUTPUT. A run that is there already is not trained again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from measure import machine

CODE = Path(__file__).resolve().parent.parent / "code"
sys.path.insert(0, str(CODE))
import flags  # noqa: E402

PAIR_LOSSES = ("multi_similarity", "triplet", "contrastive")


def train(loss: str, seed: int, number: int, epochs: int, output: Path) -> None:
    run = output / "glyphs" / f"run_{number}"
    words = ["@recipes/glyphs.args", "--loss", loss, "--IPC", 4 if loss in PAIR_LOSSES else 0, "--seed", seed]
    words += ["--run-num", number, "--epochs", epochs, "--log-dir", output]
    if (run / "last.pth").exists():
        words = ["--resume", run / "last.pth", "--epochs", epochs]
    elif run.exists():
        words.append("--overwrite")
    print(f"\n{loss}, seed {seed}", flush=True)
    subprocess.run([sys.executable, CODE / "train.py", *map(str, words)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--losses", nargs="+", choices=flags.LOSSES, default=flags.LOSSES, help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=12, help="default: 12, as in the recipe")
    parser.add_argument("--output", type=Path, default=CODE.parent / "logs" / "losses", help="default: logs/losses")
    args = parser.parse_args()
    print(machine("cuda" if torch.cuda.is_available() else "cpu", torch.get_num_threads()))
    for seed in args.seeds:  # all losses of a seed before the next one: stopped early, the table still compares
        for loss in args.losses:
            train(loss, seed, 100 * (1 + flags.LOSSES.index(loss)) + seed, args.epochs, args.output)
    subprocess.run([sys.executable, CODE / "report.py", args.output / "glyphs", "--output", args.output], check=True)


if __name__ == "__main__":
    main()
