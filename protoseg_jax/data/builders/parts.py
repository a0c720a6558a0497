"""`parts`: the embedded data set. Generated from a seed, needs no files; has a part label a pixel.

Background and five classes of objects, each of four named parts (see `parts_scenes`), 128 × 128.
Parts never enter training: they are there to ask whether a prototype found one.

`python -m protoseg_jax.data.builders.parts --sheet out.png` draws twenty images with their labels.
"""

import os
from collections.abc import Iterator

import cv2
import numpy as np
from absl import app, flags

from protoseg_jax.data.builders import parts_scenes
from protoseg_jax.data.builders.base import Example, SegmentationBuilder, encode_png
from protoseg_jax.data.label_sets import PARTS

_VERSION = 3  # raise it when the drawing changes
SIZES = {"train": 480, "validation": 80, "test": 80}


class Parts(SegmentationBuilder):
    """Builder of `parts`.

    Args:
      cache_dir: the cache.
      seed: decides every image; each split has its own stream.
      sizes: images a split.
    """

    name = "parts"

    def __init__(
        self, *, cache_dir: str | os.PathLike, seed: int, sizes: dict[str, int] | None = None
    ):
        self.label_set = PARTS
        self.part_names = parts_scenes.PART_NAMES
        self._seed, self._sizes = seed, dict(sizes or SIZES)
        self.split_names = tuple(self._sizes)
        super().__init__(cache_dir=cache_dir, source=[_VERSION, seed, self._sizes])

    def examples(self, split: str) -> Iterator[Example]:
        """One or two objects an image; every class equally often."""
        stream = self.split_names.index(split)
        for number in range(self._sizes[split]):
            image, label, parts = scene(self._seed, stream, number)
            name = f"{split}_{number:04d}"
            yield Example(name, encode_png(image), label, parts)


def scene(seed: int, stream: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image `number` of a stream: (RGB image, class labels, part labels)."""
    rng = np.random.default_rng([seed, stream, number])
    names = list(parts_scenes.OBJECTS)
    # The first object goes round the classes, so that no class is ever rare.
    first = names.pop(number % len(names))
    others = rng.permutation(names)[: rng.integers(0, 2)].tolist()
    return parts_scenes.draw(rng, rng.permutation([first, *others]).tolist())


def sheet(seed: int, count: int = 20, columns: int = 5) -> np.ndarray:
    """A contact sheet: images with their class colours beside them, RGB."""
    colours = np.array(PARTS.colours, np.uint8)
    tiles = []
    for number in range(count):
        image, label, _ = scene(seed, 0, number)
        tiles.append(np.concatenate([image, colours[label]], 1))
    rows = [np.concatenate(tiles[n : n + columns], 1) for n in range(0, count, columns)]
    return np.concatenate(rows, 0)


def _main(_: list[str]) -> None:
    picture = cv2.cvtColor(sheet(_SEED.value), cv2.COLOR_RGB2BGR)
    cv2.imwrite(_SHEET.value, picture)


if __name__ == "__main__":
    _SHEET = flags.DEFINE_string("sheet", "parts.png", "PNG to write.")
    _SEED = flags.DEFINE_integer("seed", 0, "Seed of the data set.")
    app.run(_main)
