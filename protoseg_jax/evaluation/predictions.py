"""Predicted labels as files, in the data set's submission format where it has one."""

from pathlib import Path

import jax
import numpy as np

from protoseg_jax.data.tiles import Tiled
from protoseg_jax.evaluation import segmentation
from protoseg_jax.files import write_atomically
from protoseg_jax.run.checkpoints import Checkpoint
from protoseg_jax.run.experiment import Experiment


def write(
    experiment: Experiment, checkpoint: Checkpoint, split: str, out: Path, *, flips: bool
) -> None:
    """Predicted labels of a split, with labels or without, below `out`, at the labels' own size;
    `flips` averages class probabilities over mirror images."""
    inference = experiment.inference(checkpoint.prototypes)
    if flips:
        inference = inference.with_flips(experiment.config.augment.turns)

    def step(variables, batch):
        def one(image):
            logits, size = (x[None] for x in image)
            return segmentation.predict(logits, size, batch["label"].shape[1:])[0]

        logits = inference(variables, batch["image"]).logits
        return jax.lax.map(one, (logits, batch["size"]))

    def predictions():
        batches = experiment.eval_batches(split)
        for batch, found in experiment.pool.outputs(step, checkpoint.variables, batches):
            labels = np.asarray(found).reshape(-1, *found.shape[2:])
            for label, size, index in zip(labels, batch["size"], batch["index"], strict=True):
                if index >= 0:
                    yield int(index), label[: size[0], : size[1]]

    source, examples = experiment.data.source(split), experiment.examples(split)
    whole = examples.stitch(predictions()) if isinstance(examples, Tiled) else predictions()
    for index, label in whole:
        name, png = experiment.data.submission(split, source[index]["image_id"], label)
        write_atomically(out / name, png)
