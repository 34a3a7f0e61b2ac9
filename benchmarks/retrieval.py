"""Compares the search behind the retrieval figures with what others use for it, all in one run.

- ours: metrics.retrieval, R@K only, and with R-precision and MAP@R;
- faiss: exact search with IndexFlatIP for the K + 1 nearest of every image; the image itself is removed by its index;
- pytorch-metric-learning: AccuracyCalculator, R@1, R-precision and MAP@R (it has no other K);
- the usual research code: full rows of similarities, topk(1 + K), the first neighbour taken for the image itself, then
  a Python loop over queries and K;
- the matrix product: only the N x N similarities in float32, which are not kept; the lower limit without symmetry.

All get the same embeddings (class centres plus noise, R@1 about 0.75, unit vectors, float32) and the same number of
threads. Each runs in its own process, after a small run that loads its libraries.

    python benchmarks/retrieval.py --size sop       # 60,502 x 512, 11,316 classes: some minutes on two cores
    python benchmarks/retrieval.py --size cub       # 5,924 x 512, 100 classes
    python benchmarks/retrieval.py --quick          # 3,000 x 128: only to see that it works
    python benchmarks/retrieval.py --size sop --device cuda

Peak MB: the most memory that the process holds, libraries included. Over the embeddings: the peak less what the process
held once they were loaded. On a GPU both are what torch has allocated there. ps/pair: picoseconds for each of the
N (N - 1) pairs of images.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import Memory, alone, machine, table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))
import metrics  # noqa: E402

CUB_K, SOP_K = (1, 2, 4, 8, 16, 32), (1, 10, 100, 1000)
# name: images, D, classes, noise (chosen for an R@1 of about 0.75), K
SETS = {
    "quick": (3_000, 128, 100, 2.1, SOP_K),
    "cub": (5_924, 512, 100, 3.3, CUB_K),
    "sop": (60_502, 512, 11_316, 2.25, SOP_K),
}


def make_embeddings(images: int, size: int, classes: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around random class centres. The classes have nearly equal sizes, the images are shuffled."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(images) * classes // images)[torch.randperm(images, generator=generator)]
    X = torch.randn(images, size, generator=generator).mul_(noise)
    X += torch.randn(classes, size, generator=generator)[labels]
    return torch.nn.functional.normalize(X).numpy(), labels.numpy()


# The methods: (X, T, ks, device, threads, memory in GiB) -> figures ------------------------------------------------


def ours(X, T, ks, device, threads, memory_gib):
    return metrics.retrieval(X, T, ks=ks, memory_gib=memory_gib, device=device).figures()


def ours_with_precision(X, T, ks, device, threads, memory_gib):
    return metrics.retrieval(X, T, ks=ks, precision=True, memory_gib=memory_gib, device=device).figures()


def faiss_search(X, T, ks, device, threads, memory_gib):
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(X.shape[1])
    index.add(X.numpy())
    _, neighbours = index.search(X.numpy(), min(max(ks) + 1, len(X)))
    T, hits = T.numpy(), dict.fromkeys(ks, 0)
    for start in range(0, len(X), 4096):
        ids = neighbours[start : start + 4096]
        rows = np.arange(start, start + len(ids))[:, None]
        itself = ids == rows
        hit = (T[ids] == T[rows]) & ~itself
        place = hit.argmax(axis=1)
        place -= itself.any(axis=1) & (itself.argmax(axis=1) < place)  # the image itself does not count as a neighbour
        for k in ks:
            hits[k] += int((hit.any(axis=1) & (place < k)).sum())
    return {f"R@{k}": hits[k] / len(X) for k in ks}


def metric_learning(X, T, ks, device, threads, memory_gib):
    import faiss
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    faiss.omp_set_num_threads(threads)
    names = {"precision_at_1": "R@1", "r_precision": "RP", "mean_average_precision_at_r": "MAP@R"}
    calculator = AccuracyCalculator(include=tuple(names), k="max_bin_count", device=torch.device(device))
    found = calculator.get_accuracy(X, T, X, T, ref_includes_query=True)
    return {name: found[key] for key, name in names.items()}


def research_code(X, T, ks, device, threads, memory_gib):
    X, neighbours = X.to(device), []
    for rows in X.split(10_000):  # all at once would be 15 GB for 60,502 images
        similarities = rows @ X.T
        neighbours.append(similarities.topk(1 + min(max(ks), len(X) - 1), dim=1).indices[:, 1:].cpu())
    retrieved = T[torch.cat(neighbours)]
    recall = {}
    for k in ks:
        hits = sum(1 for label, row in zip(T, retrieved, strict=True) if label in row[:k])
        recall[f"R@{k}"] = hits / len(T)
    return recall


def matrix_product(X, T, ks, device, threads, memory_gib):
    X = X.to(device)
    rows = 2048 if device == "cpu" else 16384
    buffer = torch.empty(min(rows, len(X)), len(X), device=device)
    for part in X.split(rows):
        torch.mm(part, X.T, out=buffer[: len(part)])
    return {}


METHODS = {
    "ours, R@K": ours,
    "ours, R@K, RP, MAP@R": ours_with_precision,
    "faiss IndexFlatIP, R@K": faiss_search,
    "pytorch-metric-learning, R@1, RP, MAP@R": metric_learning,
    "usual research code, R@K": research_code,
    "matrix product alone": matrix_product,
}
OURS = ["ours, R@K", "ours, R@K, RP, MAP@R", "matrix product alone"]


def measure_method(name: str, folder: str, ks: tuple, device: str, threads: int, memory_gib: float) -> dict:
    """Seconds, bytes and figures of one search."""
    torch.set_num_threads(threads)
    X, T = (torch.from_numpy(np.load(f"{folder}/{what}.npy")) for what in ("embeddings", "labels"))
    if device == "cpu":
        small_T = torch.arange(200) % 20
        METHODS[name](X[:200].clone(), small_T, ks[:1], device, threads, memory_gib)
    else:  # the first call loads the kernels for large blocks
        METHODS[name](X, T, ks, device, threads, memory_gib)
    memory = Memory(device)
    start = time.perf_counter()
    figures = METHODS[name](X, T, ks, device, threads, memory_gib)
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": memory.peak(), "extra": memory.extra(), "figures": figures}


def measure_set(name: str, methods: list[str], args) -> None:
    images, size, classes, noise, ks = SETS[name]
    print(f"\n{name}: {images:,} × {size}, {classes:,} classes, search memory {args.memory_gib} GiB\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        X, T = make_embeddings(images, size, classes, noise)
        np.save(f"{folder}/embeddings.npy", X)
        np.save(f"{folder}/labels.npy", T)
        del X, T
        found = {}
        for method in methods:
            runs = [
                alone(measure_method, method, folder, ks, args.device, args.threads, args.memory_gib)
                for _ in range(args.repeats)
            ]
            found[method] = sorted(runs, key=lambda run: run["seconds"])[(len(runs) - 1) // 2]
    reference = found["ours, R@K"]["seconds"]
    rows = [
        [
            method,
            f"{run['seconds']:.2f}",
            f"{run['seconds'] / reference:.2f}",
            f"{1e12 * run['seconds'] / images / (images - 1):,.0f}",
            f"{run['peak'] / 1e6:,.0f}",
            f"{run['extra'] / 1e6:,.0f}",
        ]
        for method, run in found.items()
    ]
    print(table(["", "seconds", "times ours", "ps/pair", "peak MB", "over the embeddings MB"], rows))
    print_figures(found)


def print_figures(found: dict[str, dict]) -> None:
    """The figures of all methods side by side, and the largest difference between them."""
    names = list(dict.fromkeys(name for run in found.values() for name in run["figures"]))
    rows = [
        [method, *(f"{run['figures'][name]:.6f}" if name in run["figures"] else "" for name in names)]
        for method, run in found.items()
        if run["figures"]
    ]
    spread = [
        max(values) - min(values)
        for values in ([run["figures"][name] for run in found.values() if name in run["figures"]] for name in names)
    ]
    print()
    print(table(["", *names], [*rows, ["largest difference", *(f"{value:.1e}" for value in spread)]]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--size", choices=["sop", "cub"], default="sop", help="size of the set (default sop)")
    parser.add_argument("--quick", action="store_true", help="a small set instead of --size, only to see that it works")
    parser.add_argument("--threads", type=int, default=2, help="threads on the CPU (default 2)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda leaves out what needs the CPU")
    parser.add_argument("--memory-gib", type=float, default=1.0, help="memory limit for our search (default 1)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each method; the median is shown (default 1)")
    args = parser.parse_args()
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(args.threads)

    print(machine(args.device, args.threads))
    on_gpu = [*OURS, "usual research code, R@K"]
    measure_set("quick" if args.quick else args.size, list(METHODS) if args.device == "cpu" else on_gpu, args)


if __name__ == "__main__":
    main()
