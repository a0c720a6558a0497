"""`voc`: Pascal VOC 2012 as unpacked, with the augmented masks (Hariharan et al. 2011).

`JPEGImages/`, `SegmentationClass/` (the official masks), `SegmentationClassAug/` (grey or palette
PNG) and `ImageSets/Segmentation/{train,val,test,train_aug}.txt`, below `VOCdevkit/VOC2012/`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from protoseg_jax.data.builders import files
from protoseg_jax.data.builders.base import Example, SegmentationBuilder, file_stamp
from protoseg_jax.data.label_sets import VOC, VOID
from protoseg_jax.errors import UserError

_LAYOUT = "VOCdevkit/VOC2012/ as unpacked (JPEGImages/, SegmentationClass/, ImageSets/)"
_AUGMENTED = ("train_aug.txt", "trainaug.txt")


class Voc(SegmentationBuilder):
    """Builder of `voc`: splits train_aug, train, validation and, where its list is there, test.

    Masks are the official ones, in train_aug the augmented ones. Without a list of its own
    train_aug is train ∪ augmented − validation: 10,582 images. `test` has no labels.

    Args:
      cache_dir: the cache.
      data_dir: VOC2012/, VOCdevkit/ or the folder above it.

    Raises:
      UserError: the layout is not there, or a list names an image that is not there.
    """

    name = "voc"

    def __init__(self, *, cache_dir: str | os.PathLike, data_dir: str | os.PathLike):
        self.label_set = VOC
        top = Path(data_dir).expanduser().absolute()
        files.require_folder(top, self.name, _LAYOUT)
        inside = [top, top / "VOC2012", top / "VOCdevkit" / "VOC2012"]
        root = next((p for p in inside if (p / "JPEGImages").is_dir()), None)
        if root is None:
            raise UserError(f"voc: no JPEGImages/ in {top}; data.dir must hold {_LAYOUT}")
        self._devkit = root
        if not (root / "SegmentationClassAug").is_dir():
            raise UserError(
                f"voc: the augmented masks {root / 'SegmentationClassAug'} are missing; unpack the "
                "archive SegmentationClassAug.zip (12,031 PNGs, made from SBD) there"
            )
        self._stems = self._lists()
        self.split_names = tuple(self._stems)
        paths = {p for split in self._stems for _, *pair in self._pairs(split) for p in pair if p}
        for path in sorted(paths):
            if not path.is_file():
                raise UserError(
                    f"voc: {path} is missing though a list in ImageSets/Segmentation/ names it; "
                    "unpack it again, or correct the list"
                )
        super().__init__(cache_dir=cache_dir, source=[*map(file_stamp, sorted(paths)), self._stems])

    def _lists(self) -> dict[str, list[str]]:
        folder = self._devkit / "ImageSets" / "Segmentation"
        augmented = next((folder / n for n in _AUGMENTED if (folder / n).is_file()), None)
        train, validation = (_read(folder / f"{name}.txt") for name in ("train", "val"))
        if augmented:
            train_aug = _read(augmented)
        else:
            masks = {p.stem for p in (self._devkit / "SegmentationClassAug").glob("*.png")}
            train_aug = sorted((masks | set(train)) - set(validation))
        splits = {"train_aug": train_aug, "train": train, "validation": validation}
        if (folder / "test.txt").is_file():
            splits["test"] = _read(folder / "test.txt")
        return splits

    def _pairs(self, split: str) -> Iterator[tuple[str, Path, Path | None]]:
        """(stem, image, mask or None) of a split."""
        official, augmented = (
            self._devkit / name for name in ("SegmentationClass", "SegmentationClassAug")
        )
        first, second = (augmented, official) if split == "train_aug" else (official, augmented)
        for stem in self._stems[split]:
            mask = None
            if split != "test":
                mask = first / f"{stem}.png"
                if not mask.is_file():
                    mask = second / f"{stem}.png"
            yield stem, self._devkit / "JPEGImages" / f"{stem}.jpg", mask

    def examples(self, split: str) -> Iterator[Example]:
        """The pairs of a split, in the order of its list."""
        for stem, image, mask in self._pairs(split):
            if mask is None:
                yield files.read_unlabelled(stem, image)
            else:
                yield files.read_pair(stem, image, mask, {255: VOID}, len(self.label_set))


def _read(path: Path) -> list[str]:
    """Stems of a list: one name, or a pair of paths, a line."""
    if not path.is_file():
        raise UserError(f"voc: list {path} is missing; data.dir must hold {_LAYOUT}")
    stems = [Path(line.split()[0]).stem for line in path.read_text().splitlines() if line.strip()]
    if not stems:
        raise UserError(f"voc: list {path} is empty; unpack it again")
    return stems
