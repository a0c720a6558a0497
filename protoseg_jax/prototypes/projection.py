"""Projection (section 3.2): every prototype becomes the nearest training patch of its class.

Candidates for class c are the points with Y_Z = c of the non-augmented training split at evaluation
preprocessing (the released code takes cells with *any* pixel of the class, at the images' native
size). Prototypes of a class that land on the same patch are duplicates: the lowest index stays (the
released code compares vectors, also across classes).
"""

import dataclasses
from typing import Any

import numpy as np

from protoseg_jax.prototypes.patch_search import Patches


@dataclasses.dataclass(frozen=True)
class Projection:
    """What projection does to the prototypes.

    Attributes:
      keep: [M'] positions of the prototypes that stay, ascending.
      vectors: [M', D] their new vectors.
      sources: one dict a kept prototype: "image" (example number), "row", "col",
        "squared_distance" (of the learnt vector to its patch).
    """

    keep: np.ndarray
    vectors: np.ndarray
    sources: list[dict[str, Any]]


def project(patches: Patches, prototype_classes: np.ndarray) -> Projection:
    """Replace prototypes by their nearest patches and drop duplicates.

    Args:
      patches: the search's result, k = 1 within class; every prototype must have one.
      prototype_classes: [M].

    Raises:
      ValueError: a prototype without a patch.
    """
    if not np.isfinite(patches.squared_distance).all():
        raise ValueError("a prototype has no candidate patch")
    seen, keep = set(), []
    for j, c in enumerate(prototype_classes):
        place = (int(c), *(int(x[j, 0]) for x in (patches.image, patches.row, patches.col)))
        if place not in seen:
            seen.add(place)
            keep.append(j)
    sources = [
        {
            "image": int(patches.image[j, 0]),
            "row": int(patches.row[j, 0]),
            "col": int(patches.col[j, 0]),
            "squared_distance": float(patches.squared_distance[j, 0]),
        }
        for j in keep
    ]
    keep = np.array(keep)
    return Projection(keep, patches.feature[keep, 0], sources)
