"""Where a network knows the parts of its objects: k-means on each of its maps, beside true parts.

    python -m benchmarks.part_clusters --runs "NAME: DIR" [--runs …] [--split=validation]
        [--clusters=8] [--out=FILE]

For every map of a run's backbone and for z: the points of each class that have a part label are put
into so many clusters, free in size, by k-means on the map alone, and V of clusters against true
parts is averaged over the classes, as part agreement does. Channels are brought to mean 0 and
deviation 1 at each point but in z. No prototype takes part in this: it says what prototypes on that
map could know at best, or nearly.
"""

import argparse
import pathlib
import re
import shlex

import jax
import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.vq import kmeans2

from benchmarks import machine
from protoseg_jax import devices
from protoseg_jax.evaluation.part_agreement import agreement
from protoseg_jax.images import resize_labels
from protoseg_jax.run.finished import Finished

_FEWEST = 50  # points of a part that is looked for
_ROUNDS = 40


def maps(run: Finished, image: np.ndarray) -> dict[str, Float[np.ndarray, "h w c"]]:
    """What each block of the backbone, and the decoder behind it (z), say of an image at the
    evaluation size."""
    inference = run.inference

    def of_backbone(module, _):
        return len(module.path) == 2 and module.path[0] == "backbone"

    output, state = inference.model.apply(
        run.checkpoint.variables,
        inference.preprocessing.normalise(image[None]),
        capture_intermediates=of_backbone,
        mutable=["intermediates"],
    )
    found = {
        name: said["__call__"][0][0] for name, said in state["intermediates"]["backbone"].items()
    }
    blocks = {name: x for name, x in found.items() if x.ndim == 3 and "norm" not in name}
    return {**{name: jax.nn.standardize(x) for name, x in blocks.items()}, "z": output.features[0]}


def score(
    x: Float[np.ndarray, "n c"], part: Int[np.ndarray, " n"], clusters: int
) -> tuple[float, float, float]:
    """(V, homogeneity, completeness) of a class's points by cluster and part."""
    _, own = kmeans2(x, clusters, iter=_ROUNDS, minit="++", rng=np.random.default_rng(0))
    table = np.zeros((part.max() + 1, clusters), int)
    np.add.at(table, (part, own), 1)
    return agreement(table[table.any(1)])


def rows(folder: str, split: str, clusters: int) -> dict[str, np.ndarray]:
    """By map: channels, cells, V, homogeneity and completeness, means over the classes."""
    run = Finished.load(folder)
    data = run.experiment.data
    source = data.source(split)
    look = jax.jit(lambda image: maps(run, image))
    points: dict[str, dict[int, list]] = {}
    shapes = {}
    for n in range(len(source)):
        example = source[n]
        for name, x in look(run.inference.prepare(example["image"])).items():
            x = np.asarray(x)
            shapes[name] = x.shape
            label, part = (resize_labels(example[key], x.shape[:2]) for key in ("label", "parts"))
            for c in np.unique(label[part > 0]).tolist():
                chosen = (label == c) & (part > 0)
                points.setdefault(name, {}).setdefault(c, []).append((x[chosen], part[chosen]))
    result = {}
    for name, classes in points.items():
        found = []
        for pieces in classes.values():
            x, part = (np.concatenate(piece) for piece in zip(*pieces, strict=True))
            kept = np.bincount(part)[part] >= _FEWEST
            found.append(score(x[kept].astype(np.float64), part[kept], clusters))
        height, _, channels = shapes[name]
        result[name] = np.array([channels, height, *np.mean(found, 0)])

    def place(name: str) -> tuple:  # in the network: by fineness, then by the block's number
        return name == "z", -shapes[name][0], [int(n) for n in re.findall(r"\d+", name)]

    return {name: result[name] for name in sorted(result, key=place)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", action="append", required=True, help="NAME: DIR")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    devices.keep_compiled_programs()
    told = [f"--runs={text}" for text in arguments.runs]
    told += [f"--split={arguments.split}", f"--clusters={arguments.clusters}"]
    lines = [
        "# Where a network knows parts",
        "",
        f"`{shlex.join(['python', '-m', 'benchmarks.part_clusters', *told])}`, "
        f"{machine.describe()}",
        "",
        "| run | map | channels | rows of points | V, % | homogeneity, % | completeness, % |",
        "| --- " * 7 + "|",
    ]
    for text in arguments.runs:
        name, _, folder = text.partition(":")
        for block, (channels, height, *found) in rows(
            folder.strip(), arguments.split, arguments.clusters
        ).items():
            cells = " | ".join(f"{100 * x:.1f}" for x in found)
            lines.append(f"| {name} | {block} | {channels:.0f} | {height:.0f} | {cells} |")
    machine.report(lines, arguments.out)


if __name__ == "__main__":
    main()
