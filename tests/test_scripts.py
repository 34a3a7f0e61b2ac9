"""Training and scoring as a user does it: the scripts' own command lines on tiny data."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import dataset
import net
import numpy as np
import pandas as pd
import pytest
import torch
import train
import trees
from conftest import BEST, MODEL, TINY

pytestmark = pytest.mark.usefixtures("undrawn")


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def test_train_then_evaluate_agree_to_the_last_digit(script, call, cub, tmp_path):
    words = [*TINY, "--dataset", "cub", "--data-root", cub, "--log-dir", tmp_path, "--workers", 2]
    trained = script("train.py", *words, cwd=Path(train.__file__).parent)  # scripts run from the code folder too
    assert trained.code == 0, trained.err
    run = tmp_path / "cub" / "run_1"
    assert not list(run.glob(".*"))  # neither its lock nor half-written files
    best = load(run / f"cub_{BEST}.pth")
    figures = tmp_path / "figures.json"
    # The line that the summary prints is the one that is run.
    line = next(line for line in trained.out.splitlines() if line.startswith("score"))
    words = shlex.split(line)[2:]
    assert words[0].endswith("evaluate.py")
    words[words.index("--model-path") + 1] = str(run / f"cub_{BEST}.pth")
    scored = call("evaluate.py", *words[1:], "--gpu-id", -1, "--json", figures)
    assert scored.code == 0, scored.err
    rows = pd.read_csv(run / "results.csv")
    row = rows[(rows["phase"] == "train") & (rows["epoch"] == best["epoch"])].iloc[0]
    again = json.loads(figures.read_text())["figures"]
    assert list(again) == [f"R@{k}" for k in (1, 2, 4, 8, 16, 32)]
    assert again == {name: row[name] for name in again} == best["figures"]
    # what the user is told
    assert "the paper's protocol" in trained.out
    assert re.search(r"best +epoch \d", trained.out) and re.search(r"last +epoch 2", trained.out)
    text = (run / f"cub_{BEST}_results.txt").read_text()
    assert f"R@1: {100 * again['R@1']:.4f}" in text
    # what made it
    made_by = json.loads((run / "args.json").read_text())["made_by"]
    assert (rows["seed"] == 1).all() and (rows["commit"] == made_by["commit"]).all()
    assert f"Commit: {made_by['commit']}" in text and f"Torchvision: {made_by['torchvision']}" in text
    assert (rows["torch"] == torch.__version__).all()
    said = json.loads(figures.read_text())
    assert said["trained_by"] == made_by and said["trained_with"]["seed"] == 1
    assert said["scored_by"]["torch"] == torch.__version__ and said["scored_with"]["image_size"] == 32


def test_published_format_both_ways_and_embeddings_scored_without_a_network(call, cub, tmp_path):
    """Our checkpoints have the published keys, and what the authors publish, a state dict and no more, is scored."""
    words = [*TINY, "--model", "resnet50", "--embedding-size", 512, "--epochs", 0, "--warm", 0]
    assert call("train.py", *words, "--dataset", "cub", "--data-root", cub, "--log-dir", tmp_path).code == 0
    keys = json.loads((Path(__file__).parent / "golden" / "resnet50_state_dict_keys.json").read_text())
    state = load(tmp_path / "cub" / "run_1" / "last.pth")["model_state_dict"]
    assert {name: list(value.shape) for name, value in state.items()} == keys
    published, saved = tmp_path / "cub_resnet50_best.pth", tmp_path / "e.npz"
    torch.save({"model_state_dict": state}, published)
    words = ["--dataset", "cub", "--data-root", cub, "--image-size", 64, "--workers", 0, "--gpu-id", -1]
    from_folder = call("evaluate.py", *words, "--model-path", tmp_path, "--metrics", "all")
    figures, said = [], []
    for source in (["--model-path", published, *words, "--save-embeddings", saved], ["--embeddings", saved]):
        done = call("evaluate.py", *source, "--metrics", "all", "--json", tmp_path / "f.json", "--gpu-id", -1)
        assert done.code == 0, done.err
        said.append(done.out)
        figures.append(json.loads((tmp_path / "f.json").read_text())["figures"])
    assert from_folder.code == 0 and set(from_folder.out.splitlines()) <= set(said[0].splitlines())
    assert figures[0] == figures[1] and {"R@1", "RP", "MAP@R", "NMI"} <= figures[0].keys()
    arrays, images = np.load(saved), dataset.load_benchmark("cub", cub).query
    assert arrays["embeddings"].shape == (len(images), 512)
    assert arrays["paths"].tolist() == images.paths and (arrays["labels"] == images.labels).all()
    shown = call("evaluate.py", "--embeddings", saved, "--metrics", "map", "--gpu-id", -1).out
    assert "MAP@R" in shown and "RP " not in shown


@pytest.mark.parametrize(
    "flags_given, affine_moves, statistics_move",
    [
        (["--warm", 1, "--bn-freeze", 1], True, False),  # un-freezing the backbone reaches BatchNorm's weights
        (["--warm", 0, "--bn-freeze", 1], False, False),
        (["--warm", 0, "--bn-freeze", 0], True, True),
    ],
)
def test_batchnorm_behaviour(call, cub, tmp_path, flags_given, affine_moves, statistics_move):
    options = [*TINY, "--model", "resnet18", "--epochs", 1, *flags_given, "--dataset", "cub", "--data-root", cub]
    outcome = call("train.py", *options, "--log-dir", tmp_path)
    assert outcome.code == 0, outcome.err
    state = load(tmp_path / "cub" / "run_1" / "last.pth")["model_state_dict"]
    norms = [name.removesuffix(".running_mean") for name in state if name.endswith("running_mean")]
    assert len(norms) == 20  # of ResNet-18
    for norm in norms:
        weight, mean = state[f"{norm}.weight"], state[f"{norm}.running_mean"]
        assert torch.equal(weight, torch.ones_like(weight)) != affine_moves, norm
        assert torch.equal(mean, torch.zeros_like(mean)) != statistics_move, norm
    assert all(torch.equal(state[f"{norm}.num_batches_tracked"] > 0, torch.tensor(statistics_move)) for norm in norms)


def test_warm_up_freezes_the_backbone_alone_and_the_schedule_counts_training_epochs(call, cub, tmp_path):
    words = "--warm 2 --epochs 0 --lr 1e-3 --lr-ds 1e-1 --lr-hgnn-factor 5 --lr-decay-step 2 --lr-decay-gamma 0.1"
    words = [*TINY, *words.split(), "--dataset", "cub", "--data-root", cub, "--log-dir", tmp_path]
    assert call("train.py", *words).code == 0
    torch.manual_seed(1)
    untrained = net.build(MODEL, 16, "none").state_dict()
    run = tmp_path / "cub" / "run_1"
    content = load(run / "last.pth")
    moved = {n for n, value in content["model_state_dict"].items() if not torch.equal(value, untrained[n])}
    assert moved == {"model.embedding.weight", "model.embedding.bias"}
    phases = [(row["phase"], row["epoch"]) for row in content["history"]]
    assert phases == [("untrained", -2), ("warm-up", -1), ("warm-up", 0)]
    assert not list(run.glob("*_best.pth"))  # a warm-up is no result
    assert call("train.py", "--resume", run, "--epochs", 5).code == 0
    rows = pd.read_csv(run / "results.csv")
    trained = rows[rows["phase"] != "untrained"]
    np.testing.assert_allclose(trained["lr"], [1e-3] * 4 + [1e-4] * 2 + [1e-5])
    np.testing.assert_allclose(trained["lr_embedding"], trained["lr"])
    np.testing.assert_allclose(trained["lr_ds"], 100 * trained["lr"])
    np.testing.assert_allclose(trained["lr_hgnn"], 5 * trained["lr"])
    np.testing.assert_allclose(trained["loss"], trained["dist_loss"] + trained["ce_loss"], rtol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "rmsprop"])
def test_optimiser_groups_come_in_a_fixed_order(name):
    args = train.flags.train_parser().parse(
        f"--optimizer {name} --lr 1e-4 --lr-ds 1e-2 --lr-hgnn-factor 5 --weight-decay 5e-5".split()
    )[0]
    network, criterion = net.build("resnet18", 8, "none"), train.HISTLoss(3, 8, 4)
    optimizer = train.make_optimizer(network, criterion, args)
    groups = optimizer.param_groups
    np.testing.assert_allclose([group["lr"] for group in groups], [1e-4, 1e-4, 1e-2, 5e-4])
    assert {group["weight_decay"] for group in groups} == {5e-5}
    names = {parameter: name for name, parameter in [*network.named_parameters(), *criterion.named_parameters()]}
    owners = [{names[parameter].split(".")[-2] for parameter in group["params"]} for group in groups[1:]]
    assert owners[0] == {"embedding"} and owners[1] == {"cds2hg"} and owners[2] == {"theta1", "bn1", "theta2"}
    assert sum(len(group["params"]) for group in groups) == len(names)
    expected = {"sgd": dict(momentum=0.9, nesterov=True), "rmsprop": dict(alpha=0.9, momentum=0.9)}.get(name, {})
    assert groups[0].items() >= expected.items()


def test_glyphs_are_made_on_first_use(tmp_path, monkeypatch):
    from layouts import glyphs

    made = []
    small = glyphs.ensure_glyphs(tmp_path, num_classes=8, images_per_class=4, size=8)
    monkeypatch.setattr(glyphs, "ensure_glyphs", made.append)
    trees.patch(monkeypatch, "glyphs", home=small.name)
    assert dataset.load_benchmark("glyphs", tmp_path).train.num_classes == 4 and made == [tmp_path]


@pytest.mark.parametrize("model", [MODEL, "bn_inception"])  # the latter wants other pixels: BGR, 0 to 255
def test_exported_network_gives_the_same_embeddings(call, tmp_path, model):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network = net.build(model, 16, "none").eval()
    torch.save({"model_state_dict": network.state_dict()}, tmp_path / "net.pth")
    words = ["--model", model, "--embedding-size", 16, "--image-size", 64, "--model-path", tmp_path / "net.pth"]
    exported = call("evaluate.py", *words, "--export", tmp_path / "net.onnx")
    assert exported.code == 0, exported.err
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = torch.randn(batch, 3, 64, 64)
        with torch.inference_mode():
            expected = network(images).numpy()
        found = session.run(["embeddings"], {"images": images.numpy()})[0]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    said = session.get_modelmeta().custom_metadata_map
    assert said["image_size"] == "64" and said["resize"].startswith("shorter side to 73 pixels")
    pixels = {MODEL: ("RGB", "0 to 1"), "bn_inception": ("BGR", "0 to 255")}
    assert (said["channels"], said["range"]) == pixels[model]
    assert json.loads(said["mean"]) == list(network.mean)


def test_an_export_that_lacks_its_packages_is_refused(refused, tmp_path, monkeypatch):
    torch.save({"model_state_dict": net.build(MODEL, 16, "none").state_dict()}, tmp_path / "net.pth")
    words = ["--model", MODEL, "--embedding-size", 16, "--model-path", tmp_path / "net.pth", "--export", "net.onnx"]
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused("evaluate.py", *words, match="pip install onnx onnxscript")


def test_own_pictures_are_found_again_where_they_were(call, cub, trained, tmp_path):
    pictures, folder = trained
    run = ["--model-path", folder, "--gpu-id", -1, "--workers", 0]
    assert f"data: folder in {pictures}" in call("evaluate.py", *run).out
    moved = shutil.copytree(pictures, tmp_path / "moved")
    assert f"data: folder in {moved}" in call("evaluate.py", *run, "--data-root", moved).out
    done = call("train.py", "--resume", shutil.copytree(folder, tmp_path / "run_1"), "--data-root", moved)
    assert done.code == 0 and "nothing left to do, 1 of 1 epochs are done" in done.out
    assert f"--gallery {moved} --query" in done.out
    # another data set is not looked for among them
    scored = call("evaluate.py", *run, "--dataset", "CUB", "--model", MODEL, "--data-root", cub)
    assert scored.code == 0 and "data: cub in " in scored.out, scored.err
    lost = call("evaluate.py", *run, "--dataset", "cub", "--model", MODEL)
    assert lost.code == 1 and str(pictures) not in lost.err
