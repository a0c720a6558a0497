"""Scores and upsampling against literal NumPy and PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protoseg_jax.evaluation import segmentation

VOID = 255
SEEDS = st.integers(0, 2**31 - 1)


def slow_upsample(image, height, width):
    """Bilinear with half-pixel centres of one [h, w, c] map, pixel by pixel."""
    h, w = image.shape[:2]
    out = np.zeros((height, width, image.shape[2]))
    for y, x in np.ndindex(height, width):
        sy = max((y + 0.5) * h / height - 0.5, 0.0)
        sx = max((x + 0.5) * w / width - 0.5, 0.0)
        y0, x0 = int(sy), int(sx)
        y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
        fy, fx = sy - y0, sx - x0
        upper = image[y0, x0] * (1 - fx) + image[y0, x1] * fx
        lower = image[y1, x0] * (1 - fx) + image[y1, x1] * fx
        out[y, x] = upper * (1 - fy) + lower * fy
    return out


CANVAS = (24, 31)
SIZES = np.array([[24, 31], [17, 20], [5, 6], [1, 31], [3, 2]])  # up, equal, down, one row
upsample = jax.jit(functools.partial(segmentation.upsample, out=CANVAS))


def test_upsample_is_bilinear_at_each_images_own_size():
    maps = np.random.default_rng(0).normal(size=(len(SIZES), 5, 6, 3)).astype(np.float32)
    full = np.asarray(upsample(maps, SIZES))
    assert full.shape == (len(SIZES), *CANVAS, 3)
    for image, size, ours in zip(maps, SIZES, full, strict=True):
        height, width = size
        np.testing.assert_allclose(
            ours[:height, :width], slow_upsample(image, height, width), atol=1e-5
        )
    np.testing.assert_allclose(full[2, :5, :6], maps[2], atol=1e-6)


@pytest.mark.parity
def test_upsample_equals_torch():
    torch = pytest.importorskip("torch")
    maps = np.random.default_rng(0).normal(size=(len(SIZES), 9, 7, 3)).astype(np.float32)
    full = np.asarray(upsample(maps, SIZES))
    for image, size, ours in zip(maps, SIZES, full, strict=True):
        theirs = torch.nn.functional.interpolate(
            torch.tensor(image).permute(2, 0, 1)[None],
            size=tuple(size.tolist()),
            mode="bilinear",
            align_corners=False,
            antialias=False,
        )[0].permute(1, 2, 0)
        np.testing.assert_allclose(ours[: size[0], : size[1]], theirs, atol=2e-6)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_upsampling_stays_between_the_extremes_and_finite(seed):
    """Also outside an image's size: a canvas with NaN would poison what masks by multiplying."""
    maps = np.random.default_rng(seed).uniform(-3, 5, (len(SIZES), 5, 6, 3)).astype(np.float32)
    full = np.asarray(upsample(maps, SIZES))
    assert full.min() >= maps.min() - 1e-5 and full.max() <= maps.max() + 1e-5


@pytest.mark.parametrize("classes", [2, 3, 7, 21])
@pytest.mark.parametrize("by_row", [True, False])
def test_predict_takes_the_largest_logit_of_each_pixel(monkeypatch, classes, by_row):
    """As a CPU does it and as an accelerator does; logits may be far below 0, and equal."""
    if not by_row:

        def elsewhere(*arguments, cpu, default):
            del cpu
            return default(*arguments)

        monkeypatch.setattr(jax.lax, "platform_dependent", elsewhere)
    maps = np.random.default_rng(1).normal(size=(len(SIZES), 5, 6, classes)).astype(np.float32)
    maps[..., 1:] -= 1e6 * (np.arange(len(SIZES)) == 1)[:, None, None, None]
    maps[0, ..., 1] = maps[0, ..., 0]
    maps -= 1e3
    found = np.asarray(jax.jit(lambda *x: segmentation.predict(*x, CANVAS))(maps, SIZES))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(upsample(maps, SIZES)).argmax(-1))


@pytest.mark.parametrize("rows", [1, 5, 7])
def test_predict_some_rows_at_a_time(monkeypatch, rows):
    maps = np.random.default_rng(1).normal(size=(len(SIZES), 5, 6, 3)).astype(np.float32)
    whole = np.asarray(segmentation.predict(maps, SIZES, CANVAS))
    monkeypatch.setattr(segmentation, "_STRIP", rows * CANVAS[1] * 3)
    assert rows < CANVAS[0]
    np.testing.assert_array_equal(segmentation.predict(maps, SIZES, CANVAS), whole)


def slow_confusion(predictions, labels, num_classes):
    matrix = np.zeros((num_classes, num_classes), np.int64)
    for prediction, label in zip(predictions.flat, labels.flat, strict=True):
        if label != VOID:
            matrix[label, prediction] += 1
    return matrix


def random_maps(seed, num_classes=5, shape=(2, 7, 9)):
    rng = np.random.default_rng(seed)
    labels = rng.choice([*range(num_classes), VOID], shape).astype(np.uint8)
    return rng.integers(0, num_classes, shape).astype(np.int32), labels


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_confusion_matrix(seed):
    predictions, labels = random_maps(seed)
    matrix = np.asarray(segmentation.confusion_matrix(predictions, labels, 5))
    np.testing.assert_array_equal(matrix, slow_confusion(predictions, labels, 5))
    changed = np.where(labels == VOID, (predictions + 1) % 5, predictions)
    np.testing.assert_array_equal(segmentation.confusion_matrix(changed, labels, 5), matrix)
    parts = [segmentation.confusion_matrix(predictions[i], labels[i], 5) for i in range(2)]
    np.testing.assert_array_equal(sum(parts), matrix)


def test_confusion_matrix_is_exact_beyond_float32():
    """2²⁴ + 1 equal pixels: the first count that float32 cannot hold."""
    labels = jnp.zeros((1, 2**24 + 1, 1), jnp.uint8)
    matrix = segmentation.confusion_matrix(labels.astype(jnp.int32), labels, 2)
    assert int(matrix[0, 0]) == 2**24 + 1


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_scores_are_the_literal_ones(seed):
    predictions, labels = random_maps(seed, num_classes=4, shape=(1, 4, 4))
    predictions[predictions == 3] = 2
    labels[labels == 3] = VOID  # class 3 is nowhere
    result = segmentation.scores(slow_confusion(predictions, labels, 4))
    valid = labels != VOID
    expected = []
    for c in range(4):
        union = ((predictions == c) | (labels == c)) & valid
        hits = (predictions == c) & (labels == c)
        expected.append(hits.sum() / union.sum() if union.any() else None)
    assert result["iou"] == pytest.approx(expected)
    assert result["iou"][3] is None
    assert result["miou"] == pytest.approx(np.mean([x for x in expected if x is not None]))
    accuracy = (predictions == labels)[valid].mean()
    assert result["pixel_accuracy"] == pytest.approx(accuracy)
    assert result["pixel_error"] == pytest.approx(1 - accuracy)
    assert "f_error" not in result

    order = np.random.default_rng(seed).permutation(4)
    permuted = segmentation.scores(slow_confusion(predictions, labels, 4)[order][:, order])
    assert permuted["miou"] == pytest.approx(result["miou"])
    assert permuted["iou"] == [result["iou"][c] for c in order]


def test_f_error_is_of_the_inside_class():
    """Class 0 is the membrane, 1 the inside: 70 found, 10 missed, 4 too many."""
    result = segmentation.scores(np.array([[16, 4], [10, 70]]))
    precision, recall = 70 / 74, 70 / 80
    f_score = 2 * precision * recall / (precision + recall)
    assert result["f_error"] == pytest.approx(1 - f_score)
    assert result["pixel_error"] == pytest.approx(0.14)


def test_scores_pool_billions_of_pixels_exactly():
    result = segmentation.scores(np.array([[10**12, 1], [0, 3]], np.int64))
    assert result["iou"] == [10**12 / (10**12 + 1), 0.75]


def test_scores_of_nothing():
    result = segmentation.scores(np.zeros((3, 3), np.int64))
    assert result == {
        "miou": None,
        "iou": [None] * 3,
        "pixel_accuracy": None,
        "pixel_error": None,
    }
