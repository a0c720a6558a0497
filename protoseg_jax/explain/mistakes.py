"""Mistakes: where labels are wrong, between which classes, and which prototypes caused them."""

import collections
from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from protoseg_jax.data.labels import VOID

_CONFUSIONS, _REGIONS, _CAUSES = 12, 6, 6  # shown: kinds, regions of a kind, prototypes of a region
_REGION_SAMPLES = 256  # pixels of a region whose evidence is averaged


def wrong_regions(
    labels: UInt8[np.ndarray, "H W"], truth: UInt8[np.ndarray, "H W"], num_classes: int
) -> list[dict[str, Any]]:
    """Connected regions of one true class that were taken for one other, largest first.

    Returns:
      {"truth", "label", "pixels", "box", "row", "col": the pixel furthest inside, "samples": rows
      and cols of some of its pixels, evenly chosen} of each.
    """
    found = []
    wrong = (truth != VOID) & (labels != truth)
    kinds = np.where(wrong, truth.astype(np.int32) * num_classes + labels, -1)
    for kind in np.unique(kinds[wrong]).tolist():
        count, marks, stats, _ = cv2.connectedComponentsWithStats((kinds == kind).astype(np.uint8))
        largest = 1 + np.argsort(-stats[1:count, cv2.CC_STAT_AREA], kind="stable")[:_REGIONS]
        for n in largest.tolist():
            left, top, width, height, area = stats[n].tolist()
            inside = marks[top : top + height, left : left + width] == n
            depth = cv2.distanceTransform(np.pad(inside, 1).astype(np.uint8), cv2.DIST_L2, 3)
            row, col = np.unravel_index(depth[1:-1, 1:-1].argmax(), inside.shape)
            rows, cols = np.nonzero(inside)
            chosen = np.linspace(0, len(rows) - 1, _REGION_SAMPLES).astype(int)
            found.append(
                {
                    "truth": kind // num_classes,
                    "label": kind % num_classes,
                    "pixels": area,
                    "box": [top, left, top + height, left + width],
                    "row": top + int(row),
                    "col": left + int(col),
                    "samples": (top + rows[chosen], left + cols[chosen]),
                }
            )
    return sorted(found, key=lambda r: -r["pixels"])


def causes(
    similarities: Float[np.ndarray, "n m"], kernel: Float[np.ndarray, "m c"], label: int, truth: int
) -> list[tuple[int, float]]:
    """Prototypes that argued most for a wrong class and against the true one.

    Returns:
      (position, mean contribution to the margin of `label` over `truth`), largest first.
    """
    margins = similarities.mean(0) * (kernel[:, label] - kernel[:, truth])
    return [(int(j), float(margins[j])) for j in np.argsort(-margins, kind="stable")[:_CAUSES]]


def confusions(images: Iterable[Any], num_classes: int) -> list[dict[str, Any]]:
    """The kinds of mistake in images, by pixels, with their largest regions.

    Args:
      images: with `labels`, `truth` (None: nothing is known of it) and `regions` (of
        `wrong_regions`).
      num_classes: C.

    Returns:
      {"truth", "label", "pixels": so labelled, "of": pixels of the true class, "regions": each with
      the number of its "image"}.
    """
    table = np.zeros((num_classes, num_classes), np.int64)
    regions = collections.defaultdict(list)
    for number, image in enumerate(images):
        if image.truth is None:
            continue
        valid = image.truth != VOID
        cells = image.truth[valid].astype(np.int64) * num_classes + image.labels[valid]
        table += np.bincount(cells, minlength=num_classes**2).reshape(table.shape)
        for region in image.regions:
            regions[region["truth"], region["label"]].append({**region, "image": number})
    wrong = table * (1 - np.eye(num_classes, dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS].tolist()
    return [
        {
            "truth": truth,
            "label": label,
            "pixels": int(wrong[truth, label]),
            "of": int(table[truth].sum()),
            "regions": sorted(regions[truth, label], key=lambda r: -r["pixels"])[:_REGIONS],
        }
        for truth, label in (divmod(cell, num_classes) for cell in order)
        if wrong[truth, label]
    ]
