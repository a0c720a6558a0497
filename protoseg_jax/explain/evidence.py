"""Why a point or a pixel got its label: sums that add up to the logit that decided.

At a point of the feature map, logit_c = Σ_j similarity_j · w_h[j, c] (section 3.1, no bias): the
terms are the prototypes' *contributions* to class c, and similarity_j · (w_h[j, a] − w_h[j, b])
theirs to the margin of a over b. A pixel's logits are bilinear in those of the points around it
(docs/method.md), and so are its similarities: the same sums hold at every pixel.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from protoseg_jax.evaluation.measures import Context, Measure, Seen, take
from protoseg_jax.evaluation.segmentation import upsample_at
from protoseg_jax.evaluation.utilisation import wins
from protoseg_jax.models.protoseg import Output
from protoseg_jax.run.finished import Finished


@flax.struct.dataclass
class PointEvidence:
    """What decides at every point of feature maps. Prototypes are positions in [0, M).

    Attributes:
      features: z.
      similarities: eq. 1.
      logits: of each class.
      label: the winning class.
      prototype: the winning prototype, of the largest contribution to the winning class.
      novelty: min_j ‖z − p_j‖²: how far the point is from all that the model knows. Of directions
        minus the strongest one's s, which is not meant as that.
    """

    features: Float[Array, "*b h w d"]
    similarities: Float[Array, "*b h w m"]
    logits: Float[Array, "*b h w c"]
    label: Int[Array, "*b h w"]
    prototype: Int[Array, "*b h w"]
    novelty: Float[Array, "*b h w"]


@flax.struct.dataclass
class PixelEvidence:
    """What decides at n pixels of one image.

    Attributes:
      logits: of each class, as upsampled for the segmentation.
      similarities: eq. 1, upsampled alike.
      label: the winning class.
      runner_up: the class of the second highest logit.
      contributions: to the winner's logit; they sum to it.
      margins: to the winner's margin over the runner-up; they sum to it.
    """

    logits: Float[Array, "n c"]
    similarities: Float[Array, "n m"]
    label: Int[Array, " n"]
    runner_up: Int[Array, " n"]
    contributions: Float[Array, "n m"]
    margins: Float[Array, "n m"]


def explain_points(output: Output, kernel: Float[Array, "m c"]) -> PointEvidence:
    """Evidence at every point of a model's output (device).

    Args:
      output: of a model with prototypes.
      kernel: w_h.
    """
    similarities = output.similarities
    label = output.logits.argmax(-1)
    return PointEvidence(
        features=output.features,
        similarities=similarities,
        logits=output.logits,
        label=label,
        prototype=(similarities * kernel.T[label]).argmax(-1),
        novelty=output.distances.min(-1),
    )


def explain_pixels(
    similarities: Float[Array, "h w m"],
    logits: Float[Array, "h w c"],
    kernel: Float[Array, "m c"],
    size: Int[Array, "2"],
    rows: Int[Array, " n"],
    cols: Int[Array, " n"],
) -> PixelEvidence:
    """Evidence at some pixels of an image; no map is brought to full size (device).

    Args:
      similarities, logits: of the image's points (`PointEvidence`).
      kernel: w_h.
      size: (height, width) that the maps are upsampled to.
      rows, cols: the pixels.
    """
    similarities = upsample_at(similarities, size, rows, cols)
    logits = upsample_at(logits, size, rows, cols)
    label = logits.argmax(-1)
    others = jnp.where(jnp.arange(logits.shape[-1]) == label[:, None], -jnp.inf, logits)
    runner_up = others.argmax(-1)
    won, lost = kernel.T[label], kernel.T[runner_up]
    return PixelEvidence(
        logits=logits,
        similarities=similarities,
        label=label,
        runner_up=runner_up,
        contributions=similarities * won,
        margins=similarities * (won - lost),
    )


def point_counts(run: Finished, split: str, also: Sequence[ModuleType] = ()) -> dict[str, Any]:
    """Points of each prototype over a split, int64 [M], and what further measures find in the pass.

    "won": by contributing most to the class that the point gets. "used": of its true class's
    prototypes it is the most similar there (Fig. 5).
    """
    context = Context(run.experiment, run.inference, split)
    batches = run.experiment.eval_batches(split)
    counts = Measure(_counts, lambda found: {"won": found[0], "used": found[1]})
    made = [counts, *(module.make(context) for module in also)]
    return take(context, made, run.checkpoint.variables, batches)


def _counts(seen: Seen) -> tuple[Int[Array, " m"], Int[Array, " m"]]:
    """What one image adds to `point_counts`; nothing, if it fills a batch."""
    winners, count = explain_points(seen.output, seen.kernel).prototype, len(seen.kernel)
    winners = jnp.where(seen.batch["index"] >= 0, winners, count)
    won = jnp.zeros(count + 1, jnp.int32).at[winners.reshape(-1)].add(1)[:-1]
    return won, wins(seen.output.similarities, seen.labels, seen.inference.classes)
