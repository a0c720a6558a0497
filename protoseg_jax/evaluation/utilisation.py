"""Utilisation (Fig. 5): which prototype of its own class each point is most similar to."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from protoseg_jax.evaluation.measures import Context, Measure, Seen

TITLES = (("utilisation", "utilisation", 100), ("unused", "prototypes that win no point", 1))


def make(context: Context) -> Measure:
    """`figures` of the `wins` over a split."""
    return Measure(_step, lambda found: figures(found, context.inference.classes))


def _step(seen: Seen) -> Int[Array, " m"]:
    return wins(seen.output.similarities, seen.labels, seen.inference.classes)


def wins(
    similarities: Float[Array, "h w m"],
    labels: Int[Array, "h w"],
    prototype_classes: Int[np.ndarray, " m"],
) -> Int[Array, " m"]:
    """Points of each prototype's class at which it is the most similar of them."""
    winners = most_similar(similarities, labels, prototype_classes)
    return jnp.zeros(similarities.shape[-1] + 1, jnp.int32).at[winners.reshape(-1)].add(1)[:-1]


def most_similar(
    similarities: Float[Array, "h w m"],
    labels: Int[Array, "h w"],
    prototype_classes: Int[np.ndarray, " m"],
) -> Int[Array, "h w"]:
    """Of each point's true class the prototype that is most similar, the first of equals; M where
    the class has none."""
    own = labels[..., None] == jnp.asarray(prototype_classes)
    best = jnp.where(own, similarities, -jnp.inf).argmax(-1)
    return jnp.where(own.any(-1), best, similarities.shape[-1])


def figures(won: Int[np.ndarray, " m"], prototype_classes: Int[np.ndarray, " m"]) -> dict[str, Any]:
    """Entropy of each class's wins over the log of its number of prototypes, mean over the classes
    with two or more prototypes and a point ("utilisation"); prototypes without a win ("unused");
    and the wins."""
    entropies = []
    for c in np.unique(prototype_classes):
        own = won[prototype_classes == c]
        if len(own) > 1 and own.sum():
            share = own[own > 0] / own.sum()
            entropies.append(float(-(share * np.log(share)).sum() / np.log(len(own))))
    return {
        "utilisation": float(np.mean(entropies)) if entropies else None,
        "unused": int(((won == 0) & (prototype_classes >= 0)).sum()),
        "wins": won.tolist(),
    }
