"""The assignment loss: every point belongs to one of its class's prototypes, all of them alike.

Not in the paper, whose cross-entropy lets a class's points collapse into one and leaves prototypes
without any. Here the points of each class are divided among its prototypes, evenly, by optimal
transport, and each point's distances are trained to say which one it got:

    L_A = mean over the points of −Σ_k a_k log softmax_k(−d_k / τ),

k over the prototypes of the point's class, d = ‖z − p‖². The assignment a, of which there is no
gradient, is what Sinkhorn's iteration makes of exp(−d / ε): each prototype's share of its class's
points in the *global* batch is made equal, then each point's shares are made to sum to 1, three
times.

Where the model gives a context t, the backbone's own map, this a is only the beginning: with it
each prototype has a mean of t over the batch, and what counts is the a that the same iteration
makes of the squared distances to those means: a step of k-means in the backbone's map, by whose
clusters z is then trained. What the backbone knows of parts is more than what cross-entropy leaves
of it in z.

Relatives: Asano et al. (SeLa, 2020), Caron et al. (SwAV, 2020) and Zhou et al.
(Rethinking Semantic Segmentation, 2022).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from protoseg_jax.devices import pmax, psum
from protoseg_jax.losses import Term, Weights
from protoseg_jax.losses.own_class import class_members, of_own_class
from protoseg_jax.models.protoseg import Output

STEPS = 3  # of Sinkhorn's iteration
_PRECISION = jax.lax.Precision.HIGHEST


def make(config: ConfigDict, classes: np.ndarray, num_classes: int, weights: Weights) -> Term:
    """λ_A (`config.assignment`) times L_A over the points of classes with two or more prototypes;
    nothing for the black box. With accumulation the points of a micro-batch are divided."""

    def total(output: Output, labels: Int[Array, "b h w"]) -> Float[Array, ""]:
        own, members, real = of_own_class(output.distances, labels, classes, num_classes)
        target = assign(jax.lax.stop_gradient(own), members, real, config.assignment_epsilon)
        if output.context is not None:
            apart = to_centres(output.context, target, members)
            target = assign(apart, members, real, config.assignment_context)
        return cross_entropy(own, target, members, real, config.assignment_tau).sum()

    several = np.bincount(classes, minlength=num_classes) >= 2
    return Term(
        name="assignment",
        weight=float(config.assignment) if several.any() else 0.0,
        count=lambda labels: (
            (class_members(labels, num_classes) & several).sum().astype(jnp.float32)
        ),
        total=total,
    )


def assign(
    own: Float[Array, "b n k"],
    members: Bool[Array, "b n c"],
    real: Bool[np.ndarray, "c k"],
    epsilon: float,
) -> Float[Array, "b n k"]:
    """a: the share that each prototype of its class has in a point; rows sum to 1, void ones are 0.

    To be called inside a function that is mapped over the devices: the balance is over all of them.

    Args:
      own: each point's distances to the prototypes of its class.
      members: the class of each point.
      real: the slots of each class that hold a prototype.
      epsilon: ε; the smaller, the harder the assignment.
    """
    weights, real = members.astype(jnp.float32), jnp.asarray(real)

    def at_points(per_class: Float[Array, "c k"]) -> Float[Array, "b n k"]:
        return jnp.einsum("bnc,ck->bnk", weights, per_class, precision=_PRECISION)

    held = at_points(real.astype(jnp.float32)) > 0.5
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

    log_a = by_point(log_a)
    for _ in range(STEPS):
        log_a = by_point(by_prototype(log_a))
    return jnp.exp(log_a)


def to_centres(
    context: Float[Array, "b h w t"], a: Float[Array, "b n k"], members: Bool[Array, "b n c"]
) -> Float[Array, "b n k"]:
    """Mean squared difference, over the channels, of each point's context and that of the points
    of each prototype of its class: the mean over the global batch, weighted by their shares a.

    To be called as `assign` is.
    """
    t = context.reshape(*a.shape[:2], -1).astype(jnp.float32)
    weights = members.astype(jnp.float32)
    shares = jnp.einsum("bnc,bnk->bnck", weights, a, precision=_PRECISION)
    sums = jnp.einsum("bnck,bnt->ckt", shares, t, precision=_PRECISION)
    sums, total = psum((sums, shares.sum((0, 1))))
    centres = sums / jnp.where(total > 0, total, 1.0)[..., None]
    across = jnp.einsum("bnt,ckt->bnck", t, centres, precision=_PRECISION)
    across = jnp.square(centres).sum(-1) - 2 * across
    own = jnp.where(members[..., None], across, 0.0).sum(2)
    known = members.any(-1, keepdims=True)
    return jnp.where(known, own + jnp.square(t).sum(-1, keepdims=True), 0.0) / t.shape[-1]


def cross_entropy(
    own: Float[Array, "b n k"],
    target: Float[Array, "b n k"],
    members: Bool[Array, "b n c"],
    real: Bool[np.ndarray, "c k"],
    tau: float,
) -> Float[Array, "b n"]:
    """−Σ_k a_k log softmax_k(−d_k / τ) at each point of a class with two or more prototypes; 0
    elsewhere.

    Args:
      own, members, real: see `assign`.
      target: a.
      tau: τ.
    """
    real = np.asarray(real)
    held = jnp.einsum("bnc,ck->bnk", members.astype(jnp.float32), real.astype(np.float32)) > 0.5
    several = (members & (real.sum(1) >= 2)).any(-1)
    logits = jnp.where(held, -own / tau, 0.0)
    peak = jax.lax.stop_gradient(jnp.where(held, logits, -jnp.inf).max(-1, keepdims=True))
    shifted = jnp.where(held, logits - jnp.where(jnp.isfinite(peak), peak, 0.0), 0.0)
    total = jnp.where(held, jnp.exp(shifted), 0.0).sum(-1, keepdims=True)
    log_p = shifted - jnp.log(jnp.where(total > 0, total, 1.0))
    return jnp.where(several, -(target * jnp.where(held, log_p, 0.0)).sum(-1), 0.0)
