"""U-Net: sizes, groups, twin; the same numbers as a PyTorch U-Net with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protoseg_jax import config as configs
from protoseg_jax import models
from protoseg_jax.errors import UserError
from protoseg_jax.models.unet import UpConv


def make_config(**changes):
    config = configs.default().model
    settings = {"backbone": "unet", "depth": 3, "width": 16, "output_stride": 1, "features": 8}
    config.update({**settings, **changes})
    return config


def shapes(size, **changes):
    model = models.build(make_config(**changes), 2, 20, jnp.float32)
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), images)


@pytest.mark.parametrize("size", [(512, 512), (45, 61), (32, 33), (9, 8)])
@pytest.mark.parametrize("stride", [1, 4])
def test_the_map_is_as_large_as_the_image_over_the_stride(size, stride):
    output, _ = shapes(size, output_stride=stride)
    points = tuple(-(-n // stride) for n in size)
    assert output.features.shape == (2, *points, 8)
    assert output.distances.shape == (2, *points, 20)
    assert output.logits.shape == (2, *points, 2)


def test_parameter_groups_and_the_twin():
    _, variables = shapes((32, 32))
    assert set(variables) == {"params"}
    assert set(variables["params"]) == {"backbone", "decoder", "prototypes", "head"}
    assert models.groups(make_config()) == ("backbone", "decoder")
    output, twin = shapes((32, 32), head="linear")
    assert set(twin["params"]) == {"backbone", "decoder"}
    assert twin["params"]["decoder"]["out"]["kernel"].shape == (16, 2)
    assert output.distances is None and output.logits.shape == (2, 32, 32, 2)
    # Levels above the output's stride do not exist.
    _, coarse = shapes((32, 32), output_stride=4)
    assert set(coarse["params"]["decoder"]) == {"out", "up2", "up_conv2"}


def test_original_size():
    """Depth 4 and width 64: the original's 31.0 M parameters (its biases apart)."""
    _, variables = shapes((64, 64), depth=4, width=64, head="linear")
    count = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
        if path[-1].key == "kernel"
    )
    encoder = [(3, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]
    expected = sum(9 * (i * o + o * o) for i, o in encoder)
    expected += sum(4 * 2 * o * o + 9 * (2 * o * o + o * o) for o in (64, 128, 256, 512)) + 64 * 2
    assert count == expected


def test_up_convolution_is_one_block_a_point():
    """Output (2i + y, 2j + x) is input (i, j) times the tap (y, x)."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 3, 4, 5)), rng.normal(size=(5, 4 * 6))
    got = UpConv(6, jnp.float32).apply({"params": {"taps": {"kernel": kernel}}}, x)
    taps = kernel.reshape(5, 2, 2, 6)
    expected = np.zeros((1, 6, 8, 6))
    for i, j, dy, dx in np.ndindex(3, 4, 2, 2):
        expected[0, 2 * i + dy, 2 * j + dx] = x[0, i, j] @ taps[:, dy, dx]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_rematerialisation_changes_nothing():
    images = jax.random.normal(jax.random.key(1), (1, 20, 24, 3))
    gradients = []
    for remat in (False, True):
        model = models.build(make_config(depth=2, remat=remat), 2, 4, jnp.float32)
        params = jax.jit(model.init)(jax.random.key(0), images)
        loss = jax.jit(jax.grad(lambda p, m=model: m.apply(p, images).logits.sum()))
        gradients.append(loss(params))
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a) + 1e-5


@pytest.mark.parametrize("change", [{"depth": 0}, {"output_stride": 3}, {"output_stride": 16}])
def test_unknown_settings_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        models.build(make_config(**change), 2, 4, jnp.float32)


@pytest.mark.parity
@pytest.mark.parametrize(("size", "stride"), [((64, 48), 1), ((45, 61), 1), ((45, 61), 4)])
def test_beside_pytorch(size, stride):
    """Outputs and input gradients of a U-Net written in PyTorch, made-up weights."""
    torch = pytest.importorskip("torch")
    from torch.nn import functional as F

    from tests.models.torch_counterpart import nchw, nhwc

    rng = np.random.default_rng(0)
    model = models.build(make_config(output_stride=stride), 2, 6, jnp.float32)
    images = rng.normal(size=(2, *size, 3)).astype(np.float32)
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), images))
    params = jax.tree.map(  # not zero, not one: every bias and scale counts
        lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), variables["params"]
    )

    def oihw(kernel):
        return torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))

    def double_conv(x, p):
        for n in (1, 2):
            kernel = oihw(p[f"conv{n}"]["kernel"])
            x = F.conv2d(x, kernel, padding=1)
            scale, bias = (torch.from_numpy(p[f"norm{n}"][k]) for k in ("scale", "bias"))
            x = F.relu(F.group_norm(x, max(1, x.shape[1] // 16), scale, bias))
        return x

    x = first = nchw(images).requires_grad_()
    skips, encoder, decoder = [], params["backbone"], params["decoder"]
    for level in range(4):
        if level:
            x = F.max_pool2d(x, 2, ceil_mode=True)
        x = double_conv(x, encoder[f"down{level}"])
        skips.append(x)
    for level in (2, 1, 0):
        if 2**level < stride:
            break
        taps = decoder[f"up_conv{level}"]["taps"]["kernel"]
        kernel = taps.reshape(len(taps), 2, 2, -1).transpose(0, 3, 1, 2)
        x = F.conv_transpose2d(x, torch.from_numpy(np.ascontiguousarray(kernel)), stride=2)
        skip = skips[level]
        x = torch.cat([skip, x[:, :, : skip.shape[2], : skip.shape[3]]], 1)
        x = double_conv(x, decoder[f"up{level}"])
    out = torch.from_numpy(decoder["out"]["kernel"].T[:, :, None, None].copy())
    features = torch.sigmoid(F.conv2d(x, out, torch.from_numpy(decoder["out"]["bias"])))
    weights = rng.normal(size=nhwc(features).shape).astype(np.float32)
    (features * nchw(weights)).sum().backward()

    def loss(x):
        features = model.apply({"params": params}, x).features
        return (features * weights).sum(), features

    (_, got), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(images)
    np.testing.assert_allclose(got, nhwc(features), rtol=0, atol=2e-5)
    expected = nhwc(first.grad)
    assert np.abs(gradient - expected).max() <= 1e-3 * np.abs(expected).max()
