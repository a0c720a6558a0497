"""Convolution and pooling with PyTorch's padding rules, so that ported weights agree; GroupNorm."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

_STRIP = 1 << 17  # numbers of a strip's shifted copies: 512 KiB, which stay in a core's cache


def flat(initializer: Callable) -> Callable:
    """The same numbers of a Flax initializer that looks at no shape, drawn as a vector: a draw of
    four axes takes XLA's CPU compiler two seconds, a network's half a minute; a vector's a third of
    a second.
    """

    def draw(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return initializer(key, (math.prod(shape),), dtype).reshape(shape)

    return draw


def he_normal_fan_out(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """torchvision's from-scratch initialisation of a kernel [k k in out]: N(0, 2 / (k² · out))."""
    fan_out = math.prod(shape) / shape[-2]
    return flat(nn.initializers.normal(math.sqrt(2 / fan_out)))(key, shape, dtype)


def is_kernel(path: tuple[str, ...]) -> bool:
    """The rule of weight decay that most groups of parameters have: kernels alone."""
    return path[-1] == "kernel"


# Zeros before and after the rows, and the columns.
Pads = tuple[tuple[int, int], tuple[int, int]]


def same_pads(shape: tuple[int, ...], size: int, stride: int, dilation: int = 1) -> Pads:
    """TensorFlow's padding "SAME" of maps [b h w c]: as little as makes ⌈n / stride⌉ windows of n
    points, an odd one after them."""
    pads = []
    for n in shape[1:3]:
        windows, reach = -(-n // stride), dilation * (size - 1) + 1
        zeros = max((windows - 1) * stride + reach - n, 0)
        pads.append((zeros // 2, zeros - zeros // 2))
    return tuple(pads)


def convolve(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "k k i o"],
    stride: int = 1,
    dilation: int = 1,
    pads: Pads | None = None,
) -> Float[Array, "b H W o"]:
    """Cross-correlation in the dtype of x, zero-padded as in PyTorch by dilation · (k−1)/2 on each
    side, or by `pads`.

    The gradient with respect to x is XLA's, that of the kernel our own. XLA makes a convolution of
    it, whose kernel is a whole map. On a CPU that is slow; a sum of matmuls over strips of rows is
    not. Elsewhere, where the forward convolution is dilated, that convolution's windows would have
    a stride, and nothing turns it back into the filter gradient that cuDNN has: a GPU would run a
    65×65 convolution. So points of one phase (their place modulo the dilation), which alone see
    each other, become an image of their own, and the gradient one of an undilated convolution.

    The kernel is float32. What is not differentiated, images or a frozen kernel, costs nothing.
    """
    pad = dilation * (kernel.shape[0] - 1) // 2
    return _convolve(x, kernel, stride, dilation, pads or ((pad, pad), (pad, pad)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(x, kernel, stride, dilation, pads):
    return _forward(x, kernel, stride, dilation, pads)


def _forward(x, kernel, stride, dilation, pads):
    kernel, size = kernel.astype(x.dtype), kernel.shape[0]
    if size == 1:  # a matmul: the same numbers, and on a CPU a faster gradient of x
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _convolve_fwd(x, kernel, stride, dilation, pads):
    x, kernel, asked = x.value, kernel.value, wanted(x, kernel)
    return _forward(x, kernel, stride, dilation, pads), (x, kernel, asked)


def _convolve_bwd(stride, dilation, pads, kept, g):
    x, kernel, asked = kept
    dx = dkernel = None
    if asked[0] is not None:
        (dx,) = jax.linear_transpose(lambda x: _forward(x, kernel, stride, dilation, pads), x)(g)
    if asked[1] is not None:
        elsewhere = _by_phases if dilation > 1 and stride == 1 else _by_transposition
        how = {"size": kernel.shape[0], "stride": stride, "dilation": dilation, "pads": pads}
        dkernel = by_platform(_by_strips, elsewhere, x, g, **how)
    return dx, dkernel


def wanted(*arguments) -> list[tuple | None]:
    """What is to be differentiated of a custom gradient's arguments, with symbolic zeros: it
    travels in a tree's structure, () for yes, None for no."""
    return [() if argument.perturbed else None for argument in arguments]


def by_platform(on_cpu: Callable, elsewhere: Callable, *arrays: Array, **how: Any) -> Array:
    """One of two forms of the same function of arrays, with settings."""
    forms = [functools.partial(form, **how) for form in (on_cpu, elsewhere)]
    return jax.lax.platform_dependent(*arrays, cpu=forms[0], default=forms[1])


_convolve.defvjp(_convolve_fwd, _convolve_bwd, symbolic_zeros=True)


def _by_transposition(x, g, *, size, stride, dilation, pads) -> Float[Array, "k k i o"]:
    """The kernel's gradient as XLA makes it."""
    kernel = jnp.zeros((size, size, x.shape[3], g.shape[3]))
    return jax.linear_transpose(lambda k: _forward(x, k, stride, dilation, pads), kernel)(g)[0]


def _by_phases(x, g, *, size, stride, dilation, pads) -> Float[Array, "k k i o"]:
    """The kernel's gradient as that of an undilated convolution over dilation² times the images."""
    assert stride == 1
    (top, _), (left, _) = pads
    cells = [-(-n // dilation) for n in g.shape[1:3]]  # of each phase

    def phases(y, before: tuple[int, int], more: int):
        sizes = [n + more for n in cells]
        whole = [n * dilation for n in sizes]
        after = [n - b - m for n, b, m in zip(whole, before, y.shape[1:3], strict=True)]
        y = jnp.pad(y, [(0, 0), *zip(before, after, strict=True), (0, 0)])
        y = y.reshape(len(y), sizes[0], dilation, sizes[1], dilation, -1)
        return y.transpose(2, 4, 0, 1, 3, 5).reshape(-1, *sizes, y.shape[5])

    # Else XLA may make the phases of x where it makes x, and keep them until the backward pass.
    x, g = jax.lax.optimization_barrier((x, g))
    kernel = jnp.zeros((size, size, x.shape[3], g.shape[3]), x.dtype)
    images, numbers = phases(x, (top, left), size - 1), ("NHWC", "HWIO", "NHWC")

    def forward(kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "VALID", dimension_numbers=numbers
        )

    return jax.linear_transpose(forward, kernel)(phases(g, (0, 0), 0))[0].astype(jnp.float32)


def _by_strips(x, g, *, size, stride, dilation, pads) -> Float[Array, "k k i o"]:
    """The kernel's gradient as one matmul a strip of rows, over what all taps see, side by side.

    A strip has as many points as keep these k² copies of x in the cache, but, since the sum is read
    and written for each strip, at least four times as many as x has channels. One matmul of a whole
    map, for a 1×1 kernel, is no better: XLA transposes x for it, and to do so computes x anew, in a
    ResNet the sums of all blocks before.
    """
    (channels, out), cols, columns = (x.shape[3], g.shape[3]), g.shape[2], size * size * x.shape[3]
    points = max(_STRIP // columns, 4 * channels)

    def of_strip(seen, own):
        copies = jnp.concatenate(seen, 3).reshape(-1, columns)
        return jnp.matmul(own.reshape(-1, out).T, copies, preferred_element_type=jnp.float32)

    total = sum_over_strips(
        of_strip, (out, columns), points // cols, x, g, size, stride, dilation, pads
    )
    return total.T.reshape(size, size, channels, out)


def sum_over_strips(
    of_strip: Callable[[list, Array], Array],
    shape: tuple[int, ...],
    most: int,
    x: Float[Array, "b h w i"],
    g: Float[Array, "b H W o"],
    size: int,
    stride: int,
    dilation: int,
    pads: Pads,
) -> Float[Array, "*shape"]:
    """Σ in float32 of a function over strips of at most so many rows of g, or one: of what each tap
    of a kernel sees of x there, and of g there."""
    (b, height, *_), (_, rows, cols, out), ((top, _), sides) = x.shape, g.shape, pads
    strips = -(-rows // max(1, most))
    deep = -(-rows // strips)
    seen = (deep - 1) * stride + dilation * (size - 1) + 1
    below = (strips * deep - deep) * stride + seen - height - top  # may crop
    widths = [(0, 0, 0), (top, below, 0), (*sides, 0), (0, 0, 0)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), widths)
    g = jnp.pad(g, [(0, 0), (0, strips * deep - rows), (0, 0), (0, 0)])

    def add(number, total):
        image, first = number // strips, number % strips * deep
        part = jax.lax.dynamic_slice(x, (image, first * stride, 0, 0), (1, seen, *x.shape[2:]))
        own = jax.lax.dynamic_slice(g, (image, first, 0, 0), (1, deep, cols, out))
        return total + of_strip(taps(part, deep, cols, size, stride, dilation), own)

    return jax.lax.fori_loop(0, b * strips, add, jnp.zeros(shape))


def taps(x, rows, cols, size, stride, dilation) -> list[Float[Array, "b H W i"]]:
    """What each tap of a kernel sees of padded x, row by row."""
    down, right = (rows - 1) * stride + 1, (cols - 1) * stride + 1
    corners = [n * dilation for n in range(size)]
    return [x[:, r : r + down : stride, c : c + right : stride] for r in corners for c in corners]


class Conv(nn.Module):
    """`convolve` with a kernel of its own, which a frozen norm may scale by output channel.

    Attributes:
      channels: output channels.
      size: k, odd.
      stride: step between windows.
      dilation: step between a window's taps.
      same: whether it is padded as TensorFlow does, `same_pads`, not as PyTorch.
      dtype: dtype of the computation; parameters are float32.
    """

    channels: int
    size: int = 1
    stride: int = 1
    dilation: int = 1
    same: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"], scale: Float[Array, " o"] | float = 1.0
    ) -> Float[Array, "b H W o"]:
        shape = (self.size, self.size, x.shape[-1], self.channels)
        kernel = self.param("kernel", he_normal_fan_out, shape) * scale
        pads = same_pads(x.shape, self.size, self.stride, self.dilation) if self.same else None
        return convolve(x.astype(self.dtype), kernel, self.stride, self.dilation, pads)


class FrozenBatchNorm(nn.Module):
    """BatchNorm with everything fixed: x · scale + bias per channel, from the collection "frozen".

    scale = γ / √(σ² + ε) and bias = β − μ · scale of the ported statistics; initially the identity.
    The scale goes into the kernel of the convolution before it, at every step, so that what is
    trained stays unscaled: a pass over the map is saved, and a GPU adds the bias as it convolves.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, conv: nn.Module, x: Float[Array, "b h w i"]) -> Float[Array, "b H W o"]:
        shape = (conv.channels,)
        scale = self.variable("frozen", "scale", jnp.ones, shape, jnp.float32).value
        bias = self.variable("frozen", "bias", jnp.zeros, shape, jnp.float32).value
        return conv(x, scale) + bias.astype(self.dtype)


class GroupNorm(nn.Module):
    """GroupNorm (Wu & He 2018) of 16 channels a group, trained; for nets trained from scratch."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return group_norm(x.astype(jnp.float32), scale, bias).astype(self.dtype)


@jax.custom_vjp
def group_norm(
    x: Float[Array, "b h w c"], scale: Float[Array, " c"], bias: Float[Array, " c"]
) -> Float[Array, "b h w c"]:
    """(x − μ) / √(σ² + ε) · scale + bias, μ and σ² over a group's channels and all points.

    It and its gradient are x or the output's gradient times a number of each image and channel,
    plus another: one pass over the map each, after that for the sums. Left to JAX it takes three
    times as long on a CPU, a third of the demo's step.
    """
    return _group_norm_fwd(x, scale, bias)[0]


def _sums(x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
    """Over all points; one axis after the other, which a CPU adds up faster than both at once."""
    return x.sum(1).sum(1)[:, None, None]


def _group_means(sums: Float[Array, "b 1 1 c"], points: int) -> Float[Array, "b 1 1 c"]:
    """Each channel's mean over its group, of sums over so many points."""
    (b, *_, c), size = sums.shape, math.gcd(16, sums.shape[3])
    own = sums.reshape(b, 1, 1, c // size, size).mean(4)
    return jnp.repeat(own, size, 3) / points


def _group_norm_fwd(x, scale, bias):
    points = x.shape[1] * x.shape[2]
    mean = _group_means(_sums(x), points)
    factor = (_group_means(_sums(jnp.square(x - mean)), points) + 1e-5) ** -0.5
    return x * (factor * scale) + (bias - mean * factor * scale), (x, mean, factor, scale)


def _group_norm_bwd(kept, g):
    x, mean, factor, scale = kept
    points = x.shape[1] * x.shape[2]
    dscale, dbias = factor * _sums(g * (x - mean)), _sums(g)  # of each image
    slope = factor**2 * _group_means(scale * dscale, points)
    shift = mean * slope - factor * _group_means(scale * dbias, points)
    return g * (factor * scale) - x * slope + shift, dscale.sum((0, 1, 2)), dbias.sum((0, 1, 2))


group_norm.defvjp(_group_norm_fwd, _group_norm_bwd)


NORMS = {"frozen_batch": FrozenBatchNorm, "group": GroupNorm}


def convolved(conv: Conv, norm: nn.Module, x: Float[Array, "b h w i"]) -> Float[Array, "b H W o"]:
    """A convolution of x and its norm, one of `NORMS`."""
    return norm(conv, x) if isinstance(norm, FrozenBatchNorm) else norm(conv(x))


def resize(
    x: Float[Array, "b h w c"], size: tuple[int, int], scale: tuple[float, float]
) -> Float[Array, "b H W c"]:
    """Bilinear, half-pixel centres, no antialiasing: y[i] = x at (i + ½) / scale − ½.

    As `torch.nn.functional.interpolate`: with `scale_factor` the step is exactly 1 / scale whatever
    the size; with `size` the scale is out / in.
    """
    shape, precision = (len(x), *size, x.shape[3]), jax.lax.Precision.HIGHEST
    scale, shift = jnp.array(scale, jnp.float32), jnp.zeros(2)
    return jax.image.scale_and_translate(
        x, shape, (1, 2), scale, shift, "linear", antialias=False, precision=precision
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def max_pool(
    x: Float[Array, "b h w c"], size: int, pads: tuple[tuple[int, int], tuple[int, int]]
) -> Float[Array, "b H W c"]:
    """The largest of each size×size window, two apart; `pads` (before, after) never win.

    Of equal ones the first gets the gradient, as in PyTorch. XLA's own pooling is the same, but on
    a CPU several times slower, its gradient above all: it sorts out the winners by their indices.
    """
    return functools.reduce(jnp.maximum, _windows(x, size, pads))


def _windows(x, size, pads) -> list[Float[Array, "b H W c"]]:
    """What each place of a window sees, row by row; −∞ outside."""
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)], constant_values=-jnp.inf)
    rows, cols = ((n - size) // 2 + 1 for n in x.shape[1:3])
    return taps(x, rows, cols, size, stride=2, dilation=1)


def _max_pool_fwd(x, size, pads):
    y = max_pool(x, size, pads)
    return y, (x, y)


def _max_pool_bwd(size, pads, kept, g):
    x, y = kept
    free, won = jnp.ones(y.shape, bool), []
    for tap in _windows(x, size, pads):
        first = free & (tap == y)
        won.append(jnp.where(first, g, 0))
        free &= ~first
    place = functools.partial(_windows, size=size, pads=pads)
    return jax.linear_transpose(place, x)(won)


max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


def halved(x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
    """2×2 max-pool, stride 2; odd sizes are halved upwards: 45 becomes 23."""
    return max_pool(x, 2, tuple((0, n % 2) for n in x.shape[1:3]))


def ceil_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
    """3×3 max-pool, stride 2, padding 1, ceil mode, as in the Caffe DeepLab.

    H = ⌈(h − 1) / 2⌉ + 1 by ceil mode, one less where the last window would start outside the
    padded input (PyTorch's rule).
    """
    pads = []
    for n in x.shape[1:3]:
        windows = -(-(n - 1) // 2) + 1
        windows -= 2 * (windows - 1) >= n + 1
        pads.append((1, 2 * windows - n))
    return max_pool(x, 3, tuple(pads))
