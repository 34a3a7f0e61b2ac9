"""Put finished runs into one table, average over seeds, and set them beside the published figures.

    python code/report.py                          # all logs/DATASET
    python code/report.py logs/cub --output paper  # files go to paper/ instead of logs/

Writes report.md, report.csv (one row per run), report_groups.csv (one row per figure of a group and published figure
beside it) and report.html, a page that needs no other file. Prints report.md.
"""

import base64
import functools
import hashlib
import json
import re
import statistics
import sys
from pathlib import Path

import checkpoint
import flags
import jinja2
import layouts
import numpy as np
import pandas as pd
from refused import Refused
from run import run_folders

LOGS = flags.CODE.parent / "logs"
TEMPLATE = flags.CODE / "report_template.html"
# Of a data set and network, in percent, all with HIST's whole loss and in 512 dimensions
PUBLISHED, PUBLISHED_SIZE = flags.CODE / "published.csv", 512
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
    "and a digest of them; a group never mixes data. repeats: a run with the same seed and the same figures, which "
    "counts once. s/epoch: median seconds of a training epoch, scoring included."
)
COMPARISON = (
    "Δ: our mean minus the published figure, in points. within: no larger than the published ±, or, where none was "
    "published, than our own standard deviation; else above or below. A single run beside a figure without ± gets no "
    "verdict. The paper's protocol chooses the epoch on the test split. Published figures stand beside runs of the "
    "whole method in 512 dimensions, on as many images and classes as were published, without held-out classes."
)
MADE_BY = ["commit", "torch"]  # columns of results.csv: what made the best epoch, for report.csv
# Control characters, those that turn the direction of text, and what is no Unicode
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def main():
    parser = flags.Parser("Put finished runs into one table, average over seeds, and compare with published figures.")
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="logs/DATASET",
        help="folders that hold run_N; all logs/DATASET if none",
    )
    parser.add_argument("--output", type=Path, default=LOGS, help="folder that the report's files go to")
    args = parser.parse_args()

    sections, left_out = [], []
    folders = args.folders or sorted(path for path in LOGS.glob("*") if run_folders(path))
    folders = dict.fromkeys(folder.resolve() for folder in folders)
    names = [folder.name for folder in folders]
    for folder in folders:
        runs, reasons = read_runs(folder)
        left_out += reasons
        if runs:
            sections.append(Section(str(folder) if names.count(folder.name) > 1 else folder.name, runs))
    for line in left_out:
        print(f"warning: {line}", file=sys.stderr)
    if not sections:
        raise Refused(f"no finished run in {', '.join(map(str, args.folders)) or LOGS}")

    args.output.mkdir(parents=True, exist_ok=True)
    text = UNPRINTABLE.sub("?", markdown(sections))
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    files = {
        "report.md": text + "".join(f"\n{markdown_escape(line)}\n" for line in left_out),
        "report.csv": pd.concat([section.runs_table() for section in sections]).to_csv(index=False),
        "report_groups.csv": pd.concat([section.figures_table() for section in sections]).to_csv(index=False),
        "report.html": page.render(sections=sections, left_out=left_out, explanations=explanations(sections)),
    }
    for name, content in files.items():
        checkpoint.write_text(UNPRINTABLE.sub("?", content), args.output / name)
    print(text)
    print("written: " + ", ".join(str(args.output / name) for name in files))


def read_runs(folder: Path) -> tuple[list[dict], list[str]]:
    """(a row for each finished run, one line for each of the others). Raises Refused for a folder without any run_N.

    A row holds what report.csv does, all flags and the data under their names, and what else it shows, unescaped.
    """
    if not run_folders(folder):
        raise Refused(f"{folder}: there is no run_N in it" if folder.is_dir() else f"{folder}: there is no such folder")
    runs, reasons = [], []
    for path in run_folders(folder):
        file = path / "args.json"
        try:
            origin = read_args(file)
            file = path / "results.csv"
            row = {"run": path.name, **read_epochs(file, *origin), "results": "", "pictures": {}}
            for file in sorted(path.glob("*_best_results.txt")):
                row["results"] = file.read_text(encoding="utf-8", errors="replace")
            for file in (path / "curves.png", path / "neighbours.png"):
                if file.exists():
                    row["pictures"][file.stem] = base64.b64encode(file.read_bytes()).decode()
            runs.append(row)
        except Exception as error:  # a damaged or foreign file fails in many ways
            broken = f"{file.name}: {getattr(error, 'strerror', None) or f'it is damaged or not of train.py ({error})'}"
            why = str(error) if isinstance(error, Refused) else broken
            reasons.append(UNPRINTABLE.sub("?", one_line(f"{path}: left out, {why[:300]}")))
    return runs, reasons


def read_args(path: Path) -> tuple[dict, dict, str, dict, int | None]:
    """Of args.json: flags by destination, made_by, data, (images, classes) by split, when the images last changed.

    Runs on the same data have the same line: 'train 5864/100, query 5924/100 (1a2b3c4d)', with a digest of all splits.
    """
    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=int)  # which refuses NaN
    # A flag that is younger than the run had its default.
    run_flags = train_flags()[0] | {plain(name): plain(value) for name, value in content["flags"].items()}
    made_by = {name: str(value) for name, value in content["made_by"].items()}
    changed_after = None
    for resumed in content.get("resumptions") or []:  # the last word on the number of epochs counts
        run_flags["nb_epochs"] = resumed.get("flags", {}).get("nb_epochs", run_flags["nb_epochs"])
        made_by["resumed after epoch"] = f"{made_by.get('resumed after epoch', '')} {resumed['after_epoch']}".strip()
        if resumed.get("data_before"):
            changed_after = int(resumed["after_epoch"])
    data = content["data"]
    names = ["train", "query", *(["gallery"] if data.get("gallery") else [])]
    counts = {name: (int(data[name]["images"]), int(data[name]["classes"])) for name in names}
    digests = {name: data[name]["digest"].lower() for name in names}  # refuses what is no text
    if held_out := data.get("validation"):  # the seed draws the held-out classes: only together are they the same data
        images, classes = counts["train"]
        counts["train"] = (images + int(held_out["images"]), classes + int(held_out["classes"]))
        digests["train"] = data["train"].get("digest_with_validation")
    text = ", ".join(f"{name} {images}/{classes}" for name, (images, classes) in counts.items())
    text += f" ({hashlib.sha256(repr(digests).encode()).hexdigest()[:8]})"
    return run_flags, made_by, text, counts, changed_after


def read_epochs(path: Path, run_flags: dict, made_by: dict, data: str, counts: dict, changed_after: int | None) -> dict:
    """The row of a run, of results.csv and what read_args found; the latter says how to read the former."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    chosen_by = "val R@1" if run_flags["val_classes"] else "R@1"
    names = [name for name in table if re.fullmatch(r"(val )?R@[1-9][0-9]*", name)]
    figures = [name for name in names if name.startswith("R@")]
    numbers = ["epoch", *names, "seconds", "undecoded"]
    trained = table[table["phase"] == "train"].reindex(columns=[*numbers, *MADE_BY], fill_value="")
    trained[numbers] = trained[numbers].apply(pd.to_numeric, errors="coerce")
    if len(trained) < max(run_flags["nb_epochs"], 1):
        raise Refused(f"not finished, {len(trained)} of {run_flags['nb_epochs']} epochs")
    for name, most in ({"epoch": 1e9} | dict.fromkeys(["R@1", chosen_by, *names], 1)).items():
        if name not in trained or not trained[name].between(0, most).all():
            raise Refused(f"results.csv: the column {name} lacks numbers, or has some outside 0 to {most:g}, or text")
    made = {name: value for name, value in run_flags.items() if name not in flags.BOOKKEEPING | {"seed"}}
    made["nb_epochs"] = len(trained)
    if changed_after is not None:
        data, counts = f"{data}, other images until epoch {changed_after}", {}
        trained = trained[trained["epoch"] > changed_after]
        if trained.empty:
            raise Refused("its images changed and no epoch was trained since")
    best, last = trained.loc[trained[chosen_by].idxmax()], trained.iloc[-1]
    if best["undecoded"] > 0:  # of versions that left such images out of the scores alone
        data, counts = f"{data}, {best['undecoded']:.0f} of them could not be decoded", {}
    # A flag that train.py no longer has keeps its dashes.
    experiment = {train_flags()[1].get(name, f"--{name}"): value for name, value in made.items()} | {"data": data}
    return {
        "experiment": list(experiment),  # columns: what makes two runs the same but for their seed
        **experiment,
        **{name: run_flags[name] for name in ("seed", "remark")},
        "chosen by": "held-out classes" if run_flags["val_classes"] else "test split",
        "best epoch": int(best["epoch"]),
        "figures": figures,
        **{f"{name} (%)": round(100 * best[name], 6) for name in figures},
        **{f"last {name} (%)": round(100 * last[name], 6) for name in figures},
        "all figures": str(trained[names].to_numpy().tolist()),
        "seconds": trained["seconds"].dropna().tolist(),
        **best[MADE_BY].map(plain),
        "made by": made_by,
        "of": f"{made['dataset']}, {made['model']}" if comparable(made, counts) else "",
    }


@functools.cache
def train_flags() -> tuple[dict, dict[str, str]]:
    """(defaults of train.py's flags, their columns in the report), by destination."""
    parser = flags.train_parser()
    defaults = {name: plain(value) for name, value in flags.plain(parser.parse_args([])).items()}
    columns = {action.dest: action.option_strings[-1].lstrip("-") for action in parser._actions}
    return defaults, columns | {"dataset": "--dataset"}  # there is a column dataset, the folder's name


def plain(value) -> str | int | float:
    """A flag's value: numbers as they are, nothing as nothing, all else as text that csv can write."""
    return value if isinstance(value, int | float) else UNPRINTABLE.sub("?", str("" if value is None else value))


def one_line(text) -> str:
    return " ".join(str(text).split())


class Section:
    """The runs of one folder, in groups of those that differ only in their seed, group 1 the best.

    runs: the rows of read_runs with 'dataset', 'group' and 'repeats', the run with the same seed and figures or ''.
    counted: those that repeat no other. figures: the R@K that all runs have. differing: flags in which groups differ.
    """

    def __init__(self, name: str, rows: list[dict]):
        self.name = one_line(name)
        self.figures = [name for name in rows[0]["figures"] if all(name in row["figures"] for row in rows)]
        self.experiment = list(dict.fromkeys(name for row in rows for name in row["experiment"]))
        self.runs = runs = pd.DataFrame([dict.fromkeys(self.experiment, "") | row for row in rows], dtype=object)
        runs.insert(0, "dataset", self.name)
        self.differing = [name for name in self.experiment if runs[name].nunique() > 1]
        runs["group"] = runs.groupby(self.experiment, sort=False).ngroup()
        first = runs.groupby(["group", "seed", "all figures"], sort=False)["run"].transform("first")
        runs["repeats"] = first.where(first != runs["run"], "")
        means = runs[runs["repeats"] == ""].groupby("group")["R@1 (%)"].agg(statistics.fmean)
        runs["group"] = runs["group"].map(means.rank(ascending=False, method="first").astype(int))
        self.counted = runs[runs["repeats"] == ""]

    def shared(self) -> str:
        """The flags and the data that all runs share, on one line, without defaults."""
        defaults, columns = train_flags()
        usual = {columns[name]: value for name, value in defaults.items() if name not in ("dataset", "model")}
        shared = [(name, self.runs[name][0]) for name in self.experiment if name not in self.differing]
        shared = [f"{name.lstrip('-')} {value}" for name, value in shared if value not in ("", usual.get(name))]
        return one_line(f"All runs: {', '.join(shared)}.")

    def runs_table(self) -> pd.DataFrame:
        """One row per run, in order of number; figures in percent."""
        figures = [f"{which}{name} (%)" for which in ("", "last ") for name in self.figures]
        columns = ["dataset", "run", "group", *self.differing, "seed", "chosen by", "best epoch", *figures]
        return self.runs[[*columns, "repeats", "remark", *MADE_BY]]

    def figures_table(self) -> pd.DataFrame:
        """One row per group, figure and published figure beside it, in percent."""
        rows = []
        for number, group in self.counted.groupby("group"):
            run, seconds = group.iloc[0], group["seconds"].sum()  # of all its runs, in one list
            common = {"dataset": self.name, "group": number, **run[self.differing], "runs": len(group)}
            common |= {"seeds": ", ".join(map(str, group["seed"])), **run[["chosen by", "of"]]}
            common["s/epoch"] = round(statistics.median(seconds), 2) if seconds else None
            for name in self.figures:
                values = group[f"{name} (%)"]
                std = statistics.stdev(values) if len(values) > 1 else None
                rows.append(common | {"figure": name, "mean (%)": statistics.fmean(values), "std (%)": std})
        table = (
            pd.DataFrame(rows, dtype=object)
            .merge(pd.read_csv(PUBLISHED), "left", on=["of", "figure"])
            .drop(columns="of")
        )
        difference = (table["mean (%)"] - table["published (%)"]).astype(float).round(6)
        allowed = table["published ± (%)"].fillna(table["std (%)"].astype(float)).round(6)
        cases = [difference.isna() | allowed.isna(), difference.abs() <= allowed, difference > 0]
        return table.assign(difference=difference, verdict=np.select(cases, ["", "within", "above"], "below"))

    def tables(self) -> dict[str, pd.DataFrame]:
        """{title: table of text}, for the eye; no comparison where there is none, of the last epoch only R@1."""
        table = self.figures_table()
        groups, beside = {}, {}
        for row in table.to_dict("records"):
            ours = groups.setdefault(row["group"], {name: row[name] for name in table.loc[:, "group":"s/epoch"]})
            ours[row["figure"]] = plus_minus(row["mean (%)"], row["std (%)"], 2)
            if pd.notna(row["source"]):
                key = {"group": row["group"], "beside": row["source"]}
                theirs = beside.setdefault(tuple(key.values()), key)
                theirs[row["figure"]] = plus_minus(row["published (%)"], row["published ± (%)"], 1)
                delta = f"{row['difference']:+.2f}".replace("-", "−")
                theirs[f"Δ {row['figure']}"] = f"{delta} {row['verdict']}".strip()
        unwanted = ["dataset", *MADE_BY, *(f"last {name} (%)" for name in self.figures if name != "R@1")]
        runs = self.runs_table().drop(columns=unwanted)
        found = {"Groups": groups.values(), "Beside published figures": beside.values(), "Runs": runs}
        return {title: shown(pd.DataFrame(rows, dtype=object)) for title, rows in found.items() if len(rows)}


def comparable(made: dict, counts: dict[str, tuple[int, int]]) -> bool:
    """Whether figures that were published for its data set and network belong beside a run."""
    theirs = layouts.get(made["dataset"]).published if made["dataset"] in layouts.DATASETS else {}
    theirs = {"query" if split == "test" else split: tuple(sizes) for split, sizes in theirs.items()}
    whole_method = made["loss"] == "hist" and made["ls"] != 0 and made["sz_embedding"] == PUBLISHED_SIZE
    return whole_method and not made["val_classes"] and counts == theirs


def plus_minus(value: float, spread: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if pd.isna(spread) else f" ± {spread:.{digits}f}")


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
    beside = {source for section in sections for source in section.figures_table()["source"]}
    return [EXPLANATION, COMPARISON, *(f"{name}: {who}" for name, who in SOURCES.items() if name in beside)]


def markdown(sections: list[Section]) -> str:
    parts = ["# Runs"]
    for section in sections:
        parts += [f"## {markdown_escape(section.name)}", markdown_escape(section.shared())]
        for title, table in section.tables().items():
            escaped = table.map(markdown_escape).rename(columns=markdown_escape)
            parts += [f"### {title}", escaped.to_markdown(index=False, disable_numparse=True)]
    return "\n\n".join([*parts, *explanations(sections)]) + "\n"


def markdown_escape(text: str) -> str:
    """What to_markdown leaves to its caller: no markup, no tags, no links. run_1 and R@1 need no escape."""
    special = r"[\\`*\[\]<>|~$#]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\."
    return re.sub(special, lambda match: "\\" + match[0], text)


if __name__ == "__main__":
    flags.run_script(main)
