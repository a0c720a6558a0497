"""Training augmentation (section 4, docs/method.md): random scale, crop, flip — seeded per example.

A uniform scale s in `scale_range` resizes an image to ⌊h·s⌋ × ⌊w·s⌋ (bilinear without
antialiasing, labels nearest), where h × w is its own size or, with `augment.scale_of =
"evaluation"`, the size that evaluation brings it to; what is smaller than the crop is padded at the
bottom and right with the mean colour and void; then a random crop, and a horizontal flip half of
the time. Where a config says so, for images without an up and a down: quarter turns, and elastic
deformation.
"""

import dataclasses
from typing import Any

import cv2
import grain.python as grain
import ml_collections
import numpy as np
from jaxtyping import Float, UInt8

from protoseg_jax.data.labels import VOID, LabelSet
from protoseg_jax.errors import UserError
from protoseg_jax.images import Box, pad_and_crop, resize_image, resize_labels

_GRID = 3  # elastic deformation's random displacements, interpolated between them
_WHITE = (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is drawn for one example: the scaled size, the crop within it, whether it flips, its
    quarter turns, and the displacements (y, x) of a coarse grid over the crop, [3 3 2], if any."""

    size: tuple[int, int]
    box: Box
    flip: bool
    turns: int = 0
    displacements: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Augment(grain.RandomMapTransform):
    """{"image": [h w 3], "label": [h w], …} → {"image": [H W 3], "label": [H W]}, bytes.

    Attributes:
      crop_size: (H, W).
      scale_range: (smallest, largest) scale.
      padding_colour: RGB bytes.
      whole: the (h, w) that scale 1 brings every image to; None for its own size.
      turns: whether crops, which must be square, are turned by 0–3 quarters.
      elastic: deviation, in pixels of the crop, of the displacements on a 3×3 grid over it, between
        which they are interpolated bicubically (Ronneberger et al. 2015: 10 of 512²); 0 for none.
    """

    crop_size: tuple[int, int]
    scale_range: tuple[float, float]
    padding_colour: tuple[int, int, int]
    whole: tuple[int, int] | None = None
    turns: bool = False
    elastic: float = 0.0

    def choose(self, size: tuple[int, int], rng: np.random.Generator) -> Choice:
        """Draw scale, crop and flip for an image of a size."""
        scale = rng.uniform(*self.scale_range)
        scaled = tuple(max(1, int(n * scale)) for n in self.whole or size)
        room = (max(n - side, 0) for n, side in zip(scaled, self.crop_size, strict=True))
        box = (*(int(rng.integers(0, n + 1)) for n in room), *self.crop_size)
        flip = bool(rng.random() < 0.5)
        turns = int(rng.integers(4)) if self.turns else 0
        displacements = rng.normal(0.0, self.elastic, (_GRID, _GRID, 2)) if self.elastic else None
        return Choice(scaled, box, flip, turns, displacements)

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        choice = self.choose(element["image"].shape[:2], rng)
        if choice.displacements is None:
            inside = (0, 0, *self.crop_size)
            image = resize_image(element["image"], choice.size, choice.box)
            image = pad_and_crop(image, inside, self.padding_colour)
            label = resize_labels(element["label"], choice.size, choice.box)
            label = pad_and_crop(label, inside, VOID)
        else:
            image = resize_image(element["image"], choice.size)
            label = resize_labels(element["label"], choice.size)
            places = displaced(choice.box, choice.displacements)
            image = cv2.remap(
                image, *places, cv2.INTER_LINEAR, None, cv2.BORDER_CONSTANT, self.padding_colour
            )
            label = cv2.remap(label, *places, cv2.INTER_NEAREST, None, cv2.BORDER_CONSTANT, VOID)
        if choice.flip:
            image, label = cv2.flip(image, 1), cv2.flip(label, 1)
        image, label = np.rot90(image, choice.turns), np.rot90(label, choice.turns)
        return {"image": np.ascontiguousarray(image), "label": np.ascontiguousarray(label)}


def from_config(config: ml_collections.ConfigDict, padding_colour: tuple[int, int, int]) -> Augment:
    """The augmentation of a run's config.

    Raises:
      UserError: a crop that is not square is to be turned, or `augment.scale_of` is unknown.
    """
    crop, options = tuple(config.crop_size), config.augment
    if options.turns and crop[0] != crop[1]:
        raise UserError(
            f"crop_size={crop} is not square, so it cannot be turned; set --config.augment.turns="
            "False or a square --config.crop_size"
        )
    if options.scale_of not in ("image", "evaluation"):
        raise UserError(
            f"augment.scale_of={options.scale_of!r} is unknown; choose one of: image, evaluation"
        )
    # Tiles are seen at their own size.
    resized = options.scale_of == "evaluation" and config.eval_overlap is None
    whole = tuple(config.eval_size) if resized else None
    scale = tuple(options.scale)
    return Augment(crop, scale, padding_colour, whole, options.turns, options.elastic)


def displaced(
    box: Box, displacements: Float[np.ndarray, "g g 2"]
) -> tuple[Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
    """(x, y) of the place each pixel of a crop is taken from, smoothly displaced."""
    top, left, height, width = box
    smooth = cv2.resize(
        displacements.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    rows, cols = np.mgrid[top : top + height, left : left + width].astype(np.float32)
    return cols + smooth[..., 1], rows + smooth[..., 0]


def sheet(
    source: Any, augment: Augment, labels: LabelSet, *, count: int = 8, seed: int = 0
) -> UInt8[np.ndarray, "h w 3"]:
    """Rows of: the scaled image with the crop's box, the crop, its label in colours (RGB).

    The `count` examples are from all over the source; the augmentation is drawn by the seed.
    """
    rows = []
    for number in range(count):
        example = source[number * len(source) // count % len(source)]
        choice = augment.choose(example["image"].shape[:2], np.random.default_rng([seed, number]))
        top, left, height, width = choice.box
        room = max(choice.size[0], top + height), max(choice.size[1], left + width)
        scaled = resize_image(example["image"], choice.size)
        scaled = pad_and_crop(scaled, (0, 0, *room), _WHITE).copy()
        cv2.rectangle(scaled, (left, top), (left + width - 1, top + height - 1), (255, 0, 0), 2)
        out = augment.random_map(example, np.random.default_rng([seed, number]))
        row = [scaled, out["image"], labels.paint(out["label"], _WHITE)]
        tall = max(x.shape[0] for x in row)
        row = [pad_and_crop(x, (0, 0, tall, x.shape[1] + 4), _WHITE) for x in row]
        rows.append(np.concatenate(row, 1))
    wide = max(row.shape[1] for row in rows)
    rows = [pad_and_crop(row, (0, 0, row.shape[0] + 4, wide), _WHITE) for row in rows]
    return np.concatenate(rows)
