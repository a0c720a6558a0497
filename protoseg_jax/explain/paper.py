"""The paper's figures, as SVG: graphs are vectors, pictures are embedded.

| figure | shows |
| --- | --- |
| fig2 | activation maps of a class's prototypes (columns) over several images (rows) |
| fig5 | points assigned to each prototype, by class |
| fig6 | activation maps of a class's prototypes (rows) in one image, runs side by side |
| fig7 | image, segmentation, truth |
| fig8 | image, segmentation, winning prototypes of a class in their colours, and their patches |

Each activation map is on its own scale from its lowest to its highest similarity, in viridis;
colours are Okabe and Ito's where they are ours to choose.
"""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, Int, UInt8

from protoseg_jax.data.label_sets import VOID, LabelSet, palette
from protoseg_jax.explain.figures import file_name, outline, shrink
from protoseg_jax.workdir import write_atomically

_PROTOTYPES = 4  # of a class, in figures 2, 6 and 8
_ROWS = 3  # images in figures 2 and 7, and in figure 8
_SIDE = 400  # pixels of an embedded picture's longer side
_COLOURS = palette(8)[1:5]


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
      prototype_classes: c(j).
      ids: each prototype's number for life.
      patches: (picture, box of the patch in it) of each prototype, or None.
      counts: points of its class that each prototype is the most similar one to (Fig. 5).
      seen: each image.
    """

    name: str
    prototype_classes: Int[np.ndarray, " m"]
    ids: list[int]
    patches: list[tuple[UInt8[np.ndarray, "h w 3"], list[int]] | None]
    counts: Int[np.ndarray, " m"]
    seen: list[Seen]

    def strongest(self, c: int) -> list[int]:
        """Positions of the class's prototypes that win most of its points."""
        own = np.nonzero(self.prototype_classes == c)[0]
        return own[np.argsort(-self.counts[own], kind="stable")][:_PROTOTYPES].tolist()


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image with its labels, if it has any."""

    name: str
    image: UInt8[np.ndarray, "H W 3"]
    truth: UInt8[np.ndarray, "H W"] | None


def fig2(out: Path, pictures: Sequence[Picture], sides: Sequence[Side], classes: LabelSet):
    """A file a class: its prototypes' activations over the images that hold most of it."""
    for c, name in enumerate(classes.names):
        rows = [n for n, area in _areas(pictures, sides[0], c)[:_ROWS] if area]
        columns = [(side, j) for side in sides for j in side.strongest(c)]
        if not rows or not columns:
            continue
        figure, axes = _grid(len(rows), 1 + len(columns), pictures[rows[0]].image)
        for y, n in enumerate(rows):
            _show(axes[y, 0], pictures[n].image, "" if y else "image")
            for x, (side, j) in enumerate(columns, 1):
                _heat(
                    axes[y, x], pictures[n].image, side, n, j, "" if y else _label(side, j, sides)
                )
        yield _save(
            figure, out / f"fig2_{file_name(name)}.svg", f"{name}: activation of its prototypes"
        )


def fig5(out: Path, pictures: Sequence[Picture], sides: Sequence[Side], classes: LabelSet):
    """One file: for each class a histogram, prototypes from the most to the least used."""
    del pictures
    columns = min(len(classes), 6)
    bands = -(-len(classes) // columns)
    figure, axes = plt.subplots(
        bands * len(sides),
        columns,
        figsize=(1.9 * columns + 0.5, 1.5 * bands * len(sides) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for r, side in enumerate(sides):
        for c, name in enumerate(classes.names):
            axis = axes[(c // columns) * len(sides) + r, c % columns]
            axis.set_visible(True)
            own = np.nonzero(side.prototype_classes == c)[0]
            order = own[np.argsort(-side.counts[own], kind="stable")]
            total = max(side.counts[own].sum(), 1)
            axis.bar(range(len(order)), side.counts[order] / total, color=_unit(_COLOURS[r]))
            axis.set_xticks(range(len(order)), [str(side.ids[j]) for j in order], fontsize=6)
            axis.set_ylim(0, 1)
            axis.tick_params(axis="y", labelsize=6)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(f"{name}, {side.name}" if len(sides) > 1 else name, fontsize=8)
    figure.supxlabel("prototype", fontsize=9)
    figure.supylabel("share of the class's points", fontsize=9)
    yield _save(figure, out / "fig5.svg", None)


def fig6(out: Path, pictures: Sequence[Picture], sides: Sequence[Side], classes: LabelSet):
    """A file a class: four prototypes (rows) of each run (columns) over one image."""
    for c, name in enumerate(classes.names):
        n, area = _areas(pictures, sides[0], c)[0]
        rows = max(len(side.strongest(c)) for side in sides)
        if not area or not rows:
            continue
        figure, axes = _grid(rows, len(sides), pictures[n].image)
        for x, side in enumerate(sides):
            for y, j in enumerate(side.strongest(c)):
                _heat(axes[y, x], pictures[n].image, side, n, j, _label(side, j, sides))
        yield _save(figure, out / f"fig6_{file_name(name)}.svg", f"{name}, {pictures[n].name}")


def fig7(out: Path, pictures: Sequence[Picture], sides: Sequence[Side], classes: LabelSet):
    """One file: images, segmentations and truth; void is black."""
    chosen = pictures[:_ROWS]
    figure, axes = _grid(len(chosen), 2 + len(sides), chosen[0].image)
    for y, picture in enumerate(chosen):
        _show(axes[y, 0], picture.image, "" if y else "image")
        maps = [(side.name if len(sides) > 1 else "segmentation", side.seen[y]) for side in sides]
        shown = [(title, seen.labels) for title, seen in maps]
        if picture.truth is not None:
            shown.append(("truth", picture.truth))
        for axis, (title, labels) in zip(axes[y, 1:], shown, strict=False):
            _show(axis, _coloured(labels, classes), "" if y else title, labels=True)
    present = {c for side in sides for seen in side.seen[:_ROWS] for c in np.unique(seen.labels)}
    handles = [plt.Rectangle((0, 0), 1, 1, fc=_unit(classes.colours[c])) for c in sorted(present)]
    names = [classes.names[c] for c in sorted(present)]
    figure.legend(handles, names, loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    yield _save(figure, out / "fig7.svg", None)


def fig8(out: Path, pictures: Sequence[Picture], sides: Sequence[Side], classes: LabelSet):
    """A file an image and run: segmentation, and where each of a class's prototypes wins."""
    for side in sides:
        for n, picture in enumerate(pictures[:_ROWS]):
            seen = side.seen[n]
            own = side.prototype_classes[seen.winners] == seen.labels
            c = _told_apart(seen.labels, len(classes))
            winners = np.where(own & (seen.labels == c), seen.winners, -1)
            won = np.bincount(winners[winners >= 0], minlength=len(side.ids))
            best = [j for j in np.argsort(-won, kind="stable")[:_PROTOTYPES].tolist() if won[j]]
            grey = cv2.cvtColor(cv2.cvtColor(picture.image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            coloured = grey.astype(float)
            for j, colour in zip(best, _COLOURS, strict=False):
                coloured[winners == j] = 0.35 * coloured[winners == j] + 0.65 * np.array(colour)
            figure, axes = _grid(1, 3 + len(best), picture.image)
            _show(axes[0, 0], picture.image, "image")
            _show(axes[0, 1], _coloured(seen.labels, classes), "segmentation", labels=True)
            title = f"prototypes of {classes.names[c]}"
            _show(axes[0, 2], coloured.astype(np.uint8), title, labels=True)
            for axis, j, colour in zip(axes[0, 3:], best, _COLOURS, strict=False):
                _patch(axis, side, j, colour)
            suffix = f"_{file_name(side.name)}" if len(sides) > 1 else ""
            yield _save(figure, out / f"fig8_{file_name(picture.name)}{suffix}.svg", None)


FIGURES = {"fig2": fig2, "fig5": fig5, "fig6": fig6, "fig7": fig7, "fig8": fig8}


def _areas(pictures: Sequence[Picture], side: Side, c: int) -> list[tuple[int, int]]:
    """(image, pixels of class c: true ones, where an image is labelled), most first."""
    maps = [
        seen.labels if picture.truth is None else picture.truth
        for picture, seen in zip(pictures, side.seen, strict=True)
    ]
    return sorted(((n, int((m == c).sum())) for n, m in enumerate(maps)), key=lambda x: -x[1])


def _told_apart(labels: UInt8[np.ndarray, "H W"], count: int) -> int:
    """The class to look at: the second largest, the largest being mostly ground; or the only."""
    pixels = np.bincount(labels.ravel(), minlength=count)
    first, *rest = np.argsort(-pixels, kind="stable").tolist()
    return rest[0] if rest and pixels[rest[0]] else first


def _grid(rows: int, columns: int, image: np.ndarray):
    aspect = image.shape[0] / image.shape[1]
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(1.9 * columns, 1.9 * aspect * rows + 0.45),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def _show(axis, image: UInt8[np.ndarray, "H W 3"], title: str, *, labels: bool = False) -> None:
    """A picture; label maps are made smaller without mixing colours."""
    if labels:
        size = shrink(image, _SIDE).shape[1::-1]
        image = cv2.resize(image, size, interpolation=cv2.INTER_NEAREST_EXACT)
    axis.imshow(shrink(image, _SIDE), interpolation="nearest" if labels else None)
    axis.set_title(title, fontsize=7)


def _heat(axis, image, side: Side, n: int, j: int, title: str) -> None:
    grey = cv2.cvtColor(shrink(image, _SIDE), cv2.COLOR_RGB2GRAY)
    heat = side.seen[n].similarities[..., j].astype(np.float32)
    heat = cv2.resize(heat, grey.shape[::-1], interpolation=cv2.INTER_LINEAR)
    axis.imshow(grey, cmap="gray")
    axis.imshow(heat, cmap="viridis", alpha=0.65)
    axis.set_title(title, fontsize=7)


def _patch(axis, side: Side, j: int, colour: tuple[int, int, int]) -> None:
    axis.axis("on")
    axis.set(xticks=[], yticks=[])
    axis.set_title(f"prototype {side.ids[j]}", fontsize=7)
    for spine in axis.spines.values():
        spine.set(color=_unit(colour), linewidth=4)
    if side.patches[j] is None:
        axis.text(0.5, 0.5, "not a patch yet", ha="center", transform=axis.transAxes, fontsize=7)
        return
    picture, (top, left, bottom, right) = side.patches[j]
    axis.imshow(picture)
    axis.add_patch(outline([top, left, bottom, right], "white"))
    # As large as the others' where an image ends near the patch.
    (y, x), (height, width) = ((top + bottom) / 2, (left + right) / 2), picture.shape[:2]
    half = max(y, x, height - y, width - x)
    axis.set(xlim=(x - half - 0.5, x + half - 0.5), ylim=(y + half - 0.5, y - half - 0.5))
    axis.set_facecolor("0.9")


def _label(side: Side, j: int, sides: Sequence[Side]) -> str:
    return f"prototype {side.ids[j]}" + (f", {side.name}" if len(sides) > 1 else "")


def _coloured(labels: UInt8[np.ndarray, "H W"], classes: LabelSet) -> UInt8[np.ndarray, "H W 3"]:
    table = np.zeros((VOID + 1, 3), np.uint8)
    table[: len(classes)] = classes.colours
    return table[labels]


def _unit(colour: Sequence[int]) -> tuple[float, ...]:
    return tuple(x / 255 for x in colour)


def _save(figure, path: Path, title: str | None) -> Path:
    if title:
        figure.suptitle(title, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None})
    plt.close(figure)
    write_atomically(path, buffer.getvalue())
    return path
