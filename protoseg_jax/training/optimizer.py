"""A phase's optimiser: `optax.multi_transform` over the phase's parameter groups.

Section 4: Adam (β = 0.9/0.999, ε = 1e-8) with weight decay 5e-4. The decay is *coupled* L2, as in
the released code: added to the gradient before the moments, where the network's rules say so
(`models.decay`). Every phase starts with fresh moments.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from protoseg_jax.errors import UserError
from protoseg_jax.run.phases import Phase

WEIGHT_DECAY = 5e-4
_POLY_POWER = 0.9

Rules = Mapping[str, Callable[[tuple[str, ...]], bool]]
"""By parameter group: whether the parameter at a path within the tree decays."""


def schedule(phase: Phase, rate: float) -> optax.Schedule:
    """Learning rate by step inside the phase: constant, or rate · (1 − t/T)^0.9."""
    if phase.schedule == "poly":
        return optax.polynomial_schedule(rate, 0.0, _POLY_POWER, phase.steps)
    return optax.constant_schedule(rate)


def make(phase: Phase, trainable: Mapping[str, Any], rules: Rules) -> optax.GradientTransformation:
    """The optimiser of a phase.

    Args:
      phase: its learning rates name the trainable groups.
      trainable: the parameters of those groups, `{group: subtree}`. Frozen groups are not part of
        the tree at all: they have neither gradients nor moments.
      rules: what decays.

    Raises:
      UserError: a group that no rule covers, which must not go silently without decay.
    """
    uncovered = trainable.keys() - rules.keys()
    if uncovered:
        raise UserError(
            f"no decay rule covers the parameter group {', '.join(sorted(uncovered))}; name it in "
            "GROUPS of the backbone's module"
        )

    def decayed(path: tuple, _: Any) -> bool:
        names = tuple(key.key for key in path)
        return rules[names[0]](names)

    def transform(rate: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.add_decayed_weights(
                WEIGHT_DECAY, mask=lambda p: jax.tree_util.tree_map_with_path(decayed, p)
            ),
            optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
            optax.scale_by_learning_rate(schedule(phase, rate)),
        )

    return optax.multi_transform(
        {group: transform(rate) for group, rate in phase.learning_rates.items()},
        {group: group for group in trainable},
    )
