"""A benchmark that needs no download: letters drawn from the font that ships with matplotlib.

Each class is one Unicode letter of DejaVu Sans. Each image is one drawing of it, with its own size, rotation, shear,
shift, ink, paper and noise. The folders and the number of classes are those of CUB-200-2011.
"""

import functools
import math
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
from folders import written_whole
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from refused import Refused
from tqdm import tqdm

from layouts.reading import Layout, Listing, read_numbered_folders

FONT_FILE = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"

# How much the drawings of one letter differ. With these values the nearest neighbour on raw pixels has the right
# class for about a third of the images of the last 100 classes.
FONT_SIZE = (0.45, 0.75)  # height of the font in image heights
ROTATION = 15.0  # degrees, both ways
SHEAR = 0.2  # horizontal shift per unit of height, both ways
SHIFT = 0.085  # in image heights, both ways and both axes
INK = (0, 110)  # grey values out of 255
PAPER = (150, 255)
NOISE = (2.0, 16.0)  # standard deviation in grey values


@functools.cache
def load_font(pixels: int) -> ImageFont.FreeTypeFont:
    """The font at one size in pixels. Basic layout: the same on machines with and without libraqm."""
    return ImageFont.truetype(str(FONT_FILE), pixels, layout_engine=ImageFont.Layout.BASIC)


def draw_letter(letter: str, pixels: int) -> Image.Image:
    """The bare letter, white on black, cropped to its ink ('L' image); 0×0 if it draws nothing."""
    font = load_font(pixels)
    left, top, right, bottom = font.getbbox(letter)
    image = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), letter, fill=255, font=font)
    return image.crop(image.getbbox() or (0, 0, 0, 0))


def distinct_letters() -> tuple[str, ...]:
    """All letters (Unicode category L*) that the font draws differently, in code-point order.

    Of letters that look the same when cropped to their ink (Latin, Greek and Cyrillic A) only the first is kept.
    """
    seen = {draw_letter("\uffff", 40).tobytes()}  # what the font draws for a letter it does not have
    letters = []
    for code in sorted(FT2Font(str(FONT_FILE)).get_charmap()):
        if not unicodedata.category(chr(code)).startswith("L"):
            continue
        image = draw_letter(chr(code), 40)
        picture = image.size, image.tobytes()
        if image.width > 0 and picture not in seen:
            seen.add(picture)
            letters.append(chr(code))
    return tuple(letters)


def draw_image(letter: str, size: int, random: np.random.RandomState) -> Image.Image:
    """One drawing of the letter, size × size, grey."""
    pixels = round(size * random.uniform(*FONT_SIZE))
    mask = draw_letter(letter, max(pixels, 4))
    longest = max(mask.size)
    if longest > size:  # a wide ligature
        mask = mask.resize((max(1, mask.width * size // longest), max(1, mask.height * size // longest)))
    angle = math.radians(random.uniform(-ROTATION, ROTATION))
    shear = random.uniform(-SHEAR, SHEAR)
    shift_x, shift_y = random.uniform(-SHIFT, SHIFT, 2) * size
    # Pillow asks where in the source a target pixel (x, y) comes from: centre, rotate, shear, move back.
    cos, sin = math.cos(angle), math.sin(angle)
    a, b, d, e = cos + shear * sin, -sin + shear * cos, sin, cos
    centre_x, centre_y = size / 2 + shift_x, size / 2 + shift_y
    c = mask.width / 2 - a * centre_x - b * centre_y
    f = mask.height / 2 - d * centre_x - e * centre_y
    mask = mask.transform((size, size), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR)
    coverage = np.asarray(mask, dtype=np.float32) / 255  # (size, size), 1 where there is ink
    ink, paper = random.uniform(*INK), random.uniform(*PAPER)
    noise = random.standard_normal((size, size)) * random.uniform(*NOISE)
    grey = paper + (ink - paper) * coverage + noise
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))


def ensure_glyphs(root: Path, num_classes=200, images_per_class=20, size=64, seed=0) -> Path:
    """Draws the set under root unless it is there, and returns its folder. The same parameters give the same bytes.

    The default set lies in root/glyphs, any other in a folder named after its parameters: root/glyphs_400x20_64.
    """
    name = "glyphs"
    if (num_classes, images_per_class, size, seed) != (200, 20, 64, 0):
        name += f"_{num_classes}x{images_per_class}_{size}" + (f"_seed{seed}" if seed else "")
    target = Path(root) / name
    if target.is_dir():
        return target
    letters = distinct_letters()
    if num_classes > len(letters):
        raise Refused(f"glyphs: {num_classes} classes wanted, there are {len(letters)} letters")
    # RandomState, not default_rng: NumPy promises that its stream never changes.
    chosen = np.random.RandomState(seed).permutation(len(letters))[:num_classes]
    bar = tqdm(chosen, "drawing glyphs", unit="class", disable=None)
    with written_whole(target) as folder:
        for number, letter in enumerate((letters[index] for index in bar), 1):
            name = f"{number:03d}.{unicodedata.name(letter, f'U{ord(letter):04X}').replace(' ', '_')}"
            class_folder = folder / "images" / name
            class_folder.mkdir(parents=True)
            for i in range(images_per_class):
                # One stream per image: an image stays the same when there are more classes or images.
                image = draw_image(letter, size, np.random.RandomState([seed, ord(letter), i]))
                image.save(class_folder / f"{name}_{i + 1:02d}.png", compress_level=1)
    return target


def read(home: Path) -> Listing:
    ensure_glyphs(home.parent)
    return read_numbered_folders(home)


LAYOUT = Layout(home="glyphs", read=read, published={"train": (2000, 100), "test": (2000, 100)}, draw=ensure_glyphs)
