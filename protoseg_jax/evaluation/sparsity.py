"""Sparsity: how many prototypes make up a decision."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from protoseg_jax.evaluation.measures import Context, Measure, Seen

TITLES = (("sparsity", "sparsity: prototypes a decision", 1),)

SHARE = 0.95  # of the winning logit's positive part


def make(context: Context) -> Measure:
    """The mean of `prototypes_needed` over the points where something speaks for the winner."""
    del context
    return Measure(_step, lambda sums: {"sparsity": float(sums[0] / sums[1]) if sums[1] else None})


def _step(seen: Seen) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """(prototypes that made up the decisions, points with a decision)."""
    # Row by row, so that no second map of M values is kept.
    rows = seen.output.similarities, seen.output.logits
    needed = jax.lax.map(lambda row: prototypes_needed(*row, seen.kernel), rows)
    needed = jnp.where(seen.judged, needed, 0)
    return needed.sum(), (needed > 0).sum()


def prototypes_needed(
    similarities: Float[Array, "*n m"], logits: Float[Array, "*n c"], kernel: Float[Array, "m c"]
) -> Int[Array, "*n"]:
    """Fewest prototypes whose contributions to the winning logit make up 95 % of its positive part;
    0 where nothing speaks for it."""
    contributions = jnp.maximum(similarities * kernel.T[logits.argmax(-1)], 0.0)
    shares = jnp.cumsum(-jnp.sort(-contributions, axis=-1), axis=-1)
    total = shares[..., -1]
    return jnp.where(total > 0, 1 + (shares < SHARE * total[..., None]).sum(-1), 0)
