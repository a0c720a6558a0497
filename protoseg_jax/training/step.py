"""The train step: eqs 7 and 8 on a global batch, gradients for the phase's groups only, pmap'd.

Sums and counts are psum'd, so N devices compute what one computes. The denominators depend on
labels only: with accumulation they are counted first over the whole global batch, then the
micro-batches are looped over.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from protoseg_jax import losses
from protoseg_jax.devices import psum
from protoseg_jax.inference import Inference, shrink_labels
from protoseg_jax.losses import Penalty, Term
from protoseg_jax.run.phases import Phase
from protoseg_jax.training import optimizer as optimizers
from protoseg_jax.training.optimizer import Rules


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


def init_state(params: Mapping[str, Any], phase: Phase, rules: Rules) -> TrainState:
    """The state at a phase's first step, with fresh moments."""
    trainable, _ = split(params, phase)
    moments = optimizers.make(phase, trainable, rules).init(trainable)
    return TrainState(jnp.zeros((), jnp.int32), trainable, moments)


def make_step(
    inference: Inference,
    phase: Phase,
    terms: Sequence[Term | Penalty],
    rules: Rules,
    *,
    accumulate: int,
    feature_sizes: Sequence[tuple[int, int]],
) -> Callable:
    """The train step of a phase, to be mapped by `DevicePool.map`.

    Args:
      inference: the model and its preprocessing.
      phase: what trains.
      terms: of the objective, `losses.terms`.
      rules: what decays, `models.decay`.
      accumulate: micro-batches each device's part of the batch is split into.
      feature_sizes: (h, w) of the feature map of each of the model's outputs for a training crop.

    Returns:
      step(state, frozen, constants, batch) → (state, metrics): `frozen` are the other parameter
      groups, `constants` the model's non-parameter variables, `batch` has "image" uint8 [b H W 3]
      and "label" uint8 [b H W], or in their place (`views`) "maps", what the backbone says, and
      "label" Y_Z; metrics are scalars, equal on every device.
    """
    of_points = [term for term in terms if isinstance(term, Term)]
    penalties = [term for term in terms if isinstance(term, Penalty)]

    def denominators(labels: Int[Array, "b h w"]) -> dict[str, Float[Array, ""]]:
        """Each term's count over the global batch; 1 for none."""
        counts = psum({term.name: term.count(labels) for term in of_points})
        return jax.tree.map(lambda n: jnp.where(n > 0, n, 1.0), counts)

    def outputs(variables, seen):
        if "maps" in seen:
            return inference.outputs_of(variables, seen["maps"])
        return inference.outputs(variables, seen["image"])

    def loss(trainable, frozen, constants, seen, labels, counts):
        variables = {"params": {**frozen, **trainable}, **constants}
        values = losses.means(of_points, outputs(variables, seen), labels, counts)
        return losses.objective(of_points, values), values

    def step(state: TrainState, frozen, constants, batch):
        labels = [shrink_labels(batch["label"], None, size) for size in feature_sizes]
        counts = [denominators(own) for own in labels]
        # The sum over devices comes first: on a CPU it keeps a thread until the other devices are
        # there too, which may be in the middle of their forward pass.
        seen = {name: x for name, x in batch.items() if name != "label"}
        seen, counts = jax.lax.optimization_barrier((seen, counts))
        gradient = jax.value_and_grad(loss, has_aux=True)

        def micro_step(seen, labels):
            (_, values), grads = gradient(state.trainable, frozen, constants, seen, labels, counts)
            return grads, values

        if accumulate == 1:
            grads, values = micro_step(seen, labels)
        else:
            micro = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), (seen, labels))
            sums = jax.eval_shape(micro_step, *jax.tree.map(lambda x: x[0], micro))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
            (grads, values), _ = jax.lax.scan(
                lambda sums, part: (jax.tree.map(jnp.add, sums, micro_step(*part)), None),
                zeros,
                micro,
            )
        grads, values = psum((grads, values))
        for term in penalties:  # of the parameters, which every device has
            values[term.name] = jnp.zeros(())
            if phase.name in term.phases:
                values[term.name], more = jax.value_and_grad(term.value)(state.trainable)
                grads = jax.tree.map(lambda g, h, w=term.weight: g + w * h, grads, more)

        optimizer = optimizers.make(phase, state.trainable, rules)
        updates, moments = optimizer.update(grads, state.moments, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": losses.objective(terms, values), **values}
        return TrainState(state.step + 1, trainable, moments), metrics

    return step
