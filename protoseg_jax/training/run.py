"""A run: its phases in order, each scored, drawn and checkpointed; resumable.

`train` is what `protoseg train` calls. Everything a run leaves behind is in its `Workdir`.
"""

import ml_collections
import numpy as np

from protoseg_jax import losses
from protoseg_jax.data.findings import absent_classes
from protoseg_jax.devices import barrier, is_main, leave_processes
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation import measures, report
from protoseg_jax.evaluation.score import evaluate
from protoseg_jax.files import write_json
from protoseg_jax.program import Interrupted
from protoseg_jax.progress import say
from protoseg_jax.prototypes import directions, pictures, project, prune
from protoseg_jax.run import phases as phases_lib
from protoseg_jax.run.checkpoints import Checkpoint
from protoseg_jax.run.experiment import Experiment
from protoseg_jax.run.live import Live
from protoseg_jax.run.phases import Phase
from protoseg_jax.run.workdir import Workdir
from protoseg_jax.training import loop, views
from protoseg_jax.training import start as starts

_SCORES = ("miou", "pixel_accuracy", "pixel_error", "overlap")


def check(experiment: Experiment, *, new: bool) -> Checkpoint | None:
    """Refuse what would only show later; where a `new` run starts.

    Returns:
      None of a run that goes on, or that trains a black box first.

    Raises:
      UserError: the batch does not divide, a size or number is too small, a loss term or measure
        does not exist, an image is smaller than a tile, a class has nothing to learn from, or a new
        run's weights are not its network's.
    """
    config = experiment.config
    experiment.pool.check_batch(config.batch_size, config.accumulate)
    if config.model.prototype_init not in starts.PROTOTYPE_INITS:
        raise UserError(
            f"model.prototype_init={config.model.prototype_init!r} is unknown; choose one of: "
            f"{', '.join(starts.PROTOTYPE_INITS)}"
        )
    for key in ("eval_batch_size", "log_every"):
        if config[key] < 1:
            raise UserError(f"{key}={config[key]} must be at least 1; set --config.{key}")
    if config.pretrained.blackbox < 0:
        raise UserError(
            f"pretrained.blackbox={config.pretrained.blackbox} must not be negative; 0 trains none"
        )
    # For what they refuse: a term or measure that does not exist, a crop that cannot be turned.
    losses.terms(config.loss, np.zeros(0, np.int64), experiment.num_classes)
    measures.modules(config.measures)
    _ = experiment.augmentation
    views.check(experiment)
    for key in ("crop_size", "eval_size"):
        size = tuple(config[key])
        points = (0, 0)
        if len(size) == 2 and min(size) >= 8:
            points = min(experiment.inference([]).feature_sizes(size), key=min)
        if min(points) < 2:
            raise UserError(
                f"{key}={size} is too small for the backbone: it leaves fewer than 2×2 points; "
                f"set --config.{key} to (height, width) of 8 pixels or more"
            )
    for split in ("validation", config.data.projection_split):
        experiment.examples(split)
    for split in dict.fromkeys((config.data.train_split, config.data.projection_split)):
        pixels = experiment.data.class_pixels(split)
        names = enumerate(experiment.labels.names)
        absent = [name for c, name in names if not pixels[c] and c != experiment.held_out]
        if absent:
            data = experiment.data
            raise absent_classes(absent, split, pixels, data.void_pixels(split), data.void)
    if new and config.pretrained.blackbox:
        if config.model.head == "directions":
            raise UserError(
                "pretrained.blackbox trains a black box to start a ProtoSeg from; "
                "model.head='directions' explains a trained one: set --config.pretrained.blackbox=0"
            )
        if experiment.trains_prototypes:
            try:
                starts.initial(Experiment(_black_box_config(config), experiment.pool))
            except UserError as error:
                raise UserError(f"of the black box of pretrained.blackbox: {error}") from error
            return None  # it starts from what is trained then
    return starts.initial(experiment) if new else None


def train(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Run, or go on with, the experiment of a config in a folder.

    Raises:
      UserError: the user must change something.
    """
    folder = Workdir(workdir)
    try:
        starts.settle(config, folder)
        folder.check_same(config)  # before its data are prepared
        live = Live(Experiment(config), folder)
        with live.interrupts:
            first = check(live.experiment, new=not folder.holds_run)
            folder.start(config)
            if live.experiment.data.drawn and is_main():
                write_json(folder.path / "split.json", live.experiment.data.drawn)
            go(live, first)
            barrier("the run is over")
    except BaseException as error:
        folder.checkpoints.finish_writing()
        if not isinstance(error, Interrupted):  # when interrupted, all processes stop together
            leave_processes(error)
        raise
    finally:
        folder.release()


def go(live: Live, first: Checkpoint | None = None) -> None:
    """Every phase that is not yet done.

    Args:
      live: the run.
      first: where it starts, if that is known already.
    """
    experiment, workdir = live.experiment, live.workdir
    if is_main():
        write_json(workdir.path / "classes.json", vars(experiment.labels))
    names = [phase.name for phase in experiment.phases]
    state = workdir.checkpoints.newest(names)
    at = names.index(state.phase) if state else 0
    # A phase beyond the checkpoint was scored only if its own checkpoint has been lost.
    over = names[: at + bool(state and state.finished)]
    summary = workdir.summary()
    kept = [entry for entry in summary if entry["phase"] in over]
    if len(kept) < len(summary):
        workdir.write_summary(kept)
    scored = [entry["phase"] for entry in kept]
    if scored[-1:] == names[-1:]:  # a ported run has no warm-up
        say(f"this run is finished ({workdir.path}); name another --workdir for a new one")
    elif state:
        say(f"going on in phase {state.phase} after step {state.step}")
    if state is None:
        if experiment.config.pretrained.blackbox and experiment.trains_prototypes:
            state = _black_box(live)
        else:
            state = first or starts.initial(experiment)
        if experiment.config.model.prototype_init == "patches" and experiment.trains_prototypes:
            state = starts.on_patches(experiment, state)
    left = [p for p in experiment.phases[at:] if p.name not in scored]
    if experiment.config.augment.views and any(p.kind == "train" for p in left):
        live.batches = views.batches(experiment, state)
    for phase in experiment.phases[at:]:
        if phase.name in scored:
            continue
        resumed = state.phase == phase.name
        before = names[: names.index(phase.name)]
        workdir.truncate_metrics(before, phase.name, state.step if resumed else 0)
        if not (resumed and state.finished):
            with live.interrupts.held():
                state = run_phase(live, phase, state)
                workdir.checkpoints.save(state)
                if stop := live.asked_to_stop():
                    raise Interrupted(stop)
        _summarise(live, phase, state)
    if is_main():
        print(report.stage_table(workdir.summary()))


def _black_box(live: Live) -> Checkpoint:
    """Where a run with `pretrained.blackbox` starts: its network trained without prototypes first,
    as a run of its own in a folder of this one's."""
    config, folder = _black_box_config(live.experiment.config), live.workdir.path / "blackbox"
    if any(entry["phase"] == "joint" for entry in Workdir(folder).summary()):
        say(f"the black box in {folder} is trained")
    else:
        say(f"training a black box first, in {folder}")
        train(config, str(folder))
    return starts.with_run(live.experiment, str(folder))


def _black_box_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    config.model.head = "linear"
    for name in config.phases:
        config.phases[name].steps = 0
    config.phases.joint.steps, config.pretrained.blackbox = config.pretrained.blackbox, 0
    return config


def run_phase(live: Live, phase: Phase, start: Checkpoint) -> Checkpoint:
    """A phase from the end of the one before, or from a place inside it."""
    if phase.kind == project.PHASE:
        return project.run(live, start)
    if phase.kind == prune.PHASE:
        return prune.run(live, start)
    if phase.kind == phases_lib.DIRECTIONS:
        return directions.run(live, phase, start)
    phases = live.experiment.phases
    before = phases[: [p.name for p in phases].index(phase.name)]
    first_batch = sum(p.steps for p in before if p.kind == "train")

    def validate(checkpoint: Checkpoint) -> float | None:
        return evaluate(live.experiment, checkpoint, "validation", overlap=False)["miou"]

    return loop.run(live, phase, start, first_batch, validate)


def _summarise(live: Live, phase: Phase, checkpoint: Checkpoint) -> None:
    """Score a finished phase on validation and add it to summary.json."""
    scores, workdir = evaluate(live.experiment, checkpoint, "validation"), live.workdir
    if phase.kind != "train" and is_main():
        pictures.write(workdir.path, live.experiment, checkpoint)
    workdir.checkpoints.wait()  # a phase that is scored must have its checkpoint
    entry = {
        "phase": phase.name,
        "steps": checkpoint.step if phase.kind == "train" else None,
        "num_prototypes": None if live.experiment.black_box else checkpoint.num_prototypes,
        **{k: scores[k] for k in _SCORES},
        **{k: scores[k] for k in ("f_error", "overlap_pooled") if k in scores},
        "seconds": round(checkpoint.seconds, 2),
    }
    others = [e for e in workdir.summary() if e["phase"] != phase.name]
    workdir.write_summary([*others, entry])
    say(f"{phase.name}: validation mIoU {report.percent(scores['miou'], '{:.2f} %')}")
