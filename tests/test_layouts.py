"""Every benchmark in every layout: trained one epoch and scored through the scripts."""

import json

import pandas as pd
import pytest
from conftest import TINY
from trees import make_cars, make_folder, make_inshop, make_sop

TREES = {
    "cars 1": ("cars", lambda root: make_cars(root, layout=1)),
    "cars 2": ("cars", lambda root: make_cars(root, layout=2)),
    "cars 3": ("cars", lambda root: make_cars(root, layout=3)),
    "SOP": ("SOP", make_sop),
    "Inshop": ("Inshop", make_inshop),
    "folder train+test": ("folder", lambda root: make_folder(root, "train+test")),
    "folder classes": ("folder", lambda root: make_folder(root, "classes")),
    "folder train+query+gallery": ("folder", lambda root: make_folder(root, "train+query+gallery")),
    "folder csv": ("folder", lambda root: make_folder(root, "csv")),
}
KS = {"SOP": [1, 10, 100, 1000], "Inshop": [1, 10, 20, 30, 40, 50]}


@pytest.mark.parametrize("layout", TREES)
def test_trains_and_scores(call, tmp_path, layout):
    name, make = TREES[layout]
    root = tmp_path / "data"
    make(root)
    words = ["--dataset", name, "--data-root", root, "--log-dir", tmp_path / "logs", "--epochs", 1]
    trained = call("train.py", *TINY, *words)
    assert trained.code == 0, trained.err
    run, figures = tmp_path / "logs" / name / "run_1", tmp_path / "figures.json"
    scored = call("evaluate.py", "--model-path", run, "--data-root", root, "--gpu-id", -1, "--json", figures)
    assert scored.code == 0, scored.err
    found = json.loads(figures.read_text())
    row = pd.read_csv(run / "results.csv").iloc[-1]
    assert found["figures"] == {f"R@{k}": row[f"R@{k}"] for k in KS.get(name, [1, 2, 4, 8, 16, 32])}
    assert (found["gallery"] is not None) == (layout in ("Inshop", "folder train+query+gallery"))
