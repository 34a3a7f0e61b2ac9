"""A run survives kills, full disks, signals, NaN and a second process, and goes on as the same run to the bit.

The series of random kills is short. HIST_KILLS=200 python -m pytest tests/test_interruption.py -k random makes it long.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import time
from types import SimpleNamespace

import apart
import checkpoint
import pandas as pd
import pytest
import run
import torch
import train
from conftest import BEST, options
from refused import Refused

# What differs between two runs of the same bits: times, the commit if somebody commits in between, and the run's name.
STAMPS = {"seconds", "images_per_s", "data_time", "commit"}
NAMES = {"made_by", "log_dir", "run_num", "nb_workers", "nb_epochs", "resumptions"}
BEST_FILE = f"cub_{BEST}.pth"

pytestmark = pytest.mark.usefixtures("undrawn")


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def flat(part, where=""):
    """{path: value} of all that a checkpoint holds, stamps and names aside; of tensors the bytes."""
    if isinstance(part, torch.Tensor):
        return {where: part.numpy().tobytes()}
    if not isinstance(part, dict | list | tuple):
        return {where: part}
    found = {}
    for key, inner in part.items() if isinstance(part, dict) else enumerate(part):
        found |= flat(inner, f"{where}/{key}") if key not in STAMPS | NAMES else {}
    return found


def assert_same_run(one, other):
    """Pictures aside, and the lock, which a process leaves at its end."""
    files, others = ({path.name for path in run.iterdir() if path.suffix != ".png"} for run in (one, other))
    assert files - {".lock"} == others - {".lock"}
    for name in ("last.pth", BEST_FILE):
        assert flat(load(one / name)) == flat(load(other / name))
    drop = dict(columns=list(STAMPS))
    a, b = pd.read_csv(one / "results.csv"), pd.read_csv(other / "results.csv")
    pd.testing.assert_frame_equal(a.drop(**drop), b.drop(**drop), check_exact=True)
    texts = [(run / f"cub_{BEST}_results.txt").read_text().splitlines() for run in (one, other)]
    assert len({tuple(line for line in text if not line.startswith("Commit: ")) for text in texts}) == 1


@pytest.fixture(scope="module")
def whole(cub, tmp_path_factory):
    """A run of four epochs that nothing disturbed."""
    logs = tmp_path_factory.mktemp("whole")
    assert apart.Apart(apart.run_undrawn, "train.py", *options(cub, logs, "--epochs", 4)).end().code == 0
    return logs / "cub" / "run_1"


def test_resumed_run_has_the_same_bits_and_another_seed_has_not(call, cub, whole, tmp_path):
    assert call("train.py", *options(cub, tmp_path, "--epochs", 2)).code == 0
    run = tmp_path / "cub" / "run_1"
    resumed = call("train.py", "--resume", run / "last.pth", "--epochs", 4)
    assert resumed.code == 0 and "resumed after epoch 2" in resumed.out
    assert_same_run(run, whole)
    assert call("train.py", *options(cub, tmp_path, "--epochs", 0, "--seed", 2)).code == 0  # warm-up alone
    another, first = (flat(load(folder / "last.pth")) for folder in (tmp_path / "cub" / "run_2", whole))
    for name in ("/model_state_dict/model.conv1.0.weight", "/criterion_state_dict/cds2hg.means"):
        assert another[name] != first[name]


def test_killed_at_random_moments(cub, whole, tmp_path):
    kills, moments = int(os.environ.get("HIST_KILLS", 8)), random.Random(0)
    run, arguments = tmp_path / "cub" / "run_1", options(cub, tmp_path, "--epochs", 4)
    # Seconds until a kill at most: halved whenever an epoch was completed and else growing, so that all kills come
    # before the run is done, whatever the machine's speed, and fall on its beginnings as well as on its epochs.
    longest, saved_before = 0.5, 0.0
    while True:
        saved = (run / "last.pth").exists()
        how = ["--resume", run] if saved else ["--run-num", 1, *(["--overwrite"] if run.exists() else [])]
        process = apart.Apart(apart.run_script, "train.py", *arguments, *how)
        if kills == 0:
            break
        process.process.join(moments.uniform(0, longest))
        assert process.process.exitcode is None, f"the run ended {kills} kills too early"
        os.kill(process.process.pid, signal.SIGKILL)
        assert process.end().code == -signal.SIGKILL
        kills -= 1
        newest = (run / "last.pth").stat().st_mtime if (run / "last.pth").exists() else 0.0
        longest *= 0.5 if newest != saved_before else 1.2
        saved_before = newest
    done = process.end()
    assert done.code == 0, done.err
    assert_same_run(run, whole)


@pytest.mark.parametrize("name, number", [("last.pth", 4), (BEST_FILE, 1)])
def test_killed_while_a_checkpoint_is_written(call, cub, whole, tmp_path, name, number):
    arguments = options(cub, tmp_path, "--epochs", 4)
    assert apart.Apart(apart.killed_while_writing, name, number, *arguments).end().code == -signal.SIGKILL
    run = tmp_path / "cub" / "run_1"
    # untrained, warm-up and epoch 1 are whole; cut was epoch 2, or what follows last.pth in epoch 1
    assert load(run / "last.pth")["epoch"] == 1
    assert call("train.py", "--resume", run / "last.pth").code == 0
    assert_same_run(run, whole)


@pytest.mark.parametrize(
    "number, code, everyone",
    [
        (signal.SIGINT, 130, False),
        (signal.SIGTERM, 143, True),  # `timeout` and batch systems signal the workers, too, and may do so twice
    ],
)
def test_signal_finishes_the_batch_and_says_how_to_go_on(call, cub, whole, tmp_path, number, code, everyone):
    """With other numbers of workers, which change nothing either."""
    arguments = options(cub, tmp_path, "--epochs", 4, "--workers", 2)
    process = apart.Apart(apart.run_undrawn, "train.py", *arguments)
    process.wait_for("epoch 1/4")
    pid = process.process.pid
    os.kill(pid, number)
    if everyone:
        os.killpg(pid, number)
    ended = process.end(timeout=60)
    assert ended.code == code, ended.err
    lines = [line for line in ended.err.splitlines() if line.strip() and not line.startswith("warning")]
    assert len(lines) == 1 and re.search(f"{number.name}: stopped. Kept: train epoch .* Resume with: ", lines[0])
    with pytest.raises(ProcessLookupError):  # no worker is left behind
        for _ in range(100):
            os.killpg(pid, 0)
            time.sleep(0.1)
    run = tmp_path / "cub" / "run_1"
    assert not (run / ".lock").exists()
    assert call("train.py", "--resume", run / "last.pth").code == 0
    assert_same_run(run, whole)


def test_signal_while_scoring_counts_too(cub, tmp_path, call, monkeypatch):
    """The untrained network is scored first: nothing is there to keep yet."""
    handlers = []
    monkeypatch.setattr(train.inference.metrics, "retrieval", lambda *_: pytest.fail("scored"))
    embed = train.inference.embed

    def interrupted(*arguments, **options):
        handlers.append(signal.raise_signal(signal.SIGTERM))
        return embed(*arguments, **options)

    monkeypatch.setattr(train.inference, "embed", interrupted)
    done = call("train.py", *options(cub, tmp_path))
    assert done.code == 143 and "SIGTERM: stopped. No epoch was completed" in done.err and len(handlers) == 1
    assert list((tmp_path / "cub").iterdir()) == []  # nothing is left that could not be resumed


def test_second_ctrl_c_leaves_at_once():
    process = apart.Apart(apart.wait_for_signals)
    process.wait_for("ready")
    os.kill(process.process.pid, signal.SIGINT)
    time.sleep(0.3)
    assert process.process.is_alive()
    os.kill(process.process.pid, signal.SIGINT)
    assert process.end(timeout=5).code == 130


def test_full_disk_is_a_clear_error_and_keeps_what_was_saved(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run_1")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix != ".png"}
    again = apart.Apart(apart.on_a_full_disk, "--resume", run, "--epochs", 5).end()
    assert again.code == 1
    (line,) = [line for line in again.err.splitlines() if not line.startswith("warning")]
    assert re.search(r"train.py: error: .*\.pth: cannot be written .* what was saved before is untouched", line)
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix != ".png"}
    assert after.keys() == before.keys()  # no half-written file lies around
    assert {name for name in before if after[name] != before[name]} <= {"args.json", ".lock"}


def test_nan_loss_stops_before_the_optimiser_step(refused, cub, tmp_path, monkeypatch):
    forward, count = train.HISTLoss.forward, 0

    def poisoned(self, embeddings, labels):
        nonlocal count
        count += 1
        return forward(self, embeddings, labels) * (float("nan") if count == 8 else 1.0)

    monkeypatch.setattr(train.HISTLoss, "forward", poisoned)
    stepped = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a, **k: (stepped.append(1), step(self, *a, **k))[1])
    line = refused(
        "train.py", *options(cub, tmp_path, "--epochs", 4), match=r"the loss is nan in epoch 2/4, step 2 of 3"
    )
    assert len(stepped) == 7  # three steps of warm-up, three of epoch 1, one of epoch 2
    for part in ("dist ", "ce ", "lr 0.001", "lr_ds 0.1", "lr_hgnn 0.01", "last.pth holds the epoch before"):
        assert part in line
    assert len(re.findall(r"\.jpg|\.png", line)) == 8  # the images of the batch
    assert load(tmp_path / "cub" / "run_1" / "last.pth")["epoch"] == 1


def test_runs_never_overwrite_each_other(call, refused, cub, tmp_path):
    quick = options(cub, tmp_path, "--epochs", 0, "--warm", 0)
    first = tmp_path / "cub" / "run_1"
    for _ in range(2):
        assert call("train.py", *quick).code == 0
    assert {path.name for path in (tmp_path / "cub").iterdir()} == {"run_1", "run_2"}
    before = (first / "last.pth").read_bytes()
    refused("train.py", *quick, "--run-num", 1, match="run_1 exists: give --resume .* --overwrite")
    assert (first / "last.pth").read_bytes() == before
    (first / "wandb" / "offline-run-1").mkdir(parents=True)
    (first / "notes").mkdir()
    assert call("train.py", *quick, "--run-num", 1, "--overwrite", "--seed", 5).code == 0
    assert (first / "last.pth").read_bytes() != before
    assert not (first / "wandb").exists() and (first / "notes").exists()
    assert call("train.py", *quick, "--run-num", 7).code == 0


def test_resume_takes_the_newest_run_and_refuses_other_flags(call, refused, whole, tmp_path):
    """A run that has all its epochs is found, read and left as it is."""
    where = ["--resume", "--dataset", "cub", "--log-dir", tmp_path]
    refused("train.py", *where, match="there is no such checkpoint; --resume takes .* or finds the newest run")
    for name in ("cub/run_1", "cub/run_2", "kept"):
        shutil.copytree(whole, tmp_path / name)
    refused("train.py", *where, "--lr", 1e-5, match="trained with --lr 0.001, not 1e-05: give the same")
    assert "run_2, resumed after epoch 4" in call("train.py", *where).out
    assert "run_1, resumed" in call("train.py", *where, "--run-num", 1).out
    refused("train.py", *where, "--run-num", 1, "--overwrite", match="cannot be combined")
    kept = call("train.py", "--resume", tmp_path / "kept" / "last.pth", "--epochs", 5)
    assert kept.code == 0 and f"run: {tmp_path / 'kept'}, resumed after epoch 4" in kept.out
    best = tmp_path / "kept" / BEST_FILE
    refused("train.py", "--resume", best, match="cannot be resumed from, it lacks best, criterion_state_dict")
    # a run goes on where it lies
    one = ["--resume", tmp_path / "cub" / "run_2", "--log-dir"]
    refused("train.py", *one, tmp_path / "x", match="--run-num or --log-dir name another run: leave them out")
    assert call("train.py", *one, tmp_path).code == 0


def test_run_numbers_sort_as_numbers_and_two_processes_at_once_get_two_folders(tmp_path):
    both = [apart.Apart(apart.make_run_folders, tmp_path / "new", 50) for _ in range(2)]
    made = [line for process in both for line in process.end().out.split()]
    assert len(made) == len(set(made)) == 100
    for n in (2, 10, 9):
        (tmp_path / "cub" / f"run_{n}").mkdir(parents=True)
        (tmp_path / "cub" / f"run_{n}" / "last.pth").touch()
    (tmp_path / "cub" / "run_11").mkdir()  # never got as far as a checkpoint
    args = SimpleNamespace(log_dir=tmp_path, dataset="cub", resume="", run_num=1)
    assert run.last_checkpoint(args, set()) == tmp_path / "cub" / "run_10" / "last.pth"


@pytest.mark.parametrize("number", range(60))
def test_damaged_checkpoints_are_refused_in_one_line(tmp_path, number):
    path, chance = tmp_path / "damaged.pth", random.Random(number)
    checkpoint.save({"model_state_dict": {"model.fc.weight": torch.arange(6.0)}, "flags": {"lr": 0.1}}, path)
    content, cut = bytearray(path.read_bytes()), number % 2
    for _ in range(chance.randint(1, 20)):
        content[chance.randrange(len(content))] ^= chance.randint(1, 255)
    path.write_bytes(content[: chance.randrange(len(content))] if cut else content)
    # a flipped bit in a tensor's padding or in slack of the archive can go unnoticed
    with pytest.raises(Refused, match=rf"^{path}: .*\Z") if cut else contextlib.suppress(Refused):
        checkpoint.network_state(checkpoint.load(path), path)
