"""`folder`: anyone's own data.

```
images/      PNG or JPEG, any sizes
masks/       indexed or grey 8-bit PNG of the same stem: class numbers, or `data.mask_values`; void
classes.txt  one class name a line, number 0 first
train.txt, validation.txt, test.txt   optional: one stem a line
```

Without `train.txt` and `validation.txt` a seeded fifth of the images is held out for validation.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import ml_collections

from protoseg_jax.data import prepare
from protoseg_jax.data.labels import VOID, LabelSet, generic
from protoseg_jax.data.reading import Reading, lines_in
from protoseg_jax.errors import UserError

_LAYOUT = "images/, masks/ and classes.txt"
_ONE_IN = 5  # images is held out


def open(config: ml_collections.ConfigDict) -> prepare.DataSet:
    """The pairs of each split, in the order of its list; `data.void` is their "no label"."""
    root = prepare.data_folder(config, _LAYOUT)
    masks = prepare.data_folder(config, _LAYOUT, "masks")
    images = prepare.images_in(prepare.data_folder(config, _LAYOUT, "images"))
    labels, reading = generic(_class_names(root / "classes.txt")), Reading.of(config)
    values, void = _mask_values(config, labels)
    splits, drawn = _listed(root, images), None
    if not splits:
        if len(images) < 2:
            raise UserError(
                f"folder: {len(images)} image(s) in images/; at least 2 are needed to hold one out"
            )
        drawn = prepare.draw_split(list(images), config.seed, _ONE_IN)
        splits = drawn = {split: sorted(stems) for split, stems in drawn.items()}

    def example(_: str, stem: str) -> prepare.Example:
        mask = masks / f"{stem}.png"
        return prepare.read_pair(stem, images[stem], mask, values, void, reading)

    paths = [*images.values(), *(masks / f"{stem}.png" for stem in images)]
    source = [*map(prepare.file_stamp, paths), labels.names, values, void, splits]
    told = void if isinstance(values, range) else None
    return prepare.DataSet("folder", labels, splits, example, source, drawn=drawn, void=told)


def _listed(root: Path, images: Collection[str]) -> dict[str, list[str]]:
    """The stems of each split by the lists, none without any."""
    lists = {n: root / f"{n}.txt" for n in ("train", "validation", "test")}
    present = {name: path for name, path in lists.items() if path.is_file()}
    for name in ("train", "validation") if present else ():
        if name not in present:
            raise UserError(
                f"folder: {lists[name]} is missing beside {next(iter(present.values())).name}; "
                "write both train.txt and validation.txt, or none for a seeded split"
            )
    splits = {}
    for name, path in present.items():
        splits[name] = lines_in(path)
        if not splits[name]:
            raise UserError(f"folder: {path} lists no image; write one name a line")
        for stem in splits[name]:
            if stem not in images:
                raise UserError(
                    f"folder: {path} names {stem!r}, but images/ has no {stem}.png or .jpg"
                )
    return splits


def _class_names(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"folder: {path} is missing; write one class name a line, class 0 first")
    names = lines_in(path)
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"folder: {path} must name at least two classes, each once")
    if len(names) > VOID:
        raise UserError(f"folder: {path} names {len(names)} classes; {VOID} is the most")
    return names


def _mask_values(
    config: ml_collections.ConfigDict, labels: LabelSet
) -> tuple[Sequence[int], int | None]:
    """(mask value of each class, that of no label unless a class has it)."""
    void, values = int(config.data.void), tuple(config.data.mask_values)
    if not 0 <= void <= 255:
        raise UserError(f"data.void={void} must lie in 0–255; set --config.data.void")
    if not values:
        return range(len(labels)), void
    wrong = None
    if len(values) != len(labels):
        wrong = f"gives {len(values)} mask value(s) to {len(labels)} classes"
    elif not all(type(v) is int and 0 <= v <= 255 for v in values):
        wrong = "holds what is no number in 0–255"
    elif len(set(values)) < len(values):
        wrong = "holds a value twice"
    if wrong:
        raise UserError(
            f"data.mask_values={values} {wrong}; set --config.data.mask_values to the mask value "
            f"of each class in order: {', '.join(labels.names)}"
        )
    return values, None if void in values else void
