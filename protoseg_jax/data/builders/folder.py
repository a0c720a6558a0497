"""`folder`: anyone's own data.

```
images/      PNG or JPEG, any sizes
masks/       indexed or grey 8-bit PNG of the same stem: class numbers and the void value
classes.txt  one class name a line, number 0 first
train.txt, validation.txt, test.txt   optional: one stem a line
```

Without `train.txt` and `validation.txt` a seeded fifth of the images is held out for validation.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from protoseg_jax.data.builders import files
from protoseg_jax.data.builders.base import Example, SegmentationBuilder, file_stamp
from protoseg_jax.data.label_sets import VOID, generic
from protoseg_jax.errors import UserError

_LAYOUT = "images/, masks/ and classes.txt"


class Folder(SegmentationBuilder):
    """Builder of `folder`.

    Args:
      cache_dir: the cache.
      data_dir: the folder.
      seed: of the split, where no lists are given.
      void: the mask value that means "no label".

    Raises:
      UserError: the layout is not there, a list names an absent image, a class is named twice.
    """

    name = "folder"

    def __init__(
        self,
        *,
        cache_dir: str | os.PathLike,
        data_dir: str | os.PathLike,
        seed: int,
        void: int = VOID,
    ):
        root = Path(data_dir).expanduser().absolute()
        files.require_folder(root, self.name, _LAYOUT)
        self._masks = files.require_folder(root / "masks", self.name, _LAYOUT)
        self._images = files.images_in(files.require_folder(root / "images", self.name, _LAYOUT))
        self._void = int(void)
        self.label_set = generic(_class_names(root / "classes.txt"))
        self._splits = self._listed(root)
        if not self._splits:
            self._splits = self.drawn = self._draw(seed)
        self.split_names = tuple(self._splits)
        paths = [*self._images.values(), *(self._masks / f"{s}.png" for s in self._images)]
        stamps = [file_stamp(p) if p.exists() else p for p in paths]
        super().__init__(
            cache_dir=cache_dir, source=[*stamps, self.label_set.names, self._void, self._splits]
        )

    def _listed(self, root: Path) -> dict[str, list[str]]:
        lists = {n: root / f"{n}.txt" for n in ("train", "validation", "test")}
        present = {name: path for name, path in lists.items() if path.is_file()}
        if not present:
            return {}
        for name in ("train", "validation"):
            if name not in present:
                raise UserError(
                    f"folder: {lists[name]} is missing beside {next(iter(present.values())).name}; "
                    "write both train.txt and validation.txt, or none for a seeded split"
                )
        splits = {}
        for name, path in present.items():
            stems = [line.strip() for line in path.read_text().splitlines() if line.strip()]
            if not stems:
                raise UserError(f"folder: {path} lists no image; write one name a line")
            for stem in stems:
                if stem not in self._images:
                    raise UserError(
                        f"folder: {path} names {stem!r}, but images/ has no {stem}.png or .jpg"
                    )
            splits[name] = stems
        return splits

    def _draw(self, seed: int) -> dict[str, list[str]]:
        stems = list(self._images)
        if len(stems) < 2:
            raise UserError(
                f"folder: {len(stems)} image(s) in images/; at least 2 are needed to hold one out"
            )
        order = np.random.default_rng(seed).permutation(len(stems))
        held_out = max(1, len(stems) // 5)
        return {
            "train": sorted(stems[n] for n in order[held_out:]),
            "validation": sorted(stems[n] for n in order[:held_out]),
        }

    def examples(self, split: str) -> Iterator[Example]:
        """The pairs of a split, in the order of its list."""
        for stem in self._splits[split]:
            mask = self._masks / f"{stem}.png"
            values = {self._void: VOID}
            yield files.read_pair(stem, self._images[stem], mask, values, len(self.label_set))


def _class_names(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"folder: {path} is missing; write one class name a line, class 0 first")
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"folder: {path} must name at least two classes, each once")
    return names
