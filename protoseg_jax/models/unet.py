"""U-Net (Ronneberger et al. 2015), the other backbone of section 5 (Table 4).

The contracting path is the group `backbone`, the expanding one the group `decoder`, whose last 1×1
convolution makes what the prototypes (or, in the black box, the softmax) see. The paper's details
are in a supplement that we do not have. Convolutions are zero-padded, so that the map is as large
as the image, and each is followed by GroupNorm (the original has neither), so that nothing is to be
synchronised across devices.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from protoseg_jax import models
from protoseg_jax.models.layers import Conv, GroupNorm, halved, is_kernel

GROUPS = {"backbone": is_kernel, "decoder": is_kernel}


def build(config: ConfigDict, channels: int, dtype: jnp.dtype) -> tuple[nn.Module, nn.Module]:
    """U-Net by depth, width, output_stride (1: the map is as large as the image) and remat."""
    models.require("depth", config.depth, range(1, 7))
    models.require("output_stride", config.output_stride, [2**n for n in range(config.depth + 1)])
    encoder = Encoder(config.depth, config.width, config.remat, dtype)
    return encoder, Decoder(channels, config.output_stride, config.remat, dtype)


class DoubleConv(nn.Module):
    """Twice: 3×3 convolution, GroupNorm, ReLU."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        for n in (1, 2):
            x = Conv(self.channels, 3, dtype=self.dtype, name=f"conv{n}")(x)
            x = nn.relu(GroupNorm(dtype=self.dtype, name=f"norm{n}")(x))
        return x


class Encoder(nn.Module):
    """Image → maps at strides 1, 2, …, 2^depth with width · 1, 2, …, 2^depth channels.

    Attributes:
      depth: how often it halves; 4 in the original.
      width: channels at full size; 64 in the original.
      remat: whether a level's inner maps are computed again in the backward pass, not kept.
      dtype: of the computation and the result.
    """

    depth: int
    width: int
    remat: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> tuple[Float[Array, "b h w c"], ...]:
        level_of = nn.remat(DoubleConv) if self.remat else DoubleConv
        x, maps = images, []
        for level in range(self.depth + 1):
            if level:
                x = halved(x)
            x = level_of(self.width * 2**level, self.dtype, name=f"down{level}")(x)
            maps.append(x)
        return tuple(maps)


class Decoder(nn.Module):
    """An `Encoder`'s maps → one map at a stride, by up-convolutions and skip connections.

    Attributes:
      channels: of the result: D, or C in the black box.
      stride: of the result, 1 in the original; the levels above it are left out.
      remat: as in `Encoder`.
      dtype: of the computation; the result is float32.
    """

    channels: int
    stride: int
    remat: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, maps: tuple[Float[Array, "b h w c"], ...]) -> Float[Array, "b h w o"]:
        level_of = nn.remat(DoubleConv) if self.remat else DoubleConv
        *skips, x = maps
        for level in reversed(range(len(skips))):
            if 2**level < self.stride:
                break
            skip = skips[level]
            x = UpConv(skip.shape[-1], self.dtype, name=f"up_conv{level}")(x)
            # What halving rounded up is cut off again.
            x = jnp.concatenate([skip, x[:, : skip.shape[1], : skip.shape[2]]], -1)
            x = level_of(skip.shape[-1], self.dtype, name=f"up{level}")(x)
        return nn.Dense(self.channels, dtype=self.dtype, name="out")(x).astype(jnp.float32)


class UpConv(nn.Module):
    """The transposed 2×2 convolution of stride 2, as a matmul: each point becomes 2×2 points."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b 2h 2w o"]:
        b, h, w, _ = x.shape
        x = nn.Dense(4 * self.channels, use_bias=False, dtype=self.dtype, name="taps")(x)
        x = x.reshape(b, h, w, 2, 2, self.channels).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b, 2 * h, 2 * w, self.channels)
