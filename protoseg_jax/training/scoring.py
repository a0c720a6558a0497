"""Scoring a finished phase of a run, as eval.py does."""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from protoseg_jax import inference as inferences
from protoseg_jax.data.tiles import Tiled
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation import evaluate as evaluation
from protoseg_jax.evaluation import interpretability as measures
from protoseg_jax.evaluation import segmentation
from protoseg_jax.evaluation.submissions import submission
from protoseg_jax.training.run import Run
from protoseg_jax.workdir import Checkpoint, Workdir, write_atomically, write_json


def score_run(
    workdir: str,
    split: str,
    phase: str | None,
    predictions: str | None,
    *,
    flips: bool = False,
    interpretability: bool = False,
) -> dict | None:
    """Score a run's phase on a split: print the table, write DIR/eval/SPLIT-PHASE.json.

    A split without labels has predictions only, and no scores.

    Args:
      workdir: the run's folder.
      split: train, validation or test.
      phase: a finished phase; None for the last one.
      predictions: folder for predicted label PNGs (see `submissions`), or None.
      flips: average class probabilities over mirror images; what is written is then
        SPLIT-PHASE-flips.json, beside the plain one.
      interpretability: measure the explanations too (see `evaluation.interpretability`).

    Raises:
      UserError: no run there, the phase is not reached, the split does not exist or has no labels
        to be scored by, or the black box is to explain itself.
    """
    folder = Workdir.existing(workdir)
    run = Run(folder.config(), folder)
    finished = folder.finished([p.name for p in run.phases], phase)
    phase = phase or finished[-1]
    if interpretability and run.black_box:
        raise UserError(
            f"run {workdir!r} is the black box (model.head='linear'), which has no prototypes to "
            "measure; leave --interpretability out"
        )
    labelled = run.data.labelled(split)
    if not labelled and not predictions:
        raise UserError(
            f"split {split!r} of data set {run.data.name!r} has no labels, so it cannot be scored; "
            "write its predictions with --predictions=OUT"
        )
    checkpoint = folder.restore(phase)
    if predictions:
        write_predictions(run, checkpoint, split, Path(predictions), flips=flips)
    if not labelled:
        return None
    names = run.data.label_set.names
    scores = run.score(checkpoint, split, flips=flips)
    result = {
        "split": split,
        "phase": phase,
        "images": run.data.splits[split],
        "flips": flips,
        **scores,
        "iou": dict(zip(names, scores["iou"], strict=True)),
    }
    (folder.path / "eval").mkdir(exist_ok=True)
    name = f"{split}-{phase}-flips.json" if flips else f"{split}-{phase}.json"
    stored = folder.path / "eval" / name
    if interpretability:
        result["interpretability"] = measure(run, checkpoint, split)
    elif stored.is_file():  # measures of the same checkpoint still hold
        kept = json.loads(stored.read_text())
        result |= {k: kept[k] for k in ("interpretability",) if k in kept}
    write_json(stored, result)
    print(evaluation.class_table(result, names))
    for name, value in measures.table(result.get("interpretability", {})):
        print(f"{name}  {value}")
    return result


def measure(run: Run, checkpoint: Checkpoint, split: str, novel: int | None = None) -> dict:
    """The measures of `evaluation.interpretability` of a checkpoint on a split.

    Args:
      run, checkpoint: the run and the phase.
      split: its labels are compared with.
      novel: a class to be measured as if it were held out, for comparison with a run that has never
        seen it; by default the one that this run holds out, if any.
    """
    inference = run.inference(checkpoint.prototypes)
    batches, part_classes = run.eval_batches(split, held_out=True), np.zeros(0, int)
    if run.data.part_names:
        examples = run.examples(split)
        part_classes = measures.part_classes(examples, len(run.data.part_names), run.num_classes)
        size = inference.feature_sizes(tuple(run.config.eval_size))[-1]
        batches = measures.with_centroids(batches, examples, size)
    return measures.measures(
        run.pool,
        inference,
        checkpoint.variables,
        batches,
        prototype_classes=run.classes_of(checkpoint.prototypes),
        part_classes=part_classes,
        held_out=run.held_out if novel is None else novel,
    )


def write_predictions(
    run: Run, checkpoint: Checkpoint, split: str, out: Path, *, flips: bool
) -> None:
    """Predicted labels of a split as files, at the labels' own size (see `submissions`)."""
    inference = run.inference(checkpoint.prototypes)
    if flips:
        inference = inferences.flipped(inference, run.config)

    def predict(variables, batch):
        def one(image):
            logits, size = (x[None] for x in image)
            canvas = batch["label"].shape[1:]
            return segmentation.upsample(logits, size, canvas)[0].argmax(-1).astype(jnp.uint8)

        output = inference(variables, batch["image"])
        return jax.lax.map(one, (output.logits, batch["size"]))

    step = run.pool.map(predict)
    variables = run.pool.replicate(checkpoint.variables)
    source = run.data.source(split)
    examples = run.examples(split)

    def predictions():
        for batch in run.eval_batches(split):
            labels = np.asarray(step(variables, run.pool.shard(batch)))
            labels = labels.reshape(-1, *labels.shape[2:])
            for label, size, index in zip(labels, batch["size"], batch["index"], strict=True):
                if index >= 0:
                    yield int(index), label[: size[0], : size[1]]

    whole = _stitched(predictions(), examples) if isinstance(examples, Tiled) else predictions()
    for index, label in whole:
        name, png = submission(run.data.name, split, source[index]["image_id"], label)
        write_atomically(out / name, png)


def _stitched(
    predictions: Iterable[tuple[int, np.ndarray]], tiles: Tiled
) -> Iterator[tuple[int, np.ndarray]]:
    """(tile's number, labels), in order → (image's number, labels) of each tile's own part."""
    for image, group in itertools.groupby(predictions, lambda p: tiles.places[p[0]].image):
        parts = [(tiles.places[index], label) for index, label in group]
        whole = np.zeros(parts[-1][0].own[2:], np.uint8)  # the last tile ends at the far corner
        for place, label in parts:
            (top, left), (y0, x0, y1, x1) = place.corner, place.own
            whole[y0:y1, x0:x1] = label[y0 - top : y1 - top, x0 - left : x1 - left]
        yield image, whole
