"""Tests of the loss (code/hist.py): figures of the paper's code, a slow twin written from the equations, hard inputs.

The twin is plain loops over samples and classes in float64; its gradients come from autograd through those loops.

    pytest tests/test_hist.py
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hist import HGNN, CDs2Hg, HISTLoss, propagation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

GOLDEN = Path(__file__).parent / "golden"
CASES = ["loss_small", "loss_repeated_classes"]
BUFFERS = ["hgnn.bn1.running_mean", "hgnn.bn1.running_var", "hgnn.bn1.num_batches_tracked"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def relative(found, expected):
    """Distance of two tensors relative to the norm of the second."""
    found, expected = (torch.as_tensor(t).detach().double() for t in (found, expected))
    assert found.shape == expected.shape
    return ((found - expected).norm() / expected.norm().clamp(min=1e-300)).item()


# The twin ---------------------------------------------------------------------------------------------------------


def slow_distances(X, means, log_vars):
    """Step 1 and 2: the squared Mahalanobis distance of every sample to every class."""
    x = [row / row.square().sum().sqrt() for row in X]
    mu = [row / row.square().sum().sqrt() for row in means]
    variances = [torch.exp(torch.clamp(row, 0, 6)) for row in log_vars]
    return [[((x_i - mu_c) ** 2 / var_c).sum() for mu_c, var_c in zip(mu, variances, strict=True)] for x_i in x]


def slow_cross_entropy(scores, T):
    """Mean of -log softmax at the label; the largest score is taken out so that nothing overflows or underflows."""
    losses = []
    for row, label in zip(scores, T.tolist(), strict=True):
        largest = max(score.item() for score in row)
        losses.append(largest + torch.log(sum(torch.exp(score - largest) for score in row)) - row[label])
    return sum(losses) / len(losses)


def slow_incidence(distances, T, alpha):
    """Step 4: one column per class present, in ascending order."""
    classes = sorted(set(T.tolist()))
    one = torch.ones((), dtype=torch.float64)
    rows = [
        [one if label == c else torch.exp(-alpha * distances[i][c]) for c in classes]
        for i, label in enumerate(T.tolist())
    ]
    return torch.stack([torch.stack(row) for row in rows])


def slow_propagation(H, W=None):
    """Step 5: G, entry by entry."""
    N, E = H.shape
    W = [1.0] * E if W is None else W
    row_sums = [sum(H[i, e] * W[e] for e in range(E)) for i in range(N)]
    column_sums = [sum(H[i, e] for i in range(N)) for e in range(E)]
    return torch.stack(
        [
            torch.stack(
                [
                    sum(H[i, e] * W[e] * H[j, e] / column_sums[e] for e in range(E))
                    / (row_sums[i] * row_sums[j]).sqrt()
                    for j in range(N)
                ]
            )
            for i in range(N)
        ]
    )


def slow_network(X, G, state, training):
    """Step 6: the two layers; returns the logits and the BatchNorm statistics afterwards."""
    N = len(X)
    hidden = G @ torch.stack([state["theta1.weight"] @ x + state["theta1.bias"] for x in X])
    mean, variance = state["bn1.running_mean"], state["bn1.running_var"]
    statistics = mean, variance
    if training:
        mean = sum(hidden) / N
        variance = sum((row - mean) ** 2 for row in hidden) / N
        statistics = (
            0.9 * state["bn1.running_mean"] + 0.1 * mean,
            0.9 * state["bn1.running_var"] + 0.1 * variance * N / (N - 1),
        )
    normal = (hidden - mean) / (variance + 1e-5).sqrt() * state["bn1.weight"] + state["bn1.bias"]
    active = torch.where(normal > 0, normal, 0.1 * normal)
    return G @ torch.stack([state["theta2.weight"] @ row + state["theta2.bias"] for row in active]), statistics


def slow_loss(X, T, state, tau, alpha, ls, training=True):
    """All eight steps; state maps the names of a HISTLoss's state dict to float64 tensors."""
    distances = slow_distances(X, state["cds2hg.means"], state["cds2hg.log_vars"])
    dist_loss = slow_cross_entropy([[-tau * d for d in row] for row in distances], T)
    H = slow_incidence(distances, T, alpha)
    G = slow_propagation(H)
    hgnn = {name.removeprefix("hgnn."): value for name, value in state.items() if name.startswith("hgnn.")}
    logits, statistics = slow_network(X, G, hgnn, training)
    ce_loss = slow_cross_entropy(logits, T)
    return {
        "dist_loss": dist_loss,
        "ce_loss": ce_loss,
        "loss": dist_loss + ls * ce_loss,
        "H": H,
        "G": G,
        "logits": logits,
        "statistics": statistics,
    }


# Criteria and batches ---------------------------------------------------------------------------------------------


def make(num_classes, embedding_size, hidden=4, dtype=torch.float64, seed=0, **options):
    """A HISTLoss none of whose parameters is at a special value: log-variances on both sides of 0 and 6, say."""
    generator = torch.Generator().manual_seed(seed)
    criterion = HISTLoss(num_classes, embedding_size, hidden, **options).to(dtype)
    with torch.no_grad():
        for parameter in criterion.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        criterion.cds2hg.log_vars.mul_(3)
        criterion.hgnn.bn1.running_mean.copy_(torch.randn(hidden, generator=generator))
        criterion.hgnn.bn1.running_var.copy_(0.5 + torch.rand(hidden, generator=generator))
    return criterion


def make_batch(labels, embedding_size, dtype=torch.float64, seed=0):
    X = torch.randn(len(labels), embedding_size, generator=torch.Generator().manual_seed(seed + 1))
    return X.to(dtype).requires_grad_(), torch.tensor(labels)


def double_state(criterion):
    """A float64 copy of the state dict; the parameters collect gradients."""
    parameters = dict(criterion.named_parameters())
    return {
        name: value.detach().double().clone().requires_grad_(name in parameters)
        for name, value in criterion.state_dict().items()
    }


def assert_equals_twin(criterion, X, T, tolerance):
    """Loss, its terms, every gradient and the BatchNorm statistics of a call against the twin.

    With ls = 0 the HGNN takes no part: the twin's gradients of it are zero.
    """
    state, slow_X = double_state(criterion), X.detach().double().clone().requires_grad_()
    twin = slow_loss(slow_X, T, state, criterion.cds2hg.tau, criterion.cds2hg.alpha, criterion.ls, criterion.training)
    twin["loss"].backward()
    loss = criterion(X, T)
    loss.backward()

    scale = twin["loss"].item()
    terms = [(loss, "loss"), (criterion.dist_loss, "dist_loss"), (criterion.ce_loss, "ce_loss")]
    for found, name in terms[: 3 if criterion.ls else 2]:
        assert abs(found.item() - twin[name].item()) <= tolerance * max(scale, 1e-3), name
    gradients = {"X": (X.grad, slow_X.grad)}
    for name, p in criterion.named_parameters():
        gradients[name] = (torch.zeros_like(p) if p.grad is None else p.grad, state[name].grad)
    # A gradient that vanishes altogether is compared on the scale of the whole.
    whole = torch.cat([expected.flatten() for _, expected in gradients.values()]).norm()
    for name, (found, expected) in gradients.items():
        error = (found.double() - expected).norm()
        assert error <= 10 * tolerance * torch.maximum(expected.norm(), 1e-2 * whole + 1e-6), name
    statistics = (criterion.hgnn.bn1.running_mean, criterion.hgnn.bn1.running_var)
    for found, expected in zip(statistics, twin["statistics"], strict=True):
        assert criterion.ls == 0 or relative(found, expected) <= tolerance


# Figures of the paper's code --------------------------------------------------------------------------------------


@pytest.fixture(params=CASES)
def golden(request):
    """(figures, criterion in train mode, X with gradient, T) of one case."""
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        figures = {name: torch.as_tensor(file[name]) for name in file.files}
    N, D = figures["X"].shape
    criterion = HISTLoss(
        len(figures["cds2hg.means"]),
        D,
        len(figures["hgnn.theta1.bias"]),
        tau=figures["tau"].item(),
        alpha=figures["alpha"].item(),
        ls=figures["ls"].item(),
    )
    criterion.load_state_dict({name: figures[name] for name in criterion.state_dict()}, strict=True)
    return figures, criterion, figures["X"].requires_grad_(), figures["T"]


def test_golden_state_dict_names(golden):
    figures, criterion, _, _ = golden
    names = [name for name in figures if name.startswith(("cds2hg.", "hgnn."))]
    assert sorted(criterion.state_dict()) == sorted(names)
    assert all(criterion.state_dict()[name].shape == figures[name].shape for name in names)


def test_golden_loss_and_gradients(golden):
    figures, criterion, X, T = golden
    loss = criterion(X, T)
    loss.backward()
    assert relative(loss, figures["loss"]) < 1e-5
    assert relative(criterion.dist_loss, figures["dist_loss"]) < 1e-5
    assert relative(criterion.ce_loss, figures["ce_loss"]) < 1e-5
    assert relative(X.grad, figures["grad.X"]) < 1e-4
    for name, parameter in criterion.named_parameters():
        assert relative(parameter.grad, figures[f"grad.{name}"]) < 1e-4, name
    for name in ("hgnn.bn1.running_mean", "hgnn.bn1.running_var"):
        assert relative(criterion.state_dict()[name], figures[f"after.{name}"]) < 1e-5, name
    assert criterion.hgnn.bn1.num_batches_tracked.item() == 1


def test_golden_hypergraph_and_logits(golden):
    figures, criterion, X, T = golden
    dist_loss, H = criterion.cds2hg(X, T)
    assert relative(dist_loss, figures["dist_loss"]) < 1e-5
    assert relative(H, figures["H"]) < 1e-5
    assert relative(propagation(H), figures["G"]) < 1e-5
    assert relative(criterion.hgnn(X, H), figures["logits"]) < 1e-5


def test_golden_loss_from_its_parts(golden):
    """CDs2Hg and HGNN put together by hand, as the paper's code does, give loss and gradients of HISTLoss."""
    figures, criterion, X, T = golden
    dist_loss, H = criterion.cds2hg(X, T)
    loss = dist_loss + criterion.ls * F.cross_entropy(criterion.hgnn(X, H), T)
    loss.backward()
    assert relative(loss, figures["loss"]) < 1e-5
    assert relative(X.grad, figures["grad.X"]) < 1e-4
    assert relative(criterion.cds2hg.log_vars.grad, figures["grad.cds2hg.log_vars"]) < 1e-4


# The twin, over shapes --------------------------------------------------------------------------------------------


@st.composite
def batches(draw):
    num_classes = draw(st.integers(1, 5))
    labels = draw(st.lists(st.integers(0, num_classes - 1), min_size=2, max_size=6))
    options = {
        "tau": draw(st.sampled_from([0.5, 16.0, 32.0])),
        "alpha": draw(st.sampled_from([0.1, 0.9, 2.0])),
        "ls": draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
    }
    return num_classes, labels, draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(0, 999)), options


@settings(deadline=None, max_examples=40, derandomize=True)
@given(batches(), st.booleans())
def test_twin_over_shapes(batch, training):
    num_classes, labels, embedding_size, hidden, seed, options = batch
    criterion = make(num_classes, embedding_size, hidden, seed=seed, **options).train(training)
    X, T = make_batch(labels, embedding_size, seed=seed)
    assert_equals_twin(criterion, X, T, 1e-8)


@pytest.mark.parametrize(
    ("num_classes", "labels"),
    [
        (2, [0, 1]),
        (2, [1, 1]),
        (2, [0, 1, 1, 0, 1]),
        (7, [3, 3, 3, 3]),
        (7, [6, 0]),
        (6, [5, 5, 0, 0, 2, 2]),
        (5, [0, 1, 2, 3, 4]),
        (1, [0, 0, 0]),
    ],
    ids=[
        "two classes",
        "two classes, one present",
        "two classes, repeated",
        "one class present",
        "two samples",
        "repeated",
        "all different",
        "one class",
    ],
)
def test_twin_named_batches(num_classes, labels):
    criterion = make(num_classes, 6, seed=3)
    X, T = make_batch(labels, 6)
    assert_equals_twin(criterion, X, T, 1e-9)


def test_twin_in_float32_at_a_real_size():
    criterion = HISTLoss(60, 512, 32)
    X, T = make_batch([i % 11 for i in range(24)], 512, torch.float32)
    assert_equals_twin(criterion, F.layer_norm(X, (512,)).detach().requires_grad_(), T, 1e-5)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(batches())
def test_twin_of_the_parts(batch):
    """CDs2Hg, propagation and HGNN one by one, gradients included."""
    num_classes, labels, embedding_size, hidden, seed, options = batch
    criterion = make(num_classes, embedding_size, hidden, seed=seed, **options)
    X, T = make_batch(labels, embedding_size, seed=seed)
    state, slow_X = double_state(criterion), X.detach().clone().requires_grad_()
    twin = slow_loss(slow_X, T, state, options["tau"], options["alpha"], options["ls"])

    dist_loss, H = criterion.cds2hg(X, T)
    G = propagation(H)
    logits = criterion.hgnn(X, H)
    assert H.shape == (len(T), len(set(labels)))
    torch.testing.assert_close(dist_loss, twin["dist_loss"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(H, twin["H"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(G, twin["G"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logits, twin["logits"], rtol=1e-7, atol=1e-7)

    # Any function of H: its gradient reaches the embeddings, the means and the log-variances.
    weights = torch.randn(H.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = torch.autograd.grad((H * weights).sum(), [X, criterion.cds2hg.means, criterion.cds2hg.log_vars])
    names = ["cds2hg.means", "cds2hg.log_vars"]
    expected = (
        torch.autograd.grad(
            (twin["H"] * weights).sum(), [slow_X, *(state[n] for n in names)], allow_unused=True, materialize_grads=True
        )
        if twin["H"].requires_grad
        else [torch.zeros_like(t) for t in found]
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 999), st.booleans())
def test_twin_of_propagation_with_weights(N, E, seed, weighted):
    generator = torch.Generator().manual_seed(seed)
    H = 0.01 + torch.rand(N, E, dtype=torch.float64, generator=generator)
    W = 0.1 + torch.rand(E, dtype=torch.float64, generator=generator) if weighted else None
    torch.testing.assert_close(propagation(H, W), slow_propagation(H, W), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("labels", [[0, 2, 2, 1], [1, 1], [2, 0, 2]])
def test_gradcheck_of_the_whole_loss(labels):
    """Finite differences, in float64, with regard to the embeddings and every parameter."""
    criterion = make(3, 3, hidden=3, tau=4.0, seed=11)
    names = [name for name, _ in criterion.named_parameters()]
    X, T = make_batch(labels, 3)

    def loss(X, *parameters):
        return torch.func.functional_call(criterion, dict(zip(names, parameters, strict=True)), (X, T))

    parameters = [p.detach().clone().requires_grad_() for p in criterion.parameters()]
    assert torch.autograd.gradcheck(loss, (X, *parameters), eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=True)


# What a user may rely on ------------------------------------------------------------------------------------------


def test_terms_are_readable_and_add_up():
    criterion = make(5, 8, ls=0.7)
    assert criterion.dist_loss is None and criterion.ce_loss is None
    X, T = make_batch([0, 4, 4, 2], 8)
    loss = criterion(X, T)
    assert not criterion.dist_loss.requires_grad and not criterion.ce_loss.requires_grad
    assert loss.item() == pytest.approx(criterion.dist_loss.item() + 0.7 * criterion.ce_loss.item(), rel=1e-12)
    assert loss.shape == () and loss.requires_grad


@pytest.mark.parametrize("ls", [0.0, 0.7])
def test_compute_is_the_loss_without_its_checks(ls):
    """What a recording or a compiler needs: nothing is read back, no attribute is set, shapes are known beforehand."""
    criterion, (X, T) = make(5, 8, ls=ls), make_batch([0, 4, 4, 2], 8)
    before = dict(vars(criterion))
    loss, *terms = criterion.compute(X, T)
    assert vars(criterion) == before
    assert torch.equal(loss, criterion(X, T)) and loss.requires_grad
    assert not any(term.requires_grad for term in terms)
    shown = [criterion.dist_loss, criterion.ce_loss, *criterion._hypergraph]
    assert all(torch.equal(one, other) for one, other in zip(terms, shown[: len(terms)], strict=True))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # its tensors have no values that could be read
        assert criterion.compute(mode.from_tensor(X), mode.from_tensor(T))[0].shape == ()


def test_order_of_the_batch_does_not_matter():
    criterion = make(9, 16, dtype=torch.float32)
    X, T = make_batch([0, 4, 4, 2, 8, 8, 8, 1], 16, torch.float32)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    loss = criterion(X, T)
    (gradient,) = torch.autograd.grad(loss, X)
    shuffled = X.detach()[order].requires_grad_()
    other = criterion(shuffled, T[order])
    (other_gradient,) = torch.autograd.grad(other, shuffled)
    assert relative(other, loss) < 1e-6
    assert relative(other_gradient, gradient[order]) < 1e-4


def test_length_of_an_embedding_matters_to_the_network_alone():
    """Distances are of unit vectors; the HGNN works on the raw embeddings."""
    criterion = make(4, 8)
    X, T = make_batch([0, 1, 1, 3], 8)
    criterion(X, T)
    dist_loss, ce_loss = criterion.dist_loss, criterion.ce_loss
    criterion(X * torch.tensor([[0.5], [2.0], [3.0], [10.0]]), T)
    assert relative(criterion.dist_loss, dist_loss) < 1e-12
    assert relative(criterion.ce_loss, ce_loss) > 1e-3


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_other_integer_types(dtype):
    criterion = make(5, 8)
    X, T = make_batch([0, 4, 4, 2], 8)
    assert torch.equal(criterion(X, T.to(dtype)), criterion(X, T))


def test_eval_mode_takes_one_sample_and_moves_no_statistics():
    criterion = make(5, 8).eval()
    X, T = make_batch([3], 8)
    before = {name: criterion.state_dict()[name].clone() for name in BUFFERS}
    assert_equals_twin(criterion, X, T, 1e-9)
    assert all(torch.equal(criterion.state_dict()[name], before[name]) for name in BUFFERS)


def test_train_mode_moves_the_statistics():
    criterion = make(5, 8)
    X, T = make_batch([3, 0, 1], 8)
    before = {name: criterion.state_dict()[name].clone() for name in BUFFERS}
    criterion(X, T)
    assert not any(torch.equal(criterion.state_dict()[name], before[name]) for name in BUFFERS)


def test_initial_parameters():
    """Means and log-variances normal with variance 2 / C (Kaiming, fan out), so that half of the latter are below 0."""
    torch.manual_seed(0)
    module = CDs2Hg(200, 300)
    for parameter in (module.means, module.log_vars):
        assert parameter.shape == (200, 300)
        assert parameter.mean().abs().item() < 0.002
        assert parameter.std().item() == pytest.approx((2 / 200) ** 0.5, rel=0.02)
    assert (module.log_vars < 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert isinstance(HGNN(5, 3).bn1, torch.nn.BatchNorm1d) and HGNN(5, 3).theta1.out_features == 512


def test_state_dict_goes_round():
    criterion, other = make(5, 8, seed=1), make(5, 8, seed=2)
    other.load_state_dict(criterion.state_dict(), strict=True)
    X, T = make_batch([3, 0, 1], 8)
    assert torch.equal(criterion(X, T), other(X, T))


# Precision --------------------------------------------------------------------------------------------------------


def test_autocast_changes_nothing():
    criterion = make(30, 64, hidden=32, dtype=torch.float32)
    X, T = make_batch([i % 7 for i in range(16)], 64, torch.float32)
    plain = criterion(X, T)
    (gradient,) = torch.autograd.grad(plain, X)
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(X, T)
    (autocast_gradient,) = torch.autograd.grad(loss, X)
    assert loss.dtype == torch.float32 and criterion.dist_loss.dtype == torch.float32
    assert torch.equal(loss, plain) and torch.equal(autocast_gradient, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_parts_on_their_own_compute_in_their_precision_too(dtype):
    criterion = make(30, 64, hidden=32, dtype=torch.float32)
    X, T = make_batch([i % 7 for i in range(16)], 64, torch.float32)
    X = X.detach().bfloat16().float()  # what all of the types hold
    dist_loss, H = criterion.cds2hg(X, T)
    logits = criterion.hgnn(X, H)
    with torch.autocast("cpu", torch.bfloat16):
        again, same_H = criterion.cds2hg(X.to(dtype), T.int())
        assert torch.equal(again, dist_loss) and torch.equal(same_H, H)
        assert torch.equal(criterion.hgnn(X.to(dtype), H.double()), logits)
        assert relative(criterion.hgnn(X, H, torch.ones(H.shape[1]).double()), logits) < 1e-6
    assert logits.dtype == torch.float32


def test_bf16_embeddings_give_a_float32_loss():
    criterion = make(30, 64, hidden=32, dtype=torch.float32)
    X, T = make_batch([i % 7 for i in range(16)], 64, torch.float32)
    rounded = X.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(rounded, T)
    loss.backward()
    assert loss.dtype == torch.float32 and rounded.grad.dtype == torch.bfloat16
    assert torch.equal(loss, criterion(rounded.float(), T))
    assert relative(loss, criterion(X, T)) < 0.02


def test_probability_that_underflows_still_has_its_loss_and_gradient():
    """tau d^2 apart by 4,000: a plain softmax is 0 there, its logarithm -inf. The loss is tau (d^2_y - d^2_other)."""
    criterion = make(2, 4, dtype=torch.float32, tau=1000.0)
    axis = torch.eye(4)[0]
    with torch.no_grad():
        criterion.cds2hg.means.copy_(torch.stack([-axis, axis]))
        criterion.cds2hg.log_vars.fill_(-1.0)  # variance 1
    X = torch.stack([2 * axis, 3 * axis]).requires_grad_()
    with torch.no_grad():
        X[:, 1] += 0.5
    T = torch.tensor([0, 0])
    criterion.ls = 0.0
    loss = criterion(X, T)
    loss.backward()

    x = X.detach().double().requires_grad_()
    unit = x / x.norm(dim=1, keepdim=True)
    by_hand = (1000 * (4 * unit @ axis.double())).mean()  # |x + e|^2 - |x - e|^2 = 4 x e
    by_hand.backward()
    assert by_hand.item() > 3000
    assert relative(loss, by_hand) < 1e-5
    assert relative(X.grad, x.grad) < 1e-5


def test_probability_that_underflows_against_the_twin():
    criterion = make(6, 5, dtype=torch.float32, tau=5000.0, seed=4)
    X, T = make_batch([0, 5, 5, 2], 5, torch.float32)
    assert_equals_twin(criterion, X, T, 2e-5)


def test_distance_zero():
    """Embeddings exactly on the means: memberships are 1, never more, and everything stays finite."""
    criterion = make(100, 64, dtype=torch.float32)
    with torch.no_grad():
        criterion.cds2hg.means[1::2] = criterion.cds2hg.means[::2]  # every mean twice, under two labels
    X = (3 * criterion.cds2hg.means.detach()).requires_grad_()
    T = torch.arange(100)
    distances = criterion.cds2hg.squared_distances(X)
    assert (distances < 0).any()  # by rounding: or else this test shows nothing
    _, H = criterion.cds2hg(X, T)
    assert H.max().item() <= 1.0
    assert H[T, T ^ 1].min().item() > 1 - 1e-5
    criterion(X, T).backward()
    assert all(torch.isfinite(p.grad).all() for p in [X, *criterion.parameters()])


def test_variances_are_clipped():
    """sigma^2 = exp(relu6(s)): entries below 0 or above 6 receive no gradient at all, the others do."""
    criterion = make(6, 32)
    log_vars = criterion.cds2hg.log_vars
    assert (log_vars < 0).any() and (log_vars > 6).any()
    X, T = make_batch([0, 1, 5, 5], 32)
    criterion(X, T).backward()
    outside = (log_vars < 0) | (log_vars > 6)
    assert torch.equal(log_vars.grad[outside], torch.zeros_like(log_vars.grad[outside]))
    assert (log_vars.grad[~outside] != 0).all()


# Size -------------------------------------------------------------------------------------------------------------

MANY_CLASSES = """
import resource, torch
from hist import HISTLoss
torch.set_num_threads(2)
torch.manual_seed(0)
N, C, D = 64, 100_000, 64
warm = HISTLoss(10, D, 8)
warm(torch.randn(N, D), torch.arange(N) % 10).backward()
criterion = HISTLoss(C, D, 8)
X, T = torch.randn(N, D, requires_grad=True), torch.randint(C, (N,))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss = criterion(X, T)
loss.backward()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in criterion.parameters())
print((after - before) * 1024 / (4 * N * C * D))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_batch_times_classes_times_size():
    """100,000 classes: the whole of forward and backward takes less than half of one (N, C, D) tensor (1.6 GB)."""
    code = str(Path(sys.modules["hist"].__file__).parent)
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {code!r})\n{MANY_CLASSES}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 0.5


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (torch.zeros(4, 7), torch.zeros(4, dtype=torch.long), r"\(N, 8\), got \(4, 7\)"),
        (torch.zeros(8), torch.zeros(8, dtype=torch.long), r"\(N, 8\), got \(8,\)"),
        (torch.zeros(4, 8, 1), torch.zeros(4, dtype=torch.long), r"\(N, 8\), got \(4, 8, 1\)"),
        (torch.zeros(4, 8), torch.zeros(3, dtype=torch.long), r"\(4,\), one per embedding, got \(3,\)"),
        (torch.zeros(4, 8), torch.zeros(4, 1, dtype=torch.long), r"\(4,\), one per embedding, got \(4, 1\)"),
        (torch.zeros(4, 8), torch.tensor(0), r"\(4,\), one per embedding, got \(\)"),
        (torch.zeros(4, 8, dtype=torch.long), torch.zeros(4, dtype=torch.long), "floating point, got torch.int64"),
        (torch.zeros(4, 8), torch.zeros(4), "integers, got torch.float32"),
        (torch.zeros(4, 8), torch.zeros(4, dtype=torch.bool), "integers, got torch.bool"),
        (torch.zeros(4, 8), torch.tensor([0, 1, 2, 5]), r"\[0, 5\), this call had labels from 0 to 5"),
        (torch.zeros(4, 8), torch.tensor([0, -1, 2, 4]), r"\[0, 5\), this call had labels from -1 to 4"),
        (torch.zeros(1, 8), torch.tensor([0]), "at least 2 samples, got 1"),
        (torch.zeros(0, 8), torch.zeros(0, dtype=torch.long), "at least 2 samples, got 0"),
        (torch.zeros(2, 8), [0, 1], "must be tensors, got Tensor and list"),
    ],
)
def test_wrong_calls_are_named(embeddings, labels, message):
    with pytest.raises(ValueError, match=f"^HISTLoss: .*{message}"):
        HISTLoss(5, 8, 4)(embeddings, labels)


def test_empty_batch_in_eval_mode():
    with pytest.raises(ValueError, match="^HISTLoss: .*got 0"):
        HISTLoss(5, 8, 4).eval()(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("name", ["num_classes", "embedding_size", "hgnn_hidden"])
@pytest.mark.parametrize("value", [0, -1])
def test_wrong_sizes_are_named(name, value):
    sizes = {"num_classes": 5, "embedding_size": 8, "hgnn_hidden": 4} | {name: value}
    with pytest.raises(ValueError, match=f"^HISTLoss: {name} must be at least 1, got {value}"):
        HISTLoss(**sizes)


# On a GPU ---------------------------------------------------------------------------------------------------------


@needs_gpu
def test_gpu_gives_the_same_without_waiting():
    criterion, twin = make(50, 64, 32, torch.float32), make(50, 64, 32, torch.float32).cuda()
    X, T = make_batch([i % 11 for i in range(32)], 64, torch.float32)
    gpu_X, gpu_T = X.detach().cuda().requires_grad_(), T.cuda()
    twin(gpu_X, gpu_T)  # loads the libraries
    twin.load_state_dict(criterion.state_dict())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            gpu_loss = twin(gpu_X, gpu_T)
        gpu_loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(3):
        loss = criterion(X, T)
    loss.backward()
    assert relative(gpu_loss.cpu(), loss) < 1e-4
    assert relative(gpu_X.grad.cpu(), X.grad) < 1e-3
    assert torch.equal(twin(gpu_X, T), twin(gpu_X, gpu_T))  # labels may stay behind
    HISTLoss(300, 64).cuda()(gpu_X, gpu_T.byte())  # a byte does not hold the largest class


@needs_gpu
@pytest.mark.parametrize("label", [-1, 5])
def test_gpu_reports_an_impossible_label_at_the_next_call(label):
    criterion = make(5, 8, dtype=torch.float32).cuda()
    X = torch.randn(4, 8, device="cuda")
    good, bad = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, label])
    with pytest.raises(ValueError, match="this call"):
        criterion(X, bad)
    criterion(X, bad.cuda())
    with pytest.raises(ValueError, match="the previous call"):
        criterion(X, good.cuda())
    criterion(X, good.cuda())


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"tau": 0}, "tau must be finite and above 0, got 0"),
        ({"tau": -1.0}, "tau must be finite and above 0"),
        ({"tau": float("nan")}, "tau must be finite and above 0, got nan"),
        ({"tau": float("inf")}, "tau must be finite and above 0, got inf"),
        ({"alpha": -0.1}, "alpha must be finite and at least 0, got -0.1"),
        ({"alpha": float("nan")}, "alpha must be finite and at least 0"),
        ({"ls": -1}, "ls must be finite and at least 0, got -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(setting, message):
    with pytest.raises(ValueError, match=f"^HISTLoss: {message}"):
        HISTLoss(5, 8, **setting)
    HISTLoss(5, 8, alpha=0, ls=0)


def test_there_is_no_summary_without_a_hypergraph():
    criterion = HISTLoss(3, 2, ls=0)
    criterion(torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match="there is no hypergraph yet"):
        criterion.hypergraph_summary()
