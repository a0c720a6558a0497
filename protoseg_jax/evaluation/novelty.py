"""Novelty: the distance to the nearest prototype, tested on a class that training never saw."""

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from protoseg_jax.data.labels import VOID
from protoseg_jax.evaluation.measures import Context, Measure, Seen

TITLES = (("novelty_auroc", "novelty AUROC of the held-out class", 100),)


def make(context: Context) -> Measure | None:
    """The `auroc` of the held-out class's points against the rest; None where none is held out, or
    directions explain, which have no distances."""

    def finish(points: tuple[np.ndarray, np.ndarray]) -> dict[str, float | None]:
        distances, labels = points
        known = labels != VOID
        return {"novelty_auroc": auroc(distances[known], labels[known] == context.held_out)}

    # Ranks need every point: there is nothing to sum.
    if context.held_out is None or not context.experiment.trains_prototypes:
        return None
    return Measure(_step, finish, summed=False)


def _step(seen: Seen) -> tuple[Float[Array, "h w"], Int[Array, "h w"]]:
    return seen.output.distances.min(-1), seen.labels


def auroc(scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float | None:
    """Probability that a positive scores higher than a negative, ties half; None without either."""
    count, rest = int(positive.sum()), int((~positive).sum())
    if not (count and rest):
        return None
    _, place, equal = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(equal) - (equal - 1) / 2)[place]  # equals share the mean of their ranks
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * rest))
