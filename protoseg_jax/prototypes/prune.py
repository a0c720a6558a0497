"""Pruning (section 3.2, the algorithm of ProtoPNet): drop prototypes that are not class-specific.

A prototype stays if at least 3 of its k = 6 nearest training patches — at most one an image, over
all non-void points — are of its class. A patch's class is Y_Z, as in projection (the released code
counts a patch as c if *any* of its pixels is). Where fewer than 6 images hold patches, at least
half of the patches found must be of the class. The last prototype of a class is kept.
"""

import numpy as np
from jaxtyping import Int

from protoseg_jax.progress import say
from protoseg_jax.prototypes import search
from protoseg_jax.prototypes.search import Patches
from protoseg_jax.run.checkpoints import Checkpoint
from protoseg_jax.run.live import Clock, Live
from protoseg_jax.run.prototypes import classes_of

PHASE = "pruning"
NEIGHBOURS = 6
THRESHOLD = 3


def prune(
    patches: Patches, classes: Int[np.ndarray, " m"]
) -> tuple[Int[np.ndarray, " n"], list[int]]:
    """Positions of the prototypes that stay.

    Args:
      patches: the search's result, k = 6 over all classes.
      classes: c(j).

    Returns:
      (positions that stay, ascending; classes whose last prototype was kept although it would have
      been pruned: of several, the one with most patches of its class, the lowest index of equals).
    """
    found = np.isfinite(patches.squared_distance)
    own = ((patches.label == classes[:, None]) & found).sum(axis=1)
    total = found.sum(axis=1)
    enough = np.where(total < NEIGHBOURS, 2 * own >= total, own >= THRESHOLD)
    saved = []
    for c in np.unique(classes):
        members = np.flatnonzero(classes == c)
        if not enough[members].any():
            enough[members[np.argmax(own[members])]] = True
            saved.append(int(c))
    return np.flatnonzero(enough), saved


def run(live: Live, start: Checkpoint) -> Checkpoint:
    """The phase: drop prototypes whose nearest patches are not of their class."""
    clock = Clock(start, PHASE)
    patches = search.resumable(live, start, clock, search.of_any_class, k=NEIGHBOURS)
    keep, saved = prune(patches, classes_of(start.prototypes))
    kept = start.keep(keep)
    for c in saved:
        say(
            f"warning: pruning would have dropped every prototype of class "
            f"{live.experiment.labels.names[c]!r}; its best one is kept"
        )
    say(f"pruning: {len(keep)} of {len(start.prototypes)} prototypes stay")
    return clock.checkpoint(1, kept.arrays, kept.prototypes, finished=True)
