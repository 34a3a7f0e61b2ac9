"""wandb: off unless asked for, never in the way, and all there when read back from its own file."""

import sys
import time
from types import SimpleNamespace

import pytest
import summary
import torch
import tracking
from conftest import options

wandb = pytest.importorskip("wandb")
COMMIT = summary.environment(torch.device("cpu"))["commit"].encode()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_offline_run(call, cub, tmp_path):
    """What wandb keeps in its own file, whose records hold texts as they are."""
    words = options(cub, tmp_path, "--epochs", 1, "--wandb", "offline", "--remark", "two words")
    assert call("train.py", *words).code == 0
    run = tmp_path / "cub" / "run_1"
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    said = [b"hist_cub", b"run_1", b"timm:test_resnet", b"words", b"sz_batch", b"best epoch", b"best R@1", COMMIT]
    said += [b"curves", b"neighbours", b"hypergraph", b"embedding", b"incidence"]
    said += [f"R@{k}".encode() for k in (1, 2, 4, 8, 16, 32)]
    deadline = time.monotonic() + 300
    while missing := [text for text in said if text not in file.read_bytes()]:  # wandb's own process writes on
        assert time.monotonic() < deadline, missing
        time.sleep(0.2)
    # a resumed run goes on under the same id
    assert call("train.py", "--resume", run / "last.pth", "--epochs", 2).code == 0
    ids = {path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")}
    assert ids == {torch.load(run / "last.pth", weights_only=True)["wandb_id"]}


@pytest.mark.parametrize(
    "flag, environment, expected",
    [
        (None, None, None), (None, "disabled", None), (None, "offline", "offline"), ("off", "online", None),
        ("offline", "online", "offline"), ("online", None, "offline"),  # no key here: one line, then offline
    ],
)  # fmt: skip
def test_mode(monkeypatch, tmp_path, capsys, flag, environment, expected):
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    monkeypatch.setattr(wandb, "login", lambda **options: False)
    started, metrics = [], []
    handle = SimpleNamespace(define_metric=lambda name, step_metric: metrics.append((name, step_metric)))
    monkeypatch.setattr(wandb, "init", lambda **options: started.append(options) or handle)
    args = SimpleNamespace(wandb=flag, dataset="cub", model="resnet18", seed=1, remark=f"a {70 * 'x'}")
    run = tracking.start(args, tmp_path / "run_3", {"lr": 1}, None)
    assert (run is not None) == (expected is not None) and metrics == [("*", "epoch")] * bool(run)
    assert [options["mode"] for options in started] == ([expected] if expected else [])
    assert all(options["tags"][-2:] == ["a", 64 * "x"] for options in started)  # wandb takes no longer ones
    said = capsys.readouterr().out
    assert ("offline" in said) == (flag == "online") and said.count("\n") == (flag == "online")


def test_not_installed_matters_only_when_asked_for(call, refused, cub, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    quick = options(cub, tmp_path, "--epochs", 0, "--warm", 0)
    assert call("train.py", *quick).code == 0
    refused("train.py", *quick, "--wandb", "offline", match="wandb is not installed .pip install wandb")


def test_the_summary_names_what_chose_the_best_epoch():
    run = SimpleNamespace(log=lambda row: None, summary={})
    best = {"phase": "train", "epoch": 3, "val R@1": 0.75, "val R@2": 0.875, "R@1": 0.5, "R@2": 0.625, "loss": 1.0}
    tracking.log(run, best, best)
    assert run.summary == {"best epoch": 3, "best val R@1": 0.75, "best R@1": 0.5, "best R@2": 0.625}
