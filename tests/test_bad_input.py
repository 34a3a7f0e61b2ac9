"""Every mistake that a user of the scripts can make gets one line that names it, and a non-zero exit."""

import shutil

import numpy as np
import pytest
import torch
from conftest import TINY
from trees import make_cub, make_folder, make_sop


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Whole data sets and checkpoints, for each case to copy and break."""
    root = tmp_path_factory.mktemp("whole")
    make_cub(root)
    make_sop(root)
    make_folder(root / "own")
    torch.save([1, 2], root / "list.pth")
    torch.save({"model_state_dict": {"model.fc.weight": torch.zeros(3)}}, root / "other.pth")
    (root / "text.pth").write_text("not a checkpoint")
    (root / "empty.pth").touch()
    (root / "quote.args").write_text("--dataset cub\n--remark don't\n")
    np.savez(root / "nan.npz", embeddings=np.full((4, 3), np.nan, np.float32), labels=np.array([0, 0, 1, 1]))
    np.savez(root / "shapes.npz", embeddings=np.zeros((4, 3), np.float32), labels=np.array([0, 0, 1]))
    np.savez(root / "objects.npz", embeddings=np.array([{}], dtype=object), labels=np.array([0]))
    np.savez(root / "lonely.npz", embeddings=np.eye(3, dtype=np.float32), labels=np.arange(3))
    np.savez(root / "labels_text.npz", embeddings=np.ones((40, 8), np.float32), labels=np.array(["a", "b"] * 20))
    arrays = dict(embeddings=np.ones((40, 8), np.float32), labels=np.arange(40) % 4)
    np.savez(root / "half.npz", **arrays, gallery_labels=np.arange(4))
    np.savez(root / "ks.npz", **arrays, ks=np.array(["one", "two"]))
    np.savez(root / "int.npz", embeddings=np.ones((40, 8), int), labels=np.arange(40) % 4)
    make_folder(root / "classes", "classes", 4, 2, 8)
    (root / "void").mkdir()
    (root / "broken").mkdir()
    (root / "broken" / "x.jpg").write_bytes(b"x")
    (root / "runs" / "cub" / "run_1").mkdir(parents=True)
    return root


def cut_image(root):
    for victim in (root / "CUB_200_2011/images/001.Bird_1").glob("[!.]*.jpg"):
        victim.write_bytes(victim.read_bytes()[:200])


def add_a_lost_image(root):
    with open(root / "Stanford_Online_Products/Ebay_train.txt", "a") as file:
        file.write("9 1 1 chair_final/gone.JPG\n")


CUB, SOP = "--dataset cub --data-root {root}", "--dataset SOP --data-root {root}"
SEARCH = "--model-path {run} --gallery {root}/own/test"
FIND = SEARCH + " --query {root}/own/test"
VIT = "timm:vit_tiny_patch16_224"
CASES = [
    # script, flags, what is broken first, what the line must say
    ("train.py", "--dataset cub --data-root {root}/nowhere", None, r"nowhere"),
    ("train.py", "--dataset cub --data-root {root}/own", None, r"CUB_200_2011"),
    ("train.py", CUB + " --epochs 1 --workers 2", cut_image, r"001\.\S+\.jpg: cannot be decoded"),
    ("train.py", CUB + " --batch-size 1000", None, r"1,?000.*24"),
    ("train.py", CUB + " --IPC 3", None, r"IPC|images per class|images_per_class"),
    ("train.py", CUB + " --IPC 1", None, r"8 classes.*4|4.*classes"),
    ("train.py", CUB + " --batch-size 1", None, r"--batch-size: must be a whole number of at least 2, got '1'"),
    ("train.py", CUB + " --lr x", None, r"--lr: must be a number of at least 0, got 'x'"),
    ("train.py", CUB + " --tau 0", None, r"--tau: must be a number above 0"),
    ("train.py", CUB + " --val-classes 1", None, r"--val-classes: must be a number of at least 0 and below 1"),
    ("train.py", CUB + " --model googlenet --image-size 8", None, r"--image-size 8: googlenet.* its own size is"),
    ("train.py", CUB + " --model bn_inception --image-size 8", None, r"-size 8: bn_inception.* its own size is"),
    ("train.py", CUB + f" --model {VIT} --image-size 64", None, f"--image-size 64: {VIT}.* its own size is"),
    ("train.py", CUB + " --bn-freeze 2", None, r"--bn-freeze: must be 0 or 1"),
    ("train.py", CUB + " --optimizer lion", None, r"invalid choice: 'lion'"),
    ("train.py", CUB + " --gpu-id -2", None, r"--gpu-id"),
    ("train.py", CUB + " --allow-changed-images", None, r"requires --resume"),
    ("train.py", CUB + " --overwrite", None, r"--overwrite needs --run-num N"),
    ("train.py", CUB + " --epoch 3", None, r"unrecognized arguments"),  # abbreviations would change their meaning
    ("train.py", CUB + " --datset cub", None, r"unrecognized arguments: --datset cub"),
    ("train.py", "@recipe/cub.args", None, r"No such file or directory: 'recipe/cub\.args'"),
    ("train.py", CUB + " --loss hist --loss-args tau=3", None, r"--loss-args: hist has flags of its own"),
    ("train.py", CUB + " --loss proxy_anchor --loss-args tau=3", None, r"proxy_anchor takes margin, alpha.*'tau=3'"),
    ("train.py", CUB + " --loss proxy_anchor --loss-args margin", None, r"margin of proxy_anchor must be a n.*got ''"),
    ("train.py", CUB + " --loss softtriple --loss-args centers_per_class=2.5", None, r"must be a whole number.*'2\.5'"),
    ("train.py", CUB + " --loss softtriple --loss-args gamma=0", None, r"gamma of softtriple must be finite and above"),
    ("train.py", CUB + " --model resnet51", None, r"resnet51.*resnet50"),
    ("train.py", CUB + " --model bn_inception --weights imagenet", None, r"--weights FILE"),
    ("train.py", CUB + " --weights {root}/nowhere.pth", None, r"nowhere\.pth"),
    ("train.py", CUB + " --weights {root}/text.pth", None, r"text\.pth"),
    ("train.py", CUB + " --weights {root}/other.pth", None, r"other\.pth"),
    ("train.py", CUB + " --resume {root}/nowhere.pth", None, r"nowhere\.pth: there is no such checkpoint"),
    ("train.py", "--resume {run} --run-num 7", None, r"run_1: --run-num or --log-dir name another run: leave"),
    ("train.py", CUB + " --dataset flowers", None, r"invalid choice: 'flowers'"),
    ("train.py", CUB + " --log-dir {root}/text.pth", None, r"text\.pth"),
    ("train.py", "--dataset folder", None, r"--dataset folder needs --data-root"),
    ("train.py", "--dataset folder --data-root {root}/nowhere", None, r"nowhere"),
    ("train.py", SOP, add_a_lost_image, r"names 1 images that are not in .*: .*gone\.JPG"),
    ("evaluate.py", CUB, None, r"--model-path is needed"),
    ("evaluate.py", CUB + " --model-path {root}/nowhere.pth", None, r"nowhere\.pth: there is no such checkpoint"),
    ("evaluate.py", CUB + " --model-path {root}/own", None, r"cub_resnet50_best\.pth: there is no such checkpoint"),
    ("evaluate.py", CUB + " --model-path {root}/text.pth", None, r"text\.pth: not a checkpoint"),
    ("evaluate.py", CUB + " --model-path {root}/empty.pth", None, r"empty\.pth: not a checkpoint"),
    ("evaluate.py", CUB + " --model-path {root}/list.pth", None, r"holds a list"),
    ("evaluate.py", "--model-path {run} --embedding-size 512", None, r"trained with --embedding-size 16, .* 512"),
    ("evaluate.py", "--model-path {run} --layer-norm 0", None, r"trained with --layer-norm 1, .* 0"),
    ("evaluate.py", "--model-path {run} --model resnet50 --dataset folder", None, r"trained with --model timm:test_"),
    ("evaluate.py", "--embeddings {root}/nowhere.npz", None, r"nowhere\.npz"),
    ("evaluate.py", "--embeddings {root}/text.pth", None, r"text\.pth: no embeddings"),
    ("evaluate.py", "--embeddings {root}/objects.npz", None, r"objects\.npz: no embeddings"),
    ("evaluate.py", "--embeddings {root}/nan.npz", None, r"nan\.npz: .*4 of 4 embeddings hold NaN"),
    ("evaluate.py", "--embeddings {root}/shapes.npz", None, r"shapes\.npz: .*labels of shape \(4,\) expected"),
    ("evaluate.py", "--embeddings {root}/lonely.npz", None, r"none of the 3 queries"),
    ("evaluate.py", "--embeddings {root}/labels_text.npz", None, r"_text\.npz: .*labels whole numbers.*<U1"),
    ("evaluate.py", "--embeddings {root}/int.npz", None, r"int\.npz: .*embeddings must be float.* are int64"),
    ("evaluate.py", "--embeddings {root}/half.npz", None, r"half\.npz: no embeddings .*gallery_embeddings"),
    ("evaluate.py", "--embeddings {root}/ks.npz", None, r"ks\.npz: no embeddings that --save-embed"),
    ("evaluate.py", "--embeddings {root}/lonely.npz --model-path {run}", None, r"leave out --model"),
    ("evaluate.py", "--model-path {run} --export x.onnx --json x.json", None, r"--export scores noth.*--json"),
    ("retrieve.py", SEARCH, None, r"--query"),
    ("retrieve.py", SEARCH + " --query {root}/none.png", None, r"--query .*none\.png: there is no such image or fol"),
    ("retrieve.py", SEARCH + " --query {root}/text.pth", None, r"text\.pth: cannot be decoded"),
    ("retrieve.py", FIND + " --gallery {root}/none", None, r"none: there is no such folder"),
    ("retrieve.py", FIND + " --gallery {root}/void", None, r"void: the folder holds no image"),
    ("retrieve.py", FIND + " --gallery {root}/broken", None, r"none of its 1 images can be d"),
    ("retrieve.py", FIND + " --top-k 0", None, r"at least 1"),
    ("retrieve.py", FIND + " --model-path {root}/void", None, r"there is no such checkpoint"),
    ("retrieve.py", FIND + " --output {root}/own/test/out", None, r"--output .* lies in"),
    ("report.py", "{root}/none --output {root}/out", None, r"there is no such folder"),
    ("report.py", "{root}/runs/cub --output {root}/out", None, r"no finished run in .*cub$"),
    ("prepare.py", "check cub --data-root {root}/nowhere", None, r"nowhere"),
    ("prepare.py", "check birds", None, r"birds"),
    ("prepare.py", "check folder --data-root {root}/own --train-classes=1", None, r"must be .* above 0 and below 1"),
    ("prepare.py", "download cub --data-root {root}/own --url http://127.0.0.1:9/ä.tgz", None, r"9/ä\.tgz: .*ascii"),
    ("train.py", "@{root}/quote.args", None, r"a file of flags has the line \"--remark don't\": no closing quotation"),
    ("prepare.py", "download cub --data-root {root}/own --url http://127.0.0.1:9/a.tgz", None, r"127\.0\.0\.1:9"),
]


def params():
    """Those that train are slow, and so is the run that some of them need."""
    for number, case in enumerate(CASES):
        trains = "{run}" in case[1] or "--epochs 1" in case[1]
        yield pytest.param(*case, id=f"{case[0]} {case[1]} {number}", marks=[pytest.mark.slow] * trains)


@pytest.mark.parametrize("name, words, breaks, match", list(params()))
def test_one_line_and_nothing_lost(request, refused, tree, tmp_path, name, words, breaks, match):
    root = tree
    if breaks:
        root = tmp_path / "broken"
        shutil.copytree(tree, root)
        breaks(root)
    common = {
        "train.py": [*TINY, "--log-dir", tmp_path / "logs"],
        "evaluate.py": ["--gpu-id", "-1", "--workers", "0"],
        "retrieve.py": ["--gpu-id", "-1", "--workers", "0", "--output", tmp_path / "out"],
    }
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    run = request.getfixturevalue("trained")[1] if "{run}" in words else None
    refused(name, *common.get(name, []), *words.format(root=root, run=run).split(), match=match)
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert not (tmp_path / "out").exists()
    if "--epochs 1" not in words:  # those fail in the epoch
        assert not (tmp_path / "logs").exists()


def test_files_that_were_there_are_kept(refused, tree, tmp_path):
    (tmp_path / "old.json").write_text("kept")
    refused("evaluate.py", "--embeddings", tree / "nan.npz", "--json", tmp_path / "old.json", match="NaN")
    assert (tmp_path / "old.json").read_text() == "kept"
