"""The networks: feature sizes, eq. 1, distances and their gradients, the last layer's start."""

import flops
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from protoseg_jax import models
from protoseg_jax.errors import UserError
from protoseg_jax.models.prototypes import (
    class_connections,
    equal_blocks,
    similarity,
    squared_distances,
)


def make_config(**changes):
    return ml_collections.ConfigDict({**flops.config().model.to_dict(), **changes})


def shapes(size, **changes):
    model = models.build(make_config(**changes), 19, 190, jnp.float32)
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), images)


@pytest.mark.parametrize(
    ("size", "features"),
    [((321, 321), (41, 41)), ((513, 513), (65, 65)), ((1024, 2048), (129, 257))],
)
def test_feature_sizes_of_ceil_mode_pooling(size, features):
    output, _ = shapes(size)
    assert output.features.shape == (1, *features, 64)
    assert output.distances.shape == (1, *features, 190)
    assert output.logits.shape == (1, *features, 19)


def test_parameter_groups():
    _, variables = shapes((65, 65))
    assert set(variables["params"]) == {"backbone", "aspp", "prototypes", "head"}
    assert set(variables["frozen"]) == {"backbone"}
    assert variables["params"]["prototypes"]["vectors"].shape == (190, 64)
    assert variables["params"]["head"]["kernel"].shape == (190, 19)
    _, twin = shapes((65, 65), head="linear", norm="group")
    assert set(twin["params"]) == {"backbone", "aspp"} and "frozen" not in twin


def test_output_stride_4_keeps_twice_the_resolution():
    output, _ = shapes((321, 321), output_stride=4)
    assert output.features.shape == (1, 81, 81, 64)


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient():
    images = jax.random.normal(jax.random.key(1), (1, 33, 40, 3))
    found = []
    for remat in (False, True):
        config = make_config(depth=14, width=8, norm="group", aspp_rates=(1, 2), remat=remat)
        model = models.build(config, 3, 6, jnp.float32)
        params = model.init(jax.random.key(0), images)
        loss = jax.jit(jax.value_and_grad(lambda p, m=model: m.apply(p, images).logits.sum()))
        found.append(loss(params))
    values, gradients = zip(*found, strict=True)
    assert float(values[0]) == pytest.approx(float(values[1]), rel=1e-5)
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a) + 1e-6


def test_bfloat16_is_only_computed_in():
    """Parameters and results stay float32, and the results are near those of float32."""
    config = make_config(depth=14, width=16, norm="group", aspp_rates=(1, 2), features=8)
    images = jax.random.normal(jax.random.key(1), (1, 32, 40, 3))
    exact, half = (models.build(config, 3, 6, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    variables = half.init(jax.random.key(0), images)
    output = half.apply(variables, images)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, output))} == {jnp.float32.dtype}
    error = np.abs(output.features - exact.apply(variables, images).features).max()
    assert 0 < error < 0.05


@pytest.mark.parametrize("change", [{"depth": 18}, {"norm": "batch"}, {"head": "mlp"}])
def test_unknown_settings_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        models.build(make_config(**change), 2, 4, jnp.float32)


def test_similarity_is_equation_1():
    d = np.array([0.0, 1e-6, 0.1, 1.0, 50.0])
    np.testing.assert_allclose(
        similarity(jnp.array(d)), np.log((d + 1) / (d + 1e-4)), rtol=2e-6, atol=1e-6
    )
    assert float(similarity(jnp.zeros(()))) == pytest.approx(np.log(1e4), abs=1e-5)


def test_distances_are_exact_and_so_are_their_gradients():
    rng = np.random.default_rng(0)
    z = rng.uniform(size=(2, 3, 4, 16)).astype(np.float32)
    p = rng.uniform(size=(5, 16)).astype(np.float32)
    p[2] = z[1, 2, 3]
    weights = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    got = np.asarray(squared_distances(z, p))
    expected_z, expected_p = np.zeros(z.shape), np.zeros(p.shape)
    for index in np.ndindex(2, 3, 4):
        for j in range(5):
            difference = z[index].astype(np.float64) - p[j]
            assert got[(*index, j)] == pytest.approx((difference**2).sum(), rel=1e-5, abs=1e-12)
            expected_z[index] += 2 * weights[(*index, j)] * difference
            expected_p[j] -= 2 * weights[(*index, j)] * difference
    assert got[1, 2, 3, 2] == 0.0
    gradients = jax.grad(lambda z, p: (squared_distances(z, p) * weights).sum(), (0, 1))(z, p)
    np.testing.assert_allclose(gradients[0], expected_z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients[1], expected_p, rtol=1e-4, atol=1e-5)


def test_last_layer_starts_at_one_and_minus_a_half():
    classes = equal_blocks(6, 3)
    assert classes.tolist() == [0, 0, 1, 1, 2, 2]
    w_h = np.asarray(class_connections(classes, 3))
    for j, c in enumerate(classes):
        assert w_h[j].tolist() == [1.0 if k == c else -0.5 for k in range(3)]
