"""Section 3.1: the networks. `build` makes one from a config."""

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import ml_collections

from protoseg_jax.errors import UserError
from protoseg_jax.models import resnet
from protoseg_jax.models.deeplab import ASPP
from protoseg_jax.models.protoseg import BlackBox, ProtoSeg


def build(
    config: ml_collections.ConfigDict, num_classes: int, num_prototypes: int, dtype: jnp.dtype
) -> ProtoSeg | BlackBox:
    """A model by its config (`config.model` of a run).

    Args:
      config: backbone ("resnet"), depth, width, norm, stride_in, output_stride, aspp_rates, head
        ("prototypes", or "linear": the black-box twin), features (D), msc, the scales of MSC's
        smaller copies, and remat (see `resnet.ResNet`).
      num_classes: C.
      num_prototypes: M, in all; not used by head "linear".
      dtype: of the backbone's and the ASPP's computation. Parameters, features, distances and
        logits are float32.

    Raises:
      UserError: a setting is none of the known values.
    """
    _require("backbone", config.backbone, ("resnet",))
    _require("depth", config.depth, resnet.BLOCKS)
    _require("norm", config.norm, resnet.NORMS)
    _require("stride_in", config.stride_in, resnet.STRIDE_IN)
    _require("output_stride", config.output_stride, resnet.STRIDES)
    _require("head", config.head, ("prototypes", "linear"))
    scales = tuple(config.msc)
    if not all(0 < scale < 1 for scale in scales):
        raise UserError(f"config.model.msc is {scales}; its scales must lie between 0 and 1")
    backbone = resnet.ResNet(
        depth=config.depth,
        width=config.width,
        norm=config.norm,
        stride_in=config.stride_in,
        output_stride=config.output_stride,
        remat=config.remat,
        dtype=dtype,
    )
    rates = tuple(config.aspp_rates)
    if config.head == "linear":
        return BlackBox(backbone, ASPP(num_classes, rates, dtype), scales=scales)
    aspp = ASPP(config.features, rates, dtype)
    return ProtoSeg(backbone, aspp, num_prototypes, num_classes, scales)


def _require(key: str, value: Any, known: Collection) -> None:
    if value not in known:
        names = ", ".join(str(k) for k in known)
        raise UserError(f"config.model.{key} is {value!r}; choose one of: {names}")
