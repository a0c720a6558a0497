"""A trained linear network taken apart, post hoc and exactly: directions of its features.

With U orthogonal, the logits z · W + b of a `LinearTwin` are (zU)(UᵀW) + b: a direction d adds
(zU)_d (UᵀW)_dc to class c, and the bias is an entry of its own. Directions come in the place of
prototypes, scaled so that a direction's "similarity" is what it adds to its own class c(d):

    s_d = (zU)_d κ_d,   w_h[d, c] = (UᵀW)_dc / κ_d,   κ_d = (UᵀW)_{d, c(d)},

and the bias is a last entry with s = 1 and w_h = b. So all that holds of ProtoSeg's sums holds.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from protoseg_jax.models.protoseg import BlackBox, Output
from protoseg_jax.models.prototypes import LastLayer

NO_CLASS = -1  # c(j) of the bias, and of directions before they are found


def _is_bias(s: Float[Array, "b h w m"]) -> Bool[Array, " m"]:
    return jnp.arange(s.shape[-1]) == s.shape[-1] - 1


class DirectionLayer(nn.Module):
    """z → s of `num_prototypes` entries, the last of which, the bias, is 1 everywhere."""

    num_prototypes: int

    @nn.compact
    def __call__(self, z: Float[Array, "b h w d"]) -> Float[Array, "b h w m"]:
        shape = (self.num_prototypes, z.shape[-1])
        vectors = self.param("vectors", nn.initializers.uniform(1.0), shape)
        s = jnp.matmul(z, vectors.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.where(_is_bias(s), 1.0, s)


class Directions(BlackBox):
    """A `LinearTwin` whose last layer is written as a sum over directions and the bias.

    Attributes:
      num_prototypes: directions and the bias.
      num_classes: C.
    """

    num_prototypes: int
    num_classes: int

    def setup(self):
        self.prototypes = DirectionLayer(self.num_prototypes)
        self.head = LastLayer(self.num_classes)

    def classify(self, maps: Float[Array, "b h w d"]) -> Output:
        """In the distances' place is −s: a direction's nearest point is where it is strongest. The
        bias is near to nothing."""
        s = self.prototypes(maps)
        return Output(maps, jnp.where(_is_bias(s), jnp.inf, -s), s, self.head(s))
