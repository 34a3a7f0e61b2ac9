"""Score a checkpoint: retrieval among images of classes it was not trained on.

Checkpoints of this project know their architecture and data set; for published ones the flags say them:
    python code/evaluate.py --model-path logs/glyphs/run_1                    # the best epoch of a run
    python code/evaluate.py --dataset cub --model-path cub_resnet50_best.pth   # a published one
"""

import json
import operator
import sys
import warnings
from pathlib import Path

import checkpoint
import dataset
import distributed
import flags
import inference
import layouts
import metrics
import numpy as np
import summary
import torch
from folders import shorten
from refused import Refused, one_line


def main():
    # Flags, and where results go
    parser = flags.evaluate_parser()
    args, given = parser.parse()
    names = {"rp", "map", "nmi"} if "all" in (args.metrics or ()) else set(args.metrics or ())
    check_flags(args, given)
    device = distributed.start(args.gpu_id)
    processes = distributed.processes()  # started by torchrun they share the work; process 0 writes and speaks
    distributed.announce(device, args.gpu_id)

    # Embeddings: from a file, or of a checkpoint's network
    if args.embeddings:
        query, gallery, ks, measured = read_embeddings(args, given)
    else:
        named = checkpoint.best_name(args.dataset, args.model)
        loaded = inference.load_network(parser, args, given, named, bool(given & {"dataset", "model"}), device)
        args = loaded.args
        if args.export:
            if processes.rank == 0:
                to_onnx(loaded.network.cpu(), loaded.image_size, args.export)
            return distributed.stop()
        benchmark = load_benchmark(args, given, loaded)
        args.amp = inference.amp_to_score_with(args, given, device)
        options = (loaded.image_size, args.sz_batch, args.nb_workers, device)
        loaders = [inference.make_loader(images, *options) for images in (benchmark.query, benchmark.gallery)]
        options = (device, args.amp == "bf16", args.channels_last)
        query, gallery = (inference.embed(loaded.network, loader, *options) for loader in loaders)
        ks, measured = benchmark.recall_at, describe(benchmark, loaded)
        if args.save_embeddings and processes.rank == 0:
            save_embeddings(args.save_embeddings, benchmark, query, gallery)
            print(f"embeddings: {args.save_embeddings}")

    # Scores
    try:
        found = inference.score(query, gallery, ks, device, args.search_memory, precision=bool(names & {"rp", "map"}))
    except Refused as error:
        raise Refused(f"{measured['data_root']}: {error}") from error
    wanted = {"r", *names}  # R@K, RP and MAP@R
    scores = {name: value for name, value in found.figures().items() if name.split("@")[0].lower() in wanted}
    scored_by = summary.environment(device)
    distributed.stop()
    if processes.rank != 0:
        return

    if "nmi" in names:
        everything = [torch.cat(parts) for parts in zip(query[:2], gallery[:2], strict=True)] if gallery else query[:2]
        scores["NMI"] = metrics.nmi(*everything)

    # What was reached, on what
    report(args, scored_by, measured, found, scores)
    if doubt := inference.doubt(query, gallery):
        print(f"warning: {doubt}", file=sys.stderr)
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
        inference.draw_search(args.pictures, found, query, gallery, benchmark)
        print(f"pictures: {args.pictures}/neighbours.png, {args.pictures}/embedding.png")


def check_flags(args, given):
    """Refuse what cannot work before the work begins: contradictory flags, files that cannot be written."""
    for flag, unfit, does in (
        ("embeddings", {"model_path", "pictures", "export", "save_embeddings"}, "scores a file without a network"),
        ("export", {"json", "pictures", "save_embeddings", "metrics"}, "scores nothing"),
    ):
        if flag in given and (others := sorted(given & unfit)):
            raise Refused(f"--{flag} {does}: leave out --{others[0].replace('_', '-')}")
    for option in ("json", "save_embeddings", "export"):
        checkpoint.require_writable(getattr(args, option), f"--{option.replace('_', '-')}")
    checkpoint.require_writable(args.pictures, "--pictures", folder=True)


def load_benchmark(args, given, loaded) -> dataset.Benchmark:
    """The data to score on; says where the test images changed since training.

    Raises Refused or OSError where flags, data and checkpoint do not fit each other, above all where the network was
    trained on the classes to score on.
    """
    stored = checkpoint.stored_flags(loaded.content)
    if "dataset" not in given and "dataset" not in stored:
        raise Refused(f"{loaded.path} does not say what it was trained on: --dataset is needed")
    if args.dataset == "folder" and "data_root" not in given and stored.get("dataset") != "folder":
        raise Refused(flags.NO_FOLDER)
    options = {"share_given": "train_classes" in given, "skip_bad": args.skip_bad_images, "workers": args.nb_workers}
    benchmark = dataset.load_benchmark(args.dataset, args.data_root, args.train_classes, training=False, **options)
    inference.announce(benchmark)

    trained_on = loaded.content.get("data") if stored else None  # other trainers may mean something else by "data"
    same = args.dataset == stored.get("dataset")
    if not trained_on or not (same or "folder" in (args.dataset, stored.get("dataset"))):
        return benchmark
    tested = set(benchmark.query.class_names)
    names = dataset.classes_as_now(trained_on["train"], dataset.fingerprint(benchmark.query))
    # Numbers of one benchmark are not those of another folder.
    seen = [name for name in names if name in tested and (same or not name.isdigit())]
    if seen:
        raise Refused(
            f"{loaded.path} was trained on {len(seen):,} of the {len(tested):,} classes to score on "
            f"({shorten([repr(name) for name in seen])}), which says nothing about unseen classes: check --dataset, "
            f"--train-classes and --data-root, and whether {args.data_root} changed since"
        )
    for split, images in (("query", benchmark.query), ("gallery", benchmark.gallery)):
        then = trained_on.get(split)
        if same and images and then and (changed := dataset.changes(then, dataset.fingerprint(images))):
            print(f"warning: not the test images of the training run: {changed}", file=sys.stderr)
    return benchmark


def describe(benchmark, loaded) -> dict:
    """What a checkpoint is scored on, for the console and the JSON file."""
    splits = [("train", benchmark.train), ("query", benchmark.query), ("gallery", benchmark.gallery)]
    return {
        "checkpoint": str(loaded.path),
        "dataset": benchmark.name,
        "data_root": str(benchmark.query.root),
        "splits": {split: {"images": len(of), "classes": of.num_classes} for split, of in splits if of is not None},
        "image_size": loaded.image_size,
        "precision": loaded.args.amp.replace("off", "float32"),
        "undecoded": len(benchmark.unreadable),
        "trained_by": loaded.content.get("made_by"),
        "trained_with": checkpoint.stored_flags(loaded.content),
    }


def report(args, scored_by, measured, found, scores):
    """Print the scores and what they were measured on; write both as JSON if asked to."""
    sizes = measured["splits"]
    gallery = sizes.get("gallery", {}).get("images")
    splits = [f"{split} {size['images']:,} images of {size['classes']:,} classes" for split, size in sizes.items()]
    print(f"checkpoint: {measured['checkpoint']}")
    print(f"data: {measured['dataset'] or 'unknown'} in {measured['data_root']}, {', '.join(splits)}")
    if measured["image_size"]:
        print(f"images: {measured['image_size']} pixels, network in {measured['precision']}")
    searched = f"gallery: {gallery:,}" if gallery else "each among the others"
    print(f"queries: {found.num_queries:,}, {searched}")
    if found.num_without_positive:
        print(f"left out: {found.num_without_positive:,} queries without another image of their class")
    if args.remark:
        print(f"remark: {args.remark}")
    for name, value in scores.items():
        print(f"{name:<7} {100 * value:.4f}")
    if args.json:
        content = measured | {
            "queries": found.num_queries,
            "gallery": gallery,
            "without_positive": found.num_without_positive,
            "figures": scores,
            "scored_by": scored_by,
            "scored_with": flags.plain(args) | {"image_size": measured["image_size"]},
        }
        checkpoint.write_text(json.dumps(content, indent=2) + "\n", args.json)


def save_embeddings(path: Path, benchmark, query, gallery) -> None:
    """An .npz of embeddings (N, D), labels (N,) and paths (N,), for a gallery with gallery_ before; and the K."""
    arrays = {"ks": np.array(benchmark.recall_at), "dataset": np.array(benchmark.name)}
    for images, part, prefix in ((benchmark.query, query, ""), (benchmark.gallery, gallery, "gallery_")):
        if part is not None:
            arrays |= {
                f"{prefix}embeddings": part.embeddings.numpy(),
                f"{prefix}labels": part.labels.numpy(),
                f"{prefix}paths": np.array(images.paths),
            }
    checkpoint.write(lambda file: np.savez(file, **arrays), path)


def read_embeddings(args, given):
    """(query, gallery or None, K, what is measured) of a file like those of --save-embeddings.

    The K are those of --dataset if it is given, else the file's, else 1 2 4 8 16 32. Raises Refused or OSError.
    """
    path = args.embeddings
    try:
        with np.load(path, allow_pickle=False) as file:  # reads an array when it is asked for
            parts = {"query": embedded(file, "")}
            if any(name.startswith("gallery_") for name in file):
                parts["gallery"] = embedded(file, "gallery_")
            ks = [operator.index(k) for k in file["ks"]] if "ks" in file else layouts.get("folder").recall_at
            name = file["dataset"].item() if "dataset" in file else None
    except Exception as error:  # a damaged archive fails in many ways
        raise Refused(f"{path}: no embeddings that --save-embeddings wrote ({one_line(error)})") from error
    if "dataset" in given:
        name, ks = name or args.dataset, layouts.get(args.dataset).recall_at
    splits = {split: {"images": of.numel(), "classes": len(of.unique())} for split, (_, of) in parts.items()}
    measured = dict(checkpoint=str(path), dataset=name, data_root=str(path), splits=splits, image_size=None)
    return parts["query"], parts.get("gallery"), tuple(ks), measured


def embedded(file, prefix: str) -> inference.Embedded:
    """Arrays of a file as tensors, whose shapes and values metrics.py checks."""
    embeddings, labels = file[f"{prefix}embeddings"], file[f"{prefix}labels"]
    if embeddings.dtype.kind != "f" or labels.dtype.kind not in "iu":
        raise Refused(
            "embeddings must be floating point and labels whole numbers, one for each class; they are "
            f"{embeddings.dtype} and {labels.dtype}"
        )
    wide = embeddings.dtype.itemsize > 4  # torch has neither float128 nor the other byte order
    embeddings = embeddings.astype(np.float64 if wide else np.float32)
    return inference.Embedded(torch.from_numpy(embeddings), torch.from_numpy(labels.astype(np.int64)))


def to_onnx(network, image_size: int, path: Path) -> None:
    """Write a network in float32, for batches of any size: images (N, 3, H, W) -> embeddings (N, D).

    Preprocessing is stored in the file's metadata. Raises Refused if the network cannot be exported, or packages are
    missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise Refused(f"--export: {error.name} is not installed (pip install onnx onnxscript)") from error
    network.eval()
    images = torch.zeros(2, 3, image_size, image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own parts
        names = {"input_names": ["images"], "output_names": ["embeddings"]}
        sizes = ({0: torch.export.Dim("batch")},)
        try:
            program = torch.onnx.export(network, (images,), dynamo=True, verbose=False, dynamic_shapes=sizes, **names)
        except torch.onnx.OnnxExporterError as error:  # some networks of timm cannot be traced
            raise Refused(f"--export: torch cannot export {network.name} ({str(error).strip()[:200]})") from error
    program.model.metadata_props.update(
        {
            "image_size": str(image_size),
            "resize": f"shorter side to {round(image_size * 256 / 224)} pixels, then the middle",
            "channels": "BGR" if network.bgr else "RGB",
            "range": f"0 to {network.scale:g}",
            "mean": str(list(network.mean)),
            "std": str(list(network.std)),
        }
    )
    content = program.model_proto.SerializeToString()
    checkpoint.write(lambda file: file.write(content), path)
    print(f"exported: {path} ({len(content) / 2**20:.0f} MiB)")


if __name__ == "__main__":
    flags.run_script(main)
