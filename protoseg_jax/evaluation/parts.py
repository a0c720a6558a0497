"""What the measures of parts share, where images have part labels: the labels at a map's points,
and the controls that each such measure is printed beside.

A measure of parts says little by itself: whoever knows where on an object a point lies knows
something of its parts. So each is also taken of what knows nothing ("random"), of what knows only
the place ("position") and of what knows the parts ("oracle"); see docs/method.md.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from protoseg_jax.data.labels import VOID
from protoseg_jax.evaluation.measures import Context, Seen
from protoseg_jax.evaluation.overlap import top
from protoseg_jax.images import pad_and_crop
from protoseg_jax.inference import shrink_labels
from protoseg_jax.models.prototypes import class_table

CONTROLS = ("position", "random", "oracle")
GRID = 3  # cells a side of the grid that "position" knows
CELLS = GRID * GRID

SHARE = 5  # a prototype is active on the fifth of its class's points most similar to it
_FEWEST_CENTROIDS = 32  # their numbers are padded to this, or twice it …: few are compiled


class Census(NamedTuple):
    """What a split holds of each part.

    Attributes:
      classes: the class that most of its pixels have; −1 for a part that is nowhere.
      pixels: of that class.
    """

    classes: Int[np.ndarray, " k"]
    pixels: Int[np.ndarray, " k"]


@functools.lru_cache(maxsize=4)
def census(context: Context) -> Census:
    """Of the split; taken once, whatever asks for it."""
    source, num_classes = context.experiment.examples(context.split), context.inference.num_classes
    counts = np.zeros(256 * 256, np.int64)
    for number in range(len(source)):
        example = source[number]
        cells = 256 * example["parts"].astype(np.int64) + example["label"]
        counts += np.bincount(cells.ravel(), minlength=len(counts))
    num_parts = len(context.experiment.data.part_names) - 1  # the first is "no part"
    counts = counts.reshape(256, 256)[1 : num_parts + 1, :num_classes]
    return Census(np.where(counts.any(1), counts.argmax(1), -1), counts.max(1))


def allot(found: Census, prototype_classes: Int[np.ndarray, " m"]) -> Int[np.ndarray, "k n"]:
    """The oracle's prototypes of each part, −1 for a filling: a class's own, by their parts' area.

    Every part gets one as far as they go, the larger first; then each goes to the part with most
    pixels to a prototype. Parts that get none share that of the smallest part that has one.
    """
    num_parts = len(found.classes)
    owned: list[list[int]] = [[] for _ in range(num_parts)]
    for c in np.unique(found.classes[found.classes >= 0]):
        parts = [k for k in np.argsort(-found.pixels, kind="stable") if found.classes[k] == c]
        own = np.flatnonzero(prototype_classes == c).tolist()
        for j in own:
            k = max(parts, key=lambda k: found.pixels[k] / (len(owned[k]) or 1e-9))
            owned[k].append(j)
        last = [owned[k] for k in parts if owned[k]][-1:]
        for k in parts:
            owned[k] = owned[k] or [j for own in last for j in own]
    most = max(map(len, owned), default=0) or 1
    return np.array([own + [-1] * (most - len(own)) for own in owned], np.int64).reshape(-1, most)


def inputs(context: Context) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """What measures of parts add to a batch, whichever of them asks first.

    Gives:
      "parts": uint8 [B H W], part labels on the canvas of the labels;
      "centroids": int32 [B n 3], `centroids_of` them, part −1 for a filling;
      "part_classes": int32 [B K]; "allotted": int32 [B K n], as `allot` gives it.
    """
    examples, size = context.experiment.examples(context.split), context.inference.feature_size
    found = census(context)
    allotted = allot(found, context.inference.classes).astype(np.int32)

    def add(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if "centroids" in batch:
            return {}
        labels, canvas = batch["label"], batch["label"].shape[1:]
        parts, centroids = np.zeros_like(labels, np.uint8), []
        for row, n in enumerate(batch["index"]):
            centroids.append([])
            if n >= 0:
                image = examples[int(n)]["parts"]
                parts[row] = pad_and_crop(image, (0, 0, *canvas), 0)
                centroids[row] = centroids_of(image, size)
        room = _FEWEST_CENTROIDS
        while room < max(map(len, centroids)):
            room *= 2
        filled = [rows + [(-1, 0, 0)] * (room - len(rows)) for rows in centroids]
        return {
            "parts": parts,
            "centroids": np.array(filled, np.int32),
            "part_classes": np.tile(found.classes.astype(np.int32), (len(labels), 1)),
            "allotted": np.tile(allotted, (len(labels), 1, 1)),
        }

    return add


def centroids_of(
    parts: UInt8[np.ndarray, "H W"], feature_size: tuple[int, int]
) -> list[tuple[int, int, int]]:
    """(part, row, col) of the centroid of each connected component of each part, on the map.

    Args:
      parts: numbers from 1; 0 and void are no part. Parts count from 0 in the result.
      feature_size: (h, w).
    """
    found = []
    for number in np.unique(parts[(parts > 0) & (parts != VOID)]).tolist():
        components, _, _, middles = cv2.connectedComponentsWithStats(
            (parts == number).astype(np.uint8)
        )
        for x, y in middles[1:components]:
            row, col = (
                min(int((v + 0.5) * n / size), n - 1)
                for v, n, size in zip((y, x), feature_size, parts.shape, strict=True)
            )
            found.append((number - 1, row, col))
    return found


# -- on the device -----------------------------------------------------------------------------


def own_parts(seen: Seen) -> Int[Array, "h w"]:
    """The part of its own class that each point of the map has, from 0; −1 without one."""
    batch, classes = seen.batch, seen.batch["part_classes"]
    part = shrink_labels(batch["parts"][None], batch["size"][None], seen.labels.shape)[0]
    part = jnp.where((part > 0) & (part <= len(classes)), part - 1, -1)
    return jnp.where(classes[part] == seen.labels, part, -1)  # void is no part's class


def hits(
    similarities: Float[Array, "h w m"],
    seen: Seen,
    prototype_classes: Int[np.ndarray, " m"] | None = None,
) -> Bool[Array, "k m"]:
    """Whether a prototype's active points contain the centroid of a component of a part of its own
    class.

    A prototype is active on the points of its class whose similarity is at or above its (linear)
    80 % quantile over them.

    Args:
      similarities: eq. 1, or what takes its place.
      seen: the image.
      prototype_classes: c(j); by default the model's.
    """
    classes = seen.inference.classes if prototype_classes is None else prototype_classes
    inside = seen.labels[..., None] == jnp.asarray(classes)
    active = jax.vmap(functools.partial(top, share=SHARE), -1, -1)(similarities, inside)
    part, row, col = seen.batch["centroids"].T
    at = active[row, col] & (part >= 0)[:, None]
    of = part[:, None] == jnp.arange(len(seen.batch["part_classes"]))
    own = seen.batch["part_classes"][:, None] == jnp.asarray(classes)
    return (of[:, :, None] & at[:, None]).any(0) & own


def visible(seen: Seen) -> Bool[Array, " k"]:
    """The parts that have a pixel."""
    part = seen.batch["centroids"][:, :1]
    return (part == jnp.arange(len(seen.batch["part_classes"]))).any(0)


def _places(
    labels: Int[Array, "h w"], num_classes: int
) -> list[tuple[Int[Array, "*hw c"], Int[Array, " c"]]]:
    """Down and across, (p, n) of each class: its box is n points long, and a point lies at p / 2n
    in it, in cells of the grid. Integers, so that mirrored places are exactly alike."""
    own = labels[..., None] == jnp.arange(num_classes)
    found = []
    for axis in (0, 1):
        there = own.any(1 - axis)  # [h c], then [w c]
        size = len(there)
        low, high = there.argmax(0), size - there[::-1].argmax(0)  # half-open
        place = GRID * (2 * (jnp.arange(size)[:, None] - low) + 1)
        found.append((jnp.expand_dims(place, 1 - axis), high - low))
    return found


def cells(seen: Seen) -> Int[Array, "h w"]:
    """The cell of the grid over its class's box that each point lies in; any at void points."""
    count = seen.inference.num_classes
    row, col = (jnp.clip(p // (2 * n), 0, GRID - 1) for p, n in _places(seen.labels, count))
    at = jnp.minimum(seen.labels, count - 1)[..., None]
    return jnp.take_along_axis(GRID * row + col, at, -1)[..., 0]


def nearness(seen: Seen) -> Float[Array, "h w n"]:
    """What a prototype is that knows the place alone: to each class and cell, minus the squared
    distance of a point to the middle of the cell, in cells; classes ascending, `CELLS` each."""
    down, across = (
        jnp.abs(p[..., None] - n[:, None] * (2 * middle + 1)) / (2 * n[:, None])
        for (p, n), middle in zip(
            _places(seen.labels, seen.inference.num_classes),
            np.divmod(np.arange(CELLS), GRID),
            strict=True,
        )
    )
    near = -(jnp.square(down) + jnp.square(across))
    return near.reshape(*seen.labels.shape, -1)


def random_prototypes(seen: Seen, key: Array) -> Int[Array, "h w"]:
    """Any prototype of its class for each point; −1 where the class has none."""
    table = class_table(seen.inference.classes, seen.inference.num_classes)
    rows = jnp.asarray(table)[jnp.minimum(seen.labels, len(table) - 1)]
    return _any_of(rows, key)


def oracle_prototypes(seen: Seen, part: Int[Array, "h w"], key: Array) -> Int[Array, "h w"]:
    """Any prototype of those allotted to its part for each point; some at points without one."""
    return _any_of(seen.batch["allotted"][part], key)


def _any_of(rows: Int[Array, "h w n"], key: Array) -> Int[Array, "h w"]:
    """One of the entries ≥ 0, which come first, at random."""
    count = (rows >= 0).sum(-1)
    drawn = jnp.floor(jax.random.uniform(key, rows.shape[:2]) * count).astype(jnp.int32)
    return jnp.take_along_axis(rows, jnp.minimum(drawn, count - 1)[..., None] % rows.shape[-1], -1)[
        ..., 0
    ]
