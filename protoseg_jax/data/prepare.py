"""From a data set's files to its prepared folder, once.

A data set is one file (of `data/sets`, or anyone's): `open(config)` says what its splits hold and
how an example is read, LABELS its classes where they are known beforehand, and `submission` how its
benchmark wants predictions. All are prepared by one TFDS builder, as the ArrayRecord folder
`CACHE/NAME-FINGERPRINT/NAME/VERSION/`. A stored example is {"image_id": text, "image": encoded
bytes, as found where they are plain (see `Reading.image`) and the data set says no other, "label":
8-bit grey PNG with void 255, "parts": (where there are parts) 8-bit grey PNG}. Encoded bytes,
because an array given to TFDS's Image feature makes it import TensorFlow, which this project does
not need.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from jaxtyping import UInt8

from protoseg_jax import extensions, files, images
from protoseg_jax.data.findings import Findings
from protoseg_jax.data.labels import VOID, LabelSet
from protoseg_jax.data.reading import Reading
from protoseg_jax.data.source import SegmentationData
from protoseg_jax.errors import Fault, UserError, reason
from protoseg_jax.progress import Progress, say

_FORMAT = 3  # part of every fingerprint; raise it when what is stored, or refused, changes
_UNDECIDED = Reading()


@dataclasses.dataclass(frozen=True)
class Example:
    """One example on its way into the cache."""

    image_id: str
    image: bytes  # encoded
    label: UInt8[np.ndarray, "h w"]  # classes and VOID
    parts: UInt8[np.ndarray, "h w"] | None = None
    pixels: UInt8[np.ndarray, "h w 3"] | None = None  # the image, where it is plain and decoded
    mask: str = ""  # names the file of the label, for messages
    colours: dict[int, bytes] = dataclasses.field(
        default_factory=dict
    )  # an indexed one's, by value
    values: dict[str, int] = dataclasses.field(default_factory=dict)  # pixels by value or colour


@dataclasses.dataclass(frozen=True)
class DataSet:
    """What a data set holds, before it is prepared.

    Attributes:
      name: of the prepared folder.
      labels: its classes.
      splits: items by split, in order; whatever `example` wants.
      example: (split, item) → its example. Raises UserError (`Fault`): a file is missing, does not
        decode, or does not fit.
      source: all that decides the examples, for the fingerprint (by `repr`).
      part_names: names of the part labels, where examples have such.
      drawn: names of the images by split, where the split is drawn at random.
      void: the mask value without a class, where it might be meant as one.
      official: whether its splits are a benchmark's (see `Findings`).
      faults: what is wrong with files beside the examples.
      doubts: (kind, fact, remedy) of what is doubtful with them (see `Findings.doubt`).
    """

    name: str
    labels: LabelSet
    splits: Mapping[str, Sequence[Any]]
    example: Callable[[str, Any], Example]
    source: Iterable[Any]
    part_names: tuple[str, ...] | None = None
    drawn: dict[str, list[str]] | None = None
    void: int | None = None
    official: bool = False
    faults: tuple[Fault, ...] = ()
    doubts: tuple[tuple[str, str, str], ...] = ()


def open_data(config: ml_collections.ConfigDict) -> SegmentationData:
    """The data set of a run's config, prepared in the cache on first use.

    Raises:
      UserError: unknown name, or data that is missing or wrong.
    """
    module, reading = _module(config), Reading.of(config)
    submission = getattr(module, "submission", _label_png)
    return prepare(module.open(config), config.data.cache, submission, reading)


def open_files(config: ml_collections.ConfigDict) -> DataSet:
    """The data set of a run's config as its files are, not prepared; see `open_data`."""
    return _module(config).open(config)


def labels_of(config: ml_collections.ConfigDict) -> LabelSet:
    """The classes of a run's data set, which need not be prepared; see `open_data`."""
    module = _module(config)
    return module.LABELS if hasattr(module, "LABELS") else module.open(config).labels


def _module(config: ml_collections.ConfigDict) -> types.ModuleType:
    return extensions.find("data.name", config.data.name, "data.sets", needs=("open",))


def _label_png(_: str, image_id: str, labels: UInt8[np.ndarray, "h w"]) -> tuple[str, bytes]:
    """Predictions where a data set has no format of its own: class numbers as 8-bit grey."""
    return f"{image_id}.png", images.palette_png(labels)


# -- preparing ---------------------------------------------------------------------------------


def prepare(
    dataset: DataSet,
    cache: str | os.PathLike,
    submission: Callable = _label_png,
    reading: Reading = _UNDECIDED,
) -> SegmentationData:
    """A data set, prepared in the folder `cache` unless it is there.

    Raises:
      UserError: something is wrong with the data (see `Findings`), and nothing is left behind; or
        the cache cannot be written.
    """
    key = fingerprint([*dataset.source, reading])
    root = Path(cache).expanduser() / f"{dataset.name}-{key}"
    builder = _Builder(dataset, root, reading)
    if not builder.data_path.exists():
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            lock = files.hold(root.parent / ".lock", wait=True)
        except OSError as error:
            raise UserError(
                f"data cache {root.parent} cannot be written ({error.strerror}); "
                f"set data.cache to a folder of yours"
            ) from error
        with lock:
            if builder.data_path.exists():  # another process has prepared it meanwhile
                builder.info.read_from_directory(builder.data_dir)
            else:
                builder.write()
    return SegmentationData(
        name=dataset.name,
        labels=dataset.labels,
        part_names=dataset.part_names,
        drawn=dataset.drawn,
        void=dataset.void,
        splits={split: builder.info.splits[split].num_examples for split in dataset.splits},
        folder=os.fspath(builder.data_dir),
        metadata=builder.info.metadata,
        submission=submission,
    )


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The TFDS builder of a data set, in a folder named after a fingerprint of its source.

    TFDS keys its cache by name alone: without the fingerprint a second or changed folder would
    silently get the first one's images.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, dataset: DataSet, root: Path, reading: Reading):
        self.name, self._dataset, self._root = dataset.name, dataset, root
        self._reading, self._findings = reading, findings_of(dataset)
        self._left = list(dataset.splits)  # not yet looked at
        super().__init__(data_dir=root, file_format="array_record")

    def write(self) -> None:
        """Prepare the folder, with our own words alone on the terminal.

        TFDS writes into a folder of another name and renames it last, so what an interrupted
        preparation leaves is never taken for finished; the next one removes it.
        """
        shutil.rmtree(self._root, ignore_errors=True)
        print(f"preparing {self.name} …", file=sys.stderr, flush=True)
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)
        tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
                )
        except BaseException:
            shutil.rmtree(self._root, ignore_errors=True)
            raise
        finally:
            logging.set_verbosity(verbosity)

    def _info(self) -> tfds.core.DatasetInfo:
        grey = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
        features = {
            "image_id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": grey,
            **({"parts": grey} if self._dataset.part_names else {}),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.name}, for semantic segmentation; void is {VOID}.",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(class_pixels={}, void_pixels={}, label_size={}),
            disable_shuffling=True,  # the source's order; training shuffles by its own seed
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in self._dataset.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        size = np.zeros(2, np.int64)
        for number, example in enumerate(self._looked_at(split)):
            if self._findings.count:
                continue  # nothing is kept, but all is told
            size = np.maximum(size, example.label.shape)
            record = {"image_id": example.image_id, "image": example.image}
            for name in ("label", "parts"):
                if (labels := getattr(example, name)) is not None:
                    record[name] = images.encode_labels(labels)
            yield number, record
        if self._findings.count:  # TFDS would end with another error at a split without examples
            while self._left:
                collections.deque(self._looked_at(self._left[0]), maxlen=0)
        if not self._left:
            self._findings.finish()
            self._findings.refuse(self.name, say)
            for line in self._findings.lines():
                say(line)
        # TFDS writes the metadata when all splits are done.
        pixels = self._findings.splits[split].pixels
        self.info.metadata["class_pixels"][split] = pixels[: len(self._dataset.labels)].tolist()
        self.info.metadata["void_pixels"][split] = int(pixels[VOID])
        self.info.metadata["label_size"][split] = size.tolist()

    def _looked_at(self, split: str) -> Iterator[Example]:
        """The examples of a split as they are stored, those left out that are wrong."""
        self._left.remove(split)
        items = self._dataset.splits[split]
        with Progress(f"preparing {self.name} {split}", len(items), 0, "image") as progress:
            for item in items:
                try:
                    example = read(self._dataset, split, item, self._reading)
                except UserError as error:
                    self._findings.fault(error)
                else:
                    self._findings.add(split, example)
                    yield example
                progress.update(1)


def findings_of(dataset: DataSet) -> Findings:
    """What is known to be wrong and doubtful before any example is read."""
    findings = Findings(dataset.labels, dataset.official)
    for fault in dataset.faults:
        findings.fault(fault)
    for doubt in dataset.doubts:
        findings.doubt(*doubt)
    return findings


def read(dataset: DataSet, split: str, item: Any, reading: Reading) -> Example:
    """An example with its pixels, and its image's bytes as they are stored.

    Raises:
      UserError: it is wrong.
    """
    example = dataset.example(split, item)
    if example.pixels is not None:
        return example
    image, rgb = reading.image(example.image, f"{example.image_id!r} of {dataset.name}")
    return dataclasses.replace(example, image=image, pixels=rgb)


def fingerprint(source: Iterable[Any]) -> str:
    """Sixteen hex digits that change when any item (by its `repr`) changes."""
    digest = hashlib.sha256(f"format {_FORMAT}\n".encode())
    for item in source:
        digest.update(repr(item).encode() + b"\n")
    return digest.hexdigest()[:16]


def file_stamp(path: Path) -> tuple[str, int, int] | Path:
    """What a fingerprint keeps of a file: path, size in bytes, time of change in ns.

    Of one that is not there, the path alone.
    """
    try:
        status = path.stat()
    except OSError:
        return path
    return os.fspath(path), status.st_size, status.st_mtime_ns


# -- what data sets share ----------------------------------------------------------------------


def data_folder(config: ml_collections.ConfigDict, layout: str, inside: str = "") -> Path:
    """The folder `data.dir`, absolute, or one inside it; `layout` says what `data.dir` must hold.

    Raises:
      UserError: it is not set, does not exist, is empty or cannot be read.
    """
    name = config.data.name
    if not config.data.dir:
        raise UserError(f"data set {name!r} needs its folder; set --config.data.dir=PATH")
    path = Path(config.data.dir).expanduser().absolute() / inside
    try:
        if not path.is_dir():
            raise UserError(f"{name}: folder {path} does not exist; data.dir must hold {layout}")
        if not any(path.iterdir()):
            raise UserError(f"{name}: folder {path} is empty; data.dir must hold {layout}")
    except OSError as error:
        raise UserError(f"{name}: folder {path} cannot be read ({reason(error)})") from error
    return path


def draw_split(names: Sequence[Any], seed: int, one_in: int) -> dict[str, list[Any]]:
    """A seeded split into train and validation, in the order of the names.

    Args:
      names: at least two.
      seed: of the draw.
      one_in: one in so many is held out, rounded down, at least one.
    """
    order = np.random.default_rng(seed).permutation(len(names))
    held_out = max(1, len(names) // one_in)
    return {
        "train": [names[n] for n in sorted(order[held_out:])],
        "validation": [names[n] for n in sorted(order[:held_out])],
    }
