"""For notebooks and programs: a trained run that segments images and says why.

    import protoseg_jax
    run = protoseg_jax.load("runs/demo")
    run.segment("street.png").labels                 # [H W], at the image's own size
    why = run.explain("street.png")
    pixel = why.at(40, 31)                           # contributions, margins: exact sums
    run.prototypes[pixel.contributions.argmax()].patch

Needs the run's folder alone, not its data set.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from protoseg_jax import inference as inferences
from protoseg_jax.data import builders
from protoseg_jax.data.builders.base import decode_image
from protoseg_jax.data.label_sets import LabelSet
from protoseg_jax.data.tiles import Tiled
from protoseg_jax.errors import UserError, reason
from protoseg_jax.evaluation import segmentation
from protoseg_jax.explain import evidence, figures
from protoseg_jax.training import phases
from protoseg_jax.workdir import Workdir

_CANVAS_STEP = 64  # images are upsampled onto canvases of such multiples: few are compiled
_MODES = ("1", "L", "P", "RGB")

ImageLike = "str | os.PathLike | np.ndarray | Image.Image"


@dataclasses.dataclass(frozen=True)
class Prototype:
    """A prototype of a run.

    Attributes:
      index: its number at initialisation, kept for life.
      class_: its class.
      image_id: the training image it comes from; None before projection, as all below.
      box: the patch in `source`, [top, left, bottom, right] of an image of `source_size`.
      source_size: (height, width) that the training image (or tile) had.
      patch: the patch with its surroundings, where the file is there.
      patch_box: the patch inside `patch`.
      source: file of the training image, perhaps smaller than it was; None if the run has none.
    """

    index: int
    class_: int
    image_id: str | None = None
    box: list[int] | None = None
    source_size: tuple[int, int] | None = None
    patch: UInt8[np.ndarray, "h w 3"] | None = None
    patch_box: list[int] | None = None
    source: Path | None = None


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """Labels and probabilities (softmax of the upsampled logits) at an image's own size."""

    labels: UInt8[np.ndarray, "H W"]
    probabilities: Float[np.ndarray, "H W c"]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of an image that the network saw at once: all of it, or one of a run's tiles.

    Attributes:
      corner: its top left pixel in the image.
      size: its (height, width) in the image.
      own: the image's pixels that are decided by it, [top, left, bottom, right].
      points: evidence at every point of its feature map, NumPy [h w …].
    """

    corner: tuple[int, int]
    size: tuple[int, int]
    own: tuple[int, int, int, int]
    points: evidence.PointEvidence


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why every pixel of an image got its label.

    Attributes:
      image: RGB.
      prototypes: those of the run; positions in this list number the maps below.
      kernel: w_h.
      parts: evidence at every point, one part unless the run works in tiles.
    """

    image: UInt8[np.ndarray, "H W 3"]
    prototypes: list[Prototype]
    kernel: Float[np.ndarray, "m c"]
    parts: list[Part]

    def at(self, row: int, col: int) -> evidence.PixelEvidence:
        """Evidence at one pixel: logits [c], similarities, contributions and margins [m].

        Raises:
          UserError: the pixel is outside the image.
        """
        height, width = self.image.shape[:2]
        if not (0 <= row < height and 0 <= col < width):
            raise UserError(
                f"pixel ({row}, {col}) is outside the image of {height}×{width}; rows and columns "
                "count from 0"
            )
        return jax.tree.map(lambda x: x[0], self.at_pixels(np.array([row]), np.array([col])))

    def at_pixels(
        self, rows: Int[np.ndarray, " n"], cols: Int[np.ndarray, " n"]
    ) -> evidence.PixelEvidence:
        """Evidence at n pixels, all of the part that decides the first one."""
        part = next(p for p in self.parts if _inside(p.own, rows[0], cols[0]))
        return explain_pixels_of(part, self.kernel, rows - part.corner[0], cols - part.corner[1])

    @functools.cached_property
    def segmentation(self) -> Segmentation:
        """What `Model.segment` says of the image, without running the network again."""
        parts = ((p.corner, p.own, p.size, p.points.logits[None]) for p in self.parts)
        return _assemble(self.image.shape[:2], self.kernel.shape[1], parts)

    @property
    def winning_prototype(self) -> Int[np.ndarray, "H W"]:
        """Position of the prototype that wins the point in whose cell each pixel lies."""
        return self._cells("prototype")

    @property
    def novelty(self) -> Float[np.ndarray, "H W"]:
        """Squared distance to the nearest prototype of the point in whose cell each pixel lies."""
        return self._cells("novelty")

    @property
    def similarities(self) -> Float[np.ndarray, "h w m"]:
        """Eq. 1 at every point; of tiles, at the point in whose cell each pixel lies [H W m]."""
        if len(self.parts) == 1:
            return self.parts[0].points.similarities
        return self._cells("similarities")

    def _cells(self, name: str) -> np.ndarray:
        whole = None
        for part in self.parts:
            points = getattr(part.points, name)
            rows, cols = (
                (np.arange(part.own[a], part.own[a + 2]) - part.corner[a]) * n // part.size[a]
                for a, n in enumerate(points.shape[:2])
            )
            if whole is None:
                whole = np.zeros((*self.image.shape[:2], *points.shape[2:]), points.dtype)
            top, left, bottom, right = part.own
            whole[top:bottom, left:right] = points[rows[:, None], cols]
        return whole


_explain_pixels = jax.jit(evidence.explain_pixels)


def explain_pixels_of(
    part: Part,
    kernel: Float[np.ndarray, "m c"],
    rows: Int[np.ndarray, " n"],
    cols: Int[np.ndarray, " n"],
) -> evidence.PixelEvidence:
    """Evidence at pixels of a part, counted from its own corner, as NumPy arrays."""
    points = part.points
    found = _explain_pixels(
        points.similarities, points.logits, kernel, np.array(part.size), rows, cols
    )
    return jax.tree.map(np.asarray, found)


class Model:
    """A finished phase of a run.

    Attributes:
      phase: its name.
      classes: names and colours.
      kernel: w_h [m c]; None for the black box.
      prototypes: in the order of the model's M; empty for the black box.
      projected: whether the prototypes are patches of training images yet.
    """

    def __init__(self, workdir: Workdir, phase: str | None = None):
        config = workdir.config()
        self.workdir = workdir
        finished = workdir.finished([p.name for p in phases.from_config(config)], phase)
        self.phase = phase or finished[-1]
        self.checkpoint = workdir.restore(self.phase)
        self.config = config
        self.classes = _classes(workdir)
        params = self.checkpoint.arrays["params"]
        black_box = config.model.head == "linear"
        self.kernel = None if black_box else np.asarray(params["head"]["kernel"])
        self.inference = inferences.from_config(
            config, len(self.classes), len(self.checkpoint.prototypes)
        )
        self._variables = self.checkpoint.variables
        self.projected = not black_box and "image_id" in self.checkpoint.prototypes[0]
        self.prototypes = _prototypes(workdir, self.checkpoint.prototypes)
        self._infer = jax.jit(lambda v, image: self.inference(v, image[None]))
        self._points = jax.jit(lambda v, image: self._explain_points(v, image))

    def _explain_points(self, variables, image):
        output = self.inference(variables, image[None])
        found = evidence.explain_points(output, variables["params"]["head"]["kernel"])
        return jax.tree.map(lambda x: x[0], found)

    def segment(self, image: ImageLike) -> Segmentation:
        """Labels and probabilities of an image of any size.

        Args:
          image: a path, a PIL image, or uint8 [h w 3] RGB or [h w] grey.

        Raises:
          UserError: the image does not decode or is neither RGB nor grey.
        """
        image = read(image)
        parts = (
            (corner, own, cut.shape[:2], self._infer(self._variables, self.inference.prepare(cut)))
            for corner, own, cut in self.cuts(image)
        )
        logits = ((corner, own, size, output.logits) for corner, own, size, output in parts)
        return _assemble(image.shape[:2], len(self.classes), logits)

    def explain(self, image: ImageLike) -> Explanation:
        """Why each pixel of an image of any size gets its label.

        Args:
          image: see `segment`.

        Raises:
          UserError: as `segment`; or the run is the black box, which has nothing to explain by.
        """
        self.require_prototypes()
        image = read(image)
        parts = []
        for corner, own, cut in self.cuts(image):
            points = self._points(self._variables, self.inference.prepare(cut))
            parts.append(Part(corner, cut.shape[:2], own, jax.tree.map(np.asarray, points)))
        return Explanation(image, self.prototypes, self.kernel, parts)

    def require_prototypes(self) -> None:
        """Refuse the black box.

        Raises:
          UserError: the run is one.
        """
        if self.kernel is None:
            raise UserError(
                f"run {str(self.workdir.path)!r} is the black box (model.head='linear'): it has no "
                "prototypes to explain by; name a run with model.head='prototypes'"
            )

    def cuts(self, image: np.ndarray):
        """(corner, own part, pixels) of what the network sees: the image, or its tiles."""
        overlap = self.config.get("eval_overlap")
        if overlap is None:
            yield (0, 0), (0, 0, *image.shape[:2]), image
            return
        example = {"image_id": "image", "image": image, "label": np.zeros(image.shape[:2], "u1")}
        tiles = Tiled([example], self.inference.eval_size, overlap)
        for number, place in enumerate(tiles.places):
            yield place.corner, place.own, tiles[number]["image"]


def load(workdir: str | os.PathLike, phase: str | None = None) -> Model:
    """A run's last finished phase, or a named one, ready to segment and explain.

    Args:
      workdir: the folder that train.py wrote.
      phase: a finished phase.

    Raises:
      UserError: no run there, or the phase is not finished.
    """
    return Model(Workdir.existing(workdir), phase)


def read(image: ImageLike) -> UInt8[np.ndarray, "h w 3"]:
    """An image as RGB bytes.

    Raises:
      UserError: it does not exist, does not decode, or is neither RGB nor grey with 8 bits.
    """
    if isinstance(image, np.ndarray):
        shape = image.shape
        grey = image.ndim == 2 or (image.ndim == 3 and shape[2] == 1)
        if image.dtype != np.uint8 or not (grey or (image.ndim == 3 and shape[2] == 3)):
            raise UserError(
                f"an image array is {image.dtype} {list(shape)}; give uint8 [h, w, 3] RGB or "
                "[h, w] grey"
            )
        image = image.reshape(*shape[:2], 1) if grey else image
        return np.broadcast_to(image, (*shape[:2], 3)).copy()
    if isinstance(image, Image.Image):
        _check_mode(image, "the image")
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    try:
        with Image.open(image) as opened:
            _check_mode(opened, image)
        return decode_image(Path(image).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"image {image} does not exist; check the path") from error
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise UserError(f"image {image} does not decode ({reason(error)}); replace it") from error


def _check_mode(image: Image.Image, name: Any) -> None:
    if image.mode not in _MODES:
        raise UserError(
            f"image {name} is {image.mode}, neither RGB nor grey with 8 bits; convert it"
        )


def _inside(box: tuple[int, int, int, int], row: int, col: int) -> bool:
    top, left, bottom, right = box
    return top <= row < bottom and left <= col < right


def _segment_canvas(logits, size, canvas):
    full = segmentation.upsample(logits, size[None], canvas)[0]
    return full.argmax(-1).astype(jnp.uint8), jax.nn.softmax(full)


_segment = jax.jit(_segment_canvas, static_argnums=2)


def _assemble(
    shape: tuple[int, int], num_classes: int, parts: Iterable[tuple[Any, Any, Any, Any]]
) -> Segmentation:
    """Parts' (corner, own part, size, logits [1 h w c]) → the whole image's segmentation."""
    labels = np.zeros(shape, np.uint8)
    probabilities = np.zeros((*shape, num_classes), np.float32)
    for (y, x), (top, left, bottom, right), size, logits in parts:
        canvas = tuple(-(-n // _CANVAS_STEP) * _CANVAS_STEP for n in size)
        found = _segment(logits, np.array(size), canvas)
        inner = slice(top - y, bottom - y), slice(left - x, right - x)
        labels[top:bottom, left:right] = np.asarray(found[0])[inner]
        probabilities[top:bottom, left:right] = np.asarray(found[1])[inner]
    return Segmentation(labels, probabilities)


def _classes(workdir: Workdir) -> LabelSet:
    """The run's classes; of a run that kept none, those of its data set."""
    path = workdir.path / "classes.json"
    if not path.exists():
        return builders.from_config(workdir.config()).label_set
    record = json.loads(path.read_text())
    return LabelSet(tuple(record["names"]), tuple(map(tuple, record["colours"])))


def _prototypes(workdir: Workdir, found: list[dict[str, Any]]) -> list[Prototype]:
    """A checkpoint's prototypes with the pictures that travel with the run."""
    path = workdir.path / "prototypes.json"
    entries = json.loads(path.read_text())["prototypes"] if path.exists() else []
    sources = {e["index"]: e.get("source") for e in entries}
    prototypes = []
    for entry in found:
        prototype = Prototype(entry["index"], entry["class"])
        if "image_id" in entry:
            box, home = entry["box"], sources.get(entry["index"])
            file = workdir.path / "prototypes" / "sources" / home["file"] if home else None
            crop = workdir.path / "prototypes" / f"{entry['index']:03d}.png"
            prototype = dataclasses.replace(
                prototype,
                image_id=entry["image_id"],
                box=box,
                source_size=tuple(home["size"]) if home else None,
                patch=read(crop) if crop.exists() else None,
                patch_box=figures.inner_box(box, home["size"]) if home else None,
                source=file if file and file.exists() else None,
            )
        prototypes.append(prototype)
    return prototypes
