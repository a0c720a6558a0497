"""From logits to labels, and the scores of section 5: mIoU and pixel error by a confusion matrix.

Images of a batch lie at the top left of a common canvas, each with its own (height, width) as
data: nothing compiles per image.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from protoseg_jax.evaluation.measures import Context, Measure, Seen

TITLES = (
    ("miou", "mean", 100),
    ("pixel_accuracy", "pixel accuracy", 100),
    ("pixel_error", "pixel error", 100),
    ("f_error", "1 − F (class 1)", 100),
)


def make(context: Context) -> Measure:
    """`scores` of the pixels of a split."""
    del context
    return Measure(_step, scores)


def _step(seen: Seen) -> Int[Array, "c c"]:
    label, size = seen.batch["label"][None], seen.batch["size"][None]
    found = predict(seen.output.logits[None], size, label.shape[1:])
    return confusion_matrix(found, label, seen.inference.num_classes)


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
    maps: Float[Array, "b h w c"],
    sizes: Int[Array, "b 2"],
    out: tuple[int, int],
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "b H W c"]:
    """Bilinear to each image's own size: half-pixel centres, no antialiasing (docs/method.md).

    Args:
      maps: feature-map resolution.
      sizes: each image's own (height, width).
      out: (H, W) of the canvas, which need not hold all rows of an image. Pixels outside an image's
        size are whatever: mask them by void labels.
      first: row of the images that the canvas begins with.
    """
    maps = maps.astype(jnp.float32)
    top, bottom, down = _taps(maps.shape[1], sizes[:, :1], first + jnp.arange(out[0]))
    left, right, across = _taps(maps.shape[2], sizes[:, 1:], jnp.arange(out[1]))
    # Columns first, so that the larger second step copies whole rows. Gathers and lerps, because
    # products with interpolation matrices were measured slower.
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


def predict(
    logits: Float[Array, "b h w c"], sizes: Int[Array, "b 2"], out: tuple[int, int]
) -> UInt8[Array, "b H W"]:
    """The class of each pixel: logits at each image's own size, then the largest (see `upsample`).

    No array of C maps has the size of the canvas on a CPU, and none of a large one elsewhere.

    Args:
      logits: feature-map resolution.
      sizes, out: as of `upsample`.
    """

    def of_image(image) -> UInt8[Array, "H W"]:
        logits, size = image
        rows = min(max(_STRIP // (out[1] * logits.shape[-1]), 1), out[0])
        wide, firsts = _widen(logits, size, out[1]), jnp.arange(0, out[0], rows)
        if len(firsts) == 1:
            return _largest_of_rows(wide, size, out[0], 0)
        found = jax.lax.map(lambda first: _largest_of_rows(wide, size, rows, first), firsts)
        return found.reshape(-1, out[1])[: out[0]]

    if len(logits) == 1:
        return of_image((logits[0], sizes[0]))[None]
    return jax.lax.map(of_image, (logits, sizes))


_STRIP = 2**24  # values of upsampled logits at once
_FEW = 4  # classes whose largest XLA finds fast by itself on a CPU
_VECTORS = 16  # classes from which on it compares them in vectors
_LEAST = -1e30  # the logit of a class that there is not; no infinity, which 0 times is not 0


def _widen(
    logits: Float[Array, "h w c"], size: Int[Array, "2"], width: int
) -> Float[Array, "h c W"]:
    """An image's logits at its own width, class before column."""
    left, right, across = _taps(logits.shape[1], size[1], jnp.arange(width))
    maps = jnp.moveaxis(logits.astype(jnp.float32), -1, 1)
    return _lerp(maps, left[None, None], right[None, None], across, axis=2)


def _heighten(wide: Float[Array, "h c W"], taps) -> Float[Array, "n c W"]:
    """Some rows of an image's logits at its own size."""
    top, bottom, down = taps
    down = down.reshape(-1, 1, 1)
    return wide[top] * (1 - down) + wide[bottom] * down


def _largest_of_rows(
    wide: Float[Array, "h c W"], size: Int[Array, "2"], rows: int, first: Any
) -> UInt8[Array, "n W"]:
    """The number of the largest logit at some rows of an image, the lowest of equals.

    A CPU goes row by row, so that what is compared stays in its cache, and compares vectors: 11
    classes take it 0.4 of the time that they take at once, 19 to 60 a seventh.

    Args:
      wide: what `_widen` gives.
      size: the image's own (height, width).
      rows, first: how many, and from which on.
    """
    taps = _taps(wide.shape[0], size[0], first + jnp.arange(rows))

    def at_once(wide, taps):
        return _heighten(wide, taps).argmax(1).astype(jnp.uint8)

    def by_row(wide, taps):
        if _FEW < wide.shape[1] < _VECTORS:
            fill = ((0, 0), (0, _VECTORS - wide.shape[1]), (0, 0))
            wide = jnp.pad(wide, fill, constant_values=_LEAST)
        return jax.lax.map(lambda taps: compared(_heighten(wide, taps)[0]), taps)

    def compared(values: Float[Array, "c W"]) -> UInt8[Array, " W"]:
        if len(values) <= _FEW:
            return values.argmax(0).astype(jnp.uint8)
        most, found = values[0], jnp.zeros(values.shape[1:], jnp.uint8)
        for c in range(1, len(values)):
            found = jnp.where(values[c] > most, jnp.uint8(c), found)
            most = jnp.maximum(values[c], most)
        return found

    return jax.lax.platform_dependent(wide, taps, cpu=by_row, default=at_once)


_STEP = 64  # widths of strips are multiples of it, or of more, so that few are compiled
_ROWS = 256  # of a strip, at most


def strips(
    logits: Float[Array, "h w c"], size: tuple[int, int], *, shares: bool = False
) -> Iterator[tuple[slice, UInt8[np.ndarray, "n W"], Float[np.ndarray, "n W c"] | None]]:
    """(rows, their classes, with `shares` their probabilities) of one image at its own size, as
    `predict` has them, some rows at a time, so that no image is too large (host).

    Args:
      logits: at the feature map's resolution.
      size: (H, W) of the image.
      shares: whether probabilities are wanted, the softmax of the upsampled logits.
    """
    height, width = size
    step = max(_STEP, 1 << max(width.bit_length() - 3, 0))  # 64, 128 from 512 on, 256 from 1024 on
    wide = _widen_once(logits, np.array(size), -(-width // step) * step)
    rows = _ROWS  # halved, so that few are compiled
    while rows > 1 and (rows * math.prod(wide.shape[1:]) > _STRIP or rows // 2 >= height):
        rows //= 2
    for top in range(0, height, rows):
        found, p = _strip(wide, np.array(size), top, rows, shares)
        count = min(rows, height - top)
        p = np.asarray(p)[:count, :width] if shares else None
        yield slice(top, top + count), np.asarray(found)[:count, :width], p


_widen_once = jax.jit(_widen, static_argnums=2)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _strip(wide, size, top, rows, shares):
    found = _largest_of_rows(wide, size, rows, top)
    if not shares:
        return found, None
    taps = _taps(wide.shape[0], size[0], top + jnp.arange(rows))
    return found, jax.nn.softmax(jnp.moveaxis(_heighten(wide, taps), 1, -1))


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
    # A scatter, which for integers is cheap on a CPU: one-hot matmuls were measured slower.
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
