"""Measures the whole training step: without flags, with each option that makes it faster, and with all of them.

The step is train.py's own (train.train_epoch, train.make_optimizer), after the warm-up, on one synthetic batch that is
already on the device: no image is read. Its limit is measured too, the network alone (forward and backward pass, no
loss, no optimiser). Without flags it is float32, eager, with the fused Adam; on GPUs convolutions use TF32, torch's
default. On GPUs the step is also recorded (--cuda-graphs 1).

    python benchmarks/train_step.py                             # ResNet-50, 224 pixels, batches of 32 and 128
    python benchmarks/train_step.py --device cpu --batch-sizes 32
    python benchmarks/train_step.py --quick                     # does it run? some minutes, most of them compiling

A GPU is timed by events in its own queue. Compiling, the first steps and the search for the fastest convolutions are
not timed.
"""

import argparse
import functools
import gc
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from measure import Stopwatch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))

import flags  # noqa: E402
import inference  # noqa: E402
import net  # noqa: E402
import recorded  # noqa: E402
import summary  # noqa: E402
import train  # noqa: E402
from hist import HISTLoss  # noqa: E402

BF16, CHANNELS_LAST, COMPILE = ["--amp", "bf16"], ["--channels-last", "1"], ["--compile", "1"]
RECORDED = ["--cuda-graphs", "1"]
PLAIN, ALL = ([], True), (BF16 + CHANNELS_LAST + COMPILE + RECORDED, True)
# What is measured: flags of train.py, and whether the optimiser is the fused one, as train.py's is.
OPTIONS = {
    "no flags": PLAIN,
    "torch's unfused optimiser (no flag gives it)": ([], False),
    "channels last": (CHANNELS_LAST, True),
    "bf16": (BF16, True),
    "bf16, channels last": (BF16 + CHANNELS_LAST, True),
    "compiled network": (COMPILE, True),
    "recorded": (RECORDED, True),
    "bf16, channels last, recorded": (BF16 + CHANNELS_LAST + RECORDED, True),
    "all of them": ALL,
}
FEW_CLASSES, MANY_CLASSES = 100, 11_318  # CUB-200-2011, Stanford Online Products


class OneBatch:
    """Stands in for the training loader: the same batch over and over, a mark before each and after the last."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, steps: int, stopwatch: Stopwatch):
        self.batch, self.steps, self.stopwatch = (images, labels), steps, stopwatch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        for _ in range(self.steps):
            self.stopwatch.mark()
            yield self.batch
        self.stopwatch.mark()


class Step:
    """Network, loss and optimiser as train.py has them after the warm-up, and a batch. Same words, same numbers.

    words: flags of train.py; fused: whether the optimiser is the fused one; backend: what --compile compiles with.
    """

    def __init__(
        self, words: list[str], fused: bool, num_classes: int, device: torch.device, backend: str = "inductor"
    ):
        train.seed_everything(1, deterministic=False)
        torch.compiler.reset()  # or else a second batch size would be compiled for all sizes at once
        args = self.args = flags.train_parser().parse(words)[0]
        self.device, self.fused = device, fused
        self.network = net.build(args.model, args.sz_embedding, "none", args.add_gmp, args.layer_norm, args.bn_freeze)
        self.network.to(device, memory_format=inference.memory_format(args.channels_last))
        self.compiled = torch.compile(self.network, backend=backend) if args.compile else self.network
        shape = (args.sz_batch, 3, args.image_size, args.image_size)
        self.images = torch.randint(256, shape, dtype=torch.uint8).to(device)
        self.use_classes(num_classes)

    def use_classes(self, num_classes: int) -> None:
        """A new loss, optimiser and labels; what was compiled stays, it does not depend on the classes."""
        args = self.args
        self.criterion = HISTLoss(num_classes, args.sz_embedding, args.hgnn_hidden, args.tau, args.alpha, args.ls)
        self.criterion.to(self.device)
        self.optimizer = train.make_optimizer(self.network, self.criterion, args)
        for group in self.optimizer.param_groups:
            group |= {"fused": self.fused, "foreach": False}
        labels = torch.randint(num_classes, (args.sz_batch,))
        self.labels = labels.pin_memory() if self.device.type == "cuda" else labels  # as from the training loader
        self.start_phase(backbone=True)

    def start_phase(self, backbone: bool) -> None:
        """As train.py begins the warm-up, in which the backbone does not train, and the epochs after it."""
        self.network.set_backbone_trainable(backbone)
        self.forward = self.compiled
        if self.args.cuda_graphs and not recorded.refusal(self.device):
            self.forward = recorded.record(self.compiled, self.criterion)

    def epoch(self, batches, loss=None) -> dict:
        """The row of train.train_epoch on these batches: a list, or anything else with a length."""
        parts = dict(network=self.network, criterion=self.criterion, optimizer=self.optimizer)
        stop = SimpleNamespace(check=lambda: None)
        loss = loss or self.criterion
        return train.train_epoch(parts, self.forward, loss, batches, self.device, self.args, "the epoch", stop)

    def train(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of each whole step, and of the loss in it: forward, and backward as far as the embeddings."""
        stopwatch = Stopwatch(self.device)

        def loss(embeddings, labels):
            stopwatch.mark()
            embeddings.register_hook(lambda gradient: stopwatch.mark())
            return self.criterion(embeddings, labels)

        self.epoch(OneBatch(self.images, self.labels, steps, stopwatch), loss)
        parts = np.array(stopwatch.seconds()).reshape(steps, 3)
        return parts.sum(axis=1), parts[:, 1]

    @torch.no_grad()
    def score(self) -> None:
        """Embeds a batch as scoring does."""
        shape = (flags.EVALUATION_BATCH, *self.images.shape[1:])
        images = torch.randint(256, shape, dtype=torch.uint8, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp == "bf16"):
            layout = inference.memory_format(self.args.channels_last)
            self.network.eval()(self.network.normalise(images.to(memory_format=layout)))

    def run_network(self, steps: int) -> tuple[np.ndarray, None]:
        """Seconds of each forward and backward pass of the network alone."""
        self.network.train()
        self.network.freeze_batchnorm_statistics()
        stopwatch = Stopwatch(self.device)
        normalised = self.network.normalise(self.images)
        gradient = torch.randn(self.args.sz_batch, self.args.sz_embedding, device=self.device)
        for _ in range(steps):
            stopwatch.mark()
            images = normalised.to(memory_format=inference.memory_format(self.args.channels_last))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp == "bf16"):
                embeddings = self.forward(images)
            self.network.zero_grad()
            embeddings.backward(gradient)
        stopwatch.mark()
        return np.array(stopwatch.seconds()), None


def measure(run, warmup: int, steps: int, device: torch.device) -> tuple[np.ndarray, np.ndarray | None, str]:
    """What run(steps) gives once run(warmup) is done, and the highest use of the GPU's memory meanwhile."""
    run(warmup)
    gc.collect()  # reference cycles may still hold the network that was measured before
    if device.type != "cuda":
        return *run(steps), "-"
    torch.cuda.reset_peak_memory_stats(device)
    return *run(steps), f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f}"


def milliseconds(seconds: np.ndarray) -> str:
    return f"{1000 * np.median(seconds):.1f} ({1000 * seconds.min():.1f} to {1000 * seconds.max():.1f})"


def compare_options(words: list[str], batch_size: int, warmup: int, steps: int, device: torch.device) -> None:
    print(
        "| | images/s | times no flags | ms a step (fastest to slowest) | peak GPU memory, GiB |\n|---|---|---|---|---|"
    )
    options = {name: more for name, more in OPTIONS.items() if device.type == "cuda" or "recorded" not in name}
    cases = [(name, more, Step.train) for name, more in options.items()]
    cases += [
        ("network alone, no flags", PLAIN, Step.run_network),
        ("network alone, all of them", ALL, Step.run_network),
    ]
    plain = None
    for name, (more, fused), measured in cases:
        step = Step(words + more, fused, FEW_CLASSES, device)
        seconds, _, gib = measure(functools.partial(measured, step), warmup, steps, device)
        rate = batch_size / np.median(seconds)
        plain = plain or rate
        print(f"| {name} | {rate:.1f} | {rate / plain:.2f} | {milliseconds(seconds)} | {gib} |", flush=True)


def share_of_the_loss(words: list[str], warmup: int, steps: int, device: torch.device) -> None:
    print("\n| | classes | ms a step | ms of it the loss | share | peak GPU memory, GiB |\n|---|---|---|---|---|---|")
    for name, (more, fused) in (("no flags", PLAIN), ("all of them", ALL)):
        for num_classes in (FEW_CLASSES, MANY_CLASSES):
            step = Step(words + more, fused, num_classes, device)
            seconds, loss, gib = measure(step.train, warmup, steps, device)
            print(
                f"| {name} | {num_classes:,} | {milliseconds(seconds)} | {milliseconds(loss)} "
                f"| {np.median(loss / seconds):.1%} | {gib} |",
                flush=True,
            )


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=gpu, help="default cuda if there is a GPU")
    parser.add_argument("--model", default="resnet50", help="a name that train.py's --model takes")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--steps", type=int, help="steps that are timed (default 5 on the CPU, 50 on a GPU)")
    parser.add_argument("--quick", action="store_true", help="resnet18, 64 pixels, batches of 8: does it run?")
    if parser.parse_args().quick:
        parser.set_defaults(model="resnet18", image_size=64, batch_sizes=[8])
    return parser.parse_args()


def main() -> None:
    args = parse_flags()
    device = torch.device(args.device)
    steps = args.steps or (5 if device.type == "cpu" else 50)
    warmup = 2 if device.type == "cpu" else 10
    print(", ".join(f"{name} {value}" for name, value in summary.environment(device).items()))
    for batch_size in args.batch_sizes:
        print(f"\n{args.model}, {args.image_size}×{args.image_size}, batch {batch_size}, {FEW_CLASSES} classes\n")
        words = ["--model", args.model, "--image-size", str(args.image_size), "--batch-size", str(batch_size)]
        compare_options(words, batch_size, warmup, steps, device)
        share_of_the_loss(words, warmup, steps, device)


if __name__ == "__main__":
    main()
