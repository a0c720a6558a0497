"""`cityscapes`: fine annotations, from folders, from the official zips, or from TFDS.

* `leftImg8bit/SPLIT/CITY/…_leftImg8bit.png` and `gtFine/SPLIT/CITY/…_gtFine_labelIds.png`,
* or `leftImg8bit_trainvaltest.zip` and `gtFine_trainvaltest.zip`, read without unpacking,
* or a folder of TFDS's `cityscapes/semantic_segmentation`, prepared as ArrayRecord.

Label ids become the 19 train ids, all others void. The test labels are dummies: it has none.

Training images are stored uncompressed, in 19 GB: decoding PNGs, a core makes too few training
examples a second to feed a GPU (benchmarks/results/decoding.md).
"""

import dataclasses
import json
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from protoseg_jax import images
from protoseg_jax.data import prepare
from protoseg_jax.data.labels import VOID, LabelSet
from protoseg_jax.errors import UserError, reason

_CLASSES = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
IDS, _NAMES, _COLOURS = zip(*_CLASSES, strict=True)  # the label id of each train id, …
LABELS = LabelSet(_NAMES, _COLOURS)
_UNKNOWN_ID = 34  # the first id that Cityscapes does not use

_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_ZIPS = ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip")
_IMAGE = re.compile(r"leftImg8bit/(train|val|test)/([^/]+)/([\w-]+_\d+_\d+)_leftImg8bit\.png")
_LAYOUT = f"leftImg8bit/ and gtFine/, or {' and '.join(_ZIPS)}, or TFDS's prepared folder"

Item = tuple[str, Callable[[], bytes], Callable[[], bytes] | None]
"""An image's id, its bytes, and those of its labels."""


def open(config: ml_collections.ConfigDict) -> prepare.DataSet:
    """The images of each split by name, from whichever of the three layouts is there.

    Raises:
      UserError: none of them is there, or it is not complete.
    """
    root = prepare.data_folder(config, _LAYOUT)
    if (root / "dataset_info.json").is_file():
        found, used = _prepared_by_tfds(root), sorted(root.iterdir())
    elif all((root / name).is_file() for name in _ZIPS):
        used = [root / name for name in _ZIPS]
        found = _official(*map(_zip, used))
    elif (root / "leftImg8bit").is_dir():
        names = sorted(
            p.relative_to(root).as_posix()
            for top in ("leftImg8bit", "gtFine")
            for p in (root / top).rglob("*.png")
        )
        used = [root / name for name in names]
        folder = _Files(names, lambda name: (root / name).read_bytes())
        found = _official(folder, folder)
    else:
        raise UserError(f"cityscapes: {root} holds no images; data.dir must hold {_LAYOUT}")
    splits = {split: items for split, items in found.items() if len(items)}
    for split in ("train", "validation"):
        if split not in splits:
            raise UserError(f"cityscapes: no {split} image in {root}; it must hold {_LAYOUT}")
    source = map(prepare.file_stamp, used)
    return prepare.DataSet("cityscapes", LABELS, splits, _example, list(source))


def submission(split: str, image_id: str, labels: UInt8[np.ndarray, "h w"]) -> tuple[str, bytes]:
    """`ID_pred_labelIds.png`, grey label ids (not train ids), at the labels' 1024×2048."""
    del split
    ids = np.array(IDS, np.uint8)[labels]
    return f"{image_id}_pred_labelIds.png", images.palette_png(ids)


def _example(split: str, item: Item) -> prepare.Example:
    image_id, image, label = item
    data = image()
    pixels = prepare.decode_image(data, image_id)
    size = pixels.shape[:2]
    if split == "train":
        data = images.encode(pixels, ".bmp")
    if label is None:
        return prepare.Example(image_id, data, np.full(size, VOID, np.uint8))
    ids = images.decode_mask(label(), f"of {image_id}")
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
    table = np.full(256, VOID, np.uint8)
    table[list(IDS)] = np.arange(len(IDS))
    return prepare.Example(image_id, data, table[ids])


@dataclasses.dataclass(frozen=True)
class _Files:
    """Names of files, and how one is read."""

    names: Sequence[str]
    read: Callable[[str], bytes]


def _zip(path: Path) -> _Files:
    """Members of a zip, which is never unpacked."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"cityscapes: {path} is no zip ({error}); fetch it again") from error

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError) as error:
            raise UserError(
                f"cityscapes: {name} in {path} is damaged ({error}); fetch the zip again"
            ) from error

    return _Files(sorted(archive.namelist()), read)


def _official(pictures: _Files, labels: _Files) -> dict[str, list[Item]]:
    """The items of each split."""
    there = set(labels.names)
    splits = {split: [] for split in _SPLITS.values()}
    for name in pictures.names:
        if not (match := _IMAGE.fullmatch(name)):
            continue
        folder, city, image_id = match.groups()
        label = f"gtFine/{folder}/{city}/{image_id}_gtFine_labelIds.png"
        if folder == "test":
            label = None
        elif label not in there:
            raise UserError(f"cityscapes: {name} has no labels {label}; unpack gtFine again")
        read_label = label and (lambda n=label: labels.read(n))
        splits[_SPLITS[folder]].append((image_id, lambda n=name: pictures.read(n), read_label))
    return splits


class _Records(Sequence):
    """Items of a split that TFDS prepared, each read when it is asked for."""

    def __init__(self, records: Sequence[dict[str, Any]], labelled: bool):
        self._records, self._labelled = records, labelled

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Item:
        record = self._records[index]
        image_id = Path(record["image_id"].decode()).name.removesuffix("_leftImg8bit.png")
        label = (lambda: record["segmentation_label"]) if self._labelled else None
        return image_id, lambda: record["image_left"], label


def _prepared_by_tfds(root: Path) -> dict[str, _Records]:
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
    return {
        split: _Records(builder.as_data_source(split, decoders=skip), split != "test")
        for split in _SPLITS.values()
        if split in builder.info.splits
    }
