"""Weights from wherever they come: one reader for evaluate.py, retrieve.py and --weights, which runs nothing."""

import argparse
import os

import checkpoint
import net
import pytest
import safetensors.torch
import torch
from conftest import MODEL
from refused import Refused

NETWORK = ["--model", MODEL, "--embedding-size", 16, "--image-size", 32]


@pytest.fixture(scope="module")
def state():
    return net.build(MODEL, 16, "none").state_dict()


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


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read_as_the_network_that_it_holds(state, tmp_path, name):
    path = save(FORMS[name](state), tmp_path / name)
    for found in (checkpoint.network_state(checkpoint.load(path), path), net.build(MODEL, 16, path).state_dict()):
        assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


class Runs:
    """Makes a folder wherever it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def sparse(path, size=2**40):
    with open(path, "wb") as file:
        file.truncate(size)


ALONE = r"argparse.Namespace.*save the state dict alone .*torch\.save\(network\.state_dict\(\), FILE\)"
REFUSED = {  # what a file holds, and what is said of it
    "code.pth": (lambda state, path: save({"model": state, "run": Runs(path.parent / "ran")}, path), "than .*mkdir"),
    "config.pth": (lambda state, path: save({"state_dict": state, "args": argparse.Namespace(lr=0.1)}, path), ALONE),
    "twice.pth": (lambda state, path: save(state | renamed(state, "", "module."), path), "weights twice"),
    "numbered.pth": (lambda state, path: save({0: torch.zeros(1)}, path), "no state dict"),
    "empty.pth": (lambda state, path: save({"model": {}}, path), "no state dict"),
    "other.pth": (lambda state, path: save({"model": {"conv1.weight": torch.zeros(2)}}, path), "Missing key"),
    "cut.pth": (lambda state, path: cut(save(state, path)), "damaged"),
    "cut.safetensors": (lambda state, path: cut(save(state, path)), "damaged"),
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
        net.build(MODEL, 8, path)
    assert list(tmp_path.iterdir()) == [path]
