"""What directions become that are sought for something else than their information on points.

    python -m benchmarks.directions --run=TWIN [--steps=600] [--split=validation] [--out=FILE]

TWIN is a linear twin on a data set with parts. For each objective, from the axes of its features:
V of true parts against the direction of the point's class that adds most, mean over the classes (a
class of which one direction wins all has 0; part agreement leaves it out), and how many directions
make up 95 % of a decision (`evaluation/sparsity.py`). The network is the same in all rows.
"""

import argparse
import pathlib
import shlex
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from jaxtyping import Array, Float, Int

from benchmarks import machine
from protoseg_jax import devices
from protoseg_jax.evaluation.part_agreement import agreement
from protoseg_jax.evaluation.sparsity import prototypes_needed
from protoseg_jax.images import resize_labels
from protoseg_jax.progress import Progress
from protoseg_jax.prototypes import directions
from protoseg_jax.run.finished import Finished

_POINTS = 400  # of a training image
_RATE = 1e-2
_EVERY = 7  # of the split's points, whose decisions are counted

# (a, b, c) of −a H(d | n) + b H(d | class) + c H(d).
OBJECTIVES = {
    "2 H(d \\| n) − H(d)": (2, 0, 1),
    "1.25 H(d \\| n) − H(d)": (1.25, 0, 1),
    "**H(d \\| n) − H(d)**": (1, 0, 1),
    "H(d \\| n) − ¼ H(d \\| class) − ¾ H(d)": (1, 0.25, 0.75),
    "H(d \\| n) − ½ H(d \\| class) − ½ H(d)": (1, 0.5, 0.5),
    "H(d \\| n) − H(d \\| class)": (1, 1, 0),
    "1.25 H(d \\| n) − H(d \\| class)": (1.25, 1, 0),
}


def objective(a: float, b: float, c: float, classes: int) -> Callable:
    """−a H(d | n) + b H(d | class) + c H(d), in the arguments of `directions.information`."""

    def weighted(
        u: Float[Array, "d d"],
        z: Float[Array, "n d"],
        weights: Float[Array, "d k"],
        predicted: Int[Array, " n"],
        probability: Float[Array, " n"],
    ) -> Float[Array, ""]:
        shares = directions.shares(u, z, weights, predicted)
        of_points = entr(shares).sum(1) @ probability
        of_class = jax.nn.one_hot(predicted, classes).T * probability  # joint with the points
        joint = of_class @ shares
        total = joint.sum(1, keepdims=True)
        within = (entr(joint / jnp.maximum(total, 1e-12)).sum(1) * total[:, 0]).sum()
        return -a * of_points + b * within + c * entr(probability @ shares).sum()

    return weighted


def features(run: Finished, split: str, count: int | None) -> tuple[np.ndarray, ...]:
    """(z, labels, parts) of all points of a split, or of `count` random ones of each image."""
    inference, source = run.inference, run.experiment.data.source(split)
    look = jax.jit(lambda image: inference(run.checkpoint.variables, image[None]).features[0])
    rng, found = np.random.default_rng(0), []
    with Progress(f"looking at {split}", len(source), 0, "image") as progress:
        for n in range(len(source)):
            example = source[n]
            z = np.asarray(look(inference.prepare(example["image"])))
            of = [resize_labels(example[key], z.shape[:2]).ravel() for key in ("label", "parts")]
            z = z.reshape(-1, z.shape[-1]).astype(np.float64)
            kept = rng.permutation(len(z))[:count]  # None: all
            found.append((z[kept], *(x[kept] for x in of)))
            progress.update(1)
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))


def figures(u: np.ndarray, weights: np.ndarray, bias: np.ndarray, seen: dict) -> tuple:
    """(V, directions a decision) of a U."""
    vectors, kernel, classes = directions.entries(u, weights, bias, seen["points"])
    z, label, part = seen["judged"]
    s = np.concatenate([z @ vectors[:-1].T, np.ones((len(z), 1))], 1)
    some = s[::_EVERY]
    needed = np.asarray(prototypes_needed(*map(jnp.asarray, (some, some @ kernel, kernel))))
    found = []
    for c in np.unique(label[part > 0]):
        own, chosen = np.flatnonzero(classes == c), (label == c) & (part > 0)
        table = np.zeros((part.max() + 1, max(len(own), 1)), int)
        strongest = s[chosen][:, own].argmax(1) if len(own) else 0
        np.add.at(table, (part[chosen], strongest), 1)
        found.append(agreement(table[table.any(1)])[0] if table.any(0).sum() > 1 else 0.0)
    return np.mean(found), needed[needed > 0].mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--steps", type=int, default=600, help="at least 1")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    devices.keep_compiled_programs()
    run = Finished.load(arguments.run)
    head = run.checkpoint.arrays["params"]["head"]
    weights, bias = (np.asarray(head[name], np.float64) for name in ("kernel", "bias"))
    seen = {
        "points": features(run, run.experiment.config.data.projection_split, _POINTS)[0],
        "judged": features(run, arguments.split, None),
    }
    told = [f"--run={arguments.run}", f"--steps={arguments.steps}", f"--split={arguments.split}"]
    lines = [
        "# What directions are sought for",
        "",
        f"`{shlex.join(['python', '-m', 'benchmarks.directions', *told])}`, {machine.describe()}",
        "",
        "| as small as it can be | V, % | directions a decision |",
        "| --- | --- | --- |",
    ]
    axes = np.eye(len(weights))
    turns = {"nothing: the axes": axes}
    turns |= {f"nothing: random {n}": directions.random_rotation(len(axes), n) for n in range(3)}
    for name, abc in OBJECTIVES.items():
        sought = objective(*abc, classes=len(bias))
        with Progress(name, arguments.steps, 0) as progress:
            turns[name], _ = directions.find(
                *(seen["points"], weights, bias, axes, arguments.steps, _RATE, 0),
                objective=sought,
                look=progress.update,
            )
    for name, u in turns.items():
        v, needed = figures(u, weights, bias, seen)
        lines.append(f"| {name} | {100 * v:.1f} | {needed:.1f} |")
    machine.report(lines, arguments.out)


if __name__ == "__main__":
    main()
