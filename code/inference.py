"""From images to embeddings, and from those to retrieval figures."""

from typing import NamedTuple

import distributed
import metrics
import torch
from torch import Tensor
from tqdm import tqdm


class Embedded(NamedTuple):
    """embeddings (N, D) float32 and labels (N,) int64 on the CPU, and which images of the data set they are, (N,)."""

    embeddings: Tensor
    labels: Tensor
    rows: Tensor


@torch.inference_mode()
def embed(network, loader, device, amp=False, channels_last=False, description="embed", after_batch=lambda: None):
    """Embeddings of every image of a loader, in its order -> Embedded. The network is left in eval mode.

    Images that a loader with skip_bad could not decode (label -1) are left out. amp: bf16 autocast. after_batch is
    called after every batch and may raise to stop. With several processes each embeds its share, every one gets all:
    process r of n has to be given a loader of the images r, r + n, r + 2n, … and all of them the same data set.
    """
    network.eval()
    device = torch.device(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    rank, count = distributed.processes()
    total = len(loader.dataset)
    if total == 0:
        raise ValueError("there is no image to embed")
    share = len(range(rank, total, count))
    embeddings, labels, done = None, torch.empty(share, dtype=torch.int64), 0
    with tqdm(total=total, desc=description, unit="img", disable=None, leave=False) as bar:
        for images, targets in loader:
            images = images.to(device, non_blocking=True, memory_format=layout)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                batch = network(images).float()
            if embeddings is None:
                # Collected on the device: reading every batch back would make the host wait for each of them.
                embeddings = torch.empty(share, batch.shape[1], device=device)
            embeddings[done : done + len(batch)] = batch
            labels[done : done + len(batch)] = targets
            done += len(batch)
            bar.update(len(batch) * count)
            after_batch()
    if embeddings is None:  # fewer images than processes
        embeddings = torch.empty(0, network.embedding_size, device=device)
    embeddings, labels = (distributed.gather_shares(x, total).cpu() for x in (embeddings, labels.to(device)))
    decoded = labels >= 0
    return Embedded(embeddings[decoded], labels[decoded], decoded.nonzero()[:, 0])


def evaluate(
    network,
    query_loader,
    gallery_loader,
    ks,
    device,
    amp=False,
    channels_last=False,
    memory_gib=1.0,
    precision=False,
    after_batch=lambda: None,
) -> tuple[metrics.Retrieval, Embedded, Embedded | None]:
    """Embed the loaders and search, every query among the gallery or, if that is None, among all other queries.

    Returns the figures and what was embedded: (Retrieval, query, gallery or None).
    """
    options = dict(amp=amp, channels_last=channels_last, after_batch=after_batch)
    query = embed(network, query_loader, device, description="embed queries" if gallery_loader else "embed", **options)
    gallery = None
    if gallery_loader is not None:
        gallery = embed(network, gallery_loader, device, description="embed gallery", **options)
    sets = (*query[:2], *(gallery[:2] if gallery else (None, None)))
    return metrics.retrieval(*sets, ks, precision, memory_gib, device, progress=True), query, gallery
