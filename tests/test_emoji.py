"""The emoji benchmark, with a stand-in for npm and icon sets of a few icons: no test reaches a network."""

import hashlib
import io
import json
import shutil
import tarfile

import layouts
import numpy as np
import pytest
import trees
from layouts import emoji
from PIL import Image
from refused import Refused

NONE = ("no-such-program", "pack")
SQUARE = '<path fill="red" d="M0 0h8v16H0z"/>'  # the left half of 16 × 16


def make_package(icons, aliases=None, title="Set"):
    """The bytes of an icon set's .tgz."""
    files = {
        "icons": {"icons": icons, "aliases": aliases or {}, "width": 16, "height": 16},
        "info": {
            "name": title,
            "author": {"name": "An Artist", "url": "https://artist.example"},
            "license": {"title": "CC BY 4.0", "url": "https://licence.example"},
        },
    }
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, value in files.items():
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


PACKAGES = {
    "one": make_package(
        {"cat": {"body": SQUARE}, "wide": {"body": '<path d="M0 0h32v8H0z"/>', "width": 32, "height": 8}},
        {"left": {"parent": "cat"}, "right": {"parent": "cat", "hFlip": True}},
    ),
    "two": make_package({"cat": {"body": '<circle cx="8" cy="8" r="5"/>'}, "other": {"body": SQUARE}}, title="Set 2"),
}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two sources, four classes, and an npm that 'downloads' from tmp_path/registry; gives the data root."""
    (tmp_path / "registry").mkdir()
    for name, content in PACKAGES.items():
        (tmp_path / "registry" / f"iconify-json-{name}-1.0.0.tgz").write_bytes(content)
    monkeypatch.setattr(emoji, "NPM_PACK", trees.registry(tmp_path / "registry"))
    monkeypatch.setattr(emoji, "CLASSES_FILE", tmp_path / "classes.txt")
    emoji.CLASSES_FILE.write_text("right\ncat\nwide\nleft\n")
    sources = {name: ("1.0.0", hashlib.sha256(content).hexdigest()) for name, content in PACKAGES.items()}
    monkeypatch.setattr(emoji, "SOURCES", sources)
    return tmp_path / "data"


def test_the_list_names_each_class_once():
    names = emoji.CLASSES_FILE.read_text().splitlines()
    assert len(names) == len(set(names)) == 1203
    assert hashlib.sha256(" ".join(names).encode()).hexdigest()[:16] == "e57d8ac0d6f91517"


def test_layout_drawings_and_attribution(world, tmp_path, monkeypatch):
    folder = emoji.download(world)
    assert folder == world / "emoji"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*") if path.is_file()) == [
        "ATTRIBUTION.md",
        "images/0001.right/0001.right_one.png",
        "images/0002.cat/0002.cat_one.png",
        "images/0002.cat/0002.cat_two.png",
        "images/0003.wide/0003.wide_one.png",
        "images/0004.left/0004.left_one.png",
    ]
    assert [path.name for path in world.iterdir()] == ["emoji"]  # nothing is left lying about
    text = (folder / "ATTRIBUTION.md").read_text()
    for name, title in (("one", "Set"), ("two", "Set 2")):
        row = f"| {name} | {title} | [An Artist](https://artist.example) | [CC BY 4.0](https://licence.example)"
        assert f"{row} | @iconify-json/{name} 1.0.0 |" in text
    # on white, aliases followed and mirrored
    cat, left, right, wide = (
        np.asarray(Image.open(folder / "images" / path[:-8] / path).convert("RGB"))
        for path in ("0002.cat_one.png", "0004.left_one.png", "0001.right_one.png", "0003.wide_one.png")
    )
    assert cat.shape == (96, 96, 3)
    assert (cat[:, :47] == (255, 0, 0)).all() and (cat[:, 49:] == 255).all()
    assert (left == cat).all() and (right == cat[:, ::-1]).all()
    assert (wide[:35] == 255).all() and (wide[37:59] == 0).all() and (wide[61:] == 255).all()  # not stretched
    # again: the same bytes; and what is there is used as it is
    second = emoji.download(tmp_path / "b")
    for path in folder.rglob("*.*"):
        assert path.is_dir() or path.read_bytes() == (second / path.relative_to(folder)).read_bytes()
    monkeypatch.setattr(emoji, "NPM_PACK", NONE)
    assert emoji.download(world) == folder


def test_training_downloads_nothing_and_placed_packages_need_no_npm(world, tmp_path, monkeypatch):
    with pytest.raises(Refused, match="emoji/images is not there; `python code/prepare.py download emoji`"):
        layouts.read_splits("emoji", world)
    shutil.copytree(tmp_path / "registry", world / "emoji_packages")
    monkeypatch.setattr(emoji, "NPM_PACK", NONE)
    assert len(list(emoji.download(world).rglob("*.png"))) == 5


NOT_PUBLISHED = "iconify-json-two-1.0.0.tgz: not @iconify-json/two@1.0.0 as published.*; put the published .* into "
NOT_DRAWN = "'wide' of @iconify-json/two is drawn all white; `pip install"
# The second package as npm has it, and with which words it is refused
REFUSED = {
    "none": (None, "two@1.0.0 cannot be fetched .*says: code E404.*put the .*-one-1.0.0.tgz, .*-two-1.0.0.tgz into"),
    "empty": (b"", NOT_PUBLISHED),
    "cut": (PACKAGES["two"][:-20], NOT_PUBLISHED),
    "draws nothing": (make_package({"wide": {"body": '<path d="M0 0"/>'}}), NOT_DRAWN),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_had_or_drawn_is_named_and_nothing_is_left(world, tmp_path, monkeypatch, case):
    content, words = REFUSED[case]
    package = tmp_path / "registry" / "iconify-json-two-1.0.0.tgz"
    package.unlink() if content is None else package.write_bytes(content)
    if words == NOT_DRAWN:
        monkeypatch.setitem(emoji.SOURCES, "two", ("1.0.0", hashlib.sha256(content).hexdigest()))
    with pytest.raises(Refused, match=words) as refusal:
        emoji.download(world)
    assert "\n" not in str(refusal.value) and not list(world.rglob("*"))
