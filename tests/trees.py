"""Tiny trees in each benchmark's own file formats, for the tests of every script."""

import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def picture(class_id: int, index: int, size: int = 40, mode: str = "RGB") -> Image.Image:
    """A picture that a network can tell by class: stripes of the class's direction and colour, and noise."""
    random = np.random.RandomState([class_id, index])
    angle, colour = class_id * 2.4, np.random.RandomState(class_id).uniform(60, 200, 3)
    y, x = np.mgrid[:size, :size] / size
    stripes = np.sin(20 * (x * np.cos(angle) + y * np.sin(angle)) + random.uniform(0, 6))
    pixels = colour + 50 * stripes[..., None] + random.normal(0, 8, (size, size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def save(path: Path, class_id: int, index: int, size: int = 40, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(class_id, index, size, mode).save(path)


def make_cub(root: Path, classes: int = 8, images: int = 6, size: int = 40) -> Path:
    """root/CUB_200_2011/images/NNN.Name/*.jpg with the `._` files that macOS leaves; gives root/CUB_200_2011.

    The first class has a grey, a palette (under a .png name), an RGBA and a CMYK image.
    """
    home = Path(root) / "CUB_200_2011"
    odd = {1: ("L", "jpg"), 2: ("P", "png"), 3: ("RGBA", "png"), 4: ("CMYK", "jpg")}
    for c in range(1, classes + 1):
        folder = home / "images" / f"{c:03d}.Bird_{c}"
        for i in range(images):
            mode, suffix = odd.get(i, ("RGB", "jpg")) if c == 1 else ("RGB", "jpg")
            save(folder / f"Bird_{c}_{i:04d}.{suffix}", c, i, size, mode)
        (folder / f"._Bird_{c}_0000.jpg").write_bytes(b"Mac OS X")
    (home / "images" / "._001.Bird_1").write_bytes(b"Mac OS X")
    return home


def make_cars(root: Path, layout: int = 1, classes: int = 8, images: int = 6, size: int = 40) -> Path:
    """root/cars196 in one of its three layouts; gives root/cars196."""
    home = Path(root) / "cars196"
    home.mkdir(parents=True, exist_ok=True)
    rows = [(c, i) for i in range(images) for c in range(1, classes + 1)]  # mixed, as in the original
    if layout == 1:
        files = [f"car_ims/{n:06d}.jpg" for n in range(1, len(rows) + 1)]
        for file, (c, i) in zip(files, rows, strict=True):
            save(home / file, c, i, size)
        names = np.array([[f"Car {c}" for c in range(1, classes + 1)]], dtype=object)
        write_annotations(home / "cars_annos.mat", files, [c for c, _ in rows], class_names=names)
    elif layout == 2:
        half = len(rows) // 2
        for part, chosen in (("train", rows[:half]), ("test", rows[half:])):
            files = [f"{n:05d}.jpg" for n in range(1, len(chosen) + 1)]
            for file, (c, i) in zip(files, chosen, strict=True):
                save(home / f"cars_{part}" / file, c, i, size)
            name = "devkit/cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat"
            write_annotations(home / name, files, [c for c, _ in chosen], file_field="fname")
    else:
        names = [f"Car {c} Type a/b" for c in range(1, classes + 1)]
        (home / "names.csv").write_text("\n".join(names) + "\n")
        for part, chosen in (("train", rows[::2]), ("test", rows[1::2])):
            lines = []
            for n, (c, i) in enumerate(chosen, 1):
                folder = home / "car_data" / "car_data" / part / names[c - 1].replace("/", "-")
                save(folder / f"{n:05d}.jpg", c, i, size)
                lines.append(f"{n:05d}.jpg,1,2,30,31,{c}")
            (home / f"anno_{part}.csv").write_text("\n".join(lines) + "\n")
    return home


def write_annotations(
    path: Path, files: list[str], classes: list[int] | None, file_field="relative_im_path", **variables
) -> None:
    """A .mat file with `annotations` as Stanford wrote them; without classes, as its unlabelled test list."""
    from scipy.io import savemat

    fields = [(file_field, object), *((f"bbox_{corner}", object) for corner in ("x1", "y1", "x2", "y2"))]
    if classes is not None:
        fields.append(("class", object))
    annotations = np.empty((1, len(files)), dtype=fields)
    for i, file in enumerate(files):
        box = tuple(np.array([[value]], dtype=np.uint8) for value in (1, 2, 30, 31))
        label = () if classes is None else (np.array([[classes[i]]], dtype=np.uint8),)
        annotations[0, i] = (file, *box, *label)
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"annotations": annotations, **variables}, do_compression=True)  # as MATLAB does


def make_sop(root: Path, classes: int = 8, images: int = 4, size: int = 40) -> Path:
    """root/Stanford_Online_Products, half of the classes in each list; gives that folder."""
    home = Path(root) / "Stanford_Online_Products"
    number = 0
    for split, chosen in (("train", range(classes // 2)), ("test", range(classes // 2, classes))):
        lines = ["image_id class_id super_class_id path"]
        for c in (index + 1 for index in chosen):
            product, label = (1, "bicycle") if c % 2 else (2, "cabinet")
            for i in range(images):
                number += 1
                path = f"{label}_final/1110{c:08d}_{i}.JPG"
                save(home / path, c, i, size)
                lines.append(f"{number} {c} {product} {path}")
        (home / f"Ebay_{split}.txt").write_text("\n".join(lines) + "\n")
    return home


def make_inshop(root: Path, classes: int = 8, images: int = 5, size: int = 40) -> Path:
    """root/Inshop_Clothes: half of the classes train, of the others two images each are queries."""
    home = Path(root) / "Inshop_Clothes"
    lines = []
    for c in range(1, classes + 1):
        for i in range(images):
            path = f"img/WOMEN/Dresses/id_{c:08d}/02_{i}_front.jpg"
            save(home / "Img" / path, c, i, size)
            status = "train" if c <= classes // 2 else "query" if i < 2 else "gallery"
            lines.append(f"{path:<70} id_{c:08d} {status}")
    text = "\n".join([str(len(lines)), "image_name item_id evaluation_status", *lines]) + "\n"
    (home / "Eval").mkdir(parents=True, exist_ok=True)
    (home / "Eval" / "list_eval_partition.txt").write_text(text)
    return home


def publish(monkeypatch, name: str, root: Path) -> dict[str, tuple[int, int]]:
    """Makes the counts of a tiny tree under root the published ones, and gives them."""
    import layouts

    counts = layouts.read_splits(name, root).counts()
    patch(monkeypatch, name, published=counts)
    return counts


def patch(monkeypatch, name: str, **changes) -> None:
    """Changes what is known about a data set."""
    import layouts

    known = layouts.get(name)
    module = importlib.import_module(f"layouts.{name.lower()}")
    monkeypatch.setattr(module, "LAYOUT", dataclasses.replace(known, **changes))


def make_classes(root: Path, classes: int = 8, images: int = 6) -> Path:
    """root/class 0/0.png, …: class folders without a split; gives root."""
    for c in range(classes):
        for i in range(images):
            save(Path(root) / f"class {c}" / f"{i}.png", c, i)
    return Path(root)


def make_folder(root: Path, layout="train+test", classes: int = 8, images: int = 6, size: int = 40) -> Path:
    """Own images; layout is train+test, train+query+gallery, classes (root/<class>/) or csv; gives root.

    The csv layout writes root/list.csv for images under root/pictures/, mixed over its folders.
    """
    root = Path(root)
    rows = []
    for c in range(1, classes + 1):
        for i in range(images):
            seen = c <= classes // 2
            searched = "test" if layout in ("train+test", "csv") else "query" if i < 2 else "gallery"
            split = "train" if seen else searched
            path = f"{split}/thing_{c}/{i}.png" if "+" in layout else f"thing_{c}/{i}.png"
            if layout == "csv":
                path = f"pictures/{i}/{c}.png"
                rows.append(f"{path},thing_{c},{split}")
            save(root / path, c, i, size)
    if layout == "csv":
        (root / "list.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
    return root


def registry(folder: Path) -> tuple[str, ...]:
    """A stand-in for npm or pip: a command that fetches all that lies in the folder, and then complains."""
    program = folder.with_name("registry.py")
    copy = f"import shutil\nshutil.copytree({str(folder)!r}, '.', dirs_exist_ok=True)\n"
    program.write_text(copy + "raise SystemExit('code E404\\nNot Found')\n")
    return sys.executable, str(program)


def pairs(images):
    """(path, class name) of every image, sorted"""
    return sorted((path, images.class_names[label]) for path, label in zip(images.paths, images.labels, strict=True))
