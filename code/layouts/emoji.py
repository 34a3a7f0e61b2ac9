"""The emoji benchmark: one class per sign, from up to nine icon sets.

emoji_classes.txt fixes the classes and their order. It holds the names without "skin-tone" that at least six of the
sources know, as an icon or an alias. Of names that share their drawing in the first source that knows them
(alphabetical order), only the first is kept. The sorted names were then shuffled by random.Random(1).
"""

import io
import json
import tarfile
from pathlib import Path

from folders import written_whole
from packages import Package, read_packages
from PIL import Image
from refused import Refused
from tqdm import tqdm

from layouts.reading import Layout, read_numbered_folders

CLASSES_FILE = Path(__file__).with_name("emoji_classes.txt")
SIZE = 96  # pixels, width and height
NPM_PACK = ("npm", "pack", "--ignore-scripts")

# Iconify's icon set of each artist: (version, sha256 of the package as published)
SOURCES = {
    "emojione": ("1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "emojione-v1": ("1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"),
    "fluent-emoji": ("1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    "fluent-emoji-flat": ("1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "fxemoji": ("1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    "noto": ("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1": ("1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "openmoji": ("1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    "twemoji": ("1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
}

ATTRIBUTION = """# Where the pictures come from

Each file name ends in its source. Changes: the vector drawings were rendered at {size} × {size} pixels on white.
A picture stays under its source's licence.

| source | title | author | licence | npm package |
|---|---|---|---|---|
"""


def download(root: Path) -> Path:
    """Fetches the nine icon sets (28 MB) and draws root/emoji unless it is there; gives that folder.

    Packages that lie in root/emoji_packages are used, npm fetches the others. The same release of resvg_py gives
    the same bytes: the packages are pinned and no font is used.
    """
    target = root / "emoji"
    if target.is_dir():
        return target
    from resvg_py import svg_to_bytes  # before the download: it may be missing, as only drawing needs it

    packages = [
        Package(f"@iconify-json/{name}@{version}", f"iconify-json-{name}-{version}.tgz", sha256)
        for name, (version, sha256) in SOURCES.items()
    ]
    contents = read_packages(packages, root / "emoji_packages", NPM_PACK)
    sources, rows = {}, []
    for name, content in zip(SOURCES, contents, strict=True):
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            sources[name], info = (json.load(archive.extractfile(f"package/{part}.json")) for part in ("icons", "info"))
        rows.append(
            f"| {name} | {info['name']} | [{info['author']['name']}]({info['author']['url']}) "
            f"| [{info['license']['title']}]({info['license']['url']}) | @iconify-json/{name} {SOURCES[name][0]} |\n"
        )
    with written_whole(target) as folder:
        write_emoji(folder, sources, svg_to_bytes)
        (folder / "ATTRIBUTION.md").write_text(ATTRIBUTION.format(size=SIZE) + "".join(rows), encoding="utf-8")
    return target


def find_svg(icons: dict, name: str) -> str | None:
    """A name's drawing in an icon set as an SVG document; None if the set does not know the name.

    Of what IconifyJSON allows, the pinned sets use: sizes per set and per icon, aliases of icons, mirrored aliases.
    """
    alias = icons.get("aliases", {}).get(name, {})
    icon = icons["icons"].get(alias.get("parent", name))
    if icon is None:
        return None
    width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
    body = icon["body"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="0 0 {width} {height}">{body}</svg>'
    )


def write_emoji(folder: Path, sources: dict[str, dict], svg_to_bytes) -> None:
    """Draws all classes on white into folder/images; sources are the icon sets by name."""
    names = CLASSES_FILE.read_text().split()
    for number, name in enumerate(tqdm(names, "drawing emoji", unit="class", disable=None), 1):
        class_name = f"{number:04d}.{name}"
        class_folder = folder / "images" / class_name
        class_folder.mkdir(parents=True)
        for source, icons in sources.items():
            if not (svg := find_svg(icons, name)):
                continue
            png = svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="white", skip_system_fonts=True)
            with Image.open(io.BytesIO(png)) as image:
                if image.convert("L").getextrema() == (255, 255):
                    raise Refused(
                        f"emoji: {name!r} of @iconify-json/{source} is drawn all white; "
                        "`pip install -r requirements.txt -c constraints.txt` brings the resvg_py that draws them all"
                    )
            (class_folder / f"{class_name}_{source}.png").write_bytes(png)


LAYOUT = Layout(
    home="emoji",
    read=read_numbered_folders,
    published={"train": (4706, 602), "test": (4686, 601)},
    last_train_class=602,
    draw=download,
)
