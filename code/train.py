"""Train a network with HIST loss and score it, after every epoch, on classes it never saw.

    python code/train.py @recipes/glyphs.args                  # offline, minutes on two CPU cores
    python code/train.py @recipes/cub.args                     # the paper's recipe for CUB-200-2011
    python code/train.py @recipes/cub.args --seed 2 --tau 24   # flags behind a recipe win
    python code/train.py --resume                              # go on with the newest run of --dataset

A run leaves in logs/DATASET/run_N: DATASET_MODEL_best.pth and its _results.txt, last.pth (to resume from),
results.csv (one row per epoch) and args.json (what made it).
"""

import json
import math
import os
import random
import shlex
import signal
import sys
import time
from pathlib import Path

import checkpoint
import dataset
import flags
import metrics
import net
import numpy as np
import runlog
import torch
from hist import HISTLoss
from torch import nn
from tqdm import tqdm

EVALUATION_BATCH = 150  # as evaluate.py's default, so that both compute the very same figures
# What may differ between a run and its resumption without making it another run.
FREE_ON_RESUME = {
    "resume",
    "run_num",
    "overwrite",
    "log_dir",
    "data_root",
    "nb_epochs",
    "nb_workers",
    "gpu_id",
    "search_memory",
    "remark",
}


class Interrupted(Exception):
    """SIGTERM or Ctrl-C came, and the step under way is done."""


class StopSignals:
    """Turns the first SIGTERM or Ctrl-C into an Interrupted at the next check(); a second one ends at once."""

    def __init__(self):
        self.number = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        if self.number is not None:
            os._exit(128 + number)
        self.number = number

    def check(self):
        if self.number is not None:
            raise Interrupted


def main():
    args, state, run_folder = parse_flags()
    seed_everything(args.seed, args.deterministic)
    device = runlog.choose_device(args.gpu_id)
    print(f"device: {runlog.describe_device(device)}")

    # Data
    benchmark = dataset.load_benchmark(args.dataset, args.data_root, args.train_classes)
    for warning in benchmark.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    train_images, validation_images = benchmark.train, None
    if args.val_classes > 0:
        train_images, validation_images = dataset.split_validation(benchmark.train, args.val_classes, args.seed)
    print(describe_data(benchmark, train_images, validation_images))

    # Network, loss, optimiser
    weights = "none" if state else args.weights
    network = net.build(args.model, args.sz_embedding, weights, args.add_gmp, args.layer_norm, args.bn_freeze)
    network.to(device, memory_format=memory_format(args))
    criterion = HISTLoss(train_images.num_classes, args.sz_embedding, args.hgnn_hidden, args.tau, args.alpha, args.ls)
    criterion.to(device)
    optimizer = make_optimizer(network, criterion, args)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_decay_step, args.lr_decay_gamma)
    millions = [sum(p.numel() for p in module.parameters()) / 1e6 for module in (network, criterion)]
    print(f"network: {args.model}, {millions[0]:.1f} M parameters; loss: {millions[1]:.1f} M")

    # Loaders
    train_loader, evaluation_sets = make_loaders(args, network, benchmark, train_images, validation_images, device)

    # Resume, or begin a folder
    epoch, history, best = -args.warm, [], None  # warm-up epochs are counted up to 0, training epochs from 1
    if state:
        epoch, history, best = restore(state, network, criterion, optimizer, scheduler, args.resume)
        runlog.clear_folder(run_folder, ".*.tmp")
    else:
        run_folder = begin_run_folder(args)
    print(f"run: {run_folder}" + (f", resumed behind epoch {epoch}" if state else ""))
    origin = describe_origin(args, run_folder, device)
    checkpoint.write_text(json.dumps(origin, indent=2) + "\n", run_folder / "args.json")
    stop = StopSignals()

    def finish_epoch(row, started):
        row |= evaluate(network, evaluation_sets, benchmark.recall_at, device, args, stop)
        row["seconds"] = time.monotonic() - started
        history.append(row)
        tqdm.write(runlog.console_line(row, args.nb_epochs))
        return save_epoch(run_folder, args, origin, network, criterion, optimizer, scheduler, history, best)

    # Epochs
    try:
        if not history:
            best = finish_epoch({"phase": "untrained", "epoch": epoch}, time.monotonic())
        while epoch < args.nb_epochs:
            epoch += 1
            warming_up = epoch <= 0
            row, started = {"phase": "warm-up" if warming_up else "train", "epoch": epoch}, time.monotonic()
            if args.warm > 0:
                network.set_backbone_trainable(not warming_up)
            train_loader.batch_sampler.set_epoch(epoch + args.warm)
            title = runlog.epoch_title(row, args.nb_epochs)
            row |= train_epoch(network, criterion, train_loader, optimizer, device, args, title, stop)
            if not warming_up:
                scheduler.step()
            best = finish_epoch(row, started)
    except Interrupted:
        print(f"\n{signal.Signals(stop.number).name}: stopped. {kept(run_folder, history)}", file=sys.stderr)
        sys.exit(128 + stop.number)
    print(summary(run_folder, args, history, best, train_loader.dataset.num_bad))


def parse_flags():
    """(flags, checkpoint to resume from or None, its run folder or None)."""
    parser = flags.train_parser()
    args, given = parser.parse()
    if args.resume is None:
        if args.overwrite and "run_num" not in given:
            raise ValueError("--overwrite needs --run-num N, the run to replace")
        args.run_num = args.run_num if "run_num" in given else None
        return args, None, None
    if args.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if args.resume:
        path = Path(args.resume)
    else:
        runs = args.log_dir / args.dataset
        path = (runs / f"run_{args.run_num}" if "run_num" in given else runlog.newest_run_folder(runs)) / "last.pth"
    state = checkpoint.load(path)
    missing = {
        "flags",
        "criterion_state_dict",
        "optimizer_state_dict",
        "scheduler_state_dict",
        "random_states",
        "history",
        "best",
        "epoch",
    } - state.keys()
    if missing:
        raise ValueError(
            f"{path}: cannot be resumed from, it lacks {', '.join(sorted(missing))}; give a run's last.pth"
        )
    stored = checkpoint.stored_flags(state)
    changed = [
        f"{name} {getattr(args, name)} instead of {stored[name]}"
        for name in sorted(given - FREE_ON_RESUME)
        if name in stored and getattr(args, name) != stored[name]
    ]
    if changed:
        raise ValueError(
            f"{path} was made with other flags ({'; '.join(changed)}): leave them out to resume it, or start a new run"
        )
    args, _ = parser.parse(parser.command_line(stored) + sys.argv[1:])
    args.resume = str(path)
    return args, state, path.resolve().parent


def seed_everything(seed, deterministic):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def describe_data(benchmark, train_images, validation_images):
    parts = [
        ("train", train_images),
        ("validation", validation_images),
        ("test" if benchmark.gallery is None else "query", benchmark.query),
        ("gallery", benchmark.gallery),
    ]
    return f"data: {benchmark.name}, " + ", ".join(
        f"{name} {len(images):,} images of {images.num_classes:,} classes"
        for name, images in parts
        if images is not None
    )


def make_optimizer(network, criterion, args):
    """The four parameter groups in a fixed order, so that a saved state fits again."""
    groups = [
        {"params": network.backbone_parameters(), "lr": args.lr},
        {"params": network.embedding_parameters(), "lr": args.lr},
        {"params": list(criterion.cds2hg.parameters()), "lr": args.lr_ds},
        {"params": list(criterion.hgnn.parameters()), "lr": args.lr * args.lr_hgnn_factor},
    ]
    options = dict(lr=args.lr, weight_decay=args.weight_decay)
    # fused: one pass over the parameters instead of one per arithmetic operation
    if args.optimizer == "adam":
        return torch.optim.Adam(groups, fused=True, **options)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, fused=True, **options)
    return torch.optim.RMSprop(groups, alpha=0.9, momentum=0.9, **options)


def memory_format(args):
    return torch.channels_last if args.channels_last else torch.contiguous_format


def make_loaders(args, network, benchmark, train_images, validation_images, device):
    """(training loader, [(prefix of its figures' names, query loader, gallery loader or None), …])."""
    pixels = dict(mean=network.mean, std=network.std, bgr=network.bgr, scale=network.scale)
    options = dict(workers=args.nb_workers, pin_memory=device.type == "cuda", skip_bad=args.skip_bad_images)
    transform = dataset.train_transform(args.image_size, **pixels)
    train_loader = dataset.make_train_loader(train_images, transform, args.sz_batch, args.seed, args.IPC, **options)

    def evaluation_loader(images):
        if images is None:
            return None
        transform = dataset.eval_transform(args.image_size, **pixels)
        return dataset.make_eval_loader(images, transform, EVALUATION_BATCH, **options)

    evaluation_sets = [("", evaluation_loader(benchmark.query), evaluation_loader(benchmark.gallery))]
    if validation_images is not None:
        evaluation_sets.insert(0, ("val ", evaluation_loader(validation_images), None))
    return train_loader, evaluation_sets


def evaluate(network, evaluation_sets, ks, device, args, stop):
    """{'R@1': …, 'R@2': …} of the test split, and before it {'val R@1': …} of held-out classes if there are any."""
    figures = {}
    for prefix, query_loader, gallery_loader in evaluation_sets:
        options = dict(amp=args.amp == "bf16", channels_last=args.channels_last, after_batch=stop.check)
        found = metrics.evaluate(
            network, query_loader, gallery_loader, ks, device, memory_gib=args.search_memory, **options
        )
        figures |= {prefix + name: value for name, value in found.figures().items()}
    return figures


def train_epoch(network: nn.Module, criterion, loader, optimizer, device, args, title, stop) -> dict[str, float]:
    """One pass over the training images, warm-up or not: means of the loss and its terms, rates, images per second."""
    network.train()
    criterion.train()
    if args.bn_freeze:
        network.freeze_batchnorm_statistics()
    totals, started = np.zeros(3), time.monotonic()
    rates = {
        name: group["lr"]
        for name, group in zip(("lr", "lr_embedding", "lr_ds", "lr_hgnn"), optimizer.param_groups, strict=True)
    }
    with tqdm(total=len(loader) * args.sz_batch, desc=title, unit="img", disable=None, leave=False) as bar:
        for step, (images, labels) in enumerate(loader, start=1):
            images = images.to(device, non_blocking=True, memory_format=memory_format(args))
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
                embeddings = network(images)
            loss = criterion(embeddings, labels)
            terms, arrived = to_host(torch.stack([loss.detach(), criterion.dist_loss, criterion.ce_loss]))
            optimizer.zero_grad()
            loss.backward()
            # The terms were known before the backward pass began, so that this does not hold up a busy GPU.
            arrived()
            if not math.isfinite(terms[0]):
                paths = [loader.dataset.images.paths[index] for index, _ in list(loader.batch_sampler)[step - 1]]
                speeds = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
                raise ValueError(
                    f"the loss is {terms[0]:.4g} in {title}, step {step} of {len(loader)} (dist {terms[1]:.4g}, "
                    f"ce {terms[2]:.4g}; {speeds}); stopped before "
                    f"the optimiser's step, last.pth holds the epoch before. Images of the batch: {', '.join(paths)}"
                )
            optimizer.step()
            totals += terms.numpy()
            bar.set_postfix(dict(zip(("loss", "dist", "ce"), totals / step, strict=True)), refresh=False)
            bar.update(len(labels))
            stop.check()
    seconds = time.monotonic() - started
    means = dict(zip(("loss", "dist_loss", "ce_loss"), (totals / len(loader)).tolist(), strict=True))
    return means | rates | {"images_per_s": len(loader) * args.sz_batch / seconds}


def to_host(values):
    """Start a copy to the host: (tensor there, function that waits until it has arrived)."""
    host = values.to("cpu", non_blocking=True)
    if values.device.type != "cuda":
        return host, lambda: None
    event = torch.cuda.Event()
    event.record()
    return host, event.synchronize


def save_epoch(run_folder, args, origin, network, criterion, optimizer, scheduler, history, best):
    """Save what the newest row of history reached, and return the best row so far.

    The best network goes first and last.pth behind it: killed in between, a resumed run does the epoch again.
    """
    row = history[-1]
    common = {"model_state_dict": network.state_dict(), "epoch": row["epoch"], "figures": runlog.recalls(row), **origin}
    chosen_by = "val R@1" if args.val_classes > 0 else "R@1"
    if row["phase"] == "train" and (best is None or row[chosen_by] > best[chosen_by]):
        best = row
        checkpoint.save(common, best_path(run_folder, args))
        checkpoint.write_text(results_text(best, args), results_path(run_folder, args))
    progress = {
        "criterion_state_dict": criterion.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "random_states": checkpoint.random_states(),
        "history": history,
        "best": best,
    }
    checkpoint.save(common | progress, run_folder / "last.pth")
    checkpoint.write_text(runlog.csv_text(history), run_folder / "results.csv")
    return best


def restore(state, network, criterion, optimizer, scheduler, path):
    """Put a checkpoint back: (epoch that was completed, history, best row)."""
    net.load_network_state(network, checkpoint.network_state(state, path), path)
    try:
        criterion.load_state_dict(state["criterion_state_dict"])
        optimizer.load_state_dict(state["optimizer_state_dict"])
        scheduler.load_state_dict(state["scheduler_state_dict"])
        checkpoint.restore_random_states(state["random_states"])
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: does not fit this run: {' '.join(str(error).split())[:200]}") from error
    return state["epoch"], list(state["history"]), state["best"]


def describe_origin(args, run_folder, device):
    """What made a run: its flags by destination (plain values), commit, versions, device, command."""
    stored = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    stored |= {"resume": None, "overwrite": False, "run_num": int(run_folder.name.removeprefix("run_"))}
    return {"flags": stored, "made_by": {**runlog.environment(device), "command": shlex.join(sys.argv)}}


def begin_run_folder(args):
    parent = args.log_dir / args.dataset
    folder = parent / f"run_{args.run_num}"
    if args.overwrite and folder.is_dir():
        runlog.clear_folder(folder)
        return folder
    return runlog.new_run_folder(parent, args.run_num)


def best_path(run_folder, args):
    return run_folder / f"{args.dataset}_{args.model.replace(':', '_').replace('/', '_')}_best.pth"


def results_path(run_folder, args):
    return best_path(run_folder, args).with_name(best_path(run_folder, args).stem + "_results.txt")


def results_text(best, args):
    lines = [f"Best epoch: {best['epoch']}", f"Chosen by: {protocol(args)}"]
    lines += [f"{name}: {100 * value:.4f}" for name, value in best.items() if "R@" in name]
    return "\n".join([*lines, f"Seed: {args.seed}", f"Remark: {args.remark}"]) + "\n"


def protocol(args):
    if args.val_classes > 0:
        return f"R@1 on {args.val_classes:g} of the training classes, held out (--val-classes)"
    return "R@1 on the test split, the paper's protocol (it flatters; --val-classes 0.1 does not)"


def command_for(script, *words):
    path = os.path.relpath(Path(__file__).parent / script)
    return shlex.join(["python", path, *map(str, words)])


def kept(run_folder, history):
    if not history:
        return f"No epoch was completed, nothing is in {run_folder} to resume from."
    resume = command_for("train.py", "--resume", os.path.relpath(run_folder / "last.pth"))
    return f"Kept: {history[-1]['phase']} epoch {history[-1]['epoch']} in {run_folder}. Go on with: {resume}"


def summary(run_folder, args, history, best, num_bad):
    lines = [""]
    if best:
        lines.append(f"best   epoch {best['epoch']:<4} {runlog.percent(runlog.recalls(best))}")
        lines.append(f"       chosen by {protocol(args)}")
    lines.append(f"last   epoch {history[-1]['epoch']:<4} {runlog.percent(runlog.recalls(history[-1]))}")
    lines.append(f"before training {' ':<5}{runlog.percent(runlog.recalls(history[0]))}")
    if num_bad:
        lines.append(f"{num_bad} training images could not be decoded and were replaced")
    lines.append(f"files  {os.path.relpath(run_folder)}")
    if best:
        words = ["--model-path", os.path.relpath(best_path(run_folder, args))]
        if args.data_root != flags.CODE.parent / "data":
            words += ["--data-root", args.data_root]
        lines.append(f"score  {command_for('evaluate.py', *words)}")
    return "\n".join(lines)


if __name__ == "__main__":
    flags.run_script(main)
