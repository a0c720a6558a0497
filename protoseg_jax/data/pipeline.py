"""Batches: examples → augmented training batches, or fixed-size evaluation batches, by Grain.

A training batch is a function of (seed, step) alone: the data position is one integer, whatever the
number of workers or devices, so a run that resumes at a step sees what it would have seen.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import grain.python as grain
import numpy as np
from absl import flags

from protoseg_jax.data.augment import Augment
from protoseg_jax.data.labels import VOID
from protoseg_jax.images import pad_and_crop, resize_image

_THREADS = 2  # reading threads of one process; OpenCV releases the interpreter's lock
_READ_AHEAD = 8  # batches held ready by a process
_HUGE, _UNLIKE = 2**23, 4  # pixels of a label that are no trifle, and times another's
_CANVAS_STEP = 64  # label canvases are multiples of this, so that few sizes are compiled


def train_batches(
    source: Any,
    augment: Augment,
    *,
    batch_size: int,
    seed: int,
    start: int,
    workers: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """Endless augmented batches, from step `start` on.

    Args:
      source: random-access examples ("image", "label").
      augment: the augmentation.
      batch_size: examples a batch, over all parts.
      seed: seed of order and augmentation.
      start: index of the first batch; the same index always gives the same batch.
      workers: worker processes; 0 reads with threads of this process.
      part: (p, P): the p-th of P equal parts of every batch, for P processes that share the work.

    Yields:
      {"image": uint8 [B/P H W 3], "label": uint8 [B/P H W]}.
    """
    number, parts = part
    dataset = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(augment)[number::parts]
        .batch(batch_size // parts, drop_remainder=True)
    )
    return iter(_read(dataset[start:], workers))


def _read(dataset: grain.MapDataset, workers: int) -> grain.IterDataset:
    threads = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_READ_AHEAD)
    iterator = dataset.to_iter_dataset(threads)
    if workers:
        if not flags.FLAGS.is_parsed():  # a notebook, say: Grain's workers ask for absl's flags
            flags.FLAGS.mark_as_parsed()
        iterator = iterator.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        )
    return iterator


class _ForEvaluation:
    """A source whose images have the evaluation size, and whose examples carry their number."""

    def __init__(self, source: Any, eval_size: tuple[int, int]):
        self._source, self._eval_size = source, eval_size

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._source[index]
        image = resize_image(example["image"], self._eval_size)
        return {"image": image, "label": example["label"], "index": np.int32(index)}


def _of_like_sizes(
    examples: Iterator[dict[str, Any]], batch_size: int
) -> Iterator[list[dict[str, Any]]]:
    """Batches in order, each of at most so many, none of a huge label beside a small one."""
    batch: list[dict[str, Any]] = []
    for example in examples:
        areas = [e["label"].size for e in (*batch, example)]
        unlike = max(areas) > max(_HUGE, _UNLIKE * min(areas))
        if batch and (len(batch) == batch_size or unlike):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def eval_batches(
    source: Any,
    *,
    eval_size: tuple[int, int],
    batch_size: int,
    workers: int = 0,
    start: int = 0,
    part: tuple[int, int] = (0, 1),
    largest: tuple[int, int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order, at evaluation preprocessing; the last batch is filled up.

    Images are resized to the one `eval_size` (never padded: padding changes features well inside
    an image). Labels keep their own size, at the top left of a canvas of void common to the batch;
    one process fills a batch up early where small ones would lie on a huge one's canvas.

    Args:
      source: random-access examples ("image", "label").
      eval_size: (h, w).
      batch_size: examples a batch of one part.
      workers: worker processes; 0 reads with threads of this process.
      start: number of the first example.
      part: (p, P): every P-th example from the p-th on, for P processes that share the work; all
        parts have the same number of batches.
      largest: label size that every batch's canvas must hold; processes that share the work need
        equal canvases. None: each batch's own largest.

    Yields:
      {"image": uint8 [B h w 3] at eval_size, "label": uint8 [B H W], "size": int32 [B 2] of each
      label, "index": int32 [B], the example's number, −1 for a filling}.
    """
    number, parts = part
    count = len(source) - start
    dataset = grain.MapDataset.source(_ForEvaluation(source, eval_size))[start + number :: parts]
    examples = iter(_read(dataset, workers) if len(dataset) else ())
    filling = {
        "image": np.zeros((*eval_size, 3), np.uint8),
        "label": np.full((1, 1), VOID, np.uint8),
        "index": np.int32(-1),
    }
    if parts > 1:
        batches = -(-count // (parts * batch_size))
        groups = (list(itertools.islice(examples, batch_size)) for _ in range(batches))
    else:
        groups = _of_like_sizes(examples, batch_size)
    for batch in groups:
        batch += [filling] * (batch_size - len(batch))
        sizes = np.array([e["label"].shape for e in batch], np.int32)
        canvas = np.max(sizes if largest is None else [largest], axis=0)
        canvas = (-(-canvas // _CANVAS_STEP) * _CANVAS_STEP).tolist()
        yield {
            "image": np.stack([e["image"] for e in batch]),
            "label": np.stack([pad_and_crop(e["label"], (0, 0, *canvas), VOID) for e in batch]),
            "size": sizes,
            "index": np.array([e["index"] for e in batch], np.int32),
        }
