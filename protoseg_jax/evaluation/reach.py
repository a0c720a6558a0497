"""Reach: in how many of the images that contain its class a prototype has something to say.

A prototype that knows its own patch alone has a reach near 0.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from protoseg_jax.evaluation.measures import Context, Measure, Seen
from protoseg_jax.evaluation.utilisation import wins

TITLES = (
    ("reach.mean", "reach, mean", 100),
    ("reach.lower_quartile", "reach, lower quartile", 100),
    ("reach.median", "reach, median", 100),
    ("reach.upper_quartile", "reach, upper quartile", 100),
)

_ONE_IN = 20  # points of its class in an image that a prototype must win


def make(context: Context) -> Measure:
    """`figures` over a split."""
    return Measure(_step, lambda sums: figures(sums, context.inference.classes))


def _step(seen: Seen) -> dict[str, Array]:
    """Whether each prototype reaches the image, and each class is in it."""
    classes = seen.inference.classes
    own = seen.labels[..., None] == jnp.arange(seen.inference.num_classes)
    points = own.sum((0, 1))
    won = wins(seen.output.similarities, seen.labels, classes)
    reached = (won > 0) & (_ONE_IN * won >= points[classes])
    return {"reached": reached.astype(jnp.int32), "present": (points > 0).astype(jnp.int32)}


def figures(
    sums: dict[str, Int[np.ndarray, "..."]], prototype_classes: Int[np.ndarray, " m"]
) -> dict[str, Any]:
    """Of the images that contain its class, the share in which a prototype is the most similar of
    its class at 5 % or more of the class's points: of each ("prototypes", None where the class is
    in no image), their mean and quartiles ("reach"; None without any)."""
    present = sums["present"][prototype_classes]
    seen = (present > 0) & (prototype_classes >= 0)  # the bias of directions has no class
    shares = sums["reached"] / np.maximum(present, 1)
    each = [float(x) if there else None for x, there in zip(shares, seen, strict=True)]
    names = ("mean", "lower_quartile", "median", "upper_quartile")
    values = dict.fromkeys(names)
    if seen.any():
        known = shares[seen]
        quartiles = np.quantile(known, (0.25, 0.5, 0.75))
        values = dict(zip(names, map(float, (known.mean(), *quartiles)), strict=True))
    return {"reach": {**values, "prototypes": each}}
