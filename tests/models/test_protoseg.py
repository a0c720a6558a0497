"""The networks: feature sizes, eq. 1, distances and their gradients, the last layer's start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protoseg_jax import config as configs
from protoseg_jax import inference as inferences
from protoseg_jax import models
from protoseg_jax.errors import UserError
from protoseg_jax.models import preprocessing
from protoseg_jax.models.prototypes import (
    class_connections,
    equal_blocks,
    similarity,
    squared_distances,
)


def make_config(**changes):
    config = configs.default().model
    config.stride_in, config.preprocessing = "3x3", "imagenet"
    with config.ignore_type():
        config.update({"depth": 14, **changes})
    return config


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


def test_every_group_has_a_rule_of_weight_decay():
    """Coupled L2 on convolutions and the ASPP's biases; none on norms, prototypes, w_h."""
    for changes in ({"norm": "group"}, {"backbone": "unet", "depth": 3}):
        config = make_config(**changes)
        _, variables = shapes((65, 65), **changes)
        rules, params = models.decay(config), variables["params"]
        assert set(params) == {*models.groups(config), "prototypes", "head"}
        assert set(rules) == {*params, "anchors"} and not rules["anchors"](("anchors", "vectors"))
        for path, _ in jax.tree_util.tree_leaves_with_path(params):
            names = tuple(key.key for key in path)
            in_network = names[0] in ("backbone", "decoder") and names[-1] == "kernel"
            assert rules[names[0]](names) == (in_network or names[0] == "aspp"), names


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
        params = jax.jit(model.init)(jax.random.key(0), images)
        loss = jax.jit(jax.value_and_grad(lambda p, m=model: m.apply(p, images).logits.sum()))
        found.append(loss(params))
    values, gradients = zip(*found, strict=True)
    assert float(values[0]) == pytest.approx(float(values[1]), rel=1e-5)
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a) + 1e-6


def test_bfloat16_is_only_computed_in():
    """Parameters and results stay float32, and the results are near those of float32."""
    config = make_config(width=4, norm="group", aspp_rates=(1, 2), features=8)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(1, 17, 17, 3)).astype(np.float32)
    exact, half = (models.build(config, 3, 6, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    shapes = jax.eval_shape(half.init, jax.random.key(0), images)

    def made(path, x):  # kernels that keep the size of what they are given
        spread = np.prod(x.shape[:-1]) ** -0.5 if x.ndim > 1 else 0.1
        scale = path[-1].key == "scale"
        return (scale + rng.normal(0, spread, x.shape)).astype(x.dtype)

    variables = jax.tree_util.tree_map_with_path(made, shapes)
    output = jax.jit(half.apply)(variables, images)
    assert {leaf.dtype for leaf in jax.tree.leaves((shapes, output))} == {jnp.float32.dtype}
    error = np.abs(output.features - jax.jit(exact.apply)(variables, images).features)
    assert 0 < error.max() < 0.05 and np.std(output.features) > 0.05


@pytest.mark.parametrize("change", [{"depth": 20}, {"norm": "batch"}, {"head": "mlp"}])
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
    loss = jax.jit(jax.grad(lambda z, p: (squared_distances(z, p) * weights).sum(), (0, 1)))
    gradients = loss(z, p)
    np.testing.assert_allclose(gradients[0], expected_z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients[1], expected_p, rtol=1e-4, atol=1e-5)


def test_last_layer_starts_at_one_and_minus_a_half():
    classes = equal_blocks(6, 3)
    assert classes.tolist() == [0, 0, 1, 1, 2, 2]
    w_h = np.asarray(class_connections(classes, 3))
    for j, c in enumerate(classes):
        assert w_h[j].tolist() == [1.0 if k == c else -0.5 for k in range(3)]


ELSEWHERE = """
from flax import linen as nn

from protoseg_jax.models.preprocessing import Preprocessing

GROUPS = {"stem": lambda path: path[-1] == "kernel", "neck": lambda path: False}
PREPROCESSING = {"halves": Preprocessing((128.0,) * 3, (64.0,) * 3)}


def build(config, channels, dtype):
    return nn.Conv(config.width, (3, 3), strides=(4, 4)), nn.Dense(channels)
"""


def test_a_backbone_from_outside_the_package(tmp_path, monkeypatch):
    """One module anywhere, by its dotted path: groups, decay and preprocessing are its own."""
    folder = tmp_path / "nets_elsewhere"
    folder.mkdir()
    (folder / "tiny.py").write_text(ELSEWHERE)
    (folder / "one.py").write_text(ELSEWHERE.replace(', "neck": lambda path: False', ""))
    (folder / "none.py").write_text("GROUPS = {}")
    (folder / "broken.py").write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    config = configs.default()
    config.eval_size = (16, 24)
    config.model = make_config(backbone="nets_elsewhere.tiny", width=5, preprocessing="halves")
    inference = inferences.from_config(config, 3, [0, 0, 1, 2])
    assert inference.feature_size == (4, 6) and inference.num_prototypes == 4
    assert hash(inference) == hash(inferences.from_config(config, 3, [0, 0, 1, 2]))
    images = np.full((1, 16, 24, 3), 192, np.uint8)
    assert (inference.preprocessing.normalise(images) == 1).all()
    variables = jax.eval_shape(inference.model.init, jax.random.key(0), images)
    assert set(variables["params"]) == {"stem", "neck", "prototypes", "head"}
    assert jax.eval_shape(inference, variables, images).logits.shape == (1, 4, 6, 3)
    assert models.groups(config.model) == ("stem", "neck")
    rules = models.decay(config.model)
    decayed = [rules[g]((g, "kernel")) for g in ("stem", "neck", "prototypes", "head")]
    assert decayed == [True, False, False, False]
    for name, words in (
        ("one", "GROUPS"),
        ("none", "has no 'build'"),
        ("broken", "does not import"),
        ("absent", "choose one of efficientnet, resnet, unet"),
    ):
        config.model.backbone = f"nets_elsewhere.{name}"
        with pytest.raises(UserError, match=words):
            inferences.from_config(config, 3, [0, 1])


def test_unknown_preprocessing_is_refused():
    with pytest.raises(UserError, match="'paint' is unknown; choose from .'caffe', 'data', 'imag"):
        preprocessing.from_config(make_config(preprocessing="paint"))
    measured = make_config(preprocessing="data", mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    assert preprocessing.from_config(measured).padding_colour == (1, 2, 3)
    assert preprocessing.KNOWN["caffe"].padding_colour == (123, 117, 104)


UNET = {"backbone": "unet", "depth": 1, "width": 4, "output_stride": 1, "features": 8}


def with_anchors(number, method="outputs", **changes):
    """(the output, the backbone's maps, the model and its variables) of a U-Net, which has two."""
    model = models.build(make_config(**UNET, anchors=number, **changes), 2, 4, jnp.float32)
    images = jax.random.normal(jax.random.key(1), (2, 16, 24, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    apply = jax.jit(model.apply, static_argnames="method")
    maps = apply(variables, images, method="encode")
    seen = maps if method == "outputs_of" else images
    return apply(variables, seen, method=method)[0], maps, (model, variables, images)


@pytest.mark.parametrize("method", ["outputs", "outputs_of"])
@pytest.mark.parametrize("number", [0, 1, -1])
def test_anchors_are_in_a_map_of_the_backbone_standardised(number, method):
    output, maps, (_, variables, _) = with_anchors(number, method)
    anchors = np.asarray(variables["params"]["anchors"]["vectors"], np.float64)
    x = np.asarray(maps[number], np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    assert anchors.shape == (4, x.shape[-1]) and output.apart.shape == (2, 16, 24, 4)
    at = [(0, 0, x[1, 0, 0])]
    if x.shape[1:3] != (16, 24):  # half as large: bilinear between its points
        at.append((0, 1, 0.75 * x[1, 0, 0] + 0.25 * x[1, 0, 1]))
    for row, col, t in at:
        literal = [np.mean((t - q) ** 2) for q in anchors]
        np.testing.assert_allclose(output.apart[1, row, col], literal, atol=1e-3)


def test_anchors_move_nothing_else_and_inference_does_not_look_at_them():
    _, _, (model, variables, images) = with_anchors(0)
    total = jax.grad(lambda v: model.apply(v, images, method="outputs")[0].apart.sum())
    gradient = jax.jit(total)(variables)
    moved = {
        group for group, x in gradient["params"].items() if any(map(np.any, jax.tree.leaves(x)))
    }
    assert moved == {"anchors"}
    assert jax.eval_shape(model.apply, variables, images).apart is None


def test_a_map_for_anchors_that_there_is_not_is_refused():
    with pytest.raises(UserError, match=r"none of the backbone's 2 map\(s\)"):
        with_anchors(2)
    with pytest.raises(UserError, match="does not go with model.msc"):
        with_anchors(0, msc=(0.5,))
