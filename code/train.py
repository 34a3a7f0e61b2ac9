"""Train a network with HIST loss and score it, after every epoch, on classes it never saw.

    python code/train.py @recipes/glyphs.args                  # offline, minutes on two CPU cores
    python code/train.py @recipes/cub.args                     # the paper's recipe for CUB-200-2011
    python code/train.py --resume logs/glyphs/run_1            # go on with a run

run.py says what a run leaves in logs/DATASET/run_N.
"""

import math
import os
import random
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import dataset
import distributed
import flags
import inference
import net
import numpy as np
import recorded
import run
import summary
import torch
from distributed import StopSignals
from hist import HISTLoss
from refused import Refused
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

RATES = ("lr", "lr_embedding", "lr_ds", "lr_hgnn")  # columns of results.csv, one per parameter group
OPTIMIZERS = {  # fused: one pass over the parameters instead of one per arithmetic operation
    "adam": (torch.optim.Adam, dict(fused=True)),
    "adamw": (torch.optim.AdamW, dict(fused=True)),
    "sgd": (torch.optim.SGD, dict(fused=True, momentum=0.9, nesterov=True)),
    "rmsprop": (torch.optim.RMSprop, dict(alpha=0.9, momentum=0.9)),
}
PAIR_LOSSES = ("multi_similarity", "triplet", "contrastive")  # learn from images of one class in a batch


def main() -> None:
    # Flags, and the last.pth of a run to go on with
    args, state = run.parse_flags()

    # Device
    device = distributed.start(args.gpu_id)
    processes = distributed.processes()
    seed_everything(args.seed, args.deterministic)
    distributed.announce(device, args.gpu_id)
    if times := inference.slow_bf16(args.amp, device, training=True):
        print(f"warning: a convolution takes {times:.1f} times as long in bf16 on this CPU; "
              f"{'a new run with ' * bool(state)}--amp off should train faster", file=sys.stderr)  # fmt: skip
    if args.cuda_graphs:
        print(f"steps: {recorded.way(device)}")

    # Data
    benchmark, images = load_data(args)
    data = {split: dataset.fingerprint(listed) for split, listed in images.items()}
    changed = run.data_changes(state, data, args) if state else ""
    print(summary.describe_data(benchmark.name, images))
    megapixels, seconds = dataset.decoding_cost(images["train"]) if benchmark.query.own else (0, 0)
    if megapixels > 4:  # decoding one takes longer than a small network to train on it
        seconds *= sum(map(len, images.values())) / max(1, min(args.nb_workers, dataset.available_cores()))
        print(f"note: the pictures have {megapixels:.0f} megapixels; decoding takes {seconds / 60:.1f} minutes an "
              f"epoch or more; to shrink them once: {summary.shrink(args.data_root)}")  # fmt: skip

    # Network, loss, optimiser
    network, image_size = make_network(args, "none" if state else args.weights, device)
    criterion = make_criterion(images["train"].num_classes, args).to(device)
    optimizer = make_optimizer(network, criterion, args)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_decay_step, args.lr_decay_gamma)
    millions = [sum(p.numel() for p in module.parameters()) / 1e6 for module in (network, criterion)]
    print(f"network: {args.model}, {millions[0]:.1f} M parameters; loss: {args.loss}, {millions[1]:.1f} M")

    # Loaders: all images in order to score, random batches to train on
    options = (image_size, flags.EVALUATION_BATCH, args.nb_workers, device)
    loaders = {split: inference.make_loader(listed, *options) for split, listed in images.items() if split != "train"}
    batches = (args.sz_batch, args.seed, args.IPC, args.nb_workers, device.type == "cuda", distributed.processes())
    loaders["train"] = dataset.make_train_loader(images["train"], dataset.train_transform(image_size), *batches)

    # The run's folder, or the run to go on with
    parts = dict(network=network, criterion=criterion, optimizer=optimizer, scheduler=scheduler)
    stop = StopSignals()
    log = run.Run(args, image_size, device, parts, data, state, changed)
    print(f"run: {log.folder}" + (f", resumed after epoch {log.epoch}" if state else ""))
    if state and log.done:
        print(f"nothing left to do, {log.epoch} of {log.epoch} epochs are done; a larger --epochs trains longer")

    # Epochs: warm-up epochs count up to 0, training epochs from 1
    try:
        if not log.history:
            finish_epoch({"phase": "untrained", "epoch": log.epoch}, time.monotonic(), log, loaders, benchmark, stop)
        first = log.epoch + 1
        for phase, epochs in (("warm-up", range(first, 1)), ("train", range(max(first, 1), args.nb_epochs + 1))):
            if not epochs:
                continue
            if args.warm > 0:
                network.set_backbone_trainable(phase == "train")
            forward, loss = recorded.wrap(network, criterion, device, args.compile, args.cuda_graphs)
            for epoch in epochs:
                row, started = {"phase": phase, "epoch": epoch}, time.monotonic()
                title = summary.epoch_title(row, args.nb_epochs)
                loaders["train"].batch_sampler.set_epoch(epoch + args.warm)
                row |= train_epoch(parts, forward, loss, loaders["train"], device, args, title, stop)
                if phase == "train":
                    scheduler.step()
                finish_epoch(row, started, log, loaders, benchmark, stop)
    except distributed.Interrupted:
        print(f"\n{signal.Signals(stop.number).name}: stopped. {summary.kept(log)}", file=sys.stderr)
        distributed.stop()
        sys.exit(128 + stop.number)
    finally:
        log.close()
    if processes.rank == 0:  # the others keep no history
        print(summary.summary(log, flags.DATA, dataset.available_cores()))
    distributed.stop()


# ---------------------------------------------------------------- what is trained, and on what


def seed_everything(seed: int, deterministic: bool) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def load_data(args: Namespace) -> tuple[dataset.Benchmark, dict[str, dataset.ImageList]]:
    """(benchmark, {split: images}): train, query, validation if classes are held out, gallery if there is one."""
    benchmark = dataset.load_benchmark(
        args.dataset, args.data_root, args.train_classes, skip_bad=args.skip_bad_images, workers=args.nb_workers
    )
    inference.announce(benchmark)
    train_images, held_out = benchmark.train, None
    if args.val_classes > 0:
        train_images, held_out = dataset.split_validation(benchmark.train, args.val_classes, args.seed)
    images = dict(train=train_images, validation=held_out, query=benchmark.query, gallery=benchmark.gallery)
    return benchmark, {split: listed for split, listed in images.items() if listed is not None}


def make_network(args: Namespace, weights: str, device: torch.device) -> tuple[net.EmbeddingNet, int]:
    """The network on its device, and the size of its images: the network's own where no flag says it."""
    if weights not in ("imagenet", "none"):
        # prepare.py puts them below a data root, which own pictures are not in
        places = (Path(weights), args.data_root / weights, flags.DATA / weights)
        weights = next((place for place in places if place.is_file()), weights)
    network = net.build(args.model, args.sz_embedding, weights, args.add_gmp, args.layer_norm, args.bn_freeze)
    image_size = args.image_size or network.image_size
    net.require_image_size(network, image_size)
    network.to(device, memory_format=inference.memory_format(args.channels_last))
    if device.type == "cuda" and distributed.processes().count > 1 and not args.bn_freeze:
        network.synchronise_batchnorm()  # statistics of the whole batch, which torch has on GPUs alone
    return network, image_size


def make_criterion(num_classes: int, args: Namespace) -> nn.Module:
    if args.loss == "hist":
        if args.loss_args:
            raise Refused("--loss-args: hist has flags of its own, --tau, --alpha, --ls and --hgnn-hidden")
        return HISTLoss(num_classes, args.sz_embedding, args.hgnn_hidden, args.tau, args.alpha, args.ls)
    if args.loss in PAIR_LOSSES and not args.IPC and args.sz_batch <= num_classes:
        print(f"warning: --loss {args.loss} compares images of one class, of which a batch of {args.sz_batch} out of "
              f"{num_classes:,} classes hardly has any; give --IPC 4", file=sys.stderr)  # fmt: skip
    import losses  # imports pytorch-metric-learning, which takes a second

    return losses.build(args.loss, num_classes, args.sz_embedding, args.loss_args)


def make_optimizer(network: net.EmbeddingNet, criterion: nn.Module, args: Namespace) -> torch.optim.Optimizer:
    """The parameter groups in a fixed order, so that a saved state fits again; RATES names them."""
    groups = [
        {"params": network.backbone_parameters(), "lr": args.lr},
        {"params": list(network.model.embedding.parameters()), "lr": args.lr},
    ]
    if args.loss == "hist":
        groups += [
            {"params": list(criterion.cds2hg.parameters()), "lr": args.lr_ds},
            {"params": list(criterion.hgnn.parameters()), "lr": args.lr * args.lr_hgnn_factor},
        ]
    elif proxies := list(criterion.parameters()):
        groups += [{"params": proxies, "lr": args.lr_ds}]
    kind, options = OPTIMIZERS[args.optimizer]
    return kind(groups, lr=args.lr, weight_decay=args.weight_decay, **options)


# ---------------------------------------------------------------- one epoch


def train_epoch(
    parts: dict, forward: Callable, loss_of: Callable, loader: DataLoader, device: torch.device, args, title: str, stop
) -> dict[str, float]:
    """One pass over the training images, warm-up or not: {means of the loss and its terms, rates, images per second}.

    forward and loss_of compute the network and criterion of parts, as they are or for several processes or compiled.
    """
    network, criterion, optimizer = parts["network"], parts["criterion"], parts["optimizer"]
    network.train()
    criterion.train()
    if args.bn_freeze:
        network.freeze_batchnorm_statistics()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    names = ["loss"]  # and the terms that HIST makes it of
    if args.loss == "hist":
        names += ["dist_loss", "ce_loss"] if args.ls else ["dist_loss"]
    totals, waited, rates = 0.0, 0.0, rates_of(optimizer)
    layout = inference.memory_format(args.channels_last)
    with tqdm(total=len(loader) * args.sz_batch, desc=title, unit="img", disable=None, leave=False) as bar:
        started = asked = time.monotonic()
        for step, (images, labels) in enumerate(loader, start=1):
            waited += time.monotonic() - asked
            images = network.normalise(images.to(device, non_blocking=True, memory_format=layout))
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"), distributed.together():
                embeddings = forward(images)
            embeddings, labels = distributed.gather_batch(embeddings, labels)
            loss = loss_of(embeddings, labels)
            terms = torch.stack([loss.detach(), *(getattr(criterion, name) for name in names[1:])])
            terms = terms.to("cpu", non_blocking=True)
            copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            optimizer.zero_grad()
            with distributed.together():
                loss.backward()
            if copied:  # the terms were known before the backward pass began, so this does not hold up a busy GPU
                copied.synchronize()
            if not math.isfinite(terms[0]):
                where = f": the loss is {terms[0]:.4g} in {title}, step {step} of {len(loader)}"
                figures = dict(zip(names[1:], terms[1:].tolist(), strict=True)) | rates
                indices = list(loader.batch_sampler.whole())[step - 1]
                images = ", ".join(loader.dataset.images.paths[index] for index, _ in indices)
                raise diverged(where, figures, f". Images of the batch: {images}")
            optimizer.step()
            totals = totals + terms.double().numpy()
            means = {name.removesuffix("_loss"): mean for name, mean in zip(names, totals / step, strict=True)}
            bar.set_postfix(means, refresh=False)
            bar.update(len(labels))
            stop.check()
            asked = time.monotonic()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    distributed.share_buffers(network)
    seconds = time.monotonic() - started
    row = dict(zip(names, (totals / len(loader)).tolist(), strict=True)) | rates
    if args.loss == "hist" and args.ls:
        row |= {name: value.item() for name, value in criterion.hypergraph_summary().items()}
    row |= {"images_per_s": len(loader) * args.sz_batch / seconds, "data_time": waited / seconds}
    if device.type == "cuda":
        row["gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row


def rates_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return dict(zip(RATES, (group["lr"] for group in optimizer.param_groups), strict=False))


def diverged(where: str, figures: dict, images: str = "") -> Refused:
    said = ", ".join(f"{name.removesuffix('_loss')} {value:.4g}" for name, value in figures.items())
    return Refused(
        f"training diverged{where} ({said}); last.pth holds the epoch before. Smaller learning rates may help "
        f"(--lr, --lr-ds, --lr-hgnn-factor){images}"
    )


def finish_epoch(row: dict, started: float, log: run.Run, loaders: dict, benchmark, stop: StopSignals) -> None:
    """Score the network on the held-out classes, if there are any, and on the test split; save and draw it."""
    args, network, criterion = log.args, log.parts["network"], log.parts["criterion"]
    options = (log.device, args.amp == "bf16", args.channels_last, stop.check)
    try:
        for prefix, *splits in [("val ", "validation", None), ("", "query", "gallery")]:  # the last one is drawn
            if splits[0] in loaders:
                query, gallery = (inference.embed(network, loaders.get(split), *options) for split in splits)
                found = inference.score(query, gallery, benchmark.recall_at, log.device, args.search_memory)
                row |= {prefix + name: value for name, value in found.figures().items()}
    except inference.NotFinite as error:
        if row["phase"] == "untrained":
            raise Refused(f"before any training, {error}: look at the values in --weights {args.weights}") from None
        where = f" in {summary.epoch_title(row, args.nb_epochs)}: {error}"
        raise diverged(where, rates_of(log.parts["optimizer"])) from None
    row["seconds"] = time.monotonic() - started
    if not distributed.is_first():
        return
    log.add(row)
    log.doubt = inference.doubt(query, gallery)
    at_once = args.sz_batch // distributed.processes().count  # as in training: that much fits the memory

    def draw(folder: Path, points: int) -> None:
        inference.draw_search(folder, found, query, gallery, benchmark, points)
        if args.loss == "hist":
            inference.draw_hypergraph(folder, network, criterion, loaders["train"], at_once, log.device)

    log.draw(draw)


if __name__ == "__main__":
    flags.run_script(main)
