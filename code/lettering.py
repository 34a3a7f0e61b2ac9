"""Names and titles in a picture: short enough, told apart, and in characters that the fonts have."""

import bisect
import functools
import importlib.util
import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font

LENGTH = 28  # columns of a class name in a plot


# What texts are drawn in; of zhplot, if it is installed, the font, for Chinese and Japanese names
FONTS = ["DejaVu Sans"]
if zhplot := importlib.util.find_spec("zhplot"):
    for file in Path(zhplot.origin).parent.glob("fonts/NotoSansSC-Regular.ttf"):
        fontManager.addfont(file)
        FONTS.append("Noto Sans SC")
in_our_fonts = matplotlib.rc_context({"font.family": FONTS})  # a decorator


def short_names(names: Sequence[str], length: int = LENGTH) -> list[str]:
    """The names of one picture on one line each, at most `length` columns wide and still different where they were.

    Numbers in front go if the names differ without them. A name that is too long loses its middle; if that makes names
    equal, they begin where they differ.
    """
    full = [legible(name).replace("_", " ") for name in names]
    bare = [re.sub(r"^\d+[.\-\s]+(?=\S)", "", name) for name in full]
    if all(a != b for a, b in zip(full, bare, strict=True)) and len(set(bare)) == len(set(full)):
        full = bare
    short = {name: cut(name, length) for name in full}
    for text, alike in Counter(short.values()).items():
        if alike > 1:
            equal = [name for name, shown in short.items() if shown == text]
            same = max(1, len(os.path.commonprefix(equal)) - 3)
            short |= {name: cut(f"…{name[same:]}", length) for name in equal}
    return [short[name] for name in full]


def cut(text: str, length: int) -> str:
    """A text at most `length` columns wide: what is too long loses its middle, as names often differ at their ends."""
    widths = [1 + (unicodedata.east_asian_width(character) in "WF") for character in text]  # Chinese: twice Latin's
    if sum(widths) <= length:
        return text
    head = bisect.bisect(list(itertools.accumulate(widths)), length // 2)
    tail = bisect.bisect(list(itertools.accumulate(reversed(widths))), (length - 1) // 2)
    return f"{text[:head]}…{text[len(text) - tail :]}"


def legible(text: str) -> str:
    """A text on one line; characters that the fonts lack are spelled out, 고양이 as goyangi and a dog as (dog face)."""
    text = " ".join(str(text).encode("utf-8", "replace").decode().split())
    return "".join(character if ord(character) in _drawable() else _spell(character) for character in text)


@functools.cache
def _drawable() -> frozenset[int]:
    """Code points that the fonts have a glyph for."""
    return frozenset().union(*(FT2Font(findfont(FontProperties(family))).get_charmap() for family in FONTS))


def _spell(character: str) -> str:
    """Letters by the last word of their Unicode name, which is their sound; others by the whole name or number."""
    name = unicodedata.name(character, "").lower()
    if not name or "ideograph" in name:
        return f"U+{ord(character):04X} "
    return name.split()[-1] if unicodedata.category(character)[0] in "LMN" else f"({name})"


def label(text: str, length: int) -> str:
    """Any text as one for matplotlib, at most `length` columns wide."""
    return plain(cut(legible(text), length))


def plain(text: str) -> str:
    """For matplotlib: a dollar sign stays one and begins no formula."""
    return text.replace("$", r"\$")
