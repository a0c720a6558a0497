"""Section 3.1: the networks. `build` makes one from a config.

A backbone is one module, ours or anyone's, with

* `build(config.model, channels, dtype)` → (backbone, decoder): Flax modules from an image to a map
  or maps, and from those to one map of so many channels;
* `GROUPS`: the names of their two groups of parameters, in that order, each with its rule of weight
  decay: a parameter's path, from its group on → whether it decays;
* if foreign weights are known of it, `port` and `ORIGINS` (`weights`);
* if it wants one of its own, `PREPROCESSING` (`preprocessing`);
* if a network may be less than what its weights are for, `uses(config.model, name)`: whether it has
  that submodule of the backbone;
* `TWIN_HAS_HEAD = True` if its black-box twin has the same decoder, with D channels, and on top of
  it a last layer in the group `head`; without, the twin's decoder has a channel a class.
"""

import types
from collections.abc import Callable, Collection
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from protoseg_jax import extensions
from protoseg_jax.errors import UserError
from protoseg_jax.models.directions import Directions
from protoseg_jax.models.layers import is_kernel
from protoseg_jax.models.protoseg import ACTIVATIONS, BlackBox, LinearTwin, ProtoSeg
from protoseg_jax.models.prototypes import SIMILARITIES


def build(
    config: ConfigDict, num_classes: int, num_prototypes: int, dtype: jnp.dtype
) -> ProtoSeg | BlackBox | Directions:
    """A model by `config.model` of a run.

    Args:
      config: backbone and its own keys, head, features, msc, activation and similarity.
      num_classes: C.
      num_prototypes: M, in all; not used by head "linear".
      dtype: of the backbone's and the decoder's computation. Parameters, features, distances and
        logits are float32.

    Raises:
      UserError: a setting is none of the known values.
    """
    require("head", config.head, ("prototypes", "linear", "directions"))
    scales = tuple(config.msc)
    if not all(0 < scale < 1 for scale in scales):
        raise UserError(f"config.model.msc is {scales}; its scales must lie between 0 and 1")
    linear, on_features = config.head == "linear", twin_has_head(config)
    channels = num_classes if linear and not on_features else config.features
    modules = network(config).build(config, channels, dtype)
    backbone, decoder = (m.clone(name=n) for m, n in zip(modules, groups(config), strict=True))
    if linear:
        parts = backbone, decoder, scales
        return LinearTwin(*parts, num_classes) if on_features else BlackBox(*parts)
    if config.head == "directions":
        require("directions", config.directions, ("trained", "identity", "random"))
        if not on_features:
            raise UserError(
                "model.head='directions' takes a last layer apart that sums over features, and "
                f"model.backbone={config.backbone!r} has none: its decoder says the logits itself; "
                "use it on a black box of model.backbone='efficientnet'"
            )
        return Directions(backbone, decoder, scales, num_prototypes, num_classes)
    activation, similarity = config.activation, config.similarity
    require("activation", activation, ACTIVATIONS)
    require("similarity", similarity, SIMILARITIES)
    if config.anchors is not None and scales:
        raise UserError("config.model.anchors does not go with model.msc; leave one of them out")
    parts = backbone, decoder, scales
    return ProtoSeg(*parts, num_prototypes, num_classes, activation, similarity, config.anchors)


def network(config: ConfigDict) -> types.ModuleType:
    """The module of a config's backbone; a UserError if there is none."""
    return extensions.find("model.backbone", config.backbone, "models", needs=("build", "GROUPS"))


def groups(config: ConfigDict) -> tuple[str, str]:
    """The groups of parameters of a config's backbone and of what follows it."""
    names = tuple(network(config).GROUPS)
    if len(names) != 2:
        raise UserError(
            f"model.backbone={config.backbone!r}: its GROUPS are {names}; name two there, the "
            "backbone's and its decoder's, each with its rule of weight decay"
        )
    return names


def kind(config: ConfigDict) -> str:
    """What a run is explained by, in a word."""
    return "direction" if config.head == "directions" else "prototype"


def twin_has_head(config: ConfigDict) -> bool:
    """Whether the black-box twin of a config's network is a `LinearTwin`."""
    return getattr(network(config), "TWIN_HAS_HEAD", False)


def uses(config: ConfigDict, name: str) -> bool:
    """Whether the network of a config has that submodule of its backbone's weights."""
    asked = getattr(network(config), "uses", None)
    return asked is None or asked(config, name)


def decay(config: ConfigDict) -> dict[str, Callable[[tuple[str, ...]], bool]]:
    """The rule of weight decay of every group of parameters; none on prototypes and w_h."""
    never = dict.fromkeys(("prototypes", "anchors", "head"), lambda path: False)
    twins = {"head": is_kernel} if config.head == "linear" else {}
    return {**network(config).GROUPS, **never, **twins}


def require(key: str, value: Any, known: Collection) -> None:
    """Refuse what is none of the known values of a setting of `config.model`."""
    if value not in known:
        names = ", ".join(str(k) for k in known)
        raise UserError(f"config.model.{key} is {value!r}; choose one of: {names}")
