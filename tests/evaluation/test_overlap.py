"""Table 2's overlap against literal NumPy."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protoseg_jax.evaluation import overlap, segmentation

VOID = 255
SEEDS = st.integers(0, 2**31 - 1)
CANVAS = (24, 31)
upsample = jax.jit(functools.partial(segmentation.upsample, out=CANVAS))
top = jax.jit(overlap.top, static_argnums=2)


@settings(max_examples=60, deadline=None)
@given(
    SEEDS,
    st.integers(1, CANVAS[0]),
    st.integers(1, CANVAS[1]),
    st.sampled_from(["continuous", "ties", "constant", "negative", "zeros", "wide"]),
    st.sampled_from([20, 5]),
)
def test_top_is_numpys_quantile(seed, height, width, kind, share):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=CANVAS)
    x = {
        "continuous": x,
        "ties": np.round(2 * x),
        "constant": np.full(CANVAS, 3.7),
        "negative": -np.exp(x),
        "zeros": np.where(rng.random(CANVAS) < 0.5, 0.0, -0.0),
        "wide": np.exp(20 * x),
    }[kind].astype(np.float32)
    inside = np.zeros(CANVAS, bool)
    inside[:height, :width] = True
    own = x[:height, :width].astype(np.float64)
    expected = np.zeros(CANVAS, bool)
    expected[:height, :width] = own >= np.quantile(own, 1 - 1 / share)
    np.testing.assert_array_equal(top(x, inside, share), expected)


CLASSES = np.array([2, 0, 0, 1, 2, 3, 2, 0, 0])  # class 3: one prototype; class 4: none
NUM_CLASSES = 5


@jax.jit
def overlap_sums(similarities, labels, sizes):
    """Over a batch, as a pass adds it up."""
    inference = SimpleNamespace(classes=CLASSES, num_classes=NUM_CLASSES)

    def image(rows):
        batch = {"label": rows[1], "size": rows[2]}
        output = SimpleNamespace(similarities=rows[0])
        return overlap.sums(SimpleNamespace(inference=inference, batch=batch, output=output))

    return jax.tree.map(jnp.sum, jax.lax.map(image, (similarities, labels, sizes)))


def slow_overlap(similarities, labels, sizes):
    iou, pairs, intersections, unions = 0.0, 0, 0, 0
    for maps, label, (height, width) in zip(similarities, labels, sizes, strict=True):
        full = np.asarray(upsample(maps[None], np.array([[height, width]])))[0, :height, :width]
        for c in range(NUM_CLASSES):
            if not (label[:height, :width] == c).any():
                continue
            active = []
            for j in np.flatnonzero(CLASSES == c):
                x = full[:, :, j].astype(np.float64)
                active.append(x >= np.quantile(x, 0.95))
            for a, b in itertools.combinations(active, 2):
                iou += (a & b).sum() / (a | b).sum()
                pairs += 1
                intersections += (a & b).sum()
                unions += (a | b).sum()
    return iou, pairs, intersections, unions


def overlap_example(seed):
    rng = np.random.default_rng(seed)
    sizes = np.array([[24, 31], [13, 20], [9, 31]], np.int32)
    base = rng.uniform(0, 9, (3, 6, 7, 1))
    similarities = (base + rng.uniform(0, 3, (3, 6, 7, len(CLASSES)))).astype(np.float32)
    labels = np.full((3, *CANVAS), VOID, np.uint8)
    for label, (height, width), seen in zip(
        labels, sizes, ([0, 2], [1, 3, 4, VOID], [0, VOID]), strict=True
    ):
        label[:height, :width] = rng.choice(seen, (height, width))
    return similarities, labels, sizes


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_overlap_is_the_literal_one(seed):
    similarities, labels, sizes = overlap_example(seed)
    sums = overlap_sums(similarities, labels, sizes)
    expected = slow_overlap(similarities, labels, sizes)
    assert expected[1] == 6 + 3 + 6
    # Where the two upsamplings round differently a pixel at the cut may change sides.
    np.testing.assert_allclose(sums, expected, rtol=0.02)
    assert sums.pairs == expected[1]


@pytest.mark.parametrize("block", [1, 100, 217, 10**6])
def test_pixels_that_masks_share(monkeypatch, block):
    masks = np.random.default_rng(0).random((3, 13, 11)) < 0.4
    monkeypatch.setattr(overlap, "_BLOCK", block)
    flat = masks.reshape(3, -1).astype(int)
    np.testing.assert_array_equal(overlap._intersections(masks), flat @ flat.T)


def test_overlap_of_equal_maps_is_1_and_of_apart_maps_0():
    similarities, labels, sizes = overlap_example(0)
    equal = overlap_sums(np.repeat(similarities[..., :1], len(CLASSES), -1), labels, sizes)
    assert float(equal.iou / equal.pairs) == pytest.approx(1.0)
    assert equal.intersection == equal.union
    apart = np.zeros((3, 6, 7, len(CLASSES)), np.float32)
    for j, where in enumerate(np.random.default_rng(0).permutation(12)[: len(CLASSES)]):
        apart[:, 2 * (where // 4), 2 * (where % 4), j] = 5.0
    sums = overlap_sums(apart, labels, sizes)
    assert sums.intersection == 0 and sums.iou == 0 and sums.pairs == 15


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_overlap_ignores_what_lies_outside_and_the_order(seed):
    similarities, labels, sizes = overlap_example(seed)
    sums = overlap_sums(similarities, labels, sizes)
    order = np.random.default_rng(seed).permutation(3)
    moved = overlap_sums(similarities[order], labels[order], sizes[order])
    np.testing.assert_allclose(moved, sums, rtol=1e-5)
    monotone = overlap_sums(similarities * 2 + 1, labels, sizes)
    np.testing.assert_allclose(monotone, sums, rtol=0.02)
    empty = overlap_sums(similarities, np.full_like(labels, VOID), sizes)
    assert all(float(x) == 0 for x in empty)
    # An image that pads a batch: void labels and no size of its own.
    padded = sizes.copy()
    padded[2], void = 0, labels.copy()
    void[2] = VOID
    np.testing.assert_allclose(
        overlap_sums(similarities, void, padded), overlap_sums(similarities, void, sizes)
    )
