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
import html
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
import metrics
import numpy as np
import pictures
import torch
from PIL import Image
from refused import Refused
from torch.utils.data import DataLoader
from tqdm import tqdm

PART = 10_000  # images that are embedded at a time, with the cache written in between
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
    for searched in [args.gallery, args.query]:
        if searched.is_dir() and args.output.resolve().is_relative_to(searched.resolve()):
            raise Refused(f"--output {args.output} lies in {searched}, where it would be found next time: name another")
    checkpoint.require_folder(args.output, "--output")
    device = distributed.choose_device(args.gpu_id)
    print(f"device: {distributed.describe(device)}")
    loaded = inference.load_network(parser, args, given, checkpoint.best_name("DATASET", "MODEL"), False, device)
    args, network = loaded.args, loaded.network
    print(f"checkpoint: {loaded.path}")

    # Embeddings
    query = embed(network, queries, device, args, "embed queries")
    if not len(query.rows):
        raise Refused(why_not(queries, 0) + (f", nor any other of the {len(queries)} queries" * (len(queries) > 1)))
    states, files = look_at_files(galleries)
    cache = cache_path(args, checkpoint.network_state(loaded.content, loaded.path))
    gallery = embed_gallery(network, galleries, states, cache, device, args)

    # Search
    own, others = look_at_files(queries)[1][query.rows.numpy()], files[gallery.rows.numpy()]
    found, similarities = search(query.embeddings, own, gallery.embeddings, others, args, device)
    neighbours = {row: [] for row in range(len(queries))}  # query -> [(image of the gallery, cosine similarity), …]
    for row, indices, values in zip(query.rows.tolist(), found.tolist(), similarities.tolist(), strict=True):
        neighbours[row] = [(gallery.rows[i].item(), value) for i, value in zip(indices, values, strict=True) if i >= 0]
    write(args, queries, galleries, neighbours, set(query.rows.tolist()), len(gallery.rows))


def list_images(path: Path, option: str) -> dataset.ImageList:
    """One image, or all below a folder, without classes."""
    if path.is_file() and option == "--query":
        return own_pictures(path.parent, [path.name])
    if not path.is_dir():
        wanted = "image or folder" if option == "--query" else "folder"
        raise FileNotFoundError(f"{option} {path}: {'is no' if path.exists() else 'there is no such'} {wanted}")
    found, skipped = folders.find_images(path, ".")
    if skipped:
        print(f"note: {folders.describe_skipped(path, skipped)}", file=sys.stderr)
    if not found:
        raise Refused(f"{option} {path}: the folder holds no image")
    return own_pictures(path, [name.removeprefix("./") for name in found])


def own_pictures(root: Path, paths: list[str]) -> dataset.ImageList:
    return dataset.ImageList(root, paths, np.zeros(len(paths), np.int64), [""], own=True)


def embed(network, images, device, args, description) -> inference.Embedded:
    """Embeddings of those of the images that can be decoded."""
    options = dataset.worker_options(args.nb_workers, pin_memory=device.type == "cuda")
    loader = DataLoader(MarkedWhereUnreadable(images, args.image_size), args.sz_batch, **options)
    return inference.embed(network, loader, device, args.amp == "bf16", args.channels_last, description)


class MarkedWhereUnreadable(dataset.ImageDataset):
    """Zeros and the label -1 for what cannot be decoded; embed leaves those rows out."""

    def __init__(self, images, image_size):
        super().__init__(images, dataset.eval_transform(image_size))
        self.nothing = torch.zeros(3, image_size, image_size, dtype=torch.uint8), -1

    def __getitem__(self, row):
        try:
            return super().__getitem__(row)
        except decoding.UnreadableImage:
            return self.nothing


def why_not(images, row) -> str:
    """Why an image could not be decoded."""
    try:
        decoding.read_rgb(str(images.root / images.paths[row]), own=True)
    except decoding.UnreadableImage as error:
        return str(error)
    return f"{images.root / images.paths[row]}: could not be decoded"


# ---------------------------------------------------------------- the gallery and its cache


def cache_path(args, state: dict[str, torch.Tensor]) -> Path:
    """Beside the gallery; other weights, or another preparation of the images, have another name."""
    key = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        key.update(name.encode())
        key.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    key.update(repr((args.model, args.sz_embedding, args.add_gmp, args.layer_norm, args.image_size, args.amp)).encode())
    gallery = args.gallery.resolve()
    return gallery.with_name(f"{gallery.name}.embeddings-{key.hexdigest()[:12]}.npz")


def embed_gallery(network, images, states, cache: Path, device, args) -> inference.Embedded:
    """All images of the gallery that can be decoded; from the cache where a file is as it was."""
    embeddings, known = read_cache(cache, images, states, args.sz_embedding)
    todo = np.flatnonzero(~known)
    print(f"gallery: {len(images):,} images, {len(images) - len(todo):,} of them from {cache}")
    unsaved = 0
    for start in range(0, len(todo), PART):
        rows = todo[start : start + PART]
        part = own_pictures(images.root, [images.paths[row] for row in rows])
        count = f" {start // PART + 1}/{-(-len(todo) // PART)}" if len(todo) > PART else ""
        done = embed(network, part, device, args, f"embed gallery{count}")
        done_rows = rows[done.rows.numpy()]
        embeddings[done_rows] = done.embeddings.numpy()
        known[done_rows] = True
        unsaved += len(done.rows)
        # The whole file is written anew, so that a large one waits until a tenth of it is new.
        if unsaved > known.sum() // 10 or (unsaved and start + PART >= len(todo)):
            write_cache(cache, images, states, embeddings, known)
            unsaved = 0
    bad = np.flatnonzero(~known)
    if len(bad):
        print(f"warning: left out of the gallery: {len(bad):,} that cannot be decoded, the first:", file=sys.stderr)
    for row in bad[:MOST_SHOWN]:
        print(f"warning: {why_not(images, row)}", file=sys.stderr)
    if not known.any():
        raise Refused(f"--gallery {images.root}: none of its {len(images):,} images can be decoded")
    rows = torch.from_numpy(np.flatnonzero(known))
    vectors = torch.from_numpy(embeddings[known] if len(bad) else embeddings)
    return inference.Embedded(vectors, torch.zeros(len(rows), dtype=torch.int64), rows)


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
        embeddings[same] = old[rows[same]]
        known = same
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


def write(args, queries, galleries, neighbours, decoded, size):
    args.output.mkdir(parents=True, exist_ok=True)
    files = [args.output / f"neighbours.{suffix}" for suffix in ("csv", "png", "html")]
    text = csv_text(queries, galleries, neighbours)
    checkpoint.write(lambda file: file.write(text.encode("utf-8", "surrogateescape")), files[0])
    drawn = sorted(decoded)[:MOST_SHOWN]
    shown = {row: found[:MOST_NEIGHBOURS] for row, found in neighbours.items()}
    pictures.neighbours(
        [queries.root / queries.paths[row] for row in drawn],
        [[galleries.root / galleries.paths[i] for i, _ in shown[row]] for row in drawn],
        None,
        [[value for _, value in shown[row]] for row in drawn],
        [f"query: {queries.paths[row]}" for row in drawn],
        files[1],
        captions=[[Path(galleries.paths[i]).name for i, _ in shown[row]] for row in drawn],
        own=True,
    )
    checkpoint.write_text(page(args, queries, galleries, shown, decoded, size), files[2])

    for row in drawn:
        print(f"\n{queries.root / queries.paths[row]}")
        for rank, (i, similarity) in enumerate(shown[row], 1):
            print(f"{rank:>4}  {similarity:.4f}  {galleries.root / galleries.paths[i]}")
    if len(decoded) > len(drawn):
        print(f"\n… and {len(decoded) - len(drawn):,} more")
    for row in sorted(set(neighbours) - decoded)[:MOST_SHOWN]:
        print(f"warning: {why_not(queries, row)}", file=sys.stderr)
    print(f"\nqueries: {count(queries, decoded)}; gallery: {size:,}; similarity: cosine")
    print("written: " + ", ".join(map(str, files)))


def count(queries, decoded) -> str:
    bad = len(queries) - len(decoded)
    return f"{len(decoded):,}" + (f" and {bad:,} that cannot be decoded" if bad else "")


def csv_text(queries, galleries, neighbours) -> str:
    """One row per query and neighbour; a query that could not be decoded has one row without any."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["query", "rank", "neighbour", "cosine_distance", "cosine_similarity"])
    for row, found in neighbours.items():
        query = queries.root / queries.paths[row]
        for rank, (i, similarity) in enumerate(found, 1):
            distance = max(0.0, 1 - similarity)
            writer.writerow([query, rank, galleries.root / galleries.paths[i], f"{distance:.7f}", f"{similarity:.7f}"])
        if not found:
            writer.writerow([query, "", "", "", ""])
    return text.getvalue()


STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; color: #1f2328; background: #fff; margin: 2em auto; max-width: 1900px;
       padding: 0 1.5em; }
section { border-top: 2px solid #d0d7de; padding: .8em 0; }
h2 { font-size: 1em; margin: 0 0 .6em; overflow-wrap: anywhere; }
.row { display: flex; gap: .8em; align-items: flex-start; }
.found { display: flex; flex-wrap: wrap; gap: .8em; border-left: 3px solid #0969da; padding-left: .8em; }
figure { margin: 0; width: 160px; flex: none; }
.box { height: 160px; display: flex; align-items: center; justify-content: center; background: #f6f8fa; }
.box img { width: 160px; height: 160px; object-fit: contain; }
figcaption { font-size: 12px; color: #57606a; overflow-wrap: anywhere; }
figcaption b { color: #1f2328; }
.bad { color: #cf222e; }
a { color: inherit; text-decoration: none; }
a:hover { text-decoration: underline; }
"""


def page(args, queries, galleries, neighbours, decoded, size) -> str:
    """The queries and what they found as one file. Its policy forbids every request: it is the same page offline."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    shown = list(neighbours.items())[:MOST_ON_PAGE]
    more = f" The first {len(shown):,} of {len(queries):,} queries; neighbours.csv holds all." * (
        len(shown) < len(queries)
    )
    parts = []
    for row, found in tqdm(shown, "page", unit="query", disable=None, leave=False):
        query = queries.root / queries.paths[row]
        figures = []
        if row not in decoded:
            figures.append(f"<p class='bad'>{escape(why_not(queries, row))}</p>")
        for rank, (i, similarity) in enumerate(found, 1):
            path = galleries.root / galleries.paths[i]
            caption = f"<b>{rank}</b> · similarity <b>{similarity:.4f}</b><br>{escape(galleries.paths[i])}"
            figures.append(figure(args, path, caption))
        both = f"{figure(args, query, '<b>query</b>')}<div class='found'>{''.join(figures)}</div>"
        parts.append(f"<section><h2>{escape(query)}</h2><div class='row'>{both}</div></section>")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Nearest images</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style></head>\n<body><h1>Nearest images</h1>\n"
        f"<p>Queries: {count(queries, decoded)}. Gallery: {size:,} images in {escape(args.gallery)}. Network: "
        f"{escape(args.model_path)}. Similarity: cosine, 1 is the same direction.{more}</p>\n"
        f"{chr(10).join(parts)}\n</body></html>\n"
    )


def figure(args, path: Path, caption: str) -> str:
    """A picture that leads to its file when clicked."""
    pixels = pictures.read_thumbnail(path, SIDE, own=True)
    image = "<span class='bad'>cannot be decoded</span>"
    if pixels is not None:
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "JPEG", quality=85)
        image = (
            f'<img alt="{escape(path.name)}" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'
        )
    link = quote(os.path.relpath(path, args.output).encode("utf-8", "surrogateescape"))
    linked = f'<a href="{link}"><div class="box">{image}</div></a>'
    return f"<figure>{linked}<figcaption>{caption}</figcaption></figure>"


def escape(text) -> str:
    return html.escape(str(text).encode("utf-8", "replace").decode())


if __name__ == "__main__":
    flags.run_script(main)
