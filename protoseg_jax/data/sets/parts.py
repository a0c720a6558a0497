"""`parts`: the embedded data set. Generated from a seed, needs no files; has a part label a pixel.

Background and five classes of objects, each of four named parts, in cluttered scenes of 128 × 128.
Parts never enter training: they are there to ask whether a prototype found one.

Every object is drawn from its parts, back to front, as polygons in the object's own coordinates
(about [−1, 1]², y down), each filled with its own kind of texture. Pose, size, colours, lighting,
occlusion and clutter are random. Objects and clutter draw their colours from one distribution, so
that colour alone cannot tell classes apart: shape and texture must.
"""

from collections.abc import Callable, Mapping

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
_SIDE = SIZE * _SCALE


def _box(x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _disc(x: float, y: float, rx: float, ry: float | None = None) -> np.ndarray:
    t = np.arange(28) * 2 * np.pi / 28
    return np.stack([x + rx * np.cos(t), y + (ry or rx) * np.sin(t)], 1)


def _petal(t: float) -> np.ndarray:
    rotation = np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])
    return _disc(0, -0.42, 0.21, 0.32) @ rotation.T + (0, -0.35)


_BODY = [(-1, 0.35), (-1, 0), (-0.6, -0.08), (-0.35, -0.48), (0.4, -0.48), (0.62, -0.05)]
# By class and part: the kind of its texture, and its polygons.
OBJECTS = {
    "car": {
        "body": ("plain", [*_BODY, (1, 0.05), (1, 0.35)]),
        "windows": (
            "gradient",
            [(-0.47, -0.06), (-0.28, -0.39), (-0.02, -0.39), (-0.02, -0.06)],
            [(0.06, -0.06), (0.06, -0.39), (0.34, -0.39), (0.48, -0.06)],
        ),
        "wheels": ("rings", _disc(-0.55, 0.37, 0.25), _disc(0.58, 0.37, 0.25)),
        "lights": ("bright", _box(0.8, 0.07, 1.02, 0.2), _box(-1.02, 0.05, -0.84, 0.18)),
    },
    "house": {
        "wall": ("bricks", _box(-0.7, -0.1, 0.7, 0.85)),
        "roof": ("stripes", [(-0.95, -0.1), (0, -0.9), (0.95, -0.1)]),
        "door": ("plain", _box(-0.17, 0.3, 0.17, 0.85)),
        "panes": ("cross", _box(-0.55, 0.1, -0.27, 0.4), _box(0.27, 0.1, 0.55, 0.4)),
    },
    "fish": {
        "tail": ("stripes", [(-0.4, 0), (-1.05, -0.55), (-0.85, 0), (-1.05, 0.55)]),
        "fins": (
            "fan",
            [(-0.3, -0.3), (0.1, -0.75), (0.35, -0.3)],
            [(-0.1, 0.3), (0.0, 0.68), (0.3, 0.3)],
        ),
        "scales": ("dots", _disc(0.08, 0, 0.74, 0.46)),
        "eye": ("rings", _disc(0.5, -0.1, 0.13)),
    },
    "flower": {
        "stem": ("plain", _box(-0.1, -0.3, 0.1, 1.0)),
        "leaves": (
            "stripes",
            [(0, 0.85), (0.2, 0.4), (0.75, 0.28), (0.5, 0.75)],
            [(0, 0.9), (-0.2, 0.45), (-0.75, 0.35), (-0.5, 0.82)],
        ),
        "petals": ("gradient", *map(_petal, np.arange(6) * 2 * np.pi / 6)),
        "centre": ("dots", _disc(0, -0.35, 0.22)),
    },
    "boat": {
        "mast": ("bright", _box(-0.05, -0.98, 0.05, 0.35)),
        "sails": (
            "plain",
            [(0.04, -0.95), (0.85, 0.26), (0.04, 0.26)],
            [(-0.04, -0.72), (-0.04, 0.26), (-0.62, 0.26)],
        ),
        "flag": ("cross", [(-0.05, -0.98), (-0.42, -0.86), (-0.05, -0.74)]),
        "hull": ("planks", [(-0.95, 0.25), (0.95, 0.25), (0.6, 0.75), (-0.6, 0.75)]),
    },
}
LABELS = generic(("background", *OBJECTS))
PART_NAMES = ("none", *(f"{name} {part}" for name, parts in OBJECTS.items() for part in parts))
_CLASS_OF_PART = np.array(
    [0, *(c for c, parts in enumerate(OBJECTS.values(), 1) for _ in parts)], np.uint8
)

# How far a pixel is from the first towards the second colour: by its place (u, v) in the object,
# and (x, y) from the polygon's centre.
_TEXTURES: dict[str, Callable[..., np.ndarray]] = {
    "plain": lambda u, v, x, y: np.zeros_like(u),
    "gradient": lambda u, v, x, y: np.clip(0.5 + 1.2 * y, 0, 1),
    "stripes": lambda u, v, x, y: np.sin(26 * (u + 0.4 * v)) > 0,
    "dots": lambda u, v, x, y: np.sin(24 * u) * np.sin(24 * v) > 0.3,
    "bricks": lambda u, v, x, y: (
        (v % 0.13 < 0.035) | ((u + 0.11 * (np.floor(v / 0.13) % 2)) % 0.26 < 0.035)
    ),
    "cross": lambda u, v, x, y: (np.abs(x) < 0.035) | (np.abs(y) < 0.035),
    "rings": lambda u, v, x, y: np.sin(34 * np.hypot(np.abs(x) % 10, y)) > 0,
    "planks": lambda u, v, x, y: np.sin(30 * v) > 0.55,
    "fan": lambda u, v, x, y: np.sin(14 * np.arctan2(y + 0.3, x)) > 0,
}
_CLUTTER = tuple(_TEXTURES)  # textures of what hides and surrounds objects
_TEXTURES["bright"] = _TEXTURES["plain"]


def open(config: ml_collections.ConfigDict, sizes: Mapping[str, int] = SIZES) -> prepare.DataSet:
    """The scenes of each split, which has its own stream, by `seed`; `sizes`: images a split."""
    streams = {split: stream for stream, split in enumerate(sizes)}

    def example(split: str, number: int) -> prepare.Example:
        image, label, parts = scene(config.seed, streams[split], number)
        return prepare.Example(f"{split}_{number:04d}", images.encode(image), label, parts)

    splits = {split: range(count) for split, count in sizes.items()}
    source = [_VERSION, config.seed, dict(sizes)]
    return prepare.DataSet("parts", LABELS, splits, example, source, PART_NAMES)


def scene(
    seed: int, stream: int, number: int
) -> tuple[
    UInt8[np.ndarray, "128 128 3"], UInt8[np.ndarray, "128 128"], UInt8[np.ndarray, "128 128"]
]:
    """Image `number` of a stream, of one or two objects: (RGB image, class labels, part labels)."""
    rng = np.random.default_rng([seed, stream, number])
    names = list(OBJECTS)
    # The first object goes round the classes, so that no class is ever rare.
    first = names.pop(number % len(names))
    others = rng.permutation(names)[: rng.integers(0, 2)].tolist()
    names = rng.permutation([first, *others]).tolist()
    canvas = _Canvas(rng)
    for _ in range(rng.integers(4, 10)):
        canvas.clutter((0.05, 0.22))
    side_by_side = rng.permutation([(0.28, 0.3), (0.7, 0.68), (0.72, 0.28), (0.3, 0.7)])
    alone = len(names) == 1
    spread, centres = (0.2, [(0.5, 0.5)]) if alone else (0.08, side_by_side)
    for name, centre in zip(names, centres, strict=False):
        canvas.object(name, np.array(centre) + rng.uniform(-spread, spread, 2))
    for _ in range(rng.integers(0, 3)):
        canvas.clutter((0.04, 0.1))
    light = rng.uniform(0.65, 1.1) + 0.35 * rng.uniform(-1, 1) * (canvas.x / _SIDE - 0.5)
    image = cv2.resize(canvas.image * light[..., None], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    image += rng.normal(0, rng.uniform(1, 6), image.shape)
    parts = canvas.parts[_SCALE // 2 :: _SCALE, _SCALE // 2 :: _SCALE].copy()
    image = np.clip(np.round(image), 0, 255).astype(np.uint8)
    return image, _CLASS_OF_PART[parts], parts


class _Canvas:
    """Picture and parts of a scene in the making, at drawing resolution."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.y, self.x = np.mgrid[:_SIDE, :_SIDE].astype(np.float32)
        self.parts = np.zeros((_SIDE, _SIDE), np.uint8)
        ramp = (self.x * rng.uniform(-1, 1) + self.y * rng.uniform(-1, 1)) / _SIDE
        ramp = np.clip(ramp * 0.5 + 0.5, 0, 1)[..., None]
        self.image = np.empty((_SIDE, _SIDE, 3), np.float32)
        self.image[:] = self.colour() * ramp + self.colour() * (1 - ramp)

    def colour(self) -> np.ndarray:
        return self.rng.uniform(25, 235, 3)

    def clutter(self, size: tuple[float, float]) -> None:
        """A textured blob, which is background, also where it hides an object."""
        count = self.rng.integers(3, 9)
        angle = np.sort(self.rng.uniform(0, 2 * np.pi, count))
        shape = np.stack([np.cos(angle), np.sin(angle)], 1) * self.rng.uniform(0.5, 1, (count, 1))
        pose = self.pose(size, np.pi)
        texture = _CLUTTER[self.rng.integers(len(_CLUTTER))]
        self.fill(shape, pose, texture, np.stack([self.colour(), self.colour()]), 0)

    def object(self, name: str, centre: np.ndarray) -> None:
        """One object, part by part."""
        pose = self.pose((0.32, 0.46), 0.35, centre)
        for part, (texture, *shapes) in OBJECTS[name].items():
            colours = np.stack([self.colour(), self.colour()])
            if texture == "bright":
                colours = np.clip(colours + 60, 0, 255)
            for shape in shapes:
                number = PART_NAMES.index(f"{name} {part}")
                self.fill(np.array(shape), pose, texture, colours, number)

    def pose(
        self, size: tuple[float, float], turn: float, centre: np.ndarray | None = None
    ) -> Float[np.ndarray, "2 3"]:
        """A random similarity with a slight shear: object coordinates → drawing pixels."""
        angle = self.rng.uniform(-turn, turn)
        scale = self.rng.uniform(*size) * _SIDE
        stretch = scale * self.rng.uniform(0.85, 1.15, 2)
        flip = np.array([self.rng.choice([-1.0, 1.0]), 1.0])
        cos, sin = np.cos(angle), np.sin(angle)
        rotation = np.array([[cos, -sin], [sin, cos]])
        centre = self.rng.uniform(0.12, 0.88, 2) if centre is None else centre
        return np.concatenate([rotation * (stretch * flip), centre[:, None] * _SIDE], 1)

    def fill(
        self,
        shape: Float[np.ndarray, "n 2"],
        pose: Float[np.ndarray, "2 3"],
        texture: str,
        colours: Float[np.ndarray, "2 3"],
        part: int,
    ) -> None:
        """Draw one polygon given in object coordinates, where it is visible, as a part."""
        points = shape @ pose[:, :2].T + pose[:, 2]
        low = np.maximum(np.floor(points.min(0)).astype(int), 0)
        high = np.minimum(np.ceil(points.max(0)).astype(int) + 1, _SIDE)
        if (high <= low).any():
            return
        window = slice(low[1], high[1]), slice(low[0], high[0])
        mask = np.zeros((high - low)[::-1], np.uint8)
        cv2.fillPoly(mask, [np.round((points - low) * 16).astype(np.int32)], 1, shift=4)
        inverse = np.linalg.inv(pose[:, :2])
        x, y = self.x[window] - pose[0, 2], self.y[window] - pose[1, 2]
        u, v = inverse[0, 0] * x + inverse[0, 1] * y, inverse[1, 0] * x + inverse[1, 1] * y
        centre = shape.mean(0)
        amount = _TEXTURES[texture](u, v, u - centre[0], v - centre[1])[..., None].astype(float)
        colour = colours[0] * (1 - amount) + colours[1] * amount
        inside = mask.astype(bool)
        self.image[window][inside] = colour[inside]
        self.parts[window][inside] = part
