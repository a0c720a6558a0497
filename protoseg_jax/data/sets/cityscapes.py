"""`cityscapes`: fine annotations, from folders, from the official zips, or from TFDS.

* `leftImg8bit/SPLIT/CITY/…_leftImg8bit.png` and `gtFine/SPLIT/CITY/…_gtFine_labelIds.png`,
* or `leftImg8bit_trainvaltest.zip` and `gtFine_trainvaltest.zip`, read without unpacking,
* or a folder of TFDS's `cityscapes/semantic_segmentation`, prepared as ArrayRecord.

Label ids become the 19 train ids, all others void. The test labels are dummies: it has none.

Training images are stored as BMP, which ArrayRecord compresses quickly and less than PNG does:
decoding PNGs, a core makes too few training examples a second to feed a GPU
(benchmarks/results/decoding.md, input.md).
"""

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from protoseg_jax import images
from protoseg_jax.data import masks, prepare
from protoseg_jax.data.labels import VOID, LabelSet
from protoseg_jax.data.reading import Reading, colours_used
from protoseg_jax.errors import Fault, UserError, reason

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
# Ids of no train id; 255 is −1, the licence plate's.
_VOID = [*(set(range(34)) - set(IDS)), 255]
TABLE = masks.numbered(_NAMES, IDS, _VOID, "use the files …_gtFine_labelIds.png")

_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_ZIPS = ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip")
_IMAGE = re.compile(r"leftImg8bit/(train|val|test)/([^/]+)/([\w-]+_\d+_\d+)_leftImg8bit\.png")
_LAYOUT = f"leftImg8bit/ and gtFine/, or {' and '.join(_ZIPS)}, or TFDS's prepared folder"


def open(config: ml_collections.ConfigDict) -> prepare.DataSet:
    """The images of each split by name, from whichever of the three layouts is there."""
    root, reading = prepare.data_folder(config, _LAYOUT), Reading.of(config)
    if (root / "dataset_info.json").is_file():
        used = sorted(root.iterdir())
        splits, example = _prepared_by_tfds(root, reading)
    elif all((root / name).is_file() for name in _ZIPS):
        used = [root / name for name in _ZIPS]
        splits, example = _official(
            {k: v for path in used for k, v in _members(path).items()}, reading
        )
    elif (root / "leftImg8bit").is_dir():
        found = (p for top in ("leftImg8bit", "gtFine") for p in (root / top).rglob("*.png"))
        files = {p.relative_to(root).as_posix(): p for p in found}
        used = [files[name] for name in sorted(files)]
        splits, example = _official(files, reading)
    else:
        raise UserError(f"cityscapes: {root} holds no images; data.dir must hold {_LAYOUT}")
    splits = {split: items for split, items in splits.items() if len(items)}
    for split in ("train", "validation"):
        if split not in splits:
            raise UserError(f"cityscapes: no {split} image in {root}; it must hold {_LAYOUT}")
    source = [*map(prepare.file_stamp, used)]
    return prepare.DataSet("cityscapes", LABELS, splits, example, source, official=True)


def submission(split: str, image_id: str, labels: UInt8[np.ndarray, "h w"]) -> tuple[str, bytes]:
    """`ID_pred_labelIds.png`, grey label ids (not train ids), at the labels' 1024×2048."""
    ids = np.array(IDS, np.uint8)[labels]
    return f"{image_id}_pred_labelIds.png", images.palette_png(ids)


def _example(
    split: str, image_id: str, data: bytes, label: bytes | None, reading: Reading
) -> prepare.Example:
    """An image and its label ids, checked."""
    data, pixels = reading.image(data, image_id)
    size = pixels.shape[:2]
    if split == "train":
        data = images.encode(pixels, ".bmp")
    if label is None:
        return prepare.Example(image_id, data, np.full(size, VOID, np.uint8), pixels=pixels)
    where = f"{image_id}_gtFine_labelIds.png"
    mask = reading.mask(label, where)
    shape = mask.values.shape[:2]
    if shape != size:
        raise Fault(
            "mask of another size than its image",
            f"cityscapes: image {image_id} is {size[0]}×{size[1]} but its labels are "
            f"{shape[0]}×{shape[1]} (height×width)",
            "fetch both again",
        )
    labels, values = TABLE.labels(mask, where)
    return prepare.Example(image_id, data, labels, None, pixels, where, colours_used(mask), values)


def _members(path: Path) -> dict[str, zipfile.Path]:
    """Members of a zip, which is never unpacked."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"cityscapes: {path} is no zip ({error}); fetch it again") from error
    return {name: zipfile.Path(archive, name) for name in archive.namelist()}


def _read(file: Path | zipfile.Path) -> bytes:
    try:
        return file.read_bytes()
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError) as error:
        if isinstance(file, Path):
            raise
        raise UserError(
            f"cityscapes: {file.at} in {file.root.filename} is damaged ({error}); fetch the zip "
            "again"
        ) from error


def _official(
    files: Mapping[str, Path | zipfile.Path], reading: Reading
) -> tuple[dict[str, list], Callable]:
    """(items of each split, their example) of files by their official names."""
    splits = {split: [] for split in _SPLITS.values()}
    for name in sorted(files):
        if not (match := _IMAGE.fullmatch(name)):
            continue
        folder, city, image_id = match.groups()
        label = f"gtFine/{folder}/{city}/{image_id}_gtFine_labelIds.png"
        if folder != "test" and label not in files:
            raise UserError(f"cityscapes: {name} has no labels {label}; unpack gtFine again")
        splits[_SPLITS[folder]].append((image_id, name, label))

    def example(split: str, item: tuple[str, str, str]) -> prepare.Example:
        image_id, name, label = item
        label = None if split == "test" else _read(files[label])
        return _example(split, image_id, _read(files[name]), label, reading)

    return splits, example


def _prepared_by_tfds(root: Path, reading: Reading) -> tuple[dict[str, range], Callable]:
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
    records = {
        split: builder.as_data_source(split, decoders=skip)
        for split in _SPLITS.values()
        if split in builder.info.splits
    }

    def example(split: str, number: int) -> prepare.Example:
        record = records[split][number]
        image_id = Path(record["image_id"].decode()).name.removesuffix("_leftImg8bit.png")
        label = None if split == "test" else record["segmentation_label"]
        return _example(split, image_id, record["image_left"], label, reading)

    return {split: range(len(of)) for split, of in records.items()}, example
