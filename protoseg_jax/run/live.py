"""A run that is going on: what it computes, where it writes, and the signals that stop it."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from protoseg_jax.devices import on_any_process
from protoseg_jax.program import Interrupts
from protoseg_jax.run.checkpoints import Checkpoint
from protoseg_jax.run.experiment import Experiment
from protoseg_jax.run.prototypes import Prototype
from protoseg_jax.run.workdir import Workdir


@dataclasses.dataclass
class Live:
    """An experiment in its folder.

    Attributes:
      experiment: what its config says.
      workdir: its folder.
      interrupts: signals that strike while it is at work.
      batches: the training batches from a number on; by default the experiment's.
    """

    experiment: Experiment
    workdir: Workdir
    interrupts: Interrupts = dataclasses.field(default_factory=Interrupts)
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]] | None = None

    def __post_init__(self):
        self.batches = self.batches or self.experiment.train_batches

    def asked_to_stop(self) -> int:
        """The signal that asked any process to stop, or 0; all must call this at the same place."""
        return on_any_process(self.interrupts.pending)


class Clock:
    """Makes the checkpoints of one phase, each with the seconds spent in it so far.

    Args:
      start: where the phase goes on, or the phase before it.
      phase: its name.
    """

    def __init__(self, start: Checkpoint, phase: str):
        self.phase, self._prototypes = phase, start.prototypes
        self.resumed = start.phase == phase
        self._begun = time.monotonic() - (start.seconds if self.resumed else 0.0)

    def checkpoint(
        self,
        step: int,
        arrays: dict[str, Any],
        prototypes: list[Prototype] | None = None,
        *,
        finished: bool,
    ) -> Checkpoint:
        """The run at a step of the phase, its prototypes by default those of the start."""
        prototypes = self._prototypes if prototypes is None else prototypes
        seconds = time.monotonic() - self._begun
        return Checkpoint(self.phase, step, finished, arrays, prototypes, seconds)
