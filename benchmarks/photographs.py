"""Draws a data set of CUB-200-2011's layout, number and size, for measuring without the real one.

Each picture is a crop of one of scikit-learn's two photographs, resized: a JPEG of about 500 × 375 at quality 90, some
50 KB. The crops say what decoding costs; what a network learns from them says nothing.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def make_photographs(root: Path, train: int = 5_864, test: int = 5_924, seed: int = 0, classes: int = 200) -> Path:
    """Writes root/CUB_200_2011/images/NNN.Name/*.jpg; returns root. The first half of the classes trains.

    Same arguments, same bytes. Threads draw side by side: Pillow's resizing and encoding leave Python's lock.
    """
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    images = root / "CUB_200_2011" / "images"
    half = classes // 2
    for number in range(classes):
        (images / f"{number + 1:03d}.Photograph_{number + 1}").mkdir(parents=True)

    def draw(number: int) -> None:
        random = np.random.RandomState([seed, number])
        photograph = photographs[random.randint(len(photographs))]
        share = random.uniform(0.6, 1)  # of its width and height: hardly enlarged, so as sharp as a photograph
        width, height = (share * side for side in photograph.size)
        left, top = random.uniform(0, 1, 2) * (photograph.width - width, photograph.height - height)
        size = (500, random.randint(300, 451))
        drawn = photograph.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        label = number % half if number < train else half + (number - train) % half
        folder = images / f"{label + 1:03d}.Photograph_{label + 1}"
        drawn.save(folder / f"Photograph_{number:05d}.jpg", quality=90)

    with ThreadPoolExecutor() as pool:
        list(pool.map(draw, range(train + test)))  # raises what a thread raised
    return root
