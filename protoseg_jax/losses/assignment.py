"""The assignment loss: every point belongs to one of its class's prototypes, all of them alike.

Not in the paper, whose cross-entropy lets a class's points collapse into one and leaves prototypes
without any. Here the points of each class are divided among its prototypes, evenly, by optimal
transport, and each point's distances are trained to say which one it got:

    L_A = mean over the points of −Σ_k a_k log softmax_k(−d_k / τ),

k over the prototypes of the point's class, d = ‖z − p‖². The assignment a, of which there is no
gradient, is what Sinkhorn's iteration makes of exp(−d / ε): each prototype's share of its class's
points in the *global* batch is made equal, then each point's shares are made to sum to 1, three
times. With η below 1 the shares become η/K + (1 − η) n_k instead of 1/K, n_k the share that a
prototype has before the first time: a part of few points may have a prototype to itself.

With `model.anchors` the points are divided by the backbone's own map instead, which knows more of
parts than cross-entropy leaves in z. Each prototype has an *anchor* in it, a vector that only
training knows; a is made of exp(−e / ε_t), e the mean squared difference of a point to an anchor
over the map's channels; Σ_k a_k e_k is added to the loss, which moves the anchors alone: k-means
with clusters of one size. So z learns to tell the clusters of that map apart.

Relatives: Asano et al. (SeLa, 2020), Caron et al. (SwAV, 2020) and Zhou et al.
(Rethinking Semantic Segmentation, 2022).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from protoseg_jax.devices import pmax, psum
from protoseg_jax.errors import UserError
from protoseg_jax.losses import Term, Weights
from protoseg_jax.losses.own_class import class_members, of_own_class
from protoseg_jax.models.protoseg import Output

STEPS = 3  # of Sinkhorn's iteration
_NEVER = -1e30  # a logit of what a point cannot belong to; no infinity, which 0 times is not 0
_PRECISION = jax.lax.Precision.HIGHEST


def make(config: ConfigDict, classes: np.ndarray, num_classes: int, weights: Weights) -> Term:
    """λ_A (`config.assignment`) times L_A over the points of classes with two or more prototypes;
    nothing for the black box. With accumulation the points of a micro-batch are divided.

    Raises:
      UserError: η (`config.assignment_even`) is not in (0, 1].
    """

    if not 0 < config.assignment_even <= 1:
        raise UserError(
            f"loss.assignment_even={config.assignment_even} must be above 0 and at most 1"
        )
    several = np.bincount(classes, minlength=num_classes) >= 2

    def total(output: Output, labels: Int[Array, "b h w"]) -> Float[Array, ""]:
        own, members, real = of_own_class(output.distances, labels, classes, num_classes)
        by, epsilon, anchors = own, config.assignment_epsilon, output.apart is not None
        if anchors:
            by, *_ = of_own_class(output.apart, labels, classes, num_classes)
            epsilon = config.assignment_anchors
        even = config.assignment_even
        target = assign(jax.lax.stop_gradient(by), members, real, epsilon, even)
        target = jnp.where((members & several).any(-1, keepdims=True), target, 0.0)
        means = (target * by).sum() if anchors else 0.0  # k-means', for the anchors
        logits = jnp.where(_held(members, real), -own / config.assignment_tau, _NEVER)
        return means - (target * jax.nn.log_softmax(logits)).sum()

    return Term(
        name="assignment",
        weight=float(config.assignment) if several.any() else 0.0,
        count=lambda labels: (
            (class_members(labels, num_classes) & several).sum().astype(jnp.float32)
        ),
        total=total,
    )


def _held(members: Bool[Array, "b n c"], real: Bool[np.ndarray, "c k"]) -> Bool[Array, "b n k"]:
    """Whether a point's class has a prototype in a slot; none has a void point."""
    return (members[..., None] & real).any(2)


def assign(
    own: Float[Array, "b n k"],
    members: Bool[Array, "b n c"],
    real: Bool[np.ndarray, "c k"],
    epsilon: float,
    even: float = 1.0,
) -> Float[Array, "b n k"]:
    """a: the share that each prototype of its class has in a point; rows sum to 1, void ones are 0.

    To be called inside a function that is mapped over the devices: the balance is over all of them.

    Args:
      own: each point's distances to the prototypes of its class.
      members: the class of each point.
      real: the slots of each class that hold a prototype.
      epsilon: ε; the smaller, the harder the assignment.
      even: η in (0, 1]: how equal the prototypes' shares are.
    """
    weights, held = members.astype(jnp.float32), _held(members, real)

    def at_points(per_class: Float[Array, "c k"]) -> Float[Array, "b n k"]:
        return jnp.einsum("bnc,ck->bnk", weights, per_class, precision=_PRECISION)

    log_a = jnp.where(held, -own.astype(jnp.float32) / epsilon, -jnp.inf)

    def by_point(log_a: Float[Array, "b n k"]) -> Float[Array, "b n k"]:
        total = jax.nn.logsumexp(log_a, axis=-1, keepdims=True, where=held)
        return jnp.where(held, log_a - total, -jnp.inf)

    def by_prototype(log_a: Float[Array, "b n k"]) -> Float[Array, "b n k"]:
        peak = jnp.where(members[..., None], log_a[:, :, None, :], -jnp.inf).max((0, 1))
        peak = pmax(peak)
        peak = jnp.where(jnp.isfinite(peak), peak, 0.0)  # an absent class, a slot without prototype
        shifted = jnp.where(held, jnp.exp(jnp.where(held, log_a - at_points(peak), 0.0)), 0.0)
        total = psum(jnp.einsum("bnc,bnk->ck", weights, shifted, precision=_PRECISION))
        log_total = peak + jnp.log(jnp.where(total > 0, total, 1.0))
        return jnp.where(held, log_a - at_points(log_total), -jnp.inf)

    log_a, log_share = by_point(log_a), 0.0
    if even < 1:
        won = psum(jnp.einsum("bnc,bnk->ck", weights, jnp.exp(log_a), precision=_PRECISION))
        natural = won / jnp.maximum(won.sum(1, keepdims=True), 1.0)
        share = even / real.sum(1, keepdims=True).clip(1) + (1 - even) * natural
        log_share = at_points(jnp.log(jnp.where(real, share, 1.0)))
    for _ in range(STEPS):
        log_a = by_point(by_prototype(log_a) + log_share)
    return jnp.exp(log_a)
