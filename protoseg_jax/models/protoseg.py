"""ProtoSeg: backbone → ASPP or decoder → sigmoid → prototypes → last layer; and its black-box twin.

With multi-scale inputs (MSC, as DeepLabv2 on Pascal) the maps before the sigmoid are the
element-wise maximum over the image and its smaller copies; training also learns from each alone.
"""

import functools
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from protoseg_jax.errors import UserError
from protoseg_jax.models.layers import resize
from protoseg_jax.models.prototypes import SIMILARITIES, AnchorLayer, LastLayer, PrototypeLayer

ACTIVATIONS = {"sigmoid": nn.sigmoid, "none": lambda x: x}


@flax.struct.dataclass
class Output:
    """What the model says at each point of the feature map, all float32.

    Attributes:
      features: z.
      distances: ‖z − p‖² to each prototype; None for the black box.
      similarities: eq. 1 of them; None for the black box.
      logits: of each class.
      apart: of each prototype's anchor and what the backbone says, the mean squared difference over
        its channels, for the assignment loss; None where the model has no anchors.
    """

    features: Float[Array, "b h w d"]
    distances: Float[Array, "b h w m"] | None
    similarities: Float[Array, "b h w m"] | None
    logits: Float[Array, "b h w c"]
    apart: Float[Array, "b h w m"] | None = None


class BlackBox(nn.Module):
    """DeepLabv2 or U-Net as published: what the decoder says are the logits.

    Attributes:
      backbone: image → a map, or maps.
      decoder: the backbone's maps → one map. Both have the names of their groups of parameters.
      scales: of the smaller copies of an image (MSC), below 1; empty without.
    """

    preserve_adopted_names: ClassVar[bool] = True  # Flax: the decoder keeps its own name

    backbone: nn.Module
    decoder: nn.Module
    scales: tuple[float, ...]

    def maps(self, images: Float[Array, "b H W 3"]) -> list[Float[Array, "b h w d"]]:
        """The decoder's maps of the images, of each smaller copy, and the maximum of them all.

        Images go down to ⌊size · scale⌋ with a source step of exactly 1 / scale; maps go up to the
        whole image's map by size (as the released code does). Inference uses the last.
        """
        whole = self.decoder(self.backbone(images))
        if not self.scales:
            return [whole]
        (height, width), size = images.shape[1:3], whole.shape[1:3]
        copies = []
        for s in self.scales:
            smaller = resize(images, (int(height * s), int(width * s)), (s, s))
            copies.append(self.decoder(self.backbone(smaller)))
        same = [resize(m, size, (size[0] / m.shape[1], size[1] / m.shape[2])) for m in copies]
        return [whole, *copies, functools.reduce(jnp.maximum, same, whole)]

    def classify(self, maps: Float[Array, "b h w c"]) -> Output:
        """Logits are all the features that the black box has."""
        return Output(maps, None, None, maps)

    def outputs(self, images: Float[Array, "b H W 3"]) -> list[Output]:
        """All that training learns from, each at the size of its own map."""
        return [self.classify(m.astype(jnp.float32)) for m in self.maps(images)]

    def encode(self, images: Float[Array, "b H W 3"]) -> Any:
        """The backbone's map or maps alone."""
        return self.backbone(images)

    def outputs_of(self, encoded: Any) -> list[Output]:
        """`outputs` of images of which this is what `encode` says; not with MSC."""
        return [self.classify(self.decoder(encoded).astype(jnp.float32))]

    def __call__(self, images: Float[Array, "b H W 3"]) -> Output:
        """Normalised images → what inference says, at the size of the whole image's map."""
        return self.outputs(images)[-1].replace(apart=None)  # which training alone looks at


class LinearTwin(BlackBox):
    """A black box whose decoder has D channels, as a ProtoSeg's, and a linear last layer on top:
    logits are z · W + b, so that what they are made of can be looked at."""

    num_classes: int

    def setup(self):
        self.head = nn.Dense(self.num_classes, precision=jax.lax.Precision.HIGHEST)

    def classify(self, maps: Float[Array, "b h w d"]) -> Output:
        """The features are the decoder's map."""
        return Output(maps, None, None, self.head(maps))


class ProtoSeg(BlackBox):
    """The model of section 3.1: the decoder has D channels, which prototypes read.

    `apply` takes any number of prototypes' worth of parameters only if built for that number: a
    pruned model is built anew.

    Attributes:
      activation: between decoder and prototypes, a key of `ACTIVATIONS`. The paper is silent; the
        sigmoid, by which z is in (0, 1)^D, is the released code's.
      similarity: a key of `prototypes.SIMILARITIES`.
      anchored_map: number of the backbone's map that each prototype has an anchor in, for training
        alone; None: no anchors.
    """

    num_prototypes: int
    num_classes: int
    activation: str
    similarity: str
    anchored_map: int | None = None

    def setup(self):
        self.prototypes = PrototypeLayer(self.num_prototypes)
        self.head = LastLayer(self.num_classes)
        if self.anchored_map is not None:
            self.anchors = AnchorLayer(self.num_prototypes)

    def classify(self, maps: Float[Array, "b h w d"]) -> Output:
        """Distances, similarities and logits of what the decoder says."""
        features = ACTIVATIONS[self.activation](maps)
        distances = self.prototypes(features)
        similarities = SIMILARITIES[self.similarity](distances)
        return Output(features, distances, similarities, self.head(similarities))

    def outputs(self, images: Float[Array, "b H W 3"]) -> list[Output]:
        """As of every model; with anchors where there are some, which goes without MSC."""
        if self.anchored_map is None:
            return super().outputs(images)
        return self.outputs_of(self.encode(images))

    def outputs_of(self, encoded: Any) -> list[Output]:
        """As of every model; anchors are in the backbone's map at the size of z, each point's
        channels with mean 0 and deviation 1. No gradient goes into that map."""
        (output,) = super().outputs_of(encoded)
        if self.anchored_map is None:
            return [output]
        maps = encoded if isinstance(encoded, tuple | list) else (encoded,)
        if not -len(maps) <= self.anchored_map < len(maps):
            raise UserError(
                f"model.anchors={self.anchored_map} is none of the backbone's {len(maps)} map(s); "
                "they are numbered from 0, or from −1 backwards"
            )
        x = jax.lax.stop_gradient(maps[self.anchored_map].astype(jnp.float32))
        x = jax.nn.standardize(x, axis=-1)
        size = output.features.shape[1:3]
        if x.shape[1:3] != size:
            x = resize(x, size, (size[0] / x.shape[1], size[1] / x.shape[2]))
        return [output.replace(apart=self.anchors(x))]
