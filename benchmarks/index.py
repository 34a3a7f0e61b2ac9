"""When retrieve.py --index faiss pays: its exact search against the inverted file, by the number of queries.

    python benchmarks/index.py                    # a million embeddings of 128 dimensions: some minutes on two cores
    python benchmarks/index.py --noise 0.5        # classes that lie closer together than apart

Unit vectors around class centres, 20 to a class; the queries are new vectors of the same classes. Both times are those
of a call: the inverted file is made anew in each. Found: share of the ten truly nearest that the inverted file gives.
"""

import argparse
import sys
import time
from pathlib import Path

import faiss
import torch
from measure import machine, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))
import metrics  # noqa: E402
import retrieve  # noqa: E402

K = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--size", type=int, default=128, help="D (default 128)")
    parser.add_argument("--noise", type=float, default=1.3, help="around the class centres (default 1.3)")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 100, 1000, 10_000])
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    classes = args.images // 20
    centres = torch.randn(classes, args.size, generator=generator)

    def draw(count):
        labels = torch.arange(count) % classes
        return centres[labels] + args.noise * torch.randn(count, args.size, generator=generator)

    gallery, rows = draw(args.images), []
    for count in args.queries:
        query = draw(count)
        started = time.perf_counter()
        exact, _ = metrics.nearest(query, gallery, K)
        middle = time.perf_counter()
        found, _ = retrieve.search_faiss(query, gallery, K)
        seconds = time.perf_counter() - middle
        hits = sum(len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist(), strict=True))
        rows.append([f"{count:,}", f"{middle - started:.1f}", f"{seconds:.1f}", f"{hits / K / count:.1%}"])
    print(machine("cpu", torch.get_num_threads()) + f", faiss {faiss.__version__}")
    print(f"\n{args.images:,} embeddings of {args.size} dimensions\n")
    print(table(["queries", "exact s", "inverted file s", "found"], rows))


if __name__ == "__main__":
    main()
