"""The L1 term of eq. 8, on the last layer's connections between a prototype and other classes."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from protoseg_jax.losses import Penalty, Weights


def make(config: ConfigDict, classes: np.ndarray, num_classes: int, weights: Weights) -> Penalty:
    """`config.l1` (λ_L1) times the sum, in the fine-tunings."""
    return Penalty(
        name="l1",
        weight=float(config.l1),
        phases=("finetune", "finetune_pruned"),
        value=lambda params: last_layer_l1(params["head"]["kernel"], classes),
    )


def last_layer_l1(w_h: Float[Array, "m c"], prototype_classes: np.ndarray) -> Float[Array, ""]:
    """The sum of eq. 8: |w_h| over the entries that join a prototype to another class."""
    other = np.asarray(prototype_classes)[:, None] != np.arange(w_h.shape[1])
    return jnp.where(other, jnp.abs(w_h.astype(jnp.float32)), 0.0).sum()
