"""A finished phase of a run, as scoring, explaining and exporting see it: loaded once, no training.

It needs the run's folder alone; the data set is looked for when `experiment.data` is touched.
"""

import dataclasses
import functools
import os

import numpy as np
from jaxtyping import Float

from protoseg_jax import models
from protoseg_jax.errors import UserError
from protoseg_jax.inference import Inference
from protoseg_jax.run.checkpoints import Checkpoint
from protoseg_jax.run.experiment import Experiment
from protoseg_jax.run.prototypes import Prototype, with_pictures
from protoseg_jax.run.workdir import Workdir


@dataclasses.dataclass(repr=False)
class Finished:
    """A run at the end of a phase.

    Attributes:
      workdir, experiment: the run's.
      phase: the phase's name.
      checkpoint: the run at its end.
    """

    workdir: Workdir
    experiment: Experiment
    phase: str
    checkpoint: Checkpoint

    @classmethod
    def load(cls, path: str | os.PathLike, phase: str | None = None) -> "Finished":
        """A phase of the run in a folder that train.py wrote; by default the last finished one.

        Raises:
          UserError: no run there, the phase is not finished, or its checkpoint is damaged.
        """
        workdir = Workdir.existing(path)
        experiment = Experiment(workdir.config(), labels=workdir.labels())
        names = [p.name for p in experiment.phases]
        finished = workdir.checkpoints.finished(names, phase)
        phase = phase or finished[-1]
        return cls(workdir, experiment, phase, workdir.checkpoints.restore(phase))

    def __repr__(self) -> str:
        count, classes = self.checkpoint.num_prototypes, ", ".join(self.experiment.labels.names)
        name = f"{type(self).__name__} {self.workdir.path}, phase {self.phase}"
        return f"<{name}: {count} {models.kind(self.experiment.config.model)}s of {classes}>"

    @functools.cached_property
    def inference(self) -> Inference:
        return self.experiment.inference(self.checkpoint.prototypes)

    @functools.cached_property
    def prototypes(self) -> list[Prototype]:
        """In the order of the model's M, with their pictures; empty for the black box."""
        return with_pictures(self.workdir.path, self.checkpoint.prototypes)

    @property
    def projected(self) -> bool:
        """Whether the prototypes are patches of training images yet."""
        return any(p.projected for p in self.checkpoint.prototypes)

    @property
    def kernel(self) -> Float[np.ndarray, "m c"] | None:
        """w_h; None for the black box."""
        params = self.checkpoint.arrays["params"]
        return None if self.experiment.black_box else np.asarray(params["head"]["kernel"])

    def require_prototypes(self) -> None:
        """Refuse the black box.

        Raises:
          UserError: the run is one.
        """
        if self.experiment.black_box:
            raise UserError(
                f"run {str(self.workdir.path)!r} is the black box (model.head='linear'): it has no "
                "prototypes to explain by; name a run with model.head='prototypes'"
            )
