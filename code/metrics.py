"""Retrieval figures: R@K, R-precision, MAP@R and NMI, exact and in bounded memory.

Ties are scored by their expectation over random orderings. So an image that exists twice, or a network that maps all
images to one point, gains nothing. The search itself is in search.py.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from refused import Refused
from search import INF, Found, blocks, search
from torch import Tensor
from tqdm import tqdm


@dataclass(frozen=True)
class Retrieval:
    """Figures of one search: fractions in [0, 1], means over the queries that have a positive.

    recall: {K: R@K}. r_precision, map_at_r: None unless asked for. num_queries counts all queries,
    num_without_positive those left out because there is no other image of their class to find.
    per_query: {'R@1': (num_queries,) array, …, 'RP', 'MAP@R'}, NaN for queries left out.
    """

    recall: dict[int, float]
    r_precision: float | None
    map_at_r: float | None
    num_queries: int
    num_without_positive: int
    per_query: dict[str, np.ndarray]

    def figures(self) -> dict[str, float]:
        """One flat dict {'R@1': …, 'RP': …, 'MAP@R': …} for logs and files."""
        named = {f"R@{k}": value for k, value in self.recall.items()}
        if self.r_precision is not None:
            named |= {"RP": self.r_precision, "MAP@R": self.map_at_r}
        return named


def retrieval(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    ks: tuple[int, ...] = (1, 2, 4, 8),
    precision: bool = False,
    memory_gib: float = 1.0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Retrieval:
    """R@K, and with precision=True also R-precision and MAP@R, by cosine similarity, exact in float32.

    Args:
        query: (N, D) embeddings of any finite length; query_labels: (N,) integers.
        gallery: (M, D), gallery_labels (M,). None: every query searches all other queries, itself left out by index.
        ks: the K of R@K.
        precision: also R-precision and MAP@R (Musgrave, Belongie, Lim, "A Metric Learning Reality Check", ECCV 2020).
        memory_gib: limit in GiB on what the search holds besides the embeddings.
        device: where to compute; the embeddings are moved there.

    Raises Refused: shapes that do not fit, NaN or Inf in the embeddings, K below 1, or no query with a positive;
    ValueError: labels that are not whole numbers.
    """
    if min(ks, default=0) < 1:
        raise Refused(f"R@K needs K of at least 1, got {list(ks)}")
    one_set = gallery is None
    Q, q_labels, q_order = _sorted_by_class(query, query_labels, "query", device)
    if one_set:
        G, g_labels = Q, q_labels
    else:
        G, g_labels, _ = _sorted_by_class(gallery, gallery_labels, "gallery", device)
        if G.shape[1] != Q.shape[1]:
            raise Refused(f"query embeddings have {Q.shape[1]} dimensions, gallery embeddings {G.shape[1]}")
    names = [f"R@{k}" for k in ks] + ["RP", "MAP@R"] * precision
    figures = torch.full((len(names), len(Q)), torch.nan, dtype=torch.float64)
    for rows, found in search(Q, q_labels, G, g_labels, one_set, precision, memory_gib, progress):
        hits = [_hits(found, k) for k in ks]
        figures[:, q_order[rows]] = torch.stack([*hits, *(_precisions(found, memory_gib) if precision else ())]).cpu()
    without_positive = int(figures[0].isnan().sum())
    if without_positive == len(Q):
        raise Refused(f"none of the {len(Q)} queries has an image of its own class to find")
    per_query = dict(zip(names, figures, strict=True))
    means = {name: values.nanmean().item() for name, values in per_query.items()}
    return Retrieval(
        recall={k: means[f"R@{k}"] for k in ks},
        r_precision=means.get("RP"),
        map_at_r=means.get("MAP@R"),
        num_queries=len(Q),
        num_without_positive=without_positive,
        per_query={name: values.numpy() for name, values in per_query.items()},
    )


def unit_vectors(embeddings: Tensor, what: str, device: torch.device | str = "cpu") -> Tensor:
    """Embeddings (N, D) of any finite length, scaled to length 1, in float32, on the device; zeros stay zeros.

    what: their name in the message of a Refused: a wrong shape, NaN or Inf.
    """
    x = torch.as_tensor(embeddings).detach()
    if x.ndim != 2 or x.numel() == 0:
        raise Refused(f"{what}: embeddings (N, D) expected, N and D at least 1, got {tuple(x.shape)}")
    x = x.to(device, torch.float64 if x.dtype == torch.float64 else torch.float32)
    largest = torch.linalg.vector_norm(x, INF, dim=1, keepdim=True)
    bad = int((~largest.isfinite()).sum())
    if bad:
        raise Refused(f"{what}: {bad} of {len(x)} embeddings hold NaN or Inf")
    # The squares of very large or small numbers overflow or vanish. So each row is divided by a power of two, which
    # brings its largest number between 1 and 2 and rounds nothing.
    power = largest / (2 * largest.frexp().mantissa)
    x = (x / power.masked_fill(largest == 0, 1)).float()
    return F.normalize(x, dim=1, out=x)


def _sorted_by_class(embeddings: Tensor, labels: Tensor, what: str, device) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors and labels in order of class, and that order (on the CPU)."""
    vectors, labels = unit_vectors(embeddings, what, device), torch.as_tensor(labels)
    if labels.shape != vectors.shape[:1]:
        raise Refused(f"{what}: labels of shape ({len(vectors)},) expected, got {tuple(labels.shape)}")
    if labels.is_floating_point() and (labels.frac() != 0).any():
        raise ValueError(f"{what}: whole numbers expected as labels, got {labels.dtype}")
    labels = labels.cpu().to(torch.int64)  # torch cannot sort or search all integer types
    order = torch.argsort(labels, stable=True)
    return vectors[order.to(device)], labels[order].to(device), order


def _hits(found: Found, k: int) -> Tensor:
    """Chance (n,) that a positive is among the k nearest: 0 or 1 but for ties; NaN without a positive."""
    best = found.positives.amax(dim=1, keepdim=True)
    tied_positives = (found.positives == best).sum(dim=1)
    slots = (k - found.closer).clamp(min=0).double()  # left among the k for the closest positive and its ties
    rivals, everything = found.tied.double(), (found.tied + tied_positives).double()
    # All slots go to tied rivals with probability C(rivals, slots) / C(everything, slots).
    slots = slots.minimum(everything)
    log_miss = (
        torch.lgamma(rivals + 1)
        - torch.lgamma((rivals - slots).clamp(min=0) + 1)
        - torch.lgamma(everything + 1)
        + torch.lgamma(everything - slots + 1)
    )
    miss = torch.where(slots > rivals, 0.0, log_miss.exp())
    miss = torch.where(slots == 0, 1.0, miss)
    return torch.where(found.num_positives > 0, 1 - miss, torch.nan)


def _precisions(found: Found, memory_gib: float) -> Tensor:
    """R-precision and MAP@R of every query (2, n), NaN without a positive."""
    W = found.rivals.shape[1]
    rows = max(1, int(memory_gib * 2**30 / 4 / (128 * W)))  # a positive takes about 128 bytes below
    lists = (found.num_positives, found.positives, found.rivals, found.tied_at_end)
    return torch.cat([_precisions_of(*part) for part in zip(*(x.split(rows) for x in lists), strict=True)], dim=1)


def _precisions_of(R: Tensor, positives: Tensor, rivals: Tensor, tied_at_end: Tensor) -> Tensor:
    """R-precision and MAP@R of some of the queries (2, n)."""
    W = rivals.shape[1]
    positives = positives.sort(dim=1, descending=True).values[:, :W]
    n_closer, n_tied = _closer_and_tied(rivals, positives)
    p_closer, p_tied = _closer_and_tied(positives, positives)  # tied: itself included
    n_tied = torch.where(positives == rivals[:, -1:], tied_at_end[:, None], n_tied)

    # Each positive and its ties share the places a+1 … a+t, of which those up to R count.
    R = R[:, None].double()
    a, t = torch.minimum(n_closer + p_closer, R), (n_tied + p_tied).double()
    stop = torch.minimum(a + t, R)
    harmonic = torch.cat([torch.zeros(1), 1 / torch.arange(1, W + 1).double()]).cumsum(0).to(R.device)
    share = harmonic[stop.long()] - harmonic[a.long()]  # sum of 1/place over them
    share = torch.where(t == 1, (stop - a) / (a + 1), share)
    before = (stop - a) - (a + 1) * share  # sum of (places of the tie before this one) / place
    hits = share * (p_closer + 1) + before * (p_tied - 1) / (t - 1).clamp(min=1)
    inside = (stop - a) / t

    real = torch.arange(W, device=R.device) < R
    totals = torch.stack([inside, hits / t]).where(real, 0.0).sum(dim=2)
    return totals / torch.where(R > 0, R, torch.nan)[:, 0]


def _closer_and_tied(similarities: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row's similarities are closer than each of its positives, and as close; both closest first."""
    closer = torch.searchsorted(-similarities, -positives)
    return closer, torch.searchsorted(-similarities, -positives, right=True) - closer


def nearest(
    query: Tensor,
    gallery: Tensor,
    k: int,
    exclude: Tensor | None = None,
    memory_gib: float = 1.0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of gallery (N, D) to each row of query (Q, D) by cosine: indices and similarities (Q, k).

    exclude (Q,): for each query a row of the gallery that it must not find, such as itself. Exact; the similarities are
    computed in chunks that keep within memory_gib. k is cut to what the gallery holds. Raises as retrieval does.
    """
    query, gallery = unit_vectors(query, "query", device), unit_vectors(gallery, "gallery", device)
    k = min(k, len(gallery) - int(exclude is not None))
    rows = max(1, int(memory_gib * 2**30 / 8 / len(gallery)))
    found = []
    for chosen in tqdm(blocks(len(query), rows), desc="search", leave=False, disable=None if progress else True):
        S = query[chosen] @ gallery.T
        if exclude is not None:
            S.scatter_(1, exclude[chosen, None].to(device), -INF)
        found.append([x.cpu() for x in S.topk(k, dim=1)])
    values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return indices, values


def nmi(embeddings: Tensor, labels: Tensor, iterations: int = 20, seed: int = 0) -> float:
    """Normalised mutual information between the classes and a k-means clustering, k = number of classes.

    embeddings (N, D) are L2-normalised first. Lloyd's algorithm on the CPU from k images chosen by the seed, by their
    places and not their classes; an empty cluster restarts at the image farthest from its centre. Normalised by the
    arithmetic mean of the entropies. Raises as retrieval does.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    sorted_X, sorted_classes, order = _sorted_by_class(embeddings, labels, "nmi", "cpu")
    X, classes = sorted_X[order.argsort()], sorted_classes[order.argsort()]  # in the order of the images again
    k = len(torch.unique(classes))
    start = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))[:k]
    # Assigning images to the final centres is an iteration that max_iter does not count.
    k_means = KMeans(k, init=X[start].numpy(), n_init=1, max_iter=iterations - 1, tol=0)
    return float(normalized_mutual_info_score(classes.numpy(), k_means.fit_predict(X.numpy())))
