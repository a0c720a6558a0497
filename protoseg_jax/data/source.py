"""A prepared data set: random access to its examples, and what is known of its splits."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, UInt8

from protoseg_jax import decoding
from protoseg_jax.data.labels import VOID, LabelSet
from protoseg_jax.errors import UserError, reason

_GREY = {"image": False, "label": True, "parts": True}


class Source:
    """Random access to a prepared split; picklable, and safe to read from several threads."""

    def __init__(self, folder: str | os.PathLike, split: str):
        """`folder` is the prepared folder, with its version.

        Raises:
          UserError: it is not there (any more).
        """
        self._folder, self._split = os.fspath(folder), split
        # Opened from the prepared folder, so that what a worker process needs is this path alone.
        try:
            builder = tfds.builder_from_directory(self._folder)
        except OSError as error:
            raise UserError(
                f"prepared data {self._folder} cannot be read ({reason(error)}); start the same "
                "command again to have it prepared again"
            ) from error
        # Decoded here, not by TFDS: a bad record then has a name.
        skip = {n: tfds.decode.SkipDecoding() for n in _GREY if n in builder.info.features}
        self._records = builder.as_data_source(split, decoders=skip)
        self._length = len(self._records)

    def __reduce__(self) -> tuple:
        return Source, (self._folder, self._split)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image_id": str, "image": uint8 [h w 3] RGB, "label": uint8 [h w], maybe "parts"}.

        Raises:
          IndexError: outside [0, len).
          UserError: the stored example cannot be read or decoded.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"example {index} of {self._length}")
        try:
            record = self._records[index]
            pixels = {n: decoding.decode(record[n], grey=_GREY[n]) for n in _GREY if n in record}
            return {"image_id": record["image_id"].decode(), **pixels}
        except (ValueError, RuntimeError, IndexError, cv2.error) as error:
            raise UserError(
                f"example {index} of {self._folder} ({self._split}) cannot be read; delete that "
                "folder to have it prepared again"
            ) from error


class Without:
    """A source in whose labels a class is void, to hold it out; picklable if the source is."""

    def __init__(self, source: Any, held_out: int):
        self._source, self._held_out = source, held_out

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._source[index]
        label = example["label"]
        return {**example, "label": np.where(label == self._held_out, VOID, label).astype(np.uint8)}


@dataclasses.dataclass(frozen=True)
class SegmentationData:
    """A prepared data set.

    Attributes:
      name, labels, part_names, drawn, void: see `prepare.DataSet`.
      splits: number of examples by split.
      folder: the prepared folder, with its version.
      metadata: {"class_pixels": {split: [C]}, "void_pixels": {split: number}, "label_size": {split:
        [2]}}.
      submission: (split, image id, predicted classes uint8 [h w]) → (path below the predictions'
        folder, PNG), in the benchmark's format where the data set has one.
    """

    name: str
    labels: LabelSet
    part_names: tuple[str, ...] | None
    drawn: dict[str, list[str]] | None
    void: int | None
    splits: dict[str, int]
    folder: str
    metadata: dict[str, dict[str, Any]]
    submission: Callable[[str, str, UInt8[np.ndarray, "h w"]], tuple[str, bytes]]

    def source(self, split: str) -> Source:
        """Random access to the examples of a split (see `Source`)."""
        self._check(split)
        return Source(self.folder, split)

    def class_pixels(self, split: str) -> Int[np.ndarray, " c"]:
        """Pixels of each class in a split's labels, int64."""
        self._check(split)
        return np.array(self.metadata["class_pixels"][split], np.int64)

    def labelled(self, split: str) -> bool:
        """Whether any pixel of a split has a class; benchmarks keep their test labels."""
        return bool(self.class_pixels(split).any())

    def void_pixels(self, split: str) -> int:
        """Pixels without a class in a split's labels."""
        self._check(split)
        return int(self.metadata["void_pixels"][split])

    def label_size(self, split: str) -> tuple[int, int]:
        """The largest label height and the largest label width of a split."""
        self._check(split)
        height, width = self.metadata["label_size"][split]
        return int(height), int(width)

    def _check(self, split: str) -> None:
        if split not in self.splits:
            raise UserError(
                f"split {split!r} does not exist in data set {self.name!r}; "
                f"it has {', '.join(self.splits)}"
            )


def statistics(source: Any) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel (RGB, 0–255) over all pixels of a split's images.

    Args:
      source: random-access examples ("image").
    """
    count, total, squares = 0, np.zeros(3), np.zeros(3)
    for number in range(len(source)):
        pixels = source[number]["image"].reshape(-1, 3).astype(np.float64)
        count += len(pixels)
        total += pixels.sum(0)
        squares += np.square(pixels).sum(0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    # A channel without any contrast says nothing, whatever it is divided by.
    return mean.tolist(), np.where(deviation > 0, deviation, 1.0).tolist()
