"""Find the images of a folder that are most like given ones, with a trained network.

    python code/retrieve.py --model-path logs/folder/run_1 --gallery my_pictures --query photo.jpg

The gallery is embedded once. Its embeddings are kept beside it in GALLERY.embeddings-KEY.npz, where the key names the
checkpoint and how images are prepared; later calls only embed new and changed files. Writes neighbours.csv (all
queries), neighbours.png (some) and neighbours.html, a page that needs no other file. A query in the gallery is not its
own neighbour. The search is exact.
"""

import base64
import csv
import hashlib
import io
import os
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import quote

import checkpoint
import dataset
import decoding
import distributed
import flags
import folders
import inference
import jinja2
import metrics
import numpy as np
import pictures
import torch
from PIL import Image
from refused import Refused
from tqdm import tqdm

TEMPLATE = flags.CODE / "retrieve_template.html"
PART = 10_000  # images at least that are embedded at a time, with the cache written in between
MOST_SHOWN, MOST_ON_PAGE = 10, 200  # queries that are printed and drawn, and on the page; the CSV file holds all
MOST_NEIGHBOURS = 20  # of each that are printed and shown; the CSV file holds all of them
SIDE = 160  # pixels of the longer side of a picture on the page


def main():
    # Flags, images, network
    parser = flags.retrieve_parser()
    args, given = parser.parse()
    if distributed.several():
        raise Refused("retrieve.py is one process: start it without torchrun")
    if not args.gallery.resolve().name:
        raise Refused(f"--gallery {args.gallery}: name a folder in it; embeddings are kept beside the gallery")
    queries, galleries = list_images(args.query, "--query"), list_images(args.gallery, "--gallery")
    for searched in (args.gallery, args.query):
        if searched.is_dir() and args.output.resolve().is_relative_to(searched.resolve()):
            raise Refused(f"--output {args.output} lies in {searched} and would be searched next time: name another")
    checkpoint.require_writable(args.output, "--output", folder=True)
    device = distributed.choose_device(args.gpu_id)
    distributed.announce(device, args.gpu_id)
    loaded = inference.load_network(parser, args, given, checkpoint.best_name("DATASET", "MODEL"), False, device)
    args = loaded.args
    print(f"checkpoint: {loaded.path}")
    args.amp = inference.amp_to_score_with(args, given, device)

    # Embeddings
    vectors, rows, bad = embed(loaded, queries, device)
    if not len(rows):
        raise Refused(f"--query: none of {len(queries):,} images can be decoded: {next(iter(bad.values()))}")
    gallery_vectors, gallery_rows = embed_gallery(loaded, galleries, device)

    # Search. A query does not find its own file, whatever links in the gallery lead to it.
    files = [galleries.file(row) for row in gallery_rows]
    identities = [folders.file_identity(file) for file in files]
    k, memory = args.top_k + max(Counter(identities).values()), args.search_memory
    found, similarities = metrics.nearest(vectors, gallery_vectors, k, None, memory, device, progress=True)
    neighbours = {queries.file(row): [] for row in range(len(queries))}  # file -> [(nearest file, similarity), …]
    for row, places, values in zip(rows, found.tolist(), similarities.tolist(), strict=True):
        own = folders.file_identity(queries.file(row))
        pairs = [(files[i], value) for i, value in zip(places, values, strict=True) if identities[i] != own]
        neighbours[queries.file(row)] = pairs[: args.top_k]
    write(args, neighbours, bad, len(files))


def list_images(path: Path, option: str) -> dataset.ImageList:
    """One image, or all below a folder, without classes."""
    if path.is_file() and option == "--query":
        return own_pictures(path.parent, [path.name])
    if not path.is_dir():
        raise Refused(f"{option} {path}: there is no such {'image or ' * (option == '--query')}folder")
    found, others = folders.find_images(path)
    if others:
        print(f"note: {path}: skipped {folders.tell_skipped(others)}", file=sys.stderr)
    if not found:
        raise Refused(f"{option} {path}: the folder holds no image")
    return own_pictures(path, found)


def own_pictures(root: Path, paths: list[str]) -> dataset.ImageList:
    return dataset.ImageList(root, paths, np.zeros(len(paths), np.int64), [""], own=True)


class MarkedWhereUnreadable(dataset.ImageDataset):
    """Black and the label -1 for what cannot be decoded."""

    def __getitem__(self, row):
        try:
            return super().__getitem__(row)
        except decoding.UnreadableImage:
            return self.transform(Image.new("RGB", (9, 9))), -1


def embed(loaded, images, device) -> tuple[torch.Tensor, np.ndarray, dict[str, str]]:
    """Embeddings (n, D) of those of the images that can be decoded, which these are (n,), {file: why} of the others."""
    args = loaded.args
    marked = MarkedWhereUnreadable(images, dataset.eval_transform(loaded.image_size))
    batch_bytes = marked.bytes_of(min(args.sz_batch, len(marked)))
    loader = dataset.Loader(marked, args.nb_workers, device.type == "cuda", batch_bytes, batch_size=args.sz_batch)
    done = inference.embed(loaded.network, loader, device, args.amp == "bf16", args.channels_last)
    decoded = done.labels.numpy() >= 0
    bad = [images.file(row) for row in np.flatnonzero(~decoded)]
    why = {bad[row]: reason for row, reason in dataset.undecodable(bad, True, range(len(bad))).items()}
    return done.embeddings[decoded], np.flatnonzero(decoded), why


def cache_path(loaded) -> Path:
    """Beside the gallery; other weights, or another preparation of the images, have another name."""
    key, args = hashlib.sha256(), loaded.args
    for name, tensor in sorted(checkpoint.network_state(loaded.content, loaded.path).items()):
        key.update(name.encode())
        key.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    made_with = (2, args.model, args.sz_embedding, args.add_gmp, args.layer_norm, loaded.image_size, args.amp)
    key.update(repr(made_with).encode())
    gallery = args.gallery.resolve()
    return gallery.with_name(f"{gallery.name}.embeddings-{key.hexdigest()[:12]}.npz")


def embed_gallery(loaded, images, device) -> tuple[torch.Tensor, np.ndarray]:
    """As embed(), with embeddings from the cache where a file is as it was; says which cannot be decoded."""
    cache, keys = cache_path(loaded), file_keys(images)
    checkpoint.remove_leftovers(cache.parent, cache.name.rpartition("-")[0])
    embeddings, known = read_cache(cache, keys, loaded.network.embedding_size)
    todo, bad = np.flatnonzero(~known), []
    print(f"gallery: {len(images):,} images, {len(images) - len(todo):,} of them from {cache}")
    while len(todo):
        # The whole file is written anew each time, so that a large one waits until a tenth of it is new.
        rows, todo = np.split(todo, [max(PART, known.sum() // 10)])
        part = own_pictures(images.root, [images.paths[row] for row in rows])
        vectors, decoded, why = embed(loaded, part, device)
        embeddings[rows[decoded]] = vectors
        known[rows[decoded]] = True
        bad += why.values()
        if len(decoded):
            try:
                checkpoint.write(lambda file: np.savez(file, keys=keys[known], embeddings=embeddings[known]), cache)
            except Refused as error:
                print(f"warning: {error}; the next call has to embed the gallery again", file=sys.stderr)
    if not known.any():
        raise Refused(f"--gallery: none of its {len(images):,} images can be decoded: {bad[0]}")
    if bad:
        print(f"warning: left out of the gallery: {len(bad):,} that cannot be decoded, the first:", file=sys.stderr)
    for line in bad[:MOST_SHOWN]:
        print(f"warning: {line}", file=sys.stderr)
    return torch.from_numpy(embeddings[known] if bad else embeddings), np.flatnonzero(known)


def file_keys(images) -> np.ndarray:
    """A key for each file (N,), another one once its name, size, or the time of its content or its entry changes."""
    keys = []
    for path in tqdm(images.paths, "look at files", unit="file", disable=None, leave=False):
        stat = os.stat(images.root / path)
        state = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {path}"
        keys.append(hashlib.sha256(os.fsencode(state)).hexdigest()[:32])
    return np.array(keys, "S32")


def read_cache(cache: Path, keys: np.ndarray, embedding_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, D) of the files as far as the cache has them, and of which it does (N,)."""
    embeddings = np.zeros((len(keys), embedding_size), np.float32)
    known = np.zeros(len(keys), bool)
    try:
        with np.load(cache, allow_pickle=False) as file:
            _, rows, old = np.intersect1d(keys, file["keys"], assume_unique=True, return_indices=True)
            embeddings[rows] = file["embeddings"][old]
            known[rows] = True
    except FileNotFoundError:
        pass
    except Exception as error:  # a damaged archive fails in many ways; all that is lost is time
        print(f"warning: {cache}: cannot be used ({type(error).__name__}), embedding anew", file=sys.stderr)
    return embeddings, known


def write(args, neighbours: dict[str, list[tuple[str, float]]], bad: dict[str, str], size: int) -> None:
    """neighbours: query -> [(file of the gallery, similarity), …]; bad: query -> why it could not be decoded."""
    args.output.mkdir(parents=True, exist_ok=True)
    files = [args.output / f"neighbours.{suffix}" for suffix in ("csv", "png", "html")]
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("query", "rank", "neighbour", "cosine_distance", "cosine_similarity"))
    for query, found in neighbours.items():
        for rank, (file, value) in enumerate(found, 1):
            table.writerow((query, rank, file, f"{max(0, 1 - value):.7f}", f"{value:.7f}"))
        if query in bad:
            table.writerow((query, "", "", "", ""))
    checkpoint.write(lambda file: file.write(text.getvalue().encode("utf-8", "surrogateescape")), files[0])

    shown = {query: found[:MOST_NEIGHBOURS] for query, found in neighbours.items()}
    drawn = {query: shown[query] for query in [query for query in shown if query not in bad][:MOST_SHOWN]}
    rows = [(f"query: {query}", query, [(*pair, None) for pair in found]) for query, found in drawn.items()]
    pictures.neighbours(rows, files[1], own=True, named=True)
    count = f"{len(neighbours) - len(bad):,}" + (f" and {len(bad):,} that cannot be decoded" if bad else "")
    sections = tqdm(list(shown.items())[:MOST_ON_PAGE], "page", unit="query", disable=None, leave=False)
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    html = template.render(
        dict(args=args, sections=sections, bad=bad, count=count, size=size, number=len(neighbours), most=MOST_ON_PAGE),
        link=lambda path: quote(os.path.relpath(path, args.output).encode("utf-8", "surrogateescape")),
        thumbnail=thumbnail,
    )
    checkpoint.write_text(html, files[2])

    for query, found in drawn.items():
        print(f"\n{query}", *(f"{n:>4}  {value:.4f}  {file}" for n, (file, value) in enumerate(found, 1)), sep="\n")
    for why in list(bad.values())[:MOST_SHOWN]:
        print(f"warning: {why}", file=sys.stderr)
    print(f"\nqueries: {count}, the first of them above; gallery: {size:,}; similarity: cosine")
    print("written: " + ", ".join(map(str, files)))


def thumbnail(path: str) -> str:
    """The picture as a JPEG in base64; empty if it cannot be decoded."""
    data = io.BytesIO()
    if image := pictures.read_thumbnail(path, SIDE, own=True):
        image.save(data, "JPEG", quality=85)
    return base64.b64encode(data.getvalue()).decode()


if __name__ == "__main__":
    flags.run_script(main)
