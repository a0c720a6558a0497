"""The EM authors' error against counting pixel by pixel."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protoseg_jax.evaluation import thresholds
from protoseg_jax.evaluation.measures import Seen
from protoseg_jax.models.protoseg import Output


def seen(logits, label):
    batch = {"label": label, "size": np.array(label.shape, np.int32)}
    return Seen(None, None, batch, Output(None, None, None, logits), None, None, None)


step = jax.jit(lambda logits, label: thresholds._step(seen(logits, label)))


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_it_is_the_least_error_over_21_thresholds(seed):
    rng = np.random.default_rng(seed)
    sums, pixels = None, []
    for _ in range(3):
        logits = rng.normal(0, 2, (6, 7, 2)).astype(np.float32)
        label = rng.choice([0, 1, 1, 255], (6, 7)).astype(np.uint8)
        found = jax.device_get(step(logits, label))
        sums = found if sums is None else {k: sums[k] + found[k] for k in sums}
        for at in np.ndindex(label.shape):
            e = np.exp(logits[at].astype(np.float64))
            pixels.append((e[1] / e.sum(), label[at]))
    errors = []
    for n in range(21):
        said = [(p > n / 20, y) for p, y in pixels if y != 255]
        hits = sum(s and y == 1 for s, y in said)
        both = sum(s for s, _ in said) + sum(y == 1 for _, y in said)
        errors.append(1 - 2 * hits / both)
    result = thresholds.figures(sums)
    assert result["f_error_of_thresholds"] == pytest.approx(min(errors))
    assert errors[round(20 * result["threshold"])] == pytest.approx(min(errors))


def test_no_class_1_anywhere():
    logits = np.stack([np.full((3, 3), 50.0), np.full((3, 3), -200.0)], -1).astype(np.float32)
    sums = jax.device_get(step(logits, np.full((3, 3), 255, np.uint8)))
    assert thresholds.figures(sums)["f_error_of_thresholds"] is None
