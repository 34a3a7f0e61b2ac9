"""The report: exact numbers on runs made by hand, every file readable by what it is for, a page that stays at home."""

import html.parser
import json
import re
import subprocess
import sys

import pandas as pd
import pytest
import report
import run
from trees import picture

COUNTS = {
    "cub": ((5864, 100), (5924, 100)),
    "cars": ((8054, 98), (8131, 98)),
    "SOP": ((59551, 11318), (60502, 11316)),
}
NASTY = '<script>alert("x")</script> a|b $5 & 100% #1 _u_ {c} \\d ~e^f * `g` [h](http://i.example/) ä'


def split(images, classes, digest="d1d1"):
    return {"images": images, "classes": classes, "digest": digest}


def whole(dataset, held_out=None, digest="d1d1"):
    """What args.json says of the data of a whole benchmark, of which this seed held out classes; of others a little."""
    (images, classes), test = COUNTS.get(dataset, ((20, 2), (20, 2)))
    data = {"train": split(images, classes, digest), "query": split(*test, digest), "gallery": None}
    if held_out:
        data["train"] = split(images - 500 - held_out, classes - 10, f"a{held_out}")
        data["validation"] = split(500 + held_out, 10, f"b{held_out}")
    return data


def make_run(folder, recalls, seed=1, validation=None, seconds=None, data=None, more=None, **changed):
    """A finished run; recalls: {K: R@K per epoch}, validation: val R@1 per epoch; changed: flags by destination.

    data: args.json's "data" where it is not the whole benchmark's; more: other entries of args.json.
    """
    folder.mkdir(parents=True)
    epochs = len(next(iter(recalls.values())))
    flags = {"dataset": folder.parent.name, "model": "resnet50", "sz_embedding": 512, "nb_epochs": epochs, "tau": 32.0,
             "val_classes": 0.1 if validation else 0.0, "seed": seed, "run_num": int(folder.name[4:]), "gpu_id": seed,
             "remark": "", **changed}  # fmt: skip
    data = data or whole(flags["dataset"], validation and seed)
    content = {"flags": flags, "made_by": {"commit": "abc", "command": "train.py"}, "data": data} | (more or {})
    (folder / "args.json").write_text(json.dumps(content))
    # Before training the figures are higher than ever after: neither row counts as the best.
    table = pd.DataFrame({f"R@{k}": [0.999, 0.999, *values] for k, values in recalls.items()})
    if validation:
        table["val R@1"] = [0.999, 0.999, *validation]
    table["phase"] = ["untrained", "warm-up"] + ["train"] * epochs
    table["epoch"] = range(-1, epochs + 1)
    if seconds:
        table["seconds"] = seconds * (table["epoch"] + 1)
    table.assign(commit=[f"made epoch {epoch}" for epoch in table["epoch"]], torch="2.14.1", loss=9.0).to_csv(
        folder / "results.csv", index=False
    )
    (folder / f"{flags['dataset']}_resnet50_best_results.txt").write_text("Best epoch: said here\n")
    picture(1, 1).save(folder / "curves.png")


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """CUB: three seeds of a recipe, another, one with held-out classes, two that are not done; Cars, other losses."""
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
    losses = ((1, 3.0, {}), (2, 4.0, {"seed": 2}), (3, 7.5, {"loss": "triplet"}), (4, 1, {"ls": 0.0}))
    for number, seconds, changed in losses:
        recalls = {1: [0.8, 0.898], 2: [0.8, 0.94], 4: [0.8, 0.963]}
        make_run(root / "losses" / f"run_{number}", recalls, seconds=seconds, **({"dataset": "cars"} | changed))

    make_run(root / "cub" / "run_5", {1: [0.7]})
    (root / "cub" / "run_5" / "results.csv").unlink()
    make_run(root / "cub" / "run_6", {1: [0.7], 2: [0.7], 4: [0.8]}, nb_epochs=40)
    return root


def section(folder):
    return report.Section(folder.name, report.read_runs(folder)[0])


def grouped(made):
    """The names of the runs of each group that count."""
    return [tuple(group["run"]) for _, group in made.counted.groupby("group")]


@pytest.fixture(scope="module")
def written(logs, tmp_path_factory):
    """Everything that the script writes about both data sets, and what it said."""
    output = tmp_path_factory.mktemp("output") / "new" / "folder"
    command = [sys.executable, "-W", "error::FutureWarning", report.__file__, logs / "cars", logs / "cub"]
    done = subprocess.run([*map(str, command), "--output", output], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return output, done


def test_csv_has_runs_in_order_of_number_with_their_best_and_last(written):
    table = pd.read_csv(written[0] / "report.csv")
    assert table.groupby("dataset").size().to_dict() == {"cars": 2, "cub": 5}
    assert (table["commit"] == "made epoch " + table["best epoch"].astype(str)).all()
    # of the flags only those that differ are columns
    assert {"tau", "val-classes", "epochs", "data"} < set(table) and "alpha" not in table
    table = table.query("dataset == 'cub'").set_index("run")
    assert list(table.index) == ["run_1", "run_2", "run_3", "run_4", "run_10"]
    assert table.loc["run_10", ["best epoch", "R@1 (%)", "R@2 (%)", "R@4 (%)"]].tolist() == [2, 71.9, 81.9, 88.1]
    assert table.loc["run_10", ["last R@1 (%)", "last R@2 (%)", "last R@4 (%)"]].tolist() == [70.0, 80.0, 88.0]
    assert table["tau"].tolist() == [32, 32, 24, 32, 32] and table["seed"].tolist() == [1, 2, 1, 1, 10]
    assert table.loc["run_4", ["chosen by", "best epoch", "R@1 (%)"]].tolist() == ["held-out classes", 2, 70.0]
    assert table.loc["run_3", "remark"] == NASTY


def test_groups_are_runs_that_differ_in_their_seed_alone_best_first(logs):
    made = section(logs / "cub")
    assert grouped(made) == [("run_1", "run_2", "run_10"), ("run_3",), ("run_4",)]
    shown = made.tables()["Groups"]
    assert shown.loc[0, ["runs", "seeds", "R@1", "R@2", "R@4"]].tolist() == [
        "3", "1, 2, 10", "71.50 ± 0.36", "81.50 ± 0.36", "88.10 ± 0.00"
    ]  # fmt: skip
    assert shown.loc[1, ["runs", "R@1"]].tolist() == ["1", "70.10"]


def test_csv_of_groups_has_figures_and_their_difference_to_what_was_published(written):
    table = pd.read_csv(written[0] / "report_groups.csv", keep_default_na=False).query("dataset == 'cub'")
    row = table.iloc[0]
    assert row["figure"] == "R@1" and row["mean (%)"] == pytest.approx(71.5, abs=1e-12)
    # deviations −0.3, −0.1, 0.4: their squares sum to 0.26, over n − 1 = 2
    assert float(row["std (%)"]) == pytest.approx(0.13**0.5, abs=1e-12)
    table = table.set_index(["group", "figure", "source"]).astype({"difference": str})
    for group, figure, source, difference, verdict in (
        (1, "R@1", "paper", "0.1", "within"),  # ± 0.2 of the paper
        (1, "R@2", "paper", "0.4", "above"),
        (1, "R@1", "replication, re-run", "1.4", "above"),  # ± 0.36 of our own
        (1, "R@2", "replication, tuned", "-0.3", "within"),
        (2, "R@1", "paper", "-1.3", "below"),
        (2, "R@1", "replication, re-run", "0.0", ""),  # one run beside a figure without ±
    ):
        assert table.loc[(group, figure, source), ["difference", "verdict"]].tolist() == [difference, verdict]


def test_verdict_by_the_published_deviation_or_else_by_ours(tmp_path):
    verdicts = ("within", "within", "below", "above")
    for number, best in enumerate((0.712, 0.716, 0.7119, 0.7161), 1):  # 71.2 − 71.4 in binary is a hair more than 0.2
        make_run(tmp_path / "cub" / f"run_{number}", {1: [best]}, tau=float(number))
    table = section(tmp_path / "cub").figures_table().set_index(["tau", "source"])["verdict"]
    for number, expected in enumerate(verdicts, 1):
        assert table[number, "paper"] == expected and table[number, "replication, re-run"] == ""


def test_the_console_shows_the_markdown_what_is_left_out_and_where_the_files_lie(logs, written):
    output, done = written
    text = (output / "report.md").read_text()
    assert done.stdout.splitlines()[0] == "# Runs"
    assert done.stdout.split("\nwritten: ")[0].strip() in text
    check_markdown(text, num_tables=6)
    for name in ("report.md", "report.csv", "report_groups.csv", "report.html"):
        assert str(output / name) in done.stdout.splitlines()[-1]
    reasons = {"run_5": "results.csv: No such file or directory", "run_6": "not finished, 1 of 40 epochs"}
    said = [f"warning: {logs / 'cub' / run}: left out, {why}" for run, why in reasons.items()]
    assert done.stderr.splitlines() == said


def check_markdown(text, num_tables):
    blocks = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    assert len(blocks) == num_tables
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
        assert len({len(line) for line in block.splitlines()}) == 1
    assert not re.search(r"(?<!\\)[<\[`*$]", text)


def test_a_run_that_repeats_another_counts_once(tmp_path):
    for number, seed, best in ((1, 1, 0.70), (2, 2, 0.72), (3, 1, 0.70), (4, 2, 0.74), (12, 1, 0.70)):
        # The seconds differ, and so does where it ran: the figures are what counts.
        make_run(tmp_path / "cub" / f"run_{number}", {1: [0.6, best]}, seed=seed, seconds=number, gpu_id=number)
    made = section(tmp_path / "cub")
    assert grouped(made) == [("run_1", "run_2", "run_4")]
    row = made.figures_table().iloc[0]
    assert row[["runs", "seeds"]].tolist() == [3, "1, 2, 2"]
    assert row[["mean (%)", "std (%)"]].tolist() == pytest.approx([72, 2], abs=1e-12)
    runs = made.runs_table()
    assert runs["repeats"].tolist() == ["", "", "run_1", "", "run_1"] and set(runs["group"]) == {1}
    assert "repeats" in made.tables()["Runs"]


def test_runs_on_different_data_are_never_averaged(tmp_path):
    """Same flags, other images: by digest of any split, or by counts."""
    datas = [whole("cub"), whole("cub")]
    for name in ("train", "query"):
        datas.append(whole("cub"))
        datas[-1][name]["digest"] = "0f"
    datas.append(whole("cub") | {"gallery": split(100, 10)})
    for number, data in enumerate(datas, 1):
        make_run(tmp_path / "cub" / f"run_{number}", {1: [0.5 + 0.01 * number]}, seed=number, data=data)
    made = section(tmp_path / "cub")
    assert set(grouped(made)) == {("run_1", "run_2"), ("run_3",), ("run_4",), ("run_5",)}
    shown = made.runs_table().set_index("run")["data"]
    assert shown["run_1"].startswith("train 5864/100, query 5924/100 (") and shown.nunique() == 4
    assert shown["run_5"].startswith("train 5864/100, query 5924/100, gallery 100/10 (")


def test_held_out_classes_of_changed_images_are_another_experiment(tmp_path):
    """As many images of as many classes, one of them another picture; the digest of both parts together tells."""
    for seed, shown in ((1, "a"), (2, "a"), (3, "b")):
        classes = [f"class {c}" for c in range(10)]
        digests = dict.fromkeys([*classes, "x", "y"], "1") | {"class 4": shown}
        data = {}
        for name, part in {"train": classes[seed:], "validation": classes[:seed], "query": ["x", "y"]}.items():
            digest = "the same" if name == "query" else f"of seed {seed}"
            data[name] = {"images": 6 * len(part), "classes": part, "sizes": [6] * len(part), "digest": digest}
            data[name]["class_digests"] = [digests[c] for c in part]
        data = run.summary_of(data)
        make_run(tmp_path / "cub" / f"run_{seed}", {1: [0.5 + seed / 100]}, seed=seed, validation=[0.5], data=data)
    make_run(tmp_path / "cub" / "run_4", {1: [0.5]}, seed=4, validation=[0.5], data=whole("cub", digest="0f"))
    assert set(grouped(section(tmp_path / "cub"))) == {("run_1", "run_2"), ("run_3",), ("run_4",)}


def test_flags_that_all_runs_share_are_said_once(tmp_path):
    for number, tau in ((1, 32.0), (2, 24.0)):
        flags = {"alpha": 1.1, "log_dir": "/somewhere", "nb_workers": 9, "tau": tau, "image_size": None}
        make_run(tmp_path / "cub" / f"run_{number}", {1: [0.5]}, young="x", **flags)
    made = section(tmp_path / "cub")
    said = re.fullmatch(r"All runs: (.*) \([0-9a-f]{8}\)\.", made.shared())[1]
    # its defaults and where it ran are not worth a word; flags that train.py does not know are
    assert said == "dataset cub, model resnet50, alpha 1.1, epochs 1, young x, data train 5864/100, query 5924/100"
    for title in ("Groups", "Runs"):
        assert "tau" in made.tables()[title] and not {"alpha", "--young", "model"} & set(made.tables()[title])


@pytest.mark.parametrize(
    "dataset, model, changed, expected",
    [
        ("cub", "resnet50", {}, {"paper": [71.4, 81.1, 88.1], "replication, re-run": [70.1, 79.7, 87.4]}),
        ("cars", "resnet50", {}, {"paper": [89.6, 93.9, 96.4], "replication, tuned": [90.2, 94.5, 96.8]}),
        ("cub", "bn_inception", {}, {"replication, tuned": [70.0, 79.4, 86.6], "best quoted": [70.0]}),
        ("cars", "bn_inception", {}, {"replication, tuned": [88.1, 92.7, 95.7], "best quoted": [87.6]}),
        ("SOP", "bn_inception", {}, {"paper, quoted by a survey": [79.6, 91.0, 96.2], "replication, re-run": [77.4]}),
        ("cub", "resnet18", {}, {}),
        ("glyphs", "resnet50", {}, {}),
        ("cub", "resnet50", {"sz_embedding": 64}, {}),
        ("cub", "resnet50", {"dataset": "nobody's"}, {}),
        ("mixed", "resnet50", {"dataset": "cars"}, {"replication, tuned": [90.2, 94.5, 96.8]}),
        ("cub", "resnet50", {"data": whole("cub") | {"query": split(5794, 200)}}, {}),
        ("cub", "resnet50", {"data": whole("cub") | {"train": split(2900, 100)}}, {}),
        ("cub", "resnet50", {"data": whole("cub") | {"gallery": split(100, 10)}}, {}),
        ("cub", "resnet50", {"validation": [0.5]}, {}),
    ],
)
def test_published_figures_stand_beside_what_they_belong_to(tmp_path, dataset, model, changed, expected):
    ks = (1, 10, 100) if dataset == "SOP" else (1, 2, 4)
    make_run(tmp_path / dataset / "run_1", {k: [0.5] for k in ks}, model=model, **changed)
    made = section(tmp_path / dataset)
    known = made.figures_table().dropna(subset="source").groupby("source")
    assert {source: known.get_group(source)["published (%)"].tolist() for source in expected} == expected
    assert len(known) == {"resnet50": 3, "bn_inception": 4}[model] if expected else len(known) == 0
    assert all(any(line.startswith(f"{source}: ") for line in report.explanations([made])) for source in known.groups)


GOOD_FLAGS = '"flags": {"nb_epochs": 1}'
TOO_DEEP = "[" * 100_000 + "]" * 100_000


def test_a_broken_run_is_left_out_with_its_reason_and_stops_nothing(tmp_path):
    cases = [
        ("args.json", f'{{{GOOD_FLAGS}, "made_by": ["commit"]}}', "args.json: "),
        ("args.json", f'{{{GOOD_FLAGS}, "made_by": {{}}, "resumptions": [3]}}', "args.json: "),
        ("args.json", f'{{{GOOD_FLAGS}, "made_by": {{}}}}', "args.json: .*'data'"),
        ("args.json", f'{{{GOOD_FLAGS}, "made_by": {{}}, "data": {{"train": 5}}}}', "args.json: "),
        ("args.json", TOO_DEEP, "args.json: "),
        ("args.json", '{"flags": {"nb_epochs": 1, "tau": NaN}}', "args.json: .*NaN"),
        ("args.json", json.dumps({"flags": {}, "made_by": {}, "data": whole("cub", digest=None)}), "args.json: "),
        ("args.json", json.dumps({"flags": {"nb_epochs": 10**400}, "made_by": {}, "data": whole("cub")}), "not fini"),
        ("args.json", json.dumps({"flags": {"nb_epochs": "x"}, "made_by": {}, "data": whole("cub")}), "results.csv: "),
        ("args.json", b"\xff\xfe{}", "args.json: .*utf-8"),
        ("args.json", "", "args.json: "),
        ("args.json", "[]", r"args.json: it is damaged or not of train.py \("),
        ("results.csv", "phase,epoch,R@1\ntrain,1,much\n", "results.csv: the column R@1 lacks numbers"),
        ("results.csv", "phase,epoch,R@1\ntrain,1,7.5\n", "results.csv: the column R@1 lacks numbers"),
        ("results.csv", "phase,epoch,R@1\ntrain,1,\n", "results.csv: the column R@1 lacks numbers"),
        ("results.csv", "phase,epoch,R@2\ntrain,1,0.5\n", "results.csv: the column R@1 lacks numbers"),
        ("results.csv", "phase,epoch,R@1\ntrain,,0.5\n", "results.csv: the column epoch lacks numbers"),
        ("results.csv", "phase,epoch,R@1\ntrain,1e300,0.5\n", "results.csv: the column epoch lacks numbers"),
        ("results.csv", "epoch,R@1\n1,0.5\n", "results.csv: .*'phase'"),
        ("results.csv", b"\x00\xff", "results.csv: "),
        ("results.csv", "\n\n", "results.csv: "),
        ("results.csv", b"phase,epoch,R@1\ntrain,1,0.\xff\n", "results.csv: .*utf-8"),
        ("results.csv", "phase,epoch,R@1\ntrain,1,0.5,6,7\ntrain,2\n", "not finished"),
        *[(name, None, f"{re.escape(name)}: Is a directory") for name in
          ("args.json", "results.csv", "cub_resnet50_best_results.txt", "curves.png", "neighbours.png")],
    ]  # fmt: skip
    for name in ("run_²", "run_٣", "run_", "run_1_old", "run_-1", "run_x"):  # no runs, whatever they hold
        (tmp_path / "cub" / name).mkdir(parents=True)
    make_run(tmp_path / "cub" / "run_99", {1: [0.5]})
    for number, (name, content, _) in enumerate(cases):
        make_run(tmp_path / "cub" / f"run_{number}", {1: [0.5]})
        broken = tmp_path / "cub" / f"run_{number}" / name
        broken.unlink(missing_ok=True)
        if content is None:
            broken.mkdir()
        else:
            broken.write_bytes(content if isinstance(content, bytes) else content.encode())
    runs, reasons = report.read_runs(tmp_path / "cub")
    assert [run["run"] for run in runs] == ["run_99"]
    for number, ((_, _, match), reason) in enumerate(zip(cases, reasons, strict=True)):
        assert re.search(rf"run_{number}: left out, {match}", reason), reason
        assert "\n" not in reason and len(reason) < 500


def test_each_folder_is_one_section_with_a_name_of_its_own(tmp_path, call, monkeypatch):
    for parent in ("one", "two"):
        make_run(tmp_path / parent / "cub" / "run_1", {1: [0.5]})
    monkeypatch.chdir(tmp_path)
    for folders, names in ((["one/cub", tmp_path / "one/cub", "one/../one/cub"], ["cub"]),
                           (["one/cub", "two/cub"], [f"{tmp_path}/one/cub", f"{tmp_path}/two/cub"])):  # fmt: skip
        assert call("report.py", *folders, "--output", "out").code == 0
        assert pd.read_csv(tmp_path / "out" / "report.csv")["dataset"].tolist() == names
    assert "there is no run_N in it" in call("report.py", "one").err


def test_images_that_changed_during_a_run_keep_it_apart(tmp_path):
    """Only epochs after the change count, the run is in a group of its own, and nothing published is beside it."""
    change = {"after_epoch": 1, "data_before": whole("cub", digest="0f")}
    make_run(tmp_path / "cub" / "run_1", {1: [0.9, 0.6, 0.7]}, more={"resumptions": [change]})
    make_run(tmp_path / "cub" / "run_2", {1: [0.5, 0.6, 0.6]}, seed=2)
    make_run(tmp_path / "cub" / "run_3", {1: [0.5]}, more={"resumptions": [change]})
    make_run(tmp_path / "cub" / "run_4", {1: [0.5, 0.6, 0.65]}, more={"resumptions": [change | {"after_epoch": 0}]})
    runs, reasons = report.read_runs(tmp_path / "cub")
    assert [(run["run"], run["best epoch"]) for run in runs] == [("run_1", 3), ("run_2", 2), ("run_4", 3)]
    assert "run_3: left out, its images changed and no epoch was trained since" in reasons[0]
    made = report.Section("cub", runs)
    assert made.counted["group"].nunique() == 3 and "other images until epoch 1" in runs[0]["data"]
    assert made.figures_table().dropna(subset="source")["group"].nunique() == 1
    # version 1.0.0 left images that could not be decoded out of the scores alone
    table = pd.read_csv(tmp_path / "cub" / "run_2" / "results.csv").assign(undecoded=[None, None, 3, 3, 3])
    table.to_csv(tmp_path / "cub" / "run_2" / "results.csv", index=False)
    made = section(tmp_path / "cub")
    assert "could not be decoded" in made.runs["data"][1] and made.figures_table()["source"].isna().all()


def test_a_resumed_run_says_how_often_and_the_last_word_on_its_epochs_counts(call, tmp_path):
    """A run that was made longer, or shorter, by --resume --epochs N; or went on as it was."""
    for number, first, then in ((1, 2, 20), (2, 3, 2), (3, 1, 2)):
        more = {"resumptions": [{"after_epoch": 1, "flags": {"nb_epochs": then}}, {"after_epoch": "<b>5"}]}
        make_run(tmp_path / "cub" / f"run_{number}", {1: [0.5, 0.6]}, nb_epochs=first, seed=number, more=more)
    make_run(tmp_path / "cub" / "run_4", {1: [0.5, 0.6, 0.7]}, seed=4, more={"resumptions": None})
    runs, reasons = report.read_runs(tmp_path / "cub")
    assert "run_1: left out, not finished, 2 of 20 epochs" in reasons[0]
    made = report.Section("cub", runs)
    assert grouped(made) == [("run_4",), ("run_2", "run_3")] and made.runs_table()["epochs"].tolist() == [2, 2, 3]
    assert [run.get("resumed after epoch") for run in made.runs["made by"]] == [*["1 <b>5"] * 2, None]
    assert call("report.py", tmp_path / "cub", "--output", tmp_path).code == 0
    page = Page((tmp_path / "report.html").read_text())
    assert "resumed after epoch: 1 <b>5" in page.text and page.open == []


def test_nothing_of_a_run_is_executed_or_injected(tmp_path_factory, call):
    """A report of runs that say dangerous things wherever a run says something."""
    root = tmp_path_factory.mktemp("hostile")
    script = "<script>alert(1)</script>"
    rude = f"{NASTY}\n| --- |\r\n{script} \x00\x1b[31m \ud800 __init__ www.i.example R@1"
    folder = root / script.replace("/", "")
    names = {f"a{rude}": rude, script: {"b": [script]}, "R@1": "&", "run": "%"}
    for number, (name, value) in enumerate(names.items(), 1):
        flags = {name: value, "dataset": "cub", "model": rude, "tau": [number], "runs": NASTY, "val_classes": 0}
        more = {"made_by": {script: script, rude: rude, "deep": [{"x": rude}]}}
        make_run(folder / f"run_{number}", {1: [0.5]}, remark=rude, seed=script, more=more, **flags)
        table = pd.read_csv(folder / f"run_{number}" / "results.csv").replace("made epoch 1", f"{script}|")
        table.assign(**{f"R@2{script}": 0.5, f"R@{script}": 0.5, script: script}).to_csv(
            folder / f"run_{number}" / "results.csv", index=False
        )
        (folder / f"run_{number}" / "cub_best_results.txt").write_text(f"class {script} {NASTY}")
    make_run(folder / "run_9", {1: [0.5]}, nb_epochs=script)
    output = tmp_path_factory.mktemp("output")
    done = call("report.py", folder, "--output", output)
    assert done.code == 0 and len(done.err.splitlines()) == 1
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.out + done.err)
    texts = {path.name: path.read_text() for path in output.iterdir()}
    assert not any(re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text) for text in texts.values())

    page = Page(texts["report.html"])
    assert page.open == [] and "script" not in page.tags and not {"b", "h"} & set(page.tags)
    assert "<script>" not in texts["report.html"] and page.text.count("<script>alert(1)</script>") > 20
    text = texts["report.md"]
    check_markdown(text, num_tables=2)
    assert text.count("script") and not re.search(r"(?<!\\)(?<![^\W_])_|(?<!\\)_(?![^\W_])|https?://|www\.", text)
    assert sum(line.startswith("#") for line in text.splitlines()) == 4


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
    assert "script" not in page.tags  # the remark's is text
    assert NASTY in page.text
    assert page.tags.count("img") == 7 + 1  # curves of every run, neighbours of one
    assert page.tags.count("table") == 6
    assert "Best epoch: said here" in page.text and "command: train.py" in page.text
    assert "not finished, 1 of 40 epochs" in page.text
