"""From a checkpoint to a network that is ready to embed, from images to embeddings, and from those to scores."""

import functools
import sys
import timeit
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import checkpoint
import dataset
import distributed
import metrics
import net
import numpy as np
import pictures
import torch
import torch.nn.functional as F
from folders import shorten
from refused import Refused
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm


class NotFinite(Refused):
    """Embeddings hold NaN or Inf. The message is one line that counts them."""


class Embedded(NamedTuple):
    """embeddings (N, D) float32 and labels (N,) int64, on the CPU."""

    embeddings: Tensor
    labels: Tensor


class Loaded(NamedTuple):
    """A network on its device, in eval mode, and where it came from: file, its content, the flags it was made with."""

    network: net.EmbeddingNet
    image_size: int
    path: Path
    content: dict
    args: object


def load_network(parser, args, given: set[str], name: str, only: bool, device: torch.device) -> Loaded:
    """The network of a checkpoint, this project's or a published one.

    Flags that were not given come from the checkpoint, as Loaded.args; given ones may not contradict the network. name,
    only: see checkpoint.find. Raises Refused: no checkpoint, a damaged one, or one that does not fit the flags.
    """
    path = checkpoint.find(args.model_path, name, only)
    content = checkpoint.load(path)
    args = parser.adopt(args, given, checkpoint.stored_flags(content), path)
    network = net.build(args.model, args.sz_embedding, "none", bool(args.add_gmp), bool(args.layer_norm))
    net.load_network_state(network, checkpoint.network_state(content, path), path)
    image_size = args.image_size or network.image_size
    net.require_image_size(network, image_size)
    network.to(device, memory_format=memory_format(args.channels_last)).eval()
    return Loaded(network, image_size, path, content, args)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def slow_bf16(amp: str, device: torch.device, training: bool) -> float:
    """How many times as long as in float32 a convolution takes in bf16 on this CPU; 0 if no longer, or not wanted.

    Neither the CPU's name nor torch's version tells. training: with the backward pass, for which fewer CPUs have bf16.
    """
    if amp != "bf16" or device.type != "cpu":
        return 0.0
    images, weight = torch.ones(8, 64, 28, 28), torch.ones(64, 64, 3, 3, requires_grad=True)

    def step(bf16: bool) -> None:
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = F.conv2d(images, weight, padding=1)
        if training:
            output.sum().backward()

    float32, bf16 = (min(timeit.repeat(functools.partial(step, x), number=1, repeat=4)) for x in (False, True))
    return distributed.from_all(bf16 / float32 if bf16 > 1.2 * float32 else 0.0)[0]  # less is noise


def amp_to_score_with(args: Namespace, given: set[str], device: torch.device) -> str:
    """--amp for a checkpoint's network: as it was trained, unless float32 is faster here and --amp is not given."""
    if not (times := slow_bf16(args.amp, device, training=False)):
        return args.amp
    instead = "--amp off should be faster" if "amp" in given else "so this is float32; --amp bf16 is as it was trained"
    print(f"warning: a convolution takes {times:.1f} times as long in bf16 on this CPU; {instead}", file=sys.stderr)
    return args.amp if "amp" in given else "off"


def announce(benchmark: dataset.Benchmark) -> None:
    """Say what is odd about the data, and which images were left out of it."""
    for warning in benchmark.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if bad := benchmark.unreadable:
        print(f"left out: {len(bad):,} images that could not be decoded: {shorten(bad)}")


def make_loader(images: dataset.ImageList | None, image_size: int, batch_size: int, workers: int, device):
    """A loader of this process's share of the images, all in order, for embed. None for None, a gallery that is not."""
    if images is None:
        return None
    transform, pin_memory = dataset.eval_transform(image_size), torch.device(device).type == "cuda"
    return dataset.make_eval_loader(images, transform, batch_size, workers, pin_memory, distributed.processes())


@torch.inference_mode()
def embed(network, loader, device, amp=False, channels_last=False, after_batch=lambda: None) -> Embedded | None:
    """Embeddings of every image of a loader, in its order; None for None. The network is left in eval mode.

    amp: bf16 autocast. after_batch is called after every batch and may raise to stop. With several processes each
    embeds its share, and all get all: process r of n has to be given a loader of the images r, r + n, r + 2n, … and all
    of them the same data set. Raises NotFinite for NaN or Inf, Refused where there are no images.
    """
    if loader is None:
        return None
    network.eval()
    device = torch.device(device)
    count = distributed.processes().count
    total = len(loader.dataset)
    if total == 0:
        raise Refused("there is no image to embed")
    embeddings, labels, layout = [], [], memory_format(channels_last)
    with tqdm(total=total, desc="embed", unit="img", disable=None, leave=False) as bar:
        for images, targets in loader:
            images = network.normalise(images.to(device, non_blocking=True, memory_format=layout))
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                # Collected on the device: reading every batch back would make the host wait for each of them.
                embeddings.append(network(images).float())
            labels.append(targets)
            bar.update(len(targets) * count)
            after_batch()
    largest_share = -(-total // count)
    for _ in range(len(loader), -(-largest_share // loader.batch_size)):
        after_batch()  # other processes have a batch more
    if not embeddings:  # fewer images than processes
        embeddings, labels = [torch.empty(0, network.embedding_size)], [torch.empty(0, dtype=torch.int64)]
    embeddings, labels = (distributed.gather_shares(torch.cat(x).to(device), total).cpu() for x in (embeddings, labels))
    if bad := int((~torch.isfinite(embeddings)).any(dim=1).sum()):
        raise NotFinite(f"{bad:,} of {total:,} embeddings hold NaN or Inf")
    return Embedded(embeddings, labels)


def score(query: Embedded, gallery: Embedded | None, ks, device, memory_gib=1.0, precision=False) -> metrics.Retrieval:
    """R@K, with precision also R-precision and MAP@R, of what was embedded."""
    sets = (*query, *(gallery or (None, None)))
    return metrics.retrieval(*sets, ks, precision, memory_gib, device, progress=True)


def doubt(query: Embedded, gallery: Embedded | None) -> str:
    """Why R@K of several embeddings ranks rounding errors; empty if they do not almost lie at one point.

    Those of a network from random weights with frozen BatchNorm statistics do.
    """
    everything = metrics.unit_vectors(torch.cat([part.embeddings for part in (query, gallery) if part]), "embeddings")
    if len(everything) == 1 or everything.mean(dim=0, dtype=torch.float64).square().sum() <= 1 - 1e-5:
        return ""
    return "all embeddings lie almost at one point (mean cosine similarity above 0.99999): scores say little"


def draw_search(folder: Path, found: metrics.Retrieval, query, gallery, benchmark, max_points=2000) -> None:
    """neighbours.png (four of the worst queries, four random others) and embedding.png of one search in folder.

    query and gallery are what was Embedded of the benchmark. max_points: see pictures.embedding_map.
    """
    recalls = [values for name, values in found.per_query.items() if name.startswith("R@")]
    worst, others = choose_queries(np.mean(recalls, axis=0))
    chosen = np.concatenate([worst, others])
    query_images = benchmark.query
    targets, images = (query, query_images) if gallery is None else (gallery, benchmark.gallery)
    itself = torch.from_numpy(chosen) if gallery is None else None
    nearest, similarities = metrics.nearest(query.embeddings[chosen], targets.embeddings, 8, itself)
    right = (targets.labels[nearest] == query.labels[chosen][:, None]).tolist()
    rows = []
    for n, (q, places) in enumerate(zip(chosen, nearest.tolist(), strict=True)):
        title = f"{'worst' if n < len(worst) else 'random'} query: {query_images.class_names[query.labels[q]]}"
        neighbours = zip(map(images.file, places), similarities[n].tolist(), right[n], strict=True)
        rows.append((title, query_images.file(q), list(neighbours)))
    pictures.neighbours(rows, folder / "neighbours.png", query_images.own)
    files = [query_images.file(row) for row in range(len(query_images))]
    pictures.embedding_map(query.embeddings.numpy(), files, folder / "embedding.png", query_images.own, max_points)


def choose_queries(scores: np.ndarray, count: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Queries worth a look: (indices of the worst, worst first; indices of as many random others), fewer if need be.

    scores (Q,): how well each query went, more is better, NaN for queries that do not count. The seed decides between
    equal scores and draws the random ones.
    """
    random = np.random.default_rng(seed)
    shuffled = random.permutation(np.flatnonzero(~np.isnan(scores)))
    ranked = shuffled[np.argsort(scores[shuffled], kind="stable")]
    return ranked[:count], random.permutation(ranked[count:])[:count]


def draw_hypergraph(folder: Path, network, criterion, loader: DataLoader, at_once: int, device) -> None:
    """hypergraph.png in folder, of an epoch's first batch; at_once: images that the network is given at a time."""
    items = next(loader.batch_sampler.whole())
    images, labels = zip(*(loader.dataset[item] for item in items), strict=True)
    labels = torch.tensor(labels)
    with torch.no_grad():
        network.eval()
        parts = torch.stack(images).to(device).split(at_once)
        X = torch.cat([network(network.normalise(part)) for part in parts])
        H = criterion.cds2hg(X, labels.to(device))[1]
    pictures.hypergraph(H.cpu().numpy(), labels.numpy(), loader.dataset.images.class_names, folder / "hypergraph.png")
