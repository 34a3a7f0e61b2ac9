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
import distributed
import flags
import inference
import metrics
import net
import numpy as np
import pictures
import runlog
import torch
from hist import HISTLoss
from tqdm import tqdm

EVALUATION_BATCH = 150  # as evaluate.py's default, so that both compute the same figures, on the CPU to the bit
RATES = ("lr", "lr_embedding", "lr_ds", "lr_hgnn")  # columns of results.csv, one per parameter group there is
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
    "wandb",
    "remark",
}


class Interrupted(Exception):
    """SIGTERM or Ctrl-C came, and the step under way is done."""


class StopSignals:
    """Notes the first SIGTERM or Ctrl-C, for the loops to stop at the next step; a second one ends at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        if self.number:
            os._exit(128 + number)
        self.number = number

    def check(self):
        """Raise Interrupted; of several processes none may leave alone, they agree in gather_batch."""
        if self.number and distributed.processes().count == 1:
            raise Interrupted


def main():
    args, state, run_folder = parse_flags()
    gpu_id = distributed.start(args.gpu_id)
    processes = distributed.processes()
    seed_everything(args.seed, args.deterministic)
    device = runlog.choose_device(gpu_id)
    print(f"device: {runlog.describe_device(device)}" + (f", {processes.count} processes" * (processes.count > 1)))

    # Data
    benchmark = dataset.load_benchmark(args.dataset, args.data_root, args.train_classes)
    for warning in benchmark.warnings if processes.rank == 0 else ():
        print(f"warning: {warning}", file=sys.stderr)
    if benchmark.query.num_classes < 2 and processes.rank == 0:
        root = benchmark.query.root
        print(
            f"warning: {root}: only one class to test on, figures say nothing; is it the right folder?", file=sys.stderr
        )
    train_images, validation_images = benchmark.train, None
    if args.val_classes > 0:
        train_images, validation_images = dataset.split_validation(benchmark.train, args.val_classes, args.seed)
    print(describe_data(benchmark, train_images, validation_images))

    # Network, loss, optimiser
    weights = "none" if state else args.weights
    network = net.build(args.model, args.sz_embedding, weights, args.add_gmp, args.layer_norm, args.bn_freeze)
    args.image_size = args.image_size or network.image_size
    network.to(device, memory_format=memory_format(args))
    if not args.bn_freeze:
        distributed.synchronise_batchnorm(network, device)
    criterion = make_criterion(train_images.num_classes, args).to(device)
    optimizer = make_optimizer(network, criterion, args)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_decay_step, args.lr_decay_gamma)
    millions = [sum(p.numel() for p in module.parameters()) / 1e6 for module in (network, criterion)]
    print(f"network: {args.model}, {millions[0]:.1f} M parameters; loss: {args.loss}, {millions[1]:.1f} M")

    # Loaders
    train_loader, evaluation_sets = make_loaders(args, network, benchmark, train_images, validation_images, device)

    # Resume, or begin a folder
    epoch, history, best = -args.warm, [], None  # warm-up epochs are counted up to 0, training epochs from 1
    if state:
        epoch, history, best = restore(state, network, criterion, optimizer, scheduler, args.resume)
    elif processes.rank == 0:
        run_folder = begin_run_folder(args)
    run_folder = distributed.from_first(run_folder)
    log = RunFolder(run_folder, args, device, history, best, state.get("wandb_id") if state else None)
    print(f"run: {run_folder}" + (f", resumed behind epoch {epoch}" if state else ""))
    if state and epoch >= args.nb_epochs:
        print(f"nothing left to do, {epoch} of {args.nb_epochs} epochs are done: --epochs N goes on longer")
    stop = StopSignals()

    def finish_epoch(row, started):
        figures, searched = evaluate(network, evaluation_sets, benchmark.recall_at, device, args, stop)
        row |= figures | {"seconds": time.monotonic() - started}
        if processes.rank == 0:
            log.add(row, network, criterion, optimizer, scheduler)
            log.refresh_pictures(network, criterion, train_loader, benchmark, searched, device)

    # Epochs
    try:
        if not history:
            finish_epoch({"phase": "untrained", "epoch": epoch}, time.monotonic())
        forward = loss = None
        while epoch < args.nb_epochs:
            epoch += 1
            warming_up = epoch <= 0
            row, started = {"phase": "warm-up" if warming_up else "train", "epoch": epoch}, time.monotonic()
            if args.warm > 0:
                network.set_backbone_trainable(not warming_up)
            if forward is None or epoch == 1:  # other parameters train from here on
                forward, loss = distributed.wrap(network, device), distributed.wrap(criterion, device)
                forward = torch.compile(forward) if args.compile else forward
            train_loader.batch_sampler.set_epoch(epoch + args.warm)
            title = runlog.epoch_title(row, args.nb_epochs)
            row |= train_epoch(network, forward, criterion, loss, train_loader, optimizer, device, args, title, stop)
            if not warming_up:
                scheduler.step()
            finish_epoch(row, started)
    except Interrupted:
        if processes.rank == 0:
            print(f"\n{signal.Signals(stop.number).name}: stopped. {log.kept()}", file=sys.stderr)
        distributed.stop()
        sys.exit(128 + stop.number)
    finally:
        log.finish()
    if processes.rank == 0:
        print(log.summary(train_loader.dataset.num_bad))
    distributed.stop()


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


def make_criterion(num_classes, args):
    if args.loss == "hist":
        if args.loss_args:
            raise ValueError("--loss-args: hist has flags of its own, --tau, --alpha, --ls and --hgnn-hidden")
        return HISTLoss(num_classes, args.sz_embedding, args.hgnn_hidden, args.tau, args.alpha, args.ls)
    import losses  # imports pytorch-metric-learning, which takes a second

    return losses.build(args.loss, num_classes, args.sz_embedding, args.loss_args)


def make_optimizer(network, criterion, args):
    """The parameter groups in a fixed order, so that a saved state fits again; RATES names them."""
    groups = [
        {"params": network.backbone_parameters(), "lr": args.lr},
        {"params": network.embedding_parameters(), "lr": args.lr},
    ]
    if args.loss == "hist":
        groups += [
            {"params": list(criterion.cds2hg.parameters()), "lr": args.lr_ds},
            {"params": list(criterion.hgnn.parameters()), "lr": args.lr * args.lr_hgnn_factor},
        ]
    elif proxies := list(criterion.parameters()):
        groups += [{"params": proxies, "lr": args.lr_ds}]
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
    options = dict(
        workers=args.nb_workers,
        pin_memory=device.type == "cuda",
        skip_bad=args.skip_bad_images,
        shard=distributed.processes(),
    )
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
    """Score the test split, and before it the held-out classes if there are any.

    Returns ({'R@1': …, 'R@2': …, 'val R@1': …}, (Retrieval, query, gallery or None) of the test split).
    """
    figures, searched = {}, None
    options = dict(amp=args.amp == "bf16", channels_last=args.channels_last, after_batch=stop.check)
    for prefix, query_loader, gallery_loader in evaluation_sets:
        searched = inference.evaluate(
            network, query_loader, gallery_loader, ks, device, memory_gib=args.search_memory, **options
        )
        figures |= {prefix + name: value for name, value in searched[0].figures().items()}
    return figures, searched


def train_epoch(network, forward, criterion, loss_of, loader, optimizer, device, args, title, stop):
    """One pass over the training images, warm-up or not: {means of the loss and its terms, rates, images per second}.

    forward and loss_of compute network and criterion, as they are or wrapped for several processes or compiled.
    """
    network.train()
    criterion.train()
    if args.bn_freeze:
        network.freeze_batchnorm_statistics()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    totals, started = 0.0, time.monotonic()
    rates = dict(zip(RATES, (group["lr"] for group in optimizer.param_groups), strict=False))
    with tqdm(total=len(loader) * args.sz_batch, desc=title, unit="img", disable=None, leave=False) as bar:
        for step, (images, labels) in enumerate(loader, start=1):
            images = images.to(device, non_blocking=True, memory_format=memory_format(args))
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
                embeddings = forward(images)
            embeddings, labels, stop_number = distributed.gather_batch(embeddings, labels, stop.number)
            loss = loss_of(embeddings, labels)
            names, values = zip(*terms_of(loss, criterion).items(), strict=True)
            short = [name.removesuffix("_loss") for name in names]
            terms, arrived = to_host(torch.stack(values))
            optimizer.zero_grad()
            loss.backward()
            # The terms were known before the backward pass began, so that this does not hold up a busy GPU.
            arrived()
            if not math.isfinite(terms[0]):
                paths = [loader.dataset.images.paths[index] for index, _ in list(loader.batch_sampler)[step - 1]]
                said = [f"{name} {value:.4g}" for name, value in zip(short[1:], terms[1:].tolist(), strict=True)]
                said += [f"{name} {rate:.3g}" for name, rate in rates.items()]
                raise ValueError(
                    f"the loss is {terms[0]:.4g} in {title}, step {step} of {len(loader)} ({', '.join(said)}); "
                    "stopped before the optimiser's step, last.pth holds the epoch before. "
                    f"Images of the batch: {', '.join(paths)}"
                )
            optimizer.step()
            totals = totals + terms.double().numpy()
            bar.set_postfix(dict(zip(short, totals / step, strict=True)), refresh=False)
            bar.update(len(labels))
            if stop_number:
                stop.number = stop_number
                raise Interrupted
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.monotonic() - started
    means = dict(zip(names, (totals / len(loader)).tolist(), strict=True))
    row = means | rates | {"images_per_s": len(loader) * args.sz_batch / seconds}
    if device.type == "cuda":
        row["gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row


def terms_of(loss, criterion):
    """The loss of a step, and the terms that HIST makes it of: {column of results.csv: scalar on the device}."""
    terms = {name: getattr(criterion, name, None) for name in ("dist_loss", "ce_loss")}
    return {"loss": loss.detach()} | {name: value for name, value in terms.items() if value is not None}


def to_host(values):
    """Start a copy to the host: (tensor there, function that waits until it has arrived)."""
    host = values.to("cpu", non_blocking=True)
    if values.device.type != "cuda":
        return host, lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(values.device))
    return host, event.synchronize


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


def begin_run_folder(args):
    parent = args.log_dir / args.dataset
    folder = parent / f"run_{args.run_num}"
    if args.overwrite and folder.is_dir():
        runlog.clear_folder(folder)
        return folder
    return runlog.new_run_folder(parent, args.run_num)


class RunFolder:
    """What a run leaves behind: checkpoints, table, text, pictures, wandb. Process 0 alone writes."""

    def __init__(self, folder, args, device, history, best, wandb_id):
        self.folder, self.args, self.history, self.best = folder, args, history, best
        self.best_path = folder / runlog.best_name(args.dataset, args.model)
        self.results_path = folder / f"{self.best_path.stem}_results.txt"
        self.drawing_seconds, self.started = 0.0, time.monotonic()
        number = folder.name.removeprefix("run_")
        stored = flags.plain(args)
        stored |= {"resume": None, "overwrite": False, "run_num": int(number) if number.isdigit() else args.run_num}
        self.origin = {
            "flags": stored,
            "made_by": {**runlog.environment(device), "command": shlex.join(sys.argv)},
            "wandb_id": wandb_id,
        }
        self.wandb = None
        if distributed.processes().rank == 0:
            runlog.clear_folder(folder, ".*.tmp")
            tags = [args.dataset, args.model, f"seed {args.seed}", *args.remark.split()]
            config = stored | self.origin["made_by"]
            self.wandb = runlog.start_wandb(args.wandb, args.dataset, folder, config, tags, wandb_id)
            if self.wandb:
                self.origin["wandb_id"] = self.wandb.id
            checkpoint.write_text(json.dumps(self.origin, indent=2) + "\n", folder / "args.json")

    def add(self, row, network, criterion, optimizer, scheduler):
        """Print a row and save what it reached.

        The best network goes first and last.pth behind it: killed in between, a resumed run does the epoch again.
        """
        made_by = self.origin["made_by"]
        self.history.append(row | {"seed": self.args.seed, "commit": made_by["commit"], "torch": made_by["torch"]})
        tqdm.write(runlog.console_line(row, self.args.nb_epochs))
        common = {
            # on the CPU, for readers elsewhere that do not say where to
            "model_state_dict": {name: value.cpu() for name, value in network.state_dict().items()},
            "epoch": row["epoch"],
            "figures": runlog.recalls(row),
            **self.origin,
        }
        chosen_by = "val R@1" if self.args.val_classes > 0 else "R@1"
        if row["phase"] == "train" and (self.best is None or row[chosen_by] > self.best[chosen_by]):
            self.best = row
            checkpoint.save(common, self.best_path)
            checkpoint.write_text(self.results_text(), self.results_path)
        progress = {
            "criterion_state_dict": criterion.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "scheduler_state_dict": scheduler.state_dict(),
            "random_states": checkpoint.random_states(),
            "history": self.history,
            "best": self.best,
        }
        checkpoint.save(common | progress, self.folder / "last.pth")
        checkpoint.write_text(runlog.csv_text(self.history), self.folder / "results.csv")
        runlog.log_to_wandb(self.wandb, row, self.best)

    def refresh_pictures(self, network, criterion, train_loader, benchmark, searched, device):
        """Draw curves, neighbours, a hypergraph and a map of embeddings; anew while that takes little of the time."""
        begun, last = time.monotonic(), self.history[-1]["epoch"] == self.args.nb_epochs
        if self.drawing_seconds > 0.03 * (begun - self.started) and not last:
            return
        pictures.curves(self.history, self.folder / "curves.png")
        found, query, gallery = searched
        pictures.search(
            self.folder, found.per_query, query, benchmark.query, gallery, benchmark.gallery, metrics.nearest
        )
        if self.args.loss == "hist":
            self.draw_hypergraph(network, criterion, train_loader, device)
        runlog.pictures_to_wandb(self.wandb, self.folder)
        self.drawing_seconds += time.monotonic() - begun

    def draw_hypergraph(self, network, criterion, train_loader, device):
        items = next(iter(train_loader.batch_sampler))
        images, labels = zip(*(train_loader.dataset[item] for item in items), strict=True)
        with torch.no_grad():
            network.eval()
            labels = torch.tensor(labels, device=device)
            H = criterion.cds2hg(network(torch.stack(images).to(device)), labels)[1]
        class_names = train_loader.dataset.images.class_names
        pictures.hypergraph(H.cpu().numpy(), labels.cpu().numpy(), class_names, self.folder / "hypergraph.png")

    def finish(self):
        if self.wandb:
            self.wandb.finish()

    def protocol(self):
        if self.args.val_classes > 0:
            return f"R@1 on {self.args.val_classes:g} of the training classes, held out (--val-classes)"
        return "R@1 on the test split, the paper's protocol (it flatters; --val-classes 0.1 does not)"

    def results_text(self):
        lines = [f"Best epoch: {self.best['epoch']}", f"Chosen by: {self.protocol()}"]
        lines += [f"{name}: {100 * value:.4f}" for name, value in self.best.items() if "R@" in name]
        lines += [f"Seed: {self.args.seed}", f"Remark: {self.args.remark}"]
        # the command stays out: a run that was resumed leaves the same text as one that was not
        lines += [
            f"{what.capitalize()}: {value}" for what, value in self.origin["made_by"].items() if what != "command"
        ]
        return "\n".join(lines) + "\n"

    def kept(self):
        if not self.history:
            return f"No epoch was completed, nothing is in {self.folder} to resume from."
        resume = command_for("train.py", "--resume", os.path.relpath(self.folder / "last.pth"))
        last = self.history[-1]
        return f"Kept: {last['phase']} epoch {last['epoch']} in {self.folder}. Go on with: {resume}"

    def summary(self, num_bad):
        lines, best, last = [""], self.best, self.history[-1]
        if best:
            lines.append(f"best   epoch {best['epoch']:<4} {runlog.percent(runlog.recalls(best))}")
            lines.append(f"       chosen by {self.protocol()}")
        lines.append(f"last   epoch {last['epoch']:<4} {runlog.percent(runlog.recalls(last))}")
        lines.append(f"untrained {' ':<8}{runlog.percent(runlog.recalls(self.history[0]))}")
        if best and best["R@1"] < self.history[0]["R@1"]:
            lines.append("       better than the best epoch: train longer (--epochs), or look at the learning rates")
        if num_bad:
            lines.append(f"{num_bad} training images could not be decoded and were replaced")
        lines.append(f"files  {os.path.relpath(self.folder)}")
        if best:
            words = ["--model-path", os.path.relpath(self.best_path)]
            if self.args.data_root != flags.CODE.parent / "data":
                words += ["--data-root", self.args.data_root]
            if self.args.skip_bad_images:
                words.append("--skip-bad-images")
            lines.append(f"score  {command_for('evaluate.py', *words)}")
        if best and self.args.dataset == "folder" and self.args.data_root.is_dir():
            words = ["--model-path", os.path.relpath(self.folder), "--gallery", self.args.data_root]
            lines.append(f"search {command_for('retrieve.py', *words)} --query IMAGE_OR_FOLDER")
        return "\n".join(lines)


def command_for(script, *words):
    path = os.path.relpath(Path(__file__).parent / script)
    return shlex.join(["python", path, *map(str, words)])


if __name__ == "__main__":
    flags.run_script(main)
