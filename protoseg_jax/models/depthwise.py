"""Depthwise convolution: each channel with a kernel of its own.

GPUs are given XLA's grouped convolution, for which cuDNN has kernels. On a CPU XLA's runs a channel
at a time, at a hundredth of the machine's rate; sums of shifted maps, which it fuses into one pass,
do not. So there the convolution, and its gradient with respect to x, are such sums, and the
kernel's gradient goes over strips of rows that stay in a core's cache. What is not differentiated,
images or a frozen kernel, costs nothing.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from protoseg_jax.models.layers import same_pads, taps

_STRIP = 1 << 16  # numbers of a strip of x: 256 KiB


def convolve_depthwise(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], stride: int = 1, dilation: int = 1
) -> Float[Array, "b H W c"]:
    """y[…, c] = x[…, c] ⋆ kernel[…, c], padded by `layers.same_pads`, in the dtype of x."""
    pads = same_pads(x.shape, kernel.shape[0], stride, dilation)
    return _depthwise(x, kernel, stride, dilation, pads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _depthwise(x, kernel, stride, dilation, pads):
    how = {"stride": stride, "dilation": dilation, "pads": pads}
    forms = [functools.partial(form, **how) for form in (_by_taps, _grouped)]
    return jax.lax.platform_dependent(x, kernel, cpu=forms[0], default=forms[1])


def _depthwise_fwd(x, kernel, stride, dilation, pads):
    # What is to be differentiated travels in the tree's structure: () for yes, None for no.
    wanted = [() if argument.perturbed else None for argument in (x, kernel)]
    x, kernel = x.value, kernel.value
    return _depthwise(x, kernel, stride, dilation, pads), (x, kernel, wanted)


def _depthwise_bwd(stride, dilation, pads, kept, g):
    x, kernel, wanted = kept
    how = {"stride": stride, "dilation": dilation, "pads": pads}
    dx = dkernel = None
    if wanted[0] is not None:
        forms = [functools.partial(form, **how, shape=x.shape) for form in (_dx, _grouped_dx)]
        dx = jax.lax.platform_dependent(g, kernel, cpu=forms[0], default=forms[1])
    if wanted[1] is not None:
        size = kernel.shape[0]
        forms = [functools.partial(form, **how, size=size) for form in (_dk, _grouped_dk)]
        dkernel = jax.lax.platform_dependent(x, g, cpu=forms[0], default=forms[1])
    return dx, dkernel


_depthwise.defvjp(_depthwise_fwd, _depthwise_bwd, symbolic_zeros=True)


# -- XLA's ---------------------------------------------------------------------------------------


def _grouped(x, kernel, *, stride, dilation, pads):
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        pads,
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


def _by_taps(x, kernel, *, stride, dilation, pads):
    size, (rows, cols) = kernel.shape[0], _windows(x, kernel.shape[0], stride, dilation, pads)
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    kernel = kernel.astype(x.dtype).reshape(size * size, -1)
    seen = taps(x, rows, cols, size, stride, dilation)
    return sum(tap * k for tap, k in zip(seen, kernel, strict=True))


def _windows(x, size, stride, dilation, pads):
    """Rows and columns of the result."""
    reach = dilation * (size - 1) + 1
    return [(n + sum(p) - reach) // stride + 1 for n, p in zip(x.shape[1:3], pads, strict=True)]


def _dx(g, kernel, *, shape, stride, dilation, pads):
    """Points of one place modulo the stride have the same taps: each such phase is a sum of shifted
    g, and the phases are put together."""
    size, sizes = kernel.shape[0], shape[1:3]
    before = [pad[0] for pad in pads]
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


def _dk(x, g, *, size, stride, dilation, pads):
    """Over strips of rows, of what each tap sees the product with g, summed in float32."""
    (b, height, width, c), (_, rows, cols, _) = x.shape, g.shape
    (top, _), sides = pads
    strips = -(-rows // max(1, _STRIP // (width * c * stride)))
    deep = -(-rows // strips)
    seen = (deep - 1) * stride + dilation * (size - 1) + 1
    below = (strips * deep - deep) * stride + seen - height - top  # may crop
    widths = [(0, 0, 0), (top, below, 0), (*sides, 0), (0, 0, 0)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), widths)
    g = jnp.pad(g, [(0, 0), (0, strips * deep - rows), (0, 0), (0, 0)])

    def add(number, total):
        image, first = number // strips, number % strips * deep
        part = jax.lax.dynamic_slice(x, (image, first * stride, 0, 0), (1, seen, *x.shape[2:]))
        own = jax.lax.dynamic_slice(g, (image, first, 0, 0), (1, deep, cols, c))
        products = [own * tap for tap in taps(part, deep, cols, size, stride, dilation)]
        sums = [p.sum(1, dtype=jnp.float32).sum((0, 1)) for p in products]
        return total + jnp.stack(sums)

    total = jax.lax.fori_loop(0, b * strips, add, jnp.zeros((size * size, c)))
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
        kernel = self.param("kernel", nn.initializers.he_normal(), shape) * scale
        return convolve_depthwise(x.astype(self.dtype), kernel, self.stride, self.dilation)
