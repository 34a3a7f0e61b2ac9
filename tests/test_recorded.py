"""Recorded steps (code/recorded.py), with a stand-in for the recorder, which needs a GPU."""

import pytest
import recorded
import torch
from conftest import options
from hist import HISTLoss

pytestmark = pytest.mark.usefixtures("undrawn")
CPU = torch.device("cpu")


def spoil(module, samples, num_warmup_iters=3, allow_unused_input=False):
    """Does to a module what make_graphed_callables does before it records, and more."""
    assert allow_unused_input and not torch.is_autocast_cache_enabled()
    for _ in range(num_warmup_iters):
        output = module(*samples)
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            output.sum().backward()  # torch's leaves the gradients alone
        torch.rand(3)
    recordings.append(module)
    return module


recordings = []


@pytest.fixture
def recorder(monkeypatch):
    """A recorder for the CPU; gives what was recorded."""
    recordings.clear()
    monkeypatch.setattr(recorded, "refusal", lambda device: "")
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", spoil)
    return recordings


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))

    def forward(self, images):
        return self.layers(images)


def steps(forward, network, criterion, count=6):
    """Losses of some steps; parameters, buffers and random numbers after them."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD([*network.parameters(), *criterion.parameters()], lr=0.1)
    generator, losses = torch.Generator().manual_seed(2), []
    for _ in range(count):
        images = torch.randn(8, 6, generator=generator)
        loss = criterion(forward(images), torch.randint(3, (8,), generator=generator))
        losses += [loss.item(), criterion.dist_loss.item(), criterion.ce_loss.item()]
        assert not criterion.dist_loss.requires_grad
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = {**network.state_dict(), **criterion.state_dict(), "random": torch.get_rng_state()}
    summary = criterion.hypergraph_summary()
    return losses, state | summary


@pytest.mark.parametrize("amp", [False, True])
def test_recording_moves_nothing(recorder, amp):
    """Buffers, gradients and random numbers are put back; each step is one step on its own batch."""
    outcomes = []
    for record in (False, True):
        network, criterion = Network(), HISTLoss(3, 4, 5)
        forward = recorded.record(network, criterion) if record else network
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            outcomes.append(steps(forward, network, criterion))
    assert len(recorder) == 2  # the network and the loss
    assert outcomes[0][0] == outcomes[1][0]
    assert all(torch.equal(value, outcomes[1][1][name]) for name, value in outcomes[0][1].items())
    steps(recorded.record(network, criterion), network, criterion, recorded.EAGER_STEPS)
    assert len(recorder) == 2  # the first steps of a phase are eager
    steps(recorded.record(network, criterion), network, criterion, recorded.EAGER_STEPS + 1)
    assert len(recorder) == 4


def test_what_refuses_stays_eager_and_says_so_once(recorder, monkeypatch, capsys):
    def refuse(module, *_, **__):
        next(module.buffers()).add_(1)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    network, criterion = Network(), HISTLoss(3, 4, 5)
    outcome = steps(recorded.record(network, criterion), network, criterion)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"steps: eager, the {what} cannot be recorded (operation not permitted when stream is capturing)"
        for what in ("network", "loss")
    ]
    again, criterion = Network(), HISTLoss(3, 4, 5)
    assert outcome[0] == steps(again, again, criterion)[0]


def test_a_run_says_which_way_it_goes_and_resumes_either_way(call, cub, tmp_path, request):
    words = options(cub, tmp_path, "--batch-size", 4, "--cuda-graphs")  # six steps an epoch
    eager = call("train.py", *words, 1, "--epochs", 2)
    assert eager.code == 0 and "steps: eager, --cuda-graphs has no effect: there is no GPU" in eager.out
    recorder = request.getfixturevalue("recorder")
    for first, second, count in ((1, 0, 4), (0, 1, 6)):
        begun = call("train.py", *words, first, "--epochs", 1)
        assert ("steps: recorded after the first 3 of a phase" in begun.out) == bool(first), begun.err
        run = tmp_path / "cub" / f"run_{3 - first}"
        assert call("train.py", "--resume", run, "--epochs", 2, "--cuda-graphs", second).code == 0
        assert len(recorder) == count  # network and loss, in the warm-up and in training
    runs = [torch.load(tmp_path / "cub" / f"run_{n}" / "last.pth", weights_only=True) for n in (1, 2, 3)]
    for part in ("model_state_dict", "criterion_state_dict"):
        for name, value in runs[0][part].items():
            assert all(torch.equal(value, other[part][name]) for other in runs[1:]), name
