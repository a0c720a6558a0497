"""`voc`: Pascal VOC 2012 as unpacked, with the augmented masks (Hariharan et al. 2011).

`JPEGImages/`, `SegmentationClass/` (the official masks), `SegmentationClassAug/` (grey or palette
PNG) and `ImageSets/Segmentation/{train,val,test,train_aug}.txt`, below `VOCdevkit/VOC2012/`.

Splits are train_aug, train, validation and, where its list is there, test, which has no labels.
Masks are the official ones, in train_aug the augmented ones. Without a list of its own train_aug is
train ∪ augmented − validation: 10,582 images.
"""

from pathlib import Path

import ml_collections
import numpy as np
from jaxtyping import UInt8

from protoseg_jax import images
from protoseg_jax.data import masks, pairs, prepare
from protoseg_jax.data.labels import LabelSet
from protoseg_jax.data.reading import Reading, lines_in
from protoseg_jax.errors import UserError

LABELS = LabelSet(
    tuple(
        "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
        "motorbike person pottedplant sheep sofa train tvmonitor".split()
    ),
    # Pascal's own: class c's bits 0, 1, 2 (then 3, 4, 5) are the high bits of red, green, blue.
    tuple(tuple(128 * (c >> n & 1) + 64 * (c >> (n + 3) & 1) for n in range(3)) for c in range(21)),
)
TABLE = masks.coloured(masks.numbered(LABELS.names), LABELS.colours, void=[(224, 224, 192)])
_LAYOUT = "VOCdevkit/VOC2012/ as unpacked (JPEGImages/, SegmentationClass/, ImageSets/)"
_AUGMENTED = ("train_aug.txt", "trainaug.txt")


def open(config: ml_collections.ConfigDict) -> prepare.DataSet:
    """The pairs of each split, in the order of its list.

    `data.dir` is VOC2012/, VOCdevkit/ or the folder above it.
    """
    top = prepare.data_folder(config, _LAYOUT)
    inside = [top, top / "VOC2012", top / "VOCdevkit" / "VOC2012"]
    root = next((p for p in inside if (p / "JPEGImages").is_dir()), None)
    if root is None:
        raise UserError(f"voc: no JPEGImages/ in {top}; data.dir must hold {_LAYOUT}")
    if not (root / "SegmentationClassAug").is_dir():
        raise UserError(
            f"voc: the augmented masks {root / 'SegmentationClassAug'} are missing; unpack the "
            "archive SegmentationClassAug.zip (12,031 PNGs, made from SBD) there"
        )
    stems, reading = _lists(root), Reading.of(config)

    def pair(split: str, stem: str) -> tuple[str, Path, Path | None]:
        """(stem, image, mask of the split's kind, or of the other where there is none)."""
        kinds = ["SegmentationClass", "SegmentationClassAug"]
        of = [root / k / f"{stem}.png" for k in (kinds[::-1] if split == "train_aug" else kinds)]
        mask = None if split == "test" else of[not of[0].is_file()]
        return stem, root / "JPEGImages" / f"{stem}.jpg", mask

    splits = {split: [pair(split, stem) for stem in of] for split, of in stems.items()}
    paths = sorted({p for of in splits.values() for _, *files in of for p in files if p})
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"voc: {path} is missing though a list in ImageSets/Segmentation/ names it; "
                "unpack it again, or correct the list"
            )

    def example(_: str, item: tuple[str, Path, Path | None]) -> prepare.Example:
        return pairs.read_pair(*item, TABLE, reading)

    source = [*map(prepare.file_stamp, paths), stems]
    return prepare.DataSet("voc", LABELS, splits, example, source, official=True)


def submission(split: str, image_id: str, labels: UInt8[np.ndarray, "h w"]) -> tuple[str, bytes]:
    """`results/VOC2012/Segmentation/comp6_SPLIT_cls/ID.png`, indexed, with Pascal's palette."""
    folder = f"results/VOC2012/Segmentation/comp6_{'val' if split == 'validation' else split}_cls"
    return f"{folder}/{image_id}.png", images.palette_png(labels, LABELS.colours)


def _lists(root: Path) -> dict[str, list[str]]:
    """The stems of each split."""
    folder = root / "ImageSets" / "Segmentation"
    augmented = next((folder / n for n in _AUGMENTED if (folder / n).is_file()), None)
    train, validation = (_read(folder / f"{name}.txt") for name in ("train", "val"))
    if augmented:
        train_aug = _read(augmented)
    else:
        masks = {p.stem for p in (root / "SegmentationClassAug").glob("*.png")}
        train_aug = sorted((masks | set(train)) - set(validation))
    splits = {"train_aug": train_aug, "train": train, "validation": validation}
    if (folder / "test.txt").is_file():
        splits["test"] = _read(folder / "test.txt")
    return splits


def _read(path: Path) -> list[str]:
    """Stems of a list: one name, or a pair of paths, a line."""
    if not path.is_file():
        raise UserError(f"voc: list {path} is missing; data.dir must hold {_LAYOUT}")
    stems = [Path(line.split()[0]).stem for line in lines_in(path)]
    if not stems:
        raise UserError(f"voc: list {path} is empty; unpack it again")
    return stems
