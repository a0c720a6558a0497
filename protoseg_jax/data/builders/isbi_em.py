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
10, as in section 5); which, is written into a run's folder.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from protoseg_jax.data.builders import files
from protoseg_jax.data.builders.base import Example, SegmentationBuilder, encode_png, file_stamp
from protoseg_jax.data.label_sets import ISBI_EM, VOID
from protoseg_jax.errors import UserError, reason

_LAYOUT = "train-volume.tif and train-labels.tif, or image/ and label/ with a PNG a section"
_HELD_OUT = 3  # one section in so many


class IsbiEm(SegmentationBuilder):
    """Builder of `isbi_em`.

    Args:
      cache_dir: the cache.
      data_dir: the folder.
      seed: of the split.

    Raises:
      UserError: the layout is not there, or images and labels are not equally many.
    """

    name = "isbi_em"

    def __init__(self, *, cache_dir: str | os.PathLike, data_dir: str | os.PathLike, seed: int):
        self.label_set = ISBI_EM
        root = Path(data_dir).expanduser().absolute()
        files.require_folder(root, self.name, _LAYOUT)
        if (root / "train-volume.tif").is_file():
            sections, used = _stacks(root)
        else:
            sections, used = _folders(root)
        if len(sections) < 2:
            raise UserError(
                f"isbi_em: {root} holds {len(sections)} section(s); at least 2 are needed to hold "
                "one out"
            )
        order = np.random.default_rng(seed).permutation(len(sections))
        held_out = max(1, len(sections) // _HELD_OUT)
        self._sections = {
            "train": [sections[n] for n in sorted(order[held_out:])],
            "validation": [sections[n] for n in sorted(order[:held_out])],
        }
        self.drawn = {split: [s[0] for s in of] for split, of in self._sections.items()}
        test = root / "test-volume.tif"
        if test.is_file():
            self._sections["test"] = [
                (f"test{n:02d}", (test, n), None) for n in range(_count(test))
            ]
            used.append(test)
        self.split_names = tuple(self._sections)
        super().__init__(cache_dir=cache_dir, source=[*map(file_stamp, used), self.drawn])

    def examples(self, split: str) -> Iterator[Example]:
        """The sections of a split, in their order in the volume."""
        for name, image, label in self._sections[split]:
            grey = _grey(*image)
            if label is None:
                yield Example(name, encode_png(grey), np.full(grey.shape, VOID, np.uint8))
                continue
            inside = _inside(*label)
            if inside.shape != grey.shape:
                raise UserError(
                    f"{_where(*image)} is {grey.shape[0]}×{grey.shape[1]} but {_where(*label)} is "
                    f"{inside.shape[0]}×{inside.shape[1]} (height×width); make them equal"
                )
            yield Example(name, encode_png(grey), inside)


Page = tuple[Path, int]
"""A file and the number of the page in it."""

Section = tuple[str, Page, Page | None]
"""A section's name, its image and its label."""


def _stacks(root: Path) -> tuple[list[Section], list[Path]]:
    volume, labels = root / "train-volume.tif", root / "train-labels.tif"
    if not labels.is_file():
        raise UserError(f"isbi_em: {labels} is missing beside {volume.name}; add it")
    counts = _count(volume), _count(labels)
    if counts[0] != counts[1]:
        raise UserError(
            f"isbi_em: {volume} holds {counts[0]} sections but {labels.name} {counts[1]}; "
            "they must be equally many"
        )
    sections = [(f"{n:02d}", (volume, n), (labels, n)) for n in range(counts[0])]
    return sections, [volume, labels]


def _folders(root: Path) -> tuple[list[Section], list[Path]]:
    images, labels = (
        files.images_in(files.require_folder(root / name, "isbi_em", _LAYOUT))
        for name in ("image", "label")
    )
    for stem in images.keys() ^ labels.keys():
        there, missing = ("label", "image") if stem in labels else ("image", "label")
        raise UserError(
            f"isbi_em: section {stem!r} of {root} has a file in {there}/ but none in {missing}/; "
            "add it or remove the other"
        )
    stems = sorted(images, key=lambda stem: (len(stem), stem))  # 2 before 10
    sections = [(stem, (images[stem], 0), (labels[stem], 0)) for stem in stems]
    return sections, [*images.values(), *labels.values()]


def _where(path: Path, page: int) -> str:
    return f"section {page} of {path}" if path.suffix == ".tif" else str(path)


def _count(path: Path) -> int:
    try:
        with Image.open(path) as stack:
            return getattr(stack, "n_frames", 1)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is no TIFF stack ({reason(error)}); replace the file") from error


def _page(path: Path, page: int) -> tuple[str, np.ndarray]:
    """(Pillow's mode, values) of a page."""
    try:
        with Image.open(path) as stack:
            stack.seek(page)
            frame = stack.convert("RGB") if stack.mode == "P" else stack
            return frame.mode, np.array(frame)
    except (UnidentifiedImageError, OSError, EOFError, SyntaxError, ValueError) as error:
        raise UserError(f"{_where(path, page)} does not decode; replace the file") from error


def _grey(path: Path, page: int) -> UInt8[np.ndarray, "h w"]:
    """A page as 8-bit grey; 16-bit and RGB where it is clear what they mean.

    Raises:
      UserError: it is not: 16-bit values that are no 8-bit ones (as they are or times 257), or
        colours.
    """
    mode, values = _page(path, page)
    if values.ndim == 3 and mode in ("RGB", "RGBA"):
        if (values[..., :3] != values[..., :1]).any():
            raise UserError(
                f"{_where(path, page)} is in colour, and EM sections are grey; convert it to 8-bit "
                "grey"
            )
        values = values[..., 0]
    if mode.startswith("I") and values.min() >= 0:
        if values.max() <= 255:
            return values.astype(np.uint8)
        if values.max() <= 65535 and not (values % 257).any():
            return (values // 257).astype(np.uint8)
        raise UserError(
            f"{_where(path, page)} has 16-bit values up to {values.max()}, and how they map to "
            "8-bit grey is not known; convert it to 8-bit grey"
        )
    if values.dtype != np.uint8 or values.ndim != 2:
        raise UserError(f"{_where(path, page)} has mode {mode}; convert it to 8-bit grey")
    return values


def _inside(path: Path, page: int) -> UInt8[np.ndarray, "h w"]:
    """Labels of a page: 0 membrane, 1 inside.

    Raises:
      UserError: there are other values than 0 and 255, or 0 and 1.
    """
    mode, values = _page(path, page)
    if mode != "1":
        values = _grey(path, page)
    found = np.unique(values).tolist()
    if not (set(found) <= {0, 1} or set(found) <= {0, 255}):
        shown = ", ".join(map(str, found[:4])) + (" …" if len(found) > 4 else "")
        raise UserError(
            f"labels {_where(path, page)} hold the values {shown}; they must be 0 (membrane) and "
            "255 or 1 (inside)"
        )
    return (values > 0).astype(np.uint8)
