"""The k nearest training patches of every prototype: one pmap'd pass over a data set.

Each device keeps its own running best (squared distance, feature, image, row, col and class of each
prototype's patches) and merges every batch into it; only the final tables reach the host. From one
image at most one patch, the nearest, can be among a prototype's k. Ties go to the lower image
number, then to the earlier point in row-major order, so the result does not depend on how images
fall to devices.
"""

import collections
from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from protoseg_jax.data.labels import VOID
from protoseg_jax.inference import Inference, shrink_labels
from protoseg_jax.models.protoseg import Output
from protoseg_jax.program import Interrupted
from protoseg_jax.progress import Progress
from protoseg_jax.run.checkpoints import Checkpoint
from protoseg_jax.run.experiment import Experiment
from protoseg_jax.run.live import Clock, Live

_NONE = np.iinfo(np.int32).max  # image number of an empty slot: sorts behind every real one


@flax.struct.dataclass
class Patches:
    """The k nearest patches of M prototypes, nearest first; empty slots have distance ∞.

    Attributes:
      squared_distance: [m k].
      feature: [m k d].
      image: [m k], number of the example in the split.
      row, col: [m k], place on the feature map.
      label: [m k], Y_Z of the patch.
    """

    squared_distance: Float[Array, "m k"]
    feature: Float[Array, "m k d"]
    image: Int[Array, "m k"]
    row: Int[Array, "m k"]
    col: Int[Array, "m k"]
    label: Int[Array, "m k"]


def empty(num_prototypes: int, k: int, features: int) -> Patches:
    """A table without patches."""
    integers = np.full((num_prototypes, k), _NONE, np.int32)
    return Patches(
        squared_distance=np.full((num_prototypes, k), np.inf, np.float32),
        feature=np.zeros((num_prototypes, k, features), np.float32),
        image=integers,
        row=np.zeros_like(integers),
        col=np.zeros_like(integers),
        label=np.full_like(integers, VOID),
    )


def nearest_per_image(
    features: Float[Array, "b h w d"],
    distances: Float[Array, "b h w m"],
    candidates: Bool[Array, "b h w m"],
    labels: Int[Array, "b h w"],
    image: Int[Array, " b"],
) -> Patches:
    """Each prototype's nearest candidate point in each image, as a table with k = b."""
    b, h, w, m = distances.shape
    flat = jnp.where(candidates, distances, jnp.inf).reshape(b, h * w, m)
    place = jnp.argmin(flat, axis=1)  # the first of equals: row-major order
    nearest = jnp.take_along_axis(flat, place[:, None], axis=1)[:, 0]
    rows = jnp.arange(b)[:, None]
    found = jnp.isfinite(nearest)
    return Patches(
        squared_distance=nearest.T,
        feature=features.reshape(b, h * w, -1)[rows, place].transpose(1, 0, 2),
        image=jnp.where(found, image[:, None], _NONE).T,
        row=(place // w).T.astype(jnp.int32),
        col=(place % w).T.astype(jnp.int32),
        label=labels.reshape(b, h * w)[rows, place].T,
    )


def merge(first: Patches, second: Patches, k: int) -> Patches:
    """The k nearest of two tables over different images; ties go to the lower image number."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)
    slots = jnp.broadcast_to(jnp.arange(both.image.shape[1]), both.image.shape)
    *_, order = jax.lax.sort((both.squared_distance, both.image, slots), num_keys=3)
    order = order[:, :k]
    return jax.tree.map(
        lambda x: jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1),
        both,
    )


def contains_class(
    labels: Int[Array, "b H W"], sizes: Int[Array, "b 2"], feature_size: tuple[int, int], c: int
) -> Bool[Array, "b h w"]:
    """Cells of the feature map that contain any pixel of class c."""
    (_, height, width), (h, w) = labels.shape, feature_size

    def one(label, size):
        rows = jnp.minimum(jnp.arange(height) * h // size[0], h - 1)
        cols = jnp.minimum(jnp.arange(width) * w // size[1], w - 1)
        inside = (jnp.arange(height) < size[0])[:, None] & (jnp.arange(width) < size[1])[None]
        hit = inside & (label == c)
        return jnp.zeros((h, w), bool).at[rows[:, None], cols[None, :]].max(hit)

    return jax.vmap(one)(labels, sizes)


Rule = Callable[
    [Output, Int[Array, "b h w"], dict[str, Array]],
    tuple[Float[Array, "b h w m"], Bool[Array, "b h w m"]],
]
"""(output, Y_Z, batch) → what is to be smallest, and where it may be looked for."""


def of_own_class(classes: Int[np.ndarray, " m"]) -> Rule:
    """Projection: the nearest of the points with Y_Z = c(j)."""
    return lambda output, labels, _: (output.distances, labels[..., None] == jnp.array(classes))


def of_any_class(output: Output, labels: Array, _: dict[str, Array]) -> tuple[Array, Array]:
    """Pruning (a `Rule`): the nearest of all non-void points."""
    candidates = jnp.broadcast_to((labels != VOID)[..., None], output.distances.shape)
    return output.distances, candidates


def of_cells_with(c: int) -> Rule:
    """Projection of a class that has pixels, but no point in Y_Z: cells with any pixel of it."""

    def rule(output: Output, labels: Array, batch: dict[str, Array]) -> tuple[Array, Array]:
        cells = contains_class(batch["label"], batch["size"], labels.shape[1:], c)
        return output.distances, jnp.broadcast_to(cells[..., None], output.distances.shape)

    return rule


def at_random(num_classes: int, seed: int) -> Rule:
    """Random points of each class, the table's row c being class c's.

    Every point of an image draws a number in [0, 1), by the seed and the image's own number, and
    the smallest of each class take the nearest patches' place.
    """
    key = jax.random.key(seed)

    def rule(_: Output, labels: Array, batch: dict[str, Array]) -> tuple[Array, Array]:
        size = labels.shape[1:]
        drawn = jax.vmap(lambda n: jax.random.uniform(jax.random.fold_in(key, n), size))
        candidates = labels[..., None] == jnp.arange(num_classes)
        return jnp.broadcast_to(drawn(batch["index"])[..., None], candidates.shape), candidates

    return rule


def make_step(inference: Inference, rule: Rule, k: int) -> Callable:
    """One batch's part of a search, step(table, variables, batch) → table, for `DevicePool.map`."""

    def step(table: Patches, variables: Any, batch: dict[str, Array]) -> Patches:
        output = inference(variables, batch["image"])
        labels = shrink_labels(batch["label"], batch["size"], output.features.shape[1:3])
        values, candidates = rule(output, labels, batch)
        real = (batch["index"] >= 0)[:, None, None, None]
        found = nearest_per_image(
            output.features, values, candidates & real, labels, batch["index"]
        )
        return merge(table, found, k)

    return step


def search(
    experiment: Experiment,
    inference: Inference,
    variables: Any,
    rule: Rule,
    start: Patches,
    title: str,
    done: int = 0,
    after_batch: Callable[[int, Callable[[], Patches]], None] | None = None,
) -> Patches:
    """Run a search over the projection split on every device, its progress shown.

    Args:
      experiment: its examples and devices.
      inference: the model; its features and exact distances are what will be met at inference.
      variables: the model's (unreplicated).
      rule: what is searched, and where.
      start: an `empty` table, or the best so far of a search that goes on.
      title: of the search, for who waits.
      done: examples already searched.
      after_batch: called after each batch but the last with the examples done and a function that
        fetches the best so far.

    Returns:
      The table as NumPy arrays.
    """
    pool, (m, k, features) = experiment.pool, start.feature.shape
    split = experiment.config.data.projection_split
    total, stride = len(experiment.examples(split)), experiment.eval_batch_size * pool.processes
    mapped = pool.map(make_step(inference, rule, k), donate_argnums=(0,))
    tables, variables = pool.replicate(empty(m, k, features)), pool.replicate(variables)

    def best() -> Patches:
        parts, result = pool.all(tables), start
        for device in range(pool.total):
            result = merge(result, jax.tree.map(lambda x, d=device: x[d], parts), k)
        return jax.tree.map(np.asarray, result)

    counts: collections.deque[int] = collections.deque()  # of batches on their way

    def counted() -> Iterator[dict[str, np.ndarray]]:
        for batch in experiment.eval_batches(split, done):
            filled = int((batch["index"] >= 0).sum()) if pool.processes == 1 else stride
            counts.append(filled)
            yield batch

    with Progress(title, total, done, unit="image") as progress:
        for batch in pool.prefetch(counted()):
            tables = mapped(tables, variables, batch)
            progress.update(min(counts.popleft(), total - progress.done))
            if after_batch and progress.done < total:
                after_batch(progress.done, best)
    return best()


def resumable(live: Live, start: Checkpoint, clock: Clock, rule: Rule, k: int) -> Patches:
    """The k nearest patches of every prototype by a rule, as a phase.

    Its best so far is saved now and then and when the run is asked to stop; a `start` inside the
    phase goes on from there.

    Raises:
      Interrupted: asked to stop, and saved.
    """
    experiment, every = live.experiment, live.experiment.config.checkpoint_every
    stride = experiment.eval_batch_size * experiment.pool.processes
    table, done = empty(len(start.prototypes), k, experiment.config.model.features), 0
    if clock.resumed:
        table, done = Patches(**start.arrays["search"]), start.step

    def after_batch(done: int, best: Callable[[], Patches]) -> None:
        stop = live.asked_to_stop()
        if stop or (every and done // stride % every == 0):
            arrays = {n: start.arrays[n] for n in ("params", "frozen")}
            arrays["search"] = vars(best())
            live.workdir.checkpoints.save(clock.checkpoint(done, arrays, finished=False))
        if stop:
            raise Interrupted(stop)

    inference, title = experiment.inference(start.prototypes), clock.phase
    return search(experiment, inference, start.variables, rule, table, title, done, after_batch)
