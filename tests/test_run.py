"""What a run knows of itself (code/run.py): its data, its lock, its files after a kill, its resumptions."""

import json
import os
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import apart
import checkpoint
import pytest
import report
import run
import summary
import torch
import train
from conftest import BEST, TINY
from trees import make_classes, make_cub, picture, save

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def run_folder(trained, tmp_path):
    """A copy of that run, and of its pictures, to spoil."""
    pictures, folder = (shutil.copytree(path, tmp_path / path.name) for path in trained)
    return pictures, folder


def resume(folder, *words):
    return ["train.py", "--resume", folder / "last.pth", "--epochs", 2, *words]


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_a_run_says_what_it_was_trained_on(trained):
    pictures, folder = trained
    said = json.loads((folder / "args.json").read_text())["data"]
    assert not (folder / ".lock").exists()
    assert {split: (part["images"], part["classes"]) for split, part in said.items()} == {
        "train": (24, 4), "query": (24, 4),
    }  # fmt: skip
    for name in ("last.pth", f"folder_{BEST}.pth"):
        data = checkpoint.load(folder / name)["data"]
        assert data["train"]["classes"] == [f"class {c}" for c in range(4)]
        assert data["query"]["digest"] == said["query"]["digest"] != data["train"]["digest"]


def test_the_same_data_at_another_place_resumes(call, run_folder):
    pictures, folder = run_folder
    done = call(*resume(folder, "--data-root", pictures))
    assert done.code == 0 and "resumed after epoch 1" in done.out, done.err


def add_class_before(pictures):
    save(pictures / "Class 0" / "0.png", 9, 0)
    save(pictures / "Class 0" / "1.png", 9, 1)


def rename_class(pictures):
    (pictures / "class 1").rename(pictures / "class 1b")


def remove_class(pictures):
    shutil.rmtree(pictures / "class 1")


def swap_images(pictures):
    for c, other in ((1, 2), (2, 1)):
        for path in list((pictures / f"class {c}").glob("?.png")):
            path.rename(pictures / f"class {other}" / f"{c}-{path.name}")


def add_image(pictures):
    save(pictures / "class 1" / "new.png", 1, 9)


def remove_image(pictures):
    (pictures / "class 6" / "3.png").unlink()


def replace_image(pictures):
    picture(1, 9).resize((50, 50)).save(pictures / "class 6" / "3.png")


@pytest.mark.parametrize(
    "change, match, only_images",
    [
        (add_class_before, r"train: 1 class removed \('class 3'\); 1 class added \('Class 0'\)", False),
        (rename_class, r"train: 1 class renamed \('class 1' to 'class 1b'\)", False),
        (remove_class, r"'class 1'", False),
        (swap_images, r"train: images added, removed or replaced in 2 classes", True),
        (add_image, r"train: images added, .* in 1 class \('class 1': 6 images before, 7 now\)", True),
        (remove_image, r"query: images added, .* in 1 class \('class 6': 6 images before, 5 now\)", True),
        (replace_image, r"query: .* replaced in 1 class \('class 6': same number, other names or sizes\)", True),
    ],
)
def test_resuming_on_other_data_is_refused(refused, run_folder, change, match, only_images):
    pictures, folder = run_folder
    change(pictures)
    before = snapshot(folder)
    line = refused(*resume(folder, "--data-root", pictures), match=match)
    assert ("--allow-changed-images resumes anyway" in line) == only_images
    moved = ["--data-root", pictures.rename(pictures.with_name("moved"))]
    refused(*resume(folder, *moved), match=match)
    if not only_images:
        refused(*resume(folder, *moved, "--allow-changed-images"), match=match)
    assert snapshot(folder) == before


@pytest.mark.drawn
def test_the_best_epoch_is_chosen_among_those_scored_on_the_same_images(call, run_folder, monkeypatch):
    stars, (pictures, folder) = [], run_folder
    monkeypatch.setattr("pictures.curves", lambda *_, best, **options: stars.append(best))
    last = checkpoint.load(folder / "last.pth")
    last["best"]["R@1"] = 1.0  # nothing could be better
    checkpoint.save(last, folder / "last.pth")
    remove_image(pictures)
    done = call(*resume(folder, "--data-root", pictures, "--allow-changed-images"))
    assert done.code == 0 and "warning: the data changed since the run began" in done.err
    assert "Best epoch: 2" in (folder / f"folder_{BEST}_results.txt").read_text()
    assert stars == [2]
    said = json.loads((folder / "args.json").read_text())
    assert said["data"]["query"]["images"] == 23
    assert said["resumptions"][0]["after_epoch"] == 1
    assert said["resumptions"][0]["data_before"]["query"]["images"] == 24


def test_an_abandoned_resumption_on_other_images_leaves_no_mark(call, run_folder):
    pictures, folder = run_folder
    content = json.loads((folder / "args.json").read_text())
    content["resumptions"] = [{"after_epoch": 1, "data_before": {"query": {"images": 1}}}, "x"]
    (folder / "args.json").write_text(json.dumps(content))
    assert call(*resume(folder, "--data-root", pictures)).code == 0
    resumptions = json.loads((folder / "args.json").read_text())["resumptions"]
    assert [entry["after_epoch"] for entry in resumptions] == [1] and "data_before" not in resumptions[0]


def test_an_abandoned_extension_of_a_finished_run_leaves_no_mark(call, run_folder):
    pictures, folder = run_folder
    before = json.loads((folder / "args.json").read_text())
    entry = {"after_epoch": 1, "data_before": {"query": {"images": 1}}, "flags": {"nb_epochs": 9}}
    (folder / "args.json").write_text(json.dumps(before | {"resumptions": [entry], "data": {}}))
    assert "nothing left to do" in call("train.py", "--resume", folder, "--data-root", pictures, "--epochs", 1).out
    after = json.loads((folder / "args.json").read_text())
    assert after["data"] == before["data"] and "data_before" not in str(after)
    assert "resumptions" not in after and report.read_runs(folder.parent)[1] == []
    last = checkpoint.load(folder / "last.pth")  # as it is after some of the further epochs
    checkpoint.save(last | {"flags": last["flags"] | {"nb_epochs": 9}}, folder / "last.pth")
    assert "nothing left to do" in call("train.py", "--resume", folder, "--data-root", pictures, "--epochs", 1).out
    (entry,) = json.loads((folder / "args.json").read_text())["resumptions"]
    assert entry["flags"]["nb_epochs"] == 1


@pytest.mark.parametrize("spoil", ["missing", "damaged", "of another epoch"])
def test_the_best_checkpoint_is_made_again_from_the_last_one(call, run_folder, spoil):
    """What is left by a kill, or a full disk, after last.pth was written."""
    pictures, folder = run_folder
    best = folder / f"folder_{BEST}.pth"
    before = checkpoint.load(best)
    if spoil == "missing":
        best.unlink()
    elif spoil == "damaged":
        best.write_bytes(best.read_bytes()[:100])
    else:
        checkpoint.save(before | {"epoch": 0, "model_state_dict": {}}, best)
    done = call("train.py", "--resume", folder, "--data-root", pictures)
    assert done.code == 0 and "nothing left to do" in done.out and "warning" not in done.err
    after = checkpoint.load(best)
    assert after.keys() == before.keys() and after["figures"] == before["figures"]
    assert all(torch.equal(tensor, after["model_state_dict"][k]) for k, tensor in before["model_state_dict"].items())


def test_a_best_checkpoint_that_cannot_be_made_again_is_missed(call, run_folder):
    pictures, folder = run_folder
    (folder / f"folder_{BEST}.pth").unlink()
    last = checkpoint.load(folder / "last.pth")
    checkpoint.save(last | {"best": last["best"] | {"epoch": 0, "R@1": 2.0}}, folder / "last.pth")
    done = call(*resume(folder, "--data-root", pictures))
    assert done.code == 0 and "best.pth does not hold the network of epoch 0, the best so far" in done.err


@pytest.mark.parametrize("more", [[], ["--batch-size", 4, "--val-classes", 0.5]])
def test_images_that_cannot_be_decoded_are_left_out_and_counted(call, refused, trained, tmp_path, more):
    pictures = shutil.copytree(trained[0], tmp_path / "mine")
    for c in (1, 5, 6):
        (pictures / f"class {c}" / "0.png").write_bytes(b"no picture")
    words = ["--dataset", "folder", "--data-root", pictures, "--log-dir", tmp_path, "--warm", 0, "--epochs", 1, *more]
    if not more:
        refused("train.py", *TINY, *words, match=r"/0.png: cannot be decoded .*--skip-bad-images")
        shutil.rmtree(tmp_path / "folder")
    done = call("train.py", *TINY, *words, "--skip-bad-images")
    assert done.code == 0, done.err
    assert f"left out: 3 images that could not be decoded: {pictures}/class 1/0.png: cannot be decoded (" in done.out
    assert "test 22 images of 4 classes" in done.out
    origin = json.loads((tmp_path / "folder" / "run_1" / "args.json").read_text())
    assert sum(split["images"] for split in origin["data"].values()) == 45
    if not more:  # the line that scores again, as it is printed
        line = next(line for line in done.out.splitlines() if line.startswith("score"))
        assert line.endswith("--skip-bad-images")
        scored = call("evaluate.py", *shlex.split(line)[3:], "--gpu-id", -1, "--workers", 0)
        assert scored.code == 0 and "left out: 2 images that could not be decoded" in scored.out, scored.err


def test_listed_classes_are_compared_too(call, refused, tmp_path):
    """A benchmark's split comes from its list or its numbers; a class that goes missing is noticed all the same."""
    make_cub(tmp_path / "data")
    words = ["--dataset", "cub", "--data-root", tmp_path / "data", "--log-dir", tmp_path / "logs", "--warm", 0]
    assert call("train.py", *TINY, *words, "--epochs", 1).code == 0
    images = tmp_path / "data" / "CUB_200_2011" / "images"
    folder = sorted(path for path in images.iterdir() if path.is_dir() and path.name[0] == "0")[1]
    folder.rename(tmp_path / "away")
    refused(
        *resume(tmp_path / "logs" / "cub" / "run_1"),
        match=f"train: 1 class removed .'{folder.name}'.; 1 class added .'005.Bird_5'",
    )


def test_held_out_classes_are_part_of_the_data(call, tmp_path):
    make_classes(tmp_path / "mine", 16)
    words = ["--dataset", "folder", "--data-root", tmp_path / "mine", "--log-dir", tmp_path / "logs", "--warm", 0]
    assert call("train.py", *TINY, *words, "--epochs", 1, "--val-classes", 0.5).code == 0
    run = tmp_path / "logs" / "folder" / "run_1"
    assert set(checkpoint.load(run / "last.pth")["data"]) == {"train", "validation", "query"}
    assert call(*resume(run)).code == 0


def test_a_run_of_before_resumes_with_a_warning(call, run_folder):
    """As an earlier version left it: without some flags, without fingerprints and the shares of waiting."""
    pictures, folder = run_folder
    state = checkpoint.load(folder / "last.pth")
    for content, name in ((state, "data"), (state["flags"], "cuda_graphs"), (state["history"][1], "data_time")):
        del content[name]
    checkpoint.save(state, folder / "last.pth")
    done = call(*resume(folder, "--data-root", pictures))
    assert done.code == 0 and "does not say what it was trained on: not compared" in done.err


# A finished run, and what resuming leaves -----------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--epochs", 1], ["--epochs", 0], ["--skip-bad-images"], ["--wandb", "offline"]])
def test_resuming_a_finished_run_changes_nothing(call, run_folder, words):
    pictures, folder = run_folder
    before = snapshot(folder)
    done = call("train.py", "--resume", folder, "--data-root", pictures, *words)
    assert done.code == 0 and "nothing left to do, 1 of" in done.out
    assert snapshot(folder) == before


def test_table_and_text_are_written_anew_from_the_checkpoint(call, run_folder):
    """Killed after last.pth was written, a finished run lacked its last row, and was 'not finished' for ever."""
    pictures, folder = run_folder
    whole = {name: (folder / name).read_text() for name in ("results.csv", f"folder_{BEST}_results.txt")}
    (folder / "results.csv").write_text("".join(whole["results.csv"].splitlines(True)[:-1]))
    (folder / f"folder_{BEST}_results.txt").unlink()
    (folder / "curves.png").unlink()
    assert call("train.py", "--resume", folder, "--data-root", pictures).code == 0
    assert {name: (folder / name).read_text() for name in whole} == whole
    assert (folder / "curves.png").exists()


def test_resumptions_are_listed_beside_what_made_the_run(call, run_folder):
    pictures, folder = run_folder
    first = json.loads((folder / "args.json").read_text())
    for epochs in (2, 3):
        done = call("train.py", "--resume", folder, "--data-root", pictures, "--epochs", epochs, "--skip-bad-images")
        assert done.code == 0, done.err
    said = json.loads((folder / "args.json").read_text())
    assert {name: said[name] for name in ("flags", "made_by", "data")} == {
        name: first[name] for name in ("flags", "made_by", "data")
    }
    assert [part["after_epoch"] for part in said["resumptions"]] == [1, 2]
    assert [part["flags"]["nb_epochs"] for part in said["resumptions"]] == [2, 3]
    assert said["resumptions"][0]["flags"]["skip_bad_images"] is True
    assert "--epochs 3" in said["resumptions"][1]["command"]
    # what the checkpoint says of its flags is what holds now
    assert checkpoint.load(folder / "last.pth")["flags"]["nb_epochs"] == 3
    assert call("train.py", "--resume", folder, "--data-root", pictures).out.count("3 of 3 epochs are done") == 1


def test_resume_takes_a_run_folder_and_names_runs_in_another(call, refused, run_folder):
    pictures, folder = run_folder
    assert "resumed after epoch 1" in call("train.py", "--resume", folder, "--data-root", pictures, "--epochs", 2).out
    folder.rename(folder.parent / "run_7")
    refused("train.py", "--resume", folder.parent, match="no last.pth in it; it holds the runs run_7")
    refused("train.py", "--resume", pictures, match="no last.pth in it; give a run's folder or its last.pth")


# Lock and leftovers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def holder(run_folder):
    """Another process at work in the run's folder."""
    process = apart.Apart(apart.hold_lock, run_folder[1])
    process.wait_for("held")
    yield process.process
    process.process.kill()


def test_a_run_is_locked_before_it_is_read(call, run_folder, monkeypatch):
    """What another process saves up to that moment counts."""
    pictures, folder = run_folder
    further = checkpoint.load(folder / "last.pth") | {"epoch": 2}
    lock = run.lock
    monkeypatch.setattr(run, "lock", lambda folder: (checkpoint.save(further, folder / "last.pth"), lock(folder))[1])
    assert "nothing left to do, 2 of 2" in call(*resume(folder, "--data-root", pictures)).out
    assert not (folder / ".lock").exists()


def test_two_processes_cannot_work_in_one_run(call, refused, run_folder, holder):
    pictures, folder = run_folder
    before = snapshot(folder)
    again = resume(folder, "--data-root", pictures)
    refused(*again, match=f"another process .*process {holder.pid}. is using this run")
    assert snapshot(folder) == before
    logs = folder.parent / "logs" / "folder"
    logs.mkdir(parents=True)
    folder.rename(logs / "run_1")
    overwrite = [*TINY, "--dataset", "folder", "--data-root", pictures, "--log-dir", logs.parent, "--run-num", 1]
    refused("train.py", *overwrite, "--overwrite", match="another process .* is using this run")
    assert snapshot(logs / "run_1").keys() == {logs / "run_1" / path.name for path in before}
    # a crash leaves no lock
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert call("train.py", "--resume", logs / "run_1", "--data-root", pictures, "--epochs", 2).code == 0


def test_only_our_own_leftovers_are_removed(call, run_folder):
    pictures, folder = run_folder
    (folder / f".last.pth.abc{checkpoint.TEMPORARY}").write_text("half a checkpoint")
    kept = [folder / name for name in (".notes.tmp", ".last.pth.abc.tmp", "mine.hist-tmp", ".swp")]
    for path in kept:
        path.write_text("mine")
    assert call(*resume(folder, "--data-root", pictures)).code == 0
    assert all(path.read_text() == "mine" for path in kept)
    assert not list(folder.glob(f".*{checkpoint.TEMPORARY}"))


def test_a_network_that_went_astray_is_said_to_have_diverged(call, refused, trained, tmp_path, monkeypatch):

    epochs = []
    step = torch.optim.Adam.step

    def explode(self, *arguments, **options):
        result = step(self, *arguments, **options)
        epochs.append(1)
        if len(epochs) == 3:
            with torch.no_grad():
                self.param_groups[1]["params"][0].fill_(float("nan"))
        return result

    monkeypatch.setattr(train.torch.optim.Adam, "step", explode)
    words = [*TINY, "--dataset", "folder", "--data-root", trained[0], "--log-dir", tmp_path / "logs", "--warm", 0]
    refused(
        "train.py", *words, "--epochs", 1,
        match=r"training diverged in epoch 1/1: 24 of 24 embeddings hold NaN or Inf.*lr 0.001, .*lr_ds 0.1.*--lr-ds",
    )  # fmt: skip


@pytest.mark.parametrize("share, percent, advised", [(0.05, "", False), (0.2, "20 %", False), (0.5, "50 %", True)])
def test_waiting_for_images_is_said(trained, share, percent, advised):
    row = {"phase": "train", "epoch": 1, "loss": 1.0, "R@1": 0.5, "lr": 1e-3, "images_per_s": 100, "seconds": 2.0}
    waiting = row | {"data_time": share}
    line = summary.console_line(waiting, 2)
    assert ("waiting for images" in line) == bool(percent) and percent in line
    log = SimpleNamespace(args=SimpleNamespace(val_classes=0, dataset="cub"), folder=trained[1], best=None, doubt="")
    log.history, log.chance = [row, waiting], lambda: None
    assert ("50 % of the time: give it more --workers" in summary.summary(log, Path())) == advised


def test_a_row_says_how_long_it_waited(trained):
    untrained, row = checkpoint.load(trained[1] / "last.pth")["history"]
    assert "data_time" not in untrained and 0 < row["data_time"] < 1
