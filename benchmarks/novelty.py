"""Does a class that training never saw look novel? Beside the same class in a run that did see it.

    python -m benchmarks.novelty [--config=configs/demo.py] [--class=car] [--seeds=0]
        [--runs=runs/novelty] [--set=key=value …] [--out=FILE.md]

For each seed two runs, one with `data.held_out` and one without. In both, the AUROC of the class's
points of validation against all others by novelty. The second is the control: a class may lie far
from prototypes because it is difficult, and only what the first has beyond it is novelty. What is
finished is not run again.

Beside novelty as the measure and the explorer have it, min_j ‖z − p_j‖², what else the same
network could tell: that distance over its mean among training points that are nearest to the same
class, and the least of the Mahalanobis distances to the training points of each class, in z, in the
backbone's map, and their product.
"""

import argparse
import dataclasses
import pathlib
import shlex
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from benchmarks import machine
from benchmarks.programs import call
from protoseg_jax import devices
from protoseg_jax.data.labels import VOID
from protoseg_jax.evaluation.novelty import auroc
from protoseg_jax.evaluation.report import mean_deviation
from protoseg_jax.inference import shrink_labels
from protoseg_jax.models.layers import resize
from protoseg_jax.run.finished import Finished

COLUMNS = {
    "distance": "nearest prototype",
    "scaled": "over its class's scale",
    "z": "classes' Gaussians in z",
    "map": "in the backbone's map",
    "both": "in both",
    "miou": "mIoU",
}
_RIDGE = 1e-3  # of the mean variance, added to each


@dataclasses.dataclass
class Moments:
    """Sums over one class's points."""

    count: int
    first: Float[np.ndarray, " d"]
    second: Float[np.ndarray, "d d"]

    @classmethod
    def nothing(cls, d: int) -> "Moments":
        return cls(0, np.zeros(d), np.zeros((d, d)))

    def add(self, x: Float[np.ndarray, "n d"]) -> None:
        self.count += len(x)
        self.first += x.sum(0)
        self.second += x.T @ x

    def mahalanobis(
        self, x: Float[np.ndarray, "n d"], part: slice = slice(None)
    ) -> Float[np.ndarray, " n"]:
        """Squared distances of points to the mean by the covariance, of some of the channels."""
        mean = self.first / self.count
        covariance = (self.second / self.count - np.outer(mean, mean))[part, part]
        covariance += _RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        away = x[:, part] - mean[part]
        return (away * np.linalg.solve(covariance, away.T).T).sum(1)


def points(run: Finished, split: str) -> Iterator[tuple[np.ndarray, ...]]:
    """(z and the backbone's map [n d + t], distances [n m], Y_Z [n]) of a split, by batches; void
    points are left out. The map is the one that anchors are in, or the last."""
    experiment, inference = run.experiment, run.inference
    anchored = experiment.config.model.anchors

    @jax.jit
    def look(variables, batch):
        images = inference.preprocessing.normalise(batch["image"])
        encoded = inference.model.apply(variables, images, method="encode")
        output = inference.model.apply(variables, encoded, method="outputs_of")[0]
        maps = encoded if isinstance(encoded, tuple | list) else (encoded,)
        x = maps[-1 if anchored is None else anchored].astype(jnp.float32)
        size = output.features.shape[1:3]
        x = resize(x, size, (size[0] / x.shape[1], size[1] / x.shape[2]))
        labels = shrink_labels(batch["label"], batch["size"], size)
        labels = jnp.where(batch["index"][:, None, None] >= 0, labels, VOID)
        return jnp.concatenate([output.features, x], -1), output.distances, labels

    for batch in experiment.eval_batches(split, held_out=True):
        found = look(run.checkpoint.variables, batch)
        x, distances, labels = (np.asarray(a).reshape(-1, *a.shape[3:]) for a in found)
        known = labels != VOID
        yield x[known].astype(np.float64), distances[known], labels[known]


def scores(run: Finished, novel: int) -> dict[str, float | None]:
    """AUROCs of a class's points of validation by the keys of `COLUMNS`."""
    classes = np.array([p.class_ for p in run.prototypes])
    width, count = run.experiment.config.model.features, run.experiment.num_classes
    moments: list[Moments] = []
    sums = np.zeros((2, count))  # distance to the nearest prototype, by the prototype's class
    for x, distances, labels in points(run, run.experiment.config.data.train_split):
        moments = moments or [Moments.nothing(x.shape[1]) for _ in range(count)]
        held_out = run.experiment.held_out == labels
        nearest = classes[distances.argmin(1)][~held_out]
        for c in range(count):
            if c != run.experiment.held_out:
                moments[c].add(x[labels == c])
            mine = distances.min(1)[~held_out][nearest == c]
            sums[:, c] += len(mine), mine.sum()
    scale = sums[1] / np.maximum(sums[0], 1)
    scale[sums[0] == 0] = 1.0  # a class that no point is nearest to
    known = [m for m in moments if m.count]
    found: dict[str, list[np.ndarray]] = {key: [] for key in COLUMNS if key != "miou"}
    positive = []
    for x, distances, labels in points(run, "validation"):
        positive.append(labels == novel)
        found["distance"].append(distances.min(1))
        found["scaled"].append((distances / scale[classes]).min(1))
        for key, part in (("z", slice(width)), ("map", slice(width, None))):
            found[key].append(np.min([m.mahalanobis(x, part) for m in known], 0))
        found["both"].append(found["z"][-1] * found["map"][-1])
    where = np.concatenate(positive)
    return {key: auroc(np.concatenate(values), where) for key, values in found.items()}


def measured(path: pathlib.Path, name: str) -> dict[str, float | None]:
    """Scores and novelty of a finished run, of its last phase on validation."""
    run = Finished.load(path)
    mious = {entry["phase"]: entry["miou"] for entry in run.workdir.summary()}
    return {**scores(run, run.experiment.labels.names.index(name)), "miou": mious[run.phase]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/demo.py")
    parser.add_argument("--class", dest="name", default="car")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--runs", type=pathlib.Path, default="runs/novelty", help="their folder")
    parser.add_argument("--set", action="append", default=[], help="key=value for every run")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    devices.keep_compiled_programs()
    variants = {
        f"{arguments.name} held out": [f"--config.data.held_out={arguments.name}"],
        f"{arguments.name} learnt (control)": [],
    }
    rows = []
    for title, settings in variants.items():
        results = []
        for seed in arguments.seeds.split(","):
            kind = f"{arguments.name}_held_out" if settings else "learnt"
            place = arguments.runs / f"{kind}-seed{seed}"
            line = [f"--config={arguments.config}", f"--workdir={place}", f"--config.seed={seed}"]
            call("train.py", *line, *settings, *(f"--config.{s}" for s in arguments.set))
            results.append(measured(place, arguments.name))
        cells = [mean_deviation(r[k] for r in results) for k in COLUMNS]
        rows.append(f"| {title} | {len(results)} | {' | '.join(cells)} |")
    told = [f"--config={arguments.config}", f"--class={arguments.name}"]
    told += [f"--seeds={arguments.seeds}", *(f"--set={s}" for s in arguments.set)]
    machine.report(
        [
            "# Novelty of a class that training never saw",
            "",
            f"`{shlex.join(['python', '-m', 'benchmarks.novelty', *told])}`, {machine.describe()}",
            "",
            f"| run | seeds | {' | '.join(COLUMNS.values())} |",
            "| --- " * (2 + len(COLUMNS)) + "|",
            *rows,
            "",
            "AUROC of the class's points, in %. mIoU is over the classes that the run has labels "
            "of: one held out is not among them.",
        ],
        arguments.out,
    )


if __name__ == "__main__":
    main()
