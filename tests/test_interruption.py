"""A run survives kills, full disks, signals, NaN and a second process, and goes on as the same run to the bit."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoint
import pandas as pd
import pytest
import run
import torch
import train
from conftest import ROOT, options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TIMES = {"seconds", "images_per_s", "data_time"}  # what differs between two runs of the same bits

pytestmark = pytest.mark.usefixtures("undrawn")


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def differences(a, b, where=""):
    """Paths of everything that differs between two checkpoints, times and what names the run aside."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {*a, *b} - TIMES - {"made_by", "log_dir", "run_num", "nb_workers", "nb_epochs"}:
            if key in a and key in b:
                yield from differences(a[key], b[key], f"{where}/{key}")
            else:
                yield f"{where}/{key}"
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{where}/{n}")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if not torch.equal(a, b):
            yield where
    elif a != b:
        yield where


def assert_same_run(one, other):
    files, others = ({path.name for path in run.iterdir() if path.suffix != ".png"} for run in (one, other))
    assert files == others
    for name in ("last.pth", "cub_resnet18_best.pth"):
        assert not list(differences(load(one / name), load(other / name)))
    drop = dict(columns=list(TIMES))
    a, b = pd.read_csv(one / "results.csv"), pd.read_csv(other / "results.csv")
    pd.testing.assert_frame_equal(a.drop(**drop), b.drop(**drop), check_exact=True)
    assert (one / "cub_resnet18_best_results.txt").read_text() == (other / "cub_resnet18_best_results.txt").read_text()


@pytest.fixture(scope="module")
def whole(cub, tmp_path_factory):
    """A run of four epochs that nothing disturbed."""
    logs = tmp_path_factory.mktemp("whole")
    command = [sys.executable, ROOT / "code" / "train.py", *options(cub, logs, "--epochs", 4)]
    subprocess.run([str(word) for word in command], check=True, capture_output=True, timeout=300)
    return logs / "cub" / "run_1"


def test_resumed_run_has_the_same_bits(call, cub, whole, tmp_path):
    assert call("train.py", *options(cub, tmp_path, "--epochs", 2)).code == 0
    run = tmp_path / "cub" / "run_1"
    assert list(differences(load(run / "last.pth"), load(whole / "last.pth")))  # the comparison can fail
    resumed = call("train.py", "--resume", run / "last.pth", "--epochs", 4)
    assert resumed.code == 0 and "resumed after epoch 2" in resumed.out
    assert_same_run(run, whole)


def test_number_of_workers_changes_nothing(call, cub, whole, tmp_path):
    assert call("train.py", *options(cub, tmp_path, "--epochs", 4, "--workers", 2)).code == 0
    assert_same_run(tmp_path / "cub" / "run_1", whole)


def test_seed_changes_everything(call, cub, whole, tmp_path):
    assert call("train.py", *options(cub, tmp_path, "--epochs", 4, "--seed", 2)).code == 0
    found = list(differences(load(tmp_path / "cub" / "run_1" / "last.pth"), load(whole / "last.pth")))
    assert "/model_state_dict/model.conv1.weight" in found and "/criterion_state_dict/cds2hg.means" in found


@pytest.mark.slow
def test_killed_at_twenty_random_moments(cub, whole, tmp_path):
    command = [
        sys.executable,
        ROOT / "tests" / "killed_run.py",
        20,
        0,
        tmp_path,
        *options(cub, tmp_path, "--epochs", 4),
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == 21
    assert_same_run(tmp_path / "cub" / "run_1", whole)


KILL_WHILE_WRITING = """
import os, signal, sys
sys.path.insert(0, {code!r})
import checkpoint, flags, train
save, count = checkpoint.save, 0
def killed_half_way(content, path):
    def half(file):
        import io, torch
        whole = io.BytesIO()
        torch.save(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    global count
    count += path.name == {name!r}
    checkpoint.write(half, path) if count == {number} else save(content, path)
checkpoint.save = killed_half_way
sys.argv = ["train.py", *sys.argv[1:]]
flags.run_script(train.main)
"""


@pytest.mark.parametrize("name, number", [("last.pth", 4), ("cub_resnet18_best.pth", 1)])
def test_killed_while_a_checkpoint_is_written(call, cub, whole, tmp_path, name, number):
    program = KILL_WHILE_WRITING.format(code=str(ROOT / "code"), name=name, number=number)
    command = [sys.executable, "-c", program, *map(str, options(cub, tmp_path, "--epochs", 4))]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == -signal.SIGKILL
    run = tmp_path / "cub" / "run_1"
    # untrained, warm-up and epoch 1 are whole; cut was epoch 2, or what follows last.pth in epoch 1
    assert load(run / "last.pth")["epoch"] == 1
    assert call("train.py", "--resume", run / "last.pth").code == 0
    assert_same_run(run, whole)


def test_full_disk_is_a_clear_error_and_keeps_what_was_saved(cub, tmp_path):
    """A file size limit stands in for the full disk: writing fails half-way in the same call."""
    first = subprocess.run(
        [sys.executable, ROOT / "code" / "train.py", *map(str, options(cub, tmp_path, "--epochs", 1))],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    run = tmp_path / "cub" / "run_1"
    assert first.returncode == 0
    before = {path.name: path.read_bytes() for path in run.iterdir()}

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))

    again = subprocess.run(
        [sys.executable, ROOT / "code" / "train.py", "--resume", run / "last.pth", "--epochs", "3"],
        capture_output=True, text=True, timeout=300, preexec_fn=limit,
    )  # fmt: skip
    assert again.returncode == 1
    (line,) = [line for line in again.stderr.splitlines() if not line.startswith("warning")]
    assert re.search(r"train.py: error: .*\.pth: cannot be written .* what was saved before is untouched", line)
    del before["args.json"]
    assert before == {name: (run / name).read_bytes() for name in before}
    assert {path.name for path in run.iterdir()} == {*before, "args.json"}  # no half-written file lies around


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_and_says_how_to_go_on(call, cub, whole, tmp_path, number, code):
    command = [sys.executable, "-u", ROOT / "code" / "train.py", *options(cub, tmp_path, "--epochs", 4, "--workers", 1)]
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if "epoch 1/4" in line:
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err and f"{number.name}: stopped. Kept: train epoch" in err
    resume = err.strip().splitlines()[-1].partition("Resume with: ")[2].split()
    assert resume[2] == "--resume"
    run = tmp_path / "cub" / "run_1"
    assert call("train.py", "--resume", run / "last.pth").code == 0
    assert_same_run(run, whole)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_to_the_whole_group_ends_like_one_to_the_main_process(cub, tmp_path, number, code):
    """`timeout` and batch systems signal the workers, too, and may do so twice."""
    command = [
        sys.executable,
        "-u",
        ROOT / "code" / "train.py",
        *options(cub, tmp_path, "--epochs", 99, "--workers", 2),
    ]
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    for line in process.stdout:
        if "epoch 1/99" in line:
            break
    process.send_signal(number)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("warning")]
    assert len(lines) == 1 and re.search(f"{number.name}: stopped. Kept: train epoch .* Resume with: ", lines[0]), err
    with pytest.raises(ProcessLookupError):  # no worker is left behind
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_second_ctrl_c_leaves_at_once():
    program = f"import sys, time; sys.path.insert(0, {str(ROOT / 'code')!r}); import train; train.StopSignals(); "
    program += "print('ready', flush=True); time.sleep(60); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == 130


def test_runs_never_overwrite_each_other(call, refused, cub, tmp_path):
    quick = options(cub, tmp_path, "--epochs", 0, "--warm", 0)
    assert call("train.py", *quick).code == 0
    assert call("train.py", *quick).code == 0
    assert {path.name for path in (tmp_path / "cub").iterdir()} == {"run_1", "run_2"}
    before = (tmp_path / "cub" / "run_1" / "last.pth").read_bytes()
    refused("train.py", *quick, "--run-num", 1, match="run_1 exists: give --resume .* --overwrite")
    assert (tmp_path / "cub" / "run_1" / "last.pth").read_bytes() == before
    assert call("train.py", *quick, "--run-num", 1, "--overwrite", "--seed", 5).code == 0
    assert (tmp_path / "cub" / "run_1" / "last.pth").read_bytes() != before
    assert call("train.py", *quick, "--run-num", 7).code == 0
    refused("train.py", *quick, "--overwrite", match="--overwrite needs --run-num")


def test_two_processes_at_once_get_two_folders(tmp_path):
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'code')!r}); import run, pathlib\n"
    program += "sys.stdin.read(); [print(run.new_run_folder(pathlib.Path(sys.argv[1]), None)) for _ in range(50)]"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in both:
        process.stdin.close()
    made = [line for process in both for line in process.stdout.read().split()]
    assert len(made) == len(set(made)) == 100


def test_resume_takes_the_newest_run_and_refuses_other_flags(call, refused, cub, tmp_path):
    quick = options(cub, tmp_path, "--epochs", 1, "--warm", 0)
    refused("train.py", "--resume", "--dataset", "cub", "--log-dir", tmp_path, match="no run to resume")
    for _ in range(2):
        assert call("train.py", *quick).code == 0
    where = ["--resume", "--dataset", "cub", "--log-dir", tmp_path]
    refused("train.py", *where, "--lr", 1e-5, match="made with other flags .*lr 1e-05 instead of 0.001")
    assert "run_2, resumed after epoch 1" in call("train.py", *where, "--epochs", 2).out
    assert "run_1, resumed" in call("train.py", *where, "--run-num", 1).out
    refused("train.py", *where, "--run-num", 1, "--overwrite", match="cannot be combined")
    (tmp_path / "cub" / "run_1").rename(tmp_path / "kept")
    kept = call("train.py", "--resume", tmp_path / "kept" / "last.pth", "--epochs", 3)
    assert kept.code == 0 and f"run: {tmp_path / 'kept'}, resumed after epoch 1" in kept.out
    best = tmp_path / "kept" / "cub_resnet18_best.pth"
    refused("train.py", "--resume", best, match="cannot be resumed from, it lacks best, criterion_state_dict")


def test_nan_loss_stops_before_the_optimiser_step(call, refused, cub, tmp_path, monkeypatch):
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


def test_validation_classes_choose_without_the_test_split(call, cub, tmp_path):
    assert call("train.py", *options(cub, tmp_path, "--val-classes", 0.5, "--epochs", 4)).code == 0
    run = tmp_path / "cub" / "run_1"
    rows = pd.read_csv(run / "results.csv")
    trained = rows[rows["phase"] == "train"].reset_index()
    best = load(run / "cub_resnet18_best.pth")
    assert best["epoch"] == trained["epoch"][trained["val R@1"].idxmax()]
    assert load(run / "last.pth")["criterion_state_dict"]["cds2hg.means"].shape[0] == 2  # 2 of 4 classes train
    assert "held out (--val-classes)" in (run / "cub_resnet18_best_results.txt").read_text()


class Command:
    """Pickles into a call of os.system."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_checkpoint_with_a_command_in_it_does_not_run_it(refused, cub, tmp_path):
    path, touched = tmp_path / "evil.pth", tmp_path / "touched"
    torch.save({"model_state_dict": {}, "flags": Command(touched)}, path)
    refused("evaluate.py", "--model-path", path, match="refused, it holds more than tensors and plain values")
    refused("train.py", "--resume", path, match="refused, it holds more")
    assert not touched.exists()


def test_stored_flags_are_data(refused, cub, whole, tmp_path):
    content = load(whole / "cub_resnet18_best.pth")
    content["flags"] |= {"sz_embedding": "__import__('os').abort()"}
    torch.save(content, tmp_path / "odd.pth")
    refused("evaluate.py", "--model-path", tmp_path / "odd.pth", match="--embedding-size: must be a whole number")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_checkpoints_are_refused_in_one_line(whole, tmp_path, data):
    content = small_checkpoint(tmp_path)
    kind = data.draw(st.sampled_from(["cut", "flip", "random"]))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "flip":
        changed = bytearray(content)
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=20)):
            changed[place] ^= data.draw(st.integers(1, 255))
        content = bytes(changed)
    else:
        content = data.draw(st.binary(max_size=300))
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    try:
        loaded = checkpoint.load(path)
        checkpoint.network_state(loaded, path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert kind == "flip"  # a flipped bit in a tensor's padding or in slack of the archive can go unnoticed


def small_checkpoint(folder):
    path = folder / "small.pth"
    if not path.exists():
        checkpoint.save({"model_state_dict": {"model.fc.weight": torch.arange(6.0)}, "flags": {"lr": 0.1}}, path)
    return path.read_bytes()


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "results.txt"
    checkpoint.write_text("old", path)

    def fails(file):
        file.write(b"half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        checkpoint.write(fails, path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["results.txt"]
    with pytest.raises(OSError, match="cannot be written"):
        checkpoint.write_text("x", tmp_path / "no such folder" / "file")


def test_csv_text_reads_back():
    rows = [{"phase": "untrained", "epoch": 0, "R@1": 0.5}, {"phase": "train", "epoch": 1, "loss": 2.0, "R@1": 0.75}]
    import io

    table = pd.read_csv(io.StringIO(run.csv_text(rows)))
    assert table["R@1"].tolist() == [0.5, 0.75] and table["loss"].isna().tolist() == [True, False]


def test_run_numbers_sort_as_numbers(tmp_path):
    for n in (2, 10, 9):
        (tmp_path / f"run_{n}").mkdir()
        (tmp_path / f"run_{n}" / "last.pth").touch()
    (tmp_path / "run_11").mkdir()  # never got as far as a checkpoint
    assert run.newest_run_folder(tmp_path) == Path(tmp_path / "run_10")
