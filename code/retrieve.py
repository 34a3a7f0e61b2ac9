"""Find the images of a folder that are most like given ones, with a trained network.

    python code/retrieve.py --model-path logs/folder/run_1 --gallery my_pictures --query photo.jpg
    python code/retrieve.py --model-path FILE.pth --gallery my_pictures --query new_pictures --top-k 5 --output found

The gallery is embedded once. Its embeddings are kept beside it in GALLERY.embeddings-KEY.npz, where the key names the
checkpoint and how images are prepared; later calls only embed new and changed files. Writes neighbours.csv (all
queries), neighbours.png (some) and neighbours.html, a page that needs no other file.

A query that is itself in the gallery is not its own neighbour. The search is exact.
"""

import base64
import contextlib
import csv
import hashlib
import io
import os
import sys
import zlib
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
from torch.utils.data import DataLoader
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
    queries, galleries = list_images(args.query, "--query"), list_images(args.gallery, "--gallery")
    for searched in (args.gallery, args.query):
        if searched.is_dir() and args.output.resolve().is_relative_to(searched.resolve()):
            raise Refused(f"--output {args.output} lies in {searched} and would be searched next time: name another")
    checkpoint.require_writable(args.output, "--output", folder=True)
    device = distributed.choose_device(args.gpu_id)
    print(f"device: {distributed.describe(device)}")
    loaded = inference.load_network(parser, args, given, checkpoint.best_name("DATASET", "MODEL"), False, device)
    print(f"checkpoint: {loaded.path}")

    # Embeddings
    vectors, rows = embed(loaded, queries, device, "embed queries")
    bad = {int(row): why_not(queries, row) for row in np.setdiff1d(np.arange(len(queries)), rows)}
    if not len(rows):
        raise Refused(bad[0] + (f"; nor can the other {len(queries) - 1:,} queries" if len(queries) > 1 else ""))
    states, files = look_at_files(galleries)
    gallery_vectors, gallery_rows = embed_gallery(loaded, galleries, states, device)

    # Search
    own, others = look_at_files(queries)[1][rows], files[gallery_rows]
    found, similarities = search(vectors, own, gallery_vectors, others, loaded.args, device)
    neighbours = {row: [] for row in range(len(queries))}  # query -> [(image of the gallery, cosine similarity), …]
    for row, indices, values in zip(rows.tolist(), found, similarities.tolist(), strict=True):
        neighbours[row] = [(int(gallery_rows[i]), value) for i, value in zip(indices, values, strict=True) if i >= 0]
    write(loaded.args, queries, galleries, neighbours, bad, len(gallery_rows))


def list_images(path: Path, option: str) -> dataset.ImageList:
    """One image, or all below a folder, without classes."""
    if path.is_file() and option == "--query":
        return own_pictures(path.parent, [path.name])
    if not path.is_dir():
        wanted = "image or folder" if option == "--query" else "folder"
        raise Refused(f"{option} {path}: {'not an' if path.exists() else 'there is no such'} {wanted}")
    found, skipped = folders.find_images(path, ".")
    if skipped:
        print(f"note: {folders.describe_skipped(path, skipped)}", file=sys.stderr)
    if not found:
        raise Refused(f"{option} {path}: the folder holds no image")
    return own_pictures(path, [name.removeprefix("./") for name in found])


def own_pictures(root: Path, paths: list[str]) -> dataset.ImageList:
    return dataset.ImageList(root, paths, np.zeros(len(paths), np.int64), [""], own=True)


class MarkedWhereUnreadable(dataset.ImageDataset):
    """Zeros and the label -1 for what cannot be decoded."""

    def __init__(self, images: dataset.ImageList, image_size: int):
        super().__init__(images, dataset.eval_transform(image_size))
        self.nothing = torch.zeros(3, image_size, image_size, dtype=torch.uint8), -1

    def __getitem__(self, row):
        try:
            return super().__getitem__(row)
        except decoding.UnreadableImage:
            return self.nothing


def embed(loaded, images, device, description) -> tuple[torch.Tensor, np.ndarray]:
    """Embeddings (n, D) of those of the images that can be decoded, and which these are (n,)."""
    args = loaded.args
    options = dataset.worker_options(args.nb_workers, pin_memory=device.type == "cuda")
    loader = DataLoader(MarkedWhereUnreadable(images, loaded.image_size), args.sz_batch, **options)
    done = inference.embed(loaded.network, loader, device, args.amp == "bf16", args.channels_last, description)
    decoded = done.labels >= 0
    return done.embeddings[decoded], np.flatnonzero(decoded)


def why_not(images, row) -> str:
    """Why an image could not be decoded."""
    try:
        decoding.read_rgb(images.file(row), own=True)
    except decoding.UnreadableImage as error:
        return str(error)
    return f"{images.file(row)}: could not be decoded"


# ---------------------------------------------------------------- the gallery and its cache


def cache_path(loaded) -> Path:
    """Beside the gallery; other weights, or another preparation of the images, have another name."""
    key, args = hashlib.sha256(), loaded.args
    for name, tensor in sorted(checkpoint.network_state(loaded.content, loaded.path).items()):
        key.update(name.encode())
        key.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    made_with = (args.model, args.sz_embedding, args.add_gmp, args.layer_norm, loaded.image_size, args.amp)
    key.update(repr(made_with).encode())
    gallery = args.gallery.resolve()
    return gallery.with_name(f"{gallery.name}.embeddings-{key.hexdigest()[:12]}.npz")


def embed_gallery(loaded, images, states, device) -> tuple[torch.Tensor, np.ndarray]:
    """As embed(), with embeddings from the cache where a file is as it was."""
    cache = cache_path(loaded)
    checkpoint.remove_leftovers(cache.parent, cache.name.rpartition("-")[0])
    embeddings, known = read_cache(cache, images, states, loaded.network.embedding_size)
    todo = np.flatnonzero(~known)
    print(f"gallery: {len(images):,} images, {len(images) - len(todo):,} of them from {cache}")
    while len(todo):
        # The whole file is written anew each time, so that a large one waits until a tenth of it is new.
        rows, todo = np.split(todo, [max(PART, known.sum() // 10)])
        part = own_pictures(images.root, [images.paths[row] for row in rows])
        following = f", {len(todo):,} to follow" if len(todo) else ""
        vectors, decoded = embed(loaded, part, device, f"embed gallery{following}")
        embeddings[rows[decoded]] = vectors
        known[rows[decoded]] = True
        if len(decoded):
            write_cache(cache, images, states, embeddings, known)
    bad = np.flatnonzero(~known)
    if len(bad) == len(images):
        raise Refused(f"--gallery: none of its {len(images):,} images can be decoded: {why_not(images, 0)}")
    if len(bad):
        print(f"warning: left out of the gallery: {len(bad):,} that cannot be decoded, the first:", file=sys.stderr)
    for row in bad[:MOST_SHOWN]:
        print(f"warning: {why_not(images, row)}", file=sys.stderr)
    return torch.from_numpy(embeddings[known] if len(bad) else embeddings), np.flatnonzero(known)


def look_at_files(images) -> tuple[np.ndarray, np.ndarray]:
    """What changes when a file does (N, 3): size in bytes, times of its content and of its entry in ns; and what file
    it is (N, 2), whatever links lead to it. -1 where there is no file. Some network drives number no files: there a
    digest of the path stands for the number, without what links hide."""
    found = np.full((len(images), 5), -1, np.int64)
    for row, path in enumerate(tqdm(images.paths, "look at files", unit="file", disable=None, leave=False)):
        with contextlib.suppress(OSError):
            stat = os.stat(images.root / path)
            number = stat.st_ino or zlib.crc32(os.fsencode(os.path.realpath(images.root / path)))
            number &= 2**63 - 1  # some file systems use all 64 bits, the array has signed ones
            found[row] = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, number
    return found[:, :3], found[:, 3:]


def read_cache(cache: Path, images, states, embedding_size) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, D) of the images as far as the cache has them, and of which it does (N,)."""
    embeddings = np.zeros((len(images), embedding_size), np.float32)
    known = np.zeros(len(images), bool)
    try:
        with np.load(cache, allow_pickle=False) as file:
            paths, old_states, old = (file[name] for name in ("paths", "states", "embeddings"))
        names = paths.tobytes().decode("utf-8", "surrogateescape").split("\0")
        place = {path: row for row, path in enumerate(names)}
        rows = np.array([place.get(path, -1) for path in images.paths])
        same = rows >= 0
        same[same] = (old_states[rows[same]] == states[same]).all(axis=1)
        embeddings[same], known = old[rows[same]], same
    except FileNotFoundError:
        pass
    except Exception as error:  # a damaged archive fails in many ways; all that is lost is time
        print(f"warning: {cache}: cannot be used ({type(error).__name__}), embedding anew", file=sys.stderr)
    return embeddings, known


def write_cache(cache: Path, images, states, embeddings, known):
    # One string of all paths: as an array of strings each would take as much as the longest of them.
    paths = "\0".join(path for path, is_known in zip(images.paths, known, strict=True) if is_known)
    paths = np.frombuffer(paths.encode("utf-8", "surrogateescape"), np.uint8)
    arrays = {"paths": paths, "states": states[known], "embeddings": embeddings[known]}
    try:
        checkpoint.write(lambda file: np.savez(file, **arrays), cache)
    except Refused as error:
        print(f"warning: {error}; the next call has to embed the gallery again", file=sys.stderr)


# ---------------------------------------------------------------- search


def search(query, own, gallery, others, args, device) -> tuple[np.ndarray, np.ndarray]:
    """Indices into the gallery (Q, top_k), -1 where there are no more, and cosine similarities.

    query (Q, D), gallery (N, D); own (Q, 2), others (N, 2): which files they are. A query does not find its own file.
    """
    _, links = np.unique(others, axis=0, return_counts=True)
    k = min(args.top_k + links.max(), len(others))  # a file may be there by several names
    found, similarities = metrics.nearest(query, gallery, k, None, args.search_memory, device, progress=True)
    found, similarities = np.asarray(found), np.asarray(similarities)
    itself = (others[found] == own[:, None]).all(axis=2)
    found = np.where(itself, -1, found)
    order = np.argsort(found < 0, axis=1, kind="stable")[:, : args.top_k]  # what is none goes to the end
    return np.take_along_axis(found, order, 1), np.take_along_axis(similarities, order, 1)


# ---------------------------------------------------------------- what is written


def write(args, queries, galleries, neighbours, bad: dict[int, str], size: int) -> None:
    """neighbours: query -> [(image of the gallery, similarity), …]; bad: query -> why it could not be decoded."""
    args.output.mkdir(parents=True, exist_ok=True)
    files = [args.output / f"neighbours.{suffix}" for suffix in ("csv", "png", "html")]
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("query", "rank", "neighbour", "cosine_distance", "cosine_similarity"))
    for row, found in neighbours.items():
        for rank, (i, value) in enumerate(found, 1):
            table.writerow((queries.file(row), rank, galleries.file(i), f"{max(0, 1 - value):.7f}", f"{value:.7f}"))
        if not found:  # it could not be decoded
            table.writerow((queries.file(row), "", "", "", ""))
    checkpoint.write(lambda file: file.write(text.getvalue().encode("utf-8", "surrogateescape")), files[0])

    drawn = [row for row in neighbours if row not in bad][:MOST_SHOWN]
    shown = {row: found[:MOST_NEIGHBOURS] for row, found in neighbours.items()}
    pictures.neighbours(
        [queries.file(row) for row in drawn],
        [[galleries.file(i) for i, _ in shown[row]] for row in drawn],
        None,
        [[value for _, value in shown[row]] for row in drawn],
        [f"query: {queries.paths[row]}" for row in drawn],
        files[1],
        captions=[[os.path.basename(galleries.paths[i]) for i, _ in shown[row]] for row in drawn],
        own=True,
    )
    count = f"{len(queries) - len(bad):,}" + (f" and {len(bad):,} that cannot be decoded" if bad else "")
    sections = tqdm(list(shown.items())[:MOST_ON_PAGE], "page", unit="query", disable=None, leave=False)
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    html = template.render(
        dict(args=args, queries=queries, galleries=galleries, sections=sections, bad=bad, count=count, size=size),
        number=min(len(queries), MOST_ON_PAGE),
        link=lambda path: quote(os.path.relpath(path, args.output).encode("utf-8", "surrogateescape")),
        thumbnail=thumbnail,
    )
    checkpoint.write(lambda file: file.write(html.encode("utf-8", "replace")), files[2])

    for row in drawn:
        print(f"\n{queries.file(row)}")
        for rank, (i, similarity) in enumerate(shown[row], 1):
            print(f"{rank:>4}  {similarity:.4f}  {galleries.file(i)}")
    if len(queries) - len(bad) > len(drawn):
        print(f"\n… and {len(queries) - len(bad) - len(drawn):,} more")
    for why in list(bad.values())[:MOST_SHOWN]:
        print(f"warning: {why}", file=sys.stderr)
    print(f"\nqueries: {count}; gallery: {size:,}; similarity: cosine")
    print("written: " + ", ".join(map(str, files)))


def thumbnail(path: Path) -> str:
    """The picture as a JPEG in base64; empty if it cannot be decoded."""
    pixels = pictures.read_thumbnail(path, SIDE, own=True)
    if pixels is None:
        return ""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=85)
    return base64.b64encode(data.getvalue()).decode()


if __name__ == "__main__":
    flags.run_script(main)
