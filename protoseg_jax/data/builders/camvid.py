"""`camvid`: CamVid in the SegNet layout.

`train/`, `trainannot/`, `val/`, `valannot/` and optionally `test/`, `testannot/`: images as PNG or
JPEG, masks as 8-bit PNG of the same stem with ids 0–10 and 11 for void.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from protoseg_jax.data.builders import files
from protoseg_jax.data.builders.base import Example, SegmentationBuilder, file_stamp
from protoseg_jax.data.label_sets import CAMVID, VOID
from protoseg_jax.errors import UserError

_FOLDERS = {"train": "train", "validation": "val", "test": "test"}
_LAYOUT = "train/, trainannot/, val/ and valannot/ (the SegNet layout)"


class CamVid(SegmentationBuilder):
    """Builder of `camvid`.

    Args:
      cache_dir: the cache.
      data_dir: the folder that holds `train/` and the others.

    Raises:
      UserError: the layout is not there.
    """

    name = "camvid"

    def __init__(self, *, cache_dir: str | os.PathLike, data_dir: str | os.PathLike):
        self.label_set = CAMVID
        root = Path(data_dir).expanduser().absolute()
        files.require_folder(root, self.name, _LAYOUT)
        self._pairs: dict[str, list[tuple[str, Path, Path]]] = {}
        for split, folder in _FOLDERS.items():
            if split == "test" and not (root / folder).exists():
                continue
            images = files.images_in(files.require_folder(root / folder, self.name, _LAYOUT))
            if not images:
                raise UserError(f"camvid: no .png or .jpg images in {root / folder}; add them")
            masks = files.require_folder(root / f"{folder}annot", self.name, _LAYOUT)
            self._pairs[split] = [(s, p, masks / f"{s}.png") for s, p in images.items()]
        self.split_names = tuple(self._pairs)
        paths = [p for pairs in self._pairs.values() for _, *pair in pairs for p in pair]
        super().__init__(
            cache_dir=cache_dir, source=[file_stamp(p) if p.exists() else p for p in paths]
        )

    def examples(self, split: str) -> Iterator[Example]:
        """The pairs of a split by name."""
        for stem, image, mask in self._pairs[split]:
            yield files.read_pair(stem, image, mask, {11: VOID}, len(self.label_set))
