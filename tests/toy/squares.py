"""A data set from outside: bright squares on noise, without any files."""

import numpy as np

from protoseg_jax import images
from protoseg_jax.data.labels import generic
from protoseg_jax.data.prepare import DataSet, Example

LABELS = generic(("noise", "square"))
SIDE = 40


def open(config):
    def example(split, number):
        rng = np.random.default_rng([config.seed, split == "train", number])
        image = rng.integers(0, 120, (SIDE, SIDE, 3)).astype(np.uint8)
        label = np.zeros((SIDE, SIDE), np.uint8)
        top, left = rng.integers(2, SIDE - 22, 2)
        image[top : top + 20, left : left + 20] += 120
        label[top : top + 20, left : left + 20] = 1
        return Example(f"{split}{number}", images.encode(image), label)

    splits = {"train": list(range(8)), "validation": list(range(3))}
    return DataSet("squares", LABELS, splits, example, source=[1, config.seed])


def submission(split, image_id, labels):
    return f"{split}/{image_id}_squares.png", images.palette_png(labels)
