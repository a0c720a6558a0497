"""Scoring a model on a split: one pass on the devices, for training and eval.py alike."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from protoseg_jax.devices import DevicePool, psum
from protoseg_jax.evaluation import segmentation
from protoseg_jax.inference import Inference


@functools.lru_cache(maxsize=4)
def make_eval_step(
    inference: Inference, prototype_classes: tuple[int, ...], num_classes: int, *, overlap: bool
) -> Callable:
    """step(variables, batch) → psum'd {"confusion": [C C], "overlap": OverlapSums or None}.

    The same arguments give the same function, so that scoring again compiles nothing.
    """

    def step(variables, batch):
        output = inference(variables, batch["image"])
        labels = batch["label"].astype(jnp.int32)

        def count(image):
            logits, label, size = (x[None] for x in image)
            full = segmentation.upsample(logits, size, label.shape[1:])
            return segmentation.confusion_matrix(full.argmax(-1), label, num_classes)

        confusion = jax.lax.map(count, (output.logits, labels, batch["size"])).sum(0)
        sums = None
        if overlap:
            sums = segmentation.overlap_sums(
                output.similarities,
                labels,
                batch["size"],
                np.array(prototype_classes),
                num_classes,
            )
        return psum({"confusion": confusion, "overlap": sums})

    return step


def evaluate(
    pool: DevicePool,
    inference: Inference,
    variables: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    prototype_classes: np.ndarray,
    num_classes: int,
    overlap: bool = True,
) -> dict[str, Any]:
    """Scores of a model over a split's evaluation batches.

    Args:
      pool: the devices.
      inference: the model.
      variables: its variables (unreplicated).
      batches: from `pipeline.eval_batches`.
      prototype_classes: [M]; empty for the black box, which has no overlap.
      num_classes: C.
      overlap: whether to measure Table 2's overlap too.

    Returns:
      `segmentation.scores` and "overlap" (mean of IoUs) and "overlap_pooled" (ΣI/ΣU), None where
      there are no pairs.
    """
    overlap = overlap and len(prototype_classes) > 0
    classes = tuple(np.asarray(prototype_classes).tolist())
    step = pool.map(make_eval_step(inference, classes, num_classes, overlap=overlap))
    variables = pool.replicate(variables)
    results = [step(variables, batch) for batch in pool.prefetch(batches)]
    confusion = np.zeros((num_classes, num_classes), np.int64)
    sums = np.zeros(4, np.float64)
    for result in results:
        result = pool.first(result)
        confusion += result["confusion"]
        if overlap:
            sums += np.array(result["overlap"], np.float64)
    iou, pairs, intersection, union = sums
    return {
        **segmentation.scores(confusion),
        "overlap": iou / pairs if pairs else None,
        "overlap_pooled": intersection / union if union else None,
    }


def stage_table(summary: list[dict[str, Any]]) -> str:
    """Table 3's form: stage, prototypes, mIoU, error, overlap, time; figures in per cent."""
    rows = [("stage", "prototypes", "mIoU %", "error %", "overlap %", "time")]
    for entry in summary:
        rows.append(
            (
                entry["phase"],
                _or_dash(entry["num_prototypes"], "{}"),
                _or_dash(entry["miou"], "{:.2f}", 100),
                _or_dash(entry["pixel_error"], "{:.2f}", 100),
                _or_dash(entry["overlap"], "{:.2f}", 100),
                _duration(entry["seconds"]),
            )
        )
    return _table(rows)


def class_table(scores: dict[str, Any], names: tuple[str, ...]) -> str:
    """IoU of each class and the pooled figures, in per cent."""
    rows = [("class", "IoU %")]
    rows += [(n, _or_dash(scores["iou"][n], "{:.2f}", 100)) for n in names]
    rows.append(("mean", _or_dash(scores["miou"], "{:.2f}", 100)))
    for key, label in (
        ("pixel_accuracy", "pixel accuracy"),
        ("pixel_error", "pixel error"),
        ("f_error", "1 − F (inside)"),
        ("overlap", "overlap"),
    ):
        if key in scores:
            rows.append((label, _or_dash(scores[key], "{:.2f}", 100)))
    return _table(rows)


def change_table(before: dict[str, Any], after: dict[str, Any], names: tuple[str, ...]) -> str:
    """IoU of each class, mean and pixel accuracy before and after a change, in per cent."""
    values = [("mean", before["miou"], after["miou"])]
    values.append(("pixel accuracy", before["pixel_accuracy"], after["pixel_accuracy"]))
    rows = [("class", "before %", "after %", "change")]
    for name, old, new in [*zip(names, before["iou"], after["iou"], strict=True), *values]:
        change = None if old is None or new is None else new - old
        cells = [_or_dash(x, "{:.2f}", 100) for x in (old, new)]
        rows.append((name, *cells, _or_dash(change, "{:+.2f}", 100)))
    return _table(rows)


def _or_dash(value: float | None, form: str, scale: float = 1) -> str:
    return "–" if value is None else form.format(value * scale)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            c.rjust(w) if i else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("─" * w for w in widths), *lines[1:]])
