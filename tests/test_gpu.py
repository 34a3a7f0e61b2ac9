"""What a GPU would make of the training step, as far as a machine without one can tell.

What only a GPU can show is checked by benchmarks/gpu.py.
"""

import copy
import pickle
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import flags
import losses
import metrics
import net
import pytest
import torch
from hist import HISTLoss
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

# What torch.use_deterministic_algorithms refuses on CUDA tensors (its documentation, and the names in torch 2.14's
# library), by the names that reach the device, but for what is of one or three dimensions and no network of images can
# take. On the CPU torch refuses none of them.
REFUSED = set(
    """
    _adaptive_avg_pool2d_backward adaptive_max_pool2d_backward _embedding_bag_dense_backward
    _embedding_bag_per_sample_weights_backward grid_sampler_2d_backward histc index_reduce_ max_unpool2d median
    nanmedian nll_loss2d_backward nll_loss2d_forward put_ replication_pad2d_backward scatter_reduce_
    upsample_bicubic2d_backward upsample_bilinear2d_backward
    """.split()
)


class Recorded(TorchDispatchMode):
    """The names of the operations that reach the device, forward and backward."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def train_network(model):
    for add_gmp in (False, True):
        net.build(model, 8, "none", add_gmp=add_gmp).train()(torch.randn(2, 3, 64, 64)).sum().backward()


def train_loss(name):
    criterion = HISTLoss(5, 8, 4) if name == "hist" else losses.build(name, 5, 8)
    criterion(torch.randn(12, 8, requires_grad=True), torch.arange(12) % 5).backward()


def search(gallery):
    X, T = torch.randn(60, 8), torch.arange(60) % 7
    metrics.retrieval(X, T, *((X, T) if gallery else ()), precision=True)


CALLS = [(train_network, model) for model in ("resnet18", "resnet50", "googlenet", "bn_inception")]
CALLS += [*((train_loss, name) for name in flags.LOSSES), (search, False), (search, True)]


@pytest.mark.parametrize(("work", "what"), CALLS)
def test_nothing_takes_what_a_gpu_refuses_under_deterministic(work, what):
    with Recorded() as recorded:
        work(what)
    assert recorded.names & {"convolution_backward", "sum", "mm"} and not recorded.names & REFUSED


@pytest.fixture
def fake_gpu(monkeypatch):
    """Tensors on a GPU that is not there: shapes and devices are checked, values do not exist.

    Whatever would wait for the device to learn a number fails.
    """
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch was built without CUDA, it knows no such tensors")

    monkeypatch.setattr(torch.cuda, "Event", Mock)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        try:
            torch.randn(2).uniform_()[:, None]
        except RuntimeError:
            pytest.skip("this torch (2.6 does) asks a driver even about tensors that are not there")
        yield


@pytest.mark.usefixtures("fake_gpu")
def test_the_fake_gpu_notices():
    with pytest.raises(DataDependentOutputException):
        torch.randn(3).max().item()
    with pytest.raises(RuntimeError, match="device"):
        torch.randn(3) + torch.randn(3, device="cpu")


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("ls", [0, 1])
def test_the_loss_asks_a_gpu_for_no_number(ls):
    criterion = HISTLoss(50, 16, 8, ls=ls)
    loss = criterion(torch.randn(32, 16), torch.randint(0, 50, (32,)))
    assert loss.device.type == criterion.dist_loss.device.type == "cuda" and loss.shape == ()


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("model", ["resnet18", "bn_inception"])  # torchvision's googlenet reads numbers when it is made
def test_the_networks_ask_a_gpu_for_no_number(model):
    network = net.build(model, 8, "none")
    for training in (True, False):
        assert network.train(training)(torch.randn(2, 3, 64, 64)).device.type == "cuda"


def test_a_loss_with_labels_still_to_be_looked_at_can_be_copied():
    criterion = HISTLoss(5, 8, 4)
    criterion._label_range = (torch.tensor([0, 9]), threading.Lock())  # cannot be copied, as an event cannot
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(twin.cds2hg.means, criterion.cds2hg.means)
        twin(torch.randn(4, 8), torch.arange(4))
    with pytest.raises(ValueError, match="previous call"):
        criterion._label_range = (torch.tensor([0, 9]), SimpleNamespace(synchronize=lambda: None))
        criterion(torch.randn(4, 8), torch.arange(4))


@pytest.mark.parametrize("model", ["resnet18", "googlenet", "bn_inception", "timm:efficientnet_b0"])
def test_synchronised_batchnorm_is_the_same_network(model):
    network = net.build(model, 8, "none").eval()
    images, names = torch.randn(1, 3, network.image_size, network.image_size), list(network.state_dict())
    with torch.no_grad():
        before = network(images)
        network.synchronise_batchnorm()
        assert torch.equal(network(images), before)
    assert list(network.state_dict()) == names
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in network.modules())
