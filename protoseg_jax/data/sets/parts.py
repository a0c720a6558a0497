"""`parts`: the embedded data set. Generated from a seed, needs no files; has a part label a pixel.

Background and five classes of objects, each of four named parts, in cluttered scenes of 128 × 128.
Parts never enter training: they are there to ask whether a prototype found one.

Every object is drawn from its parts, back to front, as polygons in the object's own coordinates
(about [−1, 1]², y down), each filled with its own kind of texture. Pose, size, colours, lighting,
occlusion and clutter are random. Objects and clutter draw their colours from one distribution, so
that colour alone cannot tell classes apart: shape and texture must.
"""

import dataclasses
from collections.abc import Mapping

import cv2
import ml_collections
import numpy as np
from jaxtyping import Float, UInt8

from protoseg_jax import images
from protoseg_jax.data import prepare
from protoseg_jax.data.labels import generic

_VERSION = 3  # raise it when the drawing changes
SIZES = {"train": 480, "validation": 80, "test": 80}
SIZE = 128
_SCALE = 3  # drawn so many times larger, then averaged: smooth edges
LABELS = generic(("background", "car", "house", "fish", "flower", "boat"))


def open(config: ml_collections.ConfigDict, sizes: Mapping[str, int] = SIZES) -> prepare.DataSet:
    """One or two objects an image; every class equally often; each split has its own stream.

    Args:
      config: `seed` decides every image.
      sizes: images a split.
    """
    streams = {split: stream for stream, split in enumerate(sizes)}

    def example(split: str, number: int) -> prepare.Example:
        image, label, parts = scene(config.seed, streams[split], number)
        return prepare.Example(f"{split}_{number:04d}", images.encode(image), label, parts)

    return prepare.DataSet(
        name="parts",
        labels=LABELS,
        splits={split: range(count) for split, count in sizes.items()},
        example=example,
        source=[_VERSION, config.seed, dict(sizes)],
        part_names=PART_NAMES,
    )


def scene(seed: int, stream: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image `number` of a stream: (RGB image, class labels, part labels)."""
    rng = np.random.default_rng([seed, stream, number])
    names = list(OBJECTS)
    # The first object goes round the classes, so that no class is ever rare.
    first = names.pop(number % len(names))
    others = rng.permutation(names)[: rng.integers(0, 2)].tolist()
    return draw(rng, rng.permutation([first, *others]).tolist())


def _box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _disc(x: float, y: float, rx: float, ry: float | None = None, n: int = 28) -> np.ndarray:
    t = np.arange(n) * 2 * np.pi / n
    return np.stack([x + rx * np.cos(t), y + (ry or rx) * np.sin(t)], 1)


def _petals(count: int) -> list[np.ndarray]:
    shapes = []
    for t in np.arange(count) * 2 * np.pi / count:
        rotation = np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])
        shapes.append(_disc(0, -0.42, 0.21, 0.32) @ rotation.T + (0, -0.35))
    return shapes


@dataclasses.dataclass(frozen=True)
class Part:
    """A named part: its polygons in object coordinates, and the kind of its texture."""

    name: str
    shapes: tuple[np.ndarray, ...]
    texture: str


def _parts(*items: tuple[str, list[np.ndarray], str]) -> tuple[Part, ...]:
    return tuple(Part(name, tuple(shapes), texture) for name, shapes, texture in items)


_BODY = np.array(
    [(-1, 0.35), (-1, 0), (-0.6, -0.08), (-0.35, -0.48), (0.4, -0.48), (0.62, -0.05), (1, 0.05)]
    + [(1, 0.35)]
)
_WINDOWS = [
    np.array([(-0.47, -0.06), (-0.28, -0.39), (-0.02, -0.39), (-0.02, -0.06)]),
    np.array([(0.06, -0.06), (0.06, -0.39), (0.34, -0.39), (0.48, -0.06)]),
]
_SAILS = [
    np.array([(0.04, -0.95), (0.85, 0.26), (0.04, 0.26)]),
    np.array([(-0.04, -0.72), (-0.04, 0.26), (-0.62, 0.26)]),
]
OBJECTS: dict[str, tuple[Part, ...]] = {
    "car": _parts(
        ("body", [_BODY], "plain"),
        ("windows", _WINDOWS, "gradient"),
        ("wheels", [_disc(-0.55, 0.37, 0.25), _disc(0.58, 0.37, 0.25)], "rings"),
        ("lights", [_box(0.8, 0.07, 1.02, 0.2), _box(-1.02, 0.05, -0.84, 0.18)], "bright"),
    ),
    "house": _parts(
        ("wall", [_box(-0.7, -0.1, 0.7, 0.85)], "bricks"),
        ("roof", [np.array([(-0.95, -0.1), (0, -0.9), (0.95, -0.1)])], "stripes"),
        ("door", [_box(-0.17, 0.3, 0.17, 0.85)], "plain"),
        ("panes", [_box(-0.55, 0.1, -0.27, 0.4), _box(0.27, 0.1, 0.55, 0.4)], "cross"),
    ),
    "fish": _parts(
        ("tail", [np.array([(-0.4, 0), (-1.05, -0.55), (-0.85, 0), (-1.05, 0.55)])], "stripes"),
        (
            "fins",
            [
                np.array([(-0.3, -0.3), (0.1, -0.75), (0.35, -0.3)]),
                np.array([(-0.1, 0.3), (0.0, 0.68), (0.3, 0.3)]),
            ],
            "fan",
        ),
        ("scales", [_disc(0.08, 0, 0.74, 0.46)], "dots"),
        ("eye", [_disc(0.5, -0.1, 0.13)], "rings"),
    ),
    "flower": _parts(
        ("stem", [_box(-0.1, -0.3, 0.1, 1.0)], "plain"),
        (
            "leaves",
            [
                np.array([(0, 0.85), (0.2, 0.4), (0.75, 0.28), (0.5, 0.75)]),
                np.array([(0, 0.9), (-0.2, 0.45), (-0.75, 0.35), (-0.5, 0.82)]),
            ],
            "stripes",
        ),
        ("petals", _petals(6), "gradient"),
        ("centre", [_disc(0, -0.35, 0.22)], "dots"),
    ),
    "boat": _parts(
        ("mast", [_box(-0.05, -0.98, 0.05, 0.35)], "bright"),
        ("sails", _SAILS, "plain"),
        ("flag", [np.array([(-0.05, -0.98), (-0.42, -0.86), (-0.05, -0.74)])], "cross"),
        ("hull", [np.array([(-0.95, 0.25), (0.95, 0.25), (0.6, 0.75), (-0.6, 0.75)])], "planks"),
    ),
}
PART_NAMES = ("none",) + tuple(
    f"{name} {part.name}" for name, parts in OBJECTS.items() for part in parts
)
_PART_NUMBER = {name: number for number, name in enumerate(PART_NAMES)}
_TEXTURES = ("plain", "gradient", "stripes", "dots", "bricks", "cross", "rings", "planks", "fan")


def _pattern(kind: str, u: np.ndarray, v: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """How far a pixel is from the first towards the second colour, by place in the object."""
    x, y = u - centre[0], v - centre[1]
    if kind == "gradient":
        return np.clip(0.5 + 1.2 * y, 0, 1)
    if kind == "stripes":
        return (np.sin(26 * (u + 0.4 * v)) > 0).astype(np.float32)
    if kind == "planks":
        return (np.sin(30 * v) > 0.55).astype(np.float32)
    if kind == "dots":
        return (np.sin(24 * u) * np.sin(24 * v) > 0.3).astype(np.float32)
    if kind == "bricks":
        shifted = u + 0.11 * (np.floor(v / 0.13) % 2)
        return ((v % 0.13 < 0.035) | (shifted % 0.26 < 0.035)).astype(np.float32)
    if kind == "cross":
        return ((np.abs(x) < 0.035) | (np.abs(y) < 0.035)).astype(np.float32)
    if kind == "rings":
        radius = np.hypot(np.abs(x) % 10, y)
        return (np.sin(34 * radius) > 0).astype(np.float32)
    if kind == "fan":
        return (np.sin(14 * np.arctan2(y + 0.3, x)) > 0).astype(np.float32)
    return np.zeros_like(u)


def _colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(25, 235, 3)


class _Canvas:
    """Picture, classes and parts of a scene in the making, at drawing resolution."""

    def __init__(self, rng: np.random.Generator):
        self.side = SIZE * _SCALE
        self.rng = rng
        self.y, self.x = np.mgrid[: self.side, : self.side].astype(np.float32)
        self.image = np.empty((self.side, self.side, 3), np.float32)
        self.label = np.zeros((self.side, self.side), np.uint8)
        self.parts = np.zeros((self.side, self.side), np.uint8)

    def fill(
        self, shape: np.ndarray, pose: Float[np.ndarray, "2 3"], kind: str, colours: np.ndarray
    ) -> tuple[slice, slice, np.ndarray] | None:
        """Draw one polygon given in object coordinates; its window and mask there, if visible."""
        points = shape @ pose[:, :2].T + pose[:, 2]
        low = np.maximum(np.floor(points.min(0)).astype(int), 0)
        high = np.minimum(np.ceil(points.max(0)).astype(int) + 1, self.side)
        if (high <= low).any():
            return None
        rows, cols = slice(low[1], high[1]), slice(low[0], high[0])
        mask = np.zeros((high[1] - low[1], high[0] - low[0]), np.uint8)
        cv2.fillPoly(mask, [np.round((points - low) * 16).astype(np.int32)], 1, shift=4)
        inverse = np.linalg.inv(pose[:, :2])
        x, y = self.x[rows, cols] - pose[0, 2], self.y[rows, cols] - pose[1, 2]
        u, v = inverse[0, 0] * x + inverse[0, 1] * y, inverse[1, 0] * x + inverse[1, 1] * y
        amount = _pattern(kind, u, v, shape.mean(0))[..., None]
        colour = colours[0] * (1 - amount) + colours[1] * amount
        inside = mask.astype(bool)
        self.image[rows, cols][inside] = colour[inside]
        return rows, cols, inside

    def clutter(self, size: tuple[float, float]) -> None:
        """A textured blob, which is background, also where it hides an object."""
        rng = self.rng
        count = rng.integers(3, 9)
        angle = np.sort(rng.uniform(0, 2 * np.pi, count))
        shape = np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(0.5, 1, (count, 1))
        pose = _pose(rng, self.side, size, turn=np.pi)
        kind = _TEXTURES[rng.integers(len(_TEXTURES))]
        drawn = self.fill(shape, pose, kind, np.stack([_colour(rng), _colour(rng)]))
        if drawn:
            rows, cols, inside = drawn
            self.label[rows, cols][inside] = 0
            self.parts[rows, cols][inside] = 0

    def object(self, name: str, place: tuple[float, float] | None) -> None:
        """One object, part by part."""
        rng = self.rng
        pose = _pose(rng, self.side, (0.32, 0.46), turn=0.35, place=place)
        for part in OBJECTS[name]:
            colours = np.stack([_colour(rng), _colour(rng)])
            if part.texture == "bright":
                colours = np.clip(colours + 60, 0, 255)
            for shape in part.shapes:
                drawn = self.fill(shape, pose, part.texture, colours)
                if drawn:
                    rows, cols, inside = drawn
                    self.label[rows, cols][inside] = LABELS.names.index(name)
                    self.parts[rows, cols][inside] = _PART_NUMBER[f"{name} {part.name}"]


def _pose(rng, side, size, *, turn, place=None) -> np.ndarray:
    """A random similarity with a slight shear: object coordinates → drawing pixels, [2 3]."""
    angle = rng.uniform(-turn, turn)
    scale = rng.uniform(*size) * side
    stretch = np.array([scale * rng.uniform(0.85, 1.15), scale * rng.uniform(0.85, 1.15)])
    flip = np.array([rng.choice([-1.0, 1.0]), 1.0])
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.array([[cos, -sin], [sin, cos]])
    centre = rng.uniform(0.12, 0.88, 2) if place is None else np.array(place)
    return np.concatenate([rotation * (stretch * flip), centre[:, None] * side], 1)


def draw(
    rng: np.random.Generator, names: list[str]
) -> tuple[
    UInt8[np.ndarray, "128 128 3"], UInt8[np.ndarray, "128 128"], UInt8[np.ndarray, "128 128"]
]:
    """A scene with these objects: (RGB image, class labels, part labels).

    Args:
      rng: decides everything else.
      names: objects, back to front.
    """
    canvas = _Canvas(rng)
    ramp = (canvas.x * rng.uniform(-1, 1) + canvas.y * rng.uniform(-1, 1)) / canvas.side
    ramp = np.clip(ramp * 0.5 + 0.5, 0, 1)[..., None]
    canvas.image[:] = _colour(rng) * ramp + _colour(rng) * (1 - ramp)
    for _ in range(rng.integers(4, 10)):
        canvas.clutter((0.05, 0.22))
    side_by_side = rng.permutation([(0.28, 0.3), (0.7, 0.68), (0.72, 0.28), (0.3, 0.7)])
    for name, place in zip(names, side_by_side, strict=False):
        spread = 0.2 if len(names) == 1 else 0.08
        centre = (0.5, 0.5) if len(names) == 1 else place
        canvas.object(name, tuple(np.array(centre) + rng.uniform(-spread, spread, 2)))
    for _ in range(rng.integers(0, 3)):
        canvas.clutter((0.04, 0.1))
    light = rng.uniform(0.65, 1.1) + 0.35 * rng.uniform(-1, 1) * (canvas.x / canvas.side - 0.5)
    image = cv2.resize(canvas.image * light[..., None], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    image += rng.normal(0, rng.uniform(1, 6), image.shape)
    middle = slice(_SCALE // 2, None, _SCALE)
    return (
        np.clip(np.round(image), 0, 255).astype(np.uint8),
        canvas.label[middle, middle].copy(),
        canvas.parts[middle, middle].copy(),
    )
