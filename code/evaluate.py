"""Score a checkpoint: retrieval among images of classes it was not trained on.

    python code/evaluate.py --model-path logs/glyphs/run_1/glyphs_resnet18_best.pth
    python code/evaluate.py --dataset cub --model-path logs/          # a folder that holds cub_resnet50_best.pth
    python code/evaluate.py --model-path FILE --metrics all --json figures.json
    python code/evaluate.py --model-path FILE --export network.onnx   # for other programs; nothing is scored

Checkpoints of this project know their architecture and data set; for published ones the flags say them.
"""

import json
import sys
import warnings

import checkpoint
import dataset
import distributed
import flags
import inference
import metrics
import net
import numpy as np
import pictures
import runlog
import torch


def main():
    parser = flags.evaluate_parser()
    args, given = parser.parse()
    names = {"recall", "rp", "map", "nmi"} if "all" in args.metrics else set(args.metrics)
    gpu_id = distributed.start(args.gpu_id)
    processes = distributed.processes()  # started by torchrun, they share embedding and search; process 0 alone writes
    device = runlog.choose_device(gpu_id)
    print(f"device: {runlog.describe_device(device)}" + (f", {processes.count} processes" * (processes.count > 1)))

    num_bad, origin = 0, {}
    if args.embeddings:
        for option in ("pictures", "export"):
            if getattr(args, option):
                raise ValueError(f"--{option} needs a network: give --model-path instead of --embeddings")
        query, gallery, ks, source = *read_embeddings(args.embeddings), str(args.embeddings)
    else:
        named = runlog.best_name(args.dataset, args.model)
        path = checkpoint.find(args.model_path, named, only=bool(given & {"dataset", "model"}))
        content = checkpoint.load(path)
        args = parser.adopt(args, given, checkpoint.stored_flags(content), path)
        network = net.build(args.model, args.sz_embedding, "none", bool(args.add_gmp), bool(args.layer_norm))
        net.load_network_state(network, checkpoint.network_state(content, path), path)
        args.image_size = args.image_size or network.image_size
        origin = {"trained_by": content.get("made_by"), "trained_with": checkpoint.stored_flags(content)}
        if args.export:
            if processes.count > 1:
                raise ValueError("--export is done by one process: start it without torchrun")
            export(network, args)
            return
        benchmark = dataset.load_benchmark(args.dataset, args.data_root, args.train_classes)
        for warning in benchmark.warnings if processes.rank == 0 else ():
            print(f"warning: {warning}", file=sys.stderr)
        network.to(device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
        query = embed(network, benchmark.query, device, args)
        gallery = embed(network, benchmark.gallery, device, args) if benchmark.gallery is not None else None
        ks, source = benchmark.recall_at, str(path)
        parts = [(benchmark.query, query), (benchmark.gallery, gallery)][: 2 if gallery else 1]
        num_bad = sum(len(images) - len(part.rows) for images, part in parts)
        if args.save_embeddings and processes.rank == 0:
            save_embeddings(args.save_embeddings, parts, ks)
            print(f"embeddings: {args.save_embeddings}")

    sets = (*query[:2], *(gallery[:2] if gallery else (None, None)))
    precision = bool(names & {"rp", "map"})
    found = metrics.retrieval(*sets, ks, precision, args.search_memory, device, progress=True)
    figures = {
        name: value
        for name, value in found.figures().items()
        if name.startswith("R@") or name.split("@")[0].lower() in names
    }
    if "nmi" in names:
        everything = [torch.cat(parts) for parts in zip(query[:2], gallery[:2], strict=True)] if gallery else query[:2]
        figures["NMI"] = metrics.nmi(*everything, memory_gib=args.search_memory, device=device, progress=True)
    distributed.stop()
    if processes.rank != 0:
        return
    report(args, device, source, gallery, found, figures, num_bad, origin)
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
        pictures.search(
            args.pictures, found.per_query, query, benchmark.query, gallery, benchmark.gallery, metrics.nearest
        )
        print(f"pictures: {args.pictures}/neighbours.png, {args.pictures}/embedding.png")


def export(network, args):
    """Write the network as ONNX, in float32 and for batches of any size: images (N, 3, H, W) -> embeddings (N, D).

    How images have to be prepared stands in the file's metadata. Where onnxruntime is installed, its embeddings are
    compared with torch's. Raises ValueError where they differ, or what exporting takes is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--export: {error.name} is not installed (pip install onnx onnxscript)") from error
    network.eval()
    images = torch.randn(3, 3, args.image_size, args.image_size, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own parts
        try:
            program = torch.onnx.export(
                network,
                (images[:2],),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["embeddings"],
                dynamic_shapes=({0: batch},),
            )
        except torch.onnx.OnnxExporterError as error:  # of timm's networks not all can be traced
            raise ValueError(f"--export: torch cannot export {args.model} ({str(error).strip()[:200]})") from error
    program.model.metadata_props.update(
        {
            "image_size": str(args.image_size),
            "resize": f"shorter side to {round(args.image_size * 256 / 224)} pixels, then the middle",
            "channels": "BGR" if network.bgr else "RGB",
            "range": f"0 to {network.scale:g}",
            "mean": str(list(network.mean)),
            "std": str(list(network.std)),
        }
    )
    content = program.model_proto.SerializeToString()
    compared = "not compared, onnxruntime is not installed"
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        with torch.inference_mode():
            difference = np.abs(session.run(None, {"images": images.numpy()})[0] - network(images).numpy()).max()
        if not difference < 1e-4:
            raise ValueError(f"--export: onnxruntime's embeddings differ from torch's by {difference:.1e}, not written")
        compared = f"onnxruntime differs from torch by at most {difference:.1e}"
    except ImportError:
        pass
    checkpoint.write(lambda file: file.write(content), args.export)
    print(f"exported: {args.export} ({len(content) / 2**20:.0f} MiB; {compared})")


def report(args, device, source, gallery, found, figures, num_bad, origin):
    print(f"checkpoint: {source}")
    searched = f"gallery: {len(gallery.labels):,}" if gallery else "each among the others"
    print(f"queries: {found.num_queries:,}, {searched}")
    if found.num_without_positive:
        print(f"left out: {found.num_without_positive:,} queries without another image of their class")
    if num_bad:
        print(f"left out: {num_bad:,} images that could not be decoded")
    if args.remark:
        print(f"remark: {args.remark}")
    for name, value in figures.items():
        print(f"{name:<7} {100 * value:.4f}")
    if args.json:
        content = {
            "checkpoint": source,
            "dataset": args.dataset,
            "queries": found.num_queries,
            "gallery": len(gallery.labels) if gallery else None,
            "without_positive": found.num_without_positive,
            "undecoded": num_bad,
            "figures": figures,
            "scored_by": runlog.environment(device),
            "scored_with": flags.plain(args),
            **origin,
        }
        checkpoint.write_text(json.dumps(content, indent=2) + "\n", args.json)


def embed(network, images, device, args):
    """inference.Embedded of one split."""
    transform = dataset.eval_transform(args.image_size, network.mean, network.std, network.bgr, network.scale)
    loader = dataset.make_eval_loader(
        images,
        transform,
        args.sz_batch,
        args.nb_workers,
        device.type == "cuda",
        args.skip_bad_images,
        distributed.processes(),
    )
    return inference.embed(network, loader, device, args.amp == "bf16", args.channels_last)


def save_embeddings(path, parts, ks):
    arrays = {"ks": np.array(ks)}
    for (images, part), prefix in zip(parts, ("", "gallery_"), strict=False):
        arrays |= {
            f"{prefix}embeddings": part.embeddings.numpy(),
            f"{prefix}labels": part.labels.numpy(),
            f"{prefix}paths": np.array([images.paths[row] for row in part.rows]),
        }
    checkpoint.write(lambda file: np.savez(file, **arrays), path)


def read_embeddings(path):
    """(query, gallery or None, ks) of a file that --save-embeddings wrote."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            parts = []
            for prefix in ("", "gallery_"):
                if not prefix or f"{prefix}embeddings" in arrays:
                    embeddings, labels = arrays[f"{prefix}embeddings"], arrays[f"{prefix}labels"]
                    tensors = torch.from_numpy(embeddings), torch.from_numpy(labels)
                    parts.append(inference.Embedded(*tensors, torch.arange(len(labels))))
            ks = tuple(int(k) for k in arrays["ks"]) if "ks" in arrays else (1, 2, 4, 8, 16, 32)
    except OSError:
        raise
    except Exception as error:  # a damaged archive fails in many ways
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: no embeddings that --save-embeddings wrote ({reason})") from error
    return parts[0], parts[1] if len(parts) > 1 else None, ks


if __name__ == "__main__":
    flags.run_script(main)
