"""check, download (against a local server that misbehaves) and show."""

import hashlib
import http.server
import io
import re
import shutil
import tarfile
import threading
import zipfile
from types import SimpleNamespace

import dataset
import layouts
import numpy as np
import prepare
import pytest
import trees
from PIL import Image


@pytest.mark.parametrize(
    "name, make",
    [("cub", trees.make_cub), ("cars", trees.make_cars), ("SOP", trees.make_sop), ("Inshop", trees.make_inshop)],
)
def test_check_is_content_with_what_was_published(tmp_path, monkeypatch, call, name, make):
    make(tmp_path, classes=4, images=4, size=8)
    published = trees.publish(monkeypatch, name, tmp_path)
    status, out, err = call("prepare.py", "check", name.upper(), "--data-root", tmp_path, "--decode")
    assert status == 0 and f"{name}: no problems found\n" in out and "problem:" not in out
    for split, (images, classes) in published.items():
        assert re.search(rf"^{split} +{images} +{classes} +{images} +{classes}$", out, re.MULTILINE)


def test_check_finds_all_that_is_off_at_once(tmp_path, monkeypatch, call):
    home = trees.make_sop(tmp_path, classes=4, images=8, size=8)
    trees.publish(monkeypatch, "SOP", tmp_path)
    for i in range(7):
        (home / f"cabinet_final/111000000004_{i}.JPG").unlink()
    (home / "bicycle_final/111000000001_5.JPG").write_text("not an image")
    list_file = home / "Ebay_test.txt"
    list_file.write_text(list_file.read_text().replace(" 3 1 ", " 1 1 ", 1))
    status, out, _ = call("prepare.py", "check", "SOP", "--data-root", tmp_path, "--decode")
    assert status == 1 and "counts differ" in out and "share 1 classes" in out
    assert out.count("problem: ") == 2 + 1 + 8  # counts, classes; missing files; eight not decoded
    assert f"names 7 images that are not in {home}: cabinet_final/111000000004_0.JPG, " in out
    assert "111000000001_5.JPG: cannot be decoded (cannot identify image file" in out


def test_check_says_what_training_warns_of_and_tries_own_pictures_as_they_are(tmp_path, call):
    root = trees.make_folder(tmp_path, "train+test", 6, 2, 8)
    (root / "test/thing_4/0.png").unlink()
    (root / "test/thing_4/gone.png").symlink_to("nowhere")
    for name in ("cat", "dog"):
        trees.save(root / "train" / "animals" / name / "0.png", 9, 0, 8)
    status, out, _ = call("prepare.py", "check", "folder", "--data-root", root)
    warnings = dataset.load_benchmark("folder", root).warnings
    assert len(warnings) == 3 and status == 0
    assert [line.removeprefix("note: ") for line in out.splitlines() if line.startswith("note: ")] == list(warnings)
    for name in ("thing_4", "thing_5"):
        shutil.rmtree(root / "test" / name)
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(root / "test/thing_6/0.tif")
    status, out, _ = call("prepare.py", "check", "folder", "--data-root", root, "--decode")
    assert status == 1 and out.count("problem: ") == 2
    assert f"problem: {root}: only one class to test on, figures say nothing" in out
    assert "0.tif: cannot be decoded (no pixel has a finite value)" in out


@pytest.fixture
def server():
    """Serves .content under any path; status: says that instead."""
    server = SimpleNamespace(content=b"", status=None, asked=0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked += 1
            if server.status:
                self.send_error(server.status)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.content)))
            self.end_headers()
            self.wfile.write(server.content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        server.url = f"http://127.0.0.1:{serving.server_port}/archive"
        yield server
        serving.shutdown()
        thread.join()


def tar_of(tmp_path):
    """The bytes of a CUB archive as published: a .tgz with the folder and a file beside it."""
    home = trees.make_cub(tmp_path / "source", classes=4, images=3, size=24)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(home, "CUB_200_2011")
        tar.add(home / "images/002.Bird_2/Bird_2_0000.jpg", "./attributes.txt")
    return buffer.getvalue()


@pytest.fixture
def fetch(tmp_path, server, monkeypatch):
    """Serves an archive as a benchmark's, the md5 being right, and downloads it to tmp_path/data."""

    def run(content, name="cub"):
        server.content = content
        file_name = layouts.get(name).archive[0].rpartition("/")[2]
        trees.patch(monkeypatch, name, archive=(f"http://x/{file_name}", hashlib.md5(content).hexdigest()))
        prepare.download(name, tmp_path / "data", server.url)
        return tmp_path / "data"

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_download_and_unpack(tmp_path, server, fetch, capsys):
    root = fetch(tar_of(tmp_path))
    assert names(root) == ["CUB_200_2011", "CUB_200_2011.tgz"]
    benchmark, original = (dataset.load_benchmark("cub", folder) for folder in (root, tmp_path / "source"))
    assert benchmark.train.paths == original.train.paths and len(benchmark.query) == 6
    for path in original.train.paths:
        assert (benchmark.train.root / path).read_bytes() == (original.train.root / path).read_bytes()
    asked = server.asked
    prepare.download("cub", root, server.url)  # again: nothing to do
    assert server.asked == asked and "is there already" in capsys.readouterr().out


def test_download_zip(tmp_path, fetch):
    home = trees.make_sop(tmp_path / "source", classes=4, images=3, size=24)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for path in home.rglob("*.*"):
            zipped.write(path, f"Stanford_Online_Products/{path.relative_to(home)}")
    root = fetch(buffer.getvalue(), "SOP")
    assert len(dataset.load_benchmark("SOP", root).train) == 6
    assert names(root) == ["Stanford_Online_Products", "Stanford_Online_Products.zip"]


def test_an_archive_with_another_md5_is_not_unpacked(tmp_path, server, call):
    server.content = tar_of(tmp_path)
    words = ["prepare.py", "download", "cub", "--data-root", tmp_path / "data", "--url", server.url]
    status, _, err = call(*words)
    assert status == 1 and f"prepare.py: error: {server.url}: File not found or corrupted" in err.splitlines()[-1]
    mine = tmp_path / "data" / "CUB_200_2011.tgz"
    mine.write_bytes(b"mine")
    status, _, err = call(*words)
    assert status == 1 and f"{mine}: its md5 is not 97eceeb196236b179987381" in err and "remove the file" in err
    assert mine.read_bytes() == b"mine" and not (tmp_path / "data" / "CUB_200_2011").exists()


@pytest.mark.parametrize(
    "name, right, trap",
    [
        ("cub", "bentrevett/caltech-ucsd-birds-200-2011 on Hugging Face (revision 1ef09e02)", "CUB-200 of 2010"),
        ("SOP", "nyris/stanford-online-products-v1 on Hugging Face (revision 24a1b9b8)", "JamieSJS"),
        ("cars", "cars_test_annos_withlabels.mat", "Do not rely on torchvision"),
        ("In-Shop", "list_eval_partition.txt", "Marqo/deepfashion-inshop"),
    ],
)
def test_other_places_are_named_where_a_benchmark_cannot_be_fetched(tmp_path, server, call, name, right, trap):
    server.status = 503
    url = ["--url", server.url] if name in ("cub", "SOP") else []
    status, out, err = call("prepare.py", "download", name, "--data-root", tmp_path, *url)
    assert status == 1 and err.splitlines()[-1].startswith("prepare.py: error: ")
    said = out + err
    assert right in said and trap in said and "As an independent audit found" in said
    assert ("HTTP Error 503" if url else f"put it under {tmp_path}") in err and list(tmp_path.iterdir()) == []


def test_what_cannot_be_downloaded(tmp_path, call):
    for words, said in (
        (["cub", "--url", "not-a-url"], "not-a-url: unknown url type"),
        (["emoji", "--url", "http://127.0.0.1:9/x"], "--url: emoji is no download from a page"),
        (["folder"], "invalid choice: 'folder' (choose from "),
        (["birds"], "invalid choice: 'birds'"),
    ):
        status, _, err = call("prepare.py", "download", *words, "--data-root", tmp_path)
        assert status and said in err.splitlines()[-1] and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, make, widths", [("cub", trees.make_cub, [6, 6]), ("Inshop", trees.make_inshop, [6, 4, 4])]
)
def test_show_draws_classes_of_every_split(tmp_path, call, name, make, widths):
    make(tmp_path, classes=6, images=6, size=24)
    outcome = call("prepare.py", "show", name, "--data-root", tmp_path, "--output", tmp_path / "sheet.png")
    assert outcome.code == 0 and str(tmp_path / "sheet.png") in outcome.out
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"), dtype=int)
    # the first picture of the first class of each split, in its colour: 100 pixels wide, under a title and a name
    for column, class_id in zip(range(len(widths)), (1, 4, 4), strict=False):
        left = 20 + sum(104 * pictures + 20 for pictures in widths[:column])
        pixels = sheet[72:152, left + 10 : left + 70].mean((0, 1))
        assert np.abs(pixels - np.random.RandomState(class_id).uniform(60, 200, 3)).max() < 20
