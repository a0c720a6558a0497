"""The EM authors' own error: the smallest 1 − F of class 1 over thresholds of its probability.

Of two classes. A pixel is of class 1 where its probability (softmax of the upsampled logits) is
above the threshold; 1 − F pools a split. The threshold is chosen on the split that is scored, so
the figure is too good, and stands here to be set beside theirs (docs/method.md).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from protoseg_jax.evaluation.measures import Context, Measure, Seen
from protoseg_jax.evaluation.segmentation import upsample

TITLES = (("f_error_of_thresholds", "1 − F (class 1), least over thresholds", 100),)

THRESHOLDS = np.linspace(0.0, 1.0, 21)


def make(context: Context) -> Measure | None:
    """`figures` over a split; None but for two classes."""
    return Measure(_step, figures) if context.inference.num_classes == 2 else None


def _step(seen: Seen) -> dict[str, Int[Array, " t"]]:
    """Pixels of one image by threshold: rightly of class 1, said to be, and truly."""
    label, size = seen.batch["label"], seen.batch["size"]
    logits = upsample(seen.output.logits[None], size[None], label.shape)[0]
    inside = jax.nn.sigmoid(logits[..., 1] - logits[..., 0])
    known, truth = label < 2, label == 1

    def count(threshold: Array) -> tuple[Array, Array]:
        said = (inside > threshold) & known
        return (said & truth).sum(), said.sum()

    hits, said = jax.lax.map(count, jnp.asarray(THRESHOLDS, jnp.float32))
    return {"hits": hits, "said": said, "truth": jnp.broadcast_to(truth.sum(), hits.shape)}


def figures(sums: dict[str, Int[np.ndarray, " t"]]) -> dict[str, float | None]:
    """The least of 1 − 2 · hits / (said + truth), and its threshold; None where class 1 is neither
    there nor said to be."""
    both = sums["said"] + sums["truth"]
    if not both.any():
        return {"f_error_of_thresholds": None, "threshold": None}
    errors = np.where(both > 0, 1.0 - 2.0 * sums["hits"] / np.maximum(both, 1), 1.0)
    best = int(errors.argmin())
    return {
        "f_error_of_thresholds": float(errors[best]),
        "threshold": float(THRESHOLDS[best]),
    }
