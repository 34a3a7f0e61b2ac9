"""Other machines: CPUs without bf16, small shared memory, file systems without locks, GPUs out of reach."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import apart
import checkpoint
import dataset
import distributed
import flags
import inference
import pytest
import refused as refusals
import run
import torch
import train
from conftest import ROOT, options
from refused import Refused

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(autouse=True)
def warned_anew():
    refusals.warn_once.cache_clear()


@pytest.mark.slow
def test_bf16_that_is_slow_is_said_and_not_used_for_scoring(call, cub, held_out, tmp_path, monkeypatch):
    """The checkpoint remembers bf16."""
    monkeypatch.setattr(inference.timeit, "repeat", lambda step, **_: (step(), [14.0 if step.args[0] else 1.0])[1])
    scoring = [
        "evaluate.py",
        "--model-path",
        held_out,
        "--data-root",
        cub,
        "--workers",
        0,
        "--json",
        tmp_path / "s.json",
    ]
    for more, used, said in (([], "float32", "so this is float32"), (["--amp", "bf16"], "bf16", "--amp off should be")):
        done = call(*scoring, *more)
        assert done.code == 0 and done.err.count("takes 14.0 times as long in bf16 on this CPU") == 1
        assert said in done.err and f"pixels, network in {used}" in done.out
        scores = json.loads((tmp_path / "s.json").read_text())
        assert scores["precision"] == used and scores["scored_with"]["amp"] == used.replace("float32", "off")
        assert scores["trained_with"]["amp"] == "bf16"
    words = options(cub, tmp_path, "--epochs", 0, "--warm", 0, "--amp", "bf16")
    begun = call("train.py", *words)
    assert begun.code == 0 and begun.err.count("long in bf16") == 1 and "CPU; --amp off should" in begun.err
    resumed = call("train.py", "--resume", tmp_path / "cub" / "run_1", "--epochs", 1)
    assert resumed.code == 0 and "CPU; a new run with --amp off should train faster" in resumed.err
    assert checkpoint.load(tmp_path / "cub" / "run_1" / "last.pth")["flags"]["amp"] == "bf16"
    monkeypatch.setattr(inference.timeit, "repeat", lambda step, **_: [0.5 if step.args[0] else 1.0])
    done = call(*scoring)
    assert "long in bf16" not in done.err and "pixels, network in bf16" in done.out


def shared_memory(monkeypatch, megabytes):
    free = SimpleNamespace(f_bavail=megabytes * 2**20, f_frsize=1)
    monkeypatch.setattr(dataset.os, "statvfs", lambda _: free)
    monkeypatch.setattr(dataset, "available_cores", lambda: 16)


@pytest.mark.parametrize(
    "megabytes, fitting",
    [(1000, (4, 4)), (400, (4, 3)), (300, (4, 2)), (130, (4, 1)), (64, (1, 1)), (40, (0, 1)), (0, (0, 1))],
)
def test_batches_under_way_fit_into_shared_memory(monkeypatch, megabytes, fitting):
    """Of 150 images of 224 pixels, 22.6 MB; one more is in use, and a tenth stays free."""
    shared_memory(monkeypatch, megabytes)
    workers, ahead = dataset.workers_that_fit(4, 150 * 3 * 224**2)
    assert (workers, ahead) == fitting
    monkeypatch.setattr(dataset.sys, "platform", "darwin")
    assert dataset.workers_that_fit(4, 150 * 3 * 224**2) == (4, 4)


def test_fewer_workers_are_said_once(cub, monkeypatch, capsys):
    shared_memory(monkeypatch, 1)
    images = dataset.load_benchmark("cub", cub).query
    for size, workers in ((8, 4), (112, 0), (112, 0)):
        assert dataset.make_eval_loader(images, dataset.eval_transform(size), 24, 4).num_workers == workers
    assert capsys.readouterr().err.count("docker run --shm-size=8g") == 1


@pytest.mark.parametrize(
    "said",
    [
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
        "RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)\n",
        "DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that ...",
    ],
)
def test_what_still_fails_is_one_line(said):
    line = flags.explain(RuntimeError(said))
    assert line and "\n" not in line and "docker run --shm-size=8g" in line and "Traceback" not in line


def test_full_memory_is_one_line(refused, cub, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_network", lambda *_: torch.empty(2**50))  # more than a process can ever address
    refused("train.py", *options(cub, tmp_path), match="this machine's memory is not enough: smaller sizes")
    assert not (tmp_path / "cub").exists()
    refused(
        "train.py", *options(cub, tmp_path, "--hgnn-hidden", 10**11), match="below 2,147,483,648, got '100000000000'"
    )
    refused("train.py", *options(cub, tmp_path, "--seed", 2**32), match="at least 0 and below 4,294,967,296, got '429")


def fails_with(number):
    def function(*_):
        raise OSError(number, os.strerror(number))

    return function


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_without_locks_a_run_goes_on_after_one_warning(call, cub, tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "lockf", fails_with(number))
    begun = options(cub, tmp_path, "--epochs", 0, "--warm", 0)
    for words in (begun, ["--resume", tmp_path / "cub" / "run_1", "--epochs", 1]):
        refusals.warn_once.cache_clear()
        done = call("train.py", *words)
        assert done.code == 0 and done.err.count(f"has no locks ({os.strerror(number)})") == 1, done.err
    with pytest.raises(Refused, match="another process .* is using this run"):
        monkeypatch.setattr(fcntl, "lockf", fails_with(errno.EACCES))  # some systems say taken so
        run.lock(tmp_path / "cub" / "run_1")


@pytest.mark.parametrize("number, kind", [(errno.EINVAL, None), (errno.ENOTSUP, None), (errno.ENOSPC, Refused)])
def test_a_folder_that_cannot_be_forced_to_the_disk(tmp_path, monkeypatch, number, kind):
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: fails_with(number)() if os.path.isdir(f"/dev/fd/{file}") else fsync(file)
    )
    if kind:
        with pytest.raises(kind, match="cannot be written"):
            checkpoint.write_text("a", tmp_path / "a.txt")
    else:
        checkpoint.write_text("a", tmp_path / "a.txt")
        assert (tmp_path / "a.txt").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_a_living_process_writes_is_no_leftover(tmp_path):
    """Until it is killed."""
    process = apart.Apart(apart.write_slowly, tmp_path / "cache.npz")
    process.wait_for("half")
    (writing,) = tmp_path.iterdir()
    checkpoint.remove_leftovers(tmp_path, "cache")
    assert writing.exists()
    os.kill(process.process.pid, signal.SIGKILL)
    process.end()
    checkpoint.remove_leftovers(tmp_path, "cache")
    assert not writing.exists()


def test_without_locks_a_leftover_goes_after_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", fails_with(errno.ENOLCK))
    for name, hours in (("new", 1), ("old", 25)):
        path = tmp_path / f".{name}{checkpoint.TEMPORARY}"
        path.touch()
        os.utime(path, (os.stat(path).st_mtime - 3600 * hours,) * 2)
    checkpoint.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f".new{checkpoint.TEMPORARY}"]


@pytest.mark.parametrize("sign", ["nvml", "tool"])
def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch, capsys, sign):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    why = RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(sign == "nvml"))
    monkeypatch.setattr(distributed.shutil, "which", lambda _: "/usr/bin/nvidia-smi" if sign == "tool" else None)

    def init():
        raise why

    monkeypatch.setattr(torch.cuda, "init", init)
    device = distributed.choose_device(0)
    distributed.announce(device, 0)
    said = capsys.readouterr().out
    assert f"; torch {torch.__version__} can use no GPU here: The NVIDIA driver on your system is too old" in said
    assert said.count("\n") == 1
    distributed.announce(device, -1)  # not asked for
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden
    distributed.announce(device, 0)
    assert "can use no GPU" not in capsys.readouterr().out


def test_whoever_stops_reading_ends_a_script_quietly(trained):
    command = [sys.executable, ROOT / "code" / "report.py", trained[1].parent, "--output", trained[1].parent / "report"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=100) == 128 + signal.SIGPIPE


def test_another_broken_pipe_is_no_end_without_a_word():
    def main():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        flags.run_script(main)


def test_random_states_are_those_of_the_own_gpu(monkeypatch):
    """Of several processes the first one writes them, all read them; earlier versions kept those of all GPUs."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: "mine")
    found = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", found.append)
    states = checkpoint.random_states()
    assert states["cuda"] == ["mine"]
    for kept in (["mine"], ["a", "b", "c", "d"], []):
        checkpoint.restore_random_states(states | {"cuda": kept})
    assert found == ["mine", "c"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_obey_their_trainer_alone_however_they_are_started(cub, tmp_path, method):
    """A stop signal to the whole group ends the run after a batch, and no worker is left."""
    words = options(cub, tmp_path, "--epochs", 500, "--workers", 2)
    process = apart.Apart(apart.run_started_by, method, *words)
    process.wait_for("epoch 1/500")
    os.killpg(process.process.pid, signal.SIGTERM)
    ended = process.end(timeout=90)
    assert ended.code == 143 and "SIGTERM: stopped. Kept: train epoch" in ended.err, ended.err
    assert "Traceback" not in ended.err
