"""Overlapping tiles, for images larger than the evaluation size that must not be shrunk.

Each tile is an example of its own, as large as the evaluation size, so that scoring, search and
explanation meet nothing else. Its labels are void outside its *own* part of the image: the pixels
that are nearer to its middle than to any other tile's. Every pixel is thus scored once, by the tile
that sees most of its surroundings, and a prototype's home is a tile and a place in it.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from protoseg_jax.data.labels import VOID
from protoseg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tile lies: the image's number, the tile's corner in it, and the part of the *image*
    that is its own, [top, left, bottom, right], half-open."""

    image: int
    corner: tuple[int, int]
    own: tuple[int, int, int, int]

    def inside(self) -> tuple[slice, slice]:
        """Rows and columns of its own part within the tile."""
        (top, left), (y0, x0, y1, x1) = self.corner, self.own
        return slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)


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
            example = source[number]
            shape = example["label"].shape
            if shape[0] < size[0] or shape[1] < size[1]:
                raise UserError(
                    f"image {example['image_id']!r} is {shape[0]}×{shape[1]}, and tiles of "
                    f"{size[0]}×{size[1]} (height×width) are larger; set a smaller "
                    "--config.eval_size, or leave eval_overlap out to have images resized"
                )
            lines = []
            for length, tile in zip(shape, size, strict=True):
                at = starts(length, tile, overlap)
                lines.append(list(zip(at, own_parts(at, tile, length), strict=True)))
            self.places += [
                Place(number, (top, left), (y[0], x[0], y[1], x[1]))
                for (top, y), (left, x) in itertools.product(*lines)
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
        window = tuple(slice(a, a + n) for a, n in zip(place.corner, self._size, strict=True))
        cut = {k: v[window] if isinstance(v, np.ndarray) else v for k, v in example.items()}
        for name, nothing in (("label", VOID), ("parts", 0)):
            if name in cut:
                own = np.full_like(cut[name], nothing)
                own[place.inside()] = cut[name][place.inside()]
                cut[name] = own
        return cut

    def stitch(
        self, labels: Iterable[tuple[int, UInt8[np.ndarray, "h w"]]]
    ) -> Iterator[tuple[int, UInt8[np.ndarray, "H W"]]]:
        """(tile's number, labels), in order → (image's number, labels) of each tile's own part."""
        for image, group in itertools.groupby(labels, lambda found: self.places[found[0]].image):
            parts = [(self.places[index], label) for index, label in group]
            whole = np.zeros(parts[-1][0].own[2:], np.uint8)  # the last ends at the far corner
            for place, label in parts:
                y0, x0, y1, x1 = place.own
                whole[y0:y1, x0:x1] = label[place.inside()]
            yield image, whole


def cuts(
    image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int], overlap: int | None
) -> Iterator[tuple[tuple[int, int], tuple[int, int, int, int], UInt8[np.ndarray, "h w 3"]]]:
    """(corner, own part, pixels) of what the network sees of an image: all of it, or its tiles.

    Args:
      image: RGB.
      size, overlap: of tiles (see `Tiled`); without an overlap there is one cut, the image.

    Raises:
      UserError: as `Tiled`.
    """
    if overlap is None:
        yield (0, 0), (0, 0, *image.shape[:2]), image
        return
    example = {"image_id": "image", "image": image, "label": np.zeros(image.shape[:2], np.uint8)}
    tiles = Tiled([example], size, overlap)
    for number, place in enumerate(tiles.places):
        yield place.corner, place.own, tiles[number]["image"]


def moved(box: Sequence[int], corner: tuple[int, int]) -> list[int]:
    """A box within a tile, [top, left, bottom, right], in the image's pixels."""
    (y, x), (top, left, bottom, right) = corner, box
    return [top + y, left + x, bottom + y, right + x]
