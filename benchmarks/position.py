"""Draws why knowing the place alone passes for consistency, and not for part agreement.

    python -m benchmarks.position --workdir=DIR [--split=validation] [--class=house]
        [--out=FILE.md]

Two pictures beside FILE.md. In the first, images of a class with the centroids of a part and what
is active there: of the place that hits the part most often (it knows nothing else), of a perfect
detector of the part that such a detector misses most, and of the run's own prototype that hits some
part most often. In the second the true parts, which prototype is the most similar where, the cell
of the place, and the oracle; and the tables of points from which V comes.
"""

import argparse
import pathlib
import shlex
import sys
from typing import Any

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8

from benchmarks import machine
from protoseg_jax import devices
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation import consistency, part_agreement, parts, score
from protoseg_jax.evaluation.measures import Context, Measure, Seen, take
from protoseg_jax.evaluation.overlap import top
from protoseg_jax.evaluation.utilisation import most_similar
from protoseg_jax.run.finished import Finished

_SHOWN = 7  # images
_GREY = 0.25  # of the image, where nothing is said


def gather(run: Finished, split: str) -> dict[str, Any]:
    """What the measures of parts see of each image of a split (numbers first), and the census."""
    context = Context(run.experiment, run.inference, split)
    seen = Measure(_step, lambda found: found, summed=False, inputs=parts.inputs(context))
    batches = run.experiment.eval_batches(split)
    found = take(context, [seen], run.checkpoint.variables, batches)
    there = found["index"] >= 0
    order = np.argsort(found["index"][there])
    found = {name: values[there][order] for name, values in found.items()}
    return {**found, "census": parts.census(context)}


def _step(seen: Seen) -> dict[str, Array]:
    part, classes = parts.own_parts(seen), seen.inference.classes
    similarities = seen.output.similarities
    of_cells = np.repeat(np.arange(seen.inference.num_classes), parts.CELLS)
    centroids = seen.batch["centroids"]
    spots = jax.numpy.zeros((*part.shape, len(seen.batch["part_classes"])), bool)
    spots = spots.at[centroids[:, 1], centroids[:, 2], centroids[:, 0]].max(centroids[:, 0] >= 0)
    return {
        "index": seen.batch["index"],
        "labels": seen.labels,
        "parts": part,
        "spots": spots,  # points with a centroid of each part
        "visible": parts.visible(seen),
        "prototype": most_similar(similarities, seen.labels, classes),
        "position": parts.cells(seen),
        "oracle": parts.oracle_prototypes(seen, part, jax.random.fold_in(seen.key, 5)),
        "active": _active(similarities, seen.labels, classes),
        "active_place": _active(parts.nearness(seen), seen.labels, of_cells),
        "hits": parts.hits(similarities, seen),
        "hits_place": parts.hits(parts.nearness(seen), seen, of_cells),
    }


def _active(maps: Float[Array, "h w n"], labels: Int[Array, "h w"], classes: np.ndarray) -> Array:
    inside = labels[..., None] == jax.numpy.asarray(classes)
    return jax.vmap(lambda x, own: top(x, own, parts.SHARE), -1, -1)(maps, inside)


def rates(found: dict[str, Any], c: int) -> dict[str, tuple[int, int, float]]:
    """(part, prototype or cell, share of the part's images) of what hits a part of class c most
    often: of a "place", of a "prototype"; and of the "detector" of the part that its own perfect
    detector hits least often (part, part, share)."""
    of_class = found["census"].classes == c
    visible = np.maximum(found["visible"].sum(0), 1)

    def best(hits: np.ndarray) -> tuple[int, int, float]:
        share = np.where(of_class[:, None], hits.sum(0) / visible[:, None], -1)
        part, column = np.unravel_index(share.argmax(), share.shape)
        return int(part), int(column), float(share[part, column])

    part = found["parts"][..., None]
    on_part = ((part == np.arange(len(of_class))) & found["spots"]).any((1, 2))
    share = np.where(of_class, on_part.sum(0) / visible, 2)
    least = int(share.argmin())
    return {
        "place": best(found["hits_place"]),
        "detector": (least, least, float(share[least])),
        "prototype": best(found["hits"]),
    }


def table(found: dict[str, Any], name: str, c: int, columns: np.ndarray) -> np.ndarray:
    """Points of class c by part and column, over the split."""
    rows = np.flatnonzero(found["census"].classes == c)
    part, column = found["parts"], found[name]
    return np.array([[((part == k) & (column == n)).sum() for n in columns] for k in rows])


def _over(image: UInt8[np.ndarray, "H W 3"], mask: np.ndarray, colour: Any) -> np.ndarray:
    """An image, pale grey but where a mask of its points is set, and that tinted."""
    tinted = 0.45 * image + 0.55 * 255 * np.array(colour)
    return np.where(_cells(mask, image)[..., None], tinted, _pale(image)).astype(np.uint8)


def _paint(image: np.ndarray, labels: Int[np.ndarray, "h w"], colours: np.ndarray) -> np.ndarray:
    """The points with a number ≥ 0 in their colours, the rest pale grey."""
    full = _cells(labels, image)
    return np.where(full[..., None] >= 0, 255 * colours[full], _pale(image)).astype(np.uint8)


def _cells(points: Shaped[np.ndarray, "h w"], image: np.ndarray) -> Shaped[np.ndarray, "H W"]:
    """Each pixel with the value of the point in whose cell it lies."""
    rows, cols = (
        np.arange(size) * n // size for size, n in zip(image.shape[:2], points.shape, strict=True)
    )
    return points[rows[:, None], cols]


def _pale(image: np.ndarray) -> np.ndarray:
    return 255 - _GREY * (255 - image.mean(-1, keepdims=True))


def _head(axes: Any, title: str) -> None:
    """A row's title, which is longer than its first picture is wide."""
    text = axes.text(0, 1.06, title, transform=axes.transAxes, fontsize=11)
    text.set_in_layout(False)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def draw_consistency(
    images: list[np.ndarray], found: dict[str, Any], numbers: list[int], c: int, names: list[str]
) -> plt.Figure:
    """A row for the place, the perfect detector and the prototype; a column an image."""
    told = {
        "place": "A map that knows the place alone",
        "detector": "A perfect detector of a part",
        "prototype": "The run's prototype that hits most often",
    }
    size = (1.6 * len(images), 5.6)
    figure, grid = plt.subplots(3, len(images), figsize=size, layout="constrained")
    figure.get_layout_engine().set(hspace=0.2, rect=(0, 0, 1, 0.95))
    for axes, (kind, (part, column, share)) in zip(grid, rates(found, c).items(), strict=True):
        verdict = "consistent" if share > consistency.CONSISTENT else "not consistent"
        title = f"{told[kind]}: on the centroid of “{names[part + 1]}” in {share:.0%}: {verdict}"
        for ax, image, n in zip(axes, images, numbers, strict=True):
            if kind == "detector":
                active = found["parts"][n] == part
            else:
                key = "active_place" if kind == "place" else "active"
                active = found[key][n][..., column]
            ax.imshow(_over(image, active, (0.1, 0.45, 0.9)))
            height, width = image.shape[:2]
            for row, col in np.argwhere(found["spots"][n][..., part]):
                h, w = active.shape
                at = (col + 0.5) * width / w - 0.5, (row + 0.5) * height / h - 0.5
                ok = active[row, col]
                ax.plot(*at, "o", ms=8, mfc="#1a9e3f" if ok else "#d62728", mec="white", mew=1.5)
            _bare(ax)
        _head(axes[0], title)
    figure.supxlabel(
        "Blue: active points. Dots: centroids of the part, green if active.", fontsize=9
    )
    return figure


def draw_agreement(
    images: list[np.ndarray],
    found: dict[str, Any],
    numbers: list[int],
    c: int,
    prototypes: list[int],
    names: list[str],
) -> plt.Figure:
    """Rows: the true parts; prototypes, places and the oracle, each with its table and V."""
    ks = np.flatnonzero(found["census"].classes == c)
    own = np.array(prototypes)
    count = len(images)
    figure, grid = plt.subplots(
        4,
        count + 1,
        figsize=(1.6 * count + 3.6, 7.4),
        width_ratios=[1] * count + [1.7],
        layout="constrained",
    )
    figure.get_layout_engine().set(hspace=0.1, rect=(0, 0, 1, 0.96))
    palette = matplotlib.colormaps["tab10"](np.arange(max(len(own), parts.CELLS)) % 10)[:, :3]
    part_colours = np.zeros((len(found["census"].classes), 3))
    part_colours[ks] = matplotlib.colormaps["Set2"](np.arange(len(ks)))[:, :3]
    rows = (
        ("parts", "The true parts", None, part_colours),
        ("prototype", "Most similar prototype", own, palette),
        ("position", "Place: cells of a 3 × 3 grid", np.arange(parts.CELLS), palette),
        ("oracle", "Oracle: knows the parts, as many prototypes", own, palette),
    )
    for axes, (name, title, columns, colours) in zip(grid, rows, strict=True):
        for ax, image, n in zip(axes, images, numbers, strict=False):
            labels = found[name][n]
            inside = (found["parts"][n] >= 0) & (found["labels"][n] == c)
            if columns is not None:
                place = np.full(max(columns.max(), labels.max()) + 1, -1)
                place[columns] = np.arange(len(columns))
                labels = place[labels]
            ax.imshow(_paint(image, np.where(inside, labels, -1), colours))
            _bare(ax)
        _head(axes[0], title)
        last = axes[-1]
        if columns is None:
            last.axis("off")
            for k in ks:
                last.plot([], [], "s", color=part_colours[k], ms=9, label=names[k + 1])
            last.legend(loc="center", fontsize=9, frameon=False)
            continue
        points = table(found, name, c, columns)
        v, h, complete = part_agreement.agreement(points)
        last.imshow(points / np.maximum(points.max(), 1), cmap="Blues", aspect="auto")
        last.set_yticks(range(len(ks)), [names[k + 1] for k in ks], fontsize=8)
        last.yaxis.tick_right()
        last.set_xticks(range(len(columns)), [""] * len(columns))
        for tick, colour in enumerate(colours[: len(columns)]):
            last.plot(tick, len(ks) - 0.42, "s", color=colour, ms=8, clip_on=False)
        last.set_title(f"V {v:.0%}   h {h:.0%}   c {complete:.0%}", fontsize=10)
    return figure


def told(run: Finished, split: str) -> str:
    """Consistency and V of the place, of the run's prototypes and of the oracle, in words."""
    found = score.measure(run.experiment, run.checkpoint, split, ("consistency", "part_agreement"))
    agreement = found["part_agreement"]
    return "; ".join(
        f"{who} {found[f'consistency{key}']:.0%} consistent, V {agreement[f'v{key}']:.0%}"
        for who, key in (("the place", "_position"), ("prototypes", ""), ("the oracle", "_oracle"))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="a run on a data set with part labels")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--class", dest="name", help="by default that with the most parts")
    parser.add_argument("--out", type=pathlib.Path, default="position.md", help="the page")
    arguments = parser.parse_args()
    devices.keep_compiled_programs()
    try:
        page(arguments.workdir, arguments.split, arguments.name, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def page(workdir: str, split: str, name: str | None, out: pathlib.Path) -> None:
    """Write the page and its two pictures.

    Raises:
      UserError: no run there, its data set has no parts, or no such class has any.
    """
    run = Finished.load(workdir)
    data, classes = run.experiment.data, run.experiment.labels.names
    if not data.part_names or run.experiment.black_box:
        raise UserError("the run needs prototypes, and a data set with part labels; name another")
    found = gather(run, split)
    with_parts = [classes[c] for c in np.unique(found["census"].classes) if c >= 0]
    name = name or next(iter(with_parts), None)
    if name not in with_parts:
        raise UserError(
            f"class {name!r} has no parts in {split}; choose one of {', '.join(with_parts) or '–'}"
        )
    c = classes.index(name)
    points = ((found["labels"] == c) & (found["parts"] >= 0)).sum((1, 2))
    numbers = sorted(np.argsort(-points, kind="stable")[:_SHOWN].tolist())
    examples = run.experiment.examples(split)
    images = [examples[n]["image"] for n in numbers]
    own = np.flatnonzero(run.inference.classes == c).tolist()
    names = list(data.part_names)
    figures = {
        "consistency": draw_consistency(images, found, numbers, c, names),
        "agreement": draw_agreement(images, found, numbers, c, own, names),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for kind, figure in figures.items():
        figure.savefig(out.with_name(f"{out.stem}_{kind}.png"), dpi=80)
        plt.close(figure)
    command = shlex.join(
        ["python", "-m", "benchmarks.position", "--workdir=RUN", f"--split={split}"]
        + [f"--class={name}"]
    )
    place, detector, prototype = rates(found, c).values()
    machine.report(
        [
            "# Why the place alone passes for consistency, and not for part agreement",
            "",
            f"`{command}`, {machine.describe()}",
            "",
            f"{split.capitalize()} images with {name}, of a run that ended in phase {run.phase}.",
            "",
            f"**Consistency** asks whether a prototype is active on the centroid of some part in "
            f"more than {consistency.CONSISTENT:.0%} of the images where that part is. A map that "
            f"is active on the fifth of the {name}'s points nearest to one place in its box, "
            f"whatever is there, is on the centroid of “{names[place[0] + 1]}” in {place[2]:.0%} "
            f"of them. A detector that finds exactly the points of “{names[detector[0] + 1]}”, and "
            f"nothing else, is on its centroid in {detector[2]:.0%}. The run's own prototypes come "
            f"to {prototype[2]:.0%} at most.",
            "",
            f"![What is active, and the centroids]({out.stem}_consistency.png)",
            "",
            "**Part agreement** asks for whole regions: from which prototype is the most similar "
            "at a point, can one tell its part, and the other way round? In the tables, parts "
            "down and prototypes (or cells) across, over the whole split, a measure of parts "
            "should find dark cells alone in their columns, as the oracle's are. Cells of the "
            f"place cut through the parts. Over all classes: {told(run, split)}.",
            "",
            f"![Parts, prototypes, places and the oracle]({out.stem}_agreement.png)",
        ],
        out,
    )


if __name__ == "__main__":
    main()
