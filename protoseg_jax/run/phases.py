"""The multi-step training protocol of section 3.2, as data.

| phase | kind | what happens |
| --- | --- | --- |
| `warmup` | train | ASPP and prototypes |
| `joint` | train | ResNet, ASPP and prototypes |
| `projection` | projection | every prototype becomes its nearest training patch |
| `finetune` | train | the last layer, with the L1 term of eq. 8 |
| `pruning` | pruning | prototypes that are not class-specific are dropped |
| `finetune_pruned` | train | the last layer again |

With `model.head = "directions"` there is one phase, `directions`, of its own kind.

A config says for each phase how many `steps` it has (0: the phase is left out), for the training
ones also `learning_rates` by parameter group (one that is not named, or has rate 0, is frozen) and
the `schedule`. Projection and pruning take one step: a pass over the training set.
"""

import dataclasses

import ml_collections

from protoseg_jax import models
from protoseg_jax.errors import UserError

DIRECTIONS = "directions"
ORDER = (DIRECTIONS, "warmup", "joint", "projection", "finetune", "pruning", "finetune_pruned")
_SEARCHES = ("projection", "pruning")
_FINETUNES = ("finetune", "finetune_pruned")
SMOKE_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase.

    Attributes:
      name: one of `ORDER`.
      kind: "train", "projection", "pruning" or "directions".
      steps: optimiser steps (1 for a search).
      learning_rates: learning rate at the start, by trainable parameter group.
      schedule: "constant", or "poly": rate · (1 − t/T)^0.9.
    """

    name: str
    kind: str
    steps: int
    learning_rates: dict[str, float] = dataclasses.field(default_factory=dict)
    schedule: str = "constant"


def from_config(config: ml_collections.ConfigDict) -> list[Phase]:
    """The phases of a config, in order; phases of 0 steps are absent.

    With `model.head = 'linear'` (the black-box twin) there is nothing to project, prune or
    fine-tune: those phases do not exist and the fine-tunings' steps are added to `joint`, so that
    both have the same budget, and so are those of a warm-up that trains nothing of the twin and of
    `pretrained.blackbox`; the twin trains where its ASPP trains, a last layer of its own
    (`models.twin_has_head`) at the rate of what is before it.

    Raises:
      UserError: an unknown phase, group or schedule, a negative number of steps, or nothing to
        train.
    """
    for name in config.phases:
        if name not in ORDER:
            raise UserError(f"phases.{name} is no phase; the phases are {', '.join(ORDER)}")
    post_hoc, black_box = (config.model.head == head for head in ("directions", "linear"))
    steps = {name: int(config.phases[name].steps) for name in ORDER if name in config.phases}
    for name, count in steps.items():
        if count < 0:
            raise UserError(f"phases.{name}.steps={count} must not be negative; 0 leaves it out")
    if post_hoc:
        return [_phase(config, DIRECTIONS, max(steps.get(DIRECTIONS, 0), 1))]
    steps.pop(DIRECTIONS, None)
    if black_box:
        steps["joint"] = steps.get("joint", 0) + sum(steps.get(n, 0) for n in _FINETUNES)
        steps["joint"] += config.pretrained.blackbox
        steps = {n: s for n, s in steps.items() if n not in (*_SEARCHES, *_FINETUNES)}
        if steps.get("warmup") and not _phase(config, "warmup", 1).learning_rates:
            steps["joint"] += steps.pop("warmup")  # of prototypes alone, say
    found = [_phase(config, name, count) for name, count in steps.items() if count]
    for phase in found:
        if phase.kind == "train" and not phase.learning_rates:
            raise UserError(
                f"phases.{phase.name} trains nothing: none of its learning_rates is above 0; set "
                f"--config.phases.{phase.name}.steps=0 to leave it out"
            )
    return found


def _phase(config: ml_collections.ConfigDict, name: str, steps: int) -> Phase:
    section, network = config.phases[name], models.groups(config.model)
    if name in _SEARCHES:
        return Phase(name, kind=name, steps=1)
    rates = {group: float(rate) for group, rate in section.learning_rates.items()}
    groups = (*network, "prototypes", "head")
    for group in rates:
        if group not in groups:
            raise UserError(
                f"phases.{name}.learning_rates.{group} is no parameter group of this network; "
                f"its groups are {', '.join(groups)}"
            )
    rates = {group: rate for group, rate in rates.items() if rate}
    if section.schedule not in ("constant", "poly"):
        raise UserError(
            f"phases.{name}.schedule={section.schedule!r} is unknown; use 'constant' or 'poly'"
        )
    if config.model.head == "linear":
        rates = {g: r for g, r in rates.items() if g in network}
        if network[1] in rates and models.twin_has_head(config.model):
            rates["head"] = rates[network[1]]
    kind = DIRECTIONS if name == DIRECTIONS else "train"
    if kind == DIRECTIONS and "prototypes" not in rates:
        raise UserError(
            "phases.directions.learning_rates.prototypes is missing or 0, and it is the rate at "
            "which directions are sought; for those of no training set --config.model.directions="
            "identity or random"
        )
    if config.model.anchors is not None and "prototypes" in rates and kind == "train":
        rates["anchors"] = rates["prototypes"]
    return Phase(name, kind, steps, rates, section.schedule)


def smoke(config: ml_collections.ConfigDict) -> None:
    """Cut every training phase of a config to three steps, in place (`--smoke`)."""
    for name in config.phases:
        if name not in _SEARCHES:
            config.phases[name].steps = min(config.phases[name].steps, SMOKE_STEPS)
    config.pretrained.blackbox = min(config.pretrained.blackbox, SMOKE_STEPS)
    config.augment.views = min(config.augment.views, 1)
    config.log_every = 1
    config.eval_every = 0
