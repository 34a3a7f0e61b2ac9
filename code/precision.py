"""bf16 where the CPU has no arithmetic for it: there --amp bf16 takes many times as long as float32.

Neither the CPU's name nor torch's version tells, so one convolution is measured in both: less than a second.
"""

import sys
import time
from argparse import Namespace

import distributed
import torch
import torch.nn.functional as F

SLOWER = 1.2  # times float32's time; less is within the noise of the measurement


def slowdown(device: torch.device, channels_last: bool, training: bool) -> float:
    """How many times as long a convolution takes in bf16 as in float32, on a CPU: process 0's answer. 0 if no longer.

    training: forward and backward; some CPUs have bf16 for the former only.
    """
    if device.type != "cpu":
        return 0.0
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.ones(8, 64, 14, 14).to(memory_format=layout)
    weight = torch.ones(64, 64, 3, 3, requires_grad=True)
    seconds = {False: [], True: []}
    for bf16 in [False, True] * 4 if distributed.is_first() else []:
        started = time.perf_counter()
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            total = F.conv2d(images, weight, padding=1).sum()
        if training:
            total.backward()
        seconds[bf16].append(time.perf_counter() - started)
    ratio = min(seconds[True], default=0) / min(seconds[False], default=1)
    return distributed.from_all(ratio if ratio > SLOWER else 0.0)[0]


def warn(times: float, way_out: str) -> None:
    print(f"warning: --amp bf16: on this CPU it takes {times:.1f} times as long as float32; {way_out}", file=sys.stderr)


def to_train_with(args: Namespace, device: torch.device, resumed: bool) -> None:
    """Says how slowly --amp bf16 trains here. It was asked for, now or when the run began: it stays."""
    if args.amp == "bf16" and (times := slowdown(device, args.channels_last, training=True)):
        warn(times, f"{'a new run with ' * resumed}--amp off trains faster")


def to_score_with(args: Namespace, given: set[str], device: torch.device) -> str:
    """The --amp to score a checkpoint with: that of its training, unless float32 is faster and --amp was not given."""
    if args.amp != "bf16" or not (times := slowdown(device, args.channels_last, training=False)):
        return args.amp
    if "amp" in given:
        warn(times, "--amp off scores faster")
        return args.amp
    print(f"precision: float32; on this CPU the checkpoint's bf16 takes {times:.1f} times as long (--amp bf16 uses it)")
    return "off"
