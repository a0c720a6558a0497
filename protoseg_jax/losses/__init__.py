"""Section 3.3 of the paper: the objective, eqs 7 and 8, of terms that are found by name.

A term is one module, ours or anyone's, with `make`, which takes what `terms` takes and returns a
`Term` or a `Penalty`. Sums and counts are kept apart, so that a caller divides by the counts of the
global batch and N devices compute what one computes. Everything is float32 whatever the inputs'
dtype. A label outside [0, C) is void and enters nothing.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from protoseg_jax import extensions
from protoseg_jax.errors import UserError
from protoseg_jax.models.protoseg import Output

Labels = Int[Array, "b h w"]
Scalar = Float[Array, ""]
Weights = Float[np.ndarray, " c"] | None


@dataclasses.dataclass(frozen=True)
class Term:
    """A mean over what a batch shows, of each of the model's outputs.

    Attributes:
      name: its key in the metrics.
      weight: λ in the objective; at 0 nothing is computed and the metric is 0.
      count: labels at an output's resolution → what these images add to the denominator. It sees
        labels only: with accumulation the whole batch is counted before its parts are looped over.
      total: (output, its labels) → what these images add to the numerator.
    """

    name: str
    weight: float
    count: Callable[[Labels], Scalar]
    total: Callable[[Output, Labels], Scalar]


@dataclasses.dataclass(frozen=True)
class Penalty:
    """A function of the parameters alone.

    Attributes:
      name, weight: as of a `Term`.
      phases: names of the phases that it applies in; elsewhere the metric is 0.
      value: of the phase's trainable parameters, `{group: subtree}`.
    """

    name: str
    weight: float
    phases: tuple[str, ...]
    value: Callable[[Mapping[str, Any]], Scalar]


def terms(
    config: ConfigDict, classes: np.ndarray, num_classes: int, weights: Weights = None
) -> list[Term | Penalty]:
    """What `config.terms` names, in its order.

    Args:
      config: `config.loss` of a run.
      classes: [M], c(j) of each prototype; of length 0 for the black box.
      num_classes: C.
      weights: [C], of a point in the cross-entropy by its class; None for the paper's.

    Raises:
      UserError: a term does not exist, has no `make` or is there twice, or none is a `Term`.
    """
    modules = [extensions.find("loss.terms", n, "losses", needs=("make",)) for n in config.terms]
    found = [module.make(config, classes, num_classes, weights) for module in modules]
    names = [term.name for term in found]
    if len(set(names)) < len(names):
        raise UserError(f"loss.terms={config.terms} holds a term twice; name each once")
    if not any(isinstance(term, Term) for term in found):
        raise UserError(f"loss.terms={config.terms} holds no term of the points; add cross_entropy")
    return found


def means(
    terms: Sequence[Term],
    outputs: Sequence[Output],
    labels: Sequence[Labels],
    counts: Sequence[Mapping[str, Scalar]],
) -> dict[str, Scalar]:
    """These images' part of each term: its mean over the global batch, averaged over the outputs.

    With MSC each of the model's outputs has its own labels and loss, and its own `counts`:
    each term's denominator in the global batch, never 0.
    """
    found = {term.name: jnp.zeros(()) for term in terms}
    for output, own, count in zip(outputs, labels, counts, strict=True):
        for term in terms:
            if term.weight:
                found[term.name] += term.total(output, own) / (len(outputs) * count[term.name])
    return found


def objective(terms: Sequence[Term | Penalty], values: Mapping[str, Scalar]) -> Scalar:
    """Eq. 7, in the fine-tunings eq. 8: Σ weight · value, in the terms' order."""
    return functools.reduce(operator.add, (term.weight * values[term.name] for term in terms))
