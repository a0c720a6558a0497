"""Pruning (section 3.2, the algorithm of ProtoPNet): drop prototypes that are not class-specific.

A prototype stays if at least 3 of its k = 6 nearest training patches — at most one an image, over
all non-void points — are of its class. A patch's class is Y_Z, as in projection (the released code
counts a patch as c if *any* of its pixels is). Where fewer than 6 images hold patches, at least
half of the patches found must be of the class. The last prototype of a class is kept.
"""

import numpy as np

from protoseg_jax.prototypes.patch_search import Patches

NEIGHBOURS = 6
THRESHOLD = 3


def prune(patches: Patches, prototype_classes: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Positions of the prototypes that stay.

    Args:
      patches: the search's result, k = 6 over all classes.
      prototype_classes: [M].

    Returns:
      (keep [M'] ascending, classes whose last prototype was kept although it would have been
      pruned; of several, the one with most patches of its class stays, the lowest index of equals).
    """
    found = np.isfinite(patches.squared_distance)
    own = ((patches.label == prototype_classes[:, None]) & found).sum(axis=1)
    total = found.sum(axis=1)
    enough = np.where(total < NEIGHBOURS, 2 * own >= total, own >= THRESHOLD)
    saved = []
    for c in np.unique(prototype_classes):
        members = np.flatnonzero(prototype_classes == c)
        if not enough[members].any():
            enough[members[np.argmax(own[members])]] = True
            saved.append(int(c))
    return np.flatnonzero(enough), saved
