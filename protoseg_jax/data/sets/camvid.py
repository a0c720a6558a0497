"""`camvid`: CamVid in the SegNet layout.

`train/`, `trainannot/`, `val/`, `valannot/` and optionally `test/`, `testannot/`: images as PNG or
JPEG, masks as 8-bit PNG of the same stem with ids 0–10 and 11 for void.
"""

import ml_collections

from protoseg_jax.data import prepare
from protoseg_jax.data.labels import LabelSet
from protoseg_jax.data.reading import Reading
from protoseg_jax.errors import UserError

_CLASSES = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}
LABELS = LabelSet(tuple(_CLASSES), tuple(_CLASSES.values()))
_FOLDERS = {"train": "train", "validation": "val", "test": "test"}
_LAYOUT = "train/, trainannot/, val/ and valannot/ (the SegNet layout)"


def open(config: ml_collections.ConfigDict) -> prepare.DataSet:
    """The pairs of each split by name."""
    root = prepare.data_folder(config, _LAYOUT)
    splits = {}
    for split, folder in _FOLDERS.items():
        if split == "test" and not (root / folder).exists():
            continue
        images = prepare.images_in(prepare.data_folder(config, _LAYOUT, folder))
        if not images:
            raise UserError(f"camvid: no .png or .jpg images in {root / folder}; add them")
        masks = prepare.data_folder(config, _LAYOUT, f"{folder}annot")
        splits[split] = [(stem, path, masks / f"{stem}.png") for stem, path in images.items()]
    reading = Reading.of(config)
    return prepare.DataSet(
        name="camvid",
        labels=LABELS,
        splits=splits,
        example=lambda _, pair: prepare.read_pair(*pair, range(len(LABELS)), 11, reading),
        source=[prepare.file_stamp(p) for of in splits.values() for _, *pair in of for p in pair],
    )
