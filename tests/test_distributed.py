"""Several processes compute what one does: losses, parameters, figures; and end together when one of them is lost."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import distributed
import metrics
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY
from trees import make_cub

GENTLE = ["--lr", "1e-5", "--lr-ds", "1e-3"]  # at large steps rounding grows into other numbers within an epoch


def torchrun(count, *words, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *words]
    options = {"capture_output": True, "text": True, "timeout": 200} | options
    return subprocess.run([str(word) for word in command], **options)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """steps(mode, count, loss): what twenty steps gave, computed once each."""
    folder, known = tmp_path_factory.mktemp("steps"), {}

    def run(mode, count, loss="hist"):
        if (mode, count, loss) not in known:
            path = folder / f"{mode}_{count}_{loss}.pth"
            done = torchrun(count, ROOT / "tests" / "distributed_steps.py", mode, loss, path)
            assert done.returncode == 0, done.stderr
            known[mode, count, loss] = torch.load(path, weights_only=True)
        return known[mode, count, loss]

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


@pytest.mark.parametrize("count", [2, 4])
def test_twenty_steps_equal_those_of_one_process(steps, count):
    losses, parameters = largest_difference(steps("ours", 1), steps("ours", count))
    assert losses < 1e-5 and parameters < 1e-4


@pytest.mark.parametrize("loss", ["proxy_anchor", "multi_similarity"])  # with proxies to train, and without
def test_other_losses_see_the_whole_batch_too(steps, loss):
    losses, parameters = largest_difference(steps("ours", 1, loss), steps("ours", 2, loss))
    assert losses < 1e-5 and parameters < 1e-3  # the largest: biases that started at 0 and are still below 1e-3
    if loss == "multi_similarity":  # of the images of one process alone it is another loss
        assert largest_difference(steps("ours", 1, loss), steps("local", 2, loss))[0] > 1e-3


@pytest.mark.parametrize("mode", ["local", "unscaled"])
def test_the_ways_that_change_the_method_are_told_apart(steps, mode):
    losses, parameters = largest_difference(steps("ours", 1), steps(mode, 2))
    assert losses > 1e-3 and parameters > 1e-3


SEARCH = """
import sys, torch
sys.path.insert(0, {code!r})
import distributed, metrics
distributed.start(-1)
data = torch.load(sys.argv[1], weights_only=True)
found = metrics.retrieval(*data, ks=(1, 3), precision=True, memory_gib=float(sys.argv[3]))
torch.save(found.figures(), f"{{sys.argv[2]}}.{{distributed.processes().rank}}")
distributed.stop()
"""


@pytest.mark.parametrize("query_and_gallery", [False, True])
def test_search_is_shared_and_gives_the_same_figures(tmp_path, query_and_gallery):
    torch.manual_seed(0)
    sets = [torch.randn(150, 4), torch.randint(20, (150,))]
    if query_and_gallery:
        sets += [torch.randn(90, 4), torch.randint(20, (90,))]
    torch.save(sets, tmp_path / "sets.pth")
    (tmp_path / "search.py").write_text(SEARCH.format(code=str(ROOT / "code")))
    done = torchrun(3, tmp_path / "search.py", tmp_path / "sets.pth", tmp_path / "out", 1e-5)
    assert done.returncode == 0, done.stderr
    expected = metrics.retrieval(*sets, ks=(1, 3), precision=True).figures()
    for rank in range(3):
        found = torch.load(tmp_path / f"out.{rank}", weights_only=True)
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def cub(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_cub(root, images=7)  # 28 test images: 3 processes embed 10, 9 and 9
    return root


@pytest.fixture(scope="module")
def alone(cub, tmp_path_factory):
    logs = tmp_path_factory.mktemp("alone")
    words = [*TINY, "--dataset", "cub", "--data-root", cub, "--log-dir", logs, "--batch-size", 12, *GENTLE]
    done = subprocess.run(
        [sys.executable, ROOT / "code" / "train.py", *map(str, words)], capture_output=True, timeout=200
    )
    assert done.returncode == 0
    return logs / "cub" / "run_1"


def test_train_script_gives_the_same_run_and_resumes_with_another_number(cub, alone, tmp_path, call):
    words = [*TINY, "--dataset", "cub", "--data-root", cub, "--log-dir", tmp_path, "--batch-size", 12, *GENTLE]
    done = torchrun(3, ROOT / "code" / "train.py", *words, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "cub" / "run_1"
    assert sorted(path.name for path in (tmp_path / "cub").iterdir()) == ["run_1"]
    assert done.stdout.count("epoch 1/1") == 1 and "3 processes" in done.stdout  # process 0 alone speaks
    assert torch.load(run / "last.pth", weights_only=True)["model_state_dict"].keys() == (
        torch.load(alone / "last.pth", weights_only=True)["model_state_dict"].keys()
    )
    assert call("train.py", "--resume", run / "last.pth", "--epochs", 2).code == 0  # on one process
    rows, expected = pd.read_csv(run / "results.csv"), pd.read_csv(alone / "results.csv")
    assert rows["phase"].tolist() == expected["phase"].tolist()
    pd.testing.assert_series_equal(rows["loss"], expected["loss"], rtol=1e-4)
    pd.testing.assert_series_equal(rows["R@1"], expected["R@1"], atol=1 / 28 + 1e-9)


def test_two_machines_give_the_same_run(cub, alone, tmp_path):
    """As on two machines that share storage: two launchers that meet at an address, one process each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*TINY, "--dataset", "cub", "--data-root", cub, "--log-dir", tmp_path, "--batch-size", 12, *GENTLE]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    machines = [
        subprocess.Popen(
            [*command, f"--node-rank={rank}", ROOT / "code" / "train.py", *map(str, words), "--epochs", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [machine.communicate(timeout=200) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "2 processes" in said[0][0] and said[1][0] == ""
    rows, expected = (pd.read_csv(logs / "results.csv") for logs in (tmp_path / "cub" / "run_1", alone))
    pd.testing.assert_series_equal(rows["loss"], expected["loss"][: len(rows)], rtol=1e-4)


def test_more_processes_than_images_and_uneven_batches_are_handled(tmp_path):
    make_cub(tmp_path, classes=4, images=1)  # two test images of two classes: nothing to find, said in one line
    words = [*TINY, "--dataset", "cub", "--data-root", tmp_path, "--log-dir", tmp_path, "--epochs", 1]
    done = torchrun(3, ROOT / "code" / "train.py", *words, "--batch-size", 2)
    assert done.returncode != 0 and "cannot be dealt out to 3 processes" in done.stderr


def test_evaluate_script_gives_the_same_figures_and_writes_once(cub, alone, tmp_path):
    words = ["--data-root", cub, "--model-path", alone, "--gpu-id", -1, "--workers", 0, "--metrics", "all"]
    figures, said = {}, {}
    for count in (1, 3):
        files = ["--json", tmp_path / f"{count}.json", "--save-embeddings", tmp_path / f"{count}.npz"]
        done = torchrun(count, ROOT / "code" / "evaluate.py", *words, *files)
        assert done.returncode == 0, done.stderr
        figures[count], said[count] = json.loads((tmp_path / f"{count}.json").read_text()), done.stdout
    assert [figures[count]["scored_by"]["processes"] for count in (1, 3)] == ["1", "3"]
    assert figures[1]["figures"].keys() == figures[3]["figures"].keys() >= {"R@1", "RP", "MAP@R", "NMI"}
    assert figures[1]["figures"] == pytest.approx(figures[3]["figures"], abs=1e-6)
    assert said[3].count("R@1 ") == 1 and "3 processes" in said[3]
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "3.npz") as three:
        assert one["paths"].tolist() == three["paths"].tolist()
        np.testing.assert_allclose(one["embeddings"], three["embeddings"], atol=1e-5)


EMBED = """
import sys, torch
sys.path.insert(0, {code!r})
import distributed, inference
distributed.start(-1)
class Network(torch.nn.Flatten):
    embedding_size = 2
    normalise = staticmethod(lambda images: images)
data = torch.utils.data.TensorDataset(torch.arange(4.0).view(2, 2, 1, 1), torch.tensor([7, 8]))
rank, count = distributed.processes()
loader = torch.utils.data.DataLoader(data, sampler=range(rank, 2, count), batch_size=1)
found = inference.embed(Network(), loader, "cpu")
assert found.embeddings.tolist() == [[0.0, 1.0], [2.0, 3.0]] and found.labels.tolist() == [7, 8], found
statistics = torch.nn.BatchNorm1d(2)
statistics.running_mean += rank
distributed.share_buffers(statistics)
assert statistics.running_mean.tolist() == [0.0, 0.0], rank
distributed.stop()
"""


def test_fewer_images_than_processes_and_statistics_of_the_first(tmp_path):
    (tmp_path / "embed.py").write_text(EMBED.format(code=str(ROOT / "code")))
    done = torchrun(3, tmp_path / "embed.py")
    assert done.returncode == 0, done.stderr


def children(pid):
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "train.py" in line]


def start_long_run(cub, tmp_path):
    words = [*TINY, "--dataset", "cub", "--data-root", cub, "--log-dir", tmp_path, "--batch-size", 12, "--epochs", 500]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*command, "code/train.py", *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if "epoch 2/500" in line:
            return process
    raise AssertionError(process.stderr.read())


def test_one_process_killed_ends_the_others_and_the_run_resumes(cub, tmp_path, call):
    process = start_long_run(cub, tmp_path)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    killed = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - killed < 30 and process.returncode != 0
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    last = tmp_path / "cub" / "run_1" / "last.pth"
    epoch = torch.load(last, weights_only=True)["epoch"]
    done = torchrun(2, ROOT / "code" / "train.py", "--resume", last, "--epochs", epoch + 1)
    assert done.returncode == 0 and f"resumed after epoch {epoch}" in done.stdout


def test_sigterm_to_one_process_stops_all_after_the_same_step(cub, tmp_path):
    process = start_long_run(cub, tmp_path)
    os.kill(children(process.pid)[1], signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(r"SIGTERM: stopped\. Kept: train epoch \d+", err), err
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / "code") not in err


def test_a_mistake_is_said_once(cub, tmp_path):
    words = [*TINY, "--dataset", "cub", "--log-dir", tmp_path, "--batch-size", 12]
    for more, what in (
        (["--lr", "fast"], "train.py: error: argument --lr: must be a number"),  # before the processes have met
        (["--data-root", tmp_path / "nowhere"], "train.py: error: .*nowhere"),  # after that
    ):
        done = torchrun(3, ROOT / "code" / "train.py", *words, *more)
        assert done.returncode != 0 and len(re.findall(what, done.stderr)) == 1, done.stderr
        assert f'File "{ROOT / "code"}' not in done.stderr, done.stderr


def test_a_mistake_that_only_one_process_sees_is_said(cub, tmp_path):
    """The images that the last of three processes decodes cannot be read."""
    make_cub(tmp_path, images=7)
    images = sorted((tmp_path / "CUB_200_2011" / "images").glob("00[5-8]*/[!.]*.jpg"))
    images[2].write_bytes(b"no picture")
    words = [*TINY, "--dataset", "cub", "--data-root", tmp_path, "--log-dir", tmp_path / "logs", "--batch-size", 12]
    done = torchrun(3, ROOT / "code" / "train.py", *words)
    assert done.returncode != 0
    assert len(re.findall(f"train.py: error: {images[2]}: cannot be decoded", done.stderr)) == 1, done.stderr
    assert done.stderr.count("train.py: error: ") == 1, done.stderr


def test_more_processes_than_gpus_are_refused_by_all_of_them(monkeypatch):
    """Also by the first, the only one that speaks before they have met."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for variable, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match="2 processes were started on this machine, which has 1 GPU: start fewer"):
        distributed.start(0)


@pytest.mark.parametrize(
    "environment, match",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but RANK is not set: start several processes with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is set, but LOCAL_RANK is not set"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
    ],
)
@pytest.mark.parametrize("name", ["train.py", "evaluate.py"])
def test_an_environment_that_is_not_torchruns_is_one_line(refused, cub, monkeypatch, environment, match, name):
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    refused(name, "--dataset", "cub", "--data-root", cub, "--model-path", cub, match=match) if name != "train.py" else (
        refused(name, *TINY, "--dataset", "cub", "--data-root", cub, match=match)
    )
