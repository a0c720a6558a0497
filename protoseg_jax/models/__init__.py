"""Section 3.1: the networks. `build` makes one from a config."""

from collections.abc import Callable, Collection
from typing import Any

import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from protoseg_jax.errors import UserError
from protoseg_jax.models import resnet, unet
from protoseg_jax.models.deeplab import ASPP
from protoseg_jax.models.protoseg import ACTIVATIONS, BlackBox, ProtoSeg
from protoseg_jax.models.prototypes import SIMILARITIES


def build(
    config: ml_collections.ConfigDict, num_classes: int, num_prototypes: int, dtype: jnp.dtype
) -> ProtoSeg | BlackBox:
    """A model by its config (`config.model` of a run).

    Args:
      config: backbone and its own keys (`_resnet`, `_unet`), head ("prototypes", or "linear": the
        black-box twin), features (D), msc, the scales of MSC's smaller copies, remat, whether
        inner maps are computed again in the backward pass, and, for comparisons, activation and
        similarity (see `ProtoSeg`).
      num_classes: C.
      num_prototypes: M, in all; not used by head "linear".
      dtype: of the backbone's and the decoder's computation. Parameters, features, distances and
        logits are float32.

    Raises:
      UserError: a setting is none of the known values.
    """
    _require("head", config.head, ("prototypes", "linear"))
    scales = tuple(config.msc)
    if not all(0 < scale < 1 for scale in scales):
        raise UserError(f"config.model.msc is {scales}; its scales must lie between 0 and 1")
    channels = num_classes if config.head == "linear" else config.features
    make, _ = _network(config)
    backbone, decoder = make(config, channels, dtype)
    if config.head == "linear":
        return BlackBox(backbone, decoder, scales)
    activation, similarity = config.get("activation", "sigmoid"), config.get("similarity", "log")
    _require("activation", activation, ACTIVATIONS)
    _require("similarity", similarity, SIMILARITIES)
    return ProtoSeg(backbone, decoder, num_prototypes, num_classes, scales, activation, similarity)


def _resnet(
    config: ml_collections.ConfigDict, channels: int, dtype: jnp.dtype
) -> tuple[nn.Module, nn.Module]:
    """DeepLabv2 by depth, width, norm, stride_in, output_stride, aspp_rates and remat."""
    _require("depth", config.depth, resnet.BLOCKS)
    _require("norm", config.norm, resnet.NORMS)
    _require("stride_in", config.stride_in, resnet.STRIDE_IN)
    _require("output_stride", config.output_stride, resnet.STRIDES)
    backbone = resnet.ResNet(
        depth=config.depth,
        width=config.width,
        norm=config.norm,
        stride_in=config.stride_in,
        output_stride=config.output_stride,
        remat=config.remat,
        dtype=dtype,
    )
    return backbone, ASPP(channels, tuple(config.aspp_rates), dtype, name="aspp")


def _unet(
    config: ml_collections.ConfigDict, channels: int, dtype: jnp.dtype
) -> tuple[nn.Module, nn.Module]:
    """U-Net by depth, width, output_stride (1: the map is as large as the image) and remat."""
    _require("depth", config.depth, range(1, 7))
    _require("output_stride", config.output_stride, [2**n for n in range(config.depth + 1)])
    return (
        unet.Encoder(config.depth, config.width, config.remat, dtype),
        unet.Decoder(channels, config.output_stride, config.remat, dtype, name="decoder"),
    )


# By backbone: what makes it, and the names of its groups of parameters.
_NETWORKS = {
    "resnet": (_resnet, ("backbone", "aspp")),
    "unet": (_unet, ("backbone", "decoder")),
}


def _network(config: ml_collections.ConfigDict) -> tuple[Callable, tuple[str, str]]:
    _require("backbone", config.backbone, _NETWORKS)
    return _NETWORKS[config.backbone]


def groups(config: ml_collections.ConfigDict) -> tuple[str, str]:
    """The groups of parameters of a config's backbone and of what follows it.

    Raises:
      UserError: the backbone is unknown.
    """
    return _network(config)[1]


def _require(key: str, value: Any, known: Collection) -> None:
    if value not in known:
        names = ", ".join(str(k) for k in known)
        raise UserError(f"config.model.{key} is {value!r}; choose one of: {names}")
