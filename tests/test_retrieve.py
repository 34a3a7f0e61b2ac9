"""Search in your own pictures: the figures of evaluate.py, a cache that knows what changed, a page that stays home."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import retrieve
import torch
from refused import Refused
from trees import picture


@pytest.fixture
def gallery(trained, tmp_path):
    """The unseen classes in a folder of their own, which a test may change."""
    for c in range(4, 8):
        shutil.copytree(trained[0] / f"class {c}", tmp_path / "gallery" / f"class {c}")
    return tmp_path / "gallery"


@pytest.fixture
def find(call, trained, tmp_path):
    """Runs retrieve.py -> (outcome, rows of the CSV file)."""

    def run(gallery, query, *more):
        words = ["--model-path", trained[1], "--gallery", gallery, "--query", query, "--output", tmp_path / "out"]
        outcome = call("retrieve.py", *words, "--workers", 0, "--gpu-id", -1, *more)
        rows = []
        if outcome.code == 0:
            with open(tmp_path / "out" / "neighbours.csv", newline="", errors="surrogateescape") as file:
                rows = list(csv.DictReader(file))
        return outcome, rows

    return run


def test_finds_the_right_class_as_often_as_evaluate_says(call, find, trained, gallery, tmp_path):
    figures = tmp_path / "figures.json"
    words = ["--model-path", trained[1], "--data-root", trained[0], "--workers", 0, "--gpu-id", -1, "--json", figures]
    assert call("evaluate.py", *words).code == 0
    _, rows = find(gallery, gallery, "--top-k", 1000)  # more than there are
    nearest = [row for row in rows if row["rank"] == "1"]
    assert len(nearest) == 24 and all(row["query"] != row["neighbour"] for row in rows)
    right = [Path(row["query"]).parent.name == Path(row["neighbour"]).parent.name for row in nearest]
    assert np.mean(right) == json.loads(figures.read_text())["figures"]["R@1"]
    assert 0.25 < np.mean(right)  # chance is 5 of 23
    for query in {row["query"] for row in rows}:
        distances = [float(row["cosine_distance"]) for row in rows if row["query"] == query]
        assert len(distances) == 23 and distances == sorted(distances)


def test_a_copy_of_a_picture_is_its_nearest_neighbour(find, gallery, tmp_path):
    shutil.copy(gallery / "class 5" / "2.png", tmp_path / "photo.png")
    outcome, rows = find(gallery, tmp_path / "photo.png", "--top-k", 3)
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["neighbour"] == str(gallery / "class 5" / "2.png")
    assert float(rows[0]["cosine_distance"]) < 1e-6 < float(rows[1]["cosine_distance"])
    assert f"   1  1.0000  {gallery / 'class 5' / '2.png'}" in outcome.out
    for row in rows:
        assert float(row["cosine_distance"]) == pytest.approx(1 - float(row["cosine_similarity"]), abs=2e-7)


def test_a_query_in_the_gallery_does_not_find_itself_whatever_links_lead_to_it(find, gallery, tmp_path):
    own = gallery / "class 5" / "2.png"
    (tmp_path / "link.png").symlink_to(own)
    _, rows = find(gallery, tmp_path / "link.png", "--top-k", 24)
    assert len(rows) == 23 and str(own) not in [row["neighbour"] for row in rows]
    # a gallery of links, one of them to a folder, and one file under two names
    links = tmp_path / "links"
    links.mkdir()
    (links / "class 5").symlink_to(gallery / "class 5")
    (links / "again.png").symlink_to(own)
    (links / "loop").symlink_to(links)
    _, rows = find(links, own, "--top-k", 24)
    assert sorted(Path(row["neighbour"]).name for row in rows) == ["0.png", "1.png", "3.png", "4.png", "5.png"]


def embedded(monkeypatch):
    """Notes which images are embedded."""
    seen, embed = [], retrieve.embed

    def noting(loaded, images, *more):
        seen.extend(images.paths)
        return embed(loaded, images, *more)

    monkeypatch.setattr(retrieve, "embed", noting)
    return seen


def same(rows, others):
    """Whether they found the same; batches of other sizes round the last digit otherwise."""
    names = [[(row["query"], row["rank"], row["neighbour"]) for row in found] for found in (rows, others)]
    values = [[float(row["cosine_similarity"]) for row in found] for found in (rows, others)]
    return names[0] == names[1] and np.allclose(*values, rtol=0, atol=5e-7)


def test_only_new_and_changed_files_are_embedded_again(find, gallery, tmp_path, monkeypatch):
    query = tmp_path / "query.png"
    picture(6, 99).save(query)
    seen = embedded(monkeypatch)
    _, first = find(gallery, query)
    assert len(seen) == 24 + 1
    caches = list(tmp_path.glob("gallery.embeddings-*.npz"))
    assert len(caches) == 1

    seen.clear()
    outcome, again = find(gallery, query)
    assert seen == ["query.png"] and again == first and "24 of them from" in outcome.out

    seen.clear()
    (gallery / "class 4" / "0.png").unlink()
    picture(6, 98).save(gallery / "class 6" / "new.png")
    times = os.stat(gallery / "class 7" / "1.png")
    picture(7, 97).save(gallery / "class 7" / "1.png")
    os.utime(gallery / "class 7" / "1.png", ns=(times.st_atime_ns, times.st_mtime_ns))  # as unpacking an archive does
    _, changed = find(gallery, query)
    assert sorted(seen) == ["class 6/new.png", "class 7/1.png", "query.png"]
    caches[0].unlink()
    assert same(find(gallery, query)[1], changed)  # as if there had never been a cache

    caches[0].write_bytes(caches[0].read_bytes()[:-3000])
    outcome, rows = find(gallery, query)
    assert same(rows, changed) and "cannot be used" in outcome.err


def test_names_that_are_no_text_and_more_neighbours_than_fit(find, gallery, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieve, "MOST_NEIGHBOURS", 3)
    name = os.fsdecode(b"caf\xe9\r.png")
    os.rename(gallery / "class 5" / "2.png", gallery / "class 5" / name)
    for _ in range(2):  # with and without a cache
        outcome, _ = find(gallery, gallery / "class 5" / name, "--top-k", 23)
        assert outcome.code == 0 and r"caf\udce9" in outcome.out
    raw = (tmp_path / "out" / "neighbours.csv").read_bytes()
    assert raw.count(b"\r\n") == 24 and raw.count(b"caf\xe9\r.png") == 23
    assert (tmp_path / "out" / "neighbours.html").read_text().count("<figure>") == 1 + 3
    assert outcome.out.count(str(gallery)) < 8


def test_another_checkpoint_or_image_size_has_its_own_cache(find, gallery, trained, tmp_path):
    query = gallery / "class 4" / "0.png"
    find(gallery, query)
    find(gallery, query, "--image-size", 40)
    state = torch.load(next(trained[1].glob("*_best.pth")), weights_only=True)
    state["model_state_dict"]["model.embedding.weight"] *= -1
    torch.save(state, tmp_path / "other.pth")
    find(gallery, query, "--model-path", tmp_path / "other.pth")
    assert len(list(tmp_path.glob("gallery.embeddings-*.npz"))) == 3


def test_what_was_embedded_before_an_interruption_is_kept(find, gallery, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieve, "PART", 10)
    query, write, writes = gallery / "class 4" / "0.png", retrieve.checkpoint.write, []

    def interrupted(*arguments):
        write(*arguments)
        writes.append(1)
        if len(writes) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(retrieve.checkpoint, "write", interrupted)
    outcome, _ = find(gallery, query)
    assert outcome.code == 130
    monkeypatch.setattr(retrieve.checkpoint, "write", write)
    killed, foreign = (tmp_path / f".{name}.npz.x1.hist-tmp" for name in ("gallery.embeddings-0", "other.embeddings-0"))
    killed.touch()
    foreign.touch()
    outcome, rows = find(gallery, query)
    assert foreign.exists() and not killed.exists()
    assert "24 images, 20 of them from" in outcome.out and len(rows) == 10


def test_pictures_that_cannot_be_decoded_are_named_and_left_out(find, gallery, tmp_path):
    queries = tmp_path / "queries"
    queries.mkdir()
    picture(4, 50).save(queries / "a.png")
    (queries / "b <i>.jpg").write_bytes(b"no picture")
    (gallery / "class 4" / "bad.jpg").write_bytes(b"no picture")
    (gallery / "class 4" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    for _ in range(2):  # with and without a cache
        outcome, rows = find(gallery, queries, "--top-k", 2)
        assert outcome.code == 0
        assert "left out of the gallery: 1 that cannot be decoded" in outcome.err
        assert "bad.jpg: cannot be decoded" in outcome.err
        assert f"note: {gallery}: skipped 1 files that are no images" in outcome.err
        assert "b <i>.jpg: cannot be decoded" in outcome.err
        assert [(Path(row["query"]).name, row["rank"]) for row in rows] == [
            ("a.png", "1"),
            ("a.png", "2"),
            ("b <i>.jpg", ""),
        ]
    page = (tmp_path / "out" / "neighbours.html").read_text()
    assert "b &lt;i&gt;.jpg: cannot be decoded" in page and "b <i>" not in page


def test_a_folder_that_cannot_be_written_beside_costs_only_the_cache(find, gallery, monkeypatch):
    write = retrieve.checkpoint.write

    def refusing(content, path):
        if Path(path).suffix == ".npz":
            raise Refused(f"{path}: cannot be written (Read-only file system)")
        write(content, path)

    monkeypatch.setattr(retrieve.checkpoint, "write", refusing)
    outcome, rows = find(gallery, gallery / "class 4" / "0.png")
    assert outcome.code == 0 and len(rows) == 10
    assert "the next call has to embed the gallery again" in outcome.err


def test_page_shows_queries_neighbours_and_similarities_and_loads_nothing(find, gallery, tmp_path):
    outcome, rows = find(gallery, gallery / "class 6", "--top-k", 4)
    text = (tmp_path / "out" / "neighbours.html").read_text()
    sources = re.findall(r'\bsrc="([^"]*)"', text)
    assert len(sources) == 6 * (1 + 4) and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "content=\"default-src 'none'; img-src data:;" in text and "<script" not in text
    for row in rows:
        assert f"similarity <b>{float(row['cosine_similarity']):.4f}</b>" in text
    links = re.findall(r'<a href="([^"]*)"', text)
    assert len(links) == 30 and all((tmp_path / "out" / link.replace("%20", " ")).is_file() for link in links)
    assert (tmp_path / "out" / "neighbours.png").read_bytes().startswith(b"\x89PNG")
