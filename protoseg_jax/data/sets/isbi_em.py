"""`isbi_em`: sections of the EM segmentation challenge (ISBI 2012), Table 4's data.

Either the official stacks,

```
train-volume.tif  train-labels.tif   30 sections each
test-volume.tif                      optional; becomes the split `test`, without labels
```

or one PNG a section, of the same name in both folders:

```
image/  label/
```

Images are grey; labels are 0 (membrane) and 255 or 1 (inside). The challenge keeps the labels of
its test sections, so a seeded third of the labelled ones is held out for validation (of 30 sections
10, as in section 5); which, is written into a run's folder. With `data.split = "authors"` it is
every third by the numbers in the files' names (a stack's pages count from 0), from 1 on: 1, 4, 7, …
"""

import re
from pathlib import Path

import ml_collections
import numpy as np
from jaxtyping import UInt8

from protoseg_jax import decoding, images
from protoseg_jax.data import masks, pairs, prepare
from protoseg_jax.data.labels import VOID, LabelSet
from protoseg_jax.data.reading import Reading
from protoseg_jax.errors import UserError

# Light and dark as in the sections: membranes dark.
LABELS = LabelSet(("membrane", "inside"), ((0, 114, 178), (240, 228, 66)))
TABLE = masks.numbered(LABELS.names, [0, (1, 255)], ())
_LAYOUT = "train-volume.tif and train-labels.tif, or image/ and label/ with a PNG a section"
_ONE_IN = 3  # sections is held out

Page = tuple[Path, int]  # a file, and the number of the page in it
Section = tuple[str, Page, Page | None]  # name, image, label


def open(config: ml_collections.ConfigDict) -> prepare.DataSet:
    """The sections of each split, in their order in the volume."""
    root = prepare.data_folder(config, _LAYOUT)
    stacked = (root / "train-volume.tif").is_file()
    sections, used = _stacks(root) if stacked else _folders(config)
    if len(sections) < 2:
        raise UserError(
            f"isbi_em: {root} holds {len(sections)} section(s); at least 2 are needed to hold "
            "one out"
        )
    splits = _split(sections, config)
    drawn = {split: [name for name, *_ in of] for split, of in splits.items()}
    test = root / "test-volume.tif"
    if test.is_file():
        count = decoding.count_pages(test)
        splits["test"] = [(f"test{n:02d}", (test, n), None) for n in range(count)]
        used.append(test)
    source, reading = [*map(prepare.file_stamp, used), drawn], Reading.of(config)

    def example(_: str, section: Section) -> prepare.Example:
        return _example(section, reading)

    return prepare.DataSet("isbi_em", LABELS, splits, example, source, drawn=drawn)


def _split(sections: list[Section], config: ml_collections.ConfigDict) -> dict[str, list[Section]]:
    """The sections that train and those that validate."""
    if config.data.split is None:
        return prepare.draw_split(sections, config.seed, _ONE_IN)
    if config.data.split != "authors":
        raise UserError(
            f"data.split={config.data.split!r} is no split of isbi_em; set it to 'authors', or "
            "leave it out to have one drawn by the seed"
        )
    splits = {"train": [], "validation": []}
    for section in sections:
        number = re.search(r"(\d+)$", section[0])
        if number is None:
            raise UserError(
                f"isbi_em: section {section[0]!r} has no number at the end of its name, which "
                "data.split='authors' goes by; rename the files, or leave data.split out"
            )
        held_out = int(number[1]) % _ONE_IN == 1
        splits["validation" if held_out else "train"].append(section)
    if not all(splits.values()):
        raise UserError(
            "isbi_em: data.split='authors' leaves no section on one side; it is for the numbers "
            "of the challenge's 30 sections"
        )
    return splits


def _example(section: Section, reading: Reading) -> prepare.Example:
    name, image, label = section
    grey = _grey(image, reading)
    inside = np.full(grey.shape, VOID, np.uint8) if label is None else _inside(label, reading)
    if inside.shape != grey.shape:
        raise UserError(
            f"{_where(image)} is {grey.shape[0]}×{grey.shape[1]} but {_where(label)} is "
            f"{inside.shape[0]}×{inside.shape[1]} (height×width); make them equal"
        )
    return prepare.Example(name, images.encode(grey), inside)


def _stacks(root: Path) -> tuple[list[Section], list[Path]]:
    """(sections, files) of the official stacks."""
    volume, labels = root / "train-volume.tif", root / "train-labels.tif"
    if not labels.is_file():
        raise UserError(f"isbi_em: {labels} is missing beside {volume.name}; add it")
    counts = decoding.count_pages(volume), decoding.count_pages(labels)
    if counts[0] != counts[1]:
        raise UserError(
            f"isbi_em: {volume} holds {counts[0]} sections but {labels.name} {counts[1]}; "
            "they must be equally many"
        )
    sections = [(f"{n:02d}", (volume, n), (labels, n)) for n in range(counts[0])]
    return sections, [volume, labels]


def _folders(config: ml_collections.ConfigDict) -> tuple[list[Section], list[Path]]:
    """As `_stacks`, of one PNG a section."""
    folders = [prepare.data_folder(config, _LAYOUT, name) for name in ("image", "label")]
    (pictures, wrong), (labels, also_wrong) = map(pairs.images_in, folders)
    for fault in (*wrong, *also_wrong):
        raise fault
    for stem in pictures.keys() ^ labels.keys():
        there, missing = ("label", "image") if stem in labels else ("image", "label")
        raise UserError(
            f"isbi_em: section {stem!r} of {folders[0].parent} has a file in {there}/ but none in "
            f"{missing}/; add it or remove the other"
        )
    stems = sorted(pictures, key=lambda stem: (len(stem), stem))  # 2 before 10
    sections = [(stem, (pictures[stem], 0), (labels[stem], 0)) for stem in stems]
    return sections, [*pictures.values(), *labels.values()]


def _where(page: Page) -> str:
    path, number = page
    return f"section {number} of {path}" if path.suffix == ".tif" else str(path)


def _grey(page: Page, reading: Reading, *, binary: bool = False) -> np.ndarray:
    """A page as 8-bit grey [h w]; with `binary`, of labels, one bit will do.

    Raises:
      UserError: its values are colours, or 16-bit, and neither 8-bit ones (as they are or times
        257) nor of an image where `data.white` is set; or its orientation wants a setting.
    """
    where = _where(page)
    mode, values, orientation = decoding.read_page(*page, where)
    values = reading.upright(values, orientation, where)
    if binary and mode == "1":
        return values
    if values.ndim == 3 and mode in ("RGB", "RGBA"):
        if (values[..., :3] != values[..., :1]).any():
            raise UserError(
                f"{where} is in colour, and EM sections are grey; convert it to 8-bit grey"
            )
        values = values[..., 0]
    if mode.startswith("I") and values.min() >= 0:
        if reading.white and not binary and values.max() <= 65535:
            return reading.white_at_255(values.astype(np.uint16), where)
        if values.max() <= 255:
            return values.astype(np.uint8)
        if values.max() <= 65535 and not (values % 257).any():
            return (values // 257).astype(np.uint8)
        raise UserError(
            f"{where} has 16-bit values up to {values.max()}, and which of them is white is not "
            + ("known; convert it to 8-bit grey" if binary else "known; set --config.data.white")
        )
    if values.dtype != np.uint8 or values.ndim != 2:
        raise UserError(f"{where} has mode {mode}; convert it to 8-bit grey")
    return values


def _inside(page: Page, reading: Reading) -> UInt8[np.ndarray, "h w"]:
    """Labels of a page: 0 membrane, 1 inside."""
    values = _grey(page, reading, binary=True).astype(np.uint8)
    if values.max(initial=0) > 1 and (values == 1).any():
        raise UserError(
            f"labels {_where(page)} hold 1 and {values.max()}, and inside is 255 or 1; correct them"
        )
    return TABLE.labels(decoding.Mask(values), _where(page))[0]
