"""ProtoSeg: backbone → ASPP → sigmoid → prototypes → last layer; and its black-box twin."""

import flax.struct
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from protoseg_jax.models.prototypes import LastLayer, PrototypeLayer, similarity


@flax.struct.dataclass
class Output:
    """What the model says at each point of the feature map, all float32.

    Attributes:
      features: z.
      distances: ‖z − p‖² to each prototype; None for the black box.
      logits: of each class.
    """

    features: Float[Array, "b h w d"]
    distances: Float[Array, "b h w m"] | None
    logits: Float[Array, "b h w c"]


class ProtoSeg(nn.Module):
    """The model of section 3.1. Groups of parameters: backbone, aspp, prototypes, head.

    `apply` takes any number of prototypes' worth of parameters only if built for that number: a
    pruned model is built anew.
    """

    backbone: nn.Module
    aspp: nn.Module
    num_prototypes: int
    num_classes: int

    def setup(self):
        self.prototypes = PrototypeLayer(self.num_prototypes)
        self.head = LastLayer(self.num_classes)

    def features(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w d"]:
        """z in (0, 1)^D of normalised images. The sigmoid, of which the paper is silent, is the
        released code's."""
        return nn.sigmoid(self.aspp(self.backbone(images)).astype(jnp.float32))

    def classify(self, features: Float[Array, "b h w d"]) -> Output:
        """Distances and logits of features."""
        distances = self.prototypes(features)
        return Output(features, distances, self.head(similarity(distances)))

    def __call__(self, images: Float[Array, "b H W 3"]) -> Output:
        """Normalised images → features, squared distances and logits."""
        return self.classify(self.features(images))


class BlackBox(nn.Module):
    """DeepLabv2 as published: the ASPP gives the logits. Groups of parameters: backbone, aspp."""

    backbone: nn.Module
    aspp: nn.Module

    def features(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """The logits, which are all the features that the black box has."""
        return self.aspp(self.backbone(images)).astype(jnp.float32)

    def classify(self, features: Float[Array, "b h w c"]) -> Output:
        """Logits of features: themselves."""
        return Output(features, None, features)

    def __call__(self, images: Float[Array, "b H W 3"]) -> Output:
        """Normalised images → logits."""
        return self.classify(self.features(images))
