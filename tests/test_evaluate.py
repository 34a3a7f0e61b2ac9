"""What evaluate.py measures, says that it measured, and refuses to measure."""

import json
import shutil

import net
import numpy as np
import pytest
import torch
from conftest import BEST, MODEL, TINY
from trees import make_cub, save


@pytest.fixture
def trained(trained):
    """The pictures and the best checkpoint of the run on them."""
    return trained[0], trained[1] / f"folder_{BEST}.pth"


@pytest.fixture
def pictures(trained, tmp_path):
    """A copy of those pictures, to change."""
    return shutil.copytree(trained[0], tmp_path / "mine")


@pytest.fixture
def published(tmp_path):
    """A checkpoint of nothing but weights."""
    path = tmp_path / f"cub_{BEST}.pth"
    torch.save({"model_state_dict": net.build(MODEL, 16, "none").state_dict()}, path)
    return path


def trained_on(pictures, checkpoint, folder):
    """A copy of the checkpoint in the folder, as if the pictures had lain there."""
    content = torch.load(checkpoint, weights_only=True)
    content["flags"]["data_root"] = str(pictures)
    torch.save(content, folder / checkpoint.name)
    return folder / checkpoint.name


def score(checkpoint, *words):
    return ["evaluate.py", "--model-path", checkpoint, "--gpu-id", -1, "--workers", 0, *words]


# Scores are of classes that were not trained on ----------------------------------------------------------------------


def test_classes_that_were_trained_on_are_not_scored(call, refused, trained, pictures, tmp_path):
    mine, checkpoint = trained
    assert call(*score(checkpoint)).code == 0
    refused(
        *score(checkpoint, "--train-classes", 0.1),
        match=r"trained on 3 of the 7 classes to score on \('class 1', .*\): --train-classes 0.1 instead of 0.5",
    )
    # a class that came since moves the boundary
    save(pictures / "a new class" / "0.png", 9, 0)
    save(pictures / "a new class" / "1.png", 9, 1)
    refused(
        *score(checkpoint, "--data-root", pictures), match=r"trained on 1 of the 5 classes .*'class 3'.*--data-root"
    )
    # another split of the same classes
    other = tmp_path / "other"
    for split, classes in (("train", (4, 5)), ("test", (2, 6, 7))):
        for c in classes:
            shutil.copytree(mine / f"class {c}", other / split / f"class {c}")
    refused(*score(checkpoint, "--data-root", other), match=r"trained on 1 of the 3 classes .*'class 2'")
    # classes that are others
    shutil.rmtree(other / "test" / "class 2")
    assert call(*score(checkpoint, "--data-root", other)).code == 0


def test_pictures_that_changed_in_place_are_noticed(call, refused, trained, pictures, tmp_path):
    checkpoint = trained_on(pictures, trained[1], tmp_path)
    save(pictures / "class 6" / "new.png", 6, 9)
    done = call(*score(checkpoint))
    assert (
        done.code == 0
        and "not the test images of the training run: images added, removed or replaced in 1 class" in done.err
    )
    save(pictures / "a class" / "0.png", 9, 0)
    save(pictures / "a class" / "1.png", 9, 1)
    refused(*score(checkpoint), match=r"'class 3'\): .*mine changed since")


def test_another_benchmark_is_scored(call, trained, tmp_path):
    make_cub(tmp_path)
    done = call(*score(trained[1], "--dataset", "CUB", "--data-root", tmp_path))
    assert done.code == 0 and "data: cub in " in done.out, done.err


def test_a_benchmark_cannot_come_back_as_a_folder(call, refused, tmp_path):
    make_cub(tmp_path)
    words = [*TINY, "--dataset", "cub", "--data-root", tmp_path, "--log-dir", tmp_path / "logs", "--warm", 0]
    assert call("train.py", *words, "--epochs", 1).code == 0
    images = tmp_path / "CUB_200_2011" / "images"
    run = tmp_path / "logs" / "cub" / "run_1" / f"cub_{BEST}.pth"
    refused(
        *score(run, "--dataset", "folder", "--data-root", images, "--train-classes", 0.25),
        match=r"trained on 2 of the 6 classes .*'003.Bird_3'.*--dataset folder",
    )


# Data that is not there, or not said ---------------------------------------------------------------------------------


def test_pictures_that_are_gone_are_asked_for(call, refused, trained, tmp_path):
    checkpoint = trained_on(tmp_path / "gone", trained[1], tmp_path)
    refused(*score(checkpoint), match=f"was trained on {tmp_path / 'gone'}, which is not there; give --data-root")
    assert call(*score(checkpoint, "--data-root", trained[0])).code == 0


def test_own_pictures_need_a_place(refused, published):
    words = ["--model", MODEL, "--embedding-size", 16, "--dataset", "folder"]
    refused(*score(published, *words), match="--dataset folder needs --data-root")


def test_a_checkpoint_that_says_nothing_needs_a_dataset(refused, call, published, tmp_path):
    words = ["--model", MODEL, "--embedding-size", 16, "--image-size", 32]
    refused(*score(published, *words), match="does not say what it was trained on: --dataset is needed")
    make_cub(tmp_path)
    assert call(*score(published, *words, "--dataset", "cub", "--data-root", tmp_path)).code == 0


def test_a_share_from_the_checkpoint_does_not_divide_what_is_divided(call, refused, trained, tmp_path):
    mine, _ = trained
    words = [*TINY, "--dataset", "folder", "--data-root", mine, "--log-dir", tmp_path / "logs", "--epochs", 1]
    assert call("train.py", *words, "--warm", 0, "--train-classes", 0.25).code == 0
    divided = tmp_path / "divided"
    for split, classes in (("train", (2, 3)), ("test", (4, 5, 6))):
        for c in classes:
            shutil.copytree(mine / f"class {c}", divided / split / f"class {c}")
    run = tmp_path / "logs" / "folder" / "run_1"
    done = call(*score(run, "--data-root", divided))
    assert done.code == 0 and "query 18 images of 3 classes" in done.out, done.err
    refused(*score(run, "--data-root", divided, "--train-classes", 0.25), match="split of its own")


# What a score says of itself -----------------------------------------------------------------------------------------


def test_a_score_says_what_it_was_measured_on(call, trained, tmp_path):
    mine, checkpoint = trained
    done = call(*score(checkpoint, "--json", tmp_path / "scores.json", "--image-size", 40))
    assert f"data: folder in {mine}, train 24 images of 4 classes, query 24 images of 4 classes" in done.out
    assert "images: 40 pixels" in done.out
    said = json.loads((tmp_path / "scores.json").read_text())
    assert said["dataset"] == "folder" and said["data_root"] == str(mine) and said["image_size"] == 40
    assert said["splits"] == {"train": {"images": 24, "classes": 4}, "query": {"images": 24, "classes": 4}}
    assert said["queries"] == 24 and "R@1" in said["figures"]


def write_embeddings(path, labels=None, **more):
    labels = np.arange(40) % 4 if labels is None else labels
    arrays = {"embeddings": np.random.RandomState(0).randn(len(labels), 8).astype(np.float32), "labels": labels}
    np.savez(path, **(arrays | more))
    return path


def test_embeddings_are_scored_at_the_k_of_their_data_set(call, tmp_path):
    path = write_embeddings(tmp_path / "e.npz")
    ks = {"SOP": (1, 10, 100, 1000), "Inshop": (1, 10, 20, 30, 40, 50), "cub": (1, 2, 4, 8, 16, 32)}
    for name, expected in ks.items():
        out = call("evaluate.py", "--embeddings", path, "--dataset", name, "--gpu-id", -1).out
        assert [line.split()[0] for line in out.splitlines() if line.startswith("R@")] == [f"R@{k}" for k in expected]
        assert f"data: {name} in {path}, query 40 images of 4 classes" in out
    with_ks = write_embeddings(tmp_path / "k.npz", ks=np.array([3, 5]))
    assert "R@3 " in call("evaluate.py", "--embeddings", with_ks, "--gpu-id", -1).out
    assert "data: unknown in" in call("evaluate.py", "--embeddings", with_ks, "--gpu-id", -1).out
    assert "R@1000" in call("evaluate.py", "--embeddings", with_ks, "--dataset", "sop", "--gpu-id", -1).out


def test_other_arrays_of_the_file_are_not_read(call, tmp_path):
    path = write_embeddings(tmp_path / "e.npz", names=np.array(["one", None], dtype=object))
    assert "R@1 " in call("evaluate.py", "--embeddings", path, "--gpu-id", -1).out


def test_a_file_of_another_data_set_is_said_to_be_one(call, tmp_path):
    path = write_embeddings(tmp_path / "e.npz", dataset=np.array("cub"))
    done = call("evaluate.py", "--embeddings", path, "--dataset", "SOP", "--gpu-id", -1)
    assert f"warning: {path} says that its embeddings are of cub; --dataset SOP only sets K" in done.err
    assert "data: cub in" in done.out and "R@1000" in done.out


def test_arrays_of_the_other_byte_order(call, tmp_path):
    plain = write_embeddings(tmp_path / "plain.npz")
    arrays = dict(np.load(plain))
    np.savez(
        tmp_path / "big.npz", **{name: array.astype(array.dtype.newbyteorder(">")) for name, array in arrays.items()}
    )
    figures = [
        [line for line in call("evaluate.py", "--embeddings", path, "--gpu-id", -1).out.splitlines() if "R@" in line]
        for path in (plain, tmp_path / "big.npz")
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 6


def test_embeddings_that_are_all_but_one_point_are_doubted(call, tmp_path):
    noise = np.random.RandomState(0).randn(40, 8).astype(np.float32)
    for scale, doubted in ((1e-4, True), (1e-1, False)):
        path = write_embeddings(tmp_path / "e.npz", embeddings=1 + scale * noise)
        done = call("evaluate.py", "--embeddings", path, "--gpu-id", -1)
        assert done.code == 0 and ("warning: all embeddings lie almost at one point" in done.err) == doubted


# Files that cannot be written are refused before the work ------------------------------------------------------------


@pytest.mark.parametrize("option", ["--json", "--save-embeddings", "--export", "--pictures"])
def test_what_cannot_be_written_is_refused_before_scoring(refused, call, trained, tmp_path, option, monkeypatch):
    import inference

    monkeypatch.setattr(inference, "load_network", lambda *a, **k: pytest.fail("the network was loaded"))
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "x", tmp_path / "nowhere" / "x"):
        if option == "--pictures" and "nowhere" in str(place):
            continue  # folders are made
        refused(*score(trained[1], option, place), match=f"{option} {place}: cannot be")
    wrong, match = (tmp_path / "file", "this is a file") if option == "--pictures" else (tmp_path, "this is a folder")
    refused(*score(trained[1], option, wrong), match=f"{option} {wrong}: {match}")


def test_a_runs_folder_needs_no_model_beside_its_data_set(call, trained):
    mine, checkpoint = trained
    assert call(*score(checkpoint.parent, "--dataset", "folder", "--data-root", mine)).code == 0  # not resnet50's


def test_a_folder_of_runs_lists_them(refused, trained):
    runs = trained[1].parents[1]
    refused(*score(runs), match=f"it holds the runs {trained[1].parent}: give one of them")
    refused(*score(runs.parent), match=f"it holds the runs {trained[1].parent}: give one of them")


@pytest.mark.parametrize("model, size", [("googlenet", 8), ("bn_inception", 8), ("timm:vit_tiny_patch16_224", 64)])
def test_images_that_a_network_cannot_take_are_refused(refused, trained, tmp_path, model, size):
    words = [*TINY, "--dataset", "folder", "--data-root", trained[0], "--log-dir", tmp_path / "logs"]
    line = refused("train.py", *words, "--model", model, "--image-size", size, match=f"--image-size {size}: {model}")
    assert "its own size is" in line and not (tmp_path / "logs").exists()


def test_features_that_are_lists_are_refused(refused, trained, tmp_path):
    words = [*TINY, "--dataset", "folder", "--data-root", trained[0], "--log-dir", tmp_path / "logs"]
    refused("train.py", *words, "--model", "timm:crossvit_9_240", "--image-size", 240, match="features are a list")
