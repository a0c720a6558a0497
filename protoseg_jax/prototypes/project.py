"""Projection (section 3.2): every prototype becomes the nearest training patch of its class.

Candidates for class c are the points with Y_Z = c of the non-augmented training split at evaluation
preprocessing (the released code takes cells with *any* pixel of the class, at the images' native
size). Prototypes of a class that land on the same patch are duplicates: the lowest index stays (the
released code compares vectors, also across classes).
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Float, Int

from protoseg_jax.data import tiles
from protoseg_jax.inference import cell_box
from protoseg_jax.progress import say
from protoseg_jax.prototypes import search
from protoseg_jax.prototypes.search import Patches
from protoseg_jax.run.checkpoints import Checkpoint
from protoseg_jax.run.live import Clock, Live
from protoseg_jax.run.prototypes import Prototype, classes_of

PHASE = "projection"


def without_duplicates(
    patches: Patches, classes: Int[np.ndarray, " m"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n d"]]:
    """(positions of the prototypes that stay, ascending; their new vectors).

    Args:
      patches: the search's result, k = 1 within class.
      classes: c(j).

    Raises:
      ValueError: a prototype without a patch.
    """
    if not np.isfinite(patches.squared_distance).all():
        raise ValueError("a prototype has no candidate patch")
    seen, keep = set(), []
    for j, c in enumerate(classes):
        place = (int(c), *(int(x[j, 0]) for x in (patches.image, patches.row, patches.col)))
        if place not in seen:
            seen.add(place)
            keep.append(j)
    return np.array(keep), patches.feature[keep, 0]


def run(live: Live, start: Checkpoint) -> Checkpoint:
    """The phase: replace prototypes by their nearest patches; drop duplicates.

    A class that has pixels but no point in Y_Z falls back to cells that contain any of its pixels,
    with a warning.
    """
    clock, classes = Clock(start, PHASE), classes_of(start.prototypes)
    experiment = live.experiment
    patches = search.resumable(live, start, clock, search.of_own_class(classes), k=1)
    inference = experiment.inference(start.prototypes)
    for c in np.unique(classes[~np.isfinite(patches.squared_distance[:, 0])]).tolist():
        say(
            f"warning: class {experiment.labels.names[c]!r} has pixels but no point on the "
            "feature map; its prototypes are projected onto cells that contain any of its pixels"
        )
        table = search.empty(len(classes), 1, experiment.config.model.features)
        rule = search.of_cells_with(c)
        found = search.search(experiment, inference, start.variables, rule, table, PHASE)
        own = classes == c
        patches = jax.tree.map(
            lambda a, b, own=own: np.where(own.reshape(-1, *[1] * (a.ndim - 1)), b, a),
            patches,
            found,
        )
    keep, vectors = without_duplicates(patches, classes)
    kept = start.keep(keep)
    kept.arrays["params"]["prototypes"] = {"vectors": vectors}
    examples = experiment.examples(experiment.config.data.projection_split)
    prototypes = [
        placed(p, patches, j, examples, inference.feature_size)
        for p, j in zip(kept.prototypes, keep.tolist(), strict=True)
    ]
    say(
        f"projection: {len(classes)} prototypes became patches, {len(classes) - len(keep)} "
        "duplicates dropped"
    )
    return clock.checkpoint(1, kept.arrays, prototypes, finished=True)


def placed(
    prototype: Prototype, patches: Patches, j: int, examples, feature_size: tuple[int, int]
) -> Prototype:
    """The prototype with the place of row j's first patch."""
    number, row, col = (int(x[j, 0]) for x in (patches.image, patches.row, patches.col))
    example = examples[number]
    tiled = isinstance(examples, tiles.Tiled)
    return dataclasses.replace(
        prototype,
        image=number,
        row=row,
        col=col,
        squared_distance=float(patches.squared_distance[j, 0]),
        image_id=example["image_id"],
        box=cell_box(row, col, feature_size, example["image"].shape[:2]),
        tile=list(examples.places[number].corner) if tiled else None,
    )
