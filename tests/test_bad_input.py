"""Every mistake that a user of the scripts can make gets one line that names it, and a non-zero exit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from trees import make_cars, make_cub, make_folder, make_inshop, make_sop


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Whole data sets and checkpoints, for each case to copy and break."""
    root = tmp_path_factory.mktemp("whole")
    make_cub(root)
    make_sop(root)
    make_cars(root)
    make_inshop(root)
    make_folder(root / "own")
    torch.save([1, 2], root / "list.pth")
    torch.save({"state_dict": {}}, root / "foreign.pth")
    torch.save({"model_state_dict": {"model.fc.weight": torch.zeros(3)}}, root / "other.pth")
    (root / "text.pth").write_text("not a checkpoint")
    (root / "empty.pth").touch()
    np.savez(root / "nan.npz", embeddings=np.full((4, 3), np.nan, np.float32), labels=np.array([0, 0, 1, 1]))
    np.savez(root / "shapes.npz", embeddings=np.zeros((4, 3), np.float32), labels=np.array([0, 0, 1]))
    np.savez(root / "keys.npz", x=np.zeros(3))
    np.savez(root / "objects.npz", embeddings=np.array([{}], dtype=object), labels=np.array([0]))
    np.savez(root / "lonely.npz", embeddings=np.eye(3, dtype=np.float32), labels=np.arange(3))
    return root


def cub_images(root):
    return root / "CUB_200_2011" / "images"


def first_class(root):
    return sorted(path for path in cub_images(root).iterdir() if path.is_dir())[0]


def empty_class(root):
    for path in first_class(root).iterdir():
        path.unlink()


def cut_image(root):
    for victim in first_class(root).glob("[!.]*.jpg"):
        victim.write_bytes(victim.read_bytes()[:200])


def text_as_image(root):
    next(first_class(root).glob("[!.]*.jpg")).write_text("this is no picture")


def no_class_number(root):
    (cub_images(root) / "Cardinal").mkdir()
    Image.new("RGB", (8, 8)).save(cub_images(root) / "Cardinal" / "a.jpg")


def number_too_high(root):
    first_class(root).rename(cub_images(root) / "999.Dodo")


def sop_list(change):
    def breaks(root):
        path = root / "Stanford_Online_Products" / "Ebay_train.txt"
        path.write_text(change(path.read_text()))

    return breaks


def remove(*parts):
    def breaks(root):
        path = root.joinpath(*parts)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return breaks


def inshop_list(change):
    def breaks(root):
        path = root / "Inshop_Clothes" / "Eval" / "list_eval_partition.txt"
        path.write_text(change(path.read_text()))

    return breaks


CUB, SOP = "--dataset cub --data-root {root}", "--dataset SOP --data-root {root}"
INSHOP, CARS = "--dataset Inshop --data-root {root}", "--dataset cars --data-root {root}"
CHECK = "check cub --data-root {root}"

CASES = [
    # script, flags, what is broken first, what the line must say
    ("train.py", "--dataset cub --data-root {root}/nowhere", None, r"nowhere"),
    ("train.py", "--dataset cub --data-root {root}/own", None, r"CUB_200_2011"),
    ("train.py", CUB, remove("CUB_200_2011", "images"), r"CUB_200_2011"),
    ("train.py", CUB, empty_class, r"001\.\S+"),
    ("train.py", CUB + " --epochs 1", cut_image, r"001\.\S+\.jpg: cannot be decoded"),
    ("train.py", CUB + " --epochs 1", text_as_image, r"\.jpg: cannot be decoded"),
    ("train.py", CUB, no_class_number, r"Cardinal"),
    ("train.py", CUB, number_too_high, r"999\.Dodo: class 999, they go from 1 to 200"),
    ("train.py", CUB + " --batch-size 1000", None, r"1,?000.*24"),
    ("train.py", CUB + " --IPC 3", None, r"IPC|images per class|images_per_class"),
    ("train.py", CUB + " --IPC 1", None, r"8 classes.*4|4.*classes"),
    ("train.py", CUB + " --batch-size 1", None, r"at least 2"),
    ("train.py", CUB + " --model resnet51", None, r"resnet51.*resnet50"),
    ("train.py", CUB + " --model bn_inception --weights imagenet", None, r"--weights FILE"),
    ("train.py", CUB + " --weights {root}/nowhere.pth", None, r"nowhere\.pth"),
    ("train.py", CUB + " --weights {root}/text.pth", None, r"text\.pth"),
    ("train.py", CUB + " --weights {root}/other.pth", None, r"other\.pth"),
    ("train.py", CUB + " --resume {root}/nowhere.pth", None, r"nowhere\.pth: there is no such checkpoint"),
    ("train.py", CUB + " --resume {root}/other.pth", None, r"cannot be resumed from"),
    ("train.py", CUB + " --resume {root}/text.pth", None, r"this is no checkpoint"),
    ("train.py", CUB + " --dataset flowers", None, r"invalid choice: 'flowers'"),
    ("train.py", CUB + " --learning-rate 3", None, r"unrecognized arguments: --learning-rate"),
    ("train.py", CUB + " --log-dir {root}/text.pth", None, r"text\.pth"),
    ("train.py", "--dataset folder --data-root {root}/nowhere", None, r"nowhere"),
    ("train.py", "--dataset folder --data-root {root}/own/train/none", None, r"none"),
    ("train.py", SOP, remove("Stanford_Online_Products", "Ebay_train.txt"), r"Ebay_train\.txt"),
    ("train.py", SOP, sop_list(lambda text: ""), r"Ebay_train\.txt"),
    ("train.py", SOP, sop_list(lambda text: text + "9 x 1 a.JPG\n"), r"Ebay_train\.txt.*line \d+|Ebay_train\.txt:\d+"),
    ("train.py", SOP, sop_list(lambda text: text + "9 1 1 ../../etc/a.JPG\n"), r"Ebay_train\.txt"),
    ("train.py", SOP, sop_list(lambda text: text + "9 99999999 1 a.JPG\n"), r"99,?999,?999"),
    ("train.py", SOP, sop_list(lambda text: text + "9 1 1 chair_final/gone.JPG\n"), r"gone\.JPG"),
    ("train.py", CARS, remove("cars196", "cars_annos.mat"), r"cars196"),
    ("train.py", INSHOP, remove("Inshop_Clothes", "Eval", "list_eval_partition.txt"), r"list_eval_partition\.txt"),
    ("train.py", INSHOP, inshop_list(lambda text: text.replace(" train", " trian")), r"list_eval_partition\.txt"),
    ("evaluate.py", CUB, None, r"--model-path is needed"),
    ("evaluate.py", CUB + " --model-path {root}/nowhere.pth", None, r"nowhere\.pth: there is no such checkpoint"),
    ("evaluate.py", CUB + " --model-path {root}/own", None, r"cub_resnet50_best\.pth: there is no such checkpoint"),
    ("evaluate.py", CUB + " --model-path {root}/text.pth", None, r"text\.pth: this is no checkpoint"),
    ("evaluate.py", CUB + " --model-path {root}/empty.pth", None, r"empty\.pth: this is no checkpoint"),
    ("evaluate.py", CUB + " --model-path {root}/list.pth", None, r"holds a list"),
    ("evaluate.py", CUB + " --model-path {root}/foreign.pth", None, r"no 'model_state_dict'"),
    ("evaluate.py", CUB + " --model-path {root}/other.pth", None, r"other\.pth does not fit resnet50"),
    ("evaluate.py", "--embeddings {root}/nowhere.npz", None, r"nowhere\.npz"),
    ("evaluate.py", "--embeddings {root}/text.pth", None, r"text\.pth: no embeddings"),
    ("evaluate.py", "--embeddings {root}/keys.npz", None, r"keys\.npz: no embeddings"),
    ("evaluate.py", "--embeddings {root}/objects.npz", None, r"objects\.npz: no embeddings"),
    ("evaluate.py", "--embeddings {root}/nan.npz", None, r"4 of 4 embeddings hold NaN or Inf"),
    ("evaluate.py", "--embeddings {root}/shapes.npz", None, r"embeddings \(N, D\) and labels \(N,\) expected"),
    ("evaluate.py", "--embeddings {root}/lonely.npz", None, r"none of the 3 queries"),
    ("evaluate.py", CUB + " --metrics speed", None, r"invalid choice: 'speed'"),
    ("prepare.py", "check cub --data-root {root}/nowhere", None, r"nowhere"),
    ("prepare.py", "check birds", None, r"birds"),
    ("prepare.py", "show cub --data-root {root}/nowhere", None, r"nowhere"),
    ("prepare.py", "download cub --data-root {root}/own --url http://127.0.0.1:9/a.tgz", None, r"127\.0\.0\.1:9"),
]


@pytest.mark.parametrize("name, words, breaks, match", CASES, ids=[f"{c[0]} {c[1]} {n}" for n, c in enumerate(CASES)])
def test_one_line_and_nothing_lost(call, refused, tree, tmp_path, name, words, breaks, match):
    root = tree
    if breaks:
        root = tmp_path / "broken"
        shutil.copytree(tree, root)
        breaks(root)
    common = {"train.py": [*TINY, "--log-dir", tmp_path / "logs"], "evaluate.py": ["--gpu-id", "-1", "--workers", "0"]}
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    refused(name, *common.get(name, []), *words.format(root=root).split(), match=match)
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_a_run_that_never_began_leaves_no_folder(call, tree, tmp_path):
    assert call("train.py", *TINY, "--log-dir", tmp_path, *CUB.format(root=tree).split(), "--IPC", 3).code == 1
    assert not list(tmp_path.rglob("run_*"))


def test_json_is_whole_or_not_there(refused, tree, tmp_path):
    Path(tmp_path / "old.json").write_text(json.dumps({"kept": True}))
    refused("evaluate.py", "--embeddings", tree / "nan.npz", "--json", tmp_path / "old.json", match="NaN")
    assert json.loads((tmp_path / "old.json").read_text()) == {"kept": True}
