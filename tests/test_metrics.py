"""Tests of the retrieval figures (code/metrics.py): figures of the paper's code, cases known by eye, a slow twin.

The twin sorts all similarities of a query in float64. Images that are exactly equally close stand in a group, and a
figure is its mean over all orders of the groups, found place by place. NMI has a twin of plain loops.

    pytest tests/test_metrics.py
"""

import math
import resource
from pathlib import Path

import inference
import metrics
import numpy as np
import pytest
import torch
from apart import Apart
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from refused import Refused

GOLDEN = Path(__file__).parent / "golden"
# GiB for the search. The tiny ones make blocks of 16 images and several groups of queries out of small sets.
BUDGETS = [1e-6, 1e-5, 1e-4, 1.0]


def tie_groups(similarities, positive):
    """One query's candidates from the most similar down -> [(positives, negatives), …] of equally similar ones."""
    groups, last = [], math.inf
    for i in np.argsort(-similarities, kind="stable"):
        if last - similarities[i] > 1e-9:
            groups.append([0, 0])
        last = similarities[i]
        groups[-1][0 if positive[i] else 1] += 1
    return groups


def figures_place_by_place(groups, ks):
    """Means over all orders of the tied ones: each place of a group holds a positive with the same probability."""
    R = sum(p for p, _ in groups)
    hit = {k: None for k in ks}
    r_precision = map_at_r = 0.0
    place = before = 0  # places filled so far, positives among them
    for p, n in groups:
        for k in ks:
            if hit[k] is None and (p > 0 or place + n >= k):
                slots = min(max(k - place, 0), p + n)
                hit[k] = 1 - math.comb(n, slots) / math.comb(p + n, slots)
        for s in range(p + n):
            if p and place + s < R:
                chance = p / (p + n)
                among = s * (p - 1) / (p + n - 1) if p + n > 1 else 0.0  # positives on the s places before, given this
                r_precision += chance / R
                map_at_r += chance * (before + among + 1) / (place + s + 1) / R
        place, before = place + p + n, before + p
    return {**{f"R@{k}": hit[k] for k in ks}, "RP": r_precision, "MAP@R": map_at_r}


def slow_retrieval(query, query_labels, gallery, gallery_labels, ks):
    """Every figure of every query as a dict of arrays, NaN where a query has no positive."""
    one_set = gallery is None
    if one_set:
        gallery, gallery_labels = query, query_labels
    Q, G = (x.double() / x.double().norm(dim=1, keepdim=True).clamp(min=1e-300) for x in (query, gallery))
    S = (Q @ G.T).numpy()
    rows = []
    for i, label in enumerate(query_labels.tolist()):
        others = np.arange(len(G)) != i if one_set else np.full(len(G), True)
        positive = (gallery_labels.numpy() == label)[others]
        nothing = dict.fromkeys([*(f"R@{k}" for k in ks), "RP", "MAP@R"], math.nan)
        groups = tie_groups(S[i][others], positive)
        rows.append(figures_place_by_place(groups, ks) if positive.any() else nothing)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def assert_equals_twin(query, query_labels, gallery=None, gallery_labels=None, ks=(1, 2, 5), memory_gib=1.0):
    expected = slow_retrieval(query, query_labels, gallery, gallery_labels, ks)
    found = metrics.retrieval(query, query_labels, gallery, gallery_labels, ks, True, memory_gib)
    assert found.per_query.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found.per_query[name], values, rtol=0, atol=1e-9, err_msg=name)
    means = {name: np.nanmean(values) for name, values in expected.items()}
    assert found.figures() == pytest.approx(means, abs=1e-9)
    assert found.num_queries == len(query)
    assert found.num_without_positive == np.isnan(expected["RP"]).sum()

    without = metrics.retrieval(query, query_labels, gallery, gallery_labels, ks, False, memory_gib)
    assert without.figures() == {f"R@{k}": value for k, value in found.recall.items()}
    assert set(without.per_query) == {f"R@{k}" for k in ks}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("memory_gib", BUDGETS)
def test_golden(memory_gib):
    golden = np.load(GOLDEN / "retrieval_cub_style.npz")
    X, T, ks = torch.tensor(golden["X"]), torch.tensor(golden["T"]), golden["k"].tolist()
    found = metrics.retrieval(X, T, ks=ks, precision=True, memory_gib=memory_gib)
    assert list(found.recall.values()) == pytest.approx(golden["recall"].tolist(), rel=1e-15)
    assert found.r_precision == pytest.approx(golden["r_precision"].item(), rel=6e-8)  # was stored in float32
    assert found.map_at_r == pytest.approx(golden["map_at_r"].item(), rel=1e-15)

    golden = np.load(GOLDEN / "retrieval_inshop_style.npz")
    sets = [torch.tensor(golden[name]) for name in ("query_X", "query_T", "gallery_X", "gallery_T")]
    found = metrics.retrieval(*sets, ks=golden["k"].tolist(), memory_gib=memory_gib)
    assert list(found.recall) == golden["k"].tolist()
    assert list(found.recall.values()) == pytest.approx(golden["recall"].tolist(), rel=1e-15)


def directions(*degrees):
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


FOUR_OF_EACH = torch.arange(5).repeat_interleave(4)
MIXED, OF_TEN = torch.tensor([3, 0, 3, 2, 0, 2, 9, 2]), torch.eye(10)
TWO_LABELS = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.1, 0.0], [0.0, 0.1, 1.0]])
NONE = math.nan
BY_EYE = {  # queries, labels and perhaps a gallery; the figures of each query in the order of the caller
    "one-hot vectors are perfect, K may be above the gallery's size": (
        [torch.eye(5)[FOUR_OF_EACH], FOUR_OF_EACH],
        {name: [1] * 20 for name in ("R@1", "R@2", "R@1000", "RP", "MAP@R")},
    ),
    "a a b | b: only the first b errs, it sees both a first": (
        [directions(0.0, 1.0, 2.5, 20.0), torch.tensor([0, 0, 1, 1])],
        {"R@1": [1, 1, 0, 1], "R@2": [1, 1, 0, 1], "R@3": [1, 1, 1, 1], "RP": [1, 1, 0, 1], "MAP@R": [1, 1, 0, 1]},
    ),
    "a query with R = 3 that sees positive, negative, positive, positive": (
        [directions(0.0), torch.tensor([7]), directions(1.0, 2.0, 3.0, 4.0), torch.tensor([7, 1, 7, 7])],
        {"R@1": [1], "R@50": [1], "RP": [2 / 3], "MAP@R": [(1 / 1 + 2 / 3) / 3]},
    ),
    "two positives and a negative that are equally close, in any order: + + -, + - + and - + + are as likely": (
        [torch.ones(1, 2), torch.tensor([7]), torch.ones(3, 2), torch.tensor([7, 1, 7])],
        {"R@1": [2 / 3], "R@2": [1], "RP": [2 / 3], "MAP@R": [(1 + 1 / 2 + 1 / 4) / 3]},
    ),
    "a class of one image, and a 2 among the 0s": (
        [OF_TEN[[3, 0, 3, 2, 0, 0, 9, 2]] + 0.1 * OF_TEN[MIXED], MIXED],
        {"R@1": [1, 1, 1, 1, 1, 0, NONE, 1]},
    ),
    "classes that the gallery lacks": (
        [OF_TEN[:3], torch.tensor([0, 1, 2]), OF_TEN[[1, 0]], torch.tensor([1, 3])],
        {name: [NONE, 1, NONE] for name in ("R@1", "RP", "MAP@R")},
    ),
    "a copy of the same class counts, the query itself does not: without the copy there is nothing to find": (
        [torch.eye(4)[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 1])],
        {"R@1": [1, 1, 1 / 3, 1 / 3]},
    ),
    # The copy stands first, and dropping the first neighbour would hide that; the third sees both copies as near.
    "an image that exists under two labels does not flatter": (
        [TWO_LABELS, torch.tensor([0, 1, 0, 1])],
        {"R@1": [0, 0, 0.5, 0], "R@2": [1, 0, 1, 0.5]},
    ),
}


@pytest.mark.parametrize("sets, expected", BY_EYE.values(), ids=BY_EYE)
def test_known_by_eye(sets, expected):
    ks = [int(name.removeprefix("R@")) for name in expected if name.startswith("R@")]
    found = metrics.retrieval(*sets, ks=ks, precision=True)
    for name, values in expected.items():
        np.testing.assert_allclose(found.per_query[name], values, rtol=0, atol=1e-12, err_msg=name)
        assert found.figures()[name] == pytest.approx(np.nanmean(values), abs=1e-12)
    left_out = np.isnan(expected["R@1"])
    assert all(np.array_equal(np.isnan(values), left_out) for values in found.per_query.values())
    assert (found.num_queries, found.num_without_positive) == (len(sets[0]), left_out.sum())


@pytest.mark.parametrize("memory_gib", BUDGETS)
@pytest.mark.parametrize("vector", [torch.eye(2)[0], torch.zeros(5), randn(37)], ids=["axis", "zeros", "real"])
def test_everything_equal_gives_chance(vector, memory_gib):
    """The products of a vector with itself must come out the same in every block, full or not."""
    for N in (17, 60, 257, *((1025, 2049, 2100) if memory_gib == 1 else ())):
        T = torch.arange(N) % 16
        R = (T.bincount()[T] - 1).tolist()
        found = metrics.retrieval(vector.expand(N, -1), T, ks=(1, 10), precision=True, memory_gib=memory_gib)
        chance = {r: figures_place_by_place([(r, N - 1 - r)], (1, 10)) for r in set(R) - {0}}
        for name, values in found.per_query.items():
            expected = [chance[r][name] if r else math.nan for r in R]
            np.testing.assert_allclose(values, expected, rtol=0, atol=1e-9, err_msg=name)


LENGTHS = {
    torch.float64: [1e39, 1e300, 1e-300],
    torch.float32: [8e37, 1e19, 1e-14, 1e-30, 2.0**-142],  # the last one is subnormal
    torch.float16: [2.0**-20],
    torch.bfloat16: [2.0**124, 2.0**-129],
}


@pytest.mark.parametrize(("length", "dtype"), [(length, dtype) for dtype in LENGTHS for length in LENGTHS[dtype]])
def test_any_length_gives_the_figures_of_length_one(length, dtype):
    """Numbers of few bits, which every type holds exactly; copies and zero vectors among them."""
    X, T = (16 * randn(60, 8)).round().clamp(-63, 63).double() / 16, torch.arange(60) % 7
    X[50:55], X[55:] = X[:5], 0
    unit, long = torch.nn.functional.normalize(X).float(), (X * length).to(dtype)
    assert long.isfinite().all()
    expected, found = metrics.retrieval(unit, T, precision=True), metrics.retrieval(long, T, precision=True)
    for name, values in expected.per_query.items():
        np.testing.assert_array_equal(found.per_query[name], values, err_msg=name)
    expected = metrics.retrieval(unit, T, unit, T).recall
    assert metrics.retrieval(long, T, unit, T).recall == metrics.retrieval(unit, T, long, T).recall == expected
    assert metrics.nmi(long[:55], T[:55]) == metrics.nmi(unit[:55], T[:55])  # zero vectors fit every cluster alike
    _, expected = metrics.nearest(unit, unit, 60)
    for query, gallery in ((long, unit), (unit, long)):
        torch.testing.assert_close(metrics.nearest(query, gallery, 60)[1], expected, rtol=0, atol=1e-6)
    for spread, collapsed in ((1e-4, True), (0.1, False)):
        point = 0.5 * (1 + spread * randn(50, 8).double()) * length
        doubt = inference.doubt(inference.Embedded(point.to(dtype), T[:50]), None)
        assert bool(doubt) == collapsed or length == 2.0**-142  # too few bits for 1e-4


def test_other_types_of_input():
    """The input is left alone; labels may be of any type that holds whole numbers."""
    X, T = randn(40, 8).requires_grad_(), torch.arange(40) % 5
    before, plain = (X.clone(), T.clone()), metrics.retrieval(X, T, precision=True).figures()
    for embeddings, labels in ((X.double(), T), (X.detach().numpy(), T.numpy()), (X, T + 10**12), (X, T - 3)):
        assert metrics.retrieval(embeddings, labels, precision=True).figures() == plain
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.int32, torch.float32):
        assert metrics.retrieval(X, T.to(dtype), precision=True).figures() == plain
        assert metrics.nmi(X, T.to(dtype)) == metrics.nmi(X, T)
    assert torch.equal(X, before[0]) and torch.equal(T, before[1])


def tied(labels, seed, part=0):
    """Embeddings whose cosines are exact in float32 and mostly tied: signs, axes, both, or long signs."""
    generator, size = torch.Generator().manual_seed(seed + part), len(labels)
    signs, long_signs = (torch.randint(0, 2, (size, D), generator=generator) * 2.0 - 1 for D in (4, 16))
    axes = torch.eye(4)[torch.randint(4, (size,), generator=generator)]
    both = torch.where(torch.rand(size, 1, generator=generator) < 0.5, signs, axes)
    return (signs, axes, both, long_signs)[seed % 4] * 2.0 ** torch.randint(-3, 4, (size, 1), generator=generator)


@st.composite
def searches(draw, points, most, classes):
    """Queries and often a gallery, with labels; points(labels, seed, 0 or 1) -> embeddings. Some have a positive."""
    seed, num_classes, sets = draw(st.integers(0, 10**6)), draw(st.sampled_from(classes)), []
    for i in range(draw(st.integers(1, 2))):
        size = draw(st.integers(2 - i, most))
        labels = torch.randint(num_classes, (size,), generator=torch.Generator().manual_seed(seed + i))
        sets += [points(labels, seed, i), labels]
    assume(sets[1].bincount().max() > 1 if len(sets) == 2 else torch.isin(sets[1], sets[3]).any())
    return sets


def around_centres(labels, seed, part):
    """The labels' centres and noise, here little and there much."""
    noise = randn(len(labels), 6, seed=seed + part + 1) * [0.3, 1.0, 3.0][seed % 3]
    return randn(30, 6, seed=seed)[labels] + noise


def copies(labels, seed, part):
    """Real-valued points of which many exist several times, under one label or under different ones."""
    generator = torch.Generator().manual_seed(seed + part)
    points = randn(1 + seed % 20, [3, 37, 64][seed % 3], seed=seed)
    return points[torch.randint(len(points), (len(labels),), generator=generator)]


def told_apart(query, gallery):
    """Whether float32 tells all similarities of a query apart, but those of copies."""
    Q, G = (torch.nn.functional.normalize(x.unique(dim=0).double()) for x in (query, gallery))
    return bool(((Q @ G.T).sort(dim=1).values.diff(dim=1) > 1e-6).all())


@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.one_of(searches(tied, 9, [1, 2, 3]), searches(tied, 90, [1, 2, 5, 30])), st.sampled_from(BUDGETS))
def test_ties(sets, memory_gib):
    """Small sets, and larger ones whose ties run across blocks and beyond the R rivals that are kept."""
    assert_equals_twin(*sets, ks=(1, 2, 7, 40, 90), memory_gib=memory_gib)


@pytest.mark.slow
def test_twin_of_several_full_blocks():
    """Blocks of the usual size, the last of them ragged."""
    T = torch.randint(400, (2300,), generator=torch.Generator().manual_seed(3))
    assert_equals_twin(tied(T, seed=3), T, ks=(1, 10, 1000))


def gib_of_a_search(images, classes):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    metrics.retrieval(torch.randn(300, 32), torch.arange(300) % 30, precision=True, memory_gib=0.02)
    X, T = torch.randn(images, 32), torch.arange(images) % classes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metrics.retrieval(X, T, ks=(1, 10, 1000), precision=True, memory_gib=0.02)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)


@pytest.mark.slow
@pytest.mark.parametrize(("images", "classes"), [(8_000, 2_000), (4_000, 10)])
def test_memory_keeps_to_the_budget(images, classes):
    """Allowed: 0.02 GiB. Needed all at once: 0.24 for the similarity matrix of 8,000 images; more than 0.1 to score
    the 399 positives of each of 4,000 images."""
    done = Apart(gib_of_a_search, images, classes).end()
    assert done.code == 0 and float(done.out) < 0.03, done


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_counted(bad):
    X, T = randn(40, 4), torch.arange(40) % 2
    broken = X.clone()
    broken[3, 1] = broken[3, 2] = broken[7, 0] = broken[39, 3] = bad
    for what, call in (
        ("query", lambda: metrics.retrieval(broken, T)),
        ("gallery", lambda: metrics.retrieval(X, T, broken, T)),
        ("nmi", lambda: metrics.nmi(broken, T)),
        ("query", lambda: metrics.nearest(broken, X, 2)),
        ("gallery", lambda: metrics.nearest(X, broken, 2)),
    ):
        with pytest.raises(Refused, match=f"{what}: 3 of 40 embeddings hold NaN or Inf"):
            call()


@pytest.mark.parametrize("labels", [torch.arange(10) / 4, torch.full((10,), math.nan), torch.full((10,), math.inf)])
def test_labels_that_are_not_whole_numbers_are_a_mistake_of_the_program(labels):
    with pytest.raises(ValueError, match=f"whole numbers expected as labels, got {labels.dtype}") as raised:
        metrics.retrieval(randn(10, 4), labels)
    assert not isinstance(raised.value, Refused)


def zeros(size):
    return torch.zeros(size, dtype=torch.int64)


@pytest.mark.parametrize(
    ("sets", "ks", "message"),
    [
        ((torch.zeros(4), zeros(4)), (1,), r"query: .* got \(4,\)"),
        ((torch.zeros(4, 2), zeros(3)), (1,), r"query: .* got \(3,\)"),
        ((torch.zeros(4, 2), zeros((4, 1))), (1,), r"query: .* got \(4, 1\)"),
        ((torch.zeros(0, 2), zeros(0)), (1,), r"query: .* got \(0, 2\)"),
        ((torch.ones(4, 2), zeros(4), torch.ones(5, 3), zeros(5)), (1,), "2 dimensions, .* 3"),
        ((torch.ones(4, 2), zeros(4), torch.ones(5, 2), zeros(4)), (1,), r"gallery: .*\(5,\) expected, got \(4,\)"),
        ((torch.ones(4, 2), zeros(4), torch.ones(0, 2), zeros(0)), (1,), r"gallery: .* got \(0, 2\)"),
        ((torch.ones(4, 2), zeros(4)), (1, 0), "at least 1, got .1, 0."),
        ((torch.ones(4, 2), torch.arange(4)), (1,), "none of the 4 queries"),
        ((torch.ones(2, 2), zeros(2), torch.ones(3, 2), zeros(3) + 1), (1,), "none of the 2 queries"),
    ],
)
def test_what_a_file_can_hold_is_refused(sets, ks, message):
    with pytest.raises(Refused, match=message):
        metrics.retrieval(*sets, ks=ks)


@pytest.mark.parametrize("memory_gib", [1e-6, 1.0])
def test_nearest(memory_gib):
    query, gallery = randn(20, 6), 3 * randn(50, 6, seed=1)
    indices, similarities = metrics.nearest(query, gallery, 5, memory_gib=memory_gib)
    S = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(gallery).T
    assert torch.equal(indices, S.sort(dim=1, descending=True).indices[:, :5])
    torch.testing.assert_close(similarities, S.gather(1, indices))
    indices, _ = metrics.nearest(gallery, gallery, 60, exclude=torch.arange(50), memory_gib=memory_gib)
    assert indices.sort(dim=1).values.tolist() == [[j for j in range(50) if j != i] for i in range(50)]  # k is cut


def clusters(num_classes=8, per_class=30, noise=0.02):
    T = torch.arange(num_classes).repeat_interleave(per_class)
    return torch.eye(num_classes, 16)[T] + noise * randn(len(T), 16), T


def test_nmi_known_by_eye():
    """Two classes are told apart from every start; of more, several starts are given a chance, as k-means needs."""
    X, T = clusters()
    assert metrics.nmi(*clusters(2)) == pytest.approx(1.0, abs=1e-12)
    assert max(metrics.nmi(X, T, seed=seed) for seed in range(5)) > 0.9
    assert 0 <= metrics.nmi(X, torch.randint(8, (len(X),), generator=torch.Generator().manual_seed(0))) < 0.15
    assert metrics.nmi(randn(20, 4), torch.arange(20)) == pytest.approx(1.0, abs=1e-9)
    # Copies: starts coincide, and the clusters left empty must move to the points not yet found, if there are any.
    assert 0 <= metrics.nmi(torch.ones(20, 4), torch.arange(20) % 5) <= 1
    T = torch.arange(6).repeat_interleave(20)
    for seed in range(5):
        assert metrics.nmi(torch.eye(6)[T], T, seed=seed) == pytest.approx(1.0, abs=1e-12)


def test_nmi_depends_on_its_seed():
    X, T = randn(300, 8), torch.arange(300) % 10
    assert len({metrics.nmi(X, T, seed=seed) for seed in range(4)}) > 1


def test_nmi_is_the_same_whatever_the_classes_are_called():
    X, T = randn(300, 8), torch.arange(300) % 10
    names = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:10]
    assert metrics.nmi(X, names[T]) == pytest.approx(metrics.nmi(X, T), abs=1e-12)
