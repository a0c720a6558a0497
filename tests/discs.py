"""A small data set in the `folder` layout: ten images in three sizes."""

import pathlib

import numpy as np
from PIL import Image

SIZES = [(40, 56), (64, 48), (50, 50)]


def make_data(root: pathlib.Path) -> None:
    """Bright discs, dark bars, grey ground; no split lists; some void."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    (root / "classes.txt").write_text("ground\ndisc\nbar\n")
    for n in range(10):
        h, w = SIZES[n % 3]
        y, x = np.mgrid[:h, :w]
        mask = np.zeros((h, w), np.uint8)
        mask[(y - h / 3) ** 2 + (x - w / 3) ** 2 < 120] = 1
        mask[h // 2 + 6 : h // 2 + 16] = 2
        mask[:2] = 255
        colours = np.array([[120, 120, 120], [230, 220, 40], [20, 30, 60]])
        image = colours[np.where(mask == 255, 0, mask)] + rng.normal(0, 12, (h, w, 3))
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(
            root / "images" / f"im{n}.png"
        )
        Image.fromarray(mask).save(root / "masks" / f"im{n}.png")
