"""The one way from an image to features, similarities and logits at the evaluation size.

Training's validation, projection, pruning, evaluation and explanations all come through here, so
that a prototype meets at inference the very features it was projected from.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8
from ml_collections import ConfigDict

from protoseg_jax import images as pictures
from protoseg_jax import models
from protoseg_jax.errors import UserError
from protoseg_jax.models import preprocessing
from protoseg_jax.models.protoseg import BlackBox, Output

_ROWS, _COLUMNS = 1, 2  # axes of images [b H W 3]
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Inference:
    """A model with its classes, its preprocessing and its one evaluation size; pure functions of
    variables, and hashable.

    Attributes:
      model: the Flax module, with or without prototypes.
      preprocessing: bytes → input.
      eval_size: (h, w) that every image is brought to.
      prototype_classes: c(j) of each prototype; none for the black box.
      num_classes: C.
      flips: axes along which copies of an image are mirrored, whose class probabilities are
        averaged with its own; features and distances stay the image's.
    """

    model: BlackBox
    preprocessing: preprocessing.Preprocessing
    eval_size: tuple[int, int]
    prototype_classes: tuple[int, ...]
    num_classes: int
    flips: tuple[tuple[int, ...], ...] = ()

    @property
    def num_prototypes(self) -> int:
        """M."""
        return len(self.prototype_classes)

    @property
    def classes(self) -> Int[np.ndarray, " m"]:
        """`prototype_classes` as an array."""
        return np.array(self.prototype_classes, np.int64)

    @functools.cached_property
    def feature_size(self) -> tuple[int, int]:
        """(h, w) of the feature map at the evaluation size."""
        return self.feature_sizes(self.eval_size)[-1]

    def feature_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """(h, w) of the feature map of each of the model's outputs, for images of a size."""
        # Which depends on no prototype: phases differ in their number, but not in this.
        maps = BlackBox(self.model.backbone, self.model.decoder, self.model.scales)
        return list(_map_sizes(maps, tuple(size)))

    def prepare(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """An image of any size → bytes at the evaluation size (host)."""
        return pictures.resize_image(image, self.eval_size)

    def __call__(self, variables: Mapping[str, Any], images: UInt8[Array, "b H W 3"]) -> Output:
        """Features, squared distances and logits at the feature map's resolution (device)."""
        images = self.preprocessing.normalise(images)
        output = self.model.apply(variables, images)
        if not self.flips:
            return output
        log_p = [jax.nn.log_softmax(output.logits)]
        for axes in self.flips:
            mirrored = self.model.apply(variables, jnp.flip(images, axes)).logits
            log_p.append(jax.nn.log_softmax(jnp.flip(mirrored, axes)))
        return output.replace(logits=jax.nn.logsumexp(jnp.stack(log_p), 0) - np.log(len(log_p)))

    def outputs(
        self, variables: Mapping[str, Any], images: UInt8[Array, "b h w 3"]
    ) -> list[Output]:
        """What training learns from: with MSC every scale's output and the fused one (device)."""
        return self.model.apply(variables, self.preprocessing.normalise(images), method="outputs")

    def encode(self, variables: Mapping[str, Any], images: UInt8[Array, "b h w 3"]) -> Any:
        """What the backbone says, which is all that a frozen one is needed for (device)."""
        return self.model.apply(variables, self.preprocessing.normalise(images), method="encode")

    def outputs_of(self, variables: Mapping[str, Any], encoded: Any) -> list[Output]:
        """`outputs` of what `encode` says; variables need no backbone (device)."""
        return self.model.apply(variables, encoded, method="outputs_of")

    def with_flips(self, turns: bool) -> "Inference":
        """The same with averaging over mirror images: left–right; and top–bottom, and both, where
        the augmentation turns images (`augment.turns`), so that they have no up and down."""
        upright = ((_COLUMNS,),)
        flips = (*upright, (_ROWS,), (_ROWS, _COLUMNS)) if turns else upright
        return dataclasses.replace(self, flips=flips)


@functools.lru_cache(maxsize=16)  # tracing a deep network takes seconds
def _map_sizes(model: BlackBox, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    images = jax.ShapeDtypeStruct((1, *size, 3), np.float32)
    maps = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, method="maps")[0], images
    )
    return tuple(m.shape[1:3] for m in maps)


def from_config(
    config: ConfigDict, num_classes: int, prototype_classes: Sequence[int]
) -> Inference:
    """The inference path of a run's config, for prototypes of these classes.

    Raises:
      UserError: a setting is none of the known values.
    """
    classes = tuple(int(c) for c in prototype_classes)
    if config.compute_dtype not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise UserError(f"compute_dtype={config.compute_dtype!r} is unknown; use one of: {known}")
    model = models.build(config.model, num_classes, len(classes), _DTYPES[config.compute_dtype])
    normal = preprocessing.from_config(config.model)
    return Inference(model, normal, tuple(config.eval_size), classes, num_classes)


def shrink_labels(
    labels: Int[Array, "b H W"], sizes: Int[Array, "b 2"] | None, feature_size: tuple[int, int]
) -> Int[Array, "b h w"]:
    """Y_Z: labels at the feature map's resolution, nearest at cell centres ⌊(i+½)·H/h⌋.

    The paper only says "decrease the resolution"; the released code differs by one at some exact
    ties; we take the formula in integer arithmetic.

    Args:
      labels: label maps, each at the top left of a common canvas.
      sizes: each label map's own (H, W); None where the canvas is the label map.
      feature_size: (h, w).
    """
    if sizes is None:
        sizes = jnp.broadcast_to(jnp.array(labels.shape[1:], jnp.int32), (labels.shape[0], 2))

    def centres(axis: int) -> Int[Array, "b n"]:
        cells = feature_size[axis]
        return ((2 * jnp.arange(cells) + 1)[None, :] * sizes[:, axis][:, None]) // (2 * cells)

    batch = jnp.arange(labels.shape[0])[:, None, None]
    return labels[batch, centres(0)[:, :, None], centres(1)[:, None, :]].astype(jnp.int32)


def cell_box(
    row: int, col: int, feature_size: tuple[int, int], image_size: tuple[int, int]
) -> list[int]:
    """A feature map's cell in an image's own pixels: [top, left, bottom, right], half-open."""
    (h, w), (height, width) = feature_size, image_size
    top, left = row * height // h, col * width // w
    bottom, right = -(-(row + 1) * height // h), -(-(col + 1) * width // w)
    return [top, left, bottom, right]
