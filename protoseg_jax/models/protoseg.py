"""ProtoSeg: backbone → ASPP or decoder → sigmoid → prototypes → last layer; and its black-box twin.

With multi-scale inputs (MSC, as DeepLabv2 on Pascal) the maps before the sigmoid are the
element-wise maximum over the image and its smaller copies; training also learns from each alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import flax.struct
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from protoseg_jax.models.layers import resize
from protoseg_jax.models.prototypes import SIMILARITIES, LastLayer, PrototypeLayer

ACTIVATIONS = {"sigmoid": nn.sigmoid, "none": lambda x: x}


@flax.struct.dataclass
class Output:
    """What the model says at each point of the feature map, all float32.

    Attributes:
      features: z.
      distances: ‖z − p‖² to each prototype; None for the black box.
      similarities: eq. 1 of them; None for the black box.
      logits: of each class.
    """

    features: Float[Array, "b h w d"]
    distances: Float[Array, "b h w m"] | None
    similarities: Float[Array, "b h w m"] | None
    logits: Float[Array, "b h w c"]


def pyramid(
    network: Callable, images: Float[Array, "b H W 3"], scales: Sequence[float]
) -> list[Float[Array, "b h w d"]]:
    """Maps of the images, of each smaller copy at its own size, and the maximum of them all.

    Images go down to ⌊size · scale⌋ with a source step of exactly 1 / scale; maps go up to the
    whole image's map by size (METHOD, from the released code).

    Args:
      network: images → maps.
      images: normalised.
      scales: below 1; without any, the images' own maps are all.
    """
    whole = network(images)
    if not scales:
        return [whole]
    copies = [
        network(resize(images, tuple(int(n * s) for n in images.shape[1:3]), (s, s)))
        for s in scales
    ]
    size = whole.shape[1:3]
    enlarged = [
        resize(m, size, tuple(o / n for o, n in zip(size, m.shape[1:3], strict=True)))
        for m in copies
    ]
    return [whole, *copies, functools.reduce(jnp.maximum, enlarged, whole)]


class ProtoSeg(nn.Module):
    """The model of section 3.1. Groups of parameters: backbone, aspp or decoder, prototypes, head.

    `apply` takes any number of prototypes' worth of parameters only if built for that number: a
    pruned model is built anew.

    Attributes:
      backbone: image → a map, or maps.
      decoder: the backbone's maps → D channels; its name is its group's, "aspp" or "decoder".
      scales: of the smaller copies of an image (MSC); none by default.
      activation: between decoder and prototypes, a key of `ACTIVATIONS`. The paper is silent; the
        sigmoid, by which z is in (0, 1)^D, is the released code's.
      similarity: a key of `prototypes.SIMILARITIES`.
    """

    preserve_adopted_names: ClassVar[bool] = True  # Flax: the decoder keeps its own name

    backbone: nn.Module
    decoder: nn.Module
    num_prototypes: int
    num_classes: int
    scales: tuple[float, ...] = ()
    activation: str = "sigmoid"
    similarity: str = "log"

    def setup(self):
        self.prototypes = PrototypeLayer(self.num_prototypes)
        self.head = LastLayer(self.num_classes)

    def maps(self, images: Float[Array, "b H W 3"]) -> list[Float[Array, "b h w d"]]:
        """What the decoder says before the sigmoid; see `pyramid`. Inference uses the last."""
        return pyramid(lambda x: self.decoder(self.backbone(x)), images, self.scales)

    def classify(self, features: Float[Array, "b h w d"]) -> Output:
        """Distances and logits of features."""
        distances = self.prototypes(features)
        similarities = SIMILARITIES[self.similarity](distances)
        return Output(features, distances, similarities, self.head(similarities))

    def outputs(self, images: Float[Array, "b H W 3"]) -> list[Output]:
        """All that training learns from, each at the size of its own map."""
        activate = ACTIVATIONS[self.activation]
        return [self.classify(activate(m.astype(jnp.float32))) for m in self.maps(images)]

    def __call__(self, images: Float[Array, "b H W 3"]) -> Output:
        """Normalised images → features, squared distances, similarities and logits."""
        return self.outputs(images)[-1]


class BlackBox(nn.Module):
    """DeepLabv2 or U-Net as published: ASPP or decoder give the logits and are all groups beside
    the backbone's.

    Attributes:
      backbone, decoder, scales: as in `ProtoSeg`, but C channels.
    """

    preserve_adopted_names: ClassVar[bool] = True

    backbone: nn.Module
    decoder: nn.Module
    scales: tuple[float, ...] = ()

    def outputs(self, images: Float[Array, "b H W 3"]) -> list[Output]:
        """All that training learns from. Logits are all the features that the black box has."""
        maps = pyramid(lambda x: self.decoder(self.backbone(x)), images, self.scales)
        return [Output(m, None, None, m) for m in (m.astype(jnp.float32) for m in maps)]

    def __call__(self, images: Float[Array, "b H W 3"]) -> Output:
        """Normalised images → logits."""
        return self.outputs(images)[-1]
