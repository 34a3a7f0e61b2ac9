"""HIST, HIST without its HGNN, and the losses that train.py --loss knows, under the same conditions on one recipe.

    python benchmarks/losses.py                             # ten losses, three seeds: over an hour on two cores
    python benchmarks/losses.py --search                    # each loss at its own learning rates: about three hours
    python benchmarks/losses.py --recipe emoji --search     # with pretrained weights
    python benchmarks/losses.py --losses hist hist_without_hgnn --seeds 1 2 3 4 5
    python benchmarks/losses.py -- --gpu-id -1              # flags of train.py after --

Everything is that of the recipe for all of them; what a loss has of its own is as in its paper (code/losses.py). Losses
that compare the images of a batch get four of each class in it. Without --search all train at the recipe's rates.

--search tries five pairs of rates for every loss: each of LR_DS with the recipe's --lr, then the best of them with
LR_FACTORS times that --lr. The losses without parameters of their own have no --lr-ds and get the five values of
PAIR_LR_FACTORS instead. A try is a whole run that holds out 30 % of the training classes (val R@1 at its best epoch
counts) with seed 100, which no reported run has; --search-epochs makes it shorter. Then the losses train on all
training classes, at the rates found, once for each of --seeds.

Runs go to OUTPUT/LOSS and OUTPUT/search, the tables to OUTPUT/losses_DATASET.md. Stopped, the same command goes on (see
experiments.py). On a machine with few cores, two of these at a time with --threads 1, one --output and different
--losses train faster than one after the other; the same command with all losses then makes the table.
"""

import statistics
import sys
from pathlib import Path

import experiments
from experiments import mean_std
from measure import table
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))
import checkpoint  # noqa: E402
import dataset  # noqa: E402
import flags  # noqa: E402
from train import PAIR_LOSSES  # noqa: E402

ENTRIES = {"hist": ["--loss", "hist"], "hist_without_hgnn": ["--loss", "hist", "--ls", 0]}
ENTRIES |= {loss: ["--loss", loss, *(["--IPC", 4] * (loss in PAIR_LOSSES))] for loss in flags.LOSSES[1:]}
LR_DS, LR_FACTORS, PAIR_LR_FACTORS = (1e-3, 1e-2, 1e-1), (0.3, 3), (0.1, 0.3, 1, 3, 10)
SEARCH_SEED, HELD_OUT = 100, 0.3


def recipe_rates(loss: str, recipe) -> dict[str, float]:
    return {"lr": recipe.lr} if loss in PAIR_LOSSES else {"lr": recipe.lr, "lr-ds": recipe.lr_ds}


def train(bench: experiments.Experiments, loss: str, rates: dict[str, float], seed: int, held_out: float | None = None):
    """The training epochs of a run (None if it diverged); its setting is named after loss and rates."""
    words = ENTRIES[loss] + [f"--{name}={rate:g}" for name, rate in rates.items()]
    if held_out is not None:
        words += ["--val-classes", held_out, "--epochs", bench.args.search_epochs or bench.flags.nb_epochs]
    return bench.train(setting(loss, rates, held_out), words, seed)


def setting(loss: str, rates: dict[str, float], held_out: float | None = None) -> str:
    name = "_".join([loss, *(f"{name}={rate:g}" for name, rate in rates.items())])
    return name if held_out is None else f"search/{name}"


def search(bench: experiments.Experiments, loss: str) -> dict[str, float]:
    """The rates with the best val R@1 among five. Raises ValueError if training diverges at all of them."""
    recipe, reached = recipe_rates(loss, bench.flags), []

    def best_of(tries: list[dict[str, float]]) -> dict[str, float]:
        for rates in tries:
            if rows := train(bench, loss, rates, SEARCH_SEED, HELD_OUT):
                reached.append((experiments.best(rows)["val R@1"], rates))
        return max(reached, key=lambda pair: pair[0])[1] if reached else recipe

    if loss in PAIR_LOSSES:
        chosen = best_of([{"lr": factor * recipe["lr"]} for factor in PAIR_LR_FACTORS])
    else:
        chosen = best_of([recipe | {"lr-ds": rate} for rate in LR_DS])
        chosen = best_of([chosen | {"lr": factor * recipe["lr"]} for factor in LR_FACTORS])
    if not reached:
        raise ValueError(f"{loss}: training diverged at every learning rate that --search tries")
    return chosen


def line(bench: experiments.Experiments, loss: str, rates: dict[str, float], runs: dict[int, list[dict]]) -> list[str]:
    """The row of a loss: R@K, MAP@R, seconds an epoch, its rates, and how many seeds did not diverge."""
    bests = [experiments.best(rows) for rows in runs.values()]
    recalls = [mean_std([best[f"R@{k}"] for best in bests]) for k in dataset.recall_at(bench.flags.dataset)[:3]]
    scores = [bench.evaluate(setting(loss, rates), seed, "map")["MAP@R"] for seed in runs]
    seconds = [row["seconds"] for rows in runs.values() for row in rows]
    speed = f"{statistics.median(seconds):.1f}" if seconds else "–"
    chosen = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    return [loss, *recalls, mean_std(scores), speed, chosen, str(len(runs))]


def difference(first: dict[int, list[dict]], second: dict[int, list[dict]]) -> str:
    """R@1 of one loss less another's in points: mean over the seeds of both, and its 95 % interval by Student's t."""
    seeds = sorted(first.keys() & second.keys())
    points = [100 * (experiments.best(first[seed])["R@1"] - experiments.best(second[seed])["R@1"]) for seed in seeds]
    if len(points) < 2:
        return "at least two seeds of both are needed"
    mean, error = statistics.mean(points), statistics.stdev(points) / len(points) ** 0.5
    reach = stats.t.ppf(0.975, len(points) - 1) * error
    return f"{mean:+.2f} points, 95 % interval {mean - reach:+.2f} to {mean + reach:+.2f} (n = {len(points)})"


def main() -> None:
    parser = experiments.parser_of(__doc__.splitlines()[0], "losses")
    parser.add_argument("--losses", nargs="+", choices=ENTRIES, default=list(ENTRIES), metavar="NAME", help="which")
    parser.add_argument("--search", action="store_true", help="first choose the learning rates of each loss")
    parser.add_argument("--search-epochs", type=flags.whole(1), metavar="N", help="of a try; default: as the runs have")
    bench = experiments.Experiments(parser)
    if bench.args.search and SEARCH_SEED in bench.args.seeds:
        raise ValueError(f"--seeds {SEARCH_SEED}: the search uses this seed, report others")
    if bench.args.search_epochs and not bench.args.search:
        raise ValueError("--search-epochs requires --search")
    rates = {loss: search(bench, loss) if bench.args.search else recipe_rates(loss, bench.flags)
             for loss in bench.args.losses}  # fmt: skip
    runs = {loss: {} for loss in rates}
    for seed in bench.args.seeds:  # all losses of a seed before the next one: stopped early, the table still compares
        for loss in rates:
            if rows := train(bench, loss, rates[loss], seed):
                runs[loss][seed] = rows

    ranked = sorted(runs, key=lambda loss: sum(experiments.best(rows)["R@1"] for rows in runs[loss].values())
                    / max(len(runs[loss]), 1), reverse=True)  # fmt: skip
    lines = [line(bench, loss, rates[loss], runs[loss]) for loss in ranked]
    head = ["loss", *(f"R@{k}" for k in dataset.recall_at(bench.flags.dataset)[:3])]
    head += ["MAP@R", "s an epoch", "rates", "seeds"]
    text = [bench.provenance([rows for seeds in runs.values() for rows in seeds.values()]), table(head, lines)]
    if {"hist", "hist_without_hgnn"} <= runs.keys():
        text.append(f"\nR@1 of hist less that without HGNN: {difference(runs['hist'], runs['hist_without_hgnn'])}")
    checkpoint.write_text("\n".join(text) + "\n", bench.args.output / f"losses_{bench.flags.dataset}.md")
    print("\n" + "\n".join(text))


if __name__ == "__main__":
    flags.run_script(main)
