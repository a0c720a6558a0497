"""Bypass: what of the image reaches the logits without passing the similarities.

Where it is 0 the prototypes' contributions are the whole reason for a label: there is no other
way. ProtoSeg's last layer sees similarities alone, so it is exactly 0, by construction.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from protoseg_jax.evaluation.measures import Context, Measure, Seen
from protoseg_jax.inference import Inference
from protoseg_jax.models.directions import DirectionLayer
from protoseg_jax.models.prototypes import PrototypeLayer

TITLES = (("bypass", "bypass", 100),)

_IMAGES = 16  # the first of a split: what holds by construction needs no more


def make(context: Context) -> Measure:
    """`figures` of the `responses` to the middle of an image, of the size of a training crop, so
    that no more memory is needed than in training."""
    crop = tuple(context.experiment.config.crop_size)
    crop = tuple(map(min, crop, context.inference.eval_size))
    return Measure(_step, figures, inputs=lambda batch: {"middle": _middle(batch["image"], crop)})


def _middle(images: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
    top, left = ((n - size) // 2 for n, size in zip(images.shape[1:3], crop, strict=True))
    return images[:, top : top + crop[0], left : left + crop[1]]


def _step(seen: Seen) -> dict[str, Array]:
    """The share of one image's response that bypasses the prototypes, if it is measured."""

    def share(image: Array) -> Float[Array, ""]:
        held, whole = responses(seen.inference, seen.variables, image, seen.key)
        return jnp.where(held == 0, 0.0, held / whole)

    index = seen.batch["index"]
    enters = (index >= 0) & (index < _IMAGES)
    found = jax.lax.cond(enters, share, lambda _: jnp.zeros(()), seen.batch["middle"])
    return {"share": found, "images": enters.astype(jnp.int32)}


def responses(
    inference: Inference, variables: dict, image: Array, key: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """‖∂⟨r, logits⟩/∂image‖ of a random direction r, with the distances to the prototypes (and so
    the similarities) held fixed, and as it is.

    Args:
      inference: the model.
      variables: its.
      image: RGB bytes [h w 3].
      key: of r.
    """

    def logits(image: Array) -> Array:
        return inference.model.apply(variables, inference.preprocessing.normalise(image)).logits

    def held(image: Array) -> Array:
        with nn.intercept_methods(_hold):
            return logits(image)

    image = image.astype(jnp.float32)[None]
    r = jax.random.normal(jax.random.fold_in(key, 4), jax.eval_shape(logits, image).shape)
    of_held, whole = (jax.grad(lambda x, f=f: (r * f(x)).sum())(image) for f in (held, logits))
    return jnp.linalg.norm(of_held), jnp.linalg.norm(whole)


def _hold(call, arguments, keywords, context):
    """Flax's interceptor: what prototypes say is a constant."""
    found = call(*arguments, **keywords)
    says = isinstance(context.module, PrototypeLayer | DirectionLayer)
    if says and context.method_name == "__call__":
        return jax.lax.stop_gradient(found)
    return found


def figures(sums: dict[str, np.ndarray]) -> dict[str, float | None]:
    """The mean share; None without an image."""
    images = sums["images"]
    return {"bypass": float(sums["share"] / images) if images else None}
