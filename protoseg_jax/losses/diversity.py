"""The prototype diversity loss, eqs 2–6: same-class prototypes that fire at the same points."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from protoseg_jax.losses import Term, Weights
from protoseg_jax.losses.own_class import class_members, of_own_class

# TF32 keeps three digits, and eq. 2 is a difference of nearly equal numbers.
_PRECISION = jax.lax.Precision.HIGHEST


def make(config: ConfigDict, classes: np.ndarray, num_classes: int, weights: Weights) -> Term:
    """λ_J (`config.diversity`) times eq. 6; nothing for the black box.

    By `config.diversity_reduction` "present" takes the mean over the (image, class) pairs present
    in the global batch, as the released code does per micro-batch; "all_classes" is eq. 6's 1/C.
    """

    def pairs(labels: Int[Array, "b h w"]) -> Float[Array, ""]:
        if config.diversity_reduction == "all_classes":
            return jnp.float32(labels.shape[0] * num_classes)
        return present(labels, classes, num_classes).sum().astype(jnp.float32)

    return Term(
        name="diversity",
        weight=float(config.diversity) if len(classes) else 0.0,
        count=pairs,
        total=lambda output, labels: diversity(
            output.distances, labels, classes, num_classes
        ).sum(),
    )


def present(
    labels: Int[Array, "b h w"], prototype_classes: Int[np.ndarray, " m"], num_classes: int
) -> Bool[Array, "b c"]:
    """The (image, class) pairs that enter eq. 6: at least 2 points and at least 2 prototypes."""
    prototypes = np.bincount(prototype_classes, minlength=num_classes)
    return (class_members(labels, num_classes).sum(1) >= 2) & (prototypes >= 2)


def log_distance_vectors(
    own: Float[Array, "b n k"], members: Bool[Array, "b n c"]
) -> Float[Array, "b n k"]:
    """log v(Z, p) of eq. 4: log-softmax of **+**‖z − p‖² over the points of the prototype's class.

    The released code spreads class c's prototypes over the points of class c − 1 (void included);
    we take the paper's points of class c.

    Args:
      own: squared distances of each point to the prototypes of its own class.
      members: the class of each point; a void point is in none.
    """
    weights = members.astype(jnp.float32)

    def at_points(per_class: Float[Array, "b c k"]) -> Float[Array, "b n k"]:
        return jnp.einsum("bnc,bck->bnk", weights, per_class, precision=_PRECISION)

    valid = members.any(-1, keepdims=True)
    peak = jnp.where(members[..., None], own[:, :, None, :], -jnp.inf).max(1)
    peak = jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0.0))  # absent class: −inf
    shifted = jnp.where(valid, own - at_points(peak), 0.0)
    total = jnp.einsum("bnc,bnk->bck", weights, jnp.exp(shifted), precision=_PRECISION)
    return shifted - at_points(jnp.log(jnp.where(total > 0, total, 1.0)))


def jeffreys_divergence(
    log_p: Float[Array, "b n k"], members: Bool[Array, "b n c"]
) -> Float[Array, "b c k k"]:
    """D_J of eq. 2 between all pairs of distributions over the points of each class.

    D_J(i, j) = ½ Σ_n (P_ni − P_nj)(L_ni − L_nj) = ½ (G_ii + G_jj − G_ij − G_ji), G = Pᵀ L.

    One matmul (one-hot class ⊗ P)ᵀ L makes every class's G. A loop over classes was measured
    slower, and so was, at 512² points, a segment sum of the outer products P_n L_nᵀ, which takes K²
    floats a point.
    """
    b, n, k = log_p.shape
    valid = members.any(-1, keepdims=True)
    p = jnp.where(valid, jnp.exp(log_p), 0.0)
    log_p = jnp.where(valid, log_p, 0.0)
    # Both differences lose what the K distributions share at a point. Taking it away first keeps
    # the digits: without, the gradient between nearly alike distributions is mostly rounding. D_J
    # does not depend on it, hence no gradient.
    p -= jax.lax.stop_gradient(p.mean(-1, keepdims=True))
    log_p -= jax.lax.stop_gradient(log_p.mean(-1, keepdims=True))
    spread = jnp.where(members[..., None], p[:, :, None, :], 0.0).reshape(b, n, -1)
    g = jnp.einsum("bnx,bnj->bxj", spread, log_p, precision=_PRECISION).reshape(b, -1, k, k)
    diagonal = jnp.diagonal(g, axis1=-2, axis2=-1)
    divergence = diagonal[..., :, None] + diagonal[..., None, :] - g - jnp.swapaxes(g, -1, -2)
    return jnp.maximum(0.5 * divergence, 0.0)  # ≥ 0 but for rounding


def diversity(
    distances: Float[Array, "b h w m"],
    labels: Int[Array, "b h w"],
    prototype_classes: Int[np.ndarray, " m"],
    num_classes: int,
) -> Float[Array, "b c"]:
    """L_J(Z, P_c) of eq. 5 for each image and class, in [0, 1]; 0 where `present` is false.

    Eq. 3's S_J is the mean of exp(−D_J) over the pairs i < j of a class's prototypes. The sum of
    L_J over the number of pairs present is eq. 6; the paper divides by C and the released code
    takes means per micro-batch: the caller chooses.

    Args:
      distances: squared distances ‖z − p‖².
      labels: Y_Z, the labels at the feature map's resolution.
      prototype_classes: c(j) of each prototype, in any order; known at trace time.
      num_classes: C.
    """
    own, members, real = of_own_class(distances, labels, prototype_classes, num_classes)
    divergence = jeffreys_divergence(log_distance_vectors(own, members), members)
    pairs = real[:, :, None] & real[:, None, :] & np.triu(np.ones(2 * real.shape[1:], bool), 1)
    similarity = jnp.where(pairs, jnp.exp(-divergence), 0.0).sum((-2, -1))
    similarity /= np.maximum(pairs.sum((-2, -1)), 1)
    return jnp.where(present(labels, prototype_classes, num_classes), similarity, 0.0)
