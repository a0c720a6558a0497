"""The record of a prototype: what it is, and which patch of which training image it became.

`prototypes.json` tells people and other programs; in checkpoints the same travels with the arrays.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from protoseg_jax import decoding, images
from protoseg_jax.data import tiles
from protoseg_jax.files import read_json, write_json

FILE, FOLDER = "prototypes.json", "prototypes"
_STORED = ("index", "class_", "image", "row", "col", "squared_distance", "image_id", "box", "tile")


@dataclasses.dataclass(frozen=True)
class Prototype:
    """A prototype of a run. Before projection it is a learnt vector and has no source.

    Attributes:
      index: its number at initialisation, kept for life.
      class_: its class; −1 of the bias of directions, which is no patch.
      image, image_id: number and name of the example of the projection split it comes from.
      row, col: its point on that example's feature map.
      squared_distance: of the learnt vector to the patch that replaced it.
      box: that cell in the example's pixels, [top, left, bottom, right], half-open.
      tile: the corner in its image where the example is a tile of it.
      folder: the run's, of a prototype whose pictures lie there.
      source_file, source_size: the example's picture in that folder, perhaps smaller than the
        example was, and the (height, width) that this had; None of a run without it.
    """

    index: int
    class_: int
    image: int | None = None
    row: int | None = None
    col: int | None = None
    squared_distance: float | None = None
    image_id: str | None = None
    box: list[int] | None = None
    tile: list[int] | None = None
    folder: Path | None = None
    source_file: str | None = None
    source_size: tuple[int, int] | None = None

    @property
    def projected(self) -> bool:
        return self.image_id is not None

    @property
    def patch(self) -> UInt8[np.ndarray, "h w 3"] | None:
        """The patch with its surroundings, where its file is there."""
        path = self.folder and self.projected and self.folder / FOLDER / f"{self.index:03d}.png"
        return decoding.read(path) if path and path.exists() else None

    @property
    def patch_box(self) -> list[int] | None:
        """The patch inside `patch`."""
        return images.inner_box(self.box, self.source_size) if self.source_size else None

    @property
    def source(self) -> Path | None:
        """File of the training image, where it is there."""
        path = self.source_file and self.folder / FOLDER / "sources" / self.source_file
        return path if path and path.exists() else None

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        values = {key.rstrip("_"): getattr(self, key) for key in _STORED}
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Prototype":
        return cls(**{"class_" if key == "class" else key: x for key, x in values.items()})


def new(classes: Sequence[int]) -> list[Prototype]:
    """Prototypes of these classes [M], not yet projected."""
    return [Prototype(j, int(c)) for j, c in enumerate(classes)]


def classes_of(prototypes: Sequence[Prototype]) -> Int[np.ndarray, " m"]:
    """c(j)."""
    return np.array([p.class_ for p in prototypes], np.int64)


def with_pictures(folder: Path, prototypes: Sequence[Prototype]) -> list[Prototype]:
    """The same prototypes, knowing their pictures in a run's folder."""
    entries = read_json(folder / FILE, {"prototypes": []})["prototypes"]
    sources = {e["index"]: e["source"] for e in entries if e.get("source")}
    found = []
    for prototype in prototypes:
        home = sources.get(prototype.index) if prototype.projected else None
        where = {"source_file": home["file"], "source_size": tuple(home["size"])} if home else {}
        found.append(dataclasses.replace(prototype, folder=folder, **where))
    return found


def write_record(
    folder: Path,
    prototypes: Sequence[Prototype],
    *,
    phase: str,
    eval_size: tuple[int, int],
    feature_size: tuple[int, int],
    classes: Sequence[str],
) -> None:
    """prototypes.json of projected prototypes with their sources.

    A prototype's "box" is in the pixels of its image; its "source" is the example it comes from:
    the file in prototypes/sources/, its own (height, width), and the patch's box in it.
    """
    entries = [
        {
            "index": p.index,
            "class": p.class_,
            "class_name": classes[p.class_],
            "image_id": p.image_id,
            "row": p.row,
            "col": p.col,
            "box": tiles.moved(p.box, p.tile or (0, 0)),
            "squared_distance": p.squared_distance,
            "source": {"file": p.source_file, "size": list(p.source_size), "box": p.box},
        }
        for p in prototypes
    ]
    head = {"phase": phase, "eval_size": list(eval_size), "feature_size": list(feature_size)}
    write_json(folder / FILE, {**head, "classes": list(classes), "prototypes": entries})
