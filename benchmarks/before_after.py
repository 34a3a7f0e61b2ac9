"""The README's picture: nearest neighbours of unseen glyphs before and after training.

    python code/train.py @recipes/glyphs.args
    python benchmarks/before_after.py logs/glyphs/run_1/glyphs_resnet18_best.pth benchmarks/pictures/before_after.png

Left the network as it was initialised (same flags, same seed), right the checkpoint; the same queries, drawn at random.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))
import checkpoint
import dataset
import flags
import inference
import metrics
import net
import pictures

QUERIES = 6


def main():
    path, output = Path(sys.argv[1]), Path(sys.argv[2])
    content = checkpoint.load(path)
    parser = flags.train_parser()
    args = parser.parse(parser.command_line(checkpoint.stored_flags(content)))[0]
    images = dataset.load_benchmark(args.dataset, args.data_root).query
    loader = dataset.make_eval_loader(images, dataset.eval_transform(args.image_size), 150)
    torch.manual_seed(args.seed)
    network = net.build(args.model, args.sz_embedding, args.weights, args.add_gmp, args.layer_norm, args.bn_freeze)
    chosen = torch.from_numpy(np.random.RandomState(0).permutation(len(images))[:QUERIES])
    sides = []
    for title in ("before training", "after training"):
        embedded = inference.embed(network, loader, "cpu", args.amp == "bf16")
        found = metrics.retrieval(embedded.embeddings, embedded.labels, ks=(1,))
        print(f"{title}: R@1 {100 * found.recall[1]:.2f}")
        index, similarity = metrics.nearest(embedded.embeddings[chosen], embedded.embeddings, 8, chosen)
        with tempfile.TemporaryDirectory() as folder:
            drawn = Path(folder, "side.png")
            pictures.neighbours(
                [images.root / images.paths[q] for q in chosen],
                [[images.root / images.paths[n] for n in row] for row in index],
                (embedded.labels[index] == embedded.labels[chosen][:, None]).tolist(),
                similarity.tolist(),
                [f"{title}, query {n + 1}" for n in range(QUERIES)],
                drawn,
            )
            sides.append(Image.open(drawn).convert("RGB"))
        net.load_network_state(network, checkpoint.network_state(content, path), path)
    both = Image.new("RGB", (sides[0].width + sides[1].width + 40, max(side.height for side in sides)), "white")
    both.paste(sides[0], (0, 0))
    both.paste(sides[1], (sides[0].width + 40, 0))
    both.quantize(128).save(output, optimize=True)


if __name__ == "__main__":
    main()
