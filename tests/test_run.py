"""What a run knows of itself (code/run.py): its data, its lock, its files after a kill, its resumptions."""

import itertools
import json
import os
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import apart
import checkpoint
import distributed
import pytest
import report
import run
import summary
import torch
from conftest import BEST, TINY
from trees import save

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def run_folder(trained, tmp_path):
    """A copy of that run, and of its pictures, to spoil."""
    return shutil.copytree(trained[0], tmp_path / "mine"), shutil.copytree(trained[1], tmp_path / "folder" / "run_1")


def resume(folder, *words):
    return ["train.py", "--resume", folder / "last.pth", "--epochs", 2, *words]


def snapshot(folder):
    files = [path for path in folder.iterdir() if path.name != run.LOCK]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_run_says_what_it_was_trained_on_and_how_long_it_waited(trained):
    folder = trained[1]
    said = json.loads((folder / "args.json").read_text())["data"]
    sizes = {split: (part["images"], part["classes"]) for split, part in said.items()}
    assert sizes == {"train": (24, 4), "query": (24, 4)}
    for name in ("last.pth", f"folder_{BEST}.pth"):
        data = checkpoint.load(folder / name)["data"]
        assert data["train"]["classes"] == [f"class {c}" for c in range(4)]
        assert data["query"]["digest"] == said["query"]["digest"] != data["train"]["digest"]
    untrained, row = checkpoint.load(folder / "last.pth")["history"]
    assert "data_time" not in untrained and 0 < row["data_time"] < 1


def add_class_before(pictures):
    save(pictures / "Class 0" / "0.png", 9, 0)
    save(pictures / "Class 0" / "1.png", 9, 1)


def swap_images(pictures):
    for c, other in ((1, 2), (2, 1)):
        for path in list((pictures / f"class {c}").glob("?.png")):
            path.rename(pictures / f"class {other}" / f"{c}-{path.name}")


def remove_image(pictures):
    (pictures / "class 6" / "3.png").unlink()


@pytest.mark.parametrize(
    "change, match, only_images",
    [
        (add_class_before, r"train: classes removed: 1 \('class 3'\); classes added: 1 \('Class 0'\)", False),
        (
            lambda at: (at / "class 1").rename(at / "class 1b"),
            r"removed: 1 \('class 1'\); classes added: 1 \('class 1b'\)",
            False,
        ),
        (lambda at: shutil.rmtree(at / "class 1"), r"'class 1'", False),
        (swap_images, r"train: classes with images added, removed or replaced: 2 \(", True),
        (
            lambda at: save(at / "class 1" / "new.png", 1, 9),
            r"train: classes with images added, .*: 1 \('class 1'\)",
            True,
        ),
        (remove_image, r"query: classes with images added, .*: 1 \('class 6'\)", True),
        (lambda at: save(at / "class 6" / "3.png", 1, 9, 50), r"query: .* or replaced: 1 \('class 6'\)", True),
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


def test_the_best_epoch_is_chosen_among_those_scored_on_the_same_images(call, run_folder, monkeypatch):
    stars, (pictures, folder) = [], run_folder
    monkeypatch.setattr("run.Run.draw", lambda run, _: run._draw_curves())
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


def test_an_abandoned_extension_of_a_finished_run_leaves_no_mark(call, run_folder):
    pictures, folder = run_folder
    before = (folder / "args.json").read_text()
    entry = {"after_epoch": 1, "data_before": {"query": {"images": 1}}, "flags": {"nb_epochs": 9}}
    (folder / "args.json").write_text(json.dumps(json.loads(before) | {"resumptions": [entry], "data": {}}))
    again = ["train.py", "--resume", folder, "--data-root", pictures, "--epochs", 1]
    assert "nothing left to do" in call(*again).out and (folder / "args.json").read_text() == before
    assert report.read_runs(folder.parent)[1] == []
    last = checkpoint.load(folder / "last.pth")  # as it is after some of the further epochs
    checkpoint.save(last | {"flags": last["flags"] | {"nb_epochs": 9}}, folder / "last.pth")
    assert "nothing left to do" in call(*again).out
    (entry,) = json.loads((folder / "args.json").read_text())["resumptions"]
    assert entry["flags"]["nb_epochs"] == 1


@pytest.mark.parametrize("spoil", ["missing", "damaged", "of another epoch"])
def test_files_are_made_again_from_the_last_checkpoint(call, run_folder, spoil):
    """A kill, or a full disk, after last.pth was written left a finished run without its last row, or worse."""
    pictures, folder = run_folder
    best, text, table = (folder / name for name in (f"folder_{BEST}.pth", f"folder_{BEST}_results.txt", "results.csv"))
    before, whole = checkpoint.load(best), {path: path.read_text() for path in (table, text)}
    table.write_text("".join(whole[table].splitlines(True)[:-1]))
    for path in (text, folder / "curves.png", best):
        path.unlink()
    if spoil == "damaged":
        best.write_bytes(b"PK")
    elif spoil == "of another epoch":
        checkpoint.save(before | {"epoch": 0, "model_state_dict": {}}, best)
    done = call("train.py", "--resume", folder, "--data-root", pictures)
    assert done.code == 0 and "nothing left to do" in done.out and "warning" not in done.err
    after = checkpoint.load(best)
    assert after.keys() == before.keys() and after["figures"] == before["figures"]
    torch.testing.assert_close(after["model_state_dict"], before["model_state_dict"], rtol=0, atol=0)
    assert {path: path.read_text() for path in whole} == whole and (folder / "curves.png").exists()


def test_a_best_network_that_is_lost_is_said(call, refused, run_folder, monkeypatch):
    pictures, folder = run_folder
    state = checkpoint.load(folder / "last.pth")
    checkpoint.save(state | {"best": state["best"] | {"epoch": 0, "R@1": 2.0}}, folder / "last.pth")
    done = call(*resume(folder, "--data-root", pictures))
    assert done.code == 0 and "best.pth does not hold the network of epoch 0, the best so far" in done.err
    # nor may processes go on from different epochs
    monkeypatch.setattr(distributed, "from_all", lambda value: [value - 1])
    refused(*resume(folder, "--data-root", pictures), "--epochs", 3, match="another process went on with this run")


def test_a_run_of_before_resumes(call, run_folder):
    """As an earlier version left it: without some flags, what is known of resumptions, and shares of waiting."""
    pictures, folder = run_folder
    state = checkpoint.load(folder / "last.pth")
    younger = (state, "first_flags"), (state, "resumptions"), (state["history"][1], "data_time")
    for content, name in (*younger, (state["flags"], "cuda_graphs")):
        del content[name]
    checkpoint.save(state, folder / "last.pth")
    before = json.loads((folder / "args.json").read_text()) | {"resumptions": [{"after_epoch": 0, "flags": {}}]}
    (folder / "args.json").write_text(json.dumps(before))
    assert call(*resume(folder, "--data-root", pictures)).code == 0
    after = json.loads((folder / "args.json").read_text())
    assert after["flags"] == before["flags"] and after["resumptions"][:1] == before["resumptions"]
    assert [entry["flags"] for entry in after["resumptions"][1:]] == [{"data_root": str(pictures), "nb_epochs": 2}]


def test_images_that_cannot_be_decoded_are_left_out_and_counted(call, refused, trained, tmp_path):
    pictures = shutil.copytree(trained[0], tmp_path / "mine")
    for c in (1, 5, 6):
        (pictures / f"class {c}" / "0.png").write_bytes(b"no picture")
    words = [*TINY, "--dataset", "folder", "--data-root", pictures, "--log-dir", tmp_path, "--warm", 0, "--epochs", 1]
    words += ["--batch-size", 4, "--val-classes", 0.5]
    refused("train.py", *words, match=r"/0.png: cannot be decoded .*--skip-bad-images")
    shutil.rmtree(tmp_path / "folder")
    done = call("train.py", *words, "--skip-bad-images", "--remark", os.fsdecode(b"\xff"))  # no text, but no harm
    assert done.code == 0, done.err
    assert f"left out: 3 images that could not be decoded: {pictures}/class 1/0.png: cannot be decoded (" in done.out
    assert "test 22 images of 4 classes" in done.out
    origin = json.loads((tmp_path / "folder" / "run_1" / "args.json").read_text())
    assert sum(split["images"] for split in origin["data"].values()) == 45
    # the line that scores again, as it is printed
    line = next(line for line in done.out.splitlines() if line.startswith("score"))
    assert line.endswith("--skip-bad-images")
    scored = call("evaluate.py", *shlex.split(line)[3:], "--gpu-id", -1, "--workers", 0)
    assert scored.code == 0 and "left out: 2 images that could not be decoded" in scored.out, scored.err


def test_listed_and_held_out_classes_are_compared_too(call, refused, cub, held_out, tmp_path):
    """A benchmark's split comes from its list or its numbers; a class that goes missing is noticed all the same."""
    run = shutil.copytree(held_out, tmp_path / "run_1")
    assert set(checkpoint.load(run / "last.pth")["data"]) == {"train", "validation", "query"}
    assert call(*resume(run)).code == 0
    changed = shutil.copytree(cub, tmp_path / "data")
    (changed / "CUB_200_2011" / "images" / "002.Bird_2").rename(tmp_path / "away")
    lost = "train: classes removed: 1 .'003.Bird_3'.; classes added: 1 .'005.Bird_5'.; validation: classes removed: "
    refused(*resume(run, "--data-root", changed), match=lost)


# A finished run, and what resuming leaves -----------------------------------------------------------------------------


def test_resuming_a_finished_run_changes_nothing(call, refused, run_folder):
    pictures, folder = run_folder
    before = snapshot(folder)
    for words in ([], ["--epochs", 1], ["--epochs", 0], ["--skip-bad-images"], ["--wandb", "offline"]):
        done = call("train.py", "--resume", folder, "--data-root", pictures, *words)
        assert done.code == 0 and "nothing left to do, 1 of" in done.out
        assert snapshot(folder) == before
    for other in (folder.parent, pictures):
        refused("train.py", "--resume", other, match=f"{other}/last.pth: there is no such .*a run's folder or its")


def test_resumptions_are_listed_beside_what_made_the_run(call, run_folder):
    pictures, folder = run_folder
    first = json.loads((folder / "args.json").read_text())
    for epochs in (2, 3):
        done = call("train.py", "--resume", folder, "--data-root", pictures, "--epochs", epochs, "--skip-bad-images")
        assert done.code == 0 and f"resumed after epoch {epochs - 1}" in done.out, done.err
    said = json.loads((folder / "args.json").read_text())
    resumptions = said.pop("resumptions")
    assert said == first and "data_before" not in resumptions[0]
    assert [part["after_epoch"] for part in resumptions] == [1, 2]
    assert [part["flags"]["nb_epochs"] for part in resumptions] == [2, 3]
    assert resumptions[0]["flags"]["skip_bad_images"] is True
    assert "--epochs 3" in resumptions[1]["command"]
    # what the checkpoint says of its flags is what holds now
    assert checkpoint.load(folder / "last.pth")["flags"]["nb_epochs"] == 3
    assert call("train.py", "--resume", folder, "--data-root", pictures).out.count("3 of 3 epochs are done") == 1


# Lock and leftovers ---------------------------------------------------------------------------------------------------


def test_a_run_is_locked_before_it_is_read(call, run_folder, monkeypatch):
    """What another process saves up to that moment counts."""
    pictures, folder = run_folder
    further = checkpoint.load(folder / "last.pth") | {"epoch": 2}
    lock = run.lock
    monkeypatch.setattr(run, "lock", lambda folder: (checkpoint.save(further, folder / "last.pth"), lock(folder))[1])
    assert "nothing left to do, 2 of 2" in call(*resume(folder, "--data-root", pictures)).out


def test_two_processes_cannot_work_in_one_run(call, refused, run_folder):
    pictures, folder = run_folder
    holder = apart.Apart(apart.hold_lock, folder)
    holder.wait_for("held")
    before = snapshot(folder)
    again = resume(folder, "--data-root", pictures)
    refused(*again, match=f"another process .*process {holder.process.pid}. is using this run")
    words = [*TINY, "--dataset", "folder", "--data-root", pictures, "--log-dir", folder.parents[1], "--run-num", 1]
    refused("train.py", *words, "--overwrite", match="another process .* is using this run")
    assert snapshot(folder) == before
    # a crash leaves no lock, and only our own leftovers are removed
    os.kill(holder.process.pid, signal.SIGKILL)
    holder.end()
    (folder / f".last.pth.abc{checkpoint.TEMPORARY}").write_text("half a checkpoint")
    kept = [folder / name for name in (".notes.tmp", ".last.pth.abc.tmp", "mine.hist-tmp", ".swp")]
    for path in kept:
        path.write_text("mine")
    assert call(*again).code == 0
    assert all(path.read_text() == "mine" for path in kept)
    assert not list(folder.glob(f".*{checkpoint.TEMPORARY}"))


def test_a_network_that_went_astray_is_said_to_have_diverged(call, refused, trained, tmp_path, monkeypatch):
    step, steps = torch.optim.Adam.step, itertools.count(1)

    def explode(self, *arguments, **options):
        step(self, *arguments, **options)
        if next(steps) == 3:
            torch.nn.init.constant_(self.param_groups[1]["params"][0], float("nan"))

    monkeypatch.setattr(torch.optim.Adam, "step", explode)
    words = [*TINY, "--dataset", "folder", "--data-root", trained[0], "--log-dir", tmp_path / "logs", "--warm", 0]
    match = r"training diverged in epoch 1/1: 24 of 24 embeddings hold NaN or Inf.*lr 0.001, .*lr_ds 0.1.*--lr-ds"
    refused("train.py", *words, "--epochs", 1, match=match)


def test_what_the_summary_advises(trained):
    row = {"phase": "train", "epoch": 1, "loss": 1.0, "R@1": 0.5, "lr": 1e-3, "images_per_s": 100, "seconds": 2.0}
    log = SimpleNamespace(folder=trained[1], best_path=trained[1] / "best.pth", doubt="", chance=lambda: None)
    log.args = SimpleNamespace(val_classes=0, dataset="cub", data_root=Path(), skip_bad_images=False)
    for share, percent, advised in ((0.05, "", False), (0.2, "20 %", False), (0.5, "50 %", True)):
        waiting = row | {"data_time": share}
        line = summary.console_line(waiting, 2)
        assert ("waiting for images" in line) == bool(percent) and percent in line
        log.history, log.best = [row, waiting], None
        assert ("50 % of the time: give it more --workers" in summary.summary(log, Path())) == advised
    for untrained, worse in ((0.9, True), (0.1, False)):
        log.history, log.best = [row | {"R@1": untrained}, row], row
        assert ("better than the best epoch: train longer" in summary.summary(log, Path())) == worse
