"""The benchmarks' data and comparisons, small, and the files for wandb's sweeps and for citing."""

import itertools
import sys

import flags
import torch
import yaml
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import loss  # noqa: E402
import retrieval  # noqa: E402


def test_searches_that_are_compared_find_the_same():
    images, size, classes, noise, ks = retrieval.SETS["quick"]
    X, T = map(torch.from_numpy, retrieval.make_embeddings(images // 4, size, classes, noise))
    reference = retrieval.ours_with_precision(X, T, ks, "cpu", 1, 1.0)
    assert 0.2 < reference["R@1"] < 0.9
    for method in retrieval.METHODS.values():
        figures = method(X, T, ks, "cpu", 1, 1.0)
        assert all(abs(value - reference[name]) < 1e-6 for name, value in figures.items())


def test_the_textbook_form_is_the_same_loss():
    found = []
    for form in ("ours", "textbook"):
        criterion, X, T = loss.problem(16, 30, 32, "cpu")
        value = loss.FORMS[form](criterion, X, T)
        value.backward()
        found.append(loss.results(value, criterion, X))
    differences = loss.relative_differences(*found)
    assert differences.pop("theta 1") < 1e-2 and len(differences) == 3  # BatchNorm cancels most of that gradient
    assert max(differences.values()) < 1e-4


def ends(parameter: dict) -> list:
    """Its first and last value, or its least and greatest."""
    values = parameter.get("values") or [parameter["min"], parameter["max"]]
    return [values[0], values[-1]]


def test_the_sweep_gives_command_lines_of_train_py():
    sweep = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).is_file() and sweep["metric"] == {"name": "best val R@1", "goal": "maximize"}
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
    assert content["title"] and content["authors"]
    paper, (replication,) = content["preferred-citation"], content["references"]
    assert all(entry["title"] and entry["type"] and entry["authors"] for entry in (paper, replication))
    assert paper["doi"] == "10.1109/CVPR52688.2022.00031" and replication["doi"].endswith("8173666")
