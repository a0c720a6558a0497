"""Stability (Huang et al. 2023): whether a prototype still hits the same parts when noise is added
to the image."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from protoseg_jax.evaluation import parts
from protoseg_jax.evaluation.measures import Context, Measure, Seen, absent

TITLES = (("stability", "stability", 100),)

# σ of each channel (RGB) on the image in [0, 1], whatever the model's preprocessing.
NOISE = tuple(0.2 * deviation for deviation in (0.229, 0.224, 0.225))


def make(context: Context) -> Measure:
    """`figures` over a split."""
    if not context.experiment.data.part_names:
        return absent("stability")
    return Measure(_step, figures, inputs=parts.inputs(context))


def _step(seen: Seen) -> dict[str, Array]:
    """(prototype, image) pairs of one image, and those whose hits are the same under noise."""
    inference, image = seen.inference, seen.batch["image"].astype(jnp.float32)[None]
    noise = jax.random.normal(jax.random.split(seen.key, 3)[2], image.shape)
    noisy = image + 255 * jnp.array(NOISE) * noise
    again = inference.model.apply(seen.variables, inference.preprocessing.normalise(noisy))
    similarities = seen.output.similarities, again.similarities[0]
    hits, noisy_hits = (parts.hits(x, seen) for x in similarities)
    # Elsewhere a prototype could hit nothing, with noise or without.
    classes = jnp.asarray(inference.classes)
    has_point = (seen.labels[..., None] == classes).any((0, 1))
    has_part = (seen.batch["part_classes"][:, None] == classes) & parts.visible(seen)[:, None]
    pairs = has_point & has_part.any(0)
    return {"pairs": pairs.sum(), "unchanged": ((hits == noisy_hits).all(0) & pairs).sum()}


def figures(sums: dict[str, np.ndarray]) -> dict[str, float | None]:
    """The share of (prototype, image) pairs whose hits of the parts of its class are unchanged;
    None without a pair."""
    pairs = sums["pairs"]
    return {"stability": float(sums["unchanged"] / pairs) if pairs else None}
