"""`camvid`: CamVid in the SegNet layout.

`train/`, `trainannot/`, `val/`, `valannot/` and optionally `test/`, `testannot/`: images as PNG or
JPEG, masks of the same stem with ids 0–10 and 11 for void, or in the classes' colours and black.
"""

import ml_collections

from protoseg_jax.data import masks, pairs, prepare
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
TABLE = masks.coloured(masks.numbered(LABELS.names, void=[11]), LABELS.colours, void=[(0, 0, 0)])
_FOLDERS = {"train": "train", "validation": "val", "test": "test"}
_LAYOUT = "train/, trainannot/, val/ and valannot/ (the SegNet layout)"


def open(config: ml_collections.ConfigDict) -> prepare.DataSet:
    """The pairs of each split by name."""
    root = prepare.data_folder(config, _LAYOUT)
    splits = {}
    for split, folder in _FOLDERS.items():
        if split == "test" and not (root / folder).exists():
            continue
        found = pairs.Pairs.of(
            prepare.data_folder(config, _LAYOUT, folder),
            prepare.data_folder(config, _LAYOUT, f"{folder}annot"),
        )
        if not found.images:
            raise UserError(f"camvid: no .png or .jpg images in {root / folder}; add them")
        splits[split] = [(found, name) for name in found.images]
    all_pairs = dict.fromkeys(found for of in splits.values() for found, _ in of)
    reading = Reading.of(config)

    def example(_: str, item: tuple[pairs.Pairs, str]) -> prepare.Example:
        found, name = item
        return found.read(name, TABLE, reading)

    return prepare.DataSet(
        name="camvid",
        labels=LABELS,
        splits=splits,
        example=example,
        source=[stamp for found in all_pairs for stamp in found.stamps],
        faults=tuple(fault for found in all_pairs for fault in found.faults),
        doubts=tuple(doubt for found in all_pairs for doubt in found.doubts()),
    )
