"""Consistency and stability (Huang et al. 2023), where images have part labels: whether a prototype
stands for a part, and still does when noise is added."""

import functools
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from protoseg_jax.data.labels import VOID
from protoseg_jax.evaluation.measures import Context, Measure, Seen, absent
from protoseg_jax.evaluation.overlap import top

TITLES = (("consistency", "consistency", 100), ("stability", "stability", 100))

SHARE = 5  # a prototype is active on the fifth of its class's points most similar to it
CONSISTENT = 0.8  # of the images a part is visible in
NOISE = 0.2  # σ on the normalised image

_CENTROIDS_STEP = 32  # numbers of centroids are padded to multiples of this: few are compiled


def make(context: Context) -> Measure:
    """`figures` of how often each prototype hits each part over a split."""
    inference, parts = context.inference, context.experiment.data.part_names
    if not parts:
        return absent("consistency", "stability")
    examples = context.experiment.examples(context.split)
    of_class = part_classes(examples, len(parts), inference.num_classes)

    def inputs(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = [
            centroids_of(examples[int(n)]["parts"], inference.feature_size) if n >= 0 else []
            for n in batch["index"]
        ]
        room = max(-(-max(map(len, found)) // _CENTROIDS_STEP), 1) * _CENTROIDS_STEP
        filled = [rows + [(-1, 0, 0)] * (room - len(rows)) for rows in found]
        classes = np.tile(of_class.astype(np.int32), (len(found), 1))
        return {"centroids": np.array(filled, np.int32), "part_classes": classes}

    return Measure(_step, lambda sums: figures(sums, inference.classes, of_class), inputs=inputs)


def _step(seen: Seen) -> dict[str, Array]:
    """What `figures` wants of one image."""
    inference, labels, classes = seen.inference, seen.labels, seen.inference.classes
    centroids, part_classes = seen.batch["centroids"], seen.batch["part_classes"]
    num_parts = len(part_classes)
    normalised = inference.preprocessing.normalise(seen.batch["image"][None])
    noise = jax.random.normal(jax.random.split(seen.key, 3)[2], normalised.shape)
    noisy = inference.model.apply(seen.variables, normalised + NOISE * noise)
    hits, noisy_hits = (
        part_hits(similarities, labels, classes, centroids, num_parts)
        for similarities in (seen.output.similarities, noisy.similarities[0])
    )
    visible = (centroids[:, :1] == jnp.arange(num_parts)).any(0)
    # Elsewhere a prototype could hit nothing, with noise or without.
    own = (labels[..., None] == classes).any((0, 1))
    own &= ((part_classes[:, None] == classes) & visible[:, None]).any(0)
    unchanged = ((hits == noisy_hits).all(0) & own).sum()
    return {"hits": hits, "visible": visible, "unchanged": unchanged, "pairs": own.sum()}


def part_hits(
    similarities: Float[Array, "h w m"],
    labels: Int[Array, "h w"],
    prototype_classes: Int[np.ndarray, " m"],
    centroids: Int[Array, "n 3"],
    num_parts: int,
) -> Bool[Array, "k m"]:
    """Whether a prototype's active points contain the centroid of a component of a part.

    A prototype is active on the points of its class whose similarity is at or above its (linear)
    80 % quantile over them.

    Args:
      similarities: eq. 1.
      labels: Y_Z.
      prototype_classes: c(j).
      centroids: (part, row, col) on the feature map; part −1 for a filling.
      num_parts: K.
    """
    own = labels[..., None] == jnp.asarray(prototype_classes)
    active = jax.vmap(functools.partial(top, share=SHARE), -1, -1)(similarities, own)
    part, row, col = centroids.T
    at = active[row, col] & (part >= 0)[:, None]
    of = part[:, None] == jnp.arange(num_parts)
    return (of[:, :, None] & at[:, None]).any(0)


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


def part_classes(source: Any, num_parts: int, num_classes: int) -> Int[np.ndarray, " k"]:
    """The class that most pixels of each part have, over all examples ("label", "parts"); −1 for a
    part that is nowhere."""
    counts = np.zeros(256 * 256, np.int64)
    for number in range(len(source)):
        example = source[number]
        cells = 256 * example["parts"].astype(np.int64) + example["label"]
        counts += np.bincount(cells.ravel(), minlength=len(counts))
    counts = counts.reshape(256, 256)[1 : num_parts + 1, :num_classes]
    return np.where(counts.any(1), counts.argmax(1), -1)


def figures(
    sums: dict[str, np.ndarray], prototype_classes: np.ndarray, part_classes: np.ndarray
) -> dict[str, float | None]:
    """Over the prototypes of classes with parts; None without any.

    Args:
      sums: images in which a prototype hit a part ("hits" [k m]) and in which a part is visible
        ("visible" [k]); (prototype, image) pairs ("pairs") and those whose hits are the same under
        noise ("unchanged").
      prototype_classes: c(j), [M].
      part_classes: the class of each part, [K].

    Returns:
      "consistency": the share of prototypes that hit a part in more than 80 % of the images where
      it is visible; "stability": the share of pairs unchanged.
    """
    judged, pairs = np.isin(prototype_classes, part_classes), sums["pairs"]
    if not judged.any():
        return {"consistency": None, "stability": None}
    # A part of another class is never hit, for only points of a prototype's own are active.
    often = sums["hits"] > CONSISTENT * sums["visible"][:, None]
    consistent = (often & (sums["visible"] > 0)[:, None]).any(0)
    return {
        "consistency": float(consistent[judged].mean()),
        "stability": float(sums["unchanged"] / pairs) if pairs else None,
    }
