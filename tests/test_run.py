"""What a run knows of itself (code/run.py): its data, its lock, its files after a kill, its resumptions."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import apart
import checkpoint
import dataset
import distributed
import numpy as np
import pytest
import report
import run
import summary
import torch
from conftest import BEST, TINY
from scipy.io import loadmat, savemat
from trees import make_cars, save, write_annotations

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
    before = checkpoint.load(folder / f"folder_{BEST}.pth")
    remove_image(pictures)
    done = call(*resume(folder, "--data-root", pictures, "--allow-changed-images"))
    kept = folder / f"folder_{BEST}_until_epoch_1.pth"
    assert done.code == 0 and "warning: the data changed since the run began" in done.err
    assert f"epoch 1, the best before, is kept in {kept}" in done.err
    assert checkpoint.load(kept)["epoch"] == before["epoch"] == 1
    assert "Best epoch: 2" in (folder / f"folder_{BEST}_results.txt").read_text()
    assert stars == [2]
    said = json.loads((folder / "args.json").read_text())
    assert said["data"]["query"]["images"] == 23
    assert said["resumptions"][0]["after_epoch"] == 1
    assert said["resumptions"][0]["data_before"]["query"]["images"] == 24


def test_names_of_classes_are_for_the_eye(call, tmp_path):
    """Cars-196 has them in a file that may come later: the best epoch and its checkpoint stay."""
    home = make_cars(tmp_path, 2)
    words = [*TINY, "--dataset", "cars", "--data-root", tmp_path, "--log-dir", tmp_path, "--warm", 0, "--epochs", 1]
    assert call("train.py", *words).code == 0
    folder = tmp_path / "cars" / "run_1"
    state = checkpoint.load(folder / "last.pth")
    assert state["data"]["train"]["classes"] == ["1", "2", "3", "4"]
    checkpoint.save(state | {"best": state["best"] | {"R@1": 2.0}}, folder / "last.pth")
    before = (folder / f"cars_{BEST}.pth").read_bytes()
    savemat(home / "devkit" / "cars_meta.mat", {"class_names": np.array([f"Car {c}" for c in range(8)], dtype=object)})
    done = call(*resume(folder))
    assert done.code == 0 and "the data changed" not in done.err and "lost" not in done.err, done.err
    assert (folder / f"cars_{BEST}.pth").read_bytes() == before
    after = checkpoint.load(folder / "last.pth")
    assert after["best"]["epoch"] == 1 and after["data"]["train"]["classes"][0] == "Car 0"
    assert "data_before" not in json.loads((folder / "args.json").read_text())["resumptions"][0]
    scored = call("evaluate.py", "--model-path", folder, "--data-root", tmp_path, "--workers", 0)
    assert scored.code == 0 and "not the test images" not in scored.err
    # with another image there, too: names alone are not what differs
    (home / "cars_test" / "00009.jpg").rename(home / "cars_test" / "00099.jpg")
    cars = home / "cars_test_annos_withlabels.mat"
    rows = loadmat(cars, squeeze_me=True)["annotations"]
    files = ["00099.jpg" if row["fname"] == "00009.jpg" else row["fname"] for row in rows]
    write_annotations(cars, files, [int(row["class"]) for row in rows], "fname")
    found = dataset.load_benchmark("cars", tmp_path)
    changed = dataset.changes(state["data"]["train"], dataset.fingerprint(found.train))
    assert re.fullmatch(r"classes removed: 1 \('1'\); classes added: 1 \('Car 0'\)", changed)


def test_a_renamed_label_of_a_list_is_the_same_class(call, refused, run_folder, tmp_path):
    pictures, _ = run_folder
    rows = [f"{path.relative_to(pictures)},{path.parent.name}" for path in sorted(pictures.rglob("*.png"))]
    table = pictures / "list.csv"
    table.write_text("\n".join(["path,label", *rows]))
    words = [*TINY, "--dataset", "folder", "--data-root", table, "--log-dir", tmp_path, "--warm", 0, "--epochs", 1]
    assert call("train.py", *words).code == 0
    folder = tmp_path / "folder" / "run_2"
    table.write_text(table.read_text().replace(",class 3", ",class 3, again").replace(", again", " again"))
    done = call(*resume(folder))
    assert done.code == 0 and "the data changed" not in done.err
    assert checkpoint.load(folder / "last.pth")["data"]["train"]["classes"][3] == "class 3 again"
    table.write_text(table.read_text().replace(",class 3 again", ",a class"))  # the labels move
    refused(
        *resume(folder), "--allow-changed-images", "--epochs", 3, match="train: the same classes and images come in"
    )


def test_of_equally_good_epochs_the_first_stays_the_best(trained):
    log, saved = object.__new__(run.Run), []
    log.history, log.best, log.stamp, log.wandb, log.folder = [], None, {}, None, trained[1]
    log.args, log.state, log._save_best, log._write_texts = SimpleNamespace(nb_epochs=9), dict, saved.append, bool
    log._write_texts = lambda: None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *_: None)
        for epoch, score in enumerate((0.5, 0.5, 0.4, 0.6, 0.6), 1):
            log.add({"phase": "train", "epoch": epoch, "R@1": score, "seconds": 1.0})
    assert log.best["epoch"] == 4 and len(saved) == 2


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


def test_weights_that_give_nothing_finite_are_said_before_any_training(refused, trained, tmp_path):
    state = checkpoint.load(trained[1] / "last.pth")["model_state_dict"]
    torch.save({name: value * float("nan") for name, value in state.items()}, tmp_path / "nan.pth")
    words = [*TINY, "--dataset", "folder", "--data-root", trained[0], "--log-dir", tmp_path]
    match = "before any training, 24 of 24 embeddings hold NaN or Inf: look at the values in --weights .*nan.pth"
    refused("train.py", *words, "--weights", tmp_path / "nan.pth", match=match)
    assert list((tmp_path / "folder").iterdir()) == []


def test_what_the_summary_advises(trained):
    """Nothing that was given already, or cannot help."""
    row = {"phase": "train", "epoch": 1, "loss": 1.0, "R@1": 0.5, "lr": 1e-3, "images_per_s": 100, "seconds": 2.0}
    log = SimpleNamespace(folder=trained[1], best_path=trained[1] / "best.pth", doubt="", chance=lambda: None)

    def advised(history, best=None, doubt="", cores=4, chance=None, **flags):
        usual = dict(val_classes=0, dataset="cub", data_root=Path("mine"), skip_bad_images=False, nb_workers=1, ls=1.0)
        usual |= dict(weights="none", bn_freeze=1, lr=1e-3, lr_ds=0.1, lr_hgnn_factor=10.0)
        log.args, log.history, log.best, log.doubt = SimpleNamespace(**usual | flags), history, best, doubt
        log.chance = lambda: chance
        return summary.summary(log, Path(), cores)

    for share, percent in ((0.05, ""), (0.2, "20 %"), (0.5, "50 %")):
        waiting = row | {"data_time": share}
        line = summary.console_line(waiting, 2)
        assert ("waiting for images" in line) == bool(percent) and percent in line
        assert ("50 % of the time: give it more --workers (1 now, 4 cores)" in advised([row, waiting])) == (
            share == 0.5
        )
    assert advised([row, waiting], nb_workers=4).splitlines()[3].endswith("50 % of the time")
    own = advised([row, waiting], nb_workers=4, dataset="folder")
    assert "50 % of the time: shrink the pictures once (python " in own and "--output mine_512)" in own
    for untrained, worse in ((0.9, True), (0.1, False)):
        assert ("train longer" in advised([row | {"R@1": untrained}, row], row)) == worse
    assert "one point; train random weights with --bn-freeze 0" in advised([row], row, "one point")
    for flags in ({"weights": "imagenet"}, {"bn_freeze": 0}):
        assert "--bn-freeze" not in advised([row], row, "one point", **flags)
    flat = row | {"ce_loss": 4.6}
    assert "try a larger --alpha or a smaller --lr-ds" in advised([flat], flat, chance=4.6)
    assert "a smaller" not in advised([flat], flat, chance=4.6, lr_ds=0.0)
    assert "--lr-hgnn-factor, is 0" in advised([flat], flat, chance=4.6, lr_hgnn_factor=0.0)
    assert "did nothing" not in advised([flat], None, chance=4.6)  # warm-up alone


def test_a_run_of_torchrun_is_resumed_by_torchrun(trained, monkeypatch):
    log = SimpleNamespace(folder=trained[1], history=[{"phase": "train", "epoch": 3}])
    for count, here, words in ((1, 1, "python "), (2, 2, "torchrun --standalone --nproc-per-node=2 ")):
        monkeypatch.setattr(distributed, "processes", lambda count=count: distributed.Processes(0, count))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        assert f"Resume with: {words}" in summary.kept(log)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "first")
    words = "torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=first:29500 --nproc-per-node=1 "
    assert f"Resume with: {words}" in summary.kept(log)
