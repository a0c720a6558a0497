"""DeepLabv2's network, section 4: a dilated ResNet (He et al. 2016), then ASPP.

Submodules are named after torchvision's: `conv1`, `norm1`, `layer2_0.conv1`, `layer2_0.norm1`, …,
`layer2_0.downsample_conv`, `layer2_0.downsample_norm` (its `layer2.0.conv1`, `layer2.0.bn1`,
`layer2.0.downsample.0`, `layer2.0.downsample.1`).

`port` takes state dicts of four origins:

* `torchvision`: `layer1.0.conv1.weight`, `layer1.0.bn1.running_var`, … The backbone is taken, `fc`
  is ignored. timm's ResNets of the same architecture have the same names.
* `transformers`: `encoder.stages.0.layers.0.layer.0.convolution.weight`, …, of its `ResNetModel`;
  the classifier is ignored. Where its `config.json` says `downsample_in_bottleneck`, the origin is
  `transformers_1x1`.
* `deeplab`: `layer1.conv1.conv.weight`, `layer2.block1.reduce.bn.weight`, … of the PyTorch port of
  DeepLabv2 (COCO). The backbone is taken, the classifier (`aspp`, `fc`) is ignored.
* `protoseg`: the same below `features.base.`, with `prototype_vectors` and `last_layer.weight`, of
  the authors' code. Everything is taken but `ones`.
"""

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from protoseg_jax import models
from protoseg_jax.errors import UserError
from protoseg_jax.models import names, readers, weights
from protoseg_jax.models.deeplab import ASPP
from protoseg_jax.models.layers import NORMS, Conv, ceil_pool, convolved, is_kernel

GROUPS = {"backbone": is_kernel, "aspp": lambda path: True}

# Blocks of each stage, by depth.
BASIC = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
BOTTLENECK = {14: (1, 1, 1, 1), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BOTTLENECK |= {152: (3, 8, 36, 3)}
BLOCKS = BASIC | BOTTLENECK

# (Stride, dilation) of torchvision's layer1 … layer4 (the paper's stages 2 … 5), by output stride.
# DeepLab dilates every block of stages 4 and 5, the first one included.
STAGES = {8: ((1, 1), (2, 1), (1, 2), (1, 4)), 4: ((1, 1), (1, 2), (1, 4), (1, 8))}


def build(config: ConfigDict, channels: int, dtype: jnp.dtype) -> tuple[nn.Module, nn.Module]:
    """DeepLabv2 by depth, width, norm, stride_in, output_stride, aspp_rates and remat."""
    models.require("depth", config.depth, BLOCKS)
    models.require("norm", config.norm, NORMS)
    models.require("stride_in", config.stride_in, ("3x3", "1x1"))
    models.require("output_stride", config.output_stride, STAGES)
    keys = ("depth", "width", "norm", "stride_in", "output_stride", "remat")
    backbone = ResNet(**{key: config[key] for key in keys}, dtype=dtype)
    return backbone, ASPP(channels, tuple(config.aspp_rates), dtype)


class Bottleneck(nn.Module):
    """1×1 → 3×3 → 1×1 with a shortcut; the output has 4 · channels.

    Attributes:
      channels: of the two inner convolutions.
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
            to_shortcut = conv(4 * self.channels, stride=self.stride, name="downsample_conv")
            shortcut = convolved(to_shortcut, norm(name="downsample_norm"), x)
        reduce = conv(self.channels, stride=strides[0], name="conv1")
        spread = conv(self.channels, 3, strides[1], self.dilation, name="conv2")
        increase = conv(4 * self.channels, name="conv3")
        x = nn.relu(convolved(reduce, norm(name="norm1"), x))
        x = nn.relu(convolved(spread, norm(name="norm2"), x))
        return nn.relu(convolved(increase, norm(name="norm3"), x) + shortcut)


def projects(depth: int, stage: int, block: int) -> bool:
    """Whether a block's shortcut is a convolution: where it has not its output's shape."""
    return block == 0 and not (depth in BASIC and stage == 0)


class Basic(nn.Module):
    """3×3 → 3×3 with a shortcut, of depths 18 and 34.

    Attributes:
      channels: of both convolutions.
      stride: of the first one.
      dilation: of both.
      project: whether the shortcut is a 1×1 convolution.
    """

    channels: int
    stride: int
    dilation: int
    project: bool
    norm: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b H W o"]:
        conv = partial(Conv, self.channels, dtype=self.dtype)
        norm = partial(NORMS[self.norm], dtype=self.dtype)
        shortcut = x
        if self.project:
            to_shortcut = conv(stride=self.stride, name="downsample_conv")
            shortcut = convolved(to_shortcut, norm(name="downsample_norm"), x)
        first = conv(3, self.stride, self.dilation, name="conv1")
        second = conv(3, 1, self.dilation, name="conv2")
        x = nn.relu(convolved(first, norm(name="norm1"), x))
        return nn.relu(convolved(second, norm(name="norm2"), x) + shortcut)


class ResNet(nn.Module):
    """Image → the last stage's map, 32 · width channels; 8 · width of depths 18 and 34.

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
        basic = self.depth in BASIC
        kind = Basic if basic else Bottleneck
        make = nn.remat(kind) if self.remat else kind
        stem = Conv(self.width, 7, 2, dtype=self.dtype, name="conv1")
        norm = NORMS[self.norm](dtype=self.dtype, name="norm1")
        x = ceil_pool(nn.relu(convolved(stem, norm, images)))
        settings = {"norm": self.norm, "dtype": self.dtype}
        settings |= {} if basic else {"stride_in": self.stride_in}
        for stage, (stride, dilation) in enumerate(STAGES[self.output_stride]):
            for block in range(BLOCKS[self.depth][stage]):
                first, name = block == 0, f"layer{stage + 1}_{block}"
                project = projects(self.depth, stage, block)
                place = self.width * 2**stage, stride if first else 1, dilation, project
                x = make(*place, **settings, name=name)(x)
        return x


# -- weights of others -------------------------------------------------------------------------

ORIGINS = {
    "torchvision": weights.Origin("3x3", "imagenet"),
    "transformers": weights.Origin("3x3", "imagenet"),
    "transformers_1x1": weights.Origin("1x1", "imagenet"),
    "deeplab": weights.Origin("1x1", "caffe"),
    # Trained by the released code, which feeds ImageNet's RGB whatever it started from.
    "protoseg": weights.Origin("1x1", "imagenet"),
}


@dataclasses.dataclass(frozen=True)
class Naming:
    """What the tensors of a ResNet are called elsewhere.

    Attributes:
      block: a block's prefix, by the numbers of stage and block.
      first: those of the first block.
      modules: (convolution, BatchNorm) by our name of the convolution; but for the stem's inside a
        block.
      ignored: a pattern of names that need not be taken.
    """

    block: str
    first: tuple[int, int]
    modules: dict[str, tuple[str, str]]
    ignored: str


_NAMINGS = {
    "torchvision": Naming(
        "layer{}.{}.",
        (1, 0),
        {
            "stem": ("conv1", "bn1"),
            "downsample_conv": ("downsample.0", "downsample.1"),
            **{f"conv{n}": (f"conv{n}", f"bn{n}") for n in (1, 2, 3)},
        },
        r"fc\.(weight|bias)",
    ),
    "transformers": Naming(
        "encoder.stages.{}.layers.{}.",
        (0, 0),
        {
            "stem": ("embedder.embedder.convolution", "embedder.embedder.normalization"),
            "downsample_conv": ("shortcut.convolution", "shortcut.normalization"),
            **{
                f"conv{n + 1}": (f"layer.{n}.convolution", f"layer.{n}.normalization")
                for n in range(3)
            },
        },
        r"classifier\.1\.(weight|bias)",
    ),
    "deeplab": Naming(
        "layer{}.block{}.",
        (2, 1),  # its layer1 is the stem; blocks count from 1
        {
            "stem": ("layer1.conv1.conv", "layer1.conv1.bn"),
            "downsample_conv": ("shortcut.conv", "shortcut.bn"),
            "conv1": ("reduce.conv", "reduce.bn"),
            "conv2": ("conv3x3.conv", "conv3x3.bn"),
            "conv3": ("increase.conv", "increase.bn"),
        },
        r"(fc|aspp\.c\d)\.(weight|bias)",
    ),
}
_NAMINGS["protoseg"] = dataclasses.replace(_NAMINGS["deeplab"], ignored="ones")


def configured(origin: str, path: Path) -> str:
    """The origin of a file's weights by the `config.json` beside it: transformers' settings, by
    `ResNetConfig`'s names, of which the tensors show all but these.

    Raises:
      UserError: it is of a ResNet that is not supported, or no config.
    """
    if origin != "transformers":
        return origin
    config = readers.config(path)
    supported = {"downsample_in_first_stage": (False,), "hidden_act": ("relu",)}
    supported["downsample_in_bottleneck"] = (False, True)
    for key, values in supported.items():
        if config.get(key, values[0]) not in values:
            raise UserError(
                f"{path.with_name('config.json')} says {key}={names.named([str(config[key])])}, "
                "which is no ResNet that is supported; use weights of one with "
                f"{key}={' or '.join(map(str, values))}"
            )
    basic = config.get("layer_type") == "basic"  # which has no bottleneck
    return "transformers_1x1" if config.get("downsample_in_bottleneck") and not basic else origin


def port(tensors: readers.Tensors, where: Any) -> weights.Ported:
    """A state dict (arrays as PyTorch lays them out) of file `where` in our names.

    Raises:
      UserError: the names are of no known origin, or tensors are missing, unexpected or of
        another shape.
    """
    for prefix in ("features.base.", "features.", "base."):
        bare = {n.removeprefix(prefix): t for n, t in tensors.items()}
        if len(bare) < len(tensors):
            twice = next(n for n in tensors if n.startswith(prefix) and n[len(prefix) :] in tensors)
            both = " and ".join(names.named([n]) for n in (twice, twice.removeprefix(prefix)))
            raise UserError(
                f"weights {where} hold both {both}; leave one of the two networks in the file"
            )
        tensors = bare
    origin = next((o for o in _NAMINGS if names.KNOWN_BY.get(o) in tensors), None)
    if origin is None:
        some = names.named(tensors) or "none"
        wanted = names.KNOWN_BY["torchvision"]
        near = names.nearest(wanted, tensors)
        hint = f"; nearest to torchvision's {wanted} is {names.named([near])}" if near else ""
        raise UserError(
            f"weights {where} are of an unknown network (its tensors: {some}{hint}); known are "
            "the ResNets of torchvision and transformers, the PyTorch DeepLabv2 port and the "
            "authors' ProtoSeg"
        )
    if origin == "deeplab" and "prototype_vectors" in tensors:
        origin = "protoseg"
    naming = _NAMINGS[origin]
    pattern = naming.block.replace(".", r"\.")
    blocks = tuple(
        len({m[1] for n in tensors if (m := re.match(pattern.format(stage, r"(\d+)"), n))})
        for stage in range(naming.first[0], naming.first[0] + 4)
    )
    third = f".{naming.modules['conv3'][0]}."
    basic = origin in ("torchvision", "transformers") and not any(third in n for n in tensors)
    depths = {counts: depth for depth, counts in (BASIC if basic else BOTTLENECK).items()}
    if blocks not in depths:
        raise UserError(
            f"weights {where} are of a ResNet that is not supported ({blocks} blocks in its "
            f"stages); use one of depth {', '.join(map(str, sorted(BLOCKS)))}"
        )
    depth, account, expansion = depths[blocks], weights.Account(tensors), 1 if basic else 4
    conv, norm = naming.modules["stem"]
    stem = tensors.get(f"{conv}.weight")
    is_stem = stem is not None and stem.shape[1:] == (3, 7, 7) and stem.size
    width = stem.shape[0] if is_stem else 64
    params = {"conv1": {"kernel": account.kernel(f"{conv}.weight", (width, 3, 7, 7))}}
    frozen, channels = {"norm1": account.affine(norm, width)}, width
    for stage, block in ((s, b) for s in range(4) for b in range(blocks[s])):
        ours, inner = f"layer{stage + 1}_{block}", width * 2**stage
        prefix = naming.block.format(naming.first[0] + stage, naming.first[1] + block)
        outer = expansion * inner
        project = projects(depth, stage, block)
        shapes = {"downsample_conv": (outer, channels, 1, 1)} if project else {}
        if basic:
            shapes |= {"conv1": (inner, channels, 3, 3), "conv2": (inner, inner, 3, 3)}
        else:
            shapes |= {"conv1": (inner, channels, 1, 1), "conv2": (inner, inner, 3, 3)}
            shapes |= {"conv3": (outer, inner, 1, 1)}
        params[ours], frozen[ours], channels = {}, {}, outer
        for name, shape in shapes.items():
            conv, norm = (prefix + theirs for theirs in naming.modules[name])
            params[ours][name] = {"kernel": account.kernel(f"{conv}.weight", shape)}
            frozen[ours][name.replace("conv", "norm")] = account.affine(norm, shape[0])
    params, frozen = {"backbone": params}, {"backbone": frozen}
    if origin == "protoseg":
        params |= _protoseg(account, 32 * width)
    account.settle(where, f"{origin} ResNet-{depth}", naming.ignored)
    classes = None
    if origin == "protoseg":
        classes = weights.prototype_classes(params["head"]["kernel"], where)
    return weights.Ported(origin, depth, params, frozen, classes)


def _protoseg(account: weights.Account, channels: int) -> dict[str, Any]:
    """The ASPP, the prototypes and the last layer of the authors' ProtoSeg."""
    vectors = account.take("prototype_vectors", (-1, -1, 1, 1))[:, :, 0, 0]
    count, features = vectors.shape
    branches = sorted(n for n in account.tensors if re.fullmatch(r"aspp\.c\d\.weight", n))
    aspp = {
        name.split(".")[1]: {
            "kernel": account.kernel(name, (features, channels, 3, 3)),
            "bias": account.take(name.replace("weight", "bias"), (features,)),
        }
        for name in branches or ["aspp.c0.weight"]
    }
    last = account.tensors.get("last_layer.weight")
    trailing = (1, 1) if last is not None and last.ndim == 4 else ()
    kernel = account.take("last_layer.weight", (-1, count, *trailing))
    kernel = np.ascontiguousarray(kernel.reshape(kernel.shape[:2]).T)
    return {"aspp": aspp, "prototypes": {"vectors": vectors}, "head": {"kernel": kernel}}
