"""DeepLabv2's ASPP (Chen et al. 2018): parallel dilated convolutions, summed."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from protoseg_jax.models.layers import flat


class ASPP(nn.Module):
    """Σ over rates of a 3×3 convolution with that dilation and a bias, `c0`, `c1`, …

    The paper names DeepLab only; as in the released code the branches are summed, kernels start
    at N(0, 0.01) and biases at 0.

    Attributes:
      channels: output channels.
      rates: dilation of each branch.
      dtype: dtype of the products; their sum is float32.
    """

    channels: int
    rates: tuple[int, ...] = (6, 12, 18, 24)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        shape = (3, 3, x.shape[-1], self.channels)
        branches = [Branch(shape, name=f"c{i}")() for i in range(len(self.rates))]
        taps = [
            (dy * rate, dx * rate, kernel[1 + dy, 1 + dx])
            for rate, (kernel, _) in zip(self.rates, branches, strict=True)
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
        ]
        return sum_of_taps(x.astype(self.dtype), taps) + sum(bias for _, bias in branches)


class Branch(nn.Module):
    """The parameters of one 3×3 convolution: kernel [3 3 in out] and bias [out]."""

    shape: tuple[int, int, int, int]

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "3 3 i o"], Float[Array, " o"]]:
        return (
            self.param("kernel", flat(nn.initializers.normal(0.01)), self.shape),
            self.param("bias", nn.initializers.zeros, self.shape[-1:]),
        )


def sum_of_taps(
    x: Float[Array, "b h w i"], taps: list[tuple[int, int, Float[Array, "i o"]]]
) -> Float[Array, "b h w o"]:
    """Σ over taps (dy, dx, K) of x shifted by (dy, dx), zero outside, times K, in float32.

    All products are one matmul over the unshifted x, and its narrow results are shifted and added:
    with few output channels a multiple faster than dilated convolutions on a CPU. Taps that lie
    outside the map at every point cost nothing.
    """
    taps = [tap for tap in taps if abs(tap[0]) < x.shape[1] and abs(tap[1]) < x.shape[2]]
    kernels = jnp.concatenate([kernel for _, _, kernel in taps], axis=1).astype(x.dtype)
    products = jnp.matmul(x, kernels, preferred_element_type=jnp.float32)
    # `split`, not slices: its gradient is one concatenation, theirs a sum of padded arrays.
    parts = jax.lax.split(products, [kernel.shape[1] for _, _, kernel in taps], axis=3)

    def shift(part: Float[Array, "b h w o"], dy: int, dx: int) -> Float[Array, "b h w o"]:
        """y[i, j] = part[i + dy, j + dx], zero outside: negative padding crops."""
        widths = [(0, 0, 0), (-dy, dy, 0), (-dx, dx, 0), (0, 0, 0)]
        return jax.lax.pad(part, jnp.zeros((), part.dtype), widths)

    return sum(shift(part, dy, dx) for part, (dy, dx, _) in zip(parts, taps, strict=True))
