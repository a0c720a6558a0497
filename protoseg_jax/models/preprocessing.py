"""Input preprocessing: what a backbone's weights expect of an image.

The preprocessing belongs to the weights: ImageNet weights want RGB / 255, standardised by
ImageNet's mean and deviation; the COCO (Caffe) weights want BGR minus the mean in 0–255. Nets
trained from scratch use ImageNet's, or mean and deviation of their own training split ("data").
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from protoseg_jax import models
from protoseg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """(image[channels] − mean) / std, with mean and std in 0–255 and in the order of `channels`."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channels: tuple[int, int, int] = (0, 1, 2)

    def normalise(self, images: UInt8[Array, "*b h w 3"]) -> Float[Array, "*b h w 3"]:
        """RGB bytes → the backbone's input, on the device."""
        images = images[..., jnp.array(self.channels)].astype(jnp.float32)
        return (images - jnp.array(self.mean)) / jnp.array(self.std)

    @property
    def padding_colour(self) -> tuple[int, ...]:
        """RGB bytes nearest to the mean colour: what crops that stick out are filled with."""
        rgb = np.empty(3)
        rgb[list(self.channels)] = self.mean
        return tuple(int(round(v)) for v in rgb)


KNOWN = {
    "imagenet": Preprocessing(
        mean=(0.485 * 255, 0.456 * 255, 0.406 * 255), std=(0.229 * 255, 0.224 * 255, 0.225 * 255)
    ),
    "caffe": Preprocessing((104.008, 116.669, 122.675), std=(1.0, 1.0, 1.0), channels=(2, 1, 0)),
}


def from_config(config: ConfigDict) -> Preprocessing:
    """Preprocessing by name (`config.model` of a run): of `KNOWN`, of the backbone's own
    `PREPROCESSING`, or "data": the run's `mean` and `std`, RGB in 0–255, which are measured when a
    run starts, and written to its config.

    Raises:
      UserError: unknown name.
    """
    if config.preprocessing == "data":
        return Preprocessing(tuple(config.mean), tuple(config.std))
    known = {**KNOWN, **getattr(models.network(config), "PREPROCESSING", {})}
    if config.preprocessing not in known:
        raise UserError(
            f"model.preprocessing={config.preprocessing!r} is unknown; "
            f"choose from {sorted([*known, 'data'])}"
        )
    return known[config.preprocessing]
