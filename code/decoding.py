"""From an image file to its pixels, whatever its format."""

import contextlib
import io
import os
import stat
from pathlib import Path

import numpy as np
from folders import TO_CONVERT, open_heif, suffix_of
from PIL import Image, ImageCms, ImageOps
from refused import Refused, one_line

NARROWEST = 1000  # times as long as wide; longer images would take gigabytes once resized


class UnreadableImage(Refused):
    """A file is missing, cut or no image. The message is one line: '<path>: cannot be decoded (<why>)'."""


def decode(image: Image.Image, own: bool = False) -> Image.Image:
    """An opened image as 8-bit RGB.

    16-bit images are divided by 257; other integers and floats are scaled from their smallest value to their largest.
    own pictures come out as a viewer shows them: turned as their EXIF data says, and on white where they are
    transparent. The published benchmarks were scored without either.
    """
    image.load()
    if own:
        with contextlib.suppress(Exception):  # damaged EXIF data fails in many ways
            ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):  # Pillow would clip to 0..255 instead of scaling
        return scale_to_bytes(image).convert("RGB")
    if own and image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:  # otherwise Pillow warns about each of them
        return image.convert("RGBA").convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # most are: no copy of the pixels


def scale_to_bytes(image: Image.Image) -> Image.Image:
    """Integers of more than 8 bits, or floats, as an 8-bit grey image."""
    values = np.asarray(image, dtype=np.float64)  # (H, W)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise Refused("no pixel has a finite value")
    low, high = finite.min(), finite.max()
    # Pillow opens 16 bits as mode I, too, from some formats.
    if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 257 <= high <= 65535):
        return Image.fromarray((values // 257).astype(np.uint8))
    if low == high:
        return Image.new("L", image.size, 127)
    scaled = np.nan_to_num(255 * ((values.clip(low, high) - low) / (high - low)))
    return Image.fromarray(scaled.round().astype(np.uint8))


def to_srgb(image: Image.Image) -> Image.Image:
    """An opened image turned upright, its colours those of sRGB where its profile says how they are meant."""
    with contextlib.suppress(Exception):  # damaged profiles fail in many ways, and some modes have no conversion
        ImageOps.exif_transpose(image, in_place=True)
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        if "srgb" not in ImageCms.getProfileDescription(profile).lower():
            if image.mode == "P" or image.has_transparency_data:
                image = image.convert("RGBA")  # a palette has no conversion, a transparent colour would change
            mode = "RGB" if image.mode == "CMYK" else image.mode
            return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode=mode)
    return image


def read_rgb(path: Path | str, own: bool = False, enough: int = 0, srgb: bool = False) -> Image.Image:
    """Decodes an image file of any format to 8-bit RGB, see decode. Raises UnreadableImage.

    own pictures may be HEIC, under any name. enough: pixels of the shorter side that are, for large JPEGs are decoded
    faster to fewer. srgb: with the colours that their profile means, which training does not look at.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Refused("not a regular file")  # opening a pipe would wait for ever
        if own and suffix_of(str(path)) in TO_CONVERT:
            raise Refused("it has to be converted first, to JPEG or TIFF")
        if own:
            open_heif()
        with Image.open(path) as image:
            if max(image.size) > NARROWEST * min(image.size):  # its shorter side will be resized to some 256 pixels
                raise Refused(f"{image.width:,} × {image.height:,} pixels are narrower than 1 to {NARROWEST:,}")
            if enough:
                image.draft("RGB", (enough, enough))
            return decode(to_srgb(image) if srgb else image, own)
    except Exception as error:  # what Pillow raises depends on where the file is broken
        why = getattr(error, "strerror", None) or one_line(error)
        raise UnreadableImage(f"{path}: cannot be decoded ({why})") from None
