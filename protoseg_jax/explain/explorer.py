"""The explorer: one self-contained folder whose index.html opens from disk, without a server.

```
index.html · data/run.js · data/NNN.js (an image's numbers) · images/NNN.jpg
prototypes/ID.png (patch and surroundings) · sources/*.jpg (training images) · nearest/ID.jpg
```

Browsers refuse to read files from a page that lies on disk, so numbers travel as scripts. The page
works them out as the API does: it gets an image's features (or similarities, whichever are fewer)
at its points and interpolates. Numbers that would not fit `_IMAGE_BYTES` are kept in 16 bits, and
if they still do not, of every n-th point only: the page says so, and moves from point to point.
"""

import base64
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from jaxtyping import Float, Int, UInt8

from protoseg_jax.data.builders.base import encode_png
from protoseg_jax.data.label_sets import VOID, LabelSet
from protoseg_jax.explain import figures
from protoseg_jax.models.prototypes import EPSILON

_IMAGE_BYTES = 560_000  # an image's numbers; 10 such images and 210 prototypes stay below 15 MB
_IMAGE_SIDE, _SOURCE_SIDE, _NEAREST_SIDE = 1024, 240, 64
_CONFUSIONS, _REGIONS, _CAUSES = 12, 6, 6  # shown: kinds, regions of a kind, prototypes of a region
_REGION_SAMPLES = 256  # pixels of a region whose evidence is averaged
_TEMPLATE = Path(__file__).with_name("explorer.html")


@dataclasses.dataclass(frozen=True)
class Shown:
    """An image on the page.

    Attributes:
      name: what it is called there.
      image: RGB.
      truth: its labels, or None.
      labels: predicted, at the image's own size.
      features: z at its points.
      similarities: eq. 1 at its points.
      regions: from `wrong_regions`.
    """

    name: str
    image: UInt8[np.ndarray, "H W 3"]
    truth: UInt8[np.ndarray, "H W"] | None
    labels: UInt8[np.ndarray, "H W"]
    features: Float[np.ndarray, "h w d"]
    similarities: Float[np.ndarray, "h w m"]
    regions: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class PrototypeCard:
    """A prototype on the page.

    Attributes:
      index, class_: its number for life and its class.
      image_id: the training image it comes from; None before projection.
      box: the patch in an image of `source_size`.
      patch: the patch with its surroundings, and `patch_box` where it lies in it.
      source: the training image; None if it is not with the run.
      share: of all points, those it wins; None if that was not counted.
      nearest: pictures of the nearest training patches, with their class and image.
    """

    index: int
    class_: int
    image_id: str | None
    box: list[int] | None
    source_size: tuple[int, int] | None
    patch: UInt8[np.ndarray, "h w 3"] | None
    patch_box: list[int] | None
    source: Path | None
    share: float | None
    nearest: list[tuple[UInt8[np.ndarray, "h w 3"], int, str]]


def write(
    out: Path,
    *,
    title: str,
    facts: Sequence[str],
    notes: Sequence[str],
    classes: LabelSet,
    vectors: Float[np.ndarray, "m d"],
    kernel: Float[np.ndarray, "m c"],
    similarity: str,
    cards: Sequence[PrototypeCard],
    images: Sequence[Shown],
) -> None:
    """Write the page's folder; one that is there is replaced when the new one is whole.

    Args:
      out: the folder.
      title: of the page.
      facts: short ones about the run, for the head of the page.
      notes: what a reader must know (not yet projected, data not at hand …).
      classes: names and colours.
      vectors: the prototypes.
      kernel: w_h.
      similarity: the model's, a key of `SIMILARITIES`.
      cards: the prototypes, in the order of `vectors`.
      images: what can be looked at.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        temporary.chmod(0o755)
        notes, shown = list(notes), []
        for number, image in enumerate(images):
            entry, numbers = _image(temporary, number, image)
            shown.append(entry)
            text = json.dumps(numbers, separators=(",", ":"))
            _write(temporary / "data" / f"{number:03d}.js", f"PROTOSEG.image({number},{text});\n")
            if numbers["step"] > 1:
                points, step = "×".join(map(str, numbers["points"])), numbers["step"]
                notes.append(
                    f"{points} points an image are too many for this page: it has one in {step} "
                    "in each direction, the layers show those, and the cursor moves from one to "
                    "the next. The numbers at them are exact."
                )
        record = {
            "title": title,
            "facts": list(facts),
            "notes": list(dict.fromkeys(notes)),
            "classes": list(classes.names),
            "colours": [_css(c) for c in classes.colours],
            "prototypeColours": [
                _css(c) for c in figures.prototype_colours([c.class_ for c in cards], classes)
            ],
            "viridis": [_css(c) for c in _viridis()],
            "void": VOID,
            "epsilon": EPSILON,
            "similarity": similarity,
            "kernel": _base64(kernel, "<f4"),
            "vectors": _base64(vectors, "<f4"),
            "prototypes": _cards(temporary, cards),
            "images": shown,
            "confusions": _confusions(images, classes),
        }
        text = json.dumps(record, separators=(",", ":"))
        _write(temporary / "data" / "run.js", f"PROTOSEG.run({text});\n")
        shutil.copyfile(_TEMPLATE, temporary / "index.html")
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def wrong_regions(
    labels: UInt8[np.ndarray, "H W"], truth: UInt8[np.ndarray, "H W"], classes: int
) -> list[dict[str, Any]]:
    """Connected regions of one true class that were taken for one other, largest first.

    Returns:
      {"truth", "label", "pixels", "box", "row", "col": the pixel furthest inside, "samples": rows
      and cols of some of its pixels, evenly chosen} of each.
    """
    found = []
    wrong = (truth != VOID) & (labels != truth)
    kinds = np.where(wrong, truth.astype(np.int32) * classes + labels, -1)
    for kind in np.unique(kinds[wrong]).tolist():
        count, marks, stats, _ = cv2.connectedComponentsWithStats((kinds == kind).astype(np.uint8))
        largest = 1 + np.argsort(-stats[1:count, cv2.CC_STAT_AREA], kind="stable")[:_REGIONS]
        for n in largest.tolist():
            left, top, width, height, area = stats[n].tolist()
            inside = marks[top : top + height, left : left + width] == n
            depth = cv2.distanceTransform(np.pad(inside, 1).astype(np.uint8), cv2.DIST_L2, 3)
            row, col = np.unravel_index(depth[1:-1, 1:-1].argmax(), inside.shape)
            rows, cols = np.nonzero(inside)
            chosen = np.linspace(0, len(rows) - 1, _REGION_SAMPLES).astype(int)
            found.append(
                {
                    "truth": kind // classes,
                    "label": kind % classes,
                    "pixels": area,
                    "box": [top, left, top + height, left + width],
                    "row": top + int(row),
                    "col": left + int(col),
                    "samples": (top + rows[chosen], left + cols[chosen]),
                }
            )
    return sorted(found, key=lambda r: -r["pixels"])


def causes(
    similarities: Float[np.ndarray, "n m"], kernel: Float[np.ndarray, "m c"], label: int, truth: int
) -> list[tuple[int, float]]:
    """Prototypes that argued most for a wrong class and against the true one.

    Returns:
      (position, mean contribution to the margin of `label` over `truth`), largest first.
    """
    margins = similarities.mean(0) * (kernel[:, label] - kernel[:, truth])
    return [(int(j), float(margins[j])) for j in np.argsort(-margins, kind="stable")[:_CAUSES]]


def _image(folder: Path, number: int, shown: Shown) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the page must know of an image at once, and its numbers."""
    height, width = shown.image.shape[:2]
    _jpeg(folder / "images" / f"{number:03d}.jpg", figures.shrink(shown.image, _IMAGE_SIDE), 88)
    few = shown.features.shape[-1] <= shown.similarities.shape[-1]
    values = shown.features if few else shown.similarities
    low, top = float(values.min()), float(values.max())
    scale = (top - low) / 65535 or 1.0
    form, step = _form(values.shape)
    grid = values[step // 2 :: step, step // 2 :: step]
    stored = grid if form == "<f4" else np.rint((grid - low) / scale)
    entry = {"name": shown.name, "size": [height, width]}
    numbers = {
        "points": list(values.shape[:2]),
        "grid": list(grid.shape[:2]),
        "step": step,
        "features": few,
        "low": low,
        "scale": scale,
        "bits": 8 * np.dtype(form).itemsize,
        "values": _base64(stored, form),
        "labels": _runs(shown.labels),
        "truth": None if shown.truth is None else _runs(shown.truth),
    }
    return entry, numbers


def _form(shape: tuple[int, int, int]) -> tuple[str, int]:
    """(dtype, step between the points kept) with which an image's numbers fit."""
    h, w, channels = shape
    if 4 * h * w * channels <= _IMAGE_BYTES:
        return "<f4", 1
    step = 1
    while 2 * -(-h // step) * -(-w // step) * channels > _IMAGE_BYTES:
        step += 1
    return "<u2", step


def _cards(folder: Path, cards: Sequence[PrototypeCard]) -> list[dict[str, Any]]:
    """The prototypes' records, and their pictures as files."""
    written: dict[Path, str] = {}
    records = []
    for card in cards:
        record: dict[str, Any] = {
            "id": card.index,
            "class": card.class_,
            "image": card.image_id,
            "share": card.share,
        }
        if card.patch is not None:
            _write(folder / "prototypes" / f"{card.index:03d}.png", encode_png(card.patch))
            record["patch"] = f"prototypes/{card.index:03d}.png"
            record["patchBox"] = _shares(card.patch_box, card.patch.shape[:2])
            record["patchSize"] = list(card.patch.shape[:2])
        if card.source is not None:
            if card.source not in written:
                image = cv2.cvtColor(cv2.imread(str(card.source)), cv2.COLOR_BGR2RGB)
                written[card.source] = f"sources/{len(written):03d}.jpg"
                _jpeg(folder / written[card.source], figures.shrink(image, _SOURCE_SIDE), 74)
            record["source"] = written[card.source]
            record["sourceBox"] = _shares(card.box, card.source_size)
            record["sourceSize"] = list(card.source_size)
        if card.nearest:
            side = (_NEAREST_SIDE, _NEAREST_SIDE)
            strip = [cv2.resize(p, side, interpolation=cv2.INTER_AREA) for p, *_ in card.nearest]
            _jpeg(folder / "nearest" / f"{card.index:03d}.jpg", np.concatenate(strip, 1), 82)
            record["nearest"] = [[c, image_id] for _, c, image_id in card.nearest]
        records.append(record)
    return records


def _confusions(images: Sequence[Shown], classes: LabelSet) -> list[dict[str, Any]]:
    """The kinds of mistake in the images, by pixels, with their largest regions."""
    count = len(classes)
    table = np.zeros((count, count), np.int64)
    for image in images:
        if image.truth is not None:
            valid = image.truth != VOID
            cells = image.truth[valid].astype(np.int64) * count + image.labels[valid]
            table += np.bincount(cells, minlength=count**2).reshape(count, count)
    wrong = table * (1 - np.eye(count, dtype=np.int64))
    found = []
    for cell in np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS].tolist():
        truth, label = divmod(cell, count)
        if not wrong[truth, label]:
            break
        regions = [
            {**{k: v for k, v in region.items() if k != "samples"}, "image": number}
            for number, image in enumerate(images)
            for region in image.regions
            if (region["truth"], region["label"]) == (truth, label)
        ]
        regions = sorted(regions, key=lambda r: -r["pixels"])[:_REGIONS]
        found.append(
            {
                "truth": truth,
                "label": label,
                "pixels": int(wrong[truth, label]),
                "of": int(table[truth].sum()),
                "regions": regions,
            }
        )
    return found


def _runs(labels: UInt8[np.ndarray, "H W"]) -> list[int]:
    """Run lengths in row-major order: value, count, value, count …"""
    flat = labels.ravel()
    ends = np.append(np.nonzero(np.diff(flat))[0], len(flat) - 1)
    return np.stack([flat[ends], np.diff(ends, prepend=-1)], 1).ravel().tolist()


def _shares(box: list[int], size: tuple[int, int]) -> list[float]:
    """A box as shares of an image's height and width."""
    return [round(x / size[n % 2], 5) for n, x in enumerate(box)]


def _viridis() -> Int[np.ndarray, "64 3"]:
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 1, 64))
    return np.rint(255 * colours[:, :3]).astype(int)


def _css(colour: Sequence[int]) -> str:
    return "#" + "".join(f"{int(c):02x}" for c in colour)


def _base64(values: np.ndarray, form: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, form).tobytes()).decode()


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _jpeg(path: Path, image: UInt8[np.ndarray, "h w 3"], quality: int) -> None:
    _write(path, figures.encode_jpeg(image, quality))
