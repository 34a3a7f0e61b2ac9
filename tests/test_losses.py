"""Other losses behind --loss: the library's own values, the same run around them, and HIST's own ablation."""

import flags
import pandas as pd
import pytest
import torch
import train
from conftest import options
from hist import HISTLoss
from pytorch_metric_learning import distances, miners
from pytorch_metric_learning import losses as library

N, D, C = 24, 16, 6

pytestmark = pytest.mark.usefixtures("undrawn")


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(N, D, generator=generator), torch.arange(N) % C


def made_by_script(words):
    """The criterion that train.py makes of a command line."""
    args = flags.train_parser().parse(["--embedding-size", str(D), *words])[0]
    torch.manual_seed(0)
    return train.make_criterion(C, args)


SQUARED = distances.LpDistance(power=2)
MINERS = {
    "multi_similarity": lambda: miners.MultiSimilarityMiner(0.1),
    "triplet": lambda: miners.TripletMarginMiner(0.2, "semihard", distance=SQUARED),
}
DIRECT = {  # what the library gives without us
    "proxy_anchor": lambda: library.ProxyAnchorLoss(C, D, margin=0.1, alpha=32),
    "proxy_nca": lambda: library.ProxyNCALoss(C, D, softmax_scale=9),
    "softtriple": lambda: library.SoftTripleLoss(C, D, 10, 20, 0.1, 0.01),
    "arcface": lambda: library.ArcFaceLoss(C, D, margin=28.6, scale=64),
    "normalized_softmax": lambda: library.NormalizedSoftmaxLoss(C, D, temperature=0.05),
    "multi_similarity": lambda: library.MultiSimilarityLoss(alpha=2, beta=50, base=0.5),
    "triplet": lambda: library.TripletMarginLoss(0.2, distance=SQUARED),
    "contrastive": lambda: library.ContrastiveLoss(0, 1),
}


@pytest.mark.parametrize("name", flags.LOSSES[1:])
def test_values_and_gradients_are_the_librarys_in_float32(name, batch):
    X, T = batch
    ours, theirs = X.clone().requires_grad_(), X.clone().requires_grad_()
    criterion = made_by_script(["--loss", name])
    value = criterion(ours, T)
    torch.manual_seed(0)
    mined = [MINERS[name]()(theirs, T)] if name in MINERS else []
    torch.manual_seed(0)
    expected = DIRECT[name]()(theirs, T, *mined)
    assert expected > 0
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        value = criterion(X.bfloat16(), T)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, criterion(X.bfloat16().float(), T), rtol=0, atol=0)


def test_settings_reach_the_loss(batch):
    criterion = made_by_script(["--loss", "proxy_anchor", "--loss-args", "margin=0.2, alpha=16"])
    assert (criterion.loss.margin, criterion.loss.alpha) == (0.2, 16.0)
    criterion = made_by_script(["--loss", "multi_similarity", "--loss-args=epsilon=0.3"])
    assert (criterion.miner.epsilon, criterion.loss.beta) == (0.3, 50.0)
    criterion = made_by_script(["--loss", "softtriple", "--loss-args=centers_per_class=2"])
    assert criterion.loss.fc.shape == (D, 2 * C)


@pytest.mark.slow
# Of each kind: with proxies, with a miner
@pytest.mark.parametrize("name", [pytest.param("hist", marks=pytest.mark.drawn), "proxy_anchor", "triplet"])
def test_every_kind_of_loss_trains_resumes_to_the_same_bits_and_scores(call, refused, cub, tmp_path, name):
    words = ["--loss", name, "--IPC", 4, "--lr-ds", 0.02, "--lr-decay-step", 1]
    assert call("train.py", *options(cub, tmp_path / "whole", *words)).code == 0
    assert call("train.py", *options(cub, tmp_path / "parts", *words, "--epochs", 1)).code == 0
    run = tmp_path / "parts" / "cub" / "run_1"
    last = run / "last.pth"
    another = "triplet" if name != "triplet" else "hist"
    refused("train.py", "--resume", last, "--loss", another, match=f"--loss {name}, not {another}: give")
    assert call("train.py", "--resume", last, "--epochs", 2).code == 0

    whole, parts = load(tmp_path / "whole" / "cub" / "run_1" / "last.pth"), load(last)
    for part in ("model_state_dict", "criterion_state_dict"):
        assert whole[part].keys() == parts[part].keys()
        assert all(torch.equal(whole[part][key], parts[part][key]) for key in whole[part])
    rows = pd.read_csv(last.with_name("results.csv"))
    trained = rows[rows["phase"] != "untrained"]
    assert (trained["loss"] > 0).all() and trained["loss"].nunique() == len(trained)
    assert ("ce_loss" in rows) == ("dist_loss" in rows) == ("lr_hgnn" in rows) == (name == "hist")
    if name != "triplet":  # what is learnt beside the network learns at a rate of its own
        assert rows["lr_ds"].dropna().tolist() == [0.02, 0.02, 0.01]
    drawn = {"curves.png", "embedding.png", "neighbours.png", "hypergraph.png"} if name == "hist" else set()
    assert {path.name for path in run.glob("*.png")} == drawn

    scored = call("evaluate.py", "--model-path", last, "--data-root", cub, "--workers", 0, "--gpu-id", -1)
    assert scored.code == 0 and f"R@1     {100 * rows['R@1'].iloc[-1]:.4f}" in scored.out


def test_without_lambda_the_hgnn_is_skipped(batch, monkeypatch):
    X, T = batch
    torch.manual_seed(0)
    with_it = HISTLoss(C, D, 8)
    torch.manual_seed(0)
    alone = HISTLoss(C, D, 8, ls=0)
    with_it(X, T)
    monkeypatch.setattr(alone.hgnn, "forward", None)  # calling it would fail
    X = X.clone().requires_grad_()
    loss = alone(X, T)
    assert loss == alone.dist_loss == with_it.dist_loss and alone.ce_loss is None
    loss.backward()
    assert X.grad.abs().sum() > 0 and all(p.grad is None for p in alone.hgnn.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, doubted",
    [
        ("contrastive --batch-size 2", True),
        ("triplet --batch-size 2", True),
        ("multi_similarity --batch-size 2", True),
        ("triplet --batch-size 12", False),
        ("triplet --batch-size 4 --IPC 2", False),
        ("arcface --batch-size 2", False),
    ],
)
def test_batches_without_positives_are_doubted(call, cub, tmp_path, words, doubted):
    name, *more = words.split()
    done = call("train.py", *options(cub, tmp_path, "--loss", name, "--epochs", 0, "--warm", 0, *more))
    warned = f"warning: --loss {name} compares images of one class" in done.err and "give --IPC 4" in done.err
    assert done.code == 0 and warned == doubted and warned == ("compares images" in done.err)
