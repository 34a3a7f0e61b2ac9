"""Tests of the loss (code/hist.py): figures of the paper's code, a slow twin written from the equations, hard inputs.

The twin is plain loops over samples and classes in float64; its gradients come from autograd through those loops.

    pytest tests/test_hist.py
"""

import copy
import math
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from apart import Apart
from hist import HGNN, CDs2Hg, HISTLoss, propagation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

GOLDEN = Path(__file__).parent / "golden"


def relative(found, expected):
    """Distance of two tensors relative to the norm of the second."""
    found, expected = (torch.as_tensor(t).detach().double() for t in (found, expected))
    assert found.shape == expected.shape
    return ((found - expected).norm() / expected.norm().clamp(min=1e-300)).item()


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

    def entry(i, j):
        return sum(H[i, e] * W[e] * H[j, e] / column_sums[e] for e in range(E)) / (row_sums[i] * row_sums[j]).sqrt()

    return torch.stack([torch.stack([entry(i, j) for j in range(N)]) for i in range(N)])


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
    loss = dist_loss + ls * ce_loss
    return dict(dist_loss=dist_loss, ce_loss=ce_loss, loss=loss, H=H, G=G, logits=logits, statistics=statistics)


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
    """Loss, its terms, every gradient and the BatchNorm statistics of a call against the twin -> (twin, its tensors).

    With ls = 0 the HGNN takes no part: the twin's gradients of it are zero.
    """
    state, slow_X = double_state(criterion), X.detach().double().clone().requires_grad_()
    twin = slow_loss(slow_X, T, state, criterion.cds2hg.tau, criterion.cds2hg.alpha, criterion.ls, criterion.training)
    twin["loss"].backward(retain_graph=True)
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
    return twin, state | {"X": slow_X}


@pytest.mark.parametrize("case", ["loss_small", "loss_repeated_classes"])
def test_golden(case):
    """Names, loss, terms, gradients and statistics of the whole; the parts."""
    with np.load(GOLDEN / f"{case}.npz") as file:
        figures = {name: torch.as_tensor(file[name]) for name in file.files}
    X, T = figures["X"].requires_grad_(), figures["T"]
    settings = {name: figures[name].item() for name in ("tau", "alpha", "ls")}
    criterion = HISTLoss(len(figures["cds2hg.means"]), X.shape[1], len(figures["hgnn.theta1.bias"]), **settings)
    state = {name: value for name, value in figures.items() if name.startswith(("cds2hg.", "hgnn."))}
    criterion.load_state_dict(state, strict=True)
    parts = copy.deepcopy(criterion)

    loss = criterion(X, T)
    loss.backward()
    for found, name in ((loss, "loss"), (criterion.dist_loss, "dist_loss"), (criterion.ce_loss, "ce_loss")):
        assert relative(found, figures[name]) < 1e-5, name
    for name, tensor in {"X": X, **dict(criterion.named_parameters())}.items():
        assert relative(tensor.grad, figures[f"grad.{name}"]) < 1e-4, name
    for name in ("hgnn.bn1.running_mean", "hgnn.bn1.running_var"):
        assert relative(criterion.state_dict()[name], figures[f"after.{name}"]) < 1e-5, name
    assert criterion.hgnn.bn1.num_batches_tracked.item() == 1

    dist_loss, H = parts.cds2hg(X, T)
    logits = parts.hgnn(X, H)
    for found, name in ((dist_loss, "dist_loss"), (H, "H"), (propagation(H), "G"), (logits, "logits")):
        assert relative(found, figures[name]) < 1e-5, name


@st.composite
def batches(draw):
    num_classes = draw(st.integers(1, 5))
    labels = draw(st.lists(st.integers(0, num_classes - 1), min_size=1, max_size=6))
    options = {
        "tau": draw(st.sampled_from([0.5, 16.0, 32.0])),
        "alpha": draw(st.sampled_from([0.1, 0.9, 2.0])),
        "ls": draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
    }
    seed = draw(st.integers(0, 999))
    criterion = make(num_classes, draw(st.integers(1, 5)), draw(st.integers(1, 4)), seed=seed, **options)
    criterion.train(len(labels) > 1 and draw(st.booleans()))
    return criterion, *make_batch(labels, criterion.embedding_size, seed=seed), seed


@settings(deadline=None, max_examples=60, derandomize=True)
@given(batches())
def test_twin_over_shapes(batch):
    """The whole in training and in eval mode, of one class and of one sample, too; CDs2Hg, propagation, HGNN apart."""
    criterion, X, T, seed = batch
    twin, slow = assert_equals_twin(criterion, X, T, 1e-8)
    dist_loss, H = criterion.cds2hg(X, T)
    found = {"dist_loss": dist_loss, "H": H, "G": propagation(H), "logits": criterion.hgnn(X, H)}
    assert H.shape == (len(T), len(T.unique()))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, twin[name], rtol=1e-7, atol=1e-7 if name == "logits" else 1e-11)

    # The gradients of any function of H; propagation with weights of the hyperedges
    generator = torch.Generator().manual_seed(seed)
    W = 0.1 + torch.rand(H.shape[1], dtype=torch.float64, generator=generator)
    torch.testing.assert_close(propagation(H, W), slow_propagation(H, W), rtol=1e-10, atol=1e-12)
    weights = torch.randn(H.shape, dtype=torch.float64, generator=generator)
    found = torch.autograd.grad((H * weights).sum(), [X, criterion.cds2hg.means, criterion.cds2hg.log_vars])
    # With one class present H is constant, and the twin's has no gradient at all.
    total = (twin["H"] * weights).sum() + 0 * slow["X"].sum()
    slow = [slow[name] for name in ("X", "cds2hg.means", "cds2hg.log_vars")]
    expected = torch.autograd.grad(total, slow, allow_unused=True, materialize_grads=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("tau", [32.0, 5000.0])
def test_twin_in_float32(tau):
    """A real size, and distances so far apart that a plain softmax is 0, and its logarithm and gradient not finite."""
    criterion = HISTLoss(60, 512, 32, tau=tau) if tau == 32 else make(6, 5, dtype=torch.float32, tau=tau, seed=4)
    labels = [i % 11 for i in range(24)] if tau == 32 else [0, 5, 5, 2]
    X, T = make_batch(labels, criterion.embedding_size, torch.float32)
    X = F.layer_norm(X, X.shape[1:]).detach().requires_grad_()
    assert_equals_twin(criterion, X, T, 2e-5)


@pytest.mark.parametrize("ls", [0.0, 0.7])
def test_terms_can_be_read_and_compute_is_the_loss_without_its_checks(ls):
    criterion, (X, T) = make(5, 8, ls=ls), make_batch([0, 4, 4, 2], 8)
    before = dict(vars(criterion))
    assert criterion.dist_loss is None and criterion.ce_loss is None
    computed, *terms = criterion.compute(X, T)
    assert vars(criterion) == before
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # a recording or a compiler reads no values either
        assert criterion.compute(mode.from_tensor(X), mode.from_tensor(T))[0].shape == ()

    loss = criterion(X, T)
    assert torch.equal(loss, computed) and loss.shape == () and loss.requires_grad
    shown = [criterion.dist_loss, criterion.ce_loss][: len(terms)]
    assert all(torch.equal(*pair) and not pair[0].requires_grad for pair in zip(terms, shown, strict=False))
    assert loss.item() == pytest.approx(
        sum(w * term.item() for w, term in zip((1, ls), shown, strict=False)), rel=1e-12
    )
    assert (criterion.ce_loss is None) == (ls == 0)

    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(other.eval()(X, T), criterion.eval()(X, T))


def test_summary_of_the_hypergraph():
    criterion, (X, T) = make(5, 8), make_batch([0, 4, 4, 2], 8)
    criterion(X, T)
    found, H = criterion.hypergraph_summary(), criterion.cds2hg(X, T)[1][:, [0, 2, 2, 1]]  # a column for each sample
    assert relative(found["incidence"], H[H < 1].mean()) < 1e-12
    assert relative(found["variance"], F.relu6(criterion.cds2hg.log_vars).exp().mean()) < 1e-12


def test_labels_of_other_integer_types():
    criterion, (X, T) = make(5, 8), make_batch([0, 4, 4, 2], 8)
    for dtype in (torch.int32, torch.int16, torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        assert torch.equal(criterion(X, T.to(dtype)), criterion(X, T))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_and_the_type_of_the_embeddings_change_nothing(dtype):
    """Loss, gradients and parts are those of float32, the type of the parameters."""
    criterion, (X, T) = make(30, 64, hidden=32, dtype=torch.float32), make_batch([i % 7 for i in range(16)], 64)
    X = X.detach().bfloat16().float().requires_grad_()  # what all of the types hold
    other = X.detach().to(dtype).requires_grad_()
    loss, (dist_loss, H) = criterion(X, T), criterion.cds2hg(X, T)
    logits = criterion.hgnn(X, H)
    with torch.autocast("cpu", torch.bfloat16):
        again, (same_dist_loss, same_H) = criterion(other, T), criterion.cds2hg(other, T.int())
        assert torch.equal(same_dist_loss, dist_loss) and torch.equal(same_H, H)
        assert torch.equal(criterion.hgnn(other, H.double()), logits)
        assert relative(criterion.hgnn(other, H, torch.ones(H.shape[1]).double()), logits) < 1e-6
    assert loss.dtype == logits.dtype == criterion.dist_loss.dtype == torch.float32
    assert torch.equal(again, loss)
    expected, found = torch.autograd.grad(loss, X)[0], torch.autograd.grad(again, other)[0]
    assert torch.equal(found, expected.to(dtype))


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


def share_of_classes_times_batch_times_size():
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


@pytest.mark.slow
def test_memory_does_not_grow_with_batch_times_classes_times_size():
    """100,000 classes: the whole of forward and backward takes less than half of one (N, C, D) tensor (1.6 GB)."""
    done = Apart(share_of_classes_times_batch_times_size).end()
    assert done.code == 0 and float(done.out) < 0.5, done


# Errors -----------------------------------------------------------------------------------------------------------

LABELS = torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (torch.zeros(4, 7), LABELS, r"\(N, 8\) .* got \(4, 7\) and \(4,\)"),
        (torch.zeros(8), torch.zeros(8, dtype=torch.long), r"\(N, 8\) .* got \(8,\) and \(8,\)"),
        (torch.zeros(4, 8), LABELS[:3], r"labels \(N,\), got \(4, 8\) and \(3,\)"),
        (torch.zeros(4, 8), LABELS[:, None], r"labels \(N,\), got \(4, 8\) and \(4, 1\)"),
        (torch.zeros(4, 8, dtype=torch.long), LABELS, "floating point .* got torch.int64 and torch.int64"),
        (torch.zeros(4, 8), torch.zeros(4), "integers, got torch.float32 and torch.float32"),
        (torch.zeros(4, 8), LABELS.bool(), "integers, got torch.float32 and torch.bool"),
        (torch.zeros(4, 8), torch.tensor([0, 1, 2, 5]), r"\[0, 5\), this call had labels from 0 to 5"),
        (torch.zeros(4, 8), torch.tensor([0, -1, 2, 4]), r"\[0, 5\), this call had labels from -1 to 4"),
        (torch.zeros(1, 8), LABELS[:1], "at least 2 samples, got 1"),
        (torch.zeros(0, 8), LABELS[:0], "at least 2 samples, got 0"),
    ],
)
def test_wrong_calls_are_named(embeddings, labels, message):
    with pytest.raises(ValueError, match=f"^HISTLoss: .*{message}"):
        HISTLoss(5, 8, 4)(embeddings, labels)
    if len(embeddings) == 0:
        with pytest.raises(ValueError, match="^HISTLoss: .*got 0"):
            HISTLoss(5, 8, 4).eval()(embeddings, labels)


def test_settings_that_mean_nothing_are_refused():
    usual = {"num_classes": 5, "embedding_size": 8, "hgnn_hidden": 4, "tau": 32, "alpha": 0, "ls": 0}
    HISTLoss(**usual)
    above_0, finite = (0, -1.0, math.nan, math.inf), (-0.1, math.nan, math.inf)
    wrong = {"num_classes": (0, -1), "embedding_size": (0, -1), "hgnn_hidden": (0, -1)}
    for name, values in (wrong | {"tau": above_0, "alpha": finite, "ls": finite}).items():
        for value in values:
            with pytest.raises(ValueError, match=f"^HISTLoss: .*{name}.* got .*{value}"):
                HISTLoss(**usual | {name: value})
