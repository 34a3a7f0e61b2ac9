"""The benchmarks that train, the variants of HIST they compare, and the files for wandb's sweeps and for citing."""

import importlib.util
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import checkpoint
import flags
import hist
import pytest
import run
import torch
import yaml
from conftest import ROOT, TINY, options

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))  # at the end: code/ has a losses.py too
import ablation  # noqa: E402
import experiments  # noqa: E402
import variants  # noqa: E402

_spec = importlib.util.spec_from_file_location("losses_benchmark", BENCHMARKS / "losses.py")
losses = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(losses)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """variants.use replaces classes for good."""
    monkeypatch.setattr(hist, "CDs2Hg", hist.CDs2Hg)
    monkeypatch.setattr(hist, "HGNN", hist.HGNN)
    monkeypatch.setattr(run, "command", run.command)


# ---------------------------------------------------------------- variants


def criterion_of(variant=None, seed=0):
    if variant:
        variants.use(variant)
    torch.manual_seed(seed)
    return hist.HISTLoss(num_classes=5, embedding_size=6, hgnn_hidden=7).double()


def batch():
    random = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=random, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, 3, 4, 4])


def test_euclidean_and_cosine_are_what_their_names_say():
    X, _ = batch()
    euclidean, cosine = (criterion_of(f"distance={name}").cds2hg for name in ("euclidean", "cosine"))
    for i, c in itertools.product(range(8), range(5)):
        x, m = X[i] / X[i].norm(), euclidean.means[c] / euclidean.means[c].norm()
        assert torch.isclose(euclidean.squared_distances(X)[i, c], ((x - m) ** 2).sum())
        assert torch.isclose(cosine.squared_distances(X)[i, c], 1 - x @ m)


@pytest.mark.parametrize("name", ["euclidean", "cosine"])
def test_variances_of_these_distances_stay_at_one(name):
    criterion = criterion_of(f"distance={name}")
    criterion(*batch()).backward()
    assert criterion.cds2hg.log_vars.grad is None and criterion.cds2hg.means.grad.abs().sum() > 0
    assert float(criterion.hypergraph_summary()["variance"]) == 1


def test_two_layers_and_mahalanobis_are_hist_itself():
    plain = criterion_of()(*batch())
    assert torch.equal(criterion_of("layers=2")(*batch()), plain)
    assert torch.equal(criterion_of("distance=mahalanobis")(*batch()), plain)
    assert not torch.isclose(criterion_of("layers=3")(*batch()), plain)


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_deep_hgnn_is_theta_then_g_layer_by_layer(layers):
    X, T = batch()
    H = criterion_of().cds2hg(X, T)[1].detach()
    network = variants.DeepHGNN(5, 6, hidden=7, layers=layers).double()
    Dv, De = torch.diag(H.sum(dim=1)), torch.diag(H.sum(dim=0))
    G = Dv.sqrt().inverse() @ H @ De.inverse() @ H.T @ Dv.sqrt().inverse()
    expected = X
    for n, theta in enumerate(network.thetas):
        expected = G @ (expected @ theta.weight.T + theta.bias)
        if n < layers - 1:
            expected = (expected - expected.mean(dim=0)) / (expected.var(dim=0, unbiased=False) + 1e-5).sqrt()
            expected = torch.where(expected > 0, expected, 0.1 * expected)
    assert torch.allclose(network(X, H), expected) and len(network.thetas) == layers and expected.shape == (8, 5)


@pytest.mark.parametrize(
    "variant", ["", "layers=0", "layers=two", "layers=²", "distance=manhattan", "layers", "@x.args"]
)
def test_unknown_variants_are_refused(variant):
    with pytest.raises(ValueError, match="is no variant: give layers=N"):
        variants.use(variant)


def test_a_variant_trains_and_resumes(call, cub, tmp_path):
    done = call("variants.py", "layers=3", *options(cub, tmp_path), "--epochs", 1, "--warm", 0)
    assert done.code == 0, done.err
    assert call("variants.py", "layers=3", "--resume", tmp_path / "cub" / "run_1", "--epochs", 2).code == 0
    state = checkpoint.load(tmp_path / "cub" / "run_1" / "last.pth")
    assert state["epoch"] == 2 and "hgnn.thetas.2.weight" in state["criterion_state_dict"]
    assert state["made_by"]["command"].startswith("variants.py layers=3 ")


def test_variants_are_kept_apart_from_the_papers_loss(monkeypatch):
    """In folders of their own, and by keys of the checkpoint that train.py does not know."""
    states = {name: criterion_of(name and f"distance={name}").state_dict() for name in ("", "euclidean", "cosine")}
    assert [states[name].keys() - states[""].keys() for name in states] == [
        set(), {"cds2hg.Euclidean"}, {"cds2hg.Cosine"},
    ]  # fmt: skip
    parsed = []
    monkeypatch.setattr(variants.train, "main", lambda: parsed.append(flags.train_parser().parse()[0].log_dir))
    for words in ([], ["--resume"], ["--log-dir", "elsewhere"]):
        monkeypatch.setattr(sys, "argv", ["variants.py", "distance=cosine", *words])
        variants.main()
    assert parsed == [ROOT / "logs" / "variants" / "distance=cosine"] * 2 + [Path("elsewhere")]


# ---------------------------------------------------------------- runs


class FakeTraining:
    """Stands in for experiments.launch: writes what train.py would, with an R@1 of the flags' own making."""

    def __init__(self, recall=lambda args: 0.5):
        self.recall, self.commands = recall, []

    def __call__(self, command, threads):
        self.commands.append(command)
        args, given = flags.train_parser().parse(command[3 if command[1].endswith("variants.py") else 2 :])
        folder = args.log_dir / args.dataset / f"run_{args.run_num}"
        if args.resume:
            folder = Path(args.resume)
            args.val_classes = 0
        recall = self.recall(args)
        if recall is None:
            return False
        names = ["R@1", "R@2", "R@4"] + ["val R@1"] * (args.val_classes > 0)
        row = {"phase": "train", "seconds": 2.0, "commit": "abc", "torch": "9"} | dict.fromkeys(names, recall)
        rows = [row | {"epoch": n} for n in range(1, args.nb_epochs + 1)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.csv").write_text(run.csv_text(rows))
        if not args.resume:
            (folder / "args.json").write_text(json.dumps({"flags": flags.plain(args)}))
        (folder / "last.pth").touch()
        (folder / "x_best.pth").touch()
        return True


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.args"
    path.write_text(" ".join(TINY) + " --dataset cub --tau 32 --alpha 0.9")
    return path


@pytest.fixture
def experiment(monkeypatch, recipe, tmp_path):
    """Experiments as their command line makes them: experiment("--epochs", 3, "--", "--tau", 16)."""

    def make(*words):
        words = ["--recipe", recipe, "--output", tmp_path / "out", *words]
        monkeypatch.setattr(sys, "argv", ["x.py", *map(str, words)])
        return experiments.Experiments(experiments.parser_of("x", "x"))

    return make


def test_finished_runs_are_read_and_unfinished_ones_go_on(monkeypatch, experiment):
    fake = FakeTraining()
    monkeypatch.setattr(experiments, "launch", fake)
    bench = experiment("--epochs", 2)
    rows = bench.train("tau=8", ["--tau", 8], seed=3)
    assert len(rows) == 2 and bench.train("tau=8", ["--tau", 8], seed=3) == rows and len(fake.commands) == 1
    assert fake.commands[0][-4:] == ["--log-dir", str(bench.args.output / "tau=8"), "--remark", "tau=8"]
    longer = experiment("--epochs", 3)
    assert len(longer.train("tau=8", ["--tau", 8], seed=3)) == 3
    assert fake.commands[1][2:] == ["--resume", str(bench.folder("tau=8", 3)), "--epochs", "3"]
    with pytest.raises(ValueError, match="run_3 has 3 epochs, not 2: give another --output"):
        bench.train("tau=8", ["--tau", 8], seed=3)


def test_a_run_without_anything_kept_is_replaced_and_a_variant_resumes_as_one(monkeypatch, experiment):
    fake = FakeTraining()
    monkeypatch.setattr(experiments, "launch", fake)
    bench = experiment()
    bench.folder("layers=3", 1).mkdir(parents=True)
    bench.train("layers=3", [], 1, "layers=3")
    assert fake.commands[0][1:3] == [str(BENCHMARKS / "variants.py"), "layers=3"]
    assert fake.commands[0][-1] == "--overwrite"


@pytest.mark.parametrize("more", [["--tau", 16], ["--lr", 1], ["--model", "resnet34"], ["--image-size", 64]])
def test_runs_made_with_other_flags_are_refused(monkeypatch, experiment, more):
    monkeypatch.setattr(experiments, "launch", FakeTraining())
    experiment().train("base", [], 1)
    experiment("--", "--workers", 3, "--skip-bad-images").train("base", [], 1)  # no other experiment
    with pytest.raises(
        ValueError, match=r"run_1 was made with other flags \(.* instead of .*\): give another --output"
    ):
        experiment("--", *more).train("base", [], 1)


@pytest.mark.parametrize("more", [["--seed", 2], ["--epochs", 2], ["--resume"], ["--run-num", 1], ["--log-dir", "x"]])
def test_flags_that_the_benchmark_sets_are_refused_after_the_dashes(experiment, more):
    with pytest.raises(ValueError, match="the benchmark sets .* itself"):
        experiment("--", *more)


def test_recipes_go_by_name_or_by_file(monkeypatch, recipe):
    for given, dataset in (("glyphs", "glyphs"), ("recipes/cub.args", "cub"), (str(recipe), "cub")):
        monkeypatch.setattr(sys, "argv", ["x.py", "--recipe", given])
        assert experiments.Experiments(experiments.parser_of("x", "x")).flags.dataset == dataset


def test_launch_tells_divergence_from_failure(capfd):
    def script(text, code):
        return [sys.executable, "-c", f"import sys; print({text!r}, file=sys.stderr); sys.exit({code})"]

    assert experiments.launch(script("fine", 0), threads=1) is True
    assert experiments.launch(script("train.py: error: training diverged: the loss is nan", 1), threads=None) is False
    with pytest.raises(ValueError, match="exit status 1 of "):
        experiments.launch(script("no such data", 1), threads=None)
    assert "no such data" in capfd.readouterr().err


def test_a_signal_is_passed_on_and_ends_the_benchmark(tmp_path):
    text = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); open(sys.argv[1], 'w'); time.sleep(60)"
    )

    def interrupt():
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        experiments.launch([sys.executable, "-c", text, str(tmp_path / "begun")], threads=None)
    assert stopped.value.code == 130 and signal.getsignal(signal.SIGINT) is before


def test_means_and_spreads():
    assert experiments.mean_std([0.5, 0.6]) == "55.00 ± 7.07"
    assert experiments.mean_std([0.5]) == "50.00" and experiments.mean_std([]) == "diverged"


# ---------------------------------------------------------------- ablation


def test_ablation_compares_with_what_was_published(monkeypatch, capsys, recipe, tmp_path):
    def recall(args):  # falls with ls, as published; 1024 hidden units best, as not published; alpha 3 diverges
        if args.alpha == 3:
            return None
        return 0.5 - 0.1 * args.ls + args.hgnn_hidden / 10000 + args.seed / 100

    fake = FakeTraining(recall)
    monkeypatch.setattr(experiments, "launch", fake)
    words = ["--recipe", recipe, "--seeds", 1, 2, "--only", "ls,Hidden,alpha,layers", "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *map(str, words), "--", "--hgnn-hidden", "512"])
    ablation.main()
    said = capsys.readouterr().out
    assert "| 0.6 | 50.62 ± 0.71 | 2 | 89.74 |" in said
    assert "| 1 (the recipe) | 46.62 ± 0.71 | 2 | 89.41 |" in said
    assert "Same order: yes, 3 of 3 pairs of settings." in said  # ls
    assert "| 1024 | 51.74 ± 0.71 | 2 | 89.41 |" in said and "Same order: no, 2 of 3 pairs" in said
    assert "| 3 | diverged | 0 | – |" in said and "No figures are published." in said
    assert "three and more are about 3 points below two. Same order: no, 0 of 2" in said
    assert "commit abc, torch 9" in said and "seeds [1, 2]" in said
    # the base once a seed, and 3 + 2 + 4 + 3 settings around it
    assert len(fake.commands) == 2 * (1 + 3 + 2 + 4 + 3)
    assert said.endswith((tmp_path / "out" / "ablation_cub.md").read_text() + "\n")


def test_every_axis_has_the_recipe_in_it_and_flags_that_parse():
    for name in ("glyphs", "emoji", "cub"):
        base = vars(flags.train_parser().parse([f"@recipes/{name}.args"])[0]) | ablation.PAPERS_OWN
        for axis in ablation.AXES:
            made = ablation.settings(axis, base)
            assert [setting.name for setting in made].count("base") == 1
            assert set(ablation.AXES[axis].published) <= {setting.value for setting in made}
            for setting in made:
                flags.train_parser().parse(setting.words)
                if setting.variant:
                    variants.use(setting.variant)


def test_unknown_axes_are_named(capsys):
    assert ablation.names("tau, Alpha,tau") == ["tau", "alpha"]
    for wrong in ("", ",", "tau,beta"):
        with pytest.raises(ablation.argparse.ArgumentTypeError, match="give some of alpha,tau,"):
            ablation.names(wrong)


# ---------------------------------------------------------------- losses


def run_losses(monkeypatch, capsys, recipe, tmp_path, recall, *words):
    fake = FakeTraining(recall)
    monkeypatch.setattr(experiments, "launch", fake)
    monkeypatch.setattr(experiments.Experiments, "evaluate", lambda self, *_: {"MAP@R": 0.25})
    words = ["--recipe", recipe, "--output", tmp_path / "out", "--losses", *words]
    monkeypatch.setattr(sys, "argv", ["losses.py", *map(str, words)])
    losses.main()
    return fake, capsys.readouterr().out


def test_losses_choose_their_rates_on_held_out_classes(monkeypatch, capsys, recipe, tmp_path):
    def recall(args):
        if args.lr > 2e-3:
            return None  # diverges
        return 0.5 - abs(args.lr_ds - 0.01) - abs(args.lr - 1e-3) + args.seed / 1000 + 0.1 * args.ls

    words = ["hist", "hist_without_hgnn", "triplet", "--seeds", 1, 2, "--search"]
    words += ["--search-epochs", 1, "--epochs", 2]
    fake, said = run_losses(monkeypatch, capsys, recipe, tmp_path, recall, *words)
    parsed = [flags.train_parser().parse(command[2:])[0] for command in fake.commands]
    searched = [args for args in parsed if args.val_classes]
    assert len(searched) == 3 * 5 and {args.seed for args in searched} == {100}  # the same budget for each
    pairs = [(args.lr_ds, args.lr) for args in searched if args.loss == "hist" and args.ls]
    assert pairs == [(1e-3, 1e-3), (1e-2, 1e-3), (1e-1, 1e-3), (1e-2, 3e-4), (1e-2, 3e-3)]
    assert [args.lr for args in searched if args.loss == "triplet"] == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    reported = [args for args in parsed if not args.val_classes]
    assert {args.nb_epochs for args in searched} == {1} and {args.nb_epochs for args in reported} == {2}
    assert len(reported) == 3 * 2 and {args.seed for args in reported} == {1, 2}
    assert {(args.loss, args.IPC, args.ls) for args in reported} == {("hist", 0, 1), ("hist", 0, 0), ("triplet", 4, 1)}
    assert {args.lr for args in reported} == {1e-3}
    assert {args.lr_ds for args in reported if args.loss == "hist"} == {0.01}
    hist_line = "| hist | 60.15 ± 0.07 | 60.15 ± 0.07 | 60.15 ± 0.07 | 25.00 ± 0.00 | 2.0 | lr 0.001, lr-ds 0.01 | 2 |"
    assert hist_line in said and said.index("| hist |") < said.index("| hist_without_hgnn |")
    assert "less that without HGNN: +10.00 points, 95 % interval +10.00 to +10.00 (n = 2)" in said
    count = len(fake.commands)
    again, _ = run_losses(monkeypatch, capsys, recipe, tmp_path, recall, *words)
    assert {flags.train_parser().parse(c[2:])[0].lr for c in again.commands} == {3e-3, 1e-2}  # only what diverged
    assert len(again.commands) < count
    with pytest.raises(ValueError, match="hist: training diverged at every learning rate that --search tries"):
        run_losses(monkeypatch, capsys, recipe, tmp_path / "other", lambda args: None, "hist", "--search")


def test_losses_without_a_search_train_at_the_recipes_rates(monkeypatch, capsys, recipe, tmp_path):
    fake, said = run_losses(monkeypatch, capsys, recipe, tmp_path, lambda args: None, "arcface", "--seeds", 1)
    assert "| arcface | diverged | diverged | diverged | diverged | – | lr 0.001, lr-ds 0.1 | 0 |" in said
    with pytest.raises(ValueError, match="--seeds 100: the search uses this seed"):
        run_losses(monkeypatch, capsys, recipe, tmp_path, lambda args: 1, "hist", "--search", "--seeds", 100)


def test_the_difference_of_two_losses_is_paired_by_seed():
    def runs(recalls):
        return {seed: [{"R@1": recall}] for seed, recall in recalls.items()}

    first, second = {1: 0.52, 2: 0.62, 3: 0.73, 9: 0.1}, {1: 0.5, 2: 0.6, 3: 0.7}
    # differences 2, 2, 3: mean 7/3, standard error 1/3, Student's t at 97.5 % and 2 degrees of freedom 4.3027
    assert losses.difference(runs(first), runs(second)) == "+2.33 points, 95 % interval +0.90 to +3.77 (n = 3)"
    assert losses.difference(runs({1: 0.5}), runs(second)) == "at least two seeds of both are needed"


def test_every_entry_is_a_command_line():
    for loss, words in losses.ENTRIES.items():
        args = flags.train_parser().parse(list(map(str, words)))[0]
        assert args.loss == loss.removesuffix("_without_hgnn")
    assert set(flags.LOSSES) < losses.ENTRIES.keys()


# ---------------------------------------------------------------- files at the top


def ends(parameter: dict) -> list:
    """Its first and last value, or its least and greatest."""
    values = parameter.get("values") or [parameter["min"], parameter["max"]]
    return [values[0], values[-1]]


def test_the_sweep_gives_command_lines_of_train_py():
    sweep = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).is_file() and sweep["metric"] == {"name": "val R@1", "goal": "maximize"}
    assert set(sweep["parameters"]) == {"tau", "alpha", "ls", "lr-ds"}
    before = sweep["command"][: sweep["command"].index("${program}")]
    assert before == ["${env}", "${interpreter}"] and sweep["command"][-1] == "${args}"
    fixed = sweep["command"][len(before) + 1 : -1]
    for choice in itertools.product(*(ends(parameter) for parameter in sweep["parameters"].values())):
        words = [f"--{name}={value}" for name, value in zip(sweep["parameters"], choice, strict=True)]  # as the agent
        args, _ = flags.train_parser().parse([*fixed, *words])
        assert (args.tau, args.alpha, args.ls, args.lr_ds) == choice
        assert args.dataset == "cub" and args.val_classes > 0 and args.wandb == "online"
        assert f"hist_{args.dataset}" == sweep["project"]


def test_the_citation_file_names_software_paper_and_replication():
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert content["cff-version"] == "1.2.0" and content["type"] == "software" and content["message"]
    assert content["title"] == "HIST loss, reproduced" and content["authors"] == [{"name": "The contributors"}]
    paper, (replication,) = content["preferred-citation"], content["references"]
    for entry in (paper, replication):
        assert entry["title"] and entry["type"] and all(author["family-names"] for author in entry["authors"])
        assert re.fullmatch(r"10\.\d{4,}/\S+", entry["doi"])
    assert paper["doi"] == "10.1109/CVPR52688.2022.00031" and (paper["start"], paper["end"]) == (212, 222)
    assert [author["family-names"] for author in paper["authors"]] == ["Lim", "Yun", "Park", "Choi"]
    assert replication["doi"].endswith("8173666")
