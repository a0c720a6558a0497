"""The train step: eqs 6–8 on a global batch, gradients for the phase's groups only, pmap'd.

Sums and counts are psum'd, so N devices compute what one computes. Both denominators (non-void
points, (image, class) pairs) depend on labels only: with accumulation they are counted first over
the whole global batch, then the micro-batches are looped over.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from protoseg_jax import losses
from protoseg_jax.devices import psum
from protoseg_jax.inference import Inference, shrink_labels
from protoseg_jax.training import optimizer as optimizers
from protoseg_jax.training.phases import Phase


@flax.struct.dataclass
class TrainState:
    """What a step changes.

    Attributes:
      step: steps done in this phase.
      trainable: parameters of the phase's groups, `{group: subtree}`.
      moments: the optimiser's state.
    """

    step: Int[Array, ""]
    trainable: dict[str, Any]
    moments: Any


def split(params: Mapping[str, Any], phase: Phase) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters → (trainable groups, frozen groups) of a phase."""
    trainable = {g: p for g, p in params.items() if g in phase.learning_rates}
    return trainable, {g: p for g, p in params.items() if g not in trainable}


def init_state(params: Mapping[str, Any], phase: Phase) -> TrainState:
    """The state at a phase's first step, with fresh moments."""
    trainable, _ = split(params, phase)
    moments = optimizers.make(phase, trainable).init(trainable)
    return TrainState(jnp.zeros((), jnp.int32), trainable, moments)


def make_step(
    inference: Inference,
    phase: Phase,
    *,
    prototype_classes: np.ndarray,
    num_classes: int,
    loss_config: ml_collections.ConfigDict,
    accumulate: int,
    feature_sizes: Sequence[tuple[int, int]],
    class_weights: np.ndarray | None = None,
) -> Callable:
    """The train step of a phase, to be mapped by `DevicePool.map`.

    Args:
      inference: the model and its preprocessing.
      phase: what trains.
      prototype_classes: [M], class of each prototype.
      num_classes: C.
      loss_config: `diversity` (λ_J), `l1` (λ_L1), `diversity_reduction`: "present" takes the mean
        over the (image, class) pairs present in the global batch, as the released code does per
        micro-batch; "all_classes" is eq. 6's 1/C.
      accumulate: micro-batches each device's part of the batch is split into.
      feature_sizes: (h, w) of the feature map of each of the model's outputs for a training crop.
        With MSC each output has its own labels and loss, and the losses are averaged (METHOD).
      class_weights: [C] of a point in the cross-entropy, by its class; None for the paper's.

    Returns:
      step(state, frozen, constants, batch) → (state, metrics): `frozen` are the other parameter
      groups, `constants` the model's non-parameter variables, `batch` has "image" uint8 [b H W 3]
      and "label" uint8 [b H W]; metrics are scalars, equal on every device.
    """
    black_box = len(prototype_classes) == 0
    diversity_weight = 0.0 if black_box else float(loss_config.diversity)

    def denominators(points: Int[Array, "b h w"]) -> dict[str, Float[Array, ""]]:
        """Non-void points' weight and (image, class) pairs of the global batch; 1 for none."""
        pairs = jnp.zeros(())
        if not black_box:
            if loss_config.diversity_reduction == "all_classes":
                pairs = jnp.float32(points.shape[0] * num_classes)
            else:
                present = losses.diversity_present(points, prototype_classes, num_classes)
                pairs = present.sum().astype(jnp.float32)
        weight = losses.valid_points(points, num_classes, class_weights)
        sums = psum({"points": weight, "pairs": pairs})
        return jax.tree.map(lambda n: jnp.where(n > 0, n, 1.0), sums)

    def loss(trainable, frozen, constants, images, points, counts):
        params = {**frozen, **trainable}
        outputs = inference.outputs({"params": params, **constants}, images)
        terms = {"cross_entropy": jnp.zeros(()), "diversity": jnp.zeros(())}
        for output, labels, count in zip(outputs, points, counts, strict=True):
            share = len(outputs) * count["points"]
            args = output.logits, labels, class_weights
            terms["cross_entropy"] += losses.cross_entropy_sum(*args) / share
            if diversity_weight:
                args = output.distances, labels, prototype_classes, num_classes
                share = len(outputs) * count["pairs"]
                terms["diversity"] += losses.diversity(*args).sum() / share
        total = terms["cross_entropy"] + diversity_weight * terms["diversity"]
        return total, terms

    def l1_loss(trainable):
        return losses.last_layer_l1(trainable["head"]["kernel"], prototype_classes)

    def step(state: TrainState, frozen, constants, batch):
        points = [shrink_labels(batch["label"], None, size) for size in feature_sizes]
        counts = [denominators(labels) for labels in points]
        gradient = jax.value_and_grad(loss, has_aux=True)

        def micro_step(images, points):
            (_, terms), grads = gradient(state.trainable, frozen, constants, images, points, counts)
            return grads, terms

        if accumulate == 1:
            grads, terms = micro_step(batch["image"], points)
        else:
            micro = jax.tree.map(
                lambda x: x.reshape(accumulate, -1, *x.shape[1:]), (batch["image"], points)
            )
            sums = jax.eval_shape(micro_step, *jax.tree.map(lambda x: x[0], micro))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
            (grads, terms), _ = jax.lax.scan(
                lambda sums, part: (jax.tree.map(jnp.add, sums, micro_step(*part)), None),
                zeros,
                micro,
            )
        grads, terms = psum((grads, terms))

        terms["l1"] = jnp.zeros(())
        if phase.l1:
            terms["l1"], l1_grads = jax.value_and_grad(l1_loss)(state.trainable)
            grads = jax.tree.map(lambda g, h: g + loss_config.l1 * h, grads, l1_grads)
        total = (
            terms["cross_entropy"]
            + diversity_weight * terms["diversity"]
            + loss_config.l1 * terms["l1"]
        )

        optimizer = optimizers.make(phase, state.trainable)
        updates, moments = optimizer.update(grads, state.moments, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": total, **terms}
        return TrainState(state.step + 1, trainable, moments), metrics

    return step
