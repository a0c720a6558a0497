"""Table 2's overlap: do the prototypes of a class fire at the same places?"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from protoseg_jax.evaluation.segmentation import upsample
from protoseg_jax.losses import class_table


class OverlapSums(NamedTuple):
    """Sums over (image, class, pair of same-class prototypes), float32 scalars, for pooling.

    Table 2's overlap is iou / pairs; a follow-up's pooled ratio is intersection / union (pixels).
    """

    iou: Float[Array, ""]
    pairs: Float[Array, ""]
    intersection: Float[Array, ""]
    union: Float[Array, ""]


def _sort_keys(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """int32 numbers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # −0.0 equals 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def top_twentieth(x: Float[Array, "H W"], inside: Bool[Array, "H W"]) -> Bool[Array, "H W"]:
    """The pixels at or above a map's 95 % quantile over the pixels inside.

    The (linear) quantile lies between two neighbours in the order, so x ≥ quantile means x ≥ the
    ⌈0.95 (n − 1)⌉-th smallest value (from 0), which bisection finds without sorting. Equal to
    `np.quantile` of the map in float64.
    """
    last = inside.sum() - 1
    rank = last - last // 20
    keys = jnp.where(inside, _sort_keys(x), jnp.iinfo(jnp.int32).max)
    low = keys.min()
    high = jnp.where(inside, keys, low).max()

    def halve(bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # ⌊mean⌋ without overflow
        below = (keys <= middle).sum()
        # With `rank` pixels below, any threshold up to the next value cuts alike: done.
        above = jnp.where(below == rank, middle + 1, high)
        return jnp.where(below > rank, low, middle + 1), jnp.where(below > rank, middle, above)

    low, _ = jax.lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, (low, high))
    return (keys >= low) & inside


def overlap_sums(
    similarities: Float[Array, "b h w m"],
    labels: Int[Array, "b H W"],
    sizes: Int[Array, "b 2"],
    prototype_classes: np.ndarray,
    num_classes: int,
) -> OverlapSums:
    """Overlap of same-class prototypes' activations (Table 2), summed over a batch.

    For each image and each class in its labels: the similarity map of each prototype of the class,
    brought to label resolution and cut at its own whole-image 95 % quantile; IoU of every pair. The
    paper's code for this is not released; we follow METHOD.

    Works through images, classes and prototypes one after another, so that only one map and one
    class's masks are at full size, and passes over classes that are absent.

    Args:
      similarities: eq. 1, at the feature map's resolution.
      labels: at full size on the canvas, void outside each image's size.
      sizes: each image's own (height, width).
      prototype_classes: [M], static.
      num_classes: C.
    """
    table = class_table(prototype_classes, num_classes)
    canvas = labels.shape[1:]
    upper = np.triu(np.ones(2 * table.shape[1:], bool), 1)

    def class_sums(maps: Float[Array, "h w m"], size: Int[Array, "2"], own: Int[Array, "k"]):
        inside = (jnp.arange(canvas[0]) < size[0])[:, None] & (jnp.arange(canvas[1]) < size[1])

        def active(j):
            full = upsample(maps[None, :, :, j, None], size[None], canvas)[0, :, :, 0]
            return top_twentieth(full, inside)

        masks = jax.lax.map(active, jnp.maximum(own, 0)).reshape(len(own), -1).astype(jnp.int8)
        # Counts in int32 are exact at any size, and on a CPU faster than in float32.
        intersection = jnp.dot(masks, masks.T, preferred_element_type=jnp.int32)
        area = jnp.diagonal(intersection)
        union = area[:, None] + area - intersection
        pairs = (own >= 0) & (own >= 0)[:, None] & upper
        terms = (intersection / union, pairs, intersection, union)
        return OverlapSums(*(jnp.where(pairs, x.astype(jnp.float32), 0.0).sum() for x in terms))

    zero = OverlapSums(*[jnp.zeros(())] * 4)

    def image_sums(image):
        maps, label, size = image

        def add(total, class_and_own):
            c, own = class_and_own
            enters = (label == c).any() & ((own >= 0).sum() > 1)
            sums = jax.lax.cond(enters, lambda: class_sums(maps, size, own), lambda: zero)
            return jax.tree.map(jnp.add, total, sums), None

        return jax.lax.scan(add, zero, (jnp.arange(num_classes), jnp.asarray(table)))[0]

    per_image = jax.lax.map(image_sums, (similarities, labels, sizes))
    return jax.tree.map(jnp.sum, per_image)


def scores(sums: OverlapSums | None) -> dict[str, float | None]:
    """Over a split: "overlap", the mean of IoUs, and "overlap_pooled", ΣI/ΣU; None without pairs.

    Args:
      sums: of the split; None where there are no prototypes or it was not measured.
    """
    iou, pairs, intersection, union = sums or (0.0,) * 4
    return {
        "overlap": iou / pairs if pairs else None,
        "overlap_pooled": intersection / union if union else None,
    }
