"""A backbone from outside: strided convolutions; its decoder is one 1×1 convolution."""

import jax.numpy as jnp
from flax import linen as nn

GROUPS = {
    "trunk": lambda path: path[-1] == "kernel",
    "neck": lambda path: False,
}


class Trunk(nn.Module):
    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images):
        x = images
        for n in range(2):
            x = nn.relu(nn.Conv(self.channels, (3, 3), 2, dtype=self.dtype, name=f"conv{n}")(x))
        return x


class Neck(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.channels, name="out")(x.astype(jnp.float32))


def build(config, channels, dtype):
    return Trunk(config.width, dtype), Neck(channels)
