"""Put finished runs into one table, average over seeds, and set them beside the published figures.

    python code/report.py                          # all data sets under logs/
    python code/report.py logs/cub logs/cars       # these
    python code/report.py logs/cub --output paper  # files go to paper/ instead of logs/

Writes report.md, report.tex (tabulars), report.csv (one row per run), report_groups.csv (one row per figure of a group
and published figure beside it) and report.html, a page that needs nothing but itself. Prints report.md.
"""

import base64
import html
import json
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import checkpoint
import flags
import pandas as pd
import pictures

LOGS = flags.CODE.parent / "logs"
# Flags that change nothing about the experiment: runs that differ in these alone are averaged.
SAME_EXPERIMENT = {
    "seed",
    "run_num",
    "resume",
    "overwrite",
    "log_dir",
    "data_root",
    "nb_workers",
    "gpu_id",
    "search_memory",
    "remark",
    "wandb",
}

# Figures in percent with their ± where one is given, by (data set, model), all of them for 512 dimensions.
PUBLISHED = {
    ("cub", "resnet50"): {
        "paper": {"R@1": (71.4, 0.2), "R@2": (81.1, 0.3), "R@4": (88.1, 0.2)},
        "replication, re-run": {"R@1": (70.1, None), "R@2": (79.7, None), "R@4": (87.4, None)},
        "replication, tuned": {"R@1": (72.3, None), "R@2": (81.8, None), "R@4": (88.5, None)},
    },
    ("cars", "resnet50"): {
        "paper": {"R@1": (89.6, 0.2), "R@2": (93.9, 0.1), "R@4": (96.4, 0.1)},
        "replication, re-run": {"R@1": (89.8, None), "R@2": (94.4, None), "R@4": (96.6, None)},
        "replication, tuned": {"R@1": (90.2, None), "R@2": (94.5, None), "R@4": (96.8, None)},
    },
    ("SOP", "resnet50"): {
        "paper": {"R@1": (81.4, 0.2), "R@10": (92.0, 0.2), "R@100": (96.7, 0.1)},
        "replication, re-run": {"R@1": (80.7, None), "R@10": (91.2, None), "R@100": (96.4, None)},
        "replication, tuned": {"R@1": (81.0, None), "R@10": (91.6, None), "R@100": (96.3, None)},
    },
    ("cub", "bn_inception"): {"best quoted": {"R@1": (70.0, None)}, "replication, re-run": {"R@1": (68.7, None)}},
    ("cars", "bn_inception"): {"best quoted": {"R@1": (87.6, None)}, "replication, re-run": {"R@1": (87.6, None)}},
    ("SOP", "bn_inception"): {"best quoted": {"R@1": (79.8, None)}, "replication, re-run": {"R@1": (77.4, None)}},
}
PUBLISHED_SIZE = 512
MADE_BY = ("commit", "torch")  # of the best epoch, in report.csv
SOURCES = {
    "paper": "Lim, Yun, Park, Choi, Hypergraph-Induced Semantic Tuplet Loss for Deep Metric Learning, CVPR 2022",
    "replication": "Yuan, Le-Phuoc, ReScience C (ML Reproducibility Challenge) 2022, zenodo 8173666",
    "best quoted": "the best figure that the literature quotes for this network",
}
EXPLANATION = (
    "R@K in percent, at the epoch that each run chose. Groups: runs that differ in their seed alone, mean ± standard "
    "deviation (n − 1). s/epoch: median of the seconds of a training epoch, scoring included."
)
COMPARISON = (
    "Δ: our mean minus the published figure, in points. It is within the spread if it is no larger than the published "
    "±, or, where none was published, than our own standard deviation; else above or below. A single run beside a "
    "figure without ± allows no verdict. The paper's protocol chooses the epoch on the test split."
)


@dataclass(frozen=True)
class Run:
    """A finished run: flags by destination, history as train.py made it, and of that its best and last row."""

    folder: Path
    flags: dict
    made_by: dict
    history: list[dict]
    best: dict
    last: dict
    results: str

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
    for folder in dict.fromkeys(args.folders or data_set_folders(LOGS)):
        runs, reasons = read_runs(folder)
        left_out += reasons
        if runs:
            sections.append(Section(folder.resolve().name, runs))
    for line in left_out:
        print(f"warning: {line}", file=sys.stderr)
    if not sections:
        raise ValueError(f"no finished run in {', '.join(map(str, args.folders)) or LOGS}")

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


def run_folders(folder: Path) -> list[Path]:
    """The run_N of a folder in order of N."""
    found = [path for path in folder.glob("run_*") if path.is_dir() and path.name[4:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[4:]))


def data_set_folders(logs: Path) -> list[Path]:
    return sorted(path for path in logs.glob("*") if run_folders(path))


def read_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """(finished runs, one line for each of the others). Raises ValueError for a folder without any run_N."""
    if not run_folders(folder):
        raise ValueError(
            f"{folder}: there is no run_N in it" if folder.is_dir() else f"{folder}: there is no such folder"
        )
    runs, reasons = [], []
    for path in run_folders(folder):
        try:
            runs.append(read_run(path))
        except OSError as error:
            name = Path(error.filename or path).name
            no_epoch = isinstance(error, FileNotFoundError) and name == "results.csv"
            reasons.append(f"{path}: left out, " + ("it has no epoch yet" if no_epoch else f"{name}: {error.strerror}"))
        except ValueError as error:
            reasons.append(f"{path}: left out, {' '.join(str(error).split())}")
    return runs, reasons


def read_run(folder: Path) -> Run:
    """Raises OSError or ValueError for a run that is broken or not finished."""
    content = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("flags"), dict):
        raise ValueError("args.json holds no flags")
    # A flag that is younger than the run had its default.
    run_flags = flags.plain(flags.train_parser().parse_args([]))
    run_flags |= {
        name: value if isinstance(value, str | int | float) else "" for name, value in content["flags"].items()
    }
    if not isinstance(run_flags["nb_epochs"], int):
        raise ValueError(f"args.json: nb_epochs is {run_flags['nb_epochs']!r}")

    table = pd.read_csv(folder / "results.csv")
    chosen_by = "val R@1" if run_flags["val_classes"] else "R@1"
    if missing := [name for name in ("phase", "epoch", "R@1", chosen_by) if name not in table]:
        raise ValueError(f"results.csv lacks the column {missing[0]}")
    trained = table[table["phase"] == "train"]
    if len(trained) < run_flags["nb_epochs"] or trained.empty:
        raise ValueError(f"not finished, {len(trained)} of {run_flags['nb_epochs']} epochs")
    figures = [name for name in table if name.startswith(("R@", "val R@"))]
    numeric = ("epoch", "loss", "dist_loss", "ce_loss", "seconds", *figures)
    numbers = table[[name for name in table if name in numeric]]
    if not all(pd.api.types.is_numeric_dtype(numbers[name]) for name in numbers):
        raise ValueError("results.csv holds text where there should be numbers")
    if not ((trained[figures] >= 0) & (trained[figures] <= 1)).all(axis=None) or not (table["epoch"].abs() < 1e9).all():
        raise ValueError("results.csv lacks figures, or has some outside 0 to 1")

    history = [{name: value for name, value in row.items() if pd.notna(value)} for row in table.to_dict("records")]
    history = [row | {"epoch": int(row["epoch"])} for row in history]
    rows = [row for row in history if row["phase"] == "train"]
    best = max(rows, key=lambda row: row[chosen_by])  # the first of equals, as train.py keeps it
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*_best_results.txt"))]
    made_by = {str(name): str(value) for name, value in dict(content.get("made_by") or {}).items()}
    return Run(folder, run_flags, made_by, history, best, rows[-1], "\n".join(texts))


# ---------------------------------------------------------------- grouping and comparing


class Section:
    """The runs of one data set: grouped by what they did, best group first, and the tables made of them."""

    def __init__(self, name: str, runs: list[Run]):
        self.name = name
        self.runs = runs
        everywhere = set.intersection(*(set(run.best) for run in runs))
        self.figures = [name for name in runs[0].best if name.startswith("R@") and name in everywhere]
        groups: dict[tuple, list[Run]] = {}
        for run in runs:
            groups.setdefault(experiment(run), []).append(run)
        self.groups = sorted(groups.values(), key=lambda group: -mean_and_std(group, "R@1")[0])
        known = list(dict.fromkeys(name for run in runs for name in run.flags))
        experiments = [dict(experiment(group[0])) for group in self.groups]
        self.differing = [name for name in known if len({made.get(name, "") for made in experiments}) > 1]

    def runs_table(self) -> pd.DataFrame:
        """One row per run, in order of number; figures in percent."""
        rows = []
        for run in self.runs:
            row = {"dataset": self.name, "run": run.folder.name}
            row |= {"group": next(n for n, group in enumerate(self.groups, 1) if run in group)}
            row |= self.flags_of(run)
            row |= {"seed": run.flags["seed"], "chosen by": run.chosen_by, "best epoch": run.best["epoch"]}
            row |= {f"{name} (%)": percent(run.best[name]) for name in self.figures}
            row |= {f"last {name} (%)": percent(run.last[name]) for name in self.figures}
            row |= {"remark": run.flags["remark"]}
            rows.append(row | {name: run.best.get(name, "") for name in MADE_BY})
        return pd.DataFrame(rows)

    def figures_table(self) -> pd.DataFrame:
        """One row per group, figure and published figure beside it, in percent."""
        rows = []
        for number, group in enumerate(self.groups, 1):
            common = {"dataset": self.name, "group": number, **self.flags_of(group[0]), "runs": len(group)}
            common |= {"seeds": joined(run.flags["seed"] for run in group), "chosen by": group[0].chosen_by}
            common |= {"s/epoch": median_seconds(group)}
            for name in self.figures:
                mean, std = mean_and_std(group, name)
                row = common | {"figure": name, "mean (%)": mean, "std (%)": std}
                sources = [(source, *known[name]) for source, known in published(group[0]).items() if name in known]
                for source, value, spread in sources or [(None, None, None)]:
                    rows.append(row | {"source": source, "published (%)": value, "published ± (%)": spread})
                    if source:
                        rows[-1] |= {"difference": round(mean - value, 6), "verdict": verdict(mean, std, value, spread)}
        columns = ["source", "published (%)", "published ± (%)", "difference", "verdict"]
        table = pd.DataFrame(rows)
        return table.reindex(columns=[*(name for name in table if name not in columns), *columns])

    def flags_of(self, run: Run) -> dict:
        """The flags that differ between the groups, by the names that the command line knows."""
        names = {action.dest: action.option_strings[-1].lstrip("-") for action in flags.train_parser()._actions}
        return {names.get(name, name): run.flags.get(name, "") for name in self.differing}

    # For the eye: everything is text.

    def runs_shown(self, all_last: bool) -> pd.DataFrame:
        """The runs, of the last epoch all figures or R@1 alone; remarks if there are any."""
        table = self.runs_table().drop(columns=["dataset", *MADE_BY])
        dropped = [] if all_last else [f"last {name} (%)" for name in self.figures if name != "R@1"]
        if not table["remark"].any():
            dropped.append("remark")
        return shown(table.drop(columns=dropped))

    def groups_shown(self) -> pd.DataFrame:
        table = self.figures_table().drop_duplicates(["group", "figure"])
        rows = []
        for _, lines in table.groupby("group"):
            row = lines.iloc[0][list(table)[1 : list(table).index("figure")]].to_dict()
            for line in lines.to_dict("records"):
                row[line["figure"]] = plus_minus(line["mean (%)"], line["std (%)"], 2)
            rows.append(row)
        return shown(pd.DataFrame(rows))

    def comparison_shown(self) -> pd.DataFrame:
        """One row per group and source; empty where nothing was published."""
        table = self.figures_table().dropna(subset="source")
        rows = []
        for (group, source), lines in table.groupby(["group", "source"], sort=False):
            row = {"group": group, "beside": source}
            for line in lines.to_dict("records"):
                row[line["figure"]] = plus_minus(line["published (%)"], line["published ± (%)"], 1)
                row[f"Δ {line['figure']}"] = f"{signed(line['difference'])} {line['verdict']}".strip()
            rows.append(row)
        return shown(pd.DataFrame(rows))


def experiment(run: Run) -> tuple:
    """What makes two runs the same but for chance."""
    made = {name: value for name, value in run.flags.items() if name not in SAME_EXPERIMENT}
    if run.flags["dataset"] == "folder":  # wherever it lies
        made["data_root"] = Path(str(run.flags["data_root"])).name
    return tuple(sorted(made.items()))


def mean_and_std(group: list[Run], name: str) -> tuple[float, float | None]:
    """Of a figure in percent over runs; no deviation of a single one."""
    values = [percent(run.best[name]) for run in group]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def median_seconds(group: list[Run]) -> float | None:
    """Of the training epochs of all runs; None where none says how long it took."""
    seconds = [row["seconds"] for run in group for row in run.history if row["phase"] == "train" and "seconds" in row]
    return round(statistics.median(seconds), 2) if seconds else None


def published(run: Run) -> dict[str, dict[str, tuple[float, float | None]]]:
    """{source: {figure: (value, ±)}} that belong beside a run, in percent."""
    whole_method = run.flags["loss"] == "hist" and run.flags["ls"] != 0
    if run.flags["sz_embedding"] != PUBLISHED_SIZE or not whole_method:
        return {}
    return PUBLISHED.get((run.flags["dataset"], run.flags["model"]), {})


def verdict(mean: float, std: float | None, value: float, spread: float | None) -> str:
    """within, above or below the published ±, or our own deviation where there is none; empty without either."""
    allowed = std if spread is None else spread
    if allowed is None:
        return ""
    difference = round(mean - value, 6)  # 71.2 − 71.4 is a hair more than 0.2 in binary
    if abs(difference) <= round(allowed, 6):
        return "within"
    return "above" if difference > 0 else "below"


# ---------------------------------------------------------------- writing


def percent(fraction: float) -> float:
    return round(100 * fraction, 6)


def joined(values) -> str:
    return ", ".join(map(str, values))


def plus_minus(value: float, spread: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if pd.isna(spread) else f" ± {spread:.{digits}f}")


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """All cells as text: figures with two digits, other numbers as short as they can be, nothing for nothing."""

    def text(value, name):
        if pd.isna(value):
            return ""
        if isinstance(value, float):
            return f"{value:.2f}" if "R@" in name else f"{value:g}"
        return " ".join(str(value).split())

    rows = [[text(value, name) for name, value in row.items()] for row in table.to_dict("records")]
    return pd.DataFrame(rows, columns=[name.removesuffix(" (%)") for name in table], dtype=object)


def tables(section: Section, all_last: bool = False) -> dict[str, pd.DataFrame]:
    """{title: table} of a section; without a comparison where nothing was published."""
    found = {
        "Groups": section.groups_shown(),
        "Beside published figures": section.comparison_shown(),
        "Runs": section.runs_shown(all_last),
    }
    return {title: table for title, table in found.items() if len(table)}


def explanations(sections: list[Section]) -> list[str]:
    """How to read the tables, and who published what stands in them."""
    beside = {source for section in sections for run in section.runs for source in published(run)}
    sources = [f"{name}: {who}" for name, who in SOURCES.items() if any(source.startswith(name) for source in beside)]
    return [EXPLANATION, COMPARISON, *sources] if beside else [EXPLANATION]


def markdown(sections: list[Section]) -> str:
    parts = ["# Runs"]
    for section in sections:
        parts.append(f"## {markdown_escape(section.name)}")
        for title, table in tables(section).items():
            parts += [f"### {title}", markdown_table(table)]
    parts += explanations(sections)
    return "\n\n".join(parts) + "\n"


def markdown_escape(text: str) -> str:
    return re.sub(r"([\\`*\[\]<>|~$]|&(?=#?\w+;)|(?<!\w)_|_(?!\w))", r"\\\1", text)  # run_1 needs no escape


def markdown_table(table: pd.DataFrame) -> str:
    """Padded, so that it also reads as plain text."""
    rows = [[markdown_escape(cell) for cell in row] for row in [list(table), *table.values.tolist()]]
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def latex(sections: list[Section]) -> str:
    r"""One tabular per table, to be \input; needs no package."""
    parts = [f"% {line}" for line in explanations(sections)]
    for section in sections:
        for title, table in tables(section).items():
            parts += [f"\n% {' '.join(section.name.split())}: {title}", latex_table(table)]
    return "\n".join(parts) + "\n"


LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "−": "$-$",
    "Δ": r"$\Delta$",
}


def latex_escape(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def latex_table(table: pd.DataFrame) -> str:
    rows = [" & ".join(map(latex_escape, row)) + r" \\" for row in [list(table), *table.values.tolist()]]
    begin = rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}"
    return "\n".join([begin, r"\hline", rows[0], r"\hline", *rows[1:], r"\hline", r"\end{tabular}"])


# ---------------------------------------------------------------- the page

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; max-width: 1500px; margin: 2em auto;
       padding: 0 1.5em; }
h2 { border-bottom: 2px solid #d0d7de; margin-top: 2em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3em .6em; border-bottom: 1px solid #d0d7de; text-align: left; }
th.number, td.number { text-align: right; }
td.remark { white-space: normal; min-width: 12em; }
th button { font: inherit; font-weight: 600; background: none; border: 0; padding: 0; cursor: pointer; }
th button::after { content: " ↕"; color: #8c959f; }
th[aria-sort=ascending] button::after { content: " ↑"; color: #0969da; }
th[aria-sort=descending] button::after { content: " ↓"; color: #0969da; }
tbody tr:hover { background: #f6f8fa; }
.above { color: #1a7f37; } .below { color: #cf222e; }
details { margin: .6em 0; border: 1px solid #d0d7de; border-radius: 6px; padding: .4em 1em; }
summary { cursor: pointer; font-weight: 600; }
img { max-width: min(100%, 950px); height: auto; display: block; margin: 1em 0; }
pre { background: #f6f8fa; padding: .8em; overflow-x: auto; }
.note { color: #57606a; max-width: 60em; }
"""

SCRIPT = """
function key(row, column) {
  const text = row.cells[column].textContent, number = parseFloat(text.replace("\u2212", "-"));
  return {text, number, empty: text === ""};
}
function compare(a, b) {
  if (!isNaN(a.number) && !isNaN(b.number)) return a.number - b.number;
  return a.text.localeCompare(b.text, undefined, {numeric: true});
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const th = button.parentNode, body = th.closest("table").tBodies[0];
    const sign = th.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...body.rows].map(row => [key(row, th.cellIndex), row]);
    rows.sort(([a], [b]) => a.empty - b.empty || sign * compare(a, b));  // nothing comes last, both ways
    body.append(...rows.map(([_, row]) => row));
  });
}
"""


def page(sections: list[Section], left_out: list[str]) -> str:
    """The report as one file. Its policy forbids every request, so that it is the same page offline."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    parts = [f"<h1>Runs</h1><p class='note'>{html.escape(EXPLANATION)} A click on a column's head sorts by it.</p>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.name)}</h2>")
        for title, table in tables(section, all_last=True).items():
            parts.append(f"<h3>{title}</h3><div class='wide'>{html_table(table)}</div>")
        best = max(section.groups[0], key=lambda run: run.best["R@1"])
        parts.append("<h3>Each run</h3>")
        parts += [run_details(run, opened=run is best) for run in section.runs]
    parts += [f"<p class='note'>{html.escape(line)}</p>" for line in explanations(sections)[1:]]
    if left_out:
        parts.append(f"<h2>Left out</h2><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in left_out)}</ul>")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Runs</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style></head>\n<body>\n{chr(10).join(parts)}\n<script>{SCRIPT}</script></body></html>\n"
    )


def html_table(table: pd.DataFrame) -> str:
    def kinds(name):
        """Numbers stand right, but for those that have a deviation or a verdict behind them."""
        cells = table[name][table[name] != ""]
        if name == "remark":
            return "remark"
        return "number" if len(cells) and cells.str.match(r"[\d., e+−-]+$").all() else ""

    def cell(name, text):
        coloured = text.rpartition(" ")[2] if name.startswith("Δ") else ""
        return f'<td class="{classes[name]} {coloured}">{html.escape(text)}</td>'

    classes = {name: kinds(name) for name in table}
    head = "".join(
        f'<th class="{classes[name]}"><button type="button">{html.escape(name)}</button></th>' for name in table
    )
    body = "\n".join(f"<tr>{''.join(map(cell, table, row))}</tr>" for row in table.values.tolist())
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def run_details(run: Run, opened: bool) -> str:
    """One run to unfold: its curves, its neighbours if they were drawn, and what made it."""
    with tempfile.TemporaryDirectory() as folder:
        pictures.curves(run.history, Path(folder) / "curves.png")
        drawn = [("curves", Path(folder) / "curves.png"), ("neighbours", run.folder / "neighbours.png")]
        images = "".join(
            f'<img alt="{name} of {html.escape(run.folder.name)}" '
            f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
            for name, path in drawn
            if path.is_file()
        )
    made_by = "\n".join(f"{name}: {value}" for name, value in run.made_by.items())
    figure = f"R@1 {percent(run.best['R@1']):.2f} % in epoch {run.best['epoch']}"
    title = f"{run.folder.name}: seed {run.flags['seed']}, {figure}"
    return (
        f"<details{' open' if opened else ''}><summary>{html.escape(title)}</summary>{images}"
        f"<pre>{html.escape(run.results)}</pre><pre>{html.escape(made_by)}</pre></details>"
    )


if __name__ == "__main__":
    flags.run_script(main)
