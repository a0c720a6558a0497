"""Depthwise convolution: each channel with a kernel of its own.

GPUs are given XLA's grouped convolution, for which cuDNN has kernels. On a CPU XLA's runs a channel
at a time, at a hundredth of the machine's rate; sums of shifted maps, which it fuses into one pass,
do not. So there the convolution, and its gradient with respect to x, are such sums, and the
kernel's gradient goes over strips of rows that stay in a core's cache. What is not differentiated,
images or a frozen kernel, costs nothing.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from protoseg_jax.models.layers import by_platform, flat, same_pads, sum_over_strips, taps, wanted

_STRIP = 1 << 16  # numbers of a strip of x: 256 KiB
_CUT = 0.87962566103423978  # deviation of a standard normal within ±2: LeCun and He are cut there


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve_depthwise(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], stride: int = 1, dilation: int = 1
) -> Float[Array, "b H W c"]:
    """y[…, c] = x[…, c] ⋆ kernel[…, c], padded by `layers.same_pads`, in the dtype of x."""
    return by_platform(_by_taps, _grouped, x, kernel, stride=stride, dilation=dilation)


def _depthwise_fwd(x, kernel, stride, dilation):
    x, kernel, asked = x.value, kernel.value, wanted(x, kernel)
    return convolve_depthwise(x, kernel, stride, dilation), (x, kernel, asked)


def _depthwise_bwd(stride, dilation, kept, g):
    x, kernel, asked = kept
    how = {"stride": stride, "dilation": dilation}
    dx = dkernel = None
    if asked[0] is not None:
        dx = by_platform(_dx, _grouped_dx, g, kernel, shape=x.shape, **how)
    if asked[1] is not None:
        dkernel = by_platform(_dk, _grouped_dk, x, g, size=kernel.shape[0], **how)
    return dx, dkernel


convolve_depthwise.defvjp(_depthwise_fwd, _depthwise_bwd, symbolic_zeros=True)


# -- XLA's ---------------------------------------------------------------------------------------


def _grouped(x, kernel, *, stride, dilation):
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        "SAME",
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3],
    )


def _grouped_dx(g, kernel, *, shape, **how):
    x = jnp.zeros(shape, g.dtype)
    return jax.linear_transpose(lambda x: _grouped(x, kernel, **how), x)(g)[0]


def _grouped_dk(x, g, *, size, **how):
    kernel = jnp.zeros((size, size, 1, x.shape[3]))
    return jax.linear_transpose(lambda kernel: _grouped(x, kernel, **how), kernel)(g)[0]


# -- ours ----------------------------------------------------------------------------------------


def _by_taps(x, kernel, *, stride, dilation):
    size, (rows, cols) = kernel.shape[0], (-(-n // stride) for n in x.shape[1:3])
    x = jnp.pad(x, [(0, 0), *same_pads(x.shape, size, stride, dilation), (0, 0)])
    kernel = kernel.astype(x.dtype).reshape(size * size, -1)
    seen = taps(x, rows, cols, size, stride, dilation)
    return sum(tap * k for tap, k in zip(seen, kernel, strict=True))


def _dx(g, kernel, *, shape, stride, dilation):
    """Points of one place modulo the stride have the same taps: each such phase is a sum of shifted
    g, and the phases are put together."""
    size, sizes = kernel.shape[0], shape[1:3]
    before = [pad[0] for pad in same_pads(shape, size, stride, dilation)]
    cells = [-(-(n + b) // stride) for n, b in zip(sizes, before, strict=True)]  # of each phase
    lead = dilation * (size - 1) // stride
    after = [max(n - m, 0) for n, m in zip(cells, g.shape[1:3], strict=True)]
    g = jnp.pad(g, [(0, 0), *((lead, a) for a in after), (0, 0)])
    kernel = kernel.astype(g.dtype)

    def phase(place):
        total = jnp.zeros((len(g), *cells, g.shape[3]), g.dtype)
        for tap in itertools.product(range(size), repeat=2):
            away = [t * dilation - p for t, p in zip(tap, place, strict=True)]
            if all(a % stride == 0 for a in away):
                row, col = (lead - a // stride for a in away)
                total += g[:, row : row + cells[0], col : col + cells[1]] * kernel[*tap, 0]
        return total

    places = itertools.product(range(stride), repeat=2)
    whole = jnp.stack([phase(place) for place in places])
    whole = whole.reshape(stride, stride, len(g), *cells, -1)
    whole = whole.transpose(2, 3, 0, 4, 1, 5)  # b, row, its place, column, its place, c
    whole = whole.reshape(len(g), cells[0] * stride, cells[1] * stride, -1)
    return whole[:, before[0] : before[0] + sizes[0], before[1] : before[1] + sizes[1]]


def _dk(x, g, *, size, stride, dilation):
    """Over strips of rows, of what each tap sees the product with g, summed in float32."""
    width, c = x.shape[2:]
    pads = same_pads(x.shape, size, stride, dilation)

    def of_strip(seen, own):
        return jnp.stack([(own * tap).sum(1, dtype=jnp.float32).sum((0, 1)) for tap in seen])

    most = _STRIP // (width * c * stride)
    total = sum_over_strips(of_strip, (size * size, c), most, x, g, size, stride, dilation, pads)
    return total.reshape(size, size, 1, c)


class DepthwiseConv(nn.Module):
    """`convolve_depthwise` with a kernel of its own, which a frozen norm may scale by channel.

    Attributes:
      channels: of input and output.
      size: k, odd.
      stride: step between windows.
      dilation: step between a window's taps.
      dtype: dtype of the computation; parameters are float32.
    """

    channels: int
    size: int
    stride: int = 1
    dilation: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], scale: Float[Array, " c"] | float = 1.0
    ) -> Float[Array, "b H W c"]:
        shape = (self.size, self.size, 1, self.channels)
        he_normal = flat(nn.initializers.truncated_normal(math.sqrt(2 / self.size**2) / _CUT))
        kernel = self.param("kernel", he_normal, shape) * scale
        return convolve_depthwise(x.astype(self.dtype), kernel, self.stride, self.dilation)
