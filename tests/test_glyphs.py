"""The embedded benchmark: letters that differ, sets that are whole, the same bytes everywhere."""

import hashlib
import subprocess
import sys
from pathlib import Path

import dataset
import numpy as np
import pytest
from layouts import glyphs
from PIL import Image
from refused import Refused

CODE = Path(glyphs.__file__).parent.parent
SMALL = {"num_classes": 6, "images_per_class": 4, "size": 32}


def digest(folder):
    """Of all names and bytes under the folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.png")):
        total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()


def test_letters_are_many_and_look_different(tmp_path):
    letters = glyphs.distinct_letters()
    assert len(letters) > 2500
    assert "A" in letters and "А" not in letters  # the second is Cyrillic
    pictures = {(image.size, image.tobytes()) for image in (glyphs.draw_letter(x, 40) for x in letters)}
    assert len(pictures) == len(letters)
    with pytest.raises(Refused, match="glyphs: 100000 classes wanted"):
        glyphs.ensure_glyphs(tmp_path, num_classes=100_000)
    assert list(tmp_path.iterdir()) == []


def test_layout_is_that_of_cub(tmp_path, monkeypatch):
    folder = glyphs.ensure_glyphs(tmp_path, **SMALL)
    assert folder == tmp_path / "glyphs_6x4_32"
    monkeypatch.setattr(glyphs, "distinct_letters", None)  # what is there is used as it is
    assert glyphs.ensure_glyphs(tmp_path, **SMALL) == folder
    folder.rename(tmp_path / "glyphs")
    benchmark = dataset.load_benchmark("glyphs", tmp_path)
    assert (len(benchmark.train), benchmark.train.num_classes, benchmark.query.num_classes) == (12, 3, 3)
    images = [Image.open(part.file(row)) for part in (benchmark.train, benchmark.query) for row in range(12)]
    assert {image.size for image in images} == {(32, 32)} and len({image.tobytes() for image in images}) == 24
    assert all(np.ptp(np.asarray(image)) > 20 for image in images)  # there is ink on it
    assert [p.name for p in tmp_path.iterdir()] == ["glyphs"]  # nothing is left lying about


def test_parameters_change_the_set_and_its_folder(tmp_path):
    digests = {}
    for change in ({}, {"seed": 1}, {"size": 40}, {"num_classes": 7}, {"images_per_class": 5}):
        folder = glyphs.ensure_glyphs(tmp_path, **(SMALL | change))
        digests[folder] = digest(folder)
    assert len(digests) == len(set(digests.values())) == 5
    # more images or classes leave those that were there as they were
    first = next((tmp_path / "glyphs_6x4_32").rglob("*_01.png"))
    assert first.read_bytes() == (tmp_path / "glyphs_6x5_32" / first.relative_to(first.parents[2])).read_bytes()


@pytest.mark.slow
def test_processes_that_start_at_once_both_succeed(tmp_path):
    line = f"from layouts import glyphs; print(glyphs.ensure_glyphs({str(tmp_path)!r}, 30, 20, 32))"
    both = [subprocess.Popen([sys.executable, "-c", line], cwd=CODE, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    assert [p.communicate(timeout=60)[0].strip() for p in both] == [str(tmp_path / "glyphs_30x20_32")] * 2
    assert [p.returncode for p in both] == [0, 0] and [p.name for p in tmp_path.iterdir()] == ["glyphs_30x20_32"]
    here = glyphs.ensure_glyphs(tmp_path / "here", 30, 20, 32)  # the same bytes in any process
    assert digest(here) == digest(tmp_path / here.name)
