"""Section 3.1: the networks. `build` makes one from a config.

A backbone is one module, ours or anyone's, that defines `GROUPS`, the names of the two groups of
parameters (the backbone's, then its decoder's), each with its rule of weight decay: a parameter's
path → whether it decays; and `build(config.model, channels, dtype)` → (backbone, decoder), Flax
modules from an image to a map or maps, and from those to one map of so many channels. With foreign
weights it has `port` and `ORIGINS` (see `weights`), with a preprocessing of its own `PREPROCESSING`
(see `preprocessing`).
"""

import types
from collections.abc import Callable, Collection
from typing import Any

import jax.numpy as jnp
import ml_collections

from protoseg_jax import extensions
from protoseg_jax.errors import UserError
from protoseg_jax.models.protoseg import ACTIVATIONS, BlackBox, ProtoSeg
from protoseg_jax.models.prototypes import SIMILARITIES

Path = tuple[str, ...]


def build(
    config: ml_collections.ConfigDict, num_classes: int, num_prototypes: int, dtype: jnp.dtype
) -> ProtoSeg | BlackBox:
    """A model by its config (`config.model` of a run).

    Args:
      config: backbone and its own keys, head ("prototypes", or "linear": the black-box twin),
        features (D), msc (the scales of MSC's smaller copies), and, for comparisons, activation and
        similarity (see `ProtoSeg`).
      num_classes: C.
      num_prototypes: M, in all; not used by head "linear".
      dtype: of the backbone's and the decoder's computation. Parameters, features, distances and
        logits are float32.

    Raises:
      UserError: a setting is none of the known values.
    """
    require("head", config.head, ("prototypes", "linear"))
    scales = tuple(config.msc)
    if not all(0 < scale < 1 for scale in scales):
        raise UserError(f"config.model.msc is {scales}; its scales must lie between 0 and 1")
    channels = num_classes if config.head == "linear" else config.features
    modules = network(config).build(config, channels, dtype)
    backbone, decoder = (m.clone(name=n) for m, n in zip(modules, groups(config), strict=True))
    if config.head == "linear":
        return BlackBox(backbone, decoder, scales)
    activation, similarity = config.activation, config.similarity
    require("activation", activation, ACTIVATIONS)
    require("similarity", similarity, SIMILARITIES)
    return ProtoSeg(backbone, decoder, scales, num_prototypes, num_classes, activation, similarity)


def network(config: ml_collections.ConfigDict) -> types.ModuleType:
    """The module of a config's backbone.

    Raises:
      UserError: there is none, or it is not one.
    """
    return extensions.find("model.backbone", config.backbone, "models", needs=("build", "GROUPS"))


def groups(config: ml_collections.ConfigDict) -> tuple[str, str]:
    """The groups of parameters of a config's backbone and of what follows it.

    Raises:
      UserError: as `network`.
    """
    names = tuple(network(config).GROUPS)
    if len(names) != 2:
        raise UserError(
            f"model.backbone={config.backbone!r}: its GROUPS are {names}; name two there, the "
            "backbone's and its decoder's, each with its rule of weight decay"
        )
    return names


def decay(config: ml_collections.ConfigDict) -> dict[str, Callable[[Path], bool]]:
    """The rule of weight decay of every group of parameters, by the path of each; a model has no
    other groups. None on prototypes, none on w_h (METHOD)."""
    never = dict.fromkeys(("prototypes", "head"), lambda path: False)
    return {**network(config).GROUPS, **never}


def require(key: str, value: Any, known: Collection) -> None:
    """Refuse what is none of the known values of a setting of `config.model`."""
    if value not in known:
        names = ", ".join(str(k) for k in known)
        raise UserError(f"config.model.{key} is {value!r}; choose one of: {names}")
