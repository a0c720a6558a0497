"""`folder`: anyone's own data.

```
images/      images of any sizes, in folders below it too
masks/       a mask for each, of the same folders and name (and `data.mask_suffix`)
classes.txt  one class name a line; after a tab, the mask values and colours that mean it
train.txt, validation.txt, test.txt   optional: one image a line
```

Images are PNG, JPEG, TIFF, WebP or BMP; masks the same without loss, grey, indexed or in colour.
What their pixels mean is in `data/masks.py`. Without `train.txt` and `validation.txt` a seeded
fifth of the images is held out for validation. Folders of other names: `data.images`, `data.masks`,
which may be one and the same.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import ml_collections

from protoseg_jax.data import masks, pairs, prepare
from protoseg_jax.data.labels import VOID
from protoseg_jax.data.reading import Reading, lines_in
from protoseg_jax.errors import Fault, UserError

_LISTS = ("train", "validation", "test")
_SPLITS = {*_LISTS, "training", "val", "valid", "testing"}  # as folders are called that are splits
_ONE_IN = 5  # images is held out


def open(config: ml_collections.ConfigDict) -> prepare.DataSet:
    """The pairs of each split, in the order of its list."""
    data = config.data
    layout = f"{data.images}/, {data.masks}/ and classes.txt"
    root = prepare.data_folder(config, layout)
    _check(data)
    labels, table = masks.read_classes(root / "classes.txt", int(data.void))
    folders = [prepare.data_folder(config, layout, name) for name in (data.images, data.masks)]
    ending = pairs.mask_ending(data.mask_suffix)
    if os.path.samefile(*folders) and not ending:
        raise UserError(
            f"data.images and data.masks are both {folders[0]}; set --config.data.mask_suffix to "
            "what tells a mask's name from its image's, like _mask"
        )
    found = pairs.Pairs.of(*folders, ending)
    if not found.images:
        raise UserError(
            f"folder: no image in {found.folder}; put PNG, JPEG, TIFF, WebP or BMP files there"
        )
    void = [value for value, label in table.values.items() if label == VOID]
    splits, faults, drawn = _listed(root, found, data.images), list(found.faults), None
    if splits:
        for split, items in splits.items():
            faults += [item for item in items if isinstance(item, Fault)]
            splits[split] = [item for item in items if not isinstance(item, Fault)]
    else:
        if len(found.images) < 2:
            raise UserError(
                f"folder: {len(found.images)} image(s) in {found.folder}; at least 2 are needed to "
                "hold one out"
            )
        splits = drawn = prepare.draw_split(list(found.images), config.seed, _ONE_IN)
    reading = Reading.of(config)
    return prepare.DataSet(
        name="folder",
        labels=labels,
        splits=splits,
        example=lambda _, name: found.read(name, table, reading),
        source=[*found.stamps, table, splits, [str(fault) for fault in faults]],
        drawn=drawn,
        void=void[0] if table.is_plain and void else None,
        faults=tuple(faults),
        doubts=(*found.doubts(), *(_like_splits(found) if drawn else _unlisted(found, splits))),
    )


def _check(data: ml_collections.ConfigDict) -> None:
    """Raise what is wrong with the settings."""
    if not 0 <= int(data.void) <= 255:
        raise UserError(f"data.void={data.void} must lie in 0–255; set --config.data.void")
    if data.get("mask_values"):
        raise UserError(
            f"data.mask_values={tuple(data.mask_values)} stands in classes.txt now; write a tab "
            "and its mask value after each class's name there"
        )


def _listed(root: Path, found: pairs.Pairs, folder: str) -> dict[str, list[str | Fault]]:
    """The names of each split by the lists, and what is wrong with them; none without any list."""
    lists = {name: root / f"{name}.txt" for name in _LISTS}
    present = {name: path for name, path in lists.items() if os.path.lexists(path)}
    for name in ("train", "validation") if present else ():
        if name not in present:
            raise UserError(
                f"folder: {lists[name]} is missing beside {next(iter(present.values())).name}; "
                "write both train.txt and validation.txt, or none for a seeded split"
            )
    names, splits = pairs.Names(found.images, folder), {}
    for split, path in present.items():
        lines = lines_in(path)
        if not lines:
            raise UserError(f"folder: {path} lists no image; write one name a line")
        splits[split] = [names.find(line, path) for line in lines]
    return splits


def _like_splits(found: pairs.Pairs) -> list[tuple[str, str, str]]:
    """A doubt about a drawn split, where folders seem to be one."""
    folders = {name.partition("/")[0] for name in found.images if "/" in name}
    if not folders or not folders <= _SPLITS:
        return []
    fact = f"{found.folder} holds {' and '.join(sorted(folders))}, and a fifth of all is held out"
    remedy = "list each one's images in train.txt, validation.txt and test.txt if they are splits"
    return [("folders that look like splits", fact, remedy)]


def _unlisted(found: pairs.Pairs, splits: dict[str, Sequence[str]]) -> list[tuple[str, str, str]]:
    """Doubts about images that no list names."""
    listed = {name for of in splits.values() for name in of}
    return [
        ("image in no list", f"image {path} is in no list", "add it to train.txt, or leave it")
        for name, path in found.images.items()
        if name not in listed
    ]
