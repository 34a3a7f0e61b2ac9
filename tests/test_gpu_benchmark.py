"""benchmarks/gpu.py runs without a GPU, small; a part that fails does not stop the others."""

import json
import subprocess
import sys

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


@pytest.mark.slow
def test_every_part_reports(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--quick", "--output", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    report, text = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    assert [part["part"] for part in report["parts"]] == list(gpu.PARTS)
    assert all(part["rows"] and part["error"] is None for part in report["parts"])
    assert text == gpu.markdown(report)
    assert all(gpu.part_markdown(part) in done.stdout for part in report["parts"])
    rows = {part["part"]: part["rows"] for part in report["parts"]}
    assert [row["tensors"] > 100 and row["found"] for row in rows["determinism"]] == [0, 0]
    assert {row["options"] for row in rows["step"]} == {*gpu_speed.OPTIONS, "network alone, all of them"}
    assert torch.__version__ in text and "no GPU: not run" in text


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
    assert other["error"] is None and len(other["rows"]) == 3
    assert "FAILED: RuntimeError: no such kernel\n" in text and "label -1" in text


def test_a_check_that_does_not_hold_fails_its_part(main, monkeypatch):
    real = gpu_checks.problem

    def other_on_the_cpu(N, C, D, place):
        criterion, X, T = real(N, C, D, "cpu")
        if place == "cpu":
            with torch.no_grad():
                criterion.hgnn.theta2.weight.mul_(1.01)
        return criterion, X, T

    monkeypatch.setattr(gpu_checks, "problem", other_on_the_cpu)
    status, report, text = main("--only", "values")
    assert status == "gpu.py: failed: values"
    assert "checks do not hold" in report["parts"][0]["error"] and "| NO |" in text


def test_parts_that_do_not_exist_are_refused(main, capsys):
    with pytest.raises(FileNotFoundError):  # nothing is written
        main("--only", "values,speed")
    assert "there is no part 'speed', there are values, " in capsys.readouterr().err


def test_the_loss_takes_few_operations():
    """On a GPU the loss of a small batch costs what launching its kernels costs. Torch's versions differ by a few."""
    criterion, X, T = loss.problem(32, 100, 512, "cpu")
    with measure.Operations() as operations:
        criterion(X, T).backward()
    assert operations.count <= 130


def test_operations_counts_no_views():
    with measure.Operations() as operations:
        torch.ones(3, 2).T[None].exp().detach()
    assert operations.count == 2
