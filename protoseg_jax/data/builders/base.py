"""What the builders share: preparing a data set once, quietly, and reading it back.

A prepared data set is TFDS's ArrayRecord folder `CACHE/NAME-FINGERPRINT/NAME/VERSION/`. An example
is {"image_id": text, "image": encoded bytes, as found unless a builder says so, "label": 8-bit grey
PNG with void 255, "parts": (where the data set has them) 8-bit grey PNG}. Encoded bytes, because an
array given to TFDS's Image feature makes it import TensorFlow, which this project does not need.
"""

import abc
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging
from jaxtyping import UInt8

from protoseg_jax.data.label_sets import VOID, LabelSet
from protoseg_jax.errors import UserError, reason

_FORMAT = 1  # part of every fingerprint; raise it when what is stored changes
_PIXEL_FEATURES = ("image", "label", "parts")


@dataclasses.dataclass(frozen=True)
class Example:
    """One example on its way into the cache."""

    image_id: str
    image: bytes  # encoded
    label: UInt8[np.ndarray, "h w"]  # classes and VOID
    parts: UInt8[np.ndarray, "h w"] | None = None


class SegmentationBuilder(tfds.core.GeneratorBasedBuilder, abc.ABC, skip_registration=True):
    """A TFDS builder whose prepared folder is named after a fingerprint of its source.

    TFDS keys its cache by name alone: without the fingerprint a second or changed folder would
    silently get the first one's images. Subclasses set `label_set`, `split_names` (and
    `part_names`, `drawn`) before calling this class's `__init__`, and yield a split's examples.
    """

    VERSION = tfds.core.Version("1.0.0")
    name: ClassVar[str]
    label_set: LabelSet
    split_names: tuple[str, ...]
    part_names: tuple[str, ...] | None = None
    drawn: dict[str, list[str]] | None = None

    def __init__(self, *, cache_dir: str | os.PathLike, source: Iterable[Any]):
        """`source` is all that decides the examples, for the fingerprint."""
        self._root = Path(cache_dir).expanduser() / f"{self.name}-{fingerprint(source)}"
        super().__init__(data_dir=self._root, file_format="array_record")

    @abc.abstractmethod
    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split, in order.

        Raises:
          UserError: a file is missing, does not decode, or does not fit.
        """

    def prepare(self) -> None:
        """Write the prepared folder unless it is there; a lock keeps several processes apart.

        TFDS writes into a folder of another name and renames it last, so what an interrupted
        preparation leaves is never taken for finished; the next one removes it.

        Raises:
          UserError: from `examples`; nothing is left behind.
        """
        if self.data_path.exists():
            return
        with _lock(self._root.parent):
            if self.data_path.exists():  # another process has prepared it meanwhile
                self.info.read_from_directory(self.data_dir)
                return
            shutil.rmtree(self._root, ignore_errors=True)
            print(f"preparing {self.name} …", file=sys.stderr, flush=True)
            try:
                with _quiet():
                    self.download_and_prepare(
                        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
                    )
            except BaseException:
                shutil.rmtree(self._root, ignore_errors=True)
                raise

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image_id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
        }
        if self.part_names:
            features["parts"] = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.name}, for semantic segmentation; void is {VOID}.",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(class_pixels={}, label_size={}),
            disable_shuffling=True,  # the source's order; training shuffles by its own seed
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in self.split_names}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        pixels = np.zeros(256, np.int64)
        size = np.zeros(2, np.int64)
        for number, example in enumerate(_counted(self.examples(split), f"{self.name} {split}")):
            pixels += np.bincount(example.label.ravel(), minlength=256)
            size = np.maximum(size, example.label.shape)
            record = {
                "image_id": example.image_id,
                "image": example.image,
                "label": encode_png(example.label),
            }
            if example.parts is not None:
                record["parts"] = encode_png(example.parts)
            yield number, record
        # TFDS writes the metadata when all splits are done.
        self.info.metadata["class_pixels"][split] = pixels[: len(self.label_set)].tolist()
        self.info.metadata["label_size"][split] = size.tolist()


def _counted(examples: Iterator[Example], name: str) -> Iterator[Example]:
    """The examples, with a count for who waits: a bar on a terminal, a line now and then else."""
    plain = not sys.stderr.isatty()
    said = time.monotonic()
    bar = tqdm.tqdm(examples, desc=name, unit="image", disable=plain, leave=False)
    for number, example in enumerate(bar, 1):
        yield example
        if plain and time.monotonic() - said > 10:
            said = time.monotonic()
            print(f"preparing {name}: {number} images", file=sys.stderr, flush=True)


class Source:
    """Random access to a prepared split; picklable, and safe to read from several threads."""

    def __init__(self, data_dir: str | os.PathLike, split: str):
        """`data_dir` is the prepared folder, with its version.

        Raises:
          UserError: it is not there (any more).
        """
        self._data_dir, self._split = os.fspath(data_dir), split
        # Opened from the prepared folder, so that what a worker process needs is this path alone.
        try:
            builder = tfds.builder_from_directory(self._data_dir)
        except OSError as error:
            raise UserError(
                f"prepared data {self._data_dir} cannot be read ({reason(error)}); start the same "
                "command again to have it prepared again"
            ) from error
        stored = [name for name in _PIXEL_FEATURES if name in builder.info.features]
        # Decoded here, not by TFDS: a bad record then has a name.
        self._records = builder.as_data_source(
            split, decoders={name: tfds.decode.SkipDecoding() for name in stored}
        )
        self._length = len(self._records)
        self._where = f"{self._data_dir} ({split})"

    def __reduce__(self) -> tuple:
        return Source, (self._data_dir, self._split)

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
            example = {"image_id": record["image_id"].decode()}
            for name in record.keys() & set(_PIXEL_FEATURES):
                example[name] = _decode(record[name], colour=name == "image")
            return example
        except (ValueError, RuntimeError, IndexError, cv2.error) as error:
            raise UserError(
                f"example {index} of {self._where} cannot be read; delete that folder to have it "
                f"prepared again"
            ) from error


class SegmentationData:
    """A prepared data set: its classes, its splits, and access to their examples.

    Attributes:
      name, label_set, part_names: of the builder.
      splits: examples by split.
      drawn: names of the images by split, where the split was drawn at random; else None.
    """

    def __init__(self, builder: SegmentationBuilder):
        self.name: str = builder.name
        self.label_set: LabelSet = builder.label_set
        self.part_names: tuple[str, ...] | None = builder.part_names
        self.drawn: dict[str, list[str]] | None = builder.drawn
        self.splits: dict[str, int] = {
            name: builder.info.splits[name].num_examples for name in builder.split_names
        }
        self._builder = builder

    def source(self, split: str) -> Source:
        """Random access to the examples of a split (see `Source`)."""
        self._check(split)
        return Source(self._builder.data_dir, split)

    def class_pixels(self, split: str) -> np.ndarray:
        """Pixels of each class in a split's labels, int64 [C]."""
        self._check(split)
        return np.array(self._builder.info.metadata["class_pixels"][split], np.int64)

    def labelled(self, split: str) -> bool:
        """Whether any pixel of a split has a class; benchmarks keep their test labels."""
        return bool(self.class_pixels(split).any())

    def label_size(self, split: str) -> tuple[int, int]:
        """The largest label height and the largest label width of a split."""
        self._check(split)
        height, width = self._builder.info.metadata["label_size"][split]
        return int(height), int(width)

    def _check(self, split: str) -> None:
        if split not in self.splits:
            raise UserError(
                f"split {split!r} does not exist in data set {self.name!r}; "
                f"it has {', '.join(self.splits)}"
            )


def fingerprint(source: Iterable[Any]) -> str:
    """Sixteen hex digits that change when any item (by its `repr`) changes."""
    digest = hashlib.sha256(f"format {_FORMAT}\n".encode())
    for item in source:
        digest.update(repr(item).encode() + b"\n")
    return digest.hexdigest()[:16]


def file_stamp(path: Path) -> tuple[str, int, int]:
    """What a fingerprint keeps of a file: path, size in bytes, time of change in ns."""
    status = path.stat()
    return os.fspath(path), status.st_size, status.st_mtime_ns


def encode_png(array: UInt8[np.ndarray, "h w *c"]) -> bytes:
    """8-bit grey [h w] or RGB [h w 3] as PNG."""
    return _encode(array, ".png")


def encode_bmp(array: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """RGB as BMP: not compressed, it takes next to nothing to decode."""
    return _encode(array, ".bmp")


def _encode(array: UInt8[np.ndarray, "h w *c"], suffix: str) -> bytes:
    if array.ndim == 3:
        array = cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(suffix, array)
    return encoded.tobytes()


def decode_image(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """An encoded image as RGB, turned as its EXIF orientation says (as viewers show it).

    Raises:
      ValueError: the bytes do not decode.
    """
    return _decode(data, colour=True)


def _decode(data: bytes, *, colour: bool) -> np.ndarray:
    flag = cv2.IMREAD_COLOR_RGB if colour else cv2.IMREAD_GRAYSCALE
    array = cv2.imdecode(np.frombuffer(data, np.uint8), flag) if data else None
    if array is None:
        raise ValueError("not an image")
    return array


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the cache's lock, which the system releases even when the process is killed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise UserError(
            f"data cache {folder} cannot be written ({error.strerror}); "
            f"set data.cache to a folder of yours"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, announcements or warnings of TFDS."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
