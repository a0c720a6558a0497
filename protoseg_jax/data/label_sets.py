"""Class names and colours of the known data sets, and the number that means "no label"."""

import colorsys
import dataclasses
from collections.abc import Sequence

VOID = 255
"""Label of a pixel without a class, on the host and on the device."""

Colour = tuple[int, int, int]


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


# Okabe and Ito's eight, told apart by most colour-blind people, the background's black first.
_OKABE_ITO: tuple[Colour, ...] = (
    (0, 0, 0),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
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


CAMVID = LabelSet(
    names=(
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    colours=(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
)

# Light and dark as in the sections: membranes dark.
ISBI_EM = LabelSet(names=("membrane", "inside"), colours=((0, 114, 178), (240, 228, 66)))

PARTS = generic(("background", "car", "house", "fish", "flower", "boat"))

VOC = LabelSet(
    names=(
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    ),
    # Pascal's own: class c's bits 0, 1, 2 (then 3, 4, 5) are the high bits of red, green, blue.
    colours=tuple(
        tuple(128 * (c >> n & 1) + 64 * (c >> (n + 3) & 1) for n in range(3)) for c in range(21)
    ),
)

CITYSCAPES = LabelSet(
    names=(
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    ),
    colours=(
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (190, 153, 153),
        (153, 153, 153),
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
        (70, 130, 180),
        (220, 20, 60),
        (255, 0, 0),
        (0, 0, 142),
        (0, 0, 70),
        (0, 60, 100),
        (0, 80, 100),
        (0, 0, 230),
        (119, 11, 32),
    ),
)

CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The label id of each of Cityscapes' 19 train ids."""
