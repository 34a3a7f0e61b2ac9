"""Put finished runs into one table, average over seeds, and set them beside the published figures.

    python code/report.py                          # all data sets under logs/
    python code/report.py logs/cub logs/cars       # these
    python code/report.py logs/cub --output paper  # files go to paper/ instead of logs/

Writes report.md, report.tex (tabulars), report.csv (one row per run), report_groups.csv (one row per figure of a group
and published figure beside it) and report.html, a page that needs no other file. Prints report.md.
"""

import base64
import functools
import hashlib
import json
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import checkpoint
import flags
import jinja2
import layouts
import pandas as pd
import pictures
from refused import Refused
from run import run_folders

LOGS = flags.CODE.parent / "logs"
TEMPLATE = flags.CODE / "report_template.html"
# Figures in percent, ± where it was published; all with HIST's whole loss in 512 dimensions.
PUBLISHED_SIZE = 512
PUBLISHED_FIGURES = {
    "cub": ("R@1", "R@2", "R@4"),
    "cars": ("R@1", "R@2", "R@4"),
    "SOP": ("R@1", "R@10", "R@100"),
}
PUBLISHED = (
    ("cub", "resnet50", "paper", "71.4±0.2 81.1±0.3 88.1±0.2"),
    ("cub", "resnet50", "replication, re-run", "70.1 79.7 87.4"),
    ("cub", "resnet50", "replication, tuned", "72.3 81.8 88.5"),
    ("cub", "bn_inception", "paper, quoted by a survey", "69.7 80.0 87.3"),
    ("cub", "bn_inception", "best quoted", "70.0"),
    ("cub", "bn_inception", "replication, re-run", "68.7"),
    ("cub", "bn_inception", "replication, tuned", "70.0 79.4 86.6"),
    ("cars", "resnet50", "paper", "89.6±0.2 93.9±0.1 96.4±0.1"),
    ("cars", "resnet50", "replication, re-run", "89.8 94.4 96.6"),
    ("cars", "resnet50", "replication, tuned", "90.2 94.5 96.8"),
    ("cars", "bn_inception", "paper, quoted by a survey", "87.4 92.5 95.4"),
    ("cars", "bn_inception", "best quoted", "87.6"),
    ("cars", "bn_inception", "replication, re-run", "87.6"),
    ("cars", "bn_inception", "replication, tuned", "88.1 92.7 95.7"),
    ("SOP", "resnet50", "paper", "81.4±0.2 92.0±0.2 96.7±0.1"),
    ("SOP", "resnet50", "replication, re-run", "80.7 91.2 96.4"),
    ("SOP", "resnet50", "replication, tuned", "81.0 91.6 96.3"),
    ("SOP", "bn_inception", "paper, quoted by a survey", "79.6 91.0 96.2"),
    ("SOP", "bn_inception", "best quoted", "79.8"),
    ("SOP", "bn_inception", "replication, re-run", "77.4"),
    ("SOP", "bn_inception", "replication, tuned", "77.9 90.1 95.8"),
)
SOURCES = {
    "paper": "Lim, Yun, Park, Choi, Hypergraph-Induced Semantic Tuplet Loss for Deep Metric Learning, CVPR 2022",
    "paper, quoted by a survey": "the paper's means for BN-Inception, as a later survey quotes them",
    "best quoted": "the best figure that the literature quotes for BN-Inception",
    "replication, re-run": "Yuan, Le-Phuoc, ReScience C (ML Reproducibility Challenge) 2022, zenodo 8173666",
    "replication, tuned": "the same authors' own settings; their ResNet-50 runs may have been longer than they say, "
    "and which BN-Inception row of their table belongs to which data set is inferred",
}
EXPLANATION = (
    "R@K in percent, at the epoch that each run chose. A group holds the runs that differ only in their seed: mean ± "
    "standard deviation (n − 1); report.csv says which commit and torch made each. data: images/classes of each split "
    "and a digest of them, unknown for runs that do not record it; a group never mixes data. s/epoch: median seconds "
    "of a training epoch, scoring included."
)
COMPARISON = (
    "Δ: our mean minus the published figure, in points. within: no larger than the published ±, or, where none was "
    "published, than our own standard deviation; else above or below. A single run beside a figure without ± gets no "
    "verdict. The paper's protocol chooses the epoch on the test split."
)
MADE_BY = ("commit", "torch")  # columns of results.csv: what made the best epoch, for report.csv


@dataclass(frozen=True)
class Run:
    """A finished run, all of its text plain."""

    folder: Path
    flags: dict[str, str | int | float]  # by destination
    made_by: dict[str, str]
    data: str  # what it trained and was scored on, see read_data
    counts: dict[str, tuple[int, int]]  # (images, classes) by split; empty if unknown
    history: list[dict]  # the rows of results.csv
    best: dict  # the row it chose
    results: str  # its _results.txt
    drawn: dict[str, bytes]  # its pictures, PNG by name

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def seed(self) -> str | int | float:
        return self.flags["seed"]

    @property
    def trained(self) -> list[dict]:
        return [row for row in self.history if row["phase"] == "train"]

    @property
    def chosen_by(self) -> str:
        return "held-out classes" if "val R@1" in self.best else "test split"


def main():
    parser = flags.Parser("Put finished runs into one table, average over seeds, and compare with published figures.")
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="logs/DATASET", help="folders that hold run_N; all under logs/ if none"
    )
    parser.add_argument("--output", type=Path, default=LOGS, help="folder that the report's files go to")
    args = parser.parse_args()

    sections, left_out = [], []
    folders = args.folders or sorted(path for path in LOGS.glob("*") if run_folders(path))
    for resolved, folder in {folder.resolve(): folder for folder in folders}.items():
        runs, reasons = read_runs(folder)
        left_out += reasons
        if runs:
            alike = [other for other in folders if other.resolve().name == resolved.name]
            sections.append(Section(one_line(resolved.name if len(alike) == 1 else folder), runs))
    for line in left_out:
        print(f"warning: {line}", file=sys.stderr)
    if not sections:
        raise Refused(f"no finished run in {', '.join(map(str, args.folders)) or LOGS}")

    args.output.mkdir(parents=True, exist_ok=True)
    text = markdown(sections)
    files = {
        "report.md": text + "".join(f"\n{markdown_escape(line)}\n" for line in left_out),
        "report.tex": latex(sections),
        "report.csv": pd.concat([section.runs_table() for section in sections]).to_csv(index=False),
        "report_groups.csv": pd.concat([section.figures_table() for section in sections]).to_csv(index=False),
        "report.html": page(sections, left_out),
    }
    for name, content in files.items():
        checkpoint.write_text(content, args.output / name)
    print(text)
    print("written: " + ", ".join(str(args.output / name) for name in files))


# ---------------------------------------------------------------- reading


def read_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """(finished runs, one line for each of the others). Raises ValueError for a folder without any run_N."""
    if not run_folders(folder):
        raise Refused(f"{folder}: there is no run_N in it" if folder.is_dir() else f"{folder}: there is no such folder")
    runs, reasons = [], []
    for path in run_folders(folder):
        try:
            runs.append(read_run(path))
        except OSError as error:
            name = Path(error.filename or path).name
            no_epoch = isinstance(error, FileNotFoundError) and name == "results.csv"
            reason = "it has no epoch yet" if no_epoch else f"{name}: {error.strerror}"
            reasons.append(one_line(f"{path}: left out, {reason}"))
        except (ValueError, RecursionError) as error:
            reasons.append(one_line(f"{path}: left out, {str(error)[:300]}"))
    return runs, reasons


def read_run(folder: Path) -> Run:
    """Raises OSError, ValueError or RecursionError for a run that is broken or not finished."""
    content = parsed(folder / "args.json", read_args)
    # A flag that is younger than the run had its default.
    run_flags = train_flags()[0] | {plain(name): plain_value(value) for name, value in content["flags"].items()}
    if not isinstance(run_flags["nb_epochs"], int):
        raise Refused(f"args.json: nb_epochs is {run_flags['nb_epochs']!r}")
    data, counts = read_data(content.get("data"))
    made_by = {plain(name): plain(value) for name, value in content["made_by"].items()}
    listed = content.get("resumptions")
    resumed = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if resumed:
        after = [plain(entry.get("after_epoch", "?")) for entry in resumed]
        made_by["resumed"] = f"{len(resumed)} ×, after epoch {', '.join(after)}"

    history = parsed(folder / "results.csv", read_history)
    trained = [row for row in history if row["phase"] == "train"]
    wanted = [entry["flags"].get("nb_epochs") for entry in resumed if isinstance(entry.get("flags"), dict)]
    wanted = [run_flags["nb_epochs"], *(number for number in wanted if isinstance(number, int))][-1]  # the last word
    if len(trained) < wanted or not trained:
        raise Refused(f"not finished, {len(trained)} of {wanted} epochs")
    run_flags["nb_epochs"] = len(trained)
    chosen_by = "val R@1" if run_flags["val_classes"] else "R@1"
    if chosen_by not in trained[0]:
        raise Refused(f"results.csv lacks the column {chosen_by}")
    changed_after = max(changes_of_data(resumed), default=None)
    trained = [row for row in trained if row["epoch"] > (changed_after or 0)]
    if not trained:
        raise Refused("its images changed and no epoch was trained since")
    best = max(trained, key=lambda row: row[chosen_by])
    if changed_after is not None:
        data, counts = f"{data}, other images until epoch {changed_after}", {}
    if undecoded := best.get("undecoded"):
        data = f"{data}, {undecoded:.0f} of them could not be decoded"
        counts = counts | {"query": (counts["query"][0] - int(undecoded), counts["query"][1])} if counts else {}
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*_best_results.txt"))]
    drawn = {path.stem: path.read_bytes() for path in folder.glob("neighbours.png")}
    return Run(folder, run_flags, made_by, data, counts, history, best, plain("\n".join(texts)), drawn)


def changes_of_data(resumptions: list[dict]) -> list[int]:
    """After which epochs a run went on with other images (--allow-changed-images)."""
    epochs = [entry.get("after_epoch") for entry in resumptions if entry.get("data_before")]
    return [epoch for epoch in epochs if isinstance(epoch, int)]


def parsed(path: Path, read):
    """read(path); what is wrong in the file becomes a ValueError that names it."""
    try:
        return read(path)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path.name}: {error}") from error


def read_args(path: Path) -> dict:
    """args.json with its dicts flags and made_by. Raises ValueError, RecursionError."""
    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=int)  # which refuses NaN
    content = {"made_by": {}} | content if isinstance(content, dict) else {}
    for name in ("flags", "made_by"):
        if not isinstance(content.get(name), dict):
            raise Refused(f"{name} is a {type(content.get(name)).__name__}, not a dict")
    return content


def read_data(data) -> tuple[str, dict[str, tuple[int, int]]]:
    """(data in a line, (images, classes) by split) of args.json's "data"; ("unknown", {}) for older runs.

    Runs on the same data have the same line: 'train 5864/100, query 5924/100 (1a2b3c4d)', with a digest of all splits.
    Raises ValueError.
    """
    if not data:
        return "unknown", {}
    try:
        names = ["train", "query", *(name for name in ("validation", "gallery") if data.get(name))]
        counts = {name: (int(data[name]["images"]), int(data[name]["classes"])) for name in names}
        digests = {name: str.lower(data[name]["digest"]) for name in names}  # refuses what is no text
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise Refused("args.json: data does not say the images, classes and digest of each split") from None
    shown = {name: counts[name] for name in names if name != "validation"}
    if "validation" in names:  # the seed draws the held-out classes: only together are they the same data
        shown["train"] = tuple(map(sum, zip(counts["train"], counts["validation"], strict=True)))
        digests = {name: digests[name] for name in names if name not in ("train", "validation")}
        digests["train"] = str(data["train"].get("digest_with_validation", ""))
    text = ", ".join(f"{name} {images}/{classes}" for name, (images, classes) in shown.items())
    return f"{text} ({hashlib.sha256(repr(digests).encode()).hexdigest()[:8]})", counts


def read_history(path: Path) -> list[dict]:
    """The rows of results.csv without what is empty, and with no other columns than the report uses."""
    header = pd.read_csv(path, header=None, nrows=1, dtype=str).iloc[0]
    if header.duplicated().any():
        raise Refused(f"it has the column {header[header.duplicated()].iloc[0]} twice")
    table = pd.read_csv(path, dtype=dict.fromkeys(MADE_BY, str))
    if missing := [name for name in ("phase", "epoch", "R@1") if name not in table]:
        raise Refused(f"it lacks the column {missing[0]}")
    figures = [name for name in table if re.fullmatch(r"(val )?R@[1-9][0-9]*", name)]
    numeric = [
        name for name in ("epoch", "loss", "dist_loss", "ce_loss", "seconds", "undecoded", *figures) if name in table
    ]
    if not all(pd.api.types.is_numeric_dtype(table[name]) for name in numeric):
        raise Refused("it holds text where there should be numbers")
    trained = table.loc[table["phase"] == "train", figures]
    if not ((trained >= 0) & (trained <= 1)).all(axis=None):
        raise Refused("it lacks figures, or has some outside 0 to 1")
    if table[["phase", "epoch"]].isna().any(axis=None) or (table[numeric].abs() > 1e9).any(axis=None):
        raise Refused("it lacks phases or epochs, or has numbers beyond a billion")
    table = table[["phase", *numeric, *(name for name in MADE_BY if name in table)]].astype({"epoch": int})
    return [
        {name: plain(value) if isinstance(value, str) else value for name, value in row.items() if pd.notna(value)}
        for row in table.to_dict("records")
    ]


@functools.cache
def train_flags() -> tuple[dict, dict[str, str]]:
    """(defaults of train.py's flags, their names on the command line), by destination."""
    parser = flags.train_parser()
    defaults = {name: plain_value(value) for name, value in flags.plain(parser.parse_args([])).items()}
    return defaults, {action.dest: action.option_strings[-1].lstrip("-") for action in parser._actions}


def plain_value(value) -> str | int | float:
    """A flag's value: numbers as they are, nothing as nothing, all else as text."""
    return value if isinstance(value, int | float) else plain("" if value is None else value)


def plain(value) -> str:
    """Text that every file can hold: control characters and what is no Unicode become escapes."""
    unwanted = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(unwanted, lambda match: repr(match[0])[1:-1], str(value))


def one_line(text: str) -> str:
    return " ".join(plain(text).split())


# ---------------------------------------------------------------- grouping and comparing


class Section:
    """The runs of one folder, in groups of those that differ only in their seed, best group first.

    A run that repeats another, with the same seed and the same figures, belongs to its group but is not counted again.
    """

    def __init__(self, name: str, runs: list[Run]):
        self.name, self.runs = name, runs
        everywhere = set.intersection(*(set(run.best) for run in runs))
        self.figures = [name for name in runs[0].best if name.startswith("R@") and name in everywhere]
        groups: dict[tuple, list[Run]] = {}
        counted: dict[tuple, Run] = {}
        self.repeats: dict[str, str] = {}  # {run: the run that it repeats}
        for run in runs:
            key = tuple(sorted(experiment(run).items()))
            first = counted.setdefault((key, run.seed, all_figures(run)), run)
            if first is run:
                groups.setdefault(key, []).append(run)
            else:
                self.repeats[run.name] = first.name
        self.groups = sorted(groups.values(), key=lambda group: -mean_and_std(group, "R@1")[0])
        self.best = max(self.groups[0], key=lambda run: run.best["R@1"])
        numbers = {run.name: number for number, group in enumerate(self.groups, 1) for run in group}
        self.numbers = numbers | {name: numbers[first] for name, first in self.repeats.items()}  # each run's group
        experiments = [experiment(group[0]) for group in self.groups]
        known = list(dict.fromkeys(name for made in experiments for name in made))
        self.differing = [name for name in known if len({made.get(name, "") for made in experiments}) > 1]

    def flags_of(self, run: Run) -> dict:
        """The flags that differ between the groups, by name."""
        return {flag_name(name): experiment(run).get(name, "") for name in self.differing}

    def lines(self) -> list[str]:
        """What all runs share, which of them count once, and which groups stand beside nothing published, and why."""
        defaults = train_flags()[0] | {"dataset": None, "model": None}  # these are always named
        shared = [
            f"{flag_name(name).lstrip('-')} {value}"
            for name, value in experiment(self.runs[0]).items()
            if name not in self.differing and value not in ("", defaults.get(name))
        ]
        lines = [f"All runs: {', '.join(shared)}."]
        for run, first in self.repeats.items():
            lines.append(f"{run} repeats {first} (same seed, same figures): counted once.")
        reasons: dict[str, list[str]] = {}
        for number, group in enumerate(self.groups, 1):
            for seed in dict.fromkeys(run.seed for run in group):
                again = [run.name for run in group if run.seed == seed]
                if len(again) > 1:
                    lines.append(f"{' and '.join(again)} have the same seed but different figures: each is counted.")
            if published_of_its_kind(group[0]) and other_counts(group[0]):
                reasons.setdefault(other_counts(group[0]), []).append(str(number))
        for reason, numbers in reasons.items():
            lines.append(f"No published figures beside group {', '.join(numbers)}: {reason}.")
        return [one_line(line) for line in lines]

    def runs_table(self) -> pd.DataFrame:
        """One row per run, in order of number; figures in percent."""
        rows = []
        for run in self.runs:
            row = {"dataset": self.name, "run": run.name, "group": self.numbers[run.name], **self.flags_of(run)}
            row |= {"seed": run.seed, "chosen by": run.chosen_by, "best epoch": run.best["epoch"]}
            row |= {f"{name} (%)": percent(run.best[name]) for name in self.figures}
            row |= {f"last {name} (%)": percent(run.trained[-1][name]) for name in self.figures}
            row |= {"repeats": self.repeats.get(run.name, ""), "remark": run.flags["remark"]}
            rows.append(row | {name: run.best.get(name, "") for name in MADE_BY})
        return pd.DataFrame(rows, dtype=object)

    def figures_table(self) -> pd.DataFrame:
        """One row per group, figure and published figure beside it, in percent."""
        rows = []
        for number, group in enumerate(self.groups, 1):
            common = {"dataset": self.name} | self.describe(number, group)
            for name in self.figures:
                mean, std = mean_and_std(group, name)
                row = common | {"figure": name, "mean (%)": mean, "std (%)": std}
                beside = [(source, *known[name]) for source, known in published(group[0]).items() if name in known]
                for source, value, spread in beside or [(None, None, None)]:
                    row |= {"source": source, "published (%)": value, "published ± (%)": spread}
                    row |= {"difference": difference(mean, value) if source else None}
                    rows.append(row | {"verdict": verdict(mean, std, value, spread) if source else None})
        return pd.DataFrame(rows, dtype=object)

    def describe(self, number: int, group: list[Run]) -> dict:
        """What a group is, without its figures."""
        row = {"group": number, **self.flags_of(group[0]), "runs": len(group)}
        row |= {"seeds": ", ".join(str(run.seed) for run in group), "chosen by": group[0].chosen_by}
        return row | {"s/epoch": median_seconds(group)}

    def tables(self) -> dict[str, pd.DataFrame]:
        """{title: table of text}, for the eye; no comparison where there is none, of the last epoch only R@1."""
        groups, comparison = [], []
        for number, group in enumerate(self.groups, 1):
            ours = {name: mean_and_std(group, name) for name in self.figures}
            groups.append(self.describe(number, group) | {name: plus_minus(*ours[name], 2) for name in ours})
            for source, known in published(group[0]).items():
                row = {"group": number, "beside": source}
                for name in (name for name in known if name in ours):
                    delta = f"{difference(ours[name][0], known[name][0]):+.2f}".replace("-", "−")
                    row |= {name: plus_minus(*known[name], 1)}
                    row |= {f"Δ {name}": f"{delta} {verdict(*ours[name], *known[name])}".strip()}
                comparison.append(row)
        unwanted = ["dataset", *MADE_BY, *(f"last {name} (%)" for name in self.figures if name != "R@1")]
        runs = self.runs_table().drop(columns=unwanted)
        found = {"Groups": groups, "Beside published figures": comparison, "Runs": runs}
        return {title: shown(pd.DataFrame(rows, dtype=object)) for title, rows in found.items() if len(rows)}


def experiment(run: Run) -> dict:
    """What makes two runs the same but for chance: flags by destination, and the data."""
    made = {name: value for name, value in run.flags.items() if name not in flags.BOOKKEEPING | {"seed"}}
    if run.flags["dataset"] == "folder" and run.data == "unknown":  # then its folder's name has to do
        made["data_root"] = Path(str(run.flags["data_root"])).name
    return made | {"data": run.data}


def flag_name(destination: str) -> str:
    """As on the command line; with its dashes where the report has a column of that name, or train.py no such flag."""
    return {**train_flags()[1], "dataset": "--dataset", "data": "data"}.get(destination, f"--{destination}")


def all_figures(run: Run) -> str:
    """Of all training epochs."""
    return str([[value for name, value in row.items() if "R@" in name] for row in run.trained])


def mean_and_std(group: list[Run], name: str) -> tuple[float, float | None]:
    """Of a figure in percent over runs; no deviation of a single one."""
    values = [percent(run.best[name]) for run in group]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def median_seconds(group: list[Run]) -> float | None:
    """Of the training epochs of all runs; None where none says how long it took."""
    seconds = [row["seconds"] for run in group for row in run.trained if "seconds" in row]
    return round(statistics.median(seconds), 2) if seconds else None


def published(run: Run) -> dict[str, dict[str, tuple[float, float | None]]]:
    """{source: {figure: (value, ±)}} that belong beside a run, in percent."""
    return {} if other_counts(run) else published_of_its_kind(run)


def published_of_its_kind(run: Run) -> dict[str, dict[str, tuple[float, float | None]]]:
    """As published(), whatever images the run used."""
    whole_method = run.flags["loss"] == "hist" and run.flags["ls"] != 0
    if run.flags["sz_embedding"] != PUBLISHED_SIZE or not whole_method:
        return {}
    found = {}
    for dataset, model, source, text in PUBLISHED:
        if (dataset, model) == (run.flags["dataset"], run.flags["model"]):
            pairs = [figure.split("±") for figure in text.split()]
            figures = [(float(value), float(spread[0]) if spread else None) for value, *spread in pairs]
            found[source] = dict(zip(PUBLISHED_FIGURES[dataset], figures, strict=False))  # some only have R@1
    return found


def other_counts(run: Run) -> str:
    """Why figures that were published for its data set do not belong beside a run; empty if they do."""
    expected = published_counts(run.flags["dataset"])
    if run.flags["val_classes"]:
        return "its runs held out training classes (--val-classes), the published ones trained on all of them"
    if not run.counts:
        return "its runs do not say how many images and classes they used, or these changed"
    if run.counts != expected:
        theirs = ", ".join(f"{split} {images}/{classes}" for split, (images, classes) in expected.items())
        return f"its runs used {run.data}, the published ones {theirs} (images/classes)"
    return ""


def published_counts(dataset: str) -> dict[str, tuple[int, int]]:
    """(images, classes) of a benchmark's splits; without a gallery its test split is the query."""
    splits = layouts.get(dataset).published if dataset in layouts.DATASETS else {}
    return {"query" if split == "test" else split: tuple(counts) for split, counts in splits.items()}


def verdict(mean: float, std: float | None, value: float, spread: float | None) -> str:
    """within, above or below the published ±, or our own deviation where there is none; empty without either."""
    allowed = std if spread is None else spread
    if allowed is None:
        return ""
    if abs(difference(mean, value)) <= round(allowed, 6):
        return "within"
    return "above" if mean > value else "below"


def difference(mean: float, value: float) -> float:
    return round(mean - value, 6)  # 71.2 − 71.4 is a hair more than 0.2 in binary


# ---------------------------------------------------------------- writing


def percent(fraction: float) -> float:
    return round(100 * fraction, 6)


def plus_minus(value: float, spread: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """All cells as text: figures with two digits, other numbers as short as can be; without empty columns."""

    def text(value, name):
        if pd.isna(value):
            return ""
        if isinstance(value, float):
            return f"{value:.2f}" if "R@" in name else f"{value:g}"
        return one_line(value)

    table = pd.DataFrame({name: [text(value, name) for value in table[name]] for name in table}, dtype=object)
    return table.loc[:, (table != "").any()].rename(columns=lambda name: one_line(name.removesuffix(" (%)")))


def explanations(sections: list[Section]) -> list[str]:
    """How to read the tables, and who published what stands in them."""
    beside = {source for section in sections for group in section.groups for source in published(group[0])}
    sources = [f"{name}: {who}" for name, who in SOURCES.items() if name in beside]
    return [EXPLANATION, COMPARISON, *sources] if beside else [EXPLANATION]


def markdown(sections: list[Section]) -> str:
    parts = ["# Runs"]
    for section in sections:
        parts += [f"## {markdown_escape(section.name)}", *map(markdown_escape, section.lines())]
        for title, table in section.tables().items():
            escaped = table.map(markdown_escape).rename(columns=markdown_escape)
            parts += [f"### {title}", escaped.to_markdown(index=False, disable_numparse=True)]
    return "\n\n".join([*parts, *explanations(sections)]) + "\n"


def markdown_escape(text: str) -> str:
    """What to_markdown leaves to its caller: no markup, no tags, no links. run_1 and R@1 need no escape."""
    special = r"[\\`*\[\]<>|~$#]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\."
    return re.sub(special, lambda match: "\\" + match[0], text)


def styled(table: pd.DataFrame, escape: str):
    """A Styler without the index, cells and heads escaped for 'html' or 'latex'."""
    return table.style.hide(axis="index").format(escape=escape).format_index(escape=escape, axis="columns")


def latex(sections: list[Section]) -> str:
    r"""One tabular per table, to be \input; needs no package."""
    rules = [{"selector": rule, "props": ":hline"} for rule in ("toprule", "midrule", "bottomrule")]
    # Characters that pandas leaves as they are and LaTeX's text fonts lack
    commands = (r"\textless{}", r"\textgreater{}", r"\textbar{}", r"$\pm$", "$-$", r"$\Delta$")
    symbols = str.maketrans(dict(zip("<>|±−Δ", commands, strict=True)))
    parts = [f"% {line}" for line in explanations(sections)]
    for section in sections:
        parts += ["", *(f"% {section.name}: {line}" for line in section.lines())]
        for title, table in section.tables().items():
            text = styled(table, "latex").set_table_styles(rules).to_latex(column_format="l" * len(table.columns))
            parts += [f"\n% {section.name}: {title}", text.rstrip().translate(symbols)]
    return "\n".join(parts) + "\n"


def page(sections: list[Section], left_out: list[str]) -> str:
    """The report as one file."""
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    lines = explanations(sections)
    return template.render(sections=sections, left_out=left_out, explanations=lines, html_table=html_table, pngs=pngs)


def html_table(table: pd.DataFrame) -> str:
    verdicts = table.filter(regex="^Δ R@").map(lambda cell: cell.rpartition(" ")[2])
    return styled(table, "html").set_td_classes(verdicts).to_html(cell_ids=False)


def pngs(run: Run) -> dict[str, str]:
    """Its curves, and its neighbours if they were drawn, in base64."""
    with tempfile.TemporaryDirectory() as folder:
        pictures.curves(run.history, Path(folder) / "curves.png", best=run.best["epoch"])
        drawn = {"curves": (Path(folder) / "curves.png").read_bytes()} | run.drawn
    return {name: base64.b64encode(content).decode() for name, content in drawn.items()}


if __name__ == "__main__":
    flags.run_script(main)
