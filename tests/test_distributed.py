"""Several processes compute what one does: losses, parameters, figures; and end together when one of them is lost."""

import functools
import json
import os
import re
import signal
import subprocess
import sys

import apart
import distributed
import metrics
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY
from trees import make_cub

GENTLE = ["--lr", "1e-5", "--lr-ds", "1e-3"]  # at large steps rounding grows into other numbers within an epoch


def ended(processes):
    return [process.end() for process in processes]


def torchrun(count, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """steps(mode, count, loss): what twenty steps gave, computed once each."""

    @functools.cache
    def run(mode, count, loss="hist"):
        path = tmp_path_factory.mktemp("steps") / "outcome.pth"
        for process in ended(apart.group(count, apart.twenty_steps, mode, loss, path)):
            assert process.code == 0, process.err
        return torch.load(path, weights_only=True)

    return run


def largest_difference(one, other):
    """Of losses, and of all parameters, relative to the norm of each."""
    losses = max(abs(a - b) / abs(a) for a, b in zip(one["losses"], other["losses"], strict=True))
    parameters = 0.0
    for part in ("network", "criterion"):
        for name, value in one[part].items():
            difference = (value.double() - other[part][name].double()).norm()
            parameters = max(parameters, float(difference / value.double().norm().clamp(min=1e-6)))
    return losses, parameters


def test_twenty_steps_equal_those_of_one_process_and_other_ways_are_told_apart(steps):
    for count in (2, 4):
        losses, parameters = largest_difference(steps("ours", 1), steps("ours", count))
        assert losses < 1e-10 and parameters < 1e-10  # found: 2.1e-14
    for mode in ("local", "unscaled"):
        losses, parameters = largest_difference(steps("ours", 1), steps(mode, 2))
        assert losses > 1e-3 and parameters > 1e-3


@pytest.mark.parametrize("loss", ["proxy_anchor", "multi_similarity"])  # with proxies to train, and without
def test_other_losses_see_the_whole_batch_too(steps, loss):
    losses, parameters = largest_difference(steps("ours", 1, loss), steps("ours", 2, loss))
    assert losses < 1e-10 and parameters < 1e-10
    if loss == "multi_similarity":  # of the images of one process alone it is another loss
        assert largest_difference(steps("ours", 1, loss), steps("local", 2, loss))[0] > 1e-3


def test_search_is_shared_and_gives_the_same_figures(tmp_path):
    """Of one set and of queries and a gallery; then fewer images than processes."""
    torch.manual_seed(0)
    one = [torch.randn(150, 4), torch.randint(20, (150,))]
    both = [one, [*one, torch.randn(90, 4), torch.randint(20, (90,))]]
    for process in ended(apart.group(3, apart.search_and_embed, both, tmp_path / "out")):
        assert process.code == 0, process.err
    for rank in range(3):
        for sets, found in zip(both, torch.load(tmp_path / f"out.{rank}", weights_only=True), strict=True):
            assert found == pytest.approx(metrics.retrieval(*sets, ks=(1, 3), precision=True).figures(), rel=1e-6)


@pytest.fixture(scope="module")
def cub(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_cub(root, images=7)  # 28 test images: 3 processes embed 10, 9 and 9
    return root


def words(cub, logs, *more):
    return [*TINY, "--dataset", "cub", "--data-root", cub, "--log-dir", logs, "--batch-size", 12, *GENTLE, *more]


@pytest.fixture(scope="module")
def alone(cub, tmp_path_factory):
    logs = tmp_path_factory.mktemp("alone")
    assert apart.Apart(apart.run_undrawn, "train.py", *words(cub, logs)).end().code == 0
    return logs / "cub" / "run_1"


def test_torchrun_gives_the_same_run_and_resumes_with_another_number(cub, alone, tmp_path, call):
    out = torchrun(3, ROOT / "code" / "train.py", *words(cub, tmp_path, "--epochs", 1))
    run = tmp_path / "cub" / "run_1"
    assert sorted(path.name for path in (tmp_path / "cub").iterdir()) == ["run_1"]
    assert out.count("epoch 1/1") == 1 and "3 processes" in out  # process 0 alone speaks
    assert torch.load(run / "last.pth", weights_only=True)["model_state_dict"].keys() == (
        torch.load(alone / "last.pth", weights_only=True)["model_state_dict"].keys()
    )
    assert call("train.py", "--resume", run / "last.pth", "--epochs", 2).code == 0  # on one process
    rows, expected = pd.read_csv(run / "results.csv"), pd.read_csv(alone / "results.csv")
    assert rows["phase"].tolist() == expected["phase"].tolist()
    pd.testing.assert_series_equal(rows["loss"], expected["loss"], rtol=1e-4)
    pd.testing.assert_series_equal(rows["R@1"], expected["R@1"], atol=1 / 28 + 1e-9)


def test_several_processes_give_the_same_figures_and_write_once(cub, alone, tmp_path, call):
    scoring = ["--data-root", cub, "--model-path", alone, "--gpu-id", -1, "--workers", 0, "--metrics", "all"]
    figures = {}
    for count in (1, 3):
        words = [*scoring, "--json", tmp_path / f"{count}.json", "--save-embeddings", tmp_path / f"{count}.npz"]
        said = "".join(done.out for done in ended(apart.group(count, apart.run_script, "evaluate.py", *words)))
        figures[count] = json.loads((tmp_path / f"{count}.json").read_text())
    assert [figures[count]["scored_by"]["processes"] for count in (1, 3)] == ["1", "3"]
    assert figures[1]["figures"].keys() == figures[3]["figures"].keys() >= {"R@1", "RP", "MAP@R", "NMI"}
    assert figures[1]["figures"] == pytest.approx(figures[3]["figures"], abs=1e-6)
    assert said.count("R@1 ") == 1 and "3 processes" in said
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "3.npz") as three:
        assert one["paths"].tolist() == three["paths"].tolist()
        np.testing.assert_allclose(one["embeddings"], three["embeddings"], atol=1e-5)


def start_long_run(cub, tmp_path):
    processes = apart.group(2, apart.run_undrawn, "train.py", *words(cub, tmp_path, "--epochs", 500))
    processes[0].wait_for("epoch 2/500")
    return processes


def test_one_process_killed_ends_the_other_in_one_line_and_the_run_resumes(cub, tmp_path, call):
    processes = start_long_run(cub, tmp_path)
    os.kill(processes[1].process.pid, signal.SIGKILL)
    code, _, err = processes[0].end(timeout=30)
    lines = [line for line in err.splitlines() if not line.startswith(("warning", "[W", "[rank"))]
    assert code == 1 and len(lines) == 1, err
    assert lines[0].startswith("train.py: error: the other processes were lost")
    assert processes[1].end().code == -signal.SIGKILL
    last = tmp_path / "cub" / "run_1" / "last.pth"
    epoch = torch.load(last, weights_only=True)["epoch"]
    done = call("train.py", "--resume", last, "--epochs", epoch + 1)
    assert done.code == 0 and f"resumed after epoch {epoch}" in done.out


def test_a_slip_of_ours_is_no_lost_process(monkeypatch):
    """Whatever words its message has: only gloo's own names one of gloo's source files."""
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    lost = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:16814"
    with pytest.raises(distributed.Lost), distributed.together():
        raise RuntimeError(lost)
    for kind in (RuntimeError, torch.OutOfMemoryError, NotImplementedError):
        slip = kind("Duplicate GPU detected: NCCL peer gloo")
        with pytest.raises(kind) as caught, distributed.together():
            raise slip
        assert caught.value is slip and not isinstance(slip, distributed.Lost)
    assert isinstance(distributed.dist.DistBackendError("timeout"), distributed.Lost)


def test_sigterm_to_one_process_stops_all_after_the_same_batch(cub, tmp_path):
    processes = start_long_run(cub, tmp_path)
    os.kill(processes[1].process.pid, signal.SIGTERM)
    said = ended(processes)
    assert [process.code for process in said] == [143, 143]
    assert re.search(r"SIGTERM: stopped\. Kept: train epoch \d+", said[0].err), said[0].err
    assert said[1].err == "" and "Traceback" not in said[0].err


def test_a_signal_that_another_process_had_first_is_no_second_one(monkeypatch):
    """Ctrl-C reaches all of them, each at another moment; the work of none is cut off."""
    monkeypatch.setattr(distributed.signal, "signal", lambda *_: None)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_gather", lambda *_: [torch.tensor([0]), torch.tensor([signal.SIGINT])])
    monkeypatch.setattr(distributed.os, "_exit", lambda code: pytest.fail("ended at once"))
    stop = distributed.StopSignals()
    with pytest.raises(distributed.Interrupted):
        stop.check()
    stop._note(signal.SIGINT, None)


UNDECODABLE = "CUB_200_2011/images/005.Bird_5/Bird_5_0002.jpg"  # the last of three processes decodes it
MISTAKES = [
    (["--lr", "fast"], "argument --lr: must be a number"),  # before the processes have met
    (["--data-root", "/nowhere"], ".*nowhere"),  # after that
    (["--batch-size", 16], "--batch-size 16 .*cannot be dealt out to 3 processes"),
    ([], f".*/{UNDECODABLE}: cannot be decoded"),
]


@pytest.mark.parametrize("more, what", MISTAKES)
def test_a_mistake_is_said_once(tmp_path, more, what):
    make_cub(tmp_path, images=7)
    (tmp_path / UNDECODABLE).write_bytes(b"no picture")
    said = ended(apart.group(3, apart.run_undrawn, "train.py", *words(tmp_path, tmp_path / "logs", *more)))
    assert all(process.code != 0 and "Traceback" not in process.err for process in said)
    errors = [line for process in said for line in process.err.splitlines() if "error: " in line]
    assert len(errors) == 1 and re.match(f"train.py: error: {what}", errors[0]), errors


def test_more_processes_than_gpus_are_refused_by_all_of_them(monkeypatch):
    """Also by the first, the only one that speaks before they have met."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for variable, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match="2 processes were started on this machine, which has 1 GPU: start fewer"):
        distributed.start(0)


@pytest.mark.parametrize("name, given, lacking", [("train.py", "LOCAL_RANK", "RANK"), ("evaluate.py", "RANK", "LOCAL")])
def test_an_environment_that_is_not_torchruns_is_one_line(refused, cub, monkeypatch, name, given, lacking):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(given, "0")
    more = TINY if name == "train.py" else ["--model-path", cub]
    match = f"WORLD_SIZE is set, but not {lacking}.*: start several processes with torchrun, or unset it"
    refused(name, "--dataset", "cub", "--data-root", cub, *more, match=match)
