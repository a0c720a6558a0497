"""Faithfulness: whether taking away what is said to have decided changes the decision."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from protoseg_jax.evaluation.measures import Context, Measure, Seen

TITLES = (("faithfulness", "faithfulness: area between the curves", 100),)

SAMPLES = 64  # points an image


def make(context: Context) -> Measure:
    """`figures` of the `removals` over a split."""
    del context
    return Measure(removals, figures)


def removals(seen: Seen) -> tuple[Int[Array, " n"], Int[Array, " n"], Int[Array, ""]]:
    """Sampled points whose label outlives the removal of 0 … M prototypes, by contribution and at
    random; and their number."""
    pick, shuffle, _ = jax.random.split(seen.key, 3)
    valid = seen.judged.reshape(-1)
    draw = jnp.where(valid, jax.random.uniform(pick, valid.shape), -1.0)
    drawn, at = jax.lax.top_k(draw, min(SAMPLES, len(valid)))
    sampled = seen.output.similarities.reshape(len(valid), -1)[at]
    numbers = jnp.broadcast_to(jnp.arange(sampled.shape[1]), sampled.shape)
    random = jax.random.permutation(shuffle, numbers, axis=1, independent=True)
    counted = (drawn >= 0)[:, None]
    left, left_at_random = (
        (survivors(sampled, seen.kernel, order) & counted).sum(0)
        for order in (by_margin(sampled, seen.kernel), random)
    )
    return left, left_at_random, counted.sum()


def survivors(
    similarities: Float[Array, "s m"], kernel: Float[Array, "m c"], order: Int[Array, "s m"]
) -> Bool[Array, "s n"]:
    """Whether each point's label is still the only winner after the first k prototypes of its order
    are removed, k = 0 … M; without any prototype nothing wins."""
    ordered = jnp.take_along_axis(similarities, order, axis=1)
    terms = ordered[..., None] * kernel[order]
    left = jnp.flip(jnp.cumsum(jnp.flip(terms, 1), 1), 1)
    left = jnp.concatenate([left, jnp.zeros_like(left[:, :1])], 1)  # [s n c]
    label = left[:, 0].argmax(-1)
    own = jnp.take_along_axis(left, label[:, None, None], axis=2)[..., 0]
    others = jnp.where(jnp.arange(kernel.shape[1]) == label[:, None, None], -jnp.inf, left).max(-1)
    return own > others


def by_margin(similarities: Float[Array, "s m"], kernel: Float[Array, "m c"]) -> Int[Array, "s m"]:
    """Prototypes by their contribution to the winner's margin over the runner-up, largest first."""
    logits = jnp.matmul(similarities, kernel, precision=jax.lax.Precision.HIGHEST)
    winner, runner_up = jnp.moveaxis(jax.lax.top_k(logits, 2)[1], -1, 0)
    margins = similarities * (kernel.T[winner] - kernel.T[runner_up])
    return jnp.argsort(-margins, axis=-1)


def figures(sums: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, Any]:
    """The share that survives random removals less that of removals by contribution, mean over k
    ("faithfulness"); and the curves of the latter and the former; None without a point."""
    left, left_at_random, samples = sums
    if not samples:
        return dict.fromkeys(("faithfulness", "survival", "random_survival"))
    return {
        "faithfulness": float((left_at_random - left).mean()) / float(samples),
        "survival": (left / samples).tolist(),
        "random_survival": (left_at_random / samples).tolist(),
    }
