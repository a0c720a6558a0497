"""The k nearest training patches of every prototype: one pmap'd pass over a data set.

Each device keeps its own running best (squared distance, feature, image, row, col and class of each
prototype's patches) and merges every batch into it; only the final tables reach the host. From one
image at most one patch, the nearest, can be among a prototype's k. Ties go to the lower image
number, then to the earlier point in row-major order, so the result does not depend on how images
fall to devices.
"""

from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from protoseg_jax.data.label_sets import VOID
from protoseg_jax.devices import DevicePool
from protoseg_jax.inference import Inference, shrink_labels

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


def make_search_step(
    inference: Inference, prototype_classes: np.ndarray, *, k: int, within_class: bool
) -> Callable:
    """One batch's part of the search, to be mapped by `DevicePool.map`.

    Args:
      inference: the model; its features and exact distances are what will be met at inference.
      prototype_classes: [M].
      k: patches kept a prototype.
      within_class: candidates are the points of the prototype's own class (Y_Z = c(j)); else all
        non-void points.
    """
    own = jnp.array(prototype_classes)

    def step(table: Patches, variables, batch) -> Patches:
        output = inference(variables, batch["image"])
        size = output.features.shape[1:3]
        labels = shrink_labels(batch["label"], batch["size"], size)
        real = (batch["index"] >= 0)[:, None, None, None]
        if within_class:
            candidates = labels[..., None] == own
        else:
            candidates = jnp.broadcast_to((labels != VOID)[..., None], output.distances.shape)
        found = nearest_per_image(
            output.features, output.distances, candidates & real, labels, batch["index"]
        )
        return merge(table, found, k)

    return step


def make_sample_step(inference: Inference, num_classes: int, *, k: int, seed: int) -> Callable:
    """As `make_search_step`, for k random points of each class, no two of one image.

    Every point of an image draws a number in [0, 1), by the seed and the image's own number, and
    the smallest of each class take the nearest patches' place: row c of the table is class c's.
    """
    key = jax.random.key(seed)

    def step(table: Patches, variables, batch) -> Patches:
        features = inference(variables, batch["image"]).features
        size = features.shape[1:3]
        labels = shrink_labels(batch["label"], batch["size"], size)
        drawn = jax.vmap(lambda n: jax.random.uniform(jax.random.fold_in(key, n), size))
        candidates = labels[..., None] == jnp.arange(num_classes)
        found = nearest_per_image(
            features,
            jnp.broadcast_to(drawn(batch["index"])[..., None], candidates.shape),
            candidates & (batch["index"] >= 0)[:, None, None, None],
            labels,
            batch["index"],
        )
        return merge(table, found, k)

    return step


def make_fallback_step(inference: Inference, c: int) -> Callable:
    """As `make_search_step`, for a class without a point in Y_Z: cells with any pixel of it."""

    def step(table: Patches, variables, batch) -> Patches:
        output = inference(variables, batch["image"])
        size = output.features.shape[1:3]
        labels = shrink_labels(batch["label"], batch["size"], size)
        cells = contains_class(batch["label"], batch["size"], size, c)
        candidates = (cells & (batch["index"] >= 0)[:, None, None])[..., None]
        found = nearest_per_image(
            output.features,
            output.distances,
            jnp.broadcast_to(candidates, output.distances.shape),
            labels,
            batch["index"],
        )
        return merge(table, found, 1)

    return step


def search(
    pool: DevicePool,
    step: Callable,
    variables: Any,
    batches: Iterable[dict[str, np.ndarray]],
    start: Patches,
    after_batch: Callable[[Callable[[], Patches]], None] | None = None,
) -> Patches:
    """Run a search step over a data set on every device.

    Args:
      pool: the devices.
      step: from `make_search_step` or `make_fallback_step`.
      variables: the model's variables (unreplicated).
      batches: evaluation batches ("image", "label", "size", "index").
      start: an `empty` table, or the best so far of a search that goes on; `batches` are the rest.
      after_batch: called after each batch with a function that fetches the best so far.

    Returns:
      The table as NumPy arrays.
    """
    m, k, features = start.feature.shape
    mapped = pool.map(step, donate_argnums=(0,))
    tables = pool.replicate(empty(m, k, features))
    variables = pool.replicate(variables)

    def best() -> Patches:
        parts = pool.all(tables)
        result = start
        for device in range(pool.total):
            result = merge(result, jax.tree.map(lambda x, d=device: x[d], parts), k)
        return jax.tree.map(np.asarray, result)

    for batch in pool.prefetch(batches):
        tables = mapped(tables, variables, batch)
        if after_batch:
            after_batch(best)
    return best()
