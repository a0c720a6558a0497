"""Input preprocessing: what a backbone's weights expect of an image.

The preprocessing belongs to the weights (METHOD): ImageNet weights want RGB / 255, standardised by
ImageNet's mean and deviation; the COCO (Caffe) weights want BGR minus the mean in 0–255. Nets
trained from scratch use ImageNet's.
"""

import dataclasses

import cv2
import jax.numpy as jnp
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


def get(name: str) -> Preprocessing:
    """Preprocessing by the name used in configs (`model.preprocessing`).

    Raises:
      UserError: unknown name.
    """
    if name not in _KNOWN:
        raise UserError(f"model.preprocessing={name!r} is unknown; choose from {sorted(_KNOWN)}")
    return _KNOWN[name]


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
