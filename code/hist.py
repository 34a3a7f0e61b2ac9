"""HIST loss: Hypergraph-Induced Semantic Tuplet loss for deep metric learning.

J. Lim, S. Yun, S. Park, J. Y. Choi, CVPR 2022, pp. 212-222, doi 10.1109/CVPR52688.2022.00031.

This file only needs torch: copy it into any project and use it like any other metric-learning loss:

    criterion = HISTLoss(num_classes=100, embedding_size=512)      # has parameters: give them to an optimiser too
    loss = criterion(embeddings, labels)                           # (N, D) float, (N,) int64 -> scalar

Sizes: N batch, D embedding size, C training classes, E <= C classes present in the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SquaredMahalanobis(torch.autograd.Function):
    """d^2(i, c) = sum_f (x_if - m_cf)^2 / sigma^2_cf with x = X / |X|, m = mu / |mu| and sigma^2 = exp(relu6(s)).

    With the square expanded, and p = 1 / sigma^2, the (N, C, D) tensor of the textbook form becomes two matrix
    products and a constant per class:

        d^2(i, c) = sum_f x_if^2 p_cf  -  2/|mu_c| sum_f x_if p_cf mu_cf  +  1/|mu_c|^2 sum_f p_cf mu_cf^2

    With many classes the time goes into reading and writing (C, D) tensors, with few into launching GPU kernels.
    The backward pass is written out because it needs half as many of either as autograd would.
    """

    @staticmethod
    def forward(ctx, X: Tensor, means: Tensor, log_vars: Tensor) -> Tensor:
        """X (N, D) of any length, means and log_vars (C, D) -> (N, C)."""
        length = torch.linalg.vector_norm(X, dim=1, keepdim=True).clamp_(min=1e-12)  # |X| (N, 1)
        x = X / length  # (N, D)
        p = log_vars.clamp(0, 6).neg_().exp_()  # (C, D)
        p_means = p * means  # (C, D)
        scale = torch.linalg.vector_norm(means, dim=1).clamp_(min=1e-12).reciprocal_()  # 1/|mu| (C,)
        squares, scale_squared = x * x, scale * scale  # (N, D), (C,)
        constants = torch.linalg.vecdot(p_means, means) * scale_squared  # (C,)
        ctx.save_for_backward(x, length, means, log_vars, p, p_means, scale, squares, scale_squared)
        return torch.addmm(constants, squares, p.T).addcmul_(x @ p_means.T, scale, value=-2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """grad (N, C), called g below -> gradients of X (N, D), means (C, D), log_vars (C, D)."""
        x, length, means, log_vars, p, p_means, scale, squares, scale_squared = ctx.saved_tensors
        scaled = grad * scale  # (N, C)
        # by x: 2 (x (g p) - (g / |mu|) p mu); by X: less what would only change the length of X, over |X|
        grad_X = (x * (grad @ p)).addmm_(scaled, p_means, beta=2, alpha=-2)
        along = torch.linalg.vecdot(grad_X, x)  # (N,)
        grad_X.addcmul_(along[:, None], x, value=-1).div_(length)
        # u = the derivative by m, without its factor p, over |mu|: 2 (weight mu - g^T x / |mu|)
        weight = (grad.sum(dim=0) * scale_squared)[:, None]  # sum_i g_ic / |mu_c|^2 (C, 1)
        u = (weight * means).addmm_(scaled.T, x, beta=2, alpha=-2)
        # by mu: p u, less what would only change the length of mu
        grad_means = p * u
        along = torch.linalg.vecdot(grad_means, means) * scale_squared  # (C,)
        grad_means.addcmul_(along[:, None], means, value=-1)
        # by p: g^T x^2 + mu (u - weight mu); by s: times dp/ds = -p where 0 < s < 6, nothing elsewhere
        u.addcmul_(weight, means, value=-1).mul_(means).addmm_(grad.T, squares, beta=-1, alpha=-1).mul_(p)
        return grad_X, grad_means, torch.ops.aten.hardtanh_backward(u, log_vars, 0, 6)


class CDs2Hg(nn.Module):
    """Class distributions to hypergraph (paper, sections 3.2 and 3.3).

    Every class c is a Gaussian with a learned mean mu_c and a learned diagonal covariance
    sigma_c^2 = exp(relu6(s_c)): at least 1, and entries of s below 0 receive no gradient. Arguments: see HISTLoss.
    """

    def __init__(self, num_classes: int, embedding_size: int, tau: float = 32.0, alpha: float = 0.9):
        super().__init__()
        self.tau = tau
        self.alpha = alpha
        self.means = nn.Parameter(torch.empty(num_classes, embedding_size))  # mu (C, D)
        self.log_vars = nn.Parameter(torch.empty(num_classes, embedding_size))  # s (C, D)
        nn.init.kaiming_normal_(self.means, mode="fan_out")
        nn.init.kaiming_normal_(self.log_vars, mode="fan_out")

    def squared_distances(self, X: Tensor) -> Tensor:
        """Squared Mahalanobis distances of the unit vectors of X (N, D), raw embeddings, to all classes (N, C)."""
        return SquaredMahalanobis.apply(X, self.means, self.log_vars)

    def distribution_loss(self, distances: Tensor, T: Tensor) -> Tensor:
        """L_D = mean_i -log softmax_c(-tau d^2(i, c)) at c = y_i; distances (N, C), T (N,) -> scalar."""
        return F.cross_entropy(-self.tau * distances, T)

    def incidence(self, distances: Tensor, columns: Tensor, member: Tensor) -> Tensor:
        """H_ij = 1 if y_i = c_j, else exp(-alpha d^2(i, c_j)), for the classes c_j named by columns.

        distances (N, C), columns (M,), member (N, M): where y_i = c_j -> H (N, M). Gradient flows into X, means and
        log_vars.
        """
        # Rounding can leave a distance a hair below 0, which would lift a membership above 1.
        reach = torch.exp(-self.alpha * F.relu(distances.index_select(1, columns)))  # (N, M)
        return reach.masked_fill(member, 1.0)

    def forward(self, X: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
        """X (N, D) raw embeddings, T (N,) labels -> (L_D, H (N, E)), columns in ascending order of class.

        The width E depends on the labels, which costs a device synchronisation; HISTLoss avoids it.
        """
        with torch.autocast(X.device.type, enabled=False):
            T = T.to(torch.int64)
            distances = self.squared_distances(X.to(self.means.dtype))
            classes = torch.unique(T)  # (E,)
            H = self.incidence(distances, classes, T[:, None] == classes)
            return self.distribution_loss(distances, T), H


def propagation(H: Tensor, W: Tensor | None = None) -> Tensor:
    """G = Dv^-1/2 H W De^-1 H^T Dv^-1/2 (paper, section 3.4).

    Incidence H (N, M), hyperedge weights W (M,), ones if not given -> (N, N).
    Dv holds the weighted row sums of H, De its column sums; these diagonal matrices are not formed.
    """
    degrees = H.sum(dim=1) if W is None else H @ W  # Dv (N,)
    scaled = H * degrees.rsqrt()[:, None]  # Dv^-1/2 H (N, M)
    sizes = H.sum(dim=0)  # De (M,)
    return scaled * (1 / sizes if W is None else W / sizes) @ scaled.T


class HGNN(nn.Module):
    """Two-layer hypergraph network that classifies the samples of a batch (paper, section 3.4).

    Z = G theta2( LeakyReLU_0.1( BatchNorm( G theta1(X) ) ) ), on the raw embeddings X.
    Its BatchNorm always uses batch statistics while training; it is never frozen. hidden: width of the hidden layer.
    """

    def __init__(self, num_classes: int, embedding_size: int, hidden: int = 512):
        super().__init__()
        self.theta1 = nn.Linear(embedding_size, hidden)
        self.bn1 = nn.BatchNorm1d(hidden)
        self.lrelu = nn.LeakyReLU(0.1)
        self.theta2 = nn.Linear(hidden, num_classes)

    def forward(self, X: Tensor, H: Tensor, W: Tensor | None = None) -> Tensor:
        """X (N, D) raw embeddings, incidence H (N, M), hyperedge weights W (M,) -> logits (N, C)."""
        with torch.autocast(X.device.type, enabled=False):
            X, H, W = (None if x is None else x.to(self.theta1.weight.dtype) for x in (X, H, W))
            G = propagation(H, W)  # (N, N)
            hidden = G @ self.theta1(X)  # (N, hidden)
            return G @ self.theta2(self.lrelu(self.bn1(hidden)))


class HISTLoss(nn.Module):
    """L = L_D + lambda_s L_CE: the distribution loss and the cross-entropy of the HGNN (paper, eq. 11).

    Args:
        num_classes: C, labels lie in [0, C).
        embedding_size: D.
        hgnn_hidden: width of the HGNN's hidden layer.
        tau: temperature of the distribution loss, a softmax over distances.
        alpha: how fast membership in a hyperedge decays with the distance to its class.
        ls: lambda_s, weight of the HGNN's cross-entropy. With 0 there is only the distribution loss: the HGNN is
            neither computed nor trained.

    Raises ValueError for sizes below 1, tau not above 0, alpha or ls below 0.

    Computes in the precision of its parameters (float32), under autocast too. After a call `dist_loss` and
    `ce_loss` hold the two terms as detached scalars on the device: nothing waits for them until they are read.
    With ls = 0 `ce_loss` is None.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        hgnn_hidden: int = 512,
        tau: float = 32.0,
        alpha: float = 0.9,
        ls: float = 1.0,
    ):
        super().__init__()
        sizes, inf = (num_classes, embedding_size, hgnn_hidden), float("inf")
        if min(sizes) < 1 or not (0 < tau < inf and 0 <= alpha < inf and 0 <= ls < inf):
            raise ValueError(
                "HISTLoss: num_classes, embedding_size and hgnn_hidden must be at least 1, tau above 0, alpha and ls "
                f"at least 0, and all finite, got {sizes}, {tau}, {alpha} and {ls}"
            )
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.ls = ls
        self.cds2hg = CDs2Hg(num_classes, embedding_size, tau, alpha)
        self.hgnn = HGNN(num_classes, embedding_size, hgnn_hidden).requires_grad_(ls != 0)
        self.dist_loss: Tensor | None = None
        self.ce_loss: Tensor | None = None
        self._hypergraph: list[Tensor] = []  # of the last call: H (N, N), and which samples are of one class
        self._label_range: tuple[Tensor, torch.cuda.Event] | None = None

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: None = None) -> Tensor:
        """Embeddings (N, D) raw, as the network emits them; labels (N,) integers in [0, C) -> scalar loss.

        Labels may stay on the CPU while the embeddings are on a GPU: they are moved. indices_tuple is there for
        the trainers of pytorch-metric-learning, which pass what their miner found, None without a miner.

        Raises:
            ValueError: wrong shapes, labels that are no integers or out of range, a miner's choice (the hypergraph
                is of the whole batch), or a single sample while training (the HGNN's BatchNorm needs two). Labels
                that already lie on a GPU are checked without waiting for the device: an impossible one is reported
                by the next call.
        """
        if indices_tuple is not None:
            raise ValueError("HISTLoss: the hypergraph is made of the whole batch, it takes no miner's indices_tuple")
        self._check(embeddings, labels)
        # Not waiting is safe towards a GPU only: a copy from one would be read before it has arrived.
        labels = self._check_range(labels).to(embeddings.device, non_blocking=labels.device.type == "cpu")
        loss, self.dist_loss, *rest = self.compute(embeddings, labels)
        self.ce_loss, *self._hypergraph = rest or (None,)
        return loss

    def compute(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """The loss without its checks, which can be recorded as a CUDA graph or compiled: tensors in, tensors out.

        Embeddings (N, D), labels (N,) int64 in [0, C) on the same device -> loss, then, detached, its terms
        dist_loss and ce_loss, H (N, N), and where two samples are of one class (N, N). With ls = 0 only the first two.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            X = embeddings.to(self.cds2hg.means.dtype)
            distances = self.cds2hg.squared_distances(X)  # (N, C)
            dist_loss = self.cds2hg.distribution_loss(distances, labels)
            if self.ls == 0:
                return dist_loss, dist_loss.detach()
            # One column per sample instead of one per class present: a class with n images in the batch has n equal
            # hyperedges, each of weight 1/n. G is the same, and every shape is known without asking the device.
            same = labels[:, None] == labels  # (N, N)
            H = self.cds2hg.incidence(distances, labels, same)  # (N, N)
            W = same.sum(dim=0, dtype=H.dtype).reciprocal()  # (N,)
            ce_loss = F.cross_entropy(self.hgnn(X, H, W), labels)
            return dist_loss + self.ls * ce_loss, dist_loss.detach(), ce_loss.detach(), H.detach(), same

    @torch.no_grad()
    def hypergraph_summary(self) -> dict[str, Tensor]:
        """How the hypergraph of the last call looked, as scalars on the device.

        'incidence': mean of H over pairs of a sample and a class that is not its own; near 1 all samples belong to all
        hyperedges, and the HGNN averages over the whole batch. 'variance': mean of sigma^2, at least 1.
        There is none before the first call, nor with ls = 0.
        """
        H, same = self._hypergraph
        others = (~same).sum().clamp(min=1)
        variance = self.cds2hg.log_vars.clamp(0, 6).exp().mean()
        return {"incidence": H.masked_fill(same, 0).sum() / others, "variance": variance}

    def _check(self, embeddings: Tensor, labels: Tensor) -> None:
        if embeddings.shape[1:] != (self.embedding_size,) or labels.shape != embeddings.shape[:1]:
            raise ValueError(
                f"HISTLoss: embeddings must have shape (N, {self.embedding_size}) and labels (N,), "
                f"got {tuple(embeddings.shape)} and {tuple(labels.shape)}"
            )
        if not embeddings.is_floating_point() or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                "HISTLoss: embeddings must be floating point and labels integers, "
                f"got {embeddings.dtype} and {labels.dtype}"
            )
        if len(embeddings) < (2 if self.training else 1):
            raise ValueError(f"HISTLoss: a training batch needs at least 2 samples, got {len(embeddings)}")

    def _check_range(self, labels: Tensor) -> Tensor:
        """Labels, checked to lie in [0, C); on a GPU clamped to it, and checked one call later.

        Reading a value back would stall the device at every step. Instead the smallest and largest label are copied
        in the background and looked at by the next call; the clamp keeps the kernels of this one within bounds.
        """
        if self._label_range is not None:
            host, copied = self._label_range
            self._label_range = None
            copied.synchronize()  # a copy queued one whole step ago: there is nothing left to wait for
            self._raise_if_outside(*host.tolist(), call="the previous call")
        labels = labels.to(torch.int64)  # narrower types may not hold C - 1, and not all can be compared
        if labels.device.type != "cuda":
            self._raise_if_outside(*torch.stack(torch.aminmax(labels)).tolist(), call="this call")
            return labels
        host = torch.stack(torch.aminmax(labels)).to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(labels.device))
        self._label_range = (host, copied)
        return labels.clamp(0, self.num_classes - 1)

    def __getstate__(self) -> dict:
        """Without the labels that are still to be looked at: an event cannot be copied or pickled."""
        return super().__getstate__() | {"_label_range": None, "_hypergraph": []}

    def _raise_if_outside(self, lowest: int, highest: int, call: str) -> None:
        if lowest < 0 or highest >= self.num_classes:
            raise ValueError(
                f"HISTLoss: labels must lie in [0, {self.num_classes}), {call} had labels from {lowest} to {highest}"
            )
