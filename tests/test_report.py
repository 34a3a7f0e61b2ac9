"""The report: exact numbers on runs made by hand, every file readable by what it is for, a page that stays at home."""

import csv
import html.parser
import json
import re
import shutil
import subprocess

import pandas as pd
import pytest
import report
from trees import picture

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = '<script>alert("x")</script> a|b $5 & 100% #1 _u_ {c} \\d ~e^f * `g` [h](http://i.example/) ä'


def make_run(folder, recalls, seed=1, validation=None, seconds=None, **changed):
    """A finished run; recalls: {K: R@K per epoch}, validation: val R@1 per epoch; changed: flags by destination."""
    folder.mkdir(parents=True)
    epochs = len(next(iter(recalls.values())))
    flags = {"dataset": folder.parent.name, "model": "resnet50", "sz_embedding": 512, "nb_epochs": epochs, "tau": 32.0,
             "val_classes": 0.1 if validation else 0.0, "seed": seed, "run_num": int(folder.name[4:]), "gpu_id": seed,
             "remark": "", **changed}  # fmt: skip
    (folder / "args.json").write_text(json.dumps({"flags": flags, "made_by": {"commit": "abc", "command": "train.py"}}))
    rows = [{"phase": "untrained", "epoch": -1}, {"phase": "warm-up", "epoch": 0}]
    rows += [{"phase": "train", "epoch": epoch} for epoch in range(1, epochs + 1)]
    for number, row in enumerate(rows):
        # Before training the figures are higher than ever after: neither counts as the best.
        row |= {f"R@{k}": values[number - 2] if number >= 2 else 0.999 for k, values in recalls.items()}
        if validation:
            row["val R@1"] = validation[number - 2] if number >= 2 else 0.999
        if number:
            row |= {"seconds": seconds * number} if seconds else {}
            row |= {"commit": f"made epoch {row['epoch']}", "torch": "2.14.1"}
            row |= {"loss": 9.0 / number, "dist_loss": 5.0 / number, "ce_loss": 4.0 / number, "lr": 1e-4}
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    (folder / f"{flags['dataset']}_resnet50_best_results.txt").write_text("Best epoch: said here\n")


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """CUB with three seeds of one recipe, one run of another and one with held-out classes; Cars; broken runs."""
    root = tmp_path_factory.mktemp("logs")
    for number, best in ((1, 0.712), (2, 0.714), (10, 0.719)):
        recalls = {1: [0.5, best, 0.70], 2: [0.6, best + 0.1, 0.8], 4: [0.7, 0.881, 0.88]}
        make_run(root / "cub" / f"run_{number}", recalls, seed=number)
    make_run(root / "cub" / "run_3", {1: [0.6, 0.701], 2: [0.7, 0.797], 4: [0.8, 0.9]}, tau=24.0, remark=NASTY)
    held_out = {1: [0.72, 0.70, 0.71], 2: [0.8, 0.8, 0.8], 4: [0.9, 0.9, 0.9]}
    make_run(root / "cub" / "run_4", held_out, validation=[0.6, 0.8, 0.7])
    picture(1, 1).save(root / "cub" / "run_4" / "neighbours.png")
    make_run(root / "cars" / "run_1", {1: [0.898], 2: [0.94], 4: [0.963]}, remark="=1+1")
    make_run(root / "cars" / "run_2", {1: [0.896], 2: [0.94], 4: [0.963]}, sz_embedding=64)
    for number, seconds, changed in (
        (1, 3.0, {}),
        (2, 4.0, {"seed": 2}),
        (3, 7.5, {"loss": "triplet"}),
        (4, 1, {"ls": 0.0}),
    ):
        recalls = {1: [0.8, 0.898], 2: [0.8, 0.94], 4: [0.8, 0.963]}
        make_run(root / "losses" / f"run_{number}", recalls, seconds=seconds, **({"dataset": "cars"} | changed))

    (root / "cub" / "run_5").mkdir()
    make_run(root / "cub" / "run_6", {1: [0.7], 2: [0.7], 4: [0.8]}, nb_epochs=40)
    for number, name, content in (
        (7, "args.json", "{"),
        (8, "results.csv", ""),
        (9, "results.csv", "phase,epoch,R@1\ntrain,1,much\n"),
        (11, "results.csv", "phase,epoch,R@1\ntrain,1,7.5\n"),
        (12, "results.csv", "phase,epoch\ntrain,1\n"),
        (13, "results.csv", "\x00\xff"),
        (14, "args.json", '{"flags": {"nb_epochs": "x"}}'),
        (15, "args.json", "[]"),
    ):
        make_run(root / "cub" / f"run_{number}", {1: [0.7], 2: [0.7], 4: [0.8]})
        (root / "cub" / f"run_{number}" / name).write_text(content, encoding="latin-1")
    return root


@pytest.fixture(scope="module")
def cub(logs):
    return report.Section("cub", report.read_runs(logs / "cub")[0])


@pytest.fixture(scope="module")
def written(logs, tmp_path_factory):
    """Everything that the script writes about both data sets, and what it said."""
    import sys

    output = tmp_path_factory.mktemp("output") / "new" / "folder"
    command = [
        sys.executable,
        "-W",
        "error::FutureWarning",
        report.__file__,
        logs / "cars",
        logs / "cub",
        "--output",
        output,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return output, done


def test_runs_come_in_order_of_number_and_say_their_best_and_last(cub):
    table = cub.runs_table().set_index("run")
    assert list(table.index) == ["run_1", "run_2", "run_3", "run_4", "run_10"]
    assert table.loc["run_10", ["best epoch", "R@1 (%)", "R@2 (%)", "R@4 (%)"]].tolist() == [2, 71.9, 81.9, 88.1]
    assert table.loc["run_10", ["last R@1 (%)", "last R@2 (%)", "last R@4 (%)"]].tolist() == [70.0, 80.0, 88.0]
    assert table["tau"].tolist() == [32, 32, 24, 32, 32]
    assert table["seed"].tolist() == [1, 2, 1, 1, 10]


def test_held_out_classes_choose_the_epoch_where_there_are_any(cub):
    run = cub.runs_table().set_index("run").loc["run_4"]
    assert (run["chosen by"], run["best epoch"], run["R@1 (%)"]) == ("held-out classes", 2, 70.0)


def test_only_flags_that_differ_are_columns(cub):
    between = cub.runs_table().loc[:, "group":"seed"].columns[1:-1]
    assert set(between) == {"tau", "val-classes", "epochs"}


def test_groups_are_runs_that_differ_in_their_seed_alone_best_first(cub):
    assert [[run.folder.name for run in group] for group in cub.groups] == [
        ["run_1", "run_2", "run_10"],
        ["run_3"],
        ["run_4"],
    ]
    shown = cub.groups_shown()
    assert shown.loc[0, ["runs", "seeds", "R@1", "R@2", "R@4"]].tolist() == [
        "3", "1, 2, 10", "71.50 ± 0.36", "81.50 ± 0.36", "88.10 ± 0.00"
    ]  # fmt: skip
    assert shown.loc[1, ["runs", "R@1"]].tolist() == ["1", "70.10"]


def test_mean_and_deviation_are_exact(cub):
    row = cub.figures_table().query("group == 1 and figure == 'R@1'").iloc[0]
    assert row["mean (%)"] == pytest.approx(71.5, abs=1e-12)
    # deviations −0.3, −0.1, 0.4: their squares sum to 0.26, over n − 1 = 2
    assert row["std (%)"] == pytest.approx(0.13**0.5, abs=1e-12)


def test_difference_to_what_was_published(cub):
    table = cub.figures_table().set_index(["group", "figure", "source"])[["difference", "verdict"]]
    assert table.loc[(1, "R@1", "paper")].tolist() == [0.1, "within"]  # ± 0.2 of the paper
    assert table.loc[(1, "R@2", "paper")].tolist() == [0.4, "above"]
    assert table.loc[(1, "R@1", "replication, re-run")].tolist() == [1.4, "above"]  # ± 0.36 of our own
    assert table.loc[(1, "R@2", "replication, tuned")].tolist() == [-0.3, "within"]
    assert table.loc[(2, "R@1", "paper")].tolist() == [-1.3, "below"]
    assert table.loc[(2, "R@1", "replication, re-run")].tolist() == [0.0, ""]  # one run beside a figure without ±


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((71.2, None, 71.4, 0.2), "within"),  # 71.2 − 71.4 in binary is a hair more than 0.2
        ((71.6, None, 71.4, 0.2), "within"),
        ((71.19, 5.0, 71.4, 0.2), "below"),  # the published ± counts, not ours
        ((71.61, None, 71.4, 0.2), "above"),
        ((70.0, 0.1, 70.1, None), "within"),
        ((70.0, None, 70.0, None), ""),
    ],
)
def test_verdict(arguments, expected):
    assert report.verdict(*arguments) == expected


def test_published_figures_stand_only_beside_what_they_belong_to(logs):
    same_size, other_size = report.read_runs(logs / "cars")[0]
    assert set(report.published(same_size)) == {"paper", "replication, re-run", "replication, tuned"}
    assert report.published(other_size) == {}
    for flags in ({"model": "resnet18"}, {"dataset": "glyphs"}):
        other = report.Run(same_size.folder, same_size.flags | flags, {}, [], {}, {}, "")
        assert report.published(other) == {}


def test_other_losses_are_groups_of_their_own_with_their_seconds(logs):
    section = report.Section("losses", report.read_runs(logs / "losses")[0])
    table = section.figures_table()
    # two epochs each, rows number 2 and 3 of the history: the median of 6, 9 and 8, 12 over both seeds is 8.5
    seconds = {(row["loss"], row["ls"]): row["s/epoch"] for row in table.to_dict("records")}
    assert seconds == {("hist", 1.0): 8.5, ("triplet", 1.0): 18.75, ("hist", 0.0): 2.5}
    # only the whole method stands beside what was published of it
    beside = table.dropna(subset="source")
    assert set(zip(beside["loss"], beside["ls"], strict=True)) == {("hist", 1.0)}


def test_runs_on_other_pictures_are_no_seeds_of_each_other(tmp_path):
    for number, root in ((1, "/a"), (2, "/b")):
        for name in ("folder", "cub"):
            make_run(tmp_path / name / f"run_{number}", {1: [0.5]}, data_root=root)
    groups = {name: report.Section(name, report.read_runs(tmp_path / name)[0]).groups for name in ("folder", "cub")}
    assert (len(groups["folder"]), len(groups["cub"])) == (2, 1)


def test_what_is_left_out_is_named_in_a_line_each(logs, written):
    runs, reasons = report.read_runs(logs / "cub")
    assert len(runs) == 5
    assert [re.search(r"run_\d+", line)[0] for line in reasons] == [
        f"run_{n}" for n in (5, 6, 7, 8, 9, 11, 12, 13, 14, 15)
    ]
    assert reasons[0].endswith("run_5: left out, args.json: No such file or directory")
    assert reasons[1].endswith("run_6: left out, not finished, 1 of 40 epochs")
    assert not any("\n" in line for line in reasons)
    output, done = written
    assert [line.removeprefix("warning: ") for line in done.stderr.splitlines()] == reasons


def test_the_console_shows_the_markdown_and_where_the_files_lie(written):
    output, done = written
    text = (output / "report.md").read_text()
    assert done.stdout.splitlines()[0] == "# Runs"
    assert done.stdout.split("\nwritten: ")[0].strip() in text
    for name in ("report.md", "report.tex", "report.csv", "report_groups.csv", "report.html"):
        assert str(output / name) in done.stdout.splitlines()[-1]


def test_markdown_tables_are_rectangular(written):
    blocks = re.findall(r"(?:^\|.*\n?)+", (written[0] / "report.md").read_text(), re.MULTILINE)
    assert len(blocks) == 6
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
        assert len({len(line) for line in block.splitlines()}) == 1
    assert "<script" not in re.sub(r"\\<", "", "".join(blocks))


def test_csv_is_read_back(written):
    runs = pd.read_csv(written[0] / "report.csv")
    assert runs.groupby("dataset").size().to_dict() == {"cars": 2, "cub": 5}
    assert (runs["commit"] == "made epoch " + runs["best epoch"].astype(str)).all()
    assert runs.set_index(["dataset", "run"]).loc[("cub", "run_3"), "remark"] == NASTY
    assert runs.set_index(["dataset", "run"]).loc[("cars", "run_1"), "R@1 (%)"] == 89.8
    groups = pd.read_csv(written[0] / "report_groups.csv")
    cars = groups.query("dataset == 'cars' and figure == 'R@1' and source == 'paper'").iloc[0]
    assert cars[["mean (%)", "published (%)", "published ± (%)", "difference"]].tolist() == [89.8, 89.6, 0.2, 0.2]
    assert cars["verdict"] == "within"


def test_latex_is_balanced_and_escaped(written):
    text = (written[0] / "report.tex").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 6
    columns = None
    for line in lines:
        if line.startswith(r"\begin{tabular}"):
            columns = len(re.fullmatch(r"\\begin\{tabular\}\{(l+)\}", line)[1])
        elif line.endswith(r"\\"):
            bare = re.sub(r"\\[&%#_{}]|\\\$", "", line.removesuffix(r"\\"))
            assert bare.count("&") == columns - 1
            assert bare.count("$") % 2 == 0 and not re.search(r"[%#_~^<>|]", bare)
            assert bare.count("{") == bare.count("}")
    assert r"71.50 $\pm$ 0.36" in text and r"$\Delta$ R@1" in text and "$-$1.30 below" in text


class Page(html.parser.HTMLParser):
    """Attributes that load something, text, and how deep the tags nest at the end."""

    EMPTY = {"meta", "link", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.tags, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


def test_page_loads_nothing_and_shows_all(written):
    source = (written[0] / "report.html").read_text()
    page = Page(source)
    assert page.open == []
    assert all(value.startswith("data:") for value in page.loads)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket", source)
    assert page.tags.count("script") == 1  # the remark's is text
    assert NASTY in page.text
    assert page.tags.count("img") == 7 + 1  # curves of every run, neighbours of one
    assert page.tags.count("table") == 6
    assert "Best epoch: said here" in page.text and "command: train.py" in page.text
    assert "not finished, 1 of 40 epochs" in page.text


@pytest.mark.parametrize(
    "folder, match",
    [("empty", "there is no run_N in it"), ("absent", "there is no such folder"), ("cub", "no finished run in .*cub$")],
)
def test_wrong_folders_end_in_one_line(refused, tmp_path, folder, match):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cub" / "run_1").mkdir(parents=True)
    refused("report.py", tmp_path / folder, "--output", tmp_path / "out", match=match)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_page_in_a_browser(written, tmp_path):
    """Clicks sort, numbers as numbers and blanks last; nothing is requested and nothing breaks the page's policy."""
    probe = """<script>
      window.problems = [];
      addEventListener("error", event => problems.push(event.message));
      addEventListener("securitypolicyviolation", event => problems.push(event.blockedURI));
      addEventListener("load", () => {
        const table = [...document.querySelectorAll("table")].at(-1), seen = {};
        const column = name => [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === name);
        for (const [name, clicks] of [["run", 1], ["R@1", 1], ["R@1", 2], ["remark", 1]]) {
          for (const th of table.tHead.rows[0].cells) th.removeAttribute("aria-sort");
          for (let i = 0; i < clicks; i++) table.tHead.rows[0].cells[column(name)].firstChild.click();
          seen[name + clicks] = [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
        }
        const requests = performance.getEntriesByType("resource").map(entry => entry.name)
          .filter(name => !name.startsWith("data:"));
        const images = [...document.images].map(image => image.naturalWidth);
        const said = JSON.stringify({seen, problems, images, requests});
        document.body.replaceChildren(Object.assign(document.createElement("pre"), {id: "said", textContent: said}));
      });
    </script>"""
    source = (written[0] / "report.html").read_text()
    page = tmp_path / "page.html"
    page.write_text(source.replace("<style>", probe + "<style>", 1))
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --dump-dom".split()
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    assert said["problems"] == [] and said["requests"] == []
    assert said["seen"]["run1"] == ["run_1", "run_2", "run_3", "run_4", "run_10"]
    assert said["seen"]["R@11"] == ["run_4", "run_3", "run_1", "run_2", "run_10"]
    assert said["seen"]["R@12"] == said["seen"]["R@11"][::-1]
    assert said["seen"]["remark1"][0] == "run_3"  # the only one with a remark
    assert len(said["images"]) == 8 and min(said["images"]) > 0
