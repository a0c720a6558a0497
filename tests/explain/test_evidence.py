"""Evidence against literal NumPy: the parts always add up to the logit that decided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protoseg_jax.evaluation import segmentation
from protoseg_jax.explain import evidence
from protoseg_jax.models.protoseg import Output
from protoseg_jax.models.prototypes import squared_distances

H, W, D, M, C, N = 4, 5, 3, 6, 3, 40
EPSILON = 1e-4

points = jax.jit(evidence.explain_points)
pixels = jax.jit(evidence.explain_pixels)


def scene(seed):
    """Features, prototypes (one of them on a point) and w_h of both signs."""
    rng = np.random.default_rng(seed)
    z, p = rng.random((H, W, D), np.float32), rng.random((M, D), np.float32)
    p[2] = z[1, 3]
    return z, p, rng.normal(size=(M, C)).astype(np.float32)


def output_of(z, p, kernel):
    d2 = squared_distances(jnp.array(z), jnp.array(p))
    similarities = jnp.log((d2 + 1) / (d2 + EPSILON))
    return Output(jnp.array(z), d2, similarities, similarities @ kernel)


def slow_point(z, p, kernel):
    """(logits, winning class, winning prototype, novelty) of one point, number by number."""
    d2 = [sum((float(a) - float(b)) ** 2 for a, b in zip(z, q, strict=True)) for q in p]
    g = [np.log((d + 1) / (d + EPSILON)) for d in d2]
    logits = [sum(g[j] * float(kernel[j, c]) for j in range(M)) for c in range(C)]
    label = int(np.argmax(logits))
    parts = [g[j] * float(kernel[j, label]) for j in range(M)]
    return g, logits, label, int(np.argmax(parts)), min(d2)


def test_points_equal_a_literal_computation():
    z, p, kernel = scene(0)
    found = points(output_of(z, p, kernel), kernel)
    for row, col in np.ndindex(H, W):
        g, logits, label, prototype, novelty = slow_point(z[row, col], p, kernel)
        np.testing.assert_allclose(found.similarities[row, col], g, atol=2e-4)
        np.testing.assert_allclose(found.logits[row, col], logits, atol=1e-3)
        assert found.label[row, col] == label
        assert found.prototype[row, col] == prototype
        assert found.novelty[row, col] == pytest.approx(novelty, abs=1e-6)
    assert found.novelty[1, 3] == 0
    assert found.similarities[1, 3, 2] == pytest.approx(np.log(1 / EPSILON))


def test_pixels_equal_a_literal_interpolation_of_the_parts():
    z, p, kernel = scene(1)
    size = (11, 7)
    point = points(output_of(z, p, kernel), kernel)
    rows, cols = (x.ravel() for x in np.mgrid[: size[0], : size[1]])
    found = pixels(point.similarities, point.logits, kernel, jnp.array(size), rows, cols)
    for n, (row, col) in enumerate(zip(rows, cols, strict=True)):
        parts = np.zeros((M, C))
        y = np.clip((row + 0.5) * H / size[0] - 0.5, 0, H - 1)
        x = np.clip((col + 0.5) * W / size[1] - 0.5, 0, W - 1)
        for i in range(H):
            for k in range(W):
                share = max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - k))
                g = slow_point(z[i, k], p, kernel)[0]
                parts += share * np.array(g)[:, None] * kernel
        order = np.argsort(parts.sum(0))[::-1]
        assert (found.label[n], found.runner_up[n]) == (order[0], order[1])
        np.testing.assert_allclose(found.logits[n], parts.sum(0), atol=1e-3)
        np.testing.assert_allclose(found.contributions[n], parts[:, order[0]], atol=1e-3)
        expected = parts[:, order[0]] - parts[:, order[1]]
        np.testing.assert_allclose(found.margins[n], expected, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 30), st.integers(1, 30))
def test_parts_add_up_to_the_logit_that_decided(seed, height, width):
    """Of any pixel of an image of any size: the winner's logit and its margin, to 1e-4."""
    z, p, kernel = scene(seed)
    point = points(output_of(z, p, kernel), kernel)
    rng = np.random.default_rng(seed)
    rows, cols = rng.integers(0, height, N), rng.integers(0, width, N)
    size = jnp.array((height, width))
    found = pixels(point.similarities, point.logits, kernel, size, rows, cols)
    full = segmentation.upsample(point.logits[None], size[None], (30, 30))[0]
    decided = np.asarray(full)[rows, cols]
    np.testing.assert_allclose(found.logits, decided, atol=1e-5)
    np.testing.assert_array_equal(found.label, found.logits.argmax(-1))
    top = np.sort(decided, -1)
    np.testing.assert_allclose(found.contributions.sum(-1), top[:, -1], atol=1e-4)
    np.testing.assert_allclose(found.margins.sum(-1), top[:, -1] - top[:, -2], atol=1e-4)
    assert (found.margins.sum(-1) > -1e-4).all() and (found.label != found.runner_up).all()
