"""Weights from wherever they come: one reader for evaluate.py, retrieve.py and --weights, which runs nothing."""

import argparse
import json
import os
import shutil

import net
import numpy as np
import pytest
import safetensors.torch
import torch
from refused import Refused

NETWORK = ["--model", "resnet18", "--embedding-size", 16, "--image-size", 32]


@pytest.fixture(scope="module")
def best(trained):
    return trained[1] / "folder_resnet18_best.pth"


@pytest.fixture(scope="module")
def state(best):
    return torch.load(best, weights_only=True)["model_state_dict"]


def renamed(state, old, new):
    return {name.replace(old, new, 1): value for name, value in state.items()}


# What other programs make of a state dict, by the name of the file that it is saved in.
FORMS = {
    "published.pth": lambda state: {"model_state_dict": state},
    "bare.pth": lambda state: state,
    "trainer.pth": lambda state: {"epoch": 3, "data": "imagenet", "optimizer": {"state": {}}, "state_dict": state},
    "model.pt": lambda state: {"model": state},
    "nested.pth": lambda state: {"state_dict": {"model": state}},
    "parallel.pth": lambda state: {"state_dict": renamed(state, "", "module.")},
    "compiled.pth": lambda state: renamed(state, "", "_orig_mod."),
    "compiled_parallel.pth": lambda state: {"model": renamed(state, "", "module._orig_mod.")},
    "parallel_compiled.pth": lambda state: renamed(state, "", "_orig_mod.module."),
    "backbone_compiled.pth": lambda state: renamed(state, "model.", "model._orig_mod."),
    "backbone.pth": lambda state: renamed(state, "model.", ""),
    "backbone_parallel.pth": lambda state: renamed(state, "model.", "module."),
    "bare.safetensors": lambda state: state,
    "backbone.safetensors": lambda state: renamed(state, "model.", "_orig_mod.module."),
}


def save(content, path):
    safetensors.torch.save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def test_every_form_scores_the_same_to_the_bit(call, trained, best, state, tmp_path):
    def figures(path, *words):
        words = ["--model-path", path, *words, "--workers", 0, "--gpu-id", -1, "--json", tmp_path / "scores.json"]
        done = call("evaluate.py", *words, "--metrics", "all", "--save-embeddings", tmp_path / "e.npz")
        assert done.code == 0, done.err
        return json.loads((tmp_path / "scores.json").read_text())["figures"], np.load(tmp_path / "e.npz")["embeddings"]

    expected = figures(best)
    for name, make in FORMS.items():
        path = save(make(state), tmp_path / name)
        found = figures(path, *NETWORK, "--dataset", "folder", "--data-root", trained[0])
        assert found[0] == expected[0] and np.array_equal(found[1], expected[1]), name


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_a_beginning_for_training(state, tmp_path, name):
    network = net.build("resnet18", 16, save(FORMS[name](state), tmp_path / name))
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_retrieve_reads_them_too_and_knows_that_they_are_the_same(call, trained, best, state, tmp_path):
    gallery = shutil.copytree(trained[0] / "class 7", tmp_path / "gallery")
    bare = save(FORMS["backbone.safetensors"](state), tmp_path / "bare.safetensors")
    found = []
    for words in (["--model-path", best], ["--model-path", bare, *NETWORK]):
        words += ["--gallery", gallery, "--query", trained[0] / "class 6", "--output", tmp_path / "out"]
        outcome = call("retrieve.py", *words, "--workers", 0, "--gpu-id", -1)
        found.append((tmp_path / "out" / "neighbours.csv").read_bytes())
    assert found[0] == found[1] and "6 images, 6 of them from" in outcome.out


class Runs:
    """Makes a folder wherever it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def sparse(path, size=2**40):
    with open(path, "wb") as file:
        file.truncate(size)


REFUSED = {  # what a file holds, and what is said of it
    "code.pth": (
        lambda state, path: save({"model": state, "run": Runs(path.with_name("ran"))}, path),
        "more than .*mkdir",
    ),
    "config.pth": (
        lambda state, path: save({"state_dict": state, "args": argparse.Namespace(lr=0.1)}, path),
        r"argparse.Namespace.*save the state dict alone .*torch\.save\(network\.state_dict\(\), FILE\)",
    ),
    "twice.pth": (lambda state, path: save(state | {"module.model.fc.bias": torch.zeros(1)}, path), "weights twice"),
    "numbered.pth": (lambda state, path: save({0: torch.zeros(1)}, path), "no state dict"),
    "empty.pth": (lambda state, path: save({"model": {}}, path), "no state dict"),
    "other.pth": (
        lambda state, path: save({"model": {"fc.bias": torch.zeros(2)}}, path),
        "123 keys missing.* 1 of another",
    ),
    "cut.pth": (lambda state, path: os.truncate(save(state, path), 1_000_000), "damaged"),
    "cut.safetensors": (lambda state, path: os.truncate(save(state, path), 1_000_000), "damaged"),
    "header.safetensors": (lambda state, path: path.write_bytes(b"\xff" * 7 + b"\x0f{}"), "damaged"),
    "huge.pth": (lambda state, path: sparse(path), "damaged"),
    "huge.safetensors": (lambda state, path: sparse(path), "damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(refused, state, tmp_path, name):
    make, match = REFUSED[name]
    path = tmp_path / name
    make(state, path)
    refused("evaluate.py", "--model-path", path, *NETWORK, "--dataset", "cub", "--gpu-id", -1, match=match)
    with pytest.raises(Refused, match=name):
        net.build("resnet18", 8, path)
    assert list(tmp_path.iterdir()) == [path]
