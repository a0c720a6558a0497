"""Part agreement: whether prototypes divide the points of a class as its parts do.

Figure 8 of the paper as a number. Over the points of a class that have a part label, which
prototype *of the class* is the most similar is compared with the true part, as clusterings are:
homogeneity (a prototype's points are of one part), completeness (a part's points belong to few
prototypes) and their harmonic mean V, each adjusted for chance. No threshold, and any shape of
part.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import gammaln, xlogy

from protoseg_jax.evaluation import parts
from protoseg_jax.evaluation.measures import Context, Measure, Seen, absent
from protoseg_jax.evaluation.utilisation import most_similar

TITLES = (
    ("part_agreement.v", "part agreement V", 100),
    *((f"part_agreement.v_{n}", f"part agreement V: {n}", 100) for n in parts.CONTROLS),
    ("part_agreement.homogeneity", "homogeneity", 100),
    ("part_agreement.completeness", "completeness", 100),
    ("part_agreement.prototypes_that_win", "prototypes that win points with a part", 1),
)

_NOTHING = 1e-10  # nats, more than what rounding leaves of I − E where both are equal


def make(context: Context) -> Measure:
    """`figures` of the tables over a split."""
    if not context.experiment.data.part_names:
        return absent("part_agreement")
    of_part = parts.census(context).classes
    names = context.experiment.labels.names, context.experiment.data.part_names

    def finish(tables: dict[str, np.ndarray]) -> dict[str, Any]:
        return {"part_agreement": figures(tables, of_part, context.inference.classes, *names)}

    return Measure(_step, finish, inputs=parts.inputs(context))


def _step(seen: Seen) -> dict[str, Int[Array, "k n"]]:
    """Points of one image by their part and their prototype, and by what the controls put in the
    prototype's place."""
    part, classes = parts.own_parts(seen), seen.inference.classes
    similarities, size = seen.output.similarities, len(classes)
    of_random, of_oracle = jax.random.split(jax.random.fold_in(seen.key, 5))
    chosen = {
        "prototype": (
            most_similar(similarities, seen.labels, classes),
            size,
        ),
        "position": (parts.cells(seen), parts.CELLS),
        "random": (parts.random_prototypes(seen, of_random), size),
        "oracle": (parts.oracle_prototypes(seen, part, of_oracle), size),
    }
    count = len(seen.batch["part_classes"])
    return {name: _table(part, column, count, n) for name, (column, n) in chosen.items()}


def _table(
    part: Int[Array, "h w"], column: Int[Array, "h w"], num_parts: int, columns: int
) -> Int[Array, "k n"]:
    """Points by part and column, those that have both."""
    counted = (part >= 0) & (column >= 0) & (column < columns)
    cell = jnp.where(counted, part * columns + column, num_parts * columns)
    counts = jnp.zeros(num_parts * columns + 1, jnp.int32).at[cell.reshape(-1)].add(1)
    return counts[:-1].reshape(num_parts, columns)


def figures(
    tables: dict[str, Int[np.ndarray, "k n"]],
    part_classes: Int[np.ndarray, " k"],
    prototype_classes: Int[np.ndarray, " m"],
    class_names: tuple[str, ...],
    part_names: tuple[str, ...],
) -> dict[str, Any]:
    """V and its controls, mean over the classes that can be judged; each class by itself.

    Args:
      tables: points by part and "prototype", cell ("position"), and the prototypes of "random" and
        "oracle".
      part_classes: the class of each part; −1 for one that is nowhere.
      prototype_classes: c(j).
      class_names: of C classes.
      part_names: of "no part" and the K parts.

    Returns:
      "v", "homogeneity", "completeness", "v_position", "v_random", "v_oracle": None where no class
      can be judged; "prototypes_that_win": how many are the most similar at some point with a part;
      "left_out": the classes with one part or one prototype that wins; "classes": by name, the
      figures of each class, its parts, its prototypes (positions in [0, M)) and its table of
      points, [parts][prototypes].
    """
    classes, left_out = {}, []
    keys = ("v", "homogeneity", "completeness", *(f"v_{name}" for name in parts.CONTROLS))
    for c in np.unique(part_classes[part_classes >= 0]).tolist():
        rows, own = np.flatnonzero(part_classes == c), np.flatnonzero(prototype_classes == c)
        table = tables["prototype"][rows][:, own]
        found = dict.fromkeys(keys)
        if min(table.any(1).sum(), table.any(0).sum()) > 1:
            found.update(zip(keys, agreement(table), strict=False))
            found |= {f"v_{name}": agreement(tables[name][rows])[0] for name in parts.CONTROLS}
        else:
            left_out.append(class_names[c])
        classes[class_names[c]] = {
            **found,
            "parts": [part_names[k + 1] for k in rows],
            "prototypes": own.tolist(),
            "table": table.tolist(),
        }
    judged = [entry for entry in classes.values() if entry["v"] is not None]
    means = {key: float(np.mean([e[key] for e in judged])) if judged else None for key in keys}
    wins = int((tables["prototype"] > 0).any(0).sum())
    return {**means, "prototypes_that_win": wins, "left_out": left_out, "classes": classes}


def standing_for(found: dict[str, Any] | None, count: int) -> list[tuple[str, float, float] | None]:
    """Of each prototype the part that it stands for: (name, share of the points at which it is the
    most similar of its class, the part's share of the class's points).

    None where no part's share is more than its area, which it would be by chance: such a prototype
    stands for no part. Points without a part label are left out.

    Args:
      found: what `figures` gives; None of a data set without parts.
      count: M.
    """
    result: list[tuple[str, float, float] | None] = [None] * count
    for entry in (found or {"classes": {}})["classes"].values():
        table = np.array(entry["table"], np.float64)
        areas = table.sum(1) / max(table.sum(), 1)
        for j, points in zip(entry["prototypes"], table.T, strict=True):
            shares = points / max(points.sum(), 1)
            above = np.where(shares > areas, shares, 0.0)
            if above.any():
                k = int(above.argmax())
                result[j] = entry["parts"][k], float(shares[k]), float(areas[k])
    return result


def that_stand_for(part: str, standing: Sequence[tuple[str, float, float] | None]) -> list[int]:
    """The prototypes, of those that `standing_for` judged, which stand for a part."""
    return [j for j, found in enumerate(standing) if found and found[0] == part]


def agreement(table: Int[np.ndarray, "k n"]) -> tuple[float, float, float]:
    """(V, homogeneity, completeness) of points by part and prototype, each adjusted for chance.

    With the mutual information I, its expectation E under permutation and the entropies H,
    h = (I − E) / (H(part) − E), c = (I − E) / (H(prototype) − E), V = 2hc / (h + c); 0 where I ≤ E.
    """
    rows, columns = table.sum(1), table.sum(0)
    total = table.sum()
    known, chance = information(table), expected_information(rows, columns)
    above = known - chance
    if total == 0 or above <= _NOTHING:
        return 0.0, 0.0, 0.0
    h, c = (min(above / (_entropy(counts) - chance), 1.0) for counts in (rows, columns))
    return float(2 * h * c / (h + c)), float(h), float(c)


def _entropy(counts: Int[np.ndarray, " n"]) -> float:
    share = counts / max(counts.sum(), 1)
    return float(-xlogy(share, share).sum())


def information(table: Int[np.ndarray, "k n"]) -> float:
    """Mutual information of rows and columns, in nats."""
    share = table / max(table.sum(), 1)
    rows, columns = share.sum(1, keepdims=True), share.sum(0, keepdims=True)
    return float((xlogy(share, share) - xlogy(share, rows) - xlogy(share, columns)).sum())


def expected_information(rows: Int[np.ndarray, " k"], columns: Int[np.ndarray, " n"]) -> float:
    """E[I] over all tables with these sums, equally likely as permutations of the points are (Vinh
    et al. 2010, eq. 24a), in nats.

    A cell's count is hypergeometric. Counts so far from its mean that all of them together have a
    probability below e^−50 are left out, which keeps the sum short where there are many points.
    """
    rows, columns = (x[x > 0].astype(np.int64) for x in (rows, columns))
    total = int(rows.sum())
    expected = 0.0
    for a in rows:
        for b in columns:
            mean = a * b / total
            variance = mean * (total - a) / total * (total - b) / max(total - 1, 1)
            reach = 10 * np.sqrt(variance) + 100  # Bernstein's inequality
            low = max(1, a + b - total, int(mean - reach))
            n = np.arange(low, min(a, b, int(mean + reach)) + 1, dtype=np.float64)
            log_p = _log_choose(b, n) + _log_choose(total - b, a - n) - _log_choose(total, a)
            terms = np.exp(log_p) * n / total * (np.log(n) + np.log(total / a) - np.log(b))
            expected += float(terms.sum())
    return expected


def _log_choose(n: Float[np.ndarray, "*s"], k: Float[np.ndarray, "*s"]) -> np.ndarray:
    return gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)
