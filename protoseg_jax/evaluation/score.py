"""Scoring a phase of a run on a split: for training's summary and eval.py alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protoseg_jax.errors import UserError
from protoseg_jax.evaluation import overlap as overlaps
from protoseg_jax.evaluation import predictions, report, segmentation
from protoseg_jax.evaluation.measures import Context, modules, take
from protoseg_jax.files import read_json, write_json
from protoseg_jax.run.checkpoints import Checkpoint
from protoseg_jax.run.experiment import Experiment
from protoseg_jax.run.finished import Finished


def evaluate(
    experiment: Experiment,
    checkpoint: Checkpoint,
    split: str,
    *,
    overlap: bool = True,
    flips: bool = False,
) -> dict[str, Any]:
    """Scores of a checkpoint on a split with labels, as `segmentation` and `overlap` give them.

    Args:
      experiment, checkpoint: the run and the phase.
      split: its name.
      overlap: whether to measure Table 2's overlap too.
      flips: average class probabilities over mirror images.
    """
    inference = experiment.inference(checkpoint.prototypes)
    if flips:
        inference = inference.with_flips(experiment.config.augment.turns)
    context = Context(experiment, inference, split)
    second = overlaps.make(context) if overlap else overlaps.NOT_MEASURED
    made = [segmentation.make(context), second]
    return take(context, made, checkpoint.variables, experiment.eval_batches(split))


def measure(
    experiment: Experiment,
    checkpoint: Checkpoint,
    split: str,
    names: Sequence[str] = (),
    novel: int | None = None,
) -> dict[str, Any]:
    """The measures of these names of a checkpoint on a split.

    Args:
      experiment, checkpoint: the run and the phase.
      split: its labels are compared with.
      names: the measures; by default config.measures.
      novel: a class to be measured as if it were held out, for comparison with a run that has never
        seen it; by default the one that this run holds out, if any.
    """
    held_out = experiment.held_out if novel is None else novel
    context = Context(experiment, experiment.inference(checkpoint.prototypes), split, held_out)
    made = [m.make(context) for m in modules(names or experiment.config.measures)]
    batches = experiment.eval_batches(split, held_out=True)
    return take(context, made, checkpoint.variables, batches)


def score_run(
    workdir: str,
    split: str,
    phase: str | None = None,
    out: str | None = None,
    *,
    flips: bool = False,
    interpretability: bool = False,
    measures: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Score a run's phase on a split: print the table, write DIR/eval/SPLIT-PHASE.json.

    A split without labels has predictions only, and no scores.

    Args:
      workdir: the run's folder.
      split: train, validation or test.
      phase: a finished phase; None for the last one.
      out: folder for predicted label PNGs (see `predictions`), or None.
      flips: average class probabilities over mirror images; what is written is then
        SPLIT-PHASE-flips.json, beside the plain one.
      interpretability: measure the explanations too.
      measures: by what; by default config.measures.

    Raises:
      UserError: no run there, the phase is not reached, the split does not exist or has no labels
        to be scored by, or the black box is to explain itself.
    """
    run = Finished.load(workdir, phase)
    experiment, data = run.experiment, run.experiment.data
    if interpretability and experiment.black_box:
        raise UserError(
            f"run {workdir!r} is the black box (model.head='linear'), which has no prototypes to "
            "measure; leave --interpretability out"
        )
    if interpretability:
        modules(measures or experiment.config.measures)  # what is unknown is told at once
    labelled = data.labelled(split)
    if not labelled and not out:
        raise UserError(
            f"split {split!r} of data set {data.name!r} has no labels, so it cannot be scored; "
            "write its predictions with --predictions=OUT"
        )
    if out:
        predictions.write(experiment, run.checkpoint, split, Path(out), flips=flips)
    if not labelled:
        return None
    names = experiment.labels.names
    scores = evaluate(experiment, run.checkpoint, split, flips=flips)
    result = {
        "split": split,
        "phase": run.phase,
        "images": data.splits[split],
        "flips": flips,
        **scores,
        "iou": dict(zip(names, scores["iou"], strict=True)),
    }
    suffix = "-flips" if flips else ""
    stored = run.workdir.path / "eval" / f"{split}-{run.phase}{suffix}.json"
    kept = report.measures_in(read_json(stored, {}))  # of the same checkpoint: they hold
    if interpretability:
        kept = kept if measures else {}
        kept |= measure(experiment, run.checkpoint, split, measures)
    if kept:
        result["interpretability"] = kept
    write_json(stored, result)
    mirrored = ", each averaged over mirror images" if flips else ""
    print(f"{split}: {data.splits[split]} images after {run.phase}{mirrored}\n")
    print(report.class_table(result, names))
    if kept and not interpretability:
        print("measured earlier, of the same checkpoint:")
    if kept:
        for line in report.measure_lines(kept, measures or experiment.config.measures):
            print(line)
    return result
