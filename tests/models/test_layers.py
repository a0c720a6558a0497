"""Convolutions, pooling, norms and the ASPP against literal NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from protoseg_jax.models import depthwise, layers
from protoseg_jax.models.deeplab import ASPP
from protoseg_jax.models.layers import (
    Conv,
    FrozenBatchNorm,
    GroupNorm,
    ceil_pool,
    convolve,
    group_norm,
    halved,
    same_pads,
)
from protoseg_jax.models.resnet import Bottleneck


def literal_convolution(x, kernel, stride, dilation, pads=None):
    """Padding dilation · (k−1)/2 or another, float64, one output point at a time."""
    k, pad = kernel.shape[0], dilation * (kernel.shape[0] - 1) // 2
    pads = pads or ((pad, pad), (pad, pad))
    padded = np.pad(x.astype(np.float64), ((0, 0), *pads, (0, 0)))
    reach = dilation * (k - 1) + 1
    rows = range(0, padded.shape[1] - reach + 1, stride)
    cols = range(0, padded.shape[2] - reach + 1, stride)
    y = np.zeros((len(x), len(rows), len(cols), kernel.shape[3]))
    for i, row in enumerate(rows):
        for j, col in enumerate(cols):
            window = padded[:, row : row + reach : dilation, col : col + reach : dilation]
            y[:, i, j] = np.einsum("bhwi,hwio->bo", window, kernel)
    return y


def literal_kernel_gradient(x, g, k, stride, dilation, pads=None):
    """Of Σ g · y with respect to the kernel, float64, one output point at a time."""
    pad = dilation * (k - 1) // 2
    pads = pads or ((pad, pad), (pad, pad))
    padded = np.pad(x.astype(np.float64), ((0, 0), *pads, (0, 0)))
    total, reach = np.zeros((k, k, x.shape[3], g.shape[3])), dilation * (k - 1) + 1
    for i, j in np.ndindex(*g.shape[1:3]):
        row, col = i * stride, j * stride
        window = padded[:, row : row + reach : dilation, col : col + reach : dilation]
        total += np.einsum("bhwi,bo->hwio", window, g[:, i, j])
    return total


def pulled_back(function, g, *arguments):
    """(the value, the gradients of Σ g · value), compiled at once: op by op takes far longer."""

    def both(g, *arguments):
        value, pull = jax.vjp(function, *arguments)
        return value, pull(g)

    return jax.jit(both)(g, *arguments)


def literal_max_pool(x):
    """PyTorch's ceil mode: windows start at −1, 1, 3, … inside the input or its left padding."""
    sizes = []
    for n in x.shape[1:3]:
        windows = int(np.ceil((n + 2 - 3) / 2)) + 1
        sizes.append(windows if (windows - 1) * 2 < n + 1 else windows - 1)
    y = np.zeros((len(x), *sizes, x.shape[3]), x.dtype)
    for i, j in np.ndindex(*sizes):
        window = x[:, max(2 * i - 1, 0) : 2 * i + 2, max(2 * j - 1, 0) : 2 * j + 2]
        y[:, i, j] = window.max((1, 2))
    return y


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 3), (4, 5), (6, 7), (8, 9)])
def test_max_pool_is_the_literal_one(size):
    # Negative everywhere: padding by zeros would win.
    x = -np.random.default_rng(0).uniform(1, 2, (2, *size, 3)).astype(np.float32)
    np.testing.assert_array_equal(ceil_pool(x), literal_max_pool(x))


@pytest.mark.parametrize("pool", [ceil_pool, halved])
def test_pooling_gives_the_gradient_to_the_first_of_equal_values(pool):
    """Against XLA's own pooling, on maps that are often equal, and of odd size."""
    x = np.random.default_rng(0).integers(0, 3, (2, 9, 12, 3)).astype(np.float32)
    size, pads = (3, [(1, 1), (1, 2)]) if pool is ceil_pool else (2, [(0, 1), (0, 0)])

    def theirs(x):
        return nn.max_pool(x, (size, size), strides=(2, 2), padding=pads)

    shape = jax.eval_shape(pool, x).shape
    g = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    (got, pulled), (expected, pulled_theirs) = (pulled_back(f, g, x) for f in (pool, theirs))
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(pulled[0], pulled_theirs[0])


@pytest.mark.parametrize("size", [(9, 12), (10, 7)])
@pytest.mark.parametrize(
    ("k", "stride", "dilation"), [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 4), (7, 2, 1)]
)
def test_convolution_is_the_literal_one(size, k, stride, dilation):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 3)).astype(np.float32)
    kernel = rng.normal(size=(k, k, 3, 4)).astype(np.float32)
    expected = literal_convolution(x, kernel, stride, dilation)
    got = jax.jit(Conv(4, k, stride, dilation).apply)({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "k", "stride", "dilation", "expected"),
    [
        (224, 3, 2, 1, (0, 1)),
        (225, 3, 2, 1, (1, 1)),
        (56, 5, 2, 1, (1, 2)),
        (7, 5, 1, 2, (4, 4)),
        (9, 1, 2, 1, (0, 0)),
    ],
)
def test_tensorflows_padding(n, k, stride, dilation, expected):
    assert same_pads((1, n, n + 1, 3), k, stride, dilation)[0] == expected


SYMMETRIC = [
    (1, 1, 1),
    (1, 2, 1),
    (3, 1, 1),
    (3, 2, 1),
    (3, 2, 2),
    (3, 1, 4),
    (3, 1, 11),
    (7, 2, 1),
]


@pytest.mark.parametrize("strip", [1, 1 << 17])
@pytest.mark.parametrize(
    ("k", "stride", "dilation", "same"),
    [*((*how, False) for how in SYMMETRIC), (3, 2, 1, True), (7, 3, 1, True)],
)
def test_every_form_of_a_kernels_gradient_is_the_literal_one(
    monkeypatch, k, stride, dilation, same, strip
):
    """In strips of a row or two, the last one not full, or of the whole map; taps outside it."""
    monkeypatch.setattr(layers, "_STRIP", strip)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 12, 6)).astype(np.float32)
    kernel = rng.normal(size=(k, k, 6, 4)).astype(np.float32)
    pad = dilation * (k - 1) // 2
    pads = same_pads(x.shape, k, stride, dilation) if same else ((pad, pad), (pad, pad))
    conv = Conv(4, k, stride, dilation, same)
    literal = literal_convolution(x, kernel, stride, dilation, pads)
    g = rng.normal(size=literal.shape).astype(np.float32)
    y, pulled = pulled_back(lambda kernel: conv.apply({"params": {"kernel": kernel}}, x), g, kernel)
    np.testing.assert_allclose(y, literal, rtol=1e-4, atol=1e-4)
    expected = literal_kernel_gradient(x, g, k, stride, dilation, pads)
    how = {"size": k, "stride": stride, "dilation": dilation, "pads": pads}
    forms = [layers._by_strips, layers._by_transposition]
    forms += [layers._by_phases] if stride == 1 else []
    found = jax.jit(lambda x, g: [form(x, g, **how) for form in forms])(x, g)
    for got in (*pulled, *found):
        assert got.shape == kernel.shape
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "strip"), [((9, 12), 1), ((10, 7), 1 << 16)], ids=str)
@pytest.mark.parametrize(
    ("k", "stride", "dilation"), [(3, 1, 1), (5, 2, 1), (5, 1, 2), (3, 3, 2), (3, 1, 11)]
)
def test_every_form_of_a_depthwise_convolution_is_the_literal_one(
    monkeypatch, k, stride, dilation, size, strip
):
    """Each channel is a convolution of its own; both gradients, ours and XLA's."""
    monkeypatch.setattr(depthwise, "_STRIP", strip)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 3)).astype(np.float32)
    kernel = rng.normal(size=(k, k, 1, 3)).astype(np.float32)
    pads = same_pads(x.shape, k, stride, dilation)
    parts = [(x[..., [c]], kernel[..., [c]]) for c in range(3)]
    expected = np.concatenate(
        [literal_convolution(a, b, stride, dilation, pads) for a, b in parts], 3
    )
    g = rng.normal(size=expected.shape).astype(np.float32)
    channels = [(a, b, g[..., [c]]) for c, (a, b) in enumerate(parts)]
    of_kernel = np.concatenate(
        [literal_kernel_gradient(a, c, k, stride, dilation, pads) for a, _, c in channels], 3
    )
    how = {"stride": stride, "dilation": dilation}

    @jax.jit
    def every_form(x, kernel, g):
        got, pull = jax.vjp(
            lambda *a: depthwise.convolve_depthwise(*a, stride, dilation), x, kernel
        )
        grouped = depthwise._grouped(x, kernel, **how)
        of_kernel = depthwise._grouped_dk(x, g, size=k, **how)
        of_x = depthwise._grouped_dx(g, kernel, shape=x.shape, **how)
        return got, *pull(g), grouped, of_kernel, of_x

    got, of_x, *found = every_form(x, kernel, g)
    pairs = zip((got, *found), (expected, of_kernel, expected, of_kernel, of_x), strict=True)
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    # The convolution is linear in x: ⟨g, f(v)⟩ = ⟨∂x, v⟩ for every v.
    v = rng.normal(size=x.shape).astype(np.float32)
    along = sum(
        (c * literal_convolution(v[..., [n]], b, stride, dilation, pads)).sum()
        for n, (_, b, c) in enumerate(channels)
    )
    assert float((of_x * v).sum()) == pytest.approx(along, rel=1e-3, abs=1e-3)


def test_a_convolution_differentiates_what_is_asked_for_alone():
    x, kernel = jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 3))
    step = [jax.grad(lambda x, k: convolve(x, k).sum(), which) for which in (0, 1)]
    of_x, of_kernel = (str(jax.make_jaxpr(f)(x, kernel)) for f in step)
    assert "platform_index" not in of_x and "transpose" not in of_x.replace("_transpose", "")
    assert "platform_index" in of_kernel


def test_a_kernels_gradient_is_summed_in_float32():
    """Two thousand ones and a half are 2000.5, which bfloat16 does not have."""
    x = jnp.ones((1, 23, 87, 1), jnp.bfloat16).at[0, 0, 0].set(0.5)
    total = jax.jit(jax.grad(lambda k: convolve(x, k).astype(jnp.float32).sum()))
    got = total(jnp.ones((1, 1, 1, 1)))
    assert got.dtype == jnp.float32 and float(got[0, 0, 0, 0]) == 2000.5


@pytest.mark.parametrize("size", [(9, 12), (3, 20)])
def test_aspp_is_the_sum_of_its_convolutions(size):
    """Rates that reach inside the map, past its height, and past all of it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 5)).astype(np.float32)
    aspp = ASPP(4, rates=(1, 6, 30))
    params = jax.eval_shape(aspp.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    expected = sum(
        literal_convolution(x, params[name]["kernel"], 1, rate) + params[name]["bias"]
        for name, rate in [("c0", 1), ("c1", 6), ("c2", 30)]
    )
    got = jax.jit(aspp.apply)({"params": params}, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_initial_kernels():
    x, key = jnp.zeros((1, 2, 2, 64)), jax.random.key(0)
    conv = jax.jit(Conv(128, 3).init)(key, x)["params"]["kernel"]
    assert float(conv.std()) == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.02)
    branch = jax.jit(ASPP(64, rates=(1,)).init)(key, x)["params"]["c0"]
    assert float(branch["kernel"].std()) == pytest.approx(0.01, rel=0.02)
    assert not branch["bias"].any()


def test_group_norm_is_the_literal_one():
    x = np.random.default_rng(0).normal(3, 2, size=(2, 4, 5, 48)).astype(np.float32)
    params = {"scale": np.arange(48.0, dtype=np.float32), "bias": np.ones(48, np.float32)}
    got = np.asarray(jax.jit(GroupNorm().apply)({"params": params}, x))
    for image in range(2):
        for first in (0, 16, 32):
            own = slice(first, first + 16)
            group = x[image, :, :, own]
            expected = (group - group.mean()) / np.sqrt(group.var() + 1e-5)
            expected = expected * params["scale"][own] + 1
            np.testing.assert_allclose(got[image, :, :, own], expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_group_norm():
    """Against JAX's, of the literal formula, with a mean far from 0."""

    def literal(x, scale, bias):
        groups = x.reshape(2, 4, 5, 3, 16)
        groups = groups - groups.mean((1, 2, 4), keepdims=True)
        deviation = jnp.sqrt(jnp.square(groups).mean((1, 2, 4), keepdims=True) + 1e-5)
        return (groups / deviation).reshape(x.shape) * scale + bias

    rng = np.random.default_rng(0)
    x = rng.normal(5, 2, (2, 4, 5, 48)).astype(np.float32)
    scale, bias = rng.normal(size=(2, 48)).astype(np.float32)
    g = rng.normal(size=x.shape).astype(np.float32)
    pulled = [pulled_back(f, g, x, scale, bias)[1] for f in (group_norm, literal)]
    for got, expected in zip(*pulled, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


class Convolved(nn.Module):
    @nn.compact
    def __call__(self, x):
        return FrozenBatchNorm(name="norm")(Conv(3, 3, name="conv"), x)


def test_frozen_batch_norm_is_affine_and_not_a_parameter():
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 4)).astype(np.float32)
    convolved = Convolved()
    variables = jax.jit(convolved.init)(jax.random.key(0), x)
    assert set(variables["frozen"]) == {"norm"} and set(variables["params"]) == {"conv"}
    frozen = {"scale": np.array([1.0, 2, 3]), "bias": np.array([4.0, 3, 2])}
    kernel = variables["params"]["conv"]["kernel"]
    expected = literal_convolution(x, kernel, 1, 1) * frozen["scale"] + frozen["bias"]

    def apply(kernel):
        return convolved.apply(
            {"params": {"conv": {"kernel": kernel}}, "frozen": {"norm": frozen}}, x
        )

    np.testing.assert_allclose(jax.jit(apply)(kernel), expected, rtol=1e-5, atol=1e-5)
    # The trained kernel is the unscaled one.
    got = jax.jit(jax.grad(lambda kernel: apply(kernel).sum()))(kernel)
    g = np.ones(expected.shape) * frozen["scale"]
    np.testing.assert_allclose(got, literal_kernel_gradient(x, g, 3, 1, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride_in", ["1x1", "3x3"])
def test_stride_placement_decides_what_a_block_sees(stride_in):
    """A stride in the 1×1 never looks at odd rows and columns; one in the 3×3 does."""
    block = Bottleneck(4, 2, 1, True, stride_in, "frozen_batch", jnp.float32)
    x = jax.random.normal(jax.random.key(0), (1, 9, 9, 8))
    variables = jax.jit(block.init)(jax.random.key(1), x)
    seen = jax.jit(jax.grad(lambda x: block.apply(variables, x).sum()))(x)
    assert bool((seen[:, 1::2] != 0).any()) == (stride_in == "3x3")


class Drawn(nn.Module):
    """One kernel, as Flax's own initialiser draws it."""

    initializer: object
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        return self.param("kernel", self.initializer, self.shape)


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (
            layers.Conv(8, 3),
            nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            (3, 3, 4, 8),
        ),
        (depthwise.DepthwiseConv(4, 3), nn.initializers.he_normal(), (3, 3, 1, 4)),
    ],
    ids=["conv", "depthwise"],
)
def test_kernels_start_with_the_library_s_numbers(ours, theirs, shape):
    """Ours are drawn as vectors."""
    key, x = jax.random.key(3), jnp.zeros((1, 4, 4, 4))
    got, expected = (m.init(key, x)["params"]["kernel"] for m in (ours, Drawn(theirs, shape)))
    assert got.shape == shape
    np.testing.assert_allclose(got, expected, rtol=1e-6)
