"""A new run without some of a run's prototypes."""

from collections.abc import Sequence

import ml_collections
import numpy as np

from protoseg_jax.errors import UserError
from protoseg_jax.evaluation import report
from protoseg_jax.evaluation.score import evaluate
from protoseg_jax.files import read_json, write_json
from protoseg_jax.prototypes import prune
from protoseg_jax.run.checkpoints import Checkpoint
from protoseg_jax.run.experiment import Experiment
from protoseg_jax.run.finished import Finished
from protoseg_jax.run.live import Live
from protoseg_jax.run.phases import DIRECTIONS
from protoseg_jax.run.workdir import Workdir
from protoseg_jax.training import run as runs


def remove(workdir: str, ids: Sequence[str], to: str, *, force: bool) -> None:
    """A new run without some prototypes, its last layer fine-tuned; prints what changed.

    Of directions of a trained network nothing is fine-tuned: what they added is 0 in the new run.

    The new run stands after pruning; what follows is phase `finetune_pruned` with its settings
    (those of `finetune` where a config has no such phase). The same call on a folder where this
    was interrupted goes on. The original is only read.

    Args:
      workdir: the run's folder.
      ids: numbers of the prototypes ("index" in prototypes.json).
      to: the new run's folder.
      force: also take a class's last prototype away.

    Raises:
      UserError: no such run or prototype, a class would have none left, the run is not projected,
        or the folder holds something else.
    """
    origin = Finished.load(workdir)
    origin.require_prototypes()
    if not origin.projected:
        raise UserError(
            f"run {workdir!r} has come to phase {origin.phase}, before projection, so its "
            "prototypes are not patches yet; let train.py go on"
        )
    keep = _kept(origin, ids, force)
    config, folder = _removal_config(origin.experiment.config), Workdir(to)
    gone = sorted(map(int, ids))
    said = {"from": str(origin.workdir.path), "phase": origin.phase, "removed": gone}
    record = folder.path / "removed.json"
    going_on = said.items() <= read_json(record, {}).items()
    if folder.path.exists() and any(folder.path.iterdir()) and not going_on:
        raise UserError(f"{to} is not empty; name a new folder with --to")
    live = Live(Experiment(config, labels=origin.experiment.labels), folder)
    live.experiment.pool.check_batch(config.batch_size, config.accumulate)
    before = evaluate(origin.experiment, origin.checkpoint, "validation", overlap=False)
    try:
        with live.interrupts:
            folder.start(config)
            if not going_on:
                kept = origin.checkpoint.keep(keep)
                phase = prune.PHASE if origin.experiment.trains_prototypes else DIRECTIONS
                folder.checkpoints.save(Checkpoint(phase, 1, True, kept.arrays, kept.prototypes))
                folder.checkpoints.wait()
                write_json(record, said)
            runs.go(live)
            final = folder.checkpoints.restore(live.experiment.phases[-1].name)
            after = evaluate(live.experiment, final, "validation", overlap=False)
    finally:
        folder.checkpoints.finish_writing()
        folder.release()
    write_json(record, {**said, "before": before, "after": after})
    print(report.change_table(before, after, live.experiment.labels.names))


def _kept(run: Finished, ids: Sequence[str], force: bool) -> np.ndarray:
    """Positions of the prototypes that stay.

    Raises:
      UserError: see `remove`.
    """
    prototypes = run.checkpoint.prototypes
    known = [p.index for p in prototypes if p.class_ >= 0]  # the bias of directions stays
    unknown = [i for i in ids if not i.isdecimal() or int(i) not in known]
    if unknown:
        raise UserError(
            f"run {str(run.workdir.path)!r} has no prototype {', '.join(unknown)}; "
            f'its {len(known)} prototypes are in prototypes.json, by "index"'
        )
    gone = set(map(int, ids))
    keep = [j for j, p in enumerate(prototypes) if p.index not in gone]
    left = {prototypes[j].class_ for j in keep if prototypes[j].class_ >= 0}
    bare = sorted({p.class_ for p in prototypes if p.class_ >= 0} - left)
    if not left or (bare and not force):
        names = ", ".join(repr(run.experiment.labels.names[c]) for c in bare)
        raise UserError(
            f"this would take the last prototype of class {names} away, and nothing would argue "
            "for it any more; keep one" + (", or add --force" if left else "")
        )
    return np.array(keep, int)


def _removal_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config with a pruning phase and a fine-tuning after it, where prototypes are trained."""
    config = config.copy_and_resolve_references()
    if config.model.head == "directions":
        return config
    phases = config.phases
    phases.pruning = {"steps": 1}
    if not phases.finetune_pruned.steps:
        if not phases.finetune.steps:
            raise UserError(
                "the run's config has neither a finetune_pruned nor a finetune phase, which say "
                "how the last layer is trained; name a run that has one"
            )
        phases.finetune_pruned = phases.finetune.copy_and_resolve_references()
    return config
