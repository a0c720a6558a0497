"""`cityscapes`: fine annotations, from folders, from the official zips, or from TFDS.

* `leftImg8bit/SPLIT/CITY/…_leftImg8bit.png` and `gtFine/SPLIT/CITY/…_gtFine_labelIds.png`,
* or `leftImg8bit_trainvaltest.zip` and `gtFine_trainvaltest.zip`, read without unpacking,
* or a folder of TFDS's `cityscapes/semantic_segmentation`, prepared as ArrayRecord.

Label ids become the 19 train ids, all others void. The test labels are dummies: it has none.

Training images are stored uncompressed, in 19 GB: a core makes 66 training examples a second of
them, but 17 to 21 of PNGs, and would starve a GPU (benchmarks/results/decoding.md).
"""

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from protoseg_jax.data.builders import files
from protoseg_jax.data.builders.base import (
    Example,
    SegmentationBuilder,
    encode_bmp,
    file_stamp,
)
from protoseg_jax.data.label_sets import CITYSCAPES, CITYSCAPES_IDS, VOID
from protoseg_jax.errors import UserError, reason

_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_ZIPS = ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip")
_IMAGE = re.compile(r"leftImg8bit/(train|val|test)/([^/]+)/([\w-]+_\d+_\d+)_leftImg8bit\.png")
_LAYOUT = f"leftImg8bit/ and gtFine/, or {' and '.join(_ZIPS)}, or TFDS's prepared folder"
_UNKNOWN_ID = 34  # the first id that Cityscapes does not use

Read = Callable[[], bytes]


class Cityscapes(SegmentationBuilder):
    """Builder of `cityscapes`.

    Args:
      cache_dir: the cache.
      data_dir: the folder that holds one of the three layouts.

    Raises:
      UserError: none of them is there, or it is not complete.
    """

    name = "cityscapes"

    def __init__(self, *, cache_dir: str | os.PathLike, data_dir: str | os.PathLike):
        self.label_set = CITYSCAPES
        root = Path(data_dir).expanduser().absolute()
        files.require_folder(root, self.name, _LAYOUT)
        if (root / "dataset_info.json").is_file():
            self._read, stamps = _prepared_by_tfds(root)
        elif all((root / name).is_file() for name in _ZIPS):
            stamps = [file_stamp(root / name) for name in _ZIPS]
            self._read = _official(*(_Zip(root / name) for name in _ZIPS))
        elif (root / "leftImg8bit").is_dir():
            folder = _Folder(root)
            stamps = [file_stamp(root / name) for name in folder.names]
            self._read = _official(folder, folder)
        else:
            raise UserError(f"cityscapes: {root} holds no images; data.dir must hold {_LAYOUT}")
        self.split_names = tuple(s for s in _SPLITS.values() if self._read[s])
        for split in ("train", "validation"):
            if split not in self.split_names:
                raise UserError(f"cityscapes: no {split} image in {root}; it must hold {_LAYOUT}")
        super().__init__(cache_dir=cache_dir, source=stamps)

    def examples(self, split: str) -> Iterator[Example]:
        """The images of a split by name."""
        table = np.full(256, VOID, np.uint8)
        table[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
        for image_id, image, label in self._read[split]:
            data = image()
            pixels = files.read_image(data, image_id)
            size = pixels.shape[:2]
            if split == "train":
                data = encode_bmp(pixels)
            if label is None:
                yield Example(image_id, data, np.full(size, VOID, np.uint8))
                continue
            ids = files.decode_mask(label(), f"of {image_id}")
            if ids.shape != size:
                raise UserError(
                    f"cityscapes: image {image_id} is {size[0]}×{size[1]} but its labels are "
                    f"{ids.shape[0]}×{ids.shape[1]} (height×width); fetch both again"
                )
            strange = (ids >= _UNKNOWN_ID) & (ids != VOID)
            if strange.any():
                raise UserError(
                    f"cityscapes: the labels of {image_id} hold {int(ids[strange][0])}, which is "
                    "no label id; use the files …_gtFine_labelIds.png"
                )
            yield Example(image_id, data, table[ids])


class _Folder:
    """Files below a folder, by their path from there."""

    def __init__(self, root: Path):
        self._root = root
        self.names = sorted(
            p.relative_to(root).as_posix()
            for top in ("leftImg8bit", "gtFine")
            for p in (root / top).rglob("*.png")
        )

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()


class _Zip:
    """Members of a zip, which is never unpacked."""

    def __init__(self, path: Path):
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"cityscapes: {path} is no zip ({error}); fetch it again") from error
        self._path = path
        self.names = sorted(self._zip.namelist())

    def read(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError) as error:
            raise UserError(
                f"cityscapes: {name} in {self._path} is damaged ({error}); fetch the zip again"
            ) from error


def _official(
    images: _Folder | _Zip, labels: _Folder | _Zip
) -> dict[str, list[tuple[str, Read, Read | None]]]:
    """By split: (image id, image, labels or None)."""
    there = set(labels.names)
    splits = {split: [] for split in _SPLITS.values()}
    for name in images.names:
        if not (match := _IMAGE.fullmatch(name)):
            continue
        folder, city, image_id = match.groups()
        label = f"gtFine/{folder}/{city}/{image_id}_gtFine_labelIds.png"
        if folder == "test":
            label = None
        elif label not in there:
            raise UserError(f"cityscapes: {name} has no labels {label}; unpack gtFine again")
        read_label = label and (lambda n=label: labels.read(n))
        splits[_SPLITS[folder]].append((image_id, lambda n=name: images.read(n), read_label))
    return splits


def _prepared_by_tfds(
    root: Path,
) -> tuple[dict[str, Iterator[tuple[str, Read, Read | None]]], list]:
    """As `_official`, from a folder that TFDS prepared."""
    try:
        info = json.loads((root / "dataset_info.json").read_text())
        builder = tfds.builder_from_directory(root)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cityscapes: {root} cannot be read as TFDS prepares it ({reason(error)}); prepare it "
            "again"
        ) from error
    if info.get("fileFormat") != "array_record":
        raise UserError(
            f"cityscapes: {root} is prepared as {info.get('fileFormat', 'tfrecord')}, which needs "
            "TensorFlow; where that is installed convert it with: tfds convert_format "
            f"--dataset_version_dir={root} --out_dir=NEWDIR --out_file_format=array_record"
        )
    skip = {n: tfds.decode.SkipDecoding() for n in ("image_left", "segmentation_label")}
    if not skip.keys() <= builder.info.features.keys():
        raise UserError(f"cityscapes: {root} is not TFDS's cityscapes/semantic_segmentation")

    def examples(split: str):
        for record in builder.as_data_source(split, decoders=skip):
            image_id = Path(record["image_id"].decode()).name.removesuffix("_leftImg8bit.png")
            label = None if split == "test" else (lambda r=record: r["segmentation_label"])
            yield image_id, (lambda r=record: r["image_left"]), label

    splits = {s: examples(s) if s in builder.info.splits else () for s in _SPLITS.values()}
    return splits, [file_stamp(p) for p in sorted(root.iterdir())]
