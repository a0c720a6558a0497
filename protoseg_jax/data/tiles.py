"""Overlapping tiles, for images larger than the evaluation size that must not be shrunk.

Each tile is an example of its own, as large as the evaluation size, so that scoring, search and
explanation meet nothing else. Its labels are void outside its *own* part of the image: the pixels
that are nearer to its middle than to any other tile's. Every pixel is thus scored once, by the tile
that sees most of its surroundings, and a prototype's home is a tile and a place in it.
"""

import dataclasses
from typing import Any

import numpy as np

from protoseg_jax.data.label_sets import VOID
from protoseg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tile lies: the image's number, the tile's corner in it, and the part of the *image*
    that is its own, [top, left, bottom, right], half-open."""

    image: int
    corner: tuple[int, int]
    own: tuple[int, int, int, int]


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the fewest evenly spaced tiles that cover a length and overlap at least so.

    Args:
      length: of the image, at least `tile`.
      tile: its length.
      overlap: pixels that neighbours share at least, in [0, tile).
    """
    count = 1 if length == tile else 1 - (tile - length) // (tile - overlap)
    return [round(n * (length - tile) / max(count - 1, 1)) for n in range(count)]


def own_parts(at: list[int], tile: int, length: int) -> list[tuple[int, int]]:
    """[first, last) pixel of each tile's own part: borders lie in the middle of the overlaps."""
    borders = [(a + tile + b) // 2 for a, b in zip(at, at[1:], strict=False)]
    return list(zip([0, *borders], [*borders, length], strict=True))


class Tiled:
    """A source whose examples are tiles of another's; picklable if that is.

    The sizes of all images are looked at once, so it suits volumes, not millions of photographs.

    Args:
      source: random-access examples ("image_id", "image", "label", maybe "parts").
      size: (height, width) of a tile.
      overlap: pixels that neighbouring tiles share at least.

    Raises:
      UserError: an image is smaller than a tile, or the overlap does not fit one.
    """

    def __init__(self, source: Any, size: tuple[int, int], overlap: int):
        if not 0 <= overlap < min(size):
            raise UserError(
                f"eval_overlap={overlap} must lie in [0, {min(size)}), tiles being {size[0]}×"
                f"{size[1]}; set --config.eval_overlap"
            )
        self._source, self._size = source, size
        self.places: list[Place] = []
        for number in range(len(source)):
            shape = source[number]["label"].shape
            if shape[0] < size[0] or shape[1] < size[1]:
                raise UserError(
                    f"image {source[number]['image_id']!r} is {shape[0]}×{shape[1]}, and tiles of "
                    f"{size[0]}×{size[1]} (height×width) are larger; set a smaller "
                    "--config.eval_size, or leave eval_overlap out to have images resized"
                )
            rows, cols = (
                list(zip(at, own_parts(at, tile, n), strict=True))
                for n, tile, at in (
                    (n, tile, starts(n, tile, overlap)) for n, tile in zip(shape, size, strict=True)
                )
            )
            self.places += [
                Place(number, (top, left), (y[0], x[0], y[1], x[1]))
                for top, y in rows
                for left, x in cols
            ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The tile's part of the example; its image's id.

        Raises:
          IndexError: outside [0, len).
        """
        if not 0 <= index < len(self.places):
            raise IndexError(f"tile {index} of {len(self.places)}")
        place = self.places[index]
        example = self._source[place.image]
        (top, left), (height, width) = place.corner, self._size
        window = slice(top, top + height), slice(left, left + width)
        cut = {k: v[window] if isinstance(v, np.ndarray) else v for k, v in example.items()}
        label = np.full_like(cut["label"], VOID)
        y0, x0, y1, x1 = place.own
        own = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
        label[own] = cut["label"][own]
        return {**cut, "label": label}
