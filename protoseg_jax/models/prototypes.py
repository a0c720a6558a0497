"""Section 3.1: the prototype layer, its similarity (eq. 1) and the last layer. All in float32."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

EPSILON = 1e-4  # ε of eq. 1


@jax.custom_vjp
def squared_distances(z: Float[Array, "*n d"], p: Float[Array, "m d"]) -> Float[Array, "*n m"]:
    """‖z − p‖² of eq. 1 by the direct form Σ(z − p)², exactly 0 where z equals p.

    The released code expands the square and clamps it at 0, which errs by about 1e-5 near 0. Only
    the gradient is expanded, into matmuls at full precision: differentiating the direct form costs
    twenty times the forward pass.
    """
    return jnp.square(z.astype(jnp.float32)[..., None, :] - p.astype(jnp.float32)).sum(-1)


def _distances_bwd(primals, g: Float[Array, "*n m"]):
    """∂z = 2 Σ_m g (z − p) and ∂p = 2 Σ_n g (p − z)."""
    points, p = (x.astype(jnp.float32).reshape(-1, x.shape[-1]) for x in primals)
    g = g.reshape(-1, g.shape[-1])
    gp, gz = (jnp.matmul(*x, precision=jax.lax.Precision.HIGHEST) for x in ((g, p), (g.T, points)))
    dz = 2 * (g.sum(1, keepdims=True) * points - gp)
    dp = 2 * (g.sum(0)[:, None] * p - gz)
    return tuple(d.reshape(x.shape).astype(x.dtype) for d, x in zip((dz, dp), primals, strict=True))


squared_distances.defvjp(lambda z, p: (squared_distances(z, p), (z, p)), _distances_bwd)


def similarity(d2: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """g of eq. 1: log((d + 1) / (d + ε)) of the squared distance d; log(1/ε) at 0, falling to 0."""
    d2 = d2.astype(jnp.float32)
    return jnp.log((d2 + 1.0) / (d2 + EPSILON))


# What a model may use (`model.similarity`); all but eq. 1 are there to be compared with it.
SIMILARITIES = {"log": similarity, "negative_distance": jnp.negative}


def equal_blocks(num_prototypes: int, num_classes: int) -> Int[np.ndarray, " m"]:
    """c(j) at the start: classes ascending, each with M / C prototypes."""
    return np.arange(num_prototypes) * num_classes // max(num_prototypes, 1)


def class_table(
    prototype_classes: Int[np.ndarray, " m"], num_classes: int
) -> Int[np.ndarray, "c k"]:
    """The prototypes of each class, [C, K_max], −1 where a class has fewer than K_max."""
    owned = [np.flatnonzero(np.asarray(prototype_classes) == c) for c in range(num_classes)]
    most = max(map(len, owned), default=0)
    rows = [np.pad(own, (0, most - len(own)), constant_values=-1) for own in owned]
    return np.array(rows, np.int64).reshape(num_classes, most)


def class_connections(
    prototype_classes: Int[np.ndarray, " m"], num_classes: int
) -> Float[Array, "m c"]:
    """w_h at the start: 1 where c(j) = c, −0.5 elsewhere (section 3.1)."""
    own = np.asarray(prototype_classes)[:, None] == np.arange(num_classes)
    return jnp.where(own, 1.0, -0.5).astype(jnp.float32)


class PrototypeLayer(nn.Module):
    """Squared distances to `num_prototypes` vectors, initially uniform in [0, 1).

    The paper says "randomly"; uniform [0, 1) is the released code's and covers the sigmoid's range.
    """

    num_prototypes: int

    @nn.compact
    def __call__(self, z: Float[Array, "b h w d"]) -> Float[Array, "b h w m"]:
        shape = (self.num_prototypes, z.shape[-1])
        return squared_distances(z, self.param("vectors", nn.initializers.uniform(1.0), shape))


class AnchorLayer(nn.Module):
    """Mean squared differences to `num_prototypes` vectors, initially normal, in another map than
    z (`losses/assignment.py`)."""

    num_prototypes: int

    @nn.compact
    def __call__(self, t: Float[Array, "b h w t"]) -> Float[Array, "b h w m"]:
        shape = (self.num_prototypes, t.shape[-1])
        q = self.param("vectors", nn.initializers.normal(1.0), shape)
        across = jnp.matmul(t, q.T, precision=jax.lax.Precision.HIGHEST)
        squares = jnp.square(t).sum(-1, keepdims=True) + jnp.square(q).sum(-1)
        return (squares - 2 * across) / t.shape[-1]


class LastLayer(nn.Module):
    """h: similarities → logits by w_h, no bias; starts from `equal_blocks`."""

    num_classes: int

    @nn.compact
    def __call__(self, similarities: Float[Array, "b h w m"]) -> Float[Array, "b h w c"]:
        def start(_, m: int, c: int) -> Float[Array, "m c"]:
            return class_connections(equal_blocks(m, c), c)

        kernel = self.param("kernel", start, similarities.shape[-1], self.num_classes)
        return jnp.matmul(similarities, kernel, precision=jax.lax.Precision.HIGHEST)
