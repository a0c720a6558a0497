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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from protoseg_jax import decoding
from protoseg_jax.data import tiles
from protoseg_jax.data.labels import LabelSet
from protoseg_jax.data.reading import Reading
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation import segmentation
from protoseg_jax.explain import evidence
from protoseg_jax.inference import Inference
from protoseg_jax.models.protoseg import Output
from protoseg_jax.run.finished import Finished
from protoseg_jax.run.prototypes import Prototype

_PICTURES = 10  # of a split, for the page and the figures


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """Labels and probabilities (softmax of the upsampled logits) at an image's own size."""

    labels: UInt8[np.ndarray, "H W"]
    probabilities: Float[np.ndarray, "H W c"]


Piece = tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], Float[Array, "h w c"]]
"""(corner, own, size, logits at the feature map's resolution) of a `Part`."""


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

    def at_pixels(
        self,
        kernel: Float[np.ndarray, "m c"],
        rows: Int[np.ndarray, " n"],
        cols: Int[np.ndarray, " n"],
    ) -> evidence.PixelEvidence:
        """Evidence at pixels counted from its own corner, as NumPy arrays; `kernel` is w_h."""
        found = _explain_pixels(
            self.points.similarities, self.points.logits, kernel, np.array(self.size), rows, cols
        )
        return jax.tree.map(np.asarray, found)


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
        part = next(
            p for p in self.parts if p.own[0] <= row < p.own[2] and p.own[1] <= col < p.own[3]
        )
        place = np.array([row - part.corner[0]]), np.array([col - part.corner[1]])
        return jax.tree.map(lambda x: x[0], part.at_pixels(self.kernel, *place))

    @functools.cached_property
    def segmentation(self) -> Segmentation:
        """What `Model.segment` says of the image, without running the network again."""
        return _segmentation(self.image.shape[:2], self.kernel.shape[1], self.parts)

    @property
    def winning_prototype(self) -> Int[np.ndarray, "H W"]:
        """Position of the prototype that wins the point in whose cell each pixel lies."""
        return self._cells("prototype")

    @property
    def novelty(self) -> Float[np.ndarray, "H W"]:
        """Squared distance to the nearest prototype of the point in whose cell each pixel lies.

        Raises:
          UserError: directions explain this, which have no distances.
        """
        if self.prototypes[-1].class_ < 0:
            raise UserError("directions have no distances, so nothing is known of novelty")
        return self._cells("novelty")

    @property
    def similarities(self) -> Float[np.ndarray, "h w m"]:
        """Eq. 1 at every point; of tiles, at the point in whose cell each pixel lies [H W m]."""
        if len(self.parts) == 1:
            return self.parts[0].points.similarities
        return self._cells("similarities")

    def _cells(self, name: str) -> np.ndarray:
        """One of the points' maps, each pixel with the value of its part's point."""
        maps = [getattr(part.points, name) for part in self.parts]
        whole = np.zeros((*self.image.shape[:2], *maps[0].shape[2:]), maps[0].dtype)
        for part, points in zip(self.parts, maps, strict=True):
            rows, cols = (
                (np.arange(part.own[a], part.own[a + 2]) - part.corner[a]) * n // part.size[a]
                for a, n in enumerate(points.shape[:2])
            )
            top, left, bottom, right = part.own
            whole[top:bottom, left:right] = points[rows[:, None], cols]
        return whole


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image with its name and, if it has any, its labels.

    Attributes:
      name: of the image.
      image: RGB.
      truth: classes, or None.
      parts: labels of parts, 0 for none, or None.
      part_names: their names, "no part" first.
    """

    name: str
    image: UInt8[np.ndarray, "H W 3"]
    truth: UInt8[np.ndarray, "H W"] | None
    parts: UInt8[np.ndarray, "H W"] | None = None
    part_names: tuple[str, ...] = ()


class Model(Finished):
    """A finished phase of a run that segments images and says why (see `Finished`).

    Attributes:
      classes: names and colours.
    """

    @property
    def classes(self) -> LabelSet:
        return self.experiment.labels

    def segment(self, image: decoding.ImageLike) -> Segmentation:
        """Labels and probabilities of an image of any size.

        Args:
          image: a path, a PIL image, or uint8 [h w 3] RGB or [h w] grey; uint16 where the run has
            `data.white`.

        Raises:
          UserError: the image does not decode or is neither RGB nor grey with so many bits.
        """
        image = self._read(image)
        return _segmentation(image.shape[:2], len(self.classes), self._parts(infer, image))

    def explain(self, image: decoding.ImageLike) -> Explanation:
        """Why each pixel of an image of any size gets its label.

        Args:
          image: see `segment`.

        Raises:
          UserError: as `segment`; or the run is the black box, which has nothing to explain by.
        """
        self.require_prototypes()
        image = self._read(image)
        parts = [
            dataclasses.replace(part, points=jax.tree.map(np.asarray, part.points))
            for part in self._parts(_explain_points, image)
        ]
        return Explanation(image, self.prototypes, self.kernel, parts)

    def pictures(self, split: str, paths: Sequence[str] = ()) -> list[Picture]:
        """The images at some paths; without any, some of a split's, evenly chosen.

        Raises:
          UserError: one cannot be read, or there is no such data or split.
        """
        if paths:
            return [Picture(Path(path).stem, self._read(path), None) for path in paths]
        data = self.experiment.data
        source, labelled = data.source(split), data.labelled(split)
        chosen = np.unique(np.linspace(0, len(source) - 1, _PICTURES).astype(int)).tolist()
        found = [source[n] for n in chosen]
        return [
            Picture(
                example["image_id"],
                example["image"],
                example["label"] if labelled else None,
                example["parts"] if data.part_names else None,
                data.part_names,
            )
            for example in found
        ]

    def _read(self, image: decoding.ImageLike) -> UInt8[np.ndarray, "H W 3"]:
        return Reading.of(self.experiment.config).picture(image)

    def _parts(self, look: Callable, image: UInt8[np.ndarray, "H W 3"]) -> Iterator[Part]:
        """What `look` finds in each part of an image that the network sees at once."""
        overlap = self.experiment.config.eval_overlap
        for corner, own, cut in tiles.cuts(image, self.inference.eval_size, overlap):
            points = look(self.inference, self.checkpoint.variables, self.inference.prepare(cut))
            yield Part(corner, cut.shape[:2], own, points)


load = Model.load  # protoseg_jax.load


@functools.partial(jax.jit, static_argnums=0)
def infer(inference: Inference, variables, image) -> Output:
    """What the network says of one image: an `Output` without the batch's axis."""
    return jax.tree.map(lambda x: x[0], inference(variables, image[None]))


@functools.partial(jax.jit, static_argnums=0)
def _explain_points(inference, variables, image) -> evidence.PointEvidence:
    output = inference(variables, image[None])
    found = evidence.explain_points(output, variables["params"]["head"]["kernel"])
    return jax.tree.map(lambda x: x[0], found)


_explain_pixels = jax.jit(evidence.explain_pixels)


def assemble(
    shape: tuple[int, int], pieces: Iterable[Piece], probabilities: np.ndarray | None = None
) -> UInt8[np.ndarray, "H W"]:
    """The labels of an image of a (height, width) from what the network said of its pieces, and its
    probabilities into an array [H W c], if there is one."""
    labels = np.zeros(shape, np.uint8)
    for (y, x), (top, left, bottom, right), size, logits in pieces:
        inner = slice(left - x, right - x)
        wanted = probabilities is not None
        for rows, found, shares in segmentation.strips(logits, size, shares=wanted):
            first, last = max(top, y + rows.start), min(bottom, y + rows.stop)
            if first < last:
                here = slice(first - y - rows.start, last - y - rows.start), inner
                labels[first:last, left:right] = found[here]
                if wanted:
                    probabilities[first:last, left:right] = shares[here]
    return labels


def _segmentation(shape: tuple[int, int], num_classes: int, parts: Iterable[Part]) -> Segmentation:
    probabilities = np.zeros((*shape, num_classes), np.float32)
    pieces = ((part.corner, part.own, part.size, part.points.logits) for part in parts)
    return Segmentation(assemble(shape, pieces, probabilities), probabilities)
