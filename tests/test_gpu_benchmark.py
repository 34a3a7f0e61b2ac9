"""benchmarks/gpu.py runs without a GPU, small; a part that fails does not stop the others."""

import json
import sys

import apart
import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import gpu
import gpu_checks
import gpu_speed
import loss
import measure


@pytest.fixture
def main(monkeypatch, tmp_path):
    """Runs the script inside this process: (exit status or message, report, text of gpu.md)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--quick", "--output", str(tmp_path), *words])
        status = 0
        try:
            gpu.main()
        except SystemExit as stop:
            status = stop.code
        return status, json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()

    return run


class Forked:
    """What gpu.py asks of a Popen, for train.py without the seconds of starting it and of drawing."""

    def __init__(self, words, logs):
        self.process = apart.Apart(apart.run_undrawn, "train.py", *words).process
        self.kill = self.process.kill

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join()
        return self.process.exitcode

    returncode = property(poll)


@pytest.mark.slow
def test_every_part_reports(main, monkeypatch, capsys):
    for module in (gpu_checks, gpu_speed):
        monkeypatch.setattr(module, "start", Forked)
    status, report, text = main()
    out = capsys.readouterr().out
    assert status == 0, out
    assert [part["part"] for part in report["parts"]] == list(gpu.PARTS)
    assert all(part["rows"] and part["error"] is None for part in report["parts"])
    assert text == gpu.markdown(report)
    assert all(gpu.part_markdown(part) in out for part in report["parts"])
    rows = {part["part"]: part["rows"] for part in report["parts"]}
    assert [row["tensors"] > 100 and row["found"] for row in rows["determinism"]] == [0]
    assert {row["options"] for row in rows["step"]} == {
        "network alone, all of them",
        *(name for name in gpu_speed.OPTIONS if "recorded" not in name),
    }
    assert torch.__version__ in text and text.count("no GPU: not run") == 2  # gpus, convolutions
    graph = {row["of"]: row for row in rows["graph"]}
    assert "there is no GPU" in graph["steps on this device"]["found"]
    assert graph["float32: tensors that differ when it is resumed"]["found"] == 0
    assert graph["bf16, channels last: ms a step"].keys() >= {"eager", "recorded"}
    assert {row["workers"] for row in rows["loader"]} <= {"no files", 1, 2}
    *epochs, whole = rows["epoch"]
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    assert all(row["s to train"] > 0 and row["s to score"] > 0 for row in epochs)
    assert sum(row["s in all"] for row in epochs) < whole["s in all"] and "≤ 4 s" in epochs[-1]["goal"]


def test_a_part_that_fails_does_not_stop_the_others(main, monkeypatch):
    def fails_half_way(sizes, device):
        """Fails"""
        yield {"check": "one", "ok": True}
        raise RuntimeError("no such\nkernel")

    monkeypatch.setitem(gpu.PARTS, "values", fails_half_way)
    status, report, text = main("--only", "values,labels")
    assert status == "gpu.py: failed: values"
    broken, other = report["parts"]
    assert broken["error"] == "RuntimeError: no such kernel" and len(broken["rows"]) == 1
    assert other["error"] is None and len(other["rows"]) == 4
    assert "FAILED: RuntimeError: no such kernel\n" in text and "label -1" in text


def test_the_loss_takes_few_operations():
    """On a GPU the loss of a small batch costs what launching its kernels costs. Torch's versions differ by a few."""
    criterion, X, T = loss.problem(32, 100, 512, "cpu")
    with measure.Operations() as operations:
        criterion(X, T).backward()
    assert operations.count <= 124
