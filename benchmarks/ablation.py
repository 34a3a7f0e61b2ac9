"""The replication study's ablations: one setting at a time around a recipe, beside its figures for Cars-196.

    python benchmarks/ablation.py                                    # the recipe and 23 settings, 3 seeds: hours
    python benchmarks/ablation.py --only tau,layers --seeds 1        # two of the tables
    python benchmarks/ablation.py --recipe emoji --epochs 4          # other data, shorter
    python benchmarks/ablation.py --recipe cars -- --data-root DIR   # the study's own data; flags of train.py after --

Runs go to OUTPUT/SETTING, the tables to OUTPUT/ablation_DATASET.md. Stopped, the same command goes on (see
experiments.py). Layers and distances are not flags of train.py: variants.py runs it with another class in hist.py, and
says which forms of the distances are compared. A batch of another size also makes for another number of steps; no rate
is adapted to it.
"""

import argparse
import itertools
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import experiments
from measure import table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))
import checkpoint  # noqa: E402
import flags  # noqa: E402


class Axis(NamedTuple):
    """What is varied, and what was published about it."""

    destination: str  # of the flag in train.py, or what variants.py calls it
    flag: str  # empty: a variant
    values: tuple
    published: dict = {}  # R@1 in percent by value
    claim: str = ""  # what was published instead of figures
    pairs: tuple = ()  # and the pairs (better, worse) that it comes to


# Yuan and Le-Phuoc, ReScience C / MLRC 2022, zenodo 8173666: Cars-196, ResNet-50, R@1. Of the study's tables of two
# axes these are the lines through lambda_s 1, tau 32, 512 dimensions and 512 hidden units. It has no figures for alpha.
AXES = {
    "alpha": Axis("alpha", "--alpha", (0.5, 0.9, 1.4, 2, 3)),
    "tau": Axis("tau", "--tau", (8, 16, 24, 32), {8: 80.21, 24: 89.52, 32: 89.41}),
    "ls": Axis("ls", "--ls", (0, 0.6, 1, 1.5), {0.6: 89.74, 1: 89.41, 1.5: 88.71}),
    "hidden": Axis("hgnn_hidden", "--hgnn-hidden", (256, 512, 1024), {256: 87.21, 512: 90.22, 1024: 89.41}),
    "embedding": Axis("sz_embedding", "--embedding-size", (256, 512, 1024), {256: 88.53, 512: 90.22, 1024: 89.48}),
    "batch": Axis(
        "sz_batch", "--batch-size", (8, 16, 32, 64), {},
        "below 16 it drops, from 32 on it is flat", ((16, 8), (32, 8), (64, 8)),
    ),
    "layers": Axis(
        "layers", "", (1, 2, 3, 4), {},
        "three and more are about 3 points below two", ((2, 3), (2, 4)),
    ),
    "distance": Axis(
        "distance", "", ("euclidean", "cosine", "mahalanobis"),
        {"euclidean": 87.2, "cosine": 88.7, "mahalanobis": 90.2},
    ),
}  # fmt: skip
PAPERS_OWN = {"layers": 2, "distance": "mahalanobis"}  # what train.py does without a variant


def names(text: str) -> list[str]:
    """'tau,Alpha' -> ['tau', 'alpha'], a flag type."""
    found = list(dict.fromkeys(name for name in text.lower().replace(" ", "").split(",") if name))
    if not found or not set(found) <= AXES.keys():
        raise argparse.ArgumentTypeError(f"{text!r}: give some of {','.join(AXES)}")
    return found


class Setting(NamedTuple):
    value: float | str
    text: str
    name: str  # of its runs' folder; 'base' for the recipe as it is, which the axes share
    words: list[str]  # flags of train.py
    variant: str  # or an argument of variants.py


def settings(axis: str, base: dict) -> list[Setting]:
    """The settings of an axis, the recipe's own among them; base: values of the recipe by destination."""
    destination, flag, values = AXES[axis][:3]
    usual, made = base[destination], []
    for value in values if usual in values else sorted({*values, usual}):
        text = value if isinstance(value, str) else f"{value:g}"
        name, words, variant = f"{axis}={text}", [flag, text] if flag else [], "" if flag else f"{axis}={text}"
        made.append(Setting(value, text, *(("base", [], "") if value == usual else (name, words, variant))))
    return made


def section(axis: str, base: dict, recalls: dict[str, list[float]]) -> str:
    """The Markdown table of an axis, and how many pairs of its settings come in the published order.

    recalls: R@1 of the seeds that did not diverge, by name of the setting
    """
    published, claim, pairs = AXES[axis][3:]
    lines, means = [], {}
    for value, text, name, *_ in settings(axis, base):
        if recalls[name]:
            means[value] = statistics.mean(recalls[name])
        label = text + " (the recipe)" * (name == "base")
        figure = f"{published[value]:g}" if value in published else "–"
        lines.append([label, experiments.mean_std(recalls[name]), str(len(recalls[name])), figure])
    if not pairs:
        pairs = [(a, b) for a, b in itertools.permutations(published, 2) if published[a] > published[b]]
    same = sum(means[better] > means[worse] for better, worse in pairs if {better, worse} <= means.keys())
    said = f"Published for Cars-196: {claim}. " if claim else ""
    if pairs:
        order = "yes" if same == len(pairs) else "no"
        said += f"Same order: {order}, {same} of {len(pairs)} pairs of settings."
    else:
        said += "No figures are published."
    head = [axis, "R@1, mean ± std", "seeds", "replication, Cars-196"]
    return f"## {axis}\n\n{table(head, lines)}\n\n{said}\n"


def main() -> None:
    parser = experiments.parser_of(__doc__.splitlines()[0], "ablation")
    parser.add_argument("--only", type=names, default=",".join(AXES), metavar="AXIS,…", help="the tables to make")
    bench = experiments.Experiments(parser)
    if bench.flags.loss != "hist":
        raise ValueError(f"--loss {bench.flags.loss}: these are ablations of hist")
    base, runs = vars(bench.flags) | PAPERS_OWN, {}
    for seed in bench.args.seeds:  # all settings of a seed before the next one: stopped early, the tables still compare
        for axis in bench.args.only:
            for _, _, name, words, variant in settings(axis, base):
                if (name, seed) not in runs:
                    runs[name, seed] = bench.train(name, words, seed, variant)

    recalls = {name: [] for name, _ in runs}
    for (name, _), rows in runs.items():
        if rows:
            recalls[name].append(experiments.best(rows)["R@1"])
    provenance = bench.provenance([rows for rows in runs.values() if rows])
    text = "\n".join([provenance, *(section(axis, base, recalls) for axis in bench.args.only)])
    checkpoint.write_text(text, bench.args.output / f"ablation_{bench.flags.dataset}.md")
    print(f"\n{text}")


if __name__ == "__main__":
    flags.run_script(main)
