"""Dilated bottleneck ResNet (He et al. 2016; DeepLab's output stride), the backbone of section 4.

Submodules are named after torchvision's: `conv1`, `norm1`, `layer2_0.conv1`, `layer2_0.norm1`, …,
`layer2_0.downsample_conv`, `layer2_0.downsample_norm` (its `layer2.0.conv1`, `layer2.0.bn1`,
`layer2.0.downsample.0`, `layer2.0.downsample.1`).
"""

from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from protoseg_jax.models.layers import Conv, GroupNorm, max_pool

BLOCKS = {14: (1, 1, 1, 1), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}

# Stride and dilation of torchvision's layer1 … layer4 (the paper's stages 2 … 5), by output stride.
# DeepLab dilates every block of stages 4 and 5, the first one included.
STRIDES = {8: (1, 2, 1, 1), 4: (1, 1, 1, 1)}
DILATIONS = {8: (1, 1, 2, 4), 4: (1, 2, 4, 8)}

STRIDE_IN = ("3x3", "1x1")


class FrozenBatchNorm(nn.Module):
    """BatchNorm with everything fixed: x · scale + bias per channel, from the collection "frozen".

    scale = γ / √(σ² + ε) and bias = β − μ · scale of the ported statistics; initially the identity.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        scale = self.variable("frozen", "scale", jnp.ones, x.shape[-1:], jnp.float32).value
        bias = self.variable("frozen", "bias", jnp.zeros, x.shape[-1:], jnp.float32).value
        return (x * scale + bias).astype(self.dtype)


NORMS = {"frozen_batch": FrozenBatchNorm, "group": GroupNorm}


class Bottleneck(nn.Module):
    """1×1 → 3×3 → 1×1 with a shortcut; the output has 4 · channels.

    Attributes:
      channels: of the two inner convolutions.
      stride: of the block.
      dilation: of the 3×3 convolution.
      project: whether the shortcut is a 1×1 convolution (a stage's first block).
      stride_in: which convolution strides, "3x3" (torchvision) or "1x1" (Caffe).
    """

    channels: int
    stride: int
    dilation: int
    project: bool
    stride_in: str
    norm: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b H W o"]:
        conv = partial(Conv, dtype=self.dtype)
        norm = partial(NORMS[self.norm], dtype=self.dtype)
        strides = (self.stride, 1) if self.stride_in == "1x1" else (1, self.stride)
        shortcut = x
        if self.project:
            shortcut = conv(4 * self.channels, stride=self.stride, name="downsample_conv")(x)
            shortcut = norm(name="downsample_norm")(shortcut)
        x = nn.relu(norm(name="norm1")(conv(self.channels, stride=strides[0], name="conv1")(x)))
        x = conv(self.channels, 3, strides[1], self.dilation, name="conv2")(x)
        x = nn.relu(norm(name="norm2")(x))
        x = norm(name="norm3")(conv(4 * self.channels, name="conv3")(x))
        return nn.relu(x + shortcut)


class ResNet(nn.Module):
    """Image → the last stage's map, 32 · width channels.

    Attributes:
      depth: a key of `BLOCKS`.
      width: channels of the stem and of the first stage's inner convolutions; 64 is standard.
      norm: "frozen_batch" or "group".
      stride_in: "3x3" or "1x1", see `Bottleneck`.
      output_stride: 8 or 4; 321² becomes 41² at 8, 513² 65², 1024×2048 129×257.
      remat: whether a block's inner maps are computed again in the backward pass, not kept.
      dtype: dtype of the computation and the result.
    """

    depth: int
    width: int = 64
    norm: str = "frozen_batch"
    stride_in: str = "3x3"
    output_stride: int = 8
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        make_block = nn.remat(Bottleneck) if self.remat else Bottleneck
        x = Conv(self.width, 7, 2, dtype=self.dtype, name="conv1")(images)
        x = max_pool(nn.relu(NORMS[self.norm](dtype=self.dtype, name="norm1")(x)))
        stages = zip(
            BLOCKS[self.depth],
            STRIDES[self.output_stride],
            DILATIONS[self.output_stride],
            strict=True,
        )
        for stage, (blocks, stride, dilation) in enumerate(stages):
            for block in range(blocks):
                x = make_block(
                    channels=self.width * 2**stage,
                    stride=stride if block == 0 else 1,
                    dilation=dilation,
                    project=block == 0,
                    stride_in=self.stride_in,
                    norm=self.norm,
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{block}",
                )(x)
        return x
