"""Input preprocessing: what a backbone's weights expect of an image.

The preprocessing belongs to the weights (METHOD): ImageNet weights want RGB / 255, standardised by
ImageNet's mean and deviation; the COCO (Caffe) weights want BGR minus the mean in 0–255. Nets
trained from scratch use ImageNet's, or mean and deviation of their own training split ("data").
"""

import dataclasses
from typing import Any

import cv2
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float, UInt8

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


_KNOWN = {
    "imagenet": Preprocessing(
        mean=(0.485 * 255, 0.456 * 255, 0.406 * 255), std=(0.229 * 255, 0.224 * 255, 0.225 * 255)
    ),
    "caffe": Preprocessing(
        mean=(104.008, 116.669, 122.675), std=(1.0, 1.0, 1.0), channels=(2, 1, 0)
    ),
}


def from_config(config: ml_collections.ConfigDict) -> Preprocessing:
    """Preprocessing by the name `config.model.preprocessing`.

    "data" stands for the run's own `model.mean` and `model.std`, RGB in 0–255, which are measured
    (`measure`) when a run starts, and written to its config.

    Raises:
      UserError: unknown name.
    """
    name = config.model.preprocessing
    if name == "data":
        return Preprocessing(tuple(config.model.mean), tuple(config.model.std))
    if name not in _KNOWN:
        raise UserError(
            f"model.preprocessing={name!r} is unknown; choose from {sorted([*_KNOWN, 'data'])}"
        )
    return _KNOWN[name]


def measure(model: ml_collections.ConfigDict, source: Any) -> None:
    """Set a config's `model.mean` and `model.std` from a split's images."""
    model.mean, model.std = map(tuple, statistics(source))


def statistics(source: Any) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel (RGB, 0–255) over all pixels of a split's images.

    Args:
      source: random-access examples ("image").
    """
    count, total, squares = 0, np.zeros(3), np.zeros(3)
    for number in range(len(source)):
        pixels = source[number]["image"].reshape(-1, 3).astype(np.float64)
        count += len(pixels)
        total += pixels.sum(0)
        squares += np.square(pixels).sum(0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    # A channel without any contrast says nothing, whatever it is divided by.
    return mean.tolist(), np.where(deviation > 0, deviation, 1.0).tolist()


def resize_image(image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> np.ndarray:
    """Bilinear, half-pixel centres, no antialiasing, aspect ignored (METHOD, evaluation)."""
    if image.shape[:2] == tuple(size):
        return image
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def resize_labels(labels: UInt8[np.ndarray, "h w"], size: tuple[int, int]) -> np.ndarray:
    """Nearest at cell centres."""
    if labels.shape == tuple(size):
        return labels
    return cv2.resize(labels, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)
