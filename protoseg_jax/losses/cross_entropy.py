"""The cross-entropy of eq. 7, over the points of the feature map."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from protoseg_jax.losses import Term, Weights


def make(config: ConfigDict, classes: np.ndarray, num_classes: int, weights: Weights) -> Term:
    """The mean over the non-void points of the global batch."""
    return Term(
        name="cross_entropy",
        weight=1.0,
        count=lambda labels: valid_points(labels, num_classes, weights),
        total=lambda output, labels: cross_entropy_sum(output.logits, labels, weights),
    )


def class_weights(pixels: Int[np.ndarray, " c"], power: float) -> Float[np.ndarray, " c"]:
    """(median / n_c)^power of the pixels n_c of each class, all of them present.

    Power 0 weights all points alike, as the paper does; 1 is median-frequency balancing (Eigen &
    Fergus 2015), by which every class weighs the same in all.
    """
    pixels = np.asarray(pixels, np.float64)
    return ((np.median(pixels) / pixels) ** power).astype(np.float32)


def valid_points(
    labels: Int[Array, "b h w"], num_classes: int, weights: Weights = None
) -> Float[Array, ""]:
    """The number (or weight) of the non-void points, the denominator of the cross-entropy."""
    if weights is not None:
        own = labels.reshape(labels.shape[0], -1, 1) == jnp.arange(num_classes)
        return jnp.where(own, jnp.asarray(weights), 0.0).sum()
    return ((labels >= 0) & (labels < num_classes)).sum().astype(jnp.float32)


def cross_entropy_sum(
    logits: Float[Array, "b h w c"],
    labels: Int[Array, "b h w"],
    weights: Weights = None,
) -> Float[Array, ""]:
    """L_CE of eq. 7, summed over the non-void points; 0 if all points are void.

    The released code takes the mean per micro-batch (NaN if all are void); we sum, and the caller
    divides by the points of the global batch.

    Args:
      logits: of each class.
      labels: Y_Z.
      weights: [C] of a point by its class; the paper has none.
    """
    own = labels[..., None] == jnp.arange(logits.shape[-1])
    logits = jnp.where(own.any(-1, keepdims=True), logits.astype(jnp.float32), 0.0)
    # A compare and a sum, not a gather: its gradient is then no scatter.
    log_p = jnp.where(own, jax.nn.log_softmax(logits), 0.0)
    if weights is not None:
        log_p *= jnp.asarray(weights)
    return -log_p.sum()
