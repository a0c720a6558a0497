"""A decoder over the maps of several stages of a backbone."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from protoseg_jax.models.layers import Conv, resize


class Decoder(nn.Module):
    """1×1 convolutions of the maps, brought to the finest one's size, summed; ReLU, one 3×3.

    As a feature pyramid (Lin et al. 2017) whose levels are added at once, so that each point knows
    what is coarse and what is fine.

    Attributes:
      channels: of the result.
      width: channels of the sum.
      dtype: of the computation; the result is float32.
    """

    channels: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, maps: tuple[Float[Array, "b h w c"], ...]) -> Float[Array, "b h w o"]:
        size, total = maps[0].shape[1:3], 0
        for number, x in enumerate(maps):
            x = nn.Dense(self.width, dtype=self.dtype, name=f"lateral{number}")(x)
            scale = size[0] / x.shape[1], size[1] / x.shape[2]
            total += x if x.shape[1:3] == size else resize(x, size, scale)
        x = Conv(self.channels, 3, dtype=self.dtype, name="smooth_conv")(nn.relu(total))
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return x.astype(jnp.float32) + bias
