"""Consistency (Huang et al. 2023): whether a prototype activates at the same part of its class in
every image, and how far knowing the place alone gets one in that.

By itself it misleads, in both directions: what only knows the place on an object scores high, and
a perfect detector of a ring-shaped or concave part scores 0, its centroid being off the part. It
stands here to compare with the literature; `part_agreement` decides.
"""

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from protoseg_jax.evaluation import parts
from protoseg_jax.evaluation.measures import Context, Measure, Seen, absent

TITLES = (
    ("consistency", "consistency", 100),  # never without its controls
    *((f"consistency_{name}", f"consistency: {name}", 100) for name in parts.CONTROLS),
)

CONSISTENT = 0.8  # of the images a part is visible in


def make(context: Context) -> Measure:
    """`figures` of how often each prototype, and each of the controls', hits each part."""
    if not context.experiment.data.part_names:
        return absent(*(key for key, *_ in TITLES))
    found, classes = parts.census(context), context.inference.classes
    owners = parts.allot(found, classes)

    def finish(sums: dict[str, np.ndarray]) -> dict[str, float | None]:
        return figures(sums, found.classes, classes, context.inference.num_classes, owners)

    return Measure(_step, finish, inputs=parts.inputs(context))


def _step(seen: Seen) -> dict[str, Array]:
    """Hits of one image: [k m], by position [k C·9], at random [k m], by the oracle [k]."""
    noise = jax.random.uniform(jax.random.fold_in(seen.key, 3), seen.output.similarities.shape)
    of_cells = np.repeat(np.arange(seen.inference.num_classes), parts.CELLS)
    part, (number, row, col) = parts.own_parts(seen), seen.batch["centroids"].T
    on_part = (number >= 0) & (part[row, col] == number)
    of = number[:, None] == np.arange(len(seen.batch["part_classes"]))
    return {
        "hits": parts.hits(seen.output.similarities, seen),
        "position": parts.hits(parts.nearness(seen), seen, of_cells),
        "random": parts.hits(noise, seen),
        "oracle": (of & on_part[:, None]).any(0),
        "visible": parts.visible(seen),
    }


def figures(
    sums: dict[str, np.ndarray],
    part_classes: Int[np.ndarray, " k"],
    prototype_classes: Int[np.ndarray, " m"],
    num_classes: int,
    owners: Int[np.ndarray, "k n"],
) -> dict[str, float | None]:
    """The share of prototypes, of classes with parts, that hit some part of their class in more
    than 80 % of the images where it is visible; the same of each control; None without any.

    Args:
      sums: images in which there was a hit, as `_step` has them, and in which a part is "visible".
      part_classes: the class of each part.
      prototype_classes: c(j).
      num_classes: C.
      owners: the prototypes that the oracle allots to each part (`parts.allot`).
    """

    def share(hit: np.ndarray, classes: np.ndarray) -> float | None:
        judged = np.isin(classes, part_classes[part_classes >= 0])
        return float(_often(hit, sums["visible"]).any(0)[judged].mean()) if judged.any() else None

    # What the oracle allots to a part is active on all of it, and hits it or misses it alike.
    of_part = _often(sums["oracle"][:, None], sums["visible"])[:, 0]
    hit = {j for k in np.flatnonzero(of_part) for j in owners[k] if j >= 0}
    allotted = np.unique(owners[owners >= 0])
    return {
        "consistency": share(sums["hits"], prototype_classes),
        "consistency_position": share(
            sums["position"], np.repeat(np.arange(num_classes), parts.CELLS)
        ),
        "consistency_random": share(sums["random"], prototype_classes),
        "consistency_oracle": len(hit) / len(allotted) if len(allotted) else None,
    }


def _often(hits: Int[np.ndarray, "k n"], visible: Int[np.ndarray, " k"]) -> Bool[np.ndarray, "k n"]:
    return (hits > CONSISTENT * visible[:, None]) & (visible > 0)[:, None]
