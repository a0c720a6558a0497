"""The paper's figures and one of ours, as SVG: graphs are vectors, pictures are embedded.

| figure | shows |
| --- | --- |
| fig2 | activation maps of a class's prototypes (columns) over several images (rows) |
| fig5 | points assigned to each prototype, by class |
| fig6 | activation maps of a class's prototypes (rows) in one image, runs side by side |
| fig7 | image, segmentation, truth |
| fig8 | image, segmentation, winning prototypes of a class in their colours, and their patches |
| parts | image, its true parts, and the parts that the winning prototypes of a class stand for |

Each activation map is on its own scale from its lowest to its highest similarity, in viridis;
colours are Okabe and Ito's where they are ours to choose. `parts` wants part labels.
"""

import dataclasses
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.figure import Figure

from protoseg_jax import models
from protoseg_jax.data.labels import LabelSet, palette
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation import part_agreement
from protoseg_jax.explain.evidence import point_counts
from protoseg_jax.explain.model import Model, Picture
from protoseg_jax.files import write_atomically
from protoseg_jax.images import file_name, resize_image, resize_labels, shrink
from protoseg_jax.prototypes.pictures import outline
from protoseg_jax.run.prototypes import Prototype

_PROTOTYPES = 4  # of a class, in figures 2, 6 and 8
_ROWS = 3  # images in figures 2 and 7, and in figure 8
_SIDE = 400  # pixels of an embedded picture's longer side
_COLOURS = palette(8)[1:5]
_NO_PART = (128, 128, 128)


@dataclasses.dataclass(frozen=True)
class Seen:
    """An image as one run sees it.

    Attributes:
      labels: predicted, at the image's size.
      similarities: eq. 1 at the points.
      winners: position of the prototype that wins the point of each pixel, at the image's size.
    """

    labels: UInt8[np.ndarray, "H W"]
    similarities: Float[np.ndarray, "h w m"]
    winners: Int[np.ndarray, "H W"]


@dataclasses.dataclass(frozen=True)
class Side:
    """A run in a figure.

    Attributes:
      name: the run's.
      kind: "prototype" or "direction".
      prototypes: the run's.
      counts: points of its class that each prototype is the most similar one to (Fig. 5).
      standing: each prototype's part, its share of the points won and its area, by
        `part_agreement.standing_for`; empty unless "parts" is drawn.
      seen: each image.
      mark: what tells its prototypes from another run's.
    """

    name: str
    kind: str
    prototypes: list[Prototype]
    counts: Int[np.ndarray, " m"]
    standing: list[tuple[str, float, float] | None]
    seen: list[Seen]
    mark: str

    def most_used(self, c: int) -> list[int]:
        """Positions of a class's prototypes, from the most to the least used."""
        own = [j for j, p in enumerate(self.prototypes) if p.class_ == c]
        return sorted(own, key=lambda j: -self.counts[j])

    def title(self, j: int) -> str:
        return f"{self.kind} {self.prototypes[j].index}{self.mark}"


Drawn = Iterator[tuple[str, Figure, str | None]]
"""(name of the file, figure, title) of each."""


def draw_figures(
    workdir: str,
    split: str,
    paths: Sequence[str],
    out: str | None,
    names: Sequence[str],
    compare: str | None,
) -> list[Path]:
    """Draw some of the paper's figures, a second run beside the first if one is named.

    Args:
      workdir, split, paths: as of `page.explain_run`.
      out: folder of the figures; None for DIR/figures.
      names: keys of `FIGURES`.
      compare: a second run's folder, of the same classes.

    Raises:
      UserError: as `page.explain_run`; or a figure is unknown, the runs' classes differ, or parts
        are asked for of images without part labels.
    """
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise UserError(f"figure {', '.join(unknown)} is unknown; there are {', '.join(FIGURES)}")
    runs = [Model.load(path) for path in (workdir, compare) if path]
    for model in runs:
        model.require_prototypes()
    if runs[0].classes.names != runs[-1].classes.names:
        raise UserError(f"runs {workdir} and {compare} have different classes; compare like runs")
    pictures = runs[0].pictures(split, paths)
    of_parts = "parts" in names
    if of_parts and any(picture.parts is None for picture in pictures):
        whose = "images of one's own" if paths else runs[0].experiment.config.data.name
        raise UserError(f"{whose} have no part labels; leave parts out of --figures")
    if of_parts and len({model.experiment.data.part_names for model in runs}) > 1:
        raise UserError(f"runs {workdir} and {compare} have different parts; compare like runs")
    titles = [model.workdir.path.name for model in runs]
    if compare and titles[0] == titles[1]:
        titles[1] += " (2)"
    sides = []
    for model, name in zip(runs, titles, strict=True):
        found = (model.explain(picture.image) for picture in pictures)
        counted = point_counts(model, split, (part_agreement,) if of_parts else ())
        counts, standing = counted["used"], []
        if of_parts:
            standing = part_agreement.standing_for(counted["part_agreement"], len(counts))
        seen = [Seen(x.segmentation.labels, x.similarities, x.winning_prototype) for x in found]
        kind = models.kind(model.experiment.config.model)
        mark = f", {name}" if compare else ""
        sides.append(Side(name, kind, model.prototypes, counts, standing, seen, mark))
    target = Path(out) if out else runs[0].workdir.path / "figures"
    drawn = (FIGURES[name](pictures, sides, runs[0].classes) for name in dict.fromkeys(names))
    written = []
    for stem, figure, title in itertools.chain.from_iterable(drawn):
        if title:
            figure.suptitle(title, fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None})
        plt.close(figure)
        written.append(target / f"{stem}.svg")
        write_atomically(written[-1], buffer.getvalue())
    return written


def fig2(pictures: Sequence[Picture], sides: Sequence[Side], classes: LabelSet) -> Drawn:
    """A file a class: its prototypes' activations over the images that hold most of it."""
    for c, name in enumerate(classes.names):
        rows = [n for n, area in _areas(pictures, sides[0], c)[:_ROWS] if area]
        columns = [(side, j) for side in sides for j in side.most_used(c)[:_PROTOTYPES]]
        if not rows or not columns:
            continue
        figure, axes = _grid(len(rows), 1 + len(columns), pictures[rows[0]].image)
        for y, n in enumerate(rows):
            _show(axes[y, 0], pictures[n].image, "" if y else "image")
            for axis, (side, j) in zip(axes[y, 1:], columns, strict=True):
                _heat(axis, pictures[n].image, side, n, j, "" if y else side.title(j))
        yield f"fig2_{file_name(name)}", figure, f"{name}: activation of its {sides[0].kind}s"


def fig5(pictures: Sequence[Picture], sides: Sequence[Side], classes: LabelSet) -> Drawn:
    """One file: for each class a histogram, prototypes from the most to the least used."""
    del pictures
    columns = min(len(classes), 6)
    rows = -(-len(classes) // columns) * len(sides)
    figure, axes = _axes(rows, columns, (1.9 * columns + 0.5, 1.5 * rows + 0.6))
    for axis in axes.flat:
        axis.set_visible(False)
    for r, side in enumerate(sides):
        for c, name in enumerate(classes.names):
            axis, order = axes[(c // columns) * len(sides) + r, c % columns], side.most_used(c)
            axis.set_visible(True)
            shares = side.counts[order] / max(side.counts[order].sum(), 1)
            axis.bar(range(len(order)), shares, color=_unit(_COLOURS[r]))
            ids = [str(side.prototypes[j].index) for j in order]
            axis.set_xticks(range(len(order)), ids, fontsize=6)
            axis.set_ylim(0, 1)
            axis.tick_params(axis="y", labelsize=6)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(name + side.mark, fontsize=8)
    figure.supxlabel(sides[0].kind, fontsize=9)
    figure.supylabel("share of the class's points", fontsize=9)
    yield "fig5", figure, None


def fig6(pictures: Sequence[Picture], sides: Sequence[Side], classes: LabelSet) -> Drawn:
    """A file a class: four prototypes (rows) of each run (columns) over one image."""
    for c, name in enumerate(classes.names):
        n, area = _areas(pictures, sides[0], c)[0]
        columns = [side.most_used(c)[:_PROTOTYPES] for side in sides]
        rows = max(map(len, columns))
        if not area or not rows:
            continue
        figure, axes = _grid(rows, len(sides), pictures[n].image)
        for x, (side, column) in enumerate(zip(sides, columns, strict=True)):
            for y, j in enumerate(column):
                _heat(axes[y, x], pictures[n].image, side, n, j, side.title(j))
        yield f"fig6_{file_name(name)}", figure, f"{name}, {pictures[n].name}"


def fig7(pictures: Sequence[Picture], sides: Sequence[Side], classes: LabelSet) -> Drawn:
    """One file: images, segmentations and truth; void is black."""
    chosen = pictures[:_ROWS]
    figure, axes = _grid(len(chosen), 2 + len(sides), chosen[0].image)
    for y, picture in enumerate(chosen):
        _show(axes[y, 0], picture.image, "" if y else "image")
        maps = [(x.name if x.mark else "segmentation", x.seen[y].labels) for x in sides]
        if picture.truth is not None:
            maps.append(("truth", picture.truth))
        for axis, (title, labels) in zip(axes[y, 1:], maps, strict=False):
            _show(axis, classes.paint(labels), "" if y else title, labels=True)
    present = {c for side in sides for seen in side.seen[:_ROWS] for c in np.unique(seen.labels)}
    _legend(figure, {classes.names[c]: classes.colours[c] for c in sorted(present)})
    yield "fig7", figure, None


def fig8(pictures: Sequence[Picture], sides: Sequence[Side], classes: LabelSet) -> Drawn:
    """A file an image and run: segmentation, and where each of a class's prototypes wins."""
    for side in sides:
        owners = np.array([p.class_ for p in side.prototypes])
        for picture, seen in zip(pictures[:_ROWS], side.seen, strict=False):
            # The second largest class, the largest being mostly ground; or the only one.
            pixels = np.bincount(seen.labels.ravel(), minlength=len(classes))
            c, *rest = np.argsort(-pixels, kind="stable").tolist()
            c = rest[0] if rest and pixels[rest[0]] else c
            own = (owners[seen.winners] == c) & (seen.labels == c)
            winners = np.where(own, seen.winners, -1)
            won = np.bincount(winners[own], minlength=len(owners))
            best = [j for j in np.argsort(-won, kind="stable")[:_PROTOTYPES].tolist() if won[j]]
            coloured = _grey(picture.image)
            for j, colour in zip(best, _COLOURS, strict=False):
                _tint(coloured, winners == j, colour)
            figure, axes = _grid(1, 3 + len(best), picture.image)
            _show(axes[0, 0], picture.image, "image")
            _show(axes[0, 1], classes.paint(seen.labels), "segmentation", labels=True)
            title = f"{side.kind}s of {classes.names[c]}"
            _show(axes[0, 2], coloured, title, labels=True)
            for axis, j, colour in zip(axes[0, 3:], best, _COLOURS, strict=False):
                _patch(axis, side.kind, side.prototypes[j], colour)
            suffix = f"_{file_name(side.name)}" if side.mark else ""
            yield f"fig8_{file_name(picture.name)}{suffix}", figure, None


def parts(pictures: Sequence[Picture], sides: Sequence[Side], classes: LabelSet) -> Drawn:
    """A file a class: true parts, and beside them each pixel of the class in the colour of the part
    that its winning prototype stands for, darker for a part's second prototype; grey for none, and
    for one that none of the images shows."""
    names = pictures[0].part_names
    for c, name in enumerate(classes.names):
        rows = [n for n, area in _areas(pictures, sides[0], c)[:_ROWS] if area]
        found = [np.unique(pictures[n].parts[pictures[n].truth == c]) for n in rows]
        present = sorted({int(k) for row in found for k in row} - {0})
        if not present:
            continue
        colours = dict(zip(present, palette(1 + len(present))[1:], strict=True))
        figure, axes = _grid(len(rows), 2 + len(sides), pictures[rows[0]].image)
        for y, n in enumerate(rows):
            picture, grey = pictures[n], _grey(pictures[n].image)
            truth = grey.copy()
            for k, colour in colours.items():
                _tint(truth, (picture.parts == k) & (picture.truth == c), colour)
            _show(axes[y, 0], picture.image, "" if y else "image")
            _show(axes[y, 1], truth, "" if y else "true parts", labels=True)
            for axis, side in zip(axes[y, 2:], sides, strict=True):
                shown = grey.copy()
                for j in side.most_used(c):
                    own = (side.seen[n].winners == j) & (side.seen[n].labels == c)
                    _tint(shown, own, _part_colour(side, j, names, colours))
                _show(axis, shown, "" if y else side.name, labels=True)
        _legend(figure, {names[k]: colour for k, colour in colours.items()})
        yield f"parts_{file_name(name)}", figure, f"{name}: what its {sides[0].kind}s stand for"


FIGURES = {"fig2": fig2, "fig5": fig5, "fig6": fig6, "fig7": fig7, "fig8": fig8, "parts": parts}


def _part_colour(
    side: Side, j: int, names: Sequence[str], colours: dict[int, tuple[int, int, int]]
) -> tuple[float, ...]:
    """The colour of the part that prototype j stands for; grey where it stands for none.

    Of several that stand for one part the most used has the part's colour, the next a darker one.
    """
    part, class_ = side.standing[j], side.prototypes[j].class_
    if part is None or names.index(part[0]) not in colours:
        return _NO_PART
    same = part_agreement.that_stand_for(part[0], side.standing)
    same = [i for i in side.most_used(class_) if i in same]
    return tuple(0.8 ** same.index(j) * x for x in colours[names.index(part[0])])


def _areas(pictures: Sequence[Picture], side: Side, c: int) -> list[tuple[int, int]]:
    """(image, pixels of class c: true ones, where an image is labelled), most first."""
    maps = [
        seen.labels if picture.truth is None else picture.truth
        for picture, seen in zip(pictures, side.seen, strict=True)
    ]
    return sorted(((n, int((m == c).sum())) for n, m in enumerate(maps)), key=lambda x: -x[1])


def _axes(rows: int, columns: int, size: tuple[float, float]):
    """A figure of a (width, height) in inches, and its axes [rows columns]."""
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def _grid(rows: int, columns: int, image: np.ndarray):
    """A figure for pictures as large as `image`, and its axes."""
    aspect = image.shape[0] / image.shape[1]
    figure, axes = _axes(rows, columns, (1.9 * columns, 1.9 * aspect * rows + 0.45))
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def _legend(figure: Figure, named: dict[str, tuple[int, int, int]]) -> None:
    handles = [plt.Rectangle((0, 0), 1, 1, fc=_unit(colour)) for colour in named.values()]
    place = {"loc": "outside lower center", "ncols": 6, "fontsize": 7, "frameon": False}
    figure.legend(handles, list(named), **place)


def _show(axis, image: UInt8[np.ndarray, "H W 3"], title: str, *, labels: bool = False) -> None:
    """A picture; label maps are made smaller without mixing colours."""
    small = shrink(image, _SIDE)
    if labels:
        small = resize_labels(image, small.shape[:2])
    axis.imshow(small, interpolation="nearest" if labels else None)
    axis.set_title(title, fontsize=7)


def _grey(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _tint(image: UInt8[np.ndarray, "H W 3"], where: Bool[np.ndarray, "H W"], colour) -> None:
    """Lay a colour over some pixels, in place."""
    image[where] = (0.35 * image[where] + 0.65 * np.array(colour)).astype(np.uint8)


def _heat(axis, image, side: Side, n: int, j: int, title: str) -> None:
    """Where prototype j fires in image n, over the image."""
    grey = cv2.cvtColor(shrink(image, _SIDE), cv2.COLOR_RGB2GRAY)
    heat = side.seen[n].similarities[..., j].astype(np.float32)
    axis.imshow(grey, cmap="gray")
    axis.imshow(resize_image(heat, grey.shape), cmap="viridis", alpha=0.65)
    axis.set_title(title, fontsize=7)


def _patch(axis, kind: str, prototype: Prototype, colour: tuple[int, int, int]) -> None:
    """A prototype's patch in a frame of a colour."""
    axis.axis("on")
    axis.set(xticks=[], yticks=[])
    axis.set_title(f"{kind} {prototype.index}", fontsize=7)
    for spine in axis.spines.values():
        spine.set(color=_unit(colour), linewidth=4)
    picture = prototype.patch
    if picture is None:
        axis.text(0.5, 0.5, "not a patch yet", ha="center", transform=axis.transAxes, fontsize=7)
        return
    top, left, bottom, right = prototype.patch_box
    axis.imshow(picture)
    axis.add_patch(outline(prototype.patch_box))
    # As large as the others' where an image ends near the patch.
    (y, x), (height, width) = ((top + bottom) / 2, (left + right) / 2), picture.shape[:2]
    half = max(y, x, height - y, width - x)
    axis.set(xlim=(x - half - 0.5, x + half - 0.5), ylim=(y + half - 0.5, y - half - 0.5))
    axis.set_facecolor("0.9")


def _unit(colour: Sequence[int]) -> tuple[float, ...]:
    return tuple(x / 255 for x in colour)
