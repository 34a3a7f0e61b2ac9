"""The exact search for the retrieval figures: each query's positives, and the rivals that are closer than they are.

A positive is an image of the query's class, a rival an image of another class. No list of neighbours is sorted. R@K
needs only the number of rivals that are closer than the closest positive; R-precision and MAP@R need the R closest
rivals. So the similarity matrix is computed block by block, and no block is kept. When a set is searched for itself,
the matrix is symmetric and only half of it is computed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import distributed
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

INF = float("inf")


class Found(NamedTuple):
    """What the search found for each of n queries; W is the most positives that any query has.

    num_positives (n,): the R of R-precision and MAP@R.
    positives (n, W or W + 1): their similarities in no order, padded with -inf.
    closer, tied (n,): how many rivals are closer than the closest positive, and how many exactly as close.
    rivals (n, W), None unless asked for: similarities of the closest rivals, closest first. Rivals farther than every
        positive do not matter and are not listed; a value just below the farthest positive takes their place.
    tied_at_end (n,): how many rivals, listed or not, are exactly as close as the last one listed. Counted only if a
        positive is that close too.
    """

    num_positives: Tensor
    positives: Tensor
    closer: Tensor
    tied: Tensor
    rivals: Tensor | None = None
    tied_at_end: Tensor | None = None


class Similarities:
    """Blocks of the similarity matrix of queries Q (n, D) and a gallery G (M, D), unit vectors sorted by class.

    start: where the first query is in the gallery, None if the queries are not part of it.
    memory_gib: limit on what a block and the counting in it hold. progress: whether walk shows a bar.
    """

    def __init__(self, Q, q_labels, G, g_labels, start: int | None, memory_gib: float, progress: bool):
        self.Q, self.q_labels, self.G, self.g_labels, self.start = Q, q_labels, G, g_labels, start
        self.hidden = None if progress else True  # None: tqdm shows its bar on a terminal only
        self.host_labels = q_labels.cpu(), g_labels.cpu()  # read for every block, without waiting for a GPU
        self.symmetric = start is not None and len(Q) == len(G)
        # A block and what is computed from it take about 16 bytes an entry. A CPU is fastest with small blocks, which
        # stay in its caches, a GPU with large ones.
        largest = 1024 if Q.device.type == "cpu" else 16384
        side = max(16, min(largest, int((memory_gib * 2**30 / 16) ** 0.5) // 16 * 16))
        self.height, self.width = (min(side, -(-len(x) // 16) * 16) for x in (Q, G))
        # Rows a power of two apart would push each other out of the caches when a mirrored block is read by columns.
        self.buffer = Q.new_empty(self.height, self.width + 16)[:, : self.width]

    def pairs(self) -> list[tuple[slice, slice]]:
        """This process's share of the blocks (rows, columns); of a symmetric matrix those on and above the diagonal."""
        pairs = [(i, j) for j in blocks(len(self.G), self.width) for i in blocks(len(self.Q), self.height)]
        if self.symmetric:
            pairs = [(i, j) for i, j in pairs if i.start <= j.start]
        rank, count = distributed.processes()
        return pairs[rank::count]

    def mixed(self, rows: slice, columns: slice) -> bool:
        """Whether some class has images in both. As all are sorted by class, few blocks are mixed."""
        i, j = self.host_labels[0][rows], self.host_labels[1][columns]
        return bool(i[0] <= j[-1]) and bool(j[0] <= i[-1])

    def walk(self, pairs: list[tuple[slice, slice]]) -> Iterator[tuple[slice, slice, Tensor]]:
        """(queries, candidates, their similarities) of every block, and of its mirror image if the matrix has one."""
        for rows, columns in tqdm(pairs, desc="search", unit="block", leave=False, disable=self.hidden):
            S = self.block(rows, columns)
            yield rows, columns, S
            if self.symmetric and rows != columns:
                yield columns, rows, S.T

    def block(self, rows: slice | Tensor, columns: slice) -> Tensor:
        """Similarities (r, c), overwritten by the next block.

        Matrix products of different shapes round differently, and copies of an image would not tie. So short blocks
        are padded with zeros, and all products have one shape.
        """
        q, g = self.Q[rows], self.G[columns]
        full_q = F.pad(q, (0, 0, 0, self.height - len(q)))
        full_g = F.pad(g, (0, 0, 0, self.width - len(g)))
        return torch.mm(full_q, full_g.T, out=self.buffer)[: len(q), : len(g)]


def blocks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def search(
    Q, q_labels, G, g_labels, one_set: bool, with_rivals: bool, memory_gib: float, progress: bool
) -> Iterator[tuple[slice, Found]]:
    """Searches the gallery G (M, D) for each of the queries Q (N, D), unit vectors sorted by class.

    Yields slices of the queries and what was found for them. Nearly always one slice holds all queries; they are split
    only if classes are so large that the lists of similarities would not fit in memory_gib. A slice in which no query
    has a positive is left out. one_set: Q and G are the same, and a query does not find itself.
    """
    first = torch.searchsorted(g_labels, q_labels)  # where each query's class begins in the gallery
    R = torch.searchsorted(g_labels, q_labels, right=True) - first - int(one_set)
    # The lists of positives and rivals, and updating them, take up to 40 bytes an entry: half of the memory.
    rows = max(16, int(memory_gib * 2**30 / 2 / 40 / (int(R.max()) + 1)))
    for group in blocks(len(Q), rows):
        if (R[group] > 0).any():
            start = group.start if one_set else None
            S = Similarities(Q[group], q_labels[group], G, g_labels, start, memory_gib / 2, progress)
            yield group, _search_group(S, first[group], R[group], with_rivals)


def _search_group(S: Similarities, first: Tensor, R: Tensor, with_rivals: bool) -> Found:
    pairs = S.pairs()
    positives = _positives(S, [pair for pair in pairs if S.mixed(*pair)], first, R)
    best = positives.amax(dim=1).masked_fill(R == 0, INF)  # nothing is closer than INF, so nothing is counted
    if with_rivals:  # (n, W), before the first block all just farther than the farthest positive
        farthest = positives.masked_fill(positives == -INF, INF).amin(dim=1, keepdim=True)
        below = torch.nextafter(farthest, torch.full_like(farthest, -INF)).masked_fill(R[:, None] == 0, INF)
        rivals = below.repeat(1, int(R.max()))
    counts = torch.zeros(2, len(best), dtype=torch.int64, device=best.device)  # closer, closer or tied
    for queries, candidates, block in S.walk(pairs):
        if S.mixed(queries, candidates):
            block.masked_fill_(S.q_labels[queries, None] == S.g_labels[candidates], -INF)
        for n, compare in enumerate((torch.gt, torch.ge)):
            # The results are written as floats: a sum of floats is many times faster than one of booleans.
            counts[n, queries] += compare(block, best[queries, None], out=torch.empty_like(block)).sum(dim=1).long()
        if with_rivals:
            _keep_closest(rivals[queries], block)
    distributed.all_reduce(counts, "sum")
    found = Found(R, positives, closer=counts[0], tied=counts[1] - counts[0])
    if not with_rivals:
        return found
    rivals = torch.cat(distributed.all_gather(rivals), dim=1).topk(rivals.shape[1], dim=1).values
    return found._replace(rivals=rivals, tied_at_end=_tied_at_end(S, positives, rivals))


def _positives(S: Similarities, mixed: list, first: Tensor, R: Tensor) -> Tensor:
    """Similarities of the positives of every query (n, W), padded with -inf; one column more if it is in the gallery.

    Sorted by class, the positives of a query are neighbours in the gallery: column n is for image first + n.
    """
    itself = int(S.start is not None)
    n = torch.arange(int(R.max()) + itself, device=R.device)
    positives = S.Q.new_full((len(S.Q), len(n)), -INF)
    for queries, candidates, block in S.walk(mixed):
        image = first[queries, None] + n
        wanted = (n < R[queries, None] + itself) & (image >= candidates.start) & (image < candidates.stop)
        if itself:
            wanted &= image != torch.arange(queries.start, queries.stop, device=n.device)[:, None] + S.start
        similarities = block.gather(1, (image - candidates.start).clamp(0, block.shape[1] - 1))
        positives[queries] = torch.where(wanted, similarities, positives[queries])
    distributed.all_reduce(positives, "max")
    return positives


def _keep_closest(rivals: Tensor, block: Tensor) -> None:
    """Updates the closest rivals (r, W), the farthest of them first, with a block of similarities (r, c)."""
    rows = (block.amax(dim=1) > rivals[:, 0]).nonzero()[:, 0]
    W = rivals.shape[1]
    closest = _largest(block[rows], min(W, block.shape[1]))
    rivals[rows] = _largest(torch.cat([rivals[rows], closest], dim=1), W)


def _largest(x: Tensor, k: int) -> Tensor:
    """The k largest of each row (r, c), the least of them first, the others in no order."""
    if x.device.type != "cpu" or 64 * k <= x.shape[1]:
        return x.topk(k, dim=1).values.flip(1)
    # Of so many topk sorts the places, too; numpy takes a fifth of its time.
    return torch.from_numpy(np.partition(x.numpy(), -k, axis=1)[:, -k:])


def _tied_at_end(S: Similarities, positives: Tensor, rivals: Tensor) -> Tensor:
    """How many rivals are as close as the last one listed (n,), counted if a positive is that close too."""
    last = rivals[:, -1]
    tied = torch.zeros(len(last), dtype=torch.int64, device=last.device)
    for rows in (positives == last[:, None]).any(dim=1).nonzero()[:, 0].split(S.height):
        for columns in blocks(len(S.G), S.width):
            equal = S.block(rows, columns) == last[rows, None]
            tied[rows] += (equal & (S.q_labels[rows, None] != S.g_labels[columns])).sum(dim=1)
    return tied
