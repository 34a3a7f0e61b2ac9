"""wandb: off unless asked for, never in the way, and all there when read back from its own file."""

import json
import struct
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import tracking
from conftest import BEST, options
from summary import environment

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


def records(folder):
    """Everything in the .wandb files of a run folder.

    Such a file is a header of 7 bytes, then LevelDB's log format: blocks of 32 KiB that hold chunks of
    (checksum 4 bytes, length 2, type 1, data); type 1 is a whole record, 2, 3 and 4 its first, middle and last part.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, place, parts = path.read_bytes(), 7, b""
        assert data[:4] == b":W&B"
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:  # too little is left of the block for another chunk
                place += 32768 - place % 32768
                continue
            if not any(data[place : place + 7]):
                break  # not written yet
            length, kind = struct.unpack_from("<HB", data, place + 4)
            if place + 7 + length > len(data):
                break
            parts += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                found.append(Record.FromString(parts))
                parts = b""
    return found


def records_of(folder, runs):
    """The records once that many runs have written their last one: wandb's own process writes on after finish()."""
    deadline, found = time.monotonic() + 300, records(folder)
    while sum(record.HasField("exit") for record in found) < runs:
        assert time.monotonic() < deadline, f"wandb has not finished writing {folder}"
        time.sleep(0.2)
        found = records(folder)
    return found


def items(message):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in message}


def test_offline_run_read_back(call, cub, tmp_path):
    outcome = call(
        "train.py", *options(cub, tmp_path, "--epochs", 1, "--wandb", "offline", "--remark", f"two words {'x' * 70}")
    )
    assert outcome.code == 0, outcome.err
    run = tmp_path / "cub" / "run_1"
    found = records_of(run, runs=1)
    (started,) = [record.run for record in found if record.HasField("run")][:1]
    assert (started.project, started.display_name) == ("hist_cub", "run_1")
    assert {"cub", "timm:test_resnet", "two", "words", "x" * 64} <= set(started.tags)  # wandb takes no longer ones
    config = items(started.config.update)
    assert config["sz_batch"] == 8 and config["nb_epochs"] == 1 and config["lr"] == 1e-3 and config["IPC"] == 0
    assert config["commit"] == environment(torch.device("cpu"))["commit"] and "train.py" in config["command"]
    assert config["torch"] == torch.__version__
    assert any(record.metric.step_metric == "epoch" for record in found if record.HasField("metric"))

    logged = [items(record.history.item) for record in found if record.HasField("history")]
    rows = [row for row in logged if "R@1" in row]
    assert [row["epoch"] for row in rows] == [-1, 0, 1]
    assert all(0 <= row[f"R@{k}"] <= 1 for row in rows for k in (1, 2, 4, 8, 16, 32))
    assert all("loss" in row for row in rows[1:])
    drawn = {name for row in logged for name, value in row.items() if isinstance(value, dict) and "path" in value}
    drawn |= {name.partition("/")[0] for row in logged for name in row if name.endswith("/path")}
    assert {"curves", "neighbours", "hypergraph", "embedding"} <= drawn
    summary = {}
    for record in found:
        if record.HasField("summary"):
            summary |= items(record.summary.update)
    best = torch.load(run / f"cub_{BEST}.pth", weights_only=True)
    assert summary["best epoch"] == best["epoch"] and summary["best R@1"] == best["figures"]["R@1"]
    assert "best val R@1" not in summary

    # a resumed run goes on under the same id
    assert call("train.py", "--resume", run / "last.pth", "--epochs", 2).code == 0
    ids = {record.run.run_id for record in records_of(run, runs=2) if record.HasField("run")}
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
    args = SimpleNamespace(wandb=flag, dataset="cub", model="resnet18", seed=1, remark="")
    run = tracking.start(args, tmp_path / "run_3", {"lr": 1}, None)
    assert (run is not None) == (expected is not None) and metrics == [("*", "epoch")] * bool(run)
    assert [options["mode"] for options in started] == ([expected] if expected else [])
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
