"""Retrieval figures: R@K, R-precision, MAP@R and NMI, exact and in bounded memory.

The figures need no sorted list of neighbours. A query's R@K follows from one number, how many images of other classes
lie closer than its closest image of the same class; R-precision and MAP@R follow from the same count for each of its
R positives, where counts beyond R do not matter. So the similarity matrix is walked in blocks that are forgotten at
once, and as it is symmetric where a set is searched for itself, only half of it is ever computed.

Images that lie exactly equally close stand in no order: every figure is its expected value over a random order of
the tied ones. Thus an image that exists twice, or a network that maps everything onto one point, gains nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import distributed
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

INF = float("inf")


@dataclass(frozen=True)
class Retrieval:
    """Figures of one search: means over the queries that have a positive, fractions in [0, 1].

    recall: {K: R@K}. r_precision, map_at_r: None unless asked for. num_queries counts all queries,
    num_without_positive those left out because nothing else of their class was there to be found.
    per_query: {'R@1': (num_queries,) array, …, 'r_precision', 'map_at_r'}, NaN for queries left out.
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
        query: (N, D) embeddings of any length; query_labels: (N,) integers.
        gallery: (M, D), gallery_labels (M,). None: every query searches all other queries, itself left out by index.
        ks: the K of R@K.
        precision: also R-precision and MAP@R (Musgrave, Belongie, Lim, "A Metric Learning Reality Check", ECCV 2020).
        memory_gib: bound on what the search itself holds, beside the embeddings, in GiB.
        device: where to compute; the embeddings are moved there.

    Raises:
        ValueError: shapes that do not fit, complex embeddings, NaN or Inf in them, labels that are not integers,
            K below 1, or no query with a positive.
    """
    one_set = gallery is None
    if any(k < 1 for k in ks):
        raise ValueError(f"R@K needs K of at least 1, got {min(ks)}")
    Q, q_labels, q_order = _sorted_by_class(query, query_labels, "query", device)
    if one_set:
        G, g_labels = Q, q_labels
    else:
        G, g_labels, _ = _sorted_by_class(gallery, gallery_labels, "gallery", device)
        _check_dimensions(Q, G)
    first = torch.searchsorted(g_labels, q_labels)
    num_positives = torch.searchsorted(g_labels, q_labels, right=True) - first - int(one_set)  # R of every query (N,)
    found = num_positives > 0
    if not found.any():
        raise ValueError(f"none of the {len(Q)} queries has an image of its own class to find")

    per_query = {name: torch.full((len(Q),), torch.nan, dtype=torch.float64) for name in (f"R@{k}" for k in ks)}
    if precision:
        per_query |= {
            name: torch.full((len(Q),), torch.nan, dtype=torch.float64) for name in ("r_precision", "map_at_r")
        }
    for group in _query_groups(num_positives, memory_gib):
        if not found[group].any():
            continue
        search = _Search(Q, q_labels, num_positives, group, G, g_labels, one_set, precision, memory_gib, progress)
        search.run()
        for k in ks:
            per_query[f"R@{k}"][q_order[group]] = search.hits(k).cpu()
        if precision:
            r_precision, map_at_r = search.precisions()
            per_query["r_precision"][q_order[group]] = r_precision.cpu()
            per_query["map_at_r"][q_order[group]] = map_at_r.cpu()
    means = {name: values.nanmean().item() for name, values in per_query.items()}
    return Retrieval(
        recall={k: means[f"R@{k}"] for k in ks},
        r_precision=means.get("r_precision"),
        map_at_r=means.get("map_at_r"),
        num_queries=len(Q),
        num_without_positive=int((~found).sum()),
        per_query={name: values.numpy() for name, values in per_query.items()},
    )


def unit_vectors(embeddings: Tensor, what: str, device: torch.device | str = "cpu") -> Tensor:
    """Embeddings (N, D) of any finite length, scaled to length 1, in float32, on the device; zeros stay zeros.

    what: the name of these embeddings in the message of a ValueError: a wrong shape, complex numbers, NaN or Inf.
    """
    x = torch.as_tensor(embeddings).detach()
    if x.ndim != 2:
        raise ValueError(f"{what}: embeddings (N, D) expected, got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{what}: there are no embeddings, their shape is {tuple(x.shape)}")
    if x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"{what}: real numbers expected as embeddings, got {x.dtype}")
    x = x.to(device, torch.float64 if x.dtype == torch.float64 else torch.float32)
    largest = torch.linalg.vector_norm(x, INF, dim=1, keepdim=True)
    bad = int((~largest.isfinite()).sum())
    if bad:
        raise ValueError(f"{what}: {bad} of {len(x)} embeddings hold NaN or Inf")
    # Squares of very large and very small numbers leave the range of floats. Division by a power of two, which brings
    # the largest number of each row between 1 and 2, prevents that and rounds nothing.
    power = largest / (2 * largest.frexp().mantissa)
    x = (x / power.masked_fill(largest == 0, 1)).float()
    return F.normalize(x, dim=1, out=x)


def _check_dimensions(Q: Tensor, G: Tensor) -> None:
    if G.shape[1] != Q.shape[1]:
        raise ValueError(f"query embeddings have {Q.shape[1]} dimensions, gallery embeddings {G.shape[1]}")


def _sorted_by_class(embeddings: Tensor, labels: Tensor, what: str, device) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors and labels in order of class, and that order (on the CPU)."""
    embeddings, labels = torch.as_tensor(embeddings), torch.as_tensor(labels)
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{what}: embeddings (N, D) and labels (N,) expected, got {tuple(embeddings.shape)}, {tuple(labels.shape)}"
        )
    vectors = unit_vectors(embeddings, what, device)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{what}: integers expected as labels, got {labels.dtype}")
    labels = labels.cpu().to(torch.int64)  # torch cannot sort or search all integer types
    order = torch.argsort(labels, stable=True)
    return vectors[order.to(device)], labels[order].to(device), order


def _query_groups(num_positives: Tensor, memory_gib: float) -> list[slice]:
    """Slices of the queries whose lists of positives fit in a quarter of the memory: nearly always all in one."""
    budget = memory_gib * 2**30 / 4 / 64  # a positive and its rival cost about 64 bytes while they are sorted
    group = (num_positives.cumsum(0) // max(budget, 1)).cpu()
    starts = [0, *(torch.nonzero(group[1:] != group[:-1]).flatten() + 1).tolist(), len(group)]
    return [slice(start, stop) for start, stop in zip(starts, starts[1:], strict=False)]


class _Search:
    """One walk over the similarity matrix of a slice of the queries and the whole gallery, both sorted by class."""

    def __init__(self, Q, q_labels, num_positives, group, G, g_labels, one_set, precision, memory_gib, progress):
        self.Q, self.q_labels, self.R = Q[group], q_labels[group], num_positives[group]
        self.G, self.g_labels = G, g_labels
        self.host_labels = self.q_labels.cpu(), g_labels.cpu()  # looked at for every block, without asking a GPU
        self.offset = group.start if one_set else None  # query i is gallery image i + offset
        self.symmetric = one_set and len(self.Q) == len(G)
        self.precision = precision
        self.progress = progress
        # A block of similarities, its mask and what is picked from it take about 16 bytes an entry. On the CPU blocks
        # that stay near the caches are fastest; a GPU wants large ones.
        widest = 2048 if Q.device.type == "cpu" else 16384
        block = max(16, min(widest, int((memory_gib * 2**30 / 2 / 16) ** 0.5) // 16 * 16))
        self.block_rows, self.block_columns = (min(block, -(-len(x) // 16) * 16) for x in (self.Q, G))
        self.most_rivals = max(int(memory_gib * 2**30 / 4 / 64), 4 * int(self.R.sum()))
        self.buffer = Q.new_empty(self.block_rows, self.block_columns)
        self.best = Q.new_full((len(self.Q),), -INF)  # similarity of the closest positive
        self.above = torch.zeros(len(self.Q), dtype=torch.int64, device=Q.device)  # negatives closer than it
        self.tied = torch.zeros_like(self.above)  # negatives exactly as close
        self.tied_positives = torch.zeros_like(self.above)  # positives exactly as close, itself included

    def run(self) -> None:
        pairs = list(self._pairs())
        rank, count = distributed.processes()
        pairs = pairs[rank::count]  # the processes share the blocks and then put their counts together
        mixed = [pair for pair in pairs if self._mixed(*pair)]
        with tqdm(
            total=len(pairs) + len(mixed),
            desc="search",
            unit="block",
            leave=False,
            disable=None if self.progress else True,
        ) as bar:
            positives = [self.best.new_empty(0, dtype=torch.int64)]
            for rows, columns in mixed:
                self._visit_positives(rows, columns, positives)
                bar.update()
            distributed.all_reduce(self.best, "max")
            self.best[self.R == 0] = INF  # nothing is closer than that: these queries count nothing
            if self.precision:
                self.positives = distributed.all_gather(torch.cat(positives)).sort().values  # keys, see _keys
                self._start_rivals()
            for rows, columns in pairs:
                self._visit_negatives(rows, columns)
                bar.update()
            for counts in (self.above, self.tied, self.tied_positives):
                distributed.all_reduce(counts, "sum")
            if self.precision:
                self._keep_closest_rivals()
                self.rivals = [distributed.all_gather(self.rivals[0])]
                self._keep_closest_rivals()

    def _pairs(self) -> Iterator[tuple[slice, slice]]:
        """Blocks of the matrix; of a symmetric one the upper half. First those that set good thresholds early."""
        rows, columns = _blocks(len(self.Q), self.block_rows), _blocks(len(self.G), self.block_columns)
        if self.symmetric:
            yield from zip(rows, columns, strict=True)
            yield from ((i, j) for n, i in enumerate(rows) for j in columns[n + 1 :])
        else:
            yield from ((i, j) for j in columns for i in rows)

    def _mixed(self, rows: slice, columns: slice) -> bool:
        """Whether the block holds pairs of one class; sorted as they are, few blocks do."""
        i, j = self.host_labels[0][rows], self.host_labels[1][columns]
        return bool(i[0] <= j[-1]) and bool(j[0] <= i[-1])

    def _similarities(self, rows: slice | Tensor, columns: slice) -> Tensor:
        """A block (r, c). Products of different shapes round differently, and images that exist twice would not tie
        in them: so blocks that are not full are filled up with zeros."""
        q, g = self.Q[rows], self.G[columns]
        full_q, full_g = _fill_up(q, self.block_rows), _fill_up(g, self.block_columns)
        return torch.mm(full_q, full_g.T, out=self.buffer)[: len(q), : len(g)]

    def _positive_pairs(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Which entries of a block are pairs of one class (r, c), with and without the query itself."""
        same = self.q_labels[rows, None] == self.g_labels[None, columns]
        if self.offset is None:
            return same, same
        i = torch.arange(rows.start, rows.stop, device=same.device) + self.offset
        j = torch.arange(columns.start, columns.stop, device=same.device)
        return same, same & (i[:, None] != j[None, :])

    def _mirrored(self, rows: slice, columns: slice) -> bool:
        """Whether the block also stands for its mirror image, whose queries are the columns."""
        return self.symmetric and rows != columns

    def _visit_positives(self, rows: slice, columns: slice, positives: list[Tensor]) -> None:
        S = self._similarities(rows, columns)
        _, positive = self._positive_pairs(rows, columns)
        others = S.masked_fill(~positive, -INF)
        self.best[rows] = torch.maximum(self.best[rows], others.amax(dim=1))
        if self._mirrored(rows, columns):
            self.best[columns] = torch.maximum(self.best[columns], others.amax(dim=0))
        if self.precision:
            i, j = positive.nonzero(as_tuple=True)
            positives.append(_keys(i + rows.start, S[i, j]))
            if self._mirrored(rows, columns):
                positives.append(_keys(j + columns.start, S[i, j]))

    def _visit_negatives(self, rows: slice, columns: slice) -> None:
        S = self._similarities(rows, columns)
        mirrored = self._mirrored(rows, columns)
        if self._mixed(rows, columns):
            same, positive = self._positive_pairs(rows, columns)
            self.tied_positives[rows] += (positive & (S == self.best[rows, None])).sum(dim=1)
            if mirrored:
                self.tied_positives[columns] += (positive & (S == self.best[None, columns])).sum(dim=0)
            S.masked_fill_(same, -INF)
        self._count(S, rows, 1)
        if mirrored:
            self._count(S, columns, 0)
        if self.precision:
            first_visit = columns == (rows if self.symmetric else slice(0, columns.stop))
            self._collect_rivals(S, rows, 1, first_visit)
            if mirrored:
                self._collect_rivals(S, columns, 0, first_visit=False)

    def _count(self, S: Tensor, queries: slice, dim: int) -> None:
        best = self.best[queries].unsqueeze(dim)
        above = _count_true(S > best, dim)
        self.above[queries] += above
        self.tied[queries] += _count_true(S >= best, dim) - above

    def hits(self, k: int) -> Tensor:
        """Chance (n,) that a positive is among the k nearest: 0 or 1 but for ties; NaN without any positive."""
        slots = (k - self.above).clamp(min=0).double()  # places left among the k for the closest positive and its ties
        negatives, everything = self.tied.double(), (self.tied + self.tied_positives).double()
        # All slots go to tied negatives with probability C(negatives, slots) / C(everything, slots).
        slots = slots.minimum(everything)
        log_miss = (
            torch.lgamma(negatives + 1)
            - torch.lgamma((negatives - slots).clamp(min=0) + 1)
            - torch.lgamma(everything + 1)
            + torch.lgamma(everything - slots + 1)
        )
        miss = torch.where(slots > negatives, 0.0, log_miss.exp())
        miss = torch.where(slots == 0, 1.0, miss)
        return torch.where(self.R > 0, 1 - miss, torch.nan)

    # R-precision and MAP@R. The rivals of a query are its R closest negatives, as far as they are no farther than its
    # farthest positive; they are gathered like the best of a tournament, against a threshold that rises.

    def _start_rivals(self) -> None:
        _, farthest = _unpack(self.positives[(self.R.cumsum(0) - 1).clamp(min=0)])
        below = torch.nextafter(farthest, torch.full_like(farthest, -INF))
        self.threshold = torch.where(self.R > 0, below, INF)
        self.rivals = [self.positives.new_empty(0)]
        self.num_rivals = 0

    def _collect_rivals(self, S: Tensor, queries: slice, dim: int, first_visit: bool) -> None:
        threshold = self.threshold[queries]
        if first_visit:  # no good threshold yet: the R best of this block give one
            R = self.R[queries]
            k = min(max(int(R.max()), 1), S.shape[1])
            top = S.topk(k, dim=1).values
            i, j = ((top > threshold[:, None]) & (torch.arange(k, device=S.device) < R[:, None])).nonzero(as_tuple=True)
            values = top[i, j]
            last = top.gather(1, (R - 1).clamp(0, k - 1)[:, None])[:, 0]
            self.threshold[queries] = torch.where(R <= k, threshold.maximum(last), threshold)
        else:
            place = _true_positions(S > threshold.unsqueeze(dim))
            i, values = place[1 - dim], S[place]
        self.rivals.append(_keys(i + queries.start, values))
        self.num_rivals += len(values)
        if self.num_rivals > self.most_rivals:
            self._keep_closest_rivals()

    def _keep_closest_rivals(self) -> None:
        keys = torch.cat(self.rivals).sort().values
        rows = keys >> 32
        starts = torch.searchsorted(keys, torch.arange(len(self.Q), device=keys.device) << 32)
        place = torch.arange(len(keys), device=keys.device) - starts[rows]
        last = place == self.R[rows] - 1
        self.threshold[rows[last]] = _unpack(keys[last])[1].maximum(self.threshold[rows[last]])
        self.rivals = [keys[place < self.R[rows]]]
        self.num_rivals = len(self.rivals[0])

    def precisions(self) -> tuple[Tensor, Tensor]:
        """R-precision and MAP@R of every query (n,), NaN without any positive."""
        positives, rivals = self.positives, self.rivals[0]
        rows, _ = _unpack(positives)
        first = rows << 32
        # For every positive: negatives and positives that are closer, and those exactly as close (itself included).
        n_above = torch.searchsorted(rivals, positives) - torch.searchsorted(rivals, first)
        n_tied = torch.searchsorted(rivals, positives, right=True) - torch.searchsorted(rivals, positives)
        p_above = torch.searchsorted(positives, positives) - torch.searchsorted(positives, first)
        p_tied = torch.searchsorted(positives, positives, right=True) - torch.searchsorted(positives, positives)
        # Rivals tied beyond the R that were kept are counted by a look at their rows alone.
        R = self.R[rows]
        cut = (n_tied > 0) & (n_above + n_tied >= R)
        keys, which = positives[cut].unique(return_inverse=True)
        n_tied[cut] = n_tied[cut].maximum(self._count_ties(*_unpack(keys))[which])

        # The tie stands on places a+1 … a+t, of which those up to R count.
        a, t, R = (n_above + p_above).minimum(R).double(), (n_tied + p_tied).double(), R.double()
        stop = (a + t).minimum(R)
        harmonic = torch.cat([R.new_zeros(1), 1 / torch.arange(1, int(R.max()) + 1, device=R.device).double()]).cumsum(
            0
        )
        share = harmonic[stop.long()] - harmonic[a.long()]  # sum of 1/place over them
        share = torch.where(t == 1, (stop - a) / (a + 1), share)
        before = (stop - a) - (a + 1) * share  # sum of (places of the tie before it) / place
        hits = share * (p_above + 1) + before * (p_tied - 1) / (t - 1).clamp(min=1)
        inside = (stop - a) / t

        totals = torch.zeros(2, len(self.Q), dtype=torch.float64, device=R.device)
        totals.index_add_(1, rows, torch.stack([inside, hits / t]))
        r_precision, map_at_r = totals / torch.where(self.R > 0, self.R.double(), torch.nan)
        return r_precision, map_at_r

    def _count_ties(self, rows: Tensor, values: Tensor) -> Tensor:
        """How many negatives of each query rows[n] have exactly the similarity values[n]."""
        ties = torch.zeros_like(rows)
        for part in _blocks(len(rows), self.block_rows):
            i = rows[part]
            for j in _blocks(len(self.G), self.block_columns):
                equal = self._similarities(i, j) == values[part, None]
                equal &= self.q_labels[i, None] != self.g_labels[None, j]
                ties[part] += equal.sum(dim=1)
        return ties


def _blocks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _fill_up(x: Tensor, rows: int) -> Tensor:
    """x (n, D) with rows of zeros behind it -> (rows, D)."""
    return x if len(x) == rows else F.pad(x, (0, 0, 0, rows - len(x)))


def _keys(rows: Tensor, similarities: Tensor) -> Tensor:
    """One int64 per (row, similarity) that sorts by row, then from the most similar down."""
    bits = (0.0 - similarities).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # orders like the float it came from
    return (rows << 32) + (bits.long() + 2**31)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, similarities) of keys."""
    bits = ((keys & 0xFFFFFFFF) - 2**31).int()
    return keys >> 32, 0.0 - (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _as_words(mask: Tensor) -> Tensor:
    """A boolean (r, c) read as (r, c / 8) words of eight entries: sums and searches then touch an eighth as many."""
    if mask.shape[1] % 8:
        mask = F.pad(mask, (0, 8 - mask.shape[1] % 8))
    return mask.flatten().view(torch.int64).view(len(mask), -1)


def _count_true(mask: Tensor, dim: int) -> Tensor:
    """mask.sum(dim) of a boolean (r, c), many times faster on the CPU: bytes are added eight at a time.

    A byte holds sums up to 255, so that many words are added before their bytes are spread out.
    """
    if dim == 1:
        parts = [part.sum(dim=1, keepdim=True).view(torch.uint8).sum(dim=1) for part in _as_words(mask).split(255, 1)]
    else:
        parts = [part.sum(dim=0).view(torch.uint8)[: mask.shape[1]].long() for part in _as_words(mask).split(255, 0)]
    return torch.stack(parts).sum(dim=0)


def _true_positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask.nonzero() of a boolean (r, c) with few true entries, several times faster on the CPU."""
    words = _as_words(mask)
    place = words.flatten().nonzero()[:, 0]
    which, lane = words.flatten()[place].view(torch.bool).view(-1, 8).nonzero(as_tuple=True)
    return place[which] // words.shape[1], place[which] % words.shape[1] * 8 + lane


def nearest(
    query: Tensor,
    gallery: Tensor,
    k: int,
    exclude: Tensor | None = None,
    memory_gib: float = 1.0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k nearest of gallery (N, D) for each of query (Q, D) by cosine -> indices and similarities (Q, k).

    exclude (Q,): for each query a row of the gallery that it must not find, such as itself. Exact; the similarities are
    computed in chunks that keep within memory_gib. k is cut to what the gallery holds. ValueError as from retrieval.
    """
    query, gallery = unit_vectors(query, "query", device), unit_vectors(gallery, "gallery", device)
    _check_dimensions(query, gallery)
    k = min(k, len(gallery) - int(exclude is not None))
    rows = max(1, int(memory_gib * 2**30 / 8 / len(gallery)))
    values, indices = [], []
    with tqdm(total=len(query), desc="search", unit="query", leave=False, disable=None if progress else True) as bar:
        for start in range(0, len(query), rows):
            S = query[start : start + rows] @ gallery.T
            if exclude is not None:
                S.scatter_(1, exclude[start : start + rows, None].to(device), -INF)
            top = S.topk(k, dim=1)
            values.append(top.values.cpu())
            indices.append(top.indices.cpu())
            bar.update(len(S))
    return torch.cat(indices), torch.cat(values)


def nmi(
    embeddings: Tensor,
    labels: Tensor,
    iterations: int = 20,
    seed: int = 0,
    memory_gib: float = 1.0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> float:
    """Normalised mutual information between the classes and a k-means clustering, k = number of classes.

    embeddings (N, D) are L2-normalised first. Lloyd's algorithm from k images chosen by the seed; a cluster that
    runs empty restarts at the image farthest from its centre. Normalised by the arithmetic mean of the entropies, as
    in scikit-learn. ValueError as from retrieval.
    """
    from sklearn.metrics import normalized_mutual_info_score

    X, classes, _ = _sorted_by_class(embeddings, labels, "nmi", device)
    k = len(torch.unique(classes))
    start = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))[:k]
    centres = X[start.to(X.device)]
    rows = max(1, int(memory_gib * 2**30 / 2 / (4 * k)))
    assigned = None
    for _ in tqdm(range(iterations), desc="k-means", unit="round", leave=False, disable=None if progress else True):
        norms = centres.square().sum(dim=1)
        nearest = [torch.addmm(norms, x, centres.T, alpha=-2).min(dim=1) for x in X.split(rows)]
        previous, assigned = assigned, torch.cat([part.indices for part in nearest])
        if previous is not None and torch.equal(assigned, previous):
            break
        sizes = torch.bincount(assigned, minlength=k)
        sums = torch.zeros_like(centres).index_add_(0, assigned, X)
        centres = sums / sizes.clamp(min=1)[:, None]
        empty = (sizes == 0).nonzero()[:, 0]
        if len(empty):
            centres[empty] = X[torch.cat([part.values for part in nearest]).topk(len(empty)).indices]
    return float(normalized_mutual_info_score(classes.cpu().numpy(), assigned.cpu().numpy()))
