"""Training steps whose kernels a GPU launches by itself: --cuda-graphs.

A step of a ResNet-50 launches some two thousand kernels, and at the paper's batch of 32 a fast GPU waits for Python to
launch them. torch.cuda.make_graphed_callables records a forward and a backward pass as one launch each. Not yet run on
a GPU.
"""

from collections.abc import Callable

import distributed
import torch
from hist import HISTLoss
from refused import one_line
from torch import nn

EAGER_STEPS = 3  # at the beginning of a phase, until cuDNN has chosen its convolutions


def refusal(device: torch.device) -> str:
    """Why no step can be recorded here; empty if it can be tried."""
    if device.type != "cuda":
        return "there is no GPU"
    return "there are several processes" if distributed.processes().count > 1 else ""


def way(device: torch.device) -> str:
    """How steps are computed, for the user."""
    why = refusal(device)
    return f"eager, --cuda-graphs has no effect: {why}" if why else f"recorded after the first {EAGER_STEPS} of a phase"


def wrap(network: nn.Module, criterion: nn.Module, device: torch.device, compiled: bool, cuda_graphs: bool) -> tuple:
    """(forward, loss): network and criterion as a phase computes them; by several processes, compiled, recorded.

    To be called at the beginning of each phase: what requires a gradient is part of all three.
    """
    forward, loss = distributed.wrap(network, device), distributed.wrap(criterion, device)
    forward = torch.compile(forward) if compiled else forward
    if cuda_graphs and not refusal(device):
        forward = record(forward, criterion)
    return forward, loss


def record(forward: Callable, criterion: nn.Module) -> Callable:
    """forward as it will be recorded; HIST's computation is replaced in the criterion itself, its checks stay."""
    if isinstance(criterion, HISTLoss):  # others choose pairs and triplets, and wait for their number
        criterion.compute = Recorded(criterion, type(criterion).compute.__get__(criterion), "the loss")
    return Recorded(forward, forward, "the network")


class Recorded:
    """compute(*tensors), eager a few times and then recorded; eager for good where that fails. Each call is one step.

    module holds the parameters and buffers that compute uses. Inputs have the same shapes in every call.
    """

    def __init__(self, module: nn.Module, compute: Callable, name: str):
        self.module, self.compute, self.name, self.eager_steps = module, compute, name, EAGER_STEPS

    def __call__(self, *inputs: torch.Tensor):
        if self.eager_steps == 0:
            self.compute = self.recorded(inputs)
        self.eager_steps -= 1
        outputs = self.compute(*inputs)
        if isinstance(outputs, torch.Tensor):
            return outputs
        return outputs[0], *(output.detach() for output in outputs[1:])  # a recording asks gradients of all of them

    def recorded(self, inputs: tuple[torch.Tensor, ...]) -> Callable:
        """compute as a recording. Making it runs compute a few times: all that this moves is put back in place."""
        samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
        buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        gradients = [(parameter, parameter.grad) for parameter in self.module.parameters()]
        for parameter, _ in gradients:
            parameter.grad = None
        device = inputs[0].device
        try:
            # The converted weights that autocast keeps for a step would belong to the recording: cache_enabled=False.
            amp = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type), False
            with torch.random.fork_rng([device] * (device.type == "cuda")), torch.autocast(device.type, *amp):
                graphed = torch.cuda.make_graphed_callables(
                    Computation(self.module, self.compute), samples, allow_unused_input=True
                )
        except Exception as error:  # whatever the network does that cannot be recorded
            print(f"steps: eager, {self.name} cannot be recorded ({one_line(error)[:150]})")
            return self.compute
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for parameter, gradient in gradients:
                parameter.grad = gradient
        return graphed


class Computation(nn.Module):
    """A module of its own for each recording, which replaces its forward: network and loss stay as they are."""

    def __init__(self, module: nn.Module, compute: Callable):
        super().__init__()
        self.module, self.compute = module, compute

    def forward(self, *inputs: torch.Tensor):
        return self.compute(*inputs)
