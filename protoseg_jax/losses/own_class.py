"""Points with the prototypes of their own class alone: what the terms on prototypes start from."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from protoseg_jax.models.prototypes import class_table


def class_members(labels: Int[Array, "b h w"], num_classes: int) -> Bool[Array, "b n c"]:
    """Whether point n of image b is labelled c; no class holds a void point."""
    return labels.reshape(labels.shape[0], -1, 1) == jnp.arange(num_classes)


def of_own_class(
    distances: Float[Array, "b h w m"],
    labels: Int[Array, "b h w"],
    prototype_classes: Int[np.ndarray, " m"],
    num_classes: int,
) -> tuple[Float[Array, "b n k"], Bool[Array, "b n c"], Bool[np.ndarray, "c k"]]:
    """(each point's distances to the K prototypes of its class, its class, the slots of each class
    that hold a prototype). Slots that a class does not fill repeat its first prototype; void points
    have distance 0.

    Args:
      distances: squared distances ‖z − p‖².
      labels: Y_Z.
      prototype_classes: c(j), in any order; known at trace time.
      num_classes: C.
    """
    table = class_table(prototype_classes, num_classes)
    # A mask and a product with a 0/1 matrix, not a gather: the gradient of a gather is a scatter,
    # which a CPU does one element at a time. HIGHEST leaves the numbers as they are.
    slots = np.where(table >= 0, table, table[:, :1])
    to_slot = (np.arange(len(prototype_classes))[:, None, None] == slots).any(1)
    points = labels.reshape(labels.shape[0], -1)
    own = points[..., None] == jnp.asarray(prototype_classes)
    own = jnp.where(own, distances.astype(jnp.float32).reshape(own.shape), 0.0)
    own = jnp.dot(own, to_slot.astype(np.float32), precision=jax.lax.Precision.HIGHEST)
    return own, class_members(labels, num_classes), table >= 0
