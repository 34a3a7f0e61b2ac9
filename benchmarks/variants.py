"""train.py with HIST changed in one place: another distance, or another number of HGNN layers.

    python benchmarks/variants.py distance=cosine @recipes/glyphs.args
    python benchmarks/variants.py layers=3 @recipes/cub.args --seed 2
    python benchmarks/variants.py layers=3 --resume logs/variants/layers=3/cub/run_1

The first argument is the variant, the others are train.py's. The class in hist.py that HISTLoss is made of is replaced,
then train.py runs as it is, by default in logs/variants/VARIANT, so that report.py does not take it for the paper's
loss. Resume a variant as above, whatever the run's last line says: train.py itself refuses it.

The distances, between the unit vectors x of an embedding and m of a class mean:

    mahalanobis    sum_f (x_f - m_f)^2 / sigma_f^2, as in the paper
    euclidean      |x - m|^2: the variances stay at 1
    cosine         1 - x·m

|x - m|^2 = 2 - 2 x·m, so this cosine distance is half the Euclidean one: it is the Euclidean one with half of tau and
of alpha, and nothing else. The replication study does not say which forms it compared. Its 1.5 points between the two
are a matter of temperature if they were these, unless its Euclidean distance had its root taken, or its vectors not
normalised.
"""

import functools
import itertools
import shlex
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))
import flags  # noqa: E402
import hist  # noqa: E402
import train  # noqa: E402


class Euclidean(hist.CDs2Hg):
    """All variances fixed at 1."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        nn.init.zeros_(self.log_vars).requires_grad_(False)
        # A name in the checkpoint, so that nothing but this variant resumes from it.
        self.register_buffer(type(self).__name__, torch.ones(()))


class Cosine(Euclidean):
    def squared_distances(self, X: Tensor) -> Tensor:
        """1 - cosine of the rows of X (N, D), raw embeddings, to all class means (N, C)."""
        return 1 - F.normalize(X, dim=1) @ F.normalize(self.means, dim=1).T


class DeepHGNN(nn.Module):
    """n layers of theta and G, with BatchNorm and LeakyReLU between them; two of them are the paper's HGNN.

    Widths: D -> hidden, then hidden -> hidden, and at last hidden -> C; a single layer is D -> C.
    """

    def __init__(self, num_classes: int, embedding_size: int, hidden: int = 512, layers: int = 2):
        super().__init__()
        widths = [embedding_size, *[hidden] * (layers - 1), num_classes]
        self.thetas = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(layers - 1))
        self.lrelu = nn.LeakyReLU(0.1)

    def forward(self, X: Tensor, H: Tensor, W: Tensor | None = None) -> Tensor:
        """X (N, D) raw embeddings, incidence H (N, M), hyperedge weights W (M,) -> logits (N, C)."""
        G = hist.propagation(H, W)  # (N, N)
        for theta, norm in zip(self.thetas[:-1], self.norms, strict=True):
            X = self.lrelu(norm(G @ theta(X)))  # (N, hidden)
        return G @ self.thetas[-1](X)


def use(variant: str) -> None:
    """Let HISTLoss be made of the variant, 'distance=…' or 'layers=N'. Raises ValueError for an unknown one."""
    name, _, value = variant.partition("=")
    distances = {"mahalanobis": hist.CDs2Hg, "euclidean": Euclidean, "cosine": Cosine}
    if name == "distance" and value in distances:
        hist.CDs2Hg = distances[value]
    elif name == "layers" and value.isascii() and value.isdigit() and int(value) > 0:
        hist.HGNN = functools.partial(DeepHGNN, layers=int(value))
    else:
        raise ValueError(f"{variant!r} is no variant: give layers=N, or distance= one of {', '.join(distances)}, first")


def main() -> None:
    command = shlex.join(sys.argv)
    train.run.command = lambda: command  # what the run records
    variant = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    use(variant)
    if not flags.train_parser().parse()[0].resume:  # a path names the folder by itself
        sys.argv[1:1] = ["--log-dir", str(flags.CODE.parent / "logs" / "variants" / variant)]
    train.main()


if __name__ == "__main__":
    flags.run_script(main)
