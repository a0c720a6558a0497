"""Table 2's overlap: whether prototypes of a class are active at the same places."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from protoseg_jax.evaluation.measures import Context, Measure, Seen, absent
from protoseg_jax.evaluation.segmentation import upsample
from protoseg_jax.models.prototypes import class_table

TITLES = (("overlap", "overlap", 100),)
NOT_MEASURED = absent("overlap", "overlap_pooled")

_SHARE = 20  # a prototype is active on the twentieth of the pixels most similar to it
_OUTSIDE = jnp.iinfo(jnp.int32).max  # of a pixel that is none
# Pixels that are counted side by side, in vectors, which a CPU does not do in a plain sum.
_SLABS = 32


class OverlapSums(NamedTuple):
    """Sums over (image, class, pair of same-class prototypes), float32 scalars, for pooling.

    Table 2's overlap is iou / pairs; a follow-up's pooled ratio is intersection / union (pixels).
    """

    iou: Float[Array, ""]
    pairs: Float[Array, ""]
    intersection: Float[Array, ""]
    union: Float[Array, ""]


def make(context: Context) -> Measure:
    """`figures` of the `sums` over a split; None both for the black box."""
    return Measure(sums, figures) if context.inference.num_prototypes else NOT_MEASURED


def _sort_keys(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """int32 numbers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # −0.0 equals 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def top(x: Float[Array, "*n"], inside: Bool[Array, "*n"], share: int) -> Bool[Array, "*n"]:
    """The points at or above the (1 − 1/share) quantile of a map over the points inside.

    The (linear) quantile lies between two neighbours in the order, so x ≥ quantile means x ≥ the
    ⌈(1 − 1/share) (n − 1)⌉-th smallest value (from 0), which bisection finds without sorting. Equal
    to `np.quantile` of the map in float64.
    """
    last = inside.sum() - 1
    rank = last - last // share
    keys = jnp.where(inside, _sort_keys(x), _OUTSIDE)
    low = keys.min()
    high = jnp.where(inside, keys, low).max()
    flat = jnp.pad(keys.reshape(-1), (0, -keys.size % _SLABS), constant_values=_OUTSIDE)
    slabs = flat.reshape(_SLABS, -1)

    def halve(bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # ⌊mean⌋ without overflow
        below = sum((slab <= middle).astype(jnp.int32) for slab in slabs).sum()
        # With `rank` pixels below, any threshold up to the next value cuts alike: done.
        above = jnp.where(below == rank, middle + 1, high)
        return jnp.where(below > rank, low, middle + 1), jnp.where(below > rank, middle, above)

    low, _ = jax.lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, (low, high))
    return (keys >= low) & inside


def sums(seen: Seen) -> OverlapSums:
    """Overlap of same-class prototypes' activations (Table 2), summed over an image's classes.

    For each class in the image's labels: the similarity map of each prototype of the class, brought
    to label resolution and cut at its own whole-image 95 % quantile; IoU of every pair. The paper's
    code for this is not released; see docs/method.md.

    Works through classes and prototypes one after another, so that only one map and one class's
    masks are at full size, and passes over classes that are absent.
    """
    similarities, label, size = seen.output.similarities, seen.batch["label"], seen.batch["size"]
    table = class_table(seen.inference.classes, seen.inference.num_classes)
    upper = np.triu(np.ones(2 * table.shape[1:], bool), 1)
    height, width = label.shape
    inside = (jnp.arange(height) < size[0])[:, None] & (jnp.arange(width) < size[1])

    def active(j: Int[Array, ""]) -> Bool[Array, "H W"]:
        full = upsample(similarities[None, :, :, j, None], size[None], label.shape)
        return top(full[0, :, :, 0], inside, _SHARE)

    def class_sums(own: Int[Array, " k"]) -> OverlapSums:
        intersection = _intersections(jax.lax.map(active, jnp.maximum(own, 0)))
        area = jnp.diagonal(intersection)
        union = area[:, None] + area - intersection
        pairs = (own >= 0) & (own >= 0)[:, None] & upper
        terms = (intersection / union, pairs, intersection, union)
        return OverlapSums(*(jnp.where(pairs, x.astype(jnp.float32), 0.0).sum() for x in terms))

    def add(total: OverlapSums, class_and_own):
        c, own = class_and_own
        enters = (label == c).any() & ((own >= 0).sum() > 1)
        found = jax.lax.cond(enters, class_sums, lambda _: zero, own)
        return jax.tree.map(jnp.add, total, found), None

    zero = OverlapSums(*[jnp.zeros(())] * 4)
    return jax.lax.scan(add, zero, (jnp.arange(len(table)), jnp.asarray(table)))[0]


_BLOCK = 2**26  # pixels of masks that are multiplied at once


def _intersections(masks: Bool[Array, "k H W"]) -> Int[Array, "k k"]:
    """Pixels that each two masks share: of large ones some rows at a time, as XLA widens them."""
    count, height, width = masks.shape
    blocks = max(count * height * width // _BLOCK, 1)
    rows = -(-height // blocks)

    def add(total: Int[Array, "k k"], first: Int[Array, ""]):
        # The last rows may have been counted before: slices stay inside.
        start = jnp.minimum(first, height - rows)
        part = jax.lax.dynamic_slice_in_dim(masks, start, rows, 1)
        part &= (start + jnp.arange(rows) >= first)[:, None]
        part = part.reshape(count, -1).astype(jnp.int8)
        # Counts in int32 are exact at any size, and on a CPU faster than in float32.
        return total + jnp.dot(part, part.T, preferred_element_type=jnp.int32), None

    zero = jnp.zeros((count, count), jnp.int32)
    if rows == height:
        return add(zero, 0)[0]
    return jax.lax.scan(add, zero, jnp.arange(0, height, rows))[0]


def figures(pooled: OverlapSums) -> dict[str, float | None]:
    """The mean of the pairs' IoUs, and ΣI/ΣU ("overlap_pooled"); None without pairs."""
    iou, pairs, intersection, union = pooled
    return {
        "overlap": iou / pairs if pairs else None,
        "overlap_pooled": intersection / union if union else None,
    }
