"""Class names and colours of a data set, and the number that means "no label"."""

import colorsys
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

VOID = 255
"""Label of a pixel without a class, on the host and on the device."""

Colour = tuple[int, int, int]
_GAP, _LINE = 6, 22  # pixels, of a legend


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """Names and display colours (RGB, 0-255) of classes 0..C-1."""

    names: tuple[str, ...]
    colours: tuple[Colour, ...]

    def __post_init__(self):
        if len(self.names) != len(self.colours):
            raise ValueError(f"{len(self.names)} names but {len(self.colours)} colours")

    def __len__(self) -> int:
        return len(self.names)

    def paint(
        self, labels: UInt8[np.ndarray, "h w"], void: Colour = (0, 0, 0)
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Labels in the colours of their classes (RGB), void in its own."""
        table = np.full((VOID + 1, 3), void, np.uint8)
        table[: len(self)] = self.colours
        return table[labels]

    def legend(self, width: int) -> UInt8[np.ndarray, "h w 3"]:
        """A picture of the classes' colours and names, in as many lines as they need.

        Args:
          width: in pixels, more where one name needs more.
        """
        font, indents = ImageFont.load_default(13), 24
        needed = [indents + int(font.getlength(name)) + 3 * _GAP for name in self.names]
        width = max(width, *(_GAP + n for n in needed)) if needed else width
        places, x, y = [], _GAP, 0
        for n in needed:
            if x > _GAP and x + n > width:
                x, y = _GAP, y + _LINE
            places.append((x, y))
            x += n
        picture = Image.new("RGB", (width, y + _LINE + _GAP), "white")
        draw = ImageDraw.Draw(picture)
        for name, colour, (x, y) in zip(self.names, self.colours, places, strict=True):
            draw.rectangle((x, y + 2, x + 18, y + 18), colour, "black")
            draw.text((x + indents, y + 2), name, "black", font)
        return np.array(picture)


# Okabe and Ito's eight, told apart by most colour-blind people, the background's black first.
_OKABE_ITO: tuple[Colour, ...] = tuple(
    tuple(bytes.fromhex(code))
    for code in "000000 e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7".split()
)
_GOLDEN = 0.618033988749895  # successive hues this far apart never crowd


def palette(size: int) -> tuple[Colour, ...]:
    """`size` different colours: Okabe and Ito's first, then hues that also differ in lightness.

    More than eight classes cannot all be told apart by hue alone without full colour vision, so
    neighbours in the continuation alternate between light and dark.
    """
    colours = list(_OKABE_ITO[:size])
    step = 0
    while len(colours) < size:
        lightness = (0.35, 0.75, 0.55)[step % 3]
        saturation = 0.9 - 0.15 * (step // 3 % 3)
        rgb = colorsys.hls_to_rgb(step * _GOLDEN % 1.0, lightness, saturation)
        colour = tuple(round(255 * v) for v in rgb)
        if colour not in colours:
            colours.append(colour)
        step += 1
    return tuple(colours)


def generic(names: Sequence[str]) -> LabelSet:
    """A label set in the generic palette."""
    return LabelSet(tuple(names), palette(len(names)))
