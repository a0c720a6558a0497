"""How far to trust an explanation: METHOD's measures over a split, in one pass on the devices.

* utilisation (Fig. 5): which prototype of its own class each point is most similar to;
* sparsity: how many prototypes make up a decision;
* faithfulness: whether taking away what is said to have decided changes the decision;
* consistency and stability (Huang et al. 2023), where images have part labels: whether a prototype
  stands for a part, and still does when noise is added;
* novelty: distance to the nearest prototype, tested on a class that training never saw.

The sums over images and devices are exact whatever their order; sampling is by each image's number,
so that N devices measure what one does.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Bool, Float, Int, UInt8

from protoseg_jax.data.label_sets import VOID
from protoseg_jax.devices import DevicePool, psum
from protoseg_jax.inference import Inference, shrink_labels

SHARE = 0.95  # of the winning logit's positive part (sparsity)
ACTIVE = (4, 5)  # the 80 % quantile above which a prototype is active (consistency)
CONSISTENT = 0.8  # of the images a part is visible in
NOISE = 0.2  # σ on the normalised image (stability)
SAMPLES = 64  # points an image (faithfulness)
_SEED = 0

# Key, name and factor (100: shown in per cent) of the measures that tables show.
MEASURES = (
    ("utilisation", "utilisation", 100),
    ("unused", "prototypes that win no point", 1),
    ("sparsity", "sparsity: prototypes a decision", 1),
    ("faithfulness", "faithfulness: area between the curves", 100),
    ("consistency", "consistency", 100),
    ("stability", "stability", 100),
    ("novelty_auroc", "novelty AUROC of the held-out class", 100),
)

_CENTROIDS_STEP = 32  # numbers of centroids are padded to multiples of this: few are compiled


class Sums(NamedTuple):
    """Sums over images; M prototypes, K parts.

    Attributes:
      wins: [m] points of its own class that a prototype is the most similar one to.
      needed, points: prototypes that made up the decisions, and points with a decision.
      survivors, random_survivors: [m + 1] sampled points whose label outlived the removal of so
        many prototypes, by contribution and at random.
      samples: sampled points.
      hits: [k m] images in which a prototype hit a part.
      visible: [k] images in which a part is visible.
      unchanged, pairs: (prototype, image) pairs whose hits are the same under noise, and all.
    """

    wins: Int[Array, " m"]
    needed: Int[Array, ""]
    points: Int[Array, ""]
    survivors: Int[Array, " n"]
    random_survivors: Int[Array, " n"]
    samples: Int[Array, ""]
    hits: Int[Array, "k m"]
    visible: Int[Array, " k"]
    unchanged: Int[Array, ""]
    pairs: Int[Array, ""]


def wins(
    similarities: Float[Array, "h w m"],
    labels: Int[Array, "h w"],
    prototype_classes: Int[np.ndarray, " m"],
) -> Int[Array, " m"]:
    """Points of each prototype's class at which it is the most similar of them; ties go to the
    first."""
    own = labels[..., None] == jnp.asarray(prototype_classes)
    best = jnp.where(own, similarities, -jnp.inf).argmax(-1)
    winners = jnp.where(own.any(-1), best, similarities.shape[-1])
    return jnp.zeros(similarities.shape[-1] + 1, jnp.int32).at[winners.reshape(-1)].add(1)[:-1]


def prototypes_needed(
    similarities: Float[Array, "*n m"], logits: Float[Array, "*n c"], kernel: Float[Array, "m c"]
) -> Int[Array, "*n"]:
    """Fewest prototypes whose contributions to the winning logit make up 95 % of its positive part;
    0 where nothing speaks for it."""
    contributions = jnp.maximum(similarities * kernel.T[logits.argmax(-1)], 0.0)
    shares = jnp.cumsum(-jnp.sort(-contributions, axis=-1), axis=-1)
    total = shares[..., -1]
    return jnp.where(total > 0, 1 + (shares < SHARE * total[..., None]).sum(-1), 0)


def survivors(
    similarities: Float[Array, "s m"], kernel: Float[Array, "m c"], order: Int[Array, "s m"]
) -> Bool[Array, "s n"]:
    """Whether each point's label is still the only winner after the first k prototypes of its order
    are removed, k = 0 … M; without any prototype nothing wins."""
    ordered = jnp.take_along_axis(similarities, order, axis=1)
    terms = ordered[..., None] * kernel[order]
    left = jnp.flip(jnp.cumsum(jnp.flip(terms, 1), 1), 1)
    left = jnp.concatenate([left, jnp.zeros_like(left[:, :1])], 1)  # [s n c]
    label = left[:, 0].argmax(-1)
    own = jnp.take_along_axis(left, label[:, None, None], axis=2)[..., 0]
    others = jnp.where(jnp.arange(kernel.shape[1]) == label[:, None, None], -jnp.inf, left).max(-1)
    return own > others


def by_margin(similarities: Float[Array, "s m"], kernel: Float[Array, "m c"]) -> Int[Array, "s m"]:
    """Prototypes by their contribution to the winner's margin over the runner-up, largest first."""
    logits = jnp.matmul(similarities, kernel, precision=jax.lax.Precision.HIGHEST)
    winner, runner_up = jnp.moveaxis(jax.lax.top_k(logits, 2)[1], -1, 0)
    margins = similarities * (kernel.T[winner] - kernel.T[runner_up])
    return jnp.argsort(-margins, axis=-1)


def part_hits(
    similarities: Float[Array, "h w m"],
    labels: Int[Array, "h w"],
    prototype_classes: Int[np.ndarray, " m"],
    centroids: Int[Array, "n 3"],
    num_parts: int,
) -> Bool[Array, "k m"]:
    """Whether a prototype's active points contain the centroid of a component of a part.

    A prototype is active on the points of its class whose similarity is at or above its (linear)
    80 % quantile over them.

    Args:
      similarities: eq. 1.
      labels: Y_Z.
      prototype_classes: c(j).
      centroids: (part, row, col) on the feature map; part −1 for a filling.
      num_parts: K.
    """
    own = (labels[..., None] == jnp.asarray(prototype_classes)).reshape(-1, similarities.shape[-1])
    values = jnp.where(own, similarities.reshape(own.shape), jnp.inf)
    # x ≥ the linear quantile means x ≥ the ⌈0.8 (n − 1)⌉-th smallest value.
    above, whole = ACTIVE
    rank = -(-above * (own.sum(0) - 1) // whole)
    cut = jnp.take_along_axis(jnp.sort(values, 0), jnp.maximum(rank, 0)[None], axis=0)
    active = (own & (values >= cut)).reshape(similarities.shape)
    part, row, col = centroids.T
    at = active[row, col] & (part >= 0)[:, None]
    of = part[:, None] == jnp.arange(num_parts)
    return (of[:, :, None] & at[:, None]).any(0)


def centroids_of(
    parts: UInt8[np.ndarray, "H W"], feature_size: tuple[int, int]
) -> list[tuple[int, int, int]]:
    """(part, row, col) of the centroid of each connected component of each part, on the map.

    Args:
      parts: numbers from 1; 0 and void are no part. Parts count from 0 in the result.
      feature_size: (h, w).
    """
    found = []
    for number in np.unique(parts[(parts > 0) & (parts != VOID)]).tolist():
        components, _, _, middles = cv2.connectedComponentsWithStats(
            (parts == number).astype(np.uint8)
        )
        for x, y in middles[1:components]:
            row, col = (
                min(int((v + 0.5) * n / size), n - 1)
                for v, n, size in zip((y, x), feature_size, parts.shape, strict=True)
            )
            found.append((number - 1, row, col))
    return found


def part_classes(source: Any, num_parts: int, num_classes: int) -> Int[np.ndarray, " k"]:
    """The class that most pixels of each part have; −1 for a part that is nowhere.

    Args:
      source: random-access examples ("label", "parts").
      num_parts: K.
      num_classes: C.
    """
    counts = np.zeros(256 * 256, np.int64)
    for number in range(len(source)):
        example = source[number]
        cells = 256 * example["parts"].astype(np.int64) + example["label"]
        counts += np.bincount(cells.ravel(), minlength=len(counts))
    counts = counts.reshape(256, 256)[1 : num_parts + 1, :num_classes]
    return np.where(counts.any(1), counts.argmax(1), -1)


def with_centroids(
    batches: Iterable[dict[str, np.ndarray]], examples: Any, feature_size: tuple[int, int]
) -> Iterator[dict[str, np.ndarray]]:
    """Evaluation batches with "centroids" [B n 3] of `centroids_of`, filled up with part −1."""
    for batch in batches:
        found = [
            centroids_of(examples[int(n)]["parts"], feature_size) if n >= 0 else []
            for n in batch["index"]
        ]
        longest = max(map(len, found))
        room = max(-(-longest // _CENTROIDS_STEP), 1) * _CENTROIDS_STEP
        table = np.full((len(found), room, 3), 0, np.int32)
        table[..., 0] = -1
        for row, rows in zip(table, found, strict=True):
            if rows:
                row[: len(rows)] = rows
        yield {**batch, "centroids": table}


def make_step(
    inference: Inference,
    prototype_classes: np.ndarray,
    part_classes: np.ndarray,
    held_out: int | None,
) -> Callable:
    """step(variables, batch) → (psum'd Sums, novelty and labels of the points or None).

    Args:
      inference: the model.
      prototype_classes: c(j), [M].
      part_classes: the class of each part, [K]; without parts the batch needs no "centroids".
      held_out: a class whose points count for novelty alone, as void does for nothing; with one,
        novelty and Y_Z of all points are returned too.
    """
    model, num_parts = inference.model, len(part_classes)
    own_parts = jnp.asarray(part_classes)[:, None] == jnp.asarray(prototype_classes)

    def measure(variables, image, label, size, index, centroids):
        kernel = variables["params"]["head"]["kernel"]
        key = jax.random.fold_in(jax.random.key(_SEED), index)
        pick, shuffle, noise = jax.random.split(key, 3)
        output = jax.tree.map(lambda x: x[0], inference(variables, image[None]))
        similarities, map_size = output.similarities, output.features.shape[:2]
        points = shrink_labels(label[None], size[None], map_size)[0]
        points = jnp.where(index >= 0, points, VOID)
        valid = (points != VOID).reshape(-1)
        if held_out is not None:
            valid &= (points != held_out).reshape(-1)

        # Row by row, so that no second map of M values is kept.
        needed = jax.lax.map(lambda x: prototypes_needed(*x, kernel), (similarities, output.logits))
        needed = jnp.where(valid, needed.reshape(-1), 0)

        draw = jnp.where(valid, jax.random.uniform(pick, valid.shape), -1.0)
        drawn, at = jax.lax.top_k(draw, min(SAMPLES, len(valid)))
        sampled = similarities.reshape(len(valid), -1)[at]
        random = jax.random.permutation(
            shuffle,
            jnp.broadcast_to(jnp.arange(sampled.shape[1]), sampled.shape),
            axis=1,
            independent=True,
        )
        counted = (drawn >= 0)[:, None]
        stays = [
            (survivors(sampled, kernel, order) & counted).sum(0)
            for order in (by_margin(sampled, kernel), random)
        ]

        hits = jnp.zeros((num_parts, len(prototype_classes)), jnp.int32)
        visible, unchanged, pairs = jnp.zeros(num_parts, jnp.int32), 0, 0
        if num_parts:
            arguments = (points, prototype_classes, centroids, num_parts)
            found = part_hits(similarities, *arguments)
            normalised = inference.preprocessing.normalise(image[None])
            noisy = model.apply(
                variables, normalised + NOISE * jax.random.normal(noise, normalised.shape)
            )
            same = (found == part_hits(noisy.similarities[0], *arguments)).all(0)
            seen = (centroids[:, :1] == jnp.arange(num_parts)).any(0)
            # Elsewhere a prototype could hit nothing, with noise or without.
            own = (points[..., None] == jnp.asarray(prototype_classes)).any((0, 1))
            own &= (own_parts & seen[:, None]).any(0)
            hits, visible = found.astype(jnp.int32), seen.astype(jnp.int32)
            unchanged, pairs = (same & own).sum(), own.sum()
        sums = Sums(
            wins=wins(similarities, points, prototype_classes),
            needed=needed.sum(),
            points=(needed > 0).sum(),
            survivors=stays[0],
            random_survivors=stays[1],
            samples=counted.sum(),
            hits=hits,
            visible=visible,
            unchanged=jnp.int32(unchanged),
            pairs=jnp.int32(pairs),
        )
        return sums, None if held_out is None else (output.distances.min(-1), points)

    def step(variables, batch):
        images = [batch[k] for k in ("image", "label", "size", "index")]
        images.append(batch.get("centroids", jnp.zeros((len(images[0]), 0, 3), jnp.int32)))
        sums, distances = jax.lax.map(lambda x: measure(variables, *x), tuple(images))
        return psum(jax.tree.map(lambda x: x.sum(0), sums)), distances

    return step


def measures(
    pool: DevicePool,
    inference: Inference,
    variables: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    prototype_classes: np.ndarray,
    part_classes: np.ndarray,
    held_out: int | None = None,
) -> dict[str, Any]:
    """All measures of a model over a split.

    Args:
      pool: the devices.
      inference: the model.
      variables: its variables (unreplicated).
      batches: evaluation batches, `with_centroids` if there are parts.
      prototype_classes: c(j), [M].
      part_classes: the class of each part, [K]; empty without part labels.
      held_out: a class that training never saw, but the batches' labels hold.

    Returns:
      See `from_sums`; and with a class held out "novelty_auroc", its points against the rest.
    """
    step = pool.map(make_step(inference, prototype_classes, part_classes, held_out))
    variables = pool.replicate(variables)
    total, novelty = None, []
    for batch in pool.prefetch(batches):
        sums, points = step(variables, batch)
        sums = jax.tree.map(lambda x: x.astype(np.int64), pool.first(sums))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        if points is not None:
            distances, labels = (x.reshape(-1) for x in pool.all(points))
            novelty.append((distances[labels != VOID], labels[labels != VOID]))
    result = from_sums(total, prototype_classes, part_classes)
    if held_out is not None:
        distances, labels = (np.concatenate(x) for x in zip(*novelty, strict=True))
        result["novelty_auroc"] = auroc(distances, labels == held_out)
    return result


def from_sums(
    sums: Sums, prototype_classes: np.ndarray, part_classes: np.ndarray
) -> dict[str, Any]:
    """The measures, fractions but for `sparsity`; None where there is nothing to measure.

    Returns:
      "utilisation": entropy of each class's wins over the log of its number of prototypes, mean
      over the classes with two or more prototypes and a point; "unused": prototypes without a win;
      "wins": by prototype; "sparsity"; "faithfulness": the area between the curves, mean over k of
      the share that survives random removals less that of removals by contribution;
      "survival" and "random_survival": the curves, k = 0 … M; "consistency" and "stability": over
      the prototypes of classes with parts.
    """
    entropies = []
    for c in np.unique(prototype_classes):
        own = sums.wins[prototype_classes == c]
        if len(own) > 1 and own.sum():
            share = own[own > 0] / own.sum()
            entropies.append(float(-(share * np.log(share)).sum() / np.log(len(own))))
    area = float((sums.random_survivors - sums.survivors).mean())
    curves = [
        (x / sums.samples).tolist() if sums.samples else None
        for x in (sums.survivors, sums.random_survivors)
    ]
    result = {
        "utilisation": float(np.mean(entropies)) if entropies else None,
        "unused": int((sums.wins == 0).sum()),
        "wins": sums.wins.tolist(),
        "sparsity": float(sums.needed / sums.points) if sums.points else None,
        "faithfulness": area / float(sums.samples) if sums.samples else None,
        "survival": curves[0],
        "random_survival": curves[1],
        "consistency": None,
        "stability": None,
    }
    judged = np.isin(prototype_classes, part_classes)
    if judged.any():
        # A part of another class is never hit, for only points of a prototype's own are active.
        often = sums.hits > CONSISTENT * sums.visible[:, None]
        consistent = (often & (sums.visible > 0)[:, None]).any(0)
        result["consistency"] = float(consistent[judged].mean())
        result["stability"] = float(sums.unchanged / sums.pairs) if sums.pairs else None
    return result


def auroc(scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float | None:
    """Probability that a positive scores higher than a negative, ties half; None without either."""
    count, rest = int(positive.sum()), int((~positive).sum())
    if not (count and rest):
        return None
    ranks = scipy.stats.rankdata(scores)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * rest))


def table(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The measures that there are as (name, value) for people."""
    return [
        (name, f"{scale * found[key]:.2f} %" if scale == 100 else f"{found[key]:.4g}")
        for key, name, scale in MEASURES
        if found.get(key) is not None
    ]
