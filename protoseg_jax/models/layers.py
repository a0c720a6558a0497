"""Convolution and pooling with PyTorch's padding rules, so that ported weights agree; GroupNorm."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

# torchvision's from-scratch initialisation: N(0, 2 / (k² · out)).
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def is_kernel(path: tuple[str, ...]) -> bool:
    """The rule of weight decay that most groups of parameters have: kernels alone."""
    return path[-1] == "kernel"


class Conv(nn.Module):
    """Cross-correlation with a k×k kernel, no bias, zero-padded by dilation · (k−1)/2 on each side.

    Attributes:
      channels: output channels.
      size: k, odd.
      stride: step between windows.
      dilation: step between a window's taps.
      dtype: dtype of the computation; parameters are float32.
    """

    channels: int
    size: int = 1
    stride: int = 1
    dilation: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b H W o"]:
        shape = (self.size, self.size, x.shape[-1], self.channels)
        kernel = self.param("kernel", he_normal_fan_out, shape).astype(self.dtype)
        x = x.astype(self.dtype)
        if self.size == 1:  # a matmul: the same numbers, and on a CPU a faster gradient
            return x[:, :: self.stride, :: self.stride] @ kernel[0, 0]
        pad = self.dilation * (self.size - 1) // 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            [(pad, pad)] * 2,
            rhs_dilation=(self.dilation, self.dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class GroupNorm(nn.Module):
    """GroupNorm (Wu & He 2018) of 16 channels a group, trained; for nets trained from scratch."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        size = math.gcd(16, c)
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        groups = x.astype(jnp.float32).reshape(b, h, w, c // size, size)
        mean = groups.mean((1, 2, 4), keepdims=True)
        var = jnp.square(groups - mean).mean((1, 2, 4), keepdims=True)
        normal = ((groups - mean) * (var + 1e-5) ** -0.5).reshape(x.shape)
        return (normal * scale + bias).astype(self.dtype)


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


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
    """3×3 max-pool, stride 2, padding 1, ceil mode, as in the Caffe DeepLab.

    H = ⌈(h − 1) / 2⌉ + 1 by ceil mode, one less where the last window would start outside the
    padded input (PyTorch's rule); padding never wins.
    """
    pads = []
    for n in x.shape[1:3]:
        windows = -(-(n - 1) // 2) + 1
        windows -= 2 * (windows - 1) >= n + 1
        pads.append((1, 2 * windows - n))
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=pads)
