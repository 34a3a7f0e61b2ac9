"""Losses to compare HIST with, from pytorch-metric-learning, under the very same conditions: train.py --loss NAME.

The arguments after the sizes in LOSSES are what --loss-args can set; their defaults are those of the paper, or of the
library where it says so. Parameters of losses train at --lr-ds. Losses without any need several images of a class in a
batch (--IPC).
"""

import inspect
import math

import torch
from pytorch_metric_learning import distances, losses, miners
from refused import Refused
from torch import Tensor, nn


class LibraryLoss(nn.Module):
    """A loss of the library, after its miner if it has one; in float32 at least, under autocast too."""

    def __init__(self, loss: nn.Module, miner: nn.Module | None = None):
        super().__init__()
        self.loss = loss
        self.miner = miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (N, D), labels (N,) integers, on any device -> scalar."""
        labels = labels.to(embeddings.device, non_blocking=labels.device.type == "cpu")  # from a GPU it waits
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            pairs = self.miner(embeddings, labels) if self.miner else None  # all there are
            return self.loss(embeddings, labels, pairs)


SQUARED = distances.LpDistance(power=2)  # of unit vectors

# For C classes and embeddings of size D a loss, or a loss and its miner
LOSSES = {
    # Kim et al., Proxy Anchor Loss for Deep Metric Learning, CVPR 2020
    "proxy_anchor": lambda C, D, margin=0.1, alpha=32.0: [losses.ProxyAnchorLoss(C, D, margin, alpha)],
    # Teh et al., ProxyNCA++, ECCV 2020: squared distances of unit vectors at temperature 1/9, all proxies below
    "proxy_nca": lambda C, D, softmax_scale=9.0: [losses.ProxyNCALoss(C, D, softmax_scale=softmax_scale)],
    # Qian et al., SoftTriple Loss, ICCV 2019, without its optional pull between the centres of a class
    "softtriple": lambda C, D, centers_per_class=10, la=20.0, gamma=0.1, margin=0.01: [
        losses.SoftTripleLoss(C, D, centers_per_class, la, gamma, margin)
    ],
    # Deng et al., ArcFace, CVPR 2019; margin in degrees, the paper's 0.5 radians
    "arcface": lambda C, D, margin=28.6, scale=64.0: [losses.ArcFaceLoss(C, D, margin, scale)],
    # Zhai and Wu, Classification is a Strong Baseline for Deep Metric Learning, BMVC 2019
    "normalized_softmax": lambda C, D, temperature=0.05: [losses.NormalizedSoftmaxLoss(C, D, temperature)],
    # Wang et al., Multi-Similarity Loss, CVPR 2019, with its miner (epsilon); base is that of the library
    "multi_similarity": lambda C, D, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1: [
        losses.MultiSimilarityLoss(alpha, beta, base),
        miners.MultiSimilarityMiner(epsilon),
    ],
    # Schroff et al., FaceNet, CVPR 2015: squared distances of unit vectors, semi-hard triplets
    "triplet": lambda C, D, margin=0.2: [
        losses.TripletMarginLoss(margin, distance=SQUARED),
        miners.TripletMarginMiner(margin, type_of_triplets="semihard", distance=SQUARED),
    ],
    # Hadsell et al., CVPR 2006, on unit vectors, distances not squared, as in the library
    "contrastive": lambda C, D, pos_margin=0.0, neg_margin=1.0: [losses.ContrastiveLoss(pos_margin, neg_margin)],
}


def build(name: str, num_classes: int, embedding_size: int, settings: str = "") -> LibraryLoss:
    """The loss of that name, one of flags.LOSSES; settings: 'margin=0.1,alpha=32', as --loss-args takes them.

    Raises Refused: a setting that the loss does not have, that is no number, or that it cannot work with.
    """
    make = LOSSES[name]
    known = {p.name: p.default for p in inspect.signature(make).parameters.values() if p.default is not p.empty}
    given = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = (part.strip() for part in setting.partition("="))
        if key not in known:
            raise Refused(f"--loss-args: {name} takes {', '.join(known)} (as in margin=0.1,alpha=32), not {setting!r}")
        try:
            given[key] = type(known[key])(value)
        except ValueError:
            kind = "a whole number" if isinstance(known[key], int) else "a number"
            raise Refused(f"--loss-args: {key} of {name} must be {kind}, got {value!r}") from None
        if not (0 < given[key] < math.inf or (given[key] == 0 and "margin" in key)):
            raise Refused(f"--loss-args: {key} of {name} must be finite and above 0, got {value}")
    return LibraryLoss(*make(num_classes, embedding_size, **given))
