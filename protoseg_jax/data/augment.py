"""Training augmentation (section 4; METHOD's table): random scale, crop, flip — seeded per example.

A uniform scale s in `scale_range` resizes an image to ⌊h·s⌋ × ⌊w·s⌋ (bilinear without
antialiasing, labels nearest); what is smaller than the crop is padded at the bottom and right with
the mean colour and void; then a random crop, and a horizontal flip half of the time.
"""

import dataclasses

import cv2
import grain.python as grain
import numpy as np

from protoseg_jax.data import preprocessing
from protoseg_jax.data.label_sets import VOID


@dataclasses.dataclass(frozen=True)
class Augment(grain.RandomMapTransform):
    """{"image": [h w 3], "label": [h w], …} → {"image": [H W 3], "label": [H W]}, bytes.

    Attributes:
      crop_size: (H, W).
      scale_range: (smallest, largest) scale.
      padding_colour: RGB bytes.
    """

    crop_size: tuple[int, int]
    scale_range: tuple[float, float]
    padding_colour: tuple[int, int, int]

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        image, label = element["image"], element["label"]
        size = scaled_size(image.shape[:2], rng.uniform(*self.scale_range))
        box = crop_box(size, self.crop_size, rng)
        flip = rng.random() < 0.5
        image = preprocessing.resize_image(image, size)
        label = preprocessing.resize_labels(label, size)
        image = pad_and_crop(image, box, self.padding_colour)
        label = pad_and_crop(label, box, VOID)
        if flip:
            image, label = image[:, ::-1], label[:, ::-1]
        return {"image": np.ascontiguousarray(image), "label": np.ascontiguousarray(label)}


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """⌊size · scale⌋, at least one pixel."""
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def crop_box(
    size: tuple[int, int], crop: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A uniformly random crop: (top, left, height, width) within an image padded to the crop."""
    top = int(rng.integers(0, max(size[0] - crop[0], 0) + 1))
    left = int(rng.integers(0, max(size[1] - crop[1], 0) + 1))
    return top, left, crop[0], crop[1]


def pad_and_crop(
    array: np.ndarray, box: tuple[int, int, int, int], fill: int | tuple[int, int, int]
) -> np.ndarray:
    """Cut a box out of an array; what lies beyond its bottom or right edge is filled."""
    top, left, height, width = box
    cut = array[top : top + height, left : left + width]
    bottom, right = height - cut.shape[0], width - cut.shape[1]
    if not (bottom or right):
        return cut
    return cv2.copyMakeBorder(cut, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=fill)
