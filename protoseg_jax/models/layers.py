"""Convolution and pooling with PyTorch's padding rules, so that ported weights agree; GroupNorm."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

# torchvision's from-scratch initialisation: N(0, 2 / (k² · out)).
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """A k×k convolution without bias, zero-padded by dilation · (k−1)/2 on each side as PyTorch's.

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
        return convolve(x.astype(self.dtype), kernel, self.stride, self.dilation)


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


def is_kernel(path: tuple[str, ...]) -> bool:
    """The rule of weight decay that most groups of parameters have: kernels alone."""
    return path[-1] == "kernel"


def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"], stride: int, dilation: int
) -> Float[Array, "b H W o"]:
    """Cross-correlation with zero padding dilation · (k−1)/2; 1×1 kernels as a matmul."""
    if kernel.shape[0] == 1:
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    pad = dilation * (kernel.shape[0] - 1) // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pad, pad)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def resize(
    x: Float[Array, "b h w c"], size: tuple[int, int], scale: tuple[float, float]
) -> Float[Array, "b H W c"]:
    """Bilinear, half-pixel centres, no antialiasing: y[i] = x at (i + ½) / scale − ½.

    As `torch.nn.functional.interpolate`: with `scale_factor` the step is exactly 1 / scale whatever
    the size; with `size` the scale is out / in.
    """
    return jax.image.scale_and_translate(
        x,
        (x.shape[0], *size, x.shape[3]),
        (1, 2),
        jnp.array(scale, jnp.float32),
        jnp.zeros(2),
        "linear",
        antialias=False,
        precision=jax.lax.Precision.HIGHEST,
    )


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
    """3×3 max-pool, stride 2, padding 1, ceil mode, as in the Caffe DeepLab.

    H = ⌈(h − 1) / 2⌉ + 1 by ceil mode, one less where the last window would start outside the
    padded input (PyTorch's rule); padding never wins.
    """
    pads = [(1, 2 * (_pooled(n) - 1) + 2 - n) for n in x.shape[1:3]]
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=pads)


def _pooled(size: int) -> int:
    windows = -(-(size - 1) // 2) + 1
    return windows - 1 if 2 * (windows - 1) >= size + 1 else windows
