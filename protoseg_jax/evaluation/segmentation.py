"""Scores of section 5: mIoU and pixel error from a confusion matrix, the overlap of Table 2.

Images of a batch lie at the top left of a common canvas, each with its own (height, width) as
data: nothing compiles per image.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from protoseg_jax.losses import class_table


def _taps(
    length: int, sizes: Int[Array, "*#o"], positions: Int[Array, "*#o"]
) -> tuple[Int[Array, "*o"], Int[Array, "*o"], Float[Array, "*o"]]:
    """For output positions the two input positions beside each and the second one's weight."""
    step = length / jnp.maximum(sizes, 1).astype(jnp.float32)
    source = jnp.clip((positions + 0.5) * step - 0.5, 0.0, length - 1.0)
    low = source.astype(jnp.int32)
    return low, jnp.minimum(low + 1, length - 1), source - low


def _lerp(x, low, high, weight, axis: int):
    """x at `low` and at `high` along an axis, mixed; `weight` is the share of `high`."""
    weight = weight.reshape(low.shape)
    below, above = (jnp.take_along_axis(x, at, axis, mode="clip") for at in (low, high))
    return below * (1 - weight) + above * weight


def upsample(
    maps: Float[Array, "b h w c"], sizes: Int[Array, "b 2"], out: tuple[int, int]
) -> Float[Array, "b H W c"]:
    """Bilinear to each image's own size: half-pixel centres, no antialiasing (METHOD, evaluation).

    Args:
      maps: feature-map resolution.
      sizes: each image's own (height, width), at most `out`.
      out: (H, W) of the canvas. Pixels outside an image's size are whatever: mask them by void
        labels.
    """
    maps = maps.astype(jnp.float32)
    top, bottom, down = _taps(maps.shape[1], sizes[:, :1], jnp.arange(out[0]))
    left, right, across = _taps(maps.shape[2], sizes[:, 1:], jnp.arange(out[1]))
    # Columns first, so that the larger second step copies whole rows. Two gathers and a lerp take
    # 56 ms for 19 maps of 1024 × 2048 on two cores, products with interpolation matrices 350.
    maps = _lerp(maps, left[:, None, :, None], right[:, None, :, None], across, axis=2)
    return _lerp(maps, top[:, :, None, None], bottom[:, :, None, None], down, axis=1)


def upsample_at(
    maps: Float[Array, "h w c"],
    size: Int[Array, "2"],
    rows: Int[Array, " n"],
    cols: Int[Array, " n"],
) -> Float[Array, "n c"]:
    """What `upsample` gives at some pixels, without the maps at full size.

    Args:
      maps: of one image, feature-map resolution.
      size: the image's own (height, width).
      rows, cols: pixels of the image.
    """
    top, bottom, down = _taps(maps.shape[0], size[0], rows)
    left, right, across = _taps(maps.shape[1], size[1], cols)
    down, across = down[:, None], across[:, None]
    maps = maps.astype(jnp.float32)
    upper = maps[top, left] * (1 - across) + maps[top, right] * across
    lower = maps[bottom, left] * (1 - across) + maps[bottom, right] * across
    return upper * (1 - down) + lower * down


def confusion_matrix(
    predictions: Int[Array, "b H W"], labels: Int[Array, "b H W"], num_classes: int
) -> Int[Array, "c c"]:
    """Pixels by true class (row) and predicted class (column); void labels are left out.

    Exact below 2³¹ pixels a call: add calls up in int64 on the host.

    Args:
      predictions: classes in [0, C).
      labels: true classes; anything outside [0, C) is void.
    """
    labels = labels.astype(jnp.int32)
    valid = (labels >= 0) & (labels < num_classes)
    cell = jnp.where(valid, labels * num_classes + predictions, num_classes**2)
    # For integers a CPU's scatter is cheap: 2 ms for 1024 × 2048 pixels, one-hot matmuls 38.
    counts = jnp.zeros(num_classes**2 + 1, jnp.int32).at[cell.reshape(-1)].add(1)
    return counts[:-1].reshape(num_classes, num_classes)


def scores(confusion: np.ndarray) -> dict:
    """Scores from a confusion matrix [C, C] pooled over a split (rows are the truth).

    Returns:
      `miou`: mean IoU over the classes with a non-empty union; `iou`: a list, None where the union
      is empty; `pixel_accuracy`; `pixel_error` = 1 − accuracy; for two classes also `f_error` =
      1 − F of class 1, "inside": the EM challenge's own error, to stand beside Table 4. Fractions;
      None where there is nothing to count.
    """
    confusion = np.asarray(confusion, np.int64)
    hits, truth, predicted = np.diagonal(confusion), confusion.sum(1), confusion.sum(0)
    union = truth + predicted - hits
    iou = [_ratio(i, u) for i, u in zip(hits, union, strict=True)]
    present = [x for x in iou if x is not None]
    accuracy = _ratio(hits.sum(), confusion.sum())
    result = {
        "miou": float(np.mean(present)) if present else None,
        "iou": iou,
        "pixel_accuracy": accuracy,
        "pixel_error": None if accuracy is None else 1.0 - accuracy,
    }
    if len(confusion) == 2:
        f_score = _ratio(2 * hits[1], truth[1] + predicted[1])
        result["f_error"] = None if f_score is None else 1.0 - f_score
    return result


def _ratio(part: np.int64, whole: np.int64) -> float | None:
    return float(part / whole) if whole else None


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
        # Counts in int32 are exact at any size, and on a CPU 4 times as fast as in float32.
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
