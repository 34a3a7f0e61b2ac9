"""What evaluate.py measures, says that it measured, and refuses to measure."""

import json
import shutil

import net
import numpy as np
import pytest
import torch
from conftest import BEST, MODEL
from trees import save


@pytest.fixture
def trained(trained):
    """The pictures and the best checkpoint of the run on them."""
    return trained[0], trained[1] / f"folder_{BEST}.pth"


@pytest.fixture
def pictures(trained, tmp_path):
    """A copy of those pictures, to change."""
    return shutil.copytree(trained[0], tmp_path / "mine")


def trained_on(pictures, checkpoint, folder, **flags):
    """A copy of the checkpoint in the folder, as if the pictures had lain there."""
    content = torch.load(checkpoint, weights_only=True)
    content["flags"] |= {"data_root": str(pictures), **flags}
    torch.save(content, folder / checkpoint.name)
    return folder / checkpoint.name


def copy_classes(pictures, root, train, test):
    """Those classes under root/train and root/test."""
    for split, classes in (("train", train), ("test", test)):
        for c in classes:
            shutil.copytree(pictures / f"class {c}", root / split / f"class {c}")
    return root


def score(checkpoint, *words):
    return ["evaluate.py", "--model-path", checkpoint, "--gpu-id", -1, "--workers", 0, *words]


def test_classes_that_were_trained_on_are_not_scored(call, refused, trained, pictures, tmp_path):
    mine, checkpoint = trained
    assert call(*score(checkpoint)).code == 0
    refused(
        *score(checkpoint, "--train-classes", 0.1),
        match=r"trained on 3 of the 7 classes to score on \('class 1', .*\), .*--train-classes",
    )
    # a class that came since moves the boundary
    save(pictures / "a new class" / "0.png", 9, 0)
    save(pictures / "a new class" / "1.png", 9, 1)
    refused(
        *score(checkpoint, "--data-root", pictures), match=r"trained on 1 of the 5 classes .*'class 3'.*--data-root"
    )
    # another split of the same classes
    other = copy_classes(mine, tmp_path / "other", (4, 5), (2, 6, 7))
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
        and "not the test images of the training run: classes with images added, removed or replaced: 1" in done.err
    )
    save(pictures / "a class" / "0.png", 9, 0)
    save(pictures / "a class" / "1.png", 9, 1)
    refused(*score(checkpoint), match=r"'class 3'\), .*mine changed since")


def test_a_benchmark_cannot_come_back_as_a_folder(refused, cub, held_out):
    images = cub / "CUB_200_2011" / "images"
    refused(
        *score(held_out, "--dataset", "folder", "--data-root", images, "--train-classes", 0.25),
        match=r"trained on 2 of the 6 classes .*--dataset",
    )


def test_pictures_that_are_gone_are_asked_for(call, refused, trained, tmp_path):
    checkpoint = trained_on(tmp_path / "gone", trained[1], tmp_path)
    refused(*score(checkpoint), match=f"{tmp_path / 'gone'} is not there; --data-root names")
    assert call(*score(checkpoint, "--data-root", trained[0])).code == 0
    # and nothing that its flags say is run
    odd = trained_on(trained[0], trained[1], tmp_path, sz_embedding="__import__('os').abort()")
    refused(*score(odd), match="--embedding-size: must be a whole number")


def test_a_checkpoint_that_says_nothing_needs_a_dataset(refused, call, cub, tmp_path):
    published = tmp_path / "published.pth"
    torch.save({"model_state_dict": net.build(MODEL, 16, "none").state_dict()}, published)
    words = ["--model", MODEL, "--embedding-size", 16, "--image-size", 32]
    refused(*score(published, *words), match="does not say what it was trained on: --dataset is needed")
    refused(*score(published, *words, "--dataset", "folder"), match="--dataset folder needs --data-root")
    assert call(*score(published, *words, "--dataset", "cub", "--data-root", cub)).code == 0


def test_a_share_from_the_checkpoint_does_not_divide_what_is_divided(call, refused, trained, tmp_path):
    run = trained_on(trained[0], trained[1], tmp_path, train_classes=0.25)
    divided = copy_classes(trained[0], tmp_path / "divided", (2, 3), (4, 5, 6))
    done = call(*score(run, "--data-root", divided))
    assert done.code == 0 and "query 18 images of 3 classes" in done.out, done.err
    refused(*score(run, "--data-root", divided, "--train-classes", 0.25), match="split of its own")


def test_a_score_says_what_it_was_measured_on(call, trained, tmp_path):
    mine, checkpoint = trained
    done = call(*score(checkpoint, "--json", tmp_path / "scores.json", "--image-size", 40))
    assert f"data: folder in {mine}, train 24 images of 4 classes, query 24 images of 4 classes" in done.out
    assert "images: 40 pixels" in done.out
    said = json.loads((tmp_path / "scores.json").read_text())
    assert said["dataset"] == "folder" and said["data_root"] == str(mine) and said["image_size"] == 40
    assert said["splits"] == {"train": {"images": 24, "classes": 4}, "query": {"images": 24, "classes": 4}}
    assert said["queries"] == 24 and "R@1" in said["figures"]


def write_embeddings(path, **more):
    arrays = {"embeddings": np.random.RandomState(0).randn(40, 8).astype(np.float32), "labels": np.arange(40) % 4}
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
    # arrays of other names are not read
    unread = np.array(["one", None], dtype=object)
    other = write_embeddings(tmp_path / "o.npz", dataset=np.array("cub"), names=unread)
    out = call("evaluate.py", "--embeddings", other, "--dataset", "SOP", "--gpu-id", -1).out
    assert "data: cub in" in out and "R@1000" in out


def test_arrays_of_the_other_byte_order_and_embeddings_that_are_all_but_one_point(call, tmp_path):
    plain, other = write_embeddings(tmp_path / "plain.npz"), tmp_path / "other.npz"
    said = call("evaluate.py", "--embeddings", plain, "--gpu-id", -1)
    arrays = dict(np.load(plain))
    np.savez(other, **{name: array.astype(array.dtype.newbyteorder(">")) for name, array in arrays.items()})
    swapped = call("evaluate.py", "--embeddings", other, "--gpu-id", -1)
    assert swapped.out.replace("other.npz", "plain.npz") == said.out and said.out.count("R@") == 6
    for scale, doubted in ((1e-4, True), (1e-1, False)):
        write_embeddings(other, embeddings=1 + scale * arrays["embeddings"])
        done = call("evaluate.py", "--embeddings", other, "--gpu-id", -1)
        assert done.code == 0 and ("warning: all embeddings lie almost at one point" in done.err) == doubted


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


def test_a_runs_folder_needs_no_model_beside_its_data_set_and_a_folder_of_runs_lists_them(call, refused, trained):
    mine, run = trained[0], trained[1].parent
    assert call(*score(run, "--dataset", "folder", "--data-root", mine)).code == 0  # not resnet50's
    for folder in (run.parent, run.parents[1]):
        refused(*score(folder), match=f"the folder holds {run}/.*_best.pth")
