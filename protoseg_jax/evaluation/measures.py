"""Measuring a model over a split: one pass on the devices, whatever is measured.

A measure is a module, of this folder or by its dotted path from anywhere, with

* `TITLES`: ((key, name, factor), …) of its figures that tables show; factor 100: in per cent;
* `make(context)` → `Measure`, or None where it has nothing to say.

The network sees each image once, and every measure looks at what came out. What is counted is
summed exactly whatever the order, and what is drawn is drawn by each image's number: N devices
measure what one does (the overlap's IoUs, sums of float32, to rounding).
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from protoseg_jax import extensions
from protoseg_jax.data.labels import VOID
from protoseg_jax.devices import give_back_freed_memory, total
from protoseg_jax.inference import Inference, shrink_labels
from protoseg_jax.models.protoseg import Output
from protoseg_jax.progress import Progress
from protoseg_jax.run.experiment import Experiment

_SEED = 0
_AHEAD = 2  # batches on their way at once


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """What a measure is made for; equal to itself alone."""

    experiment: Experiment  # the run's data, classes and devices
    inference: Inference  # its model, with c(j) and C
    split: str
    held_out: int | None = None  # a class whose points count for novelty alone


@dataclasses.dataclass(frozen=True)
class Seen:
    """One image as the model sees it, on the device."""

    inference: Inference
    variables: Any
    batch: dict[str, Array]  # its rows: "image", "label", "size", "index", and measures' `inputs`
    output: Output  # of this image alone: features [h w d], logits [h w c] and so on
    labels: Int[Array, "h w"]  # Y_Z; void in an image that fills a batch, whose index is −1
    judged: Bool[Array, "h w"]  # points that are neither void nor of the held-out class
    key: Key[Array, ""]  # of the image's random numbers

    @property
    def kernel(self) -> Float[Array, "m c"]:
        """w_h."""
        return self.variables["params"]["head"]["kernel"]


@dataclasses.dataclass(frozen=True)
class Measure:
    """One measure of one run.

    Attributes:
      step: what one image says, a tree of arrays (on the device). Where it is the same function at
        every call, measuring again compiles nothing.
      finish: the split's figures by key, fractions, None where there is nothing to measure (host).
      summed: whether `finish` gets sums over the images, in 64 bits; else every image's arrays.
      inputs: what to add to a batch, which has what earlier measures added: arrays by name, a row
        an image (host).
    """

    step: Callable[[Seen], Any]
    finish: Callable[[Any], dict[str, Any]]
    summed: bool = True
    inputs: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda batch: {}


def absent(*keys: str) -> Measure:
    """Of what cannot be measured: None for each of these figures."""
    return Measure(_nothing, lambda _: dict.fromkeys(keys))


def _nothing(seen: Seen) -> tuple[()]:
    return ()


def modules(names: Iterable[str]) -> list[types.ModuleType]:
    """The measures that a config names.

    Raises:
      UserError: there is no such module, or it is no measure.
    """
    return [extensions.find("measures", n, "evaluation", ("TITLES", "make")) for n in names]


def take(
    context: Context,
    measures: Sequence[Measure | None],
    variables: Any,
    batches: Iterable[dict[str, np.ndarray]],
) -> dict[str, Any]:
    """The figures of all measures, after one pass over a split's evaluation batches."""
    pool, measures = context.experiment.pool, [m for m in measures if m is not None]

    def add(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return functools.reduce(lambda batch, m: {**batch, **m.inputs(batch)}, measures, batch)

    parts = tuple((m.step, m.summed) for m in measures)
    step = make_step(context.inference, context.held_out, parts)
    passed, total_images = [], len(context.experiment.examples(context.split))
    with Progress(f"looking at {context.split}", total_images, 0, "image", brief=True) as progress:
        # Results are fetched when all are there; what is told of them is some batches behind.
        for batch, found in pool.outputs(step, variables, map(add, batches)):
            passed.append(found)
            if len(passed) > _AHEAD:
                jax.block_until_ready(passed[-1 - _AHEAD])
            progress.update(int((batch["index"] >= 0).sum()) * pool.processes)
    result = {}
    for m, found in zip(measures, zip(*passed, strict=True), strict=True):
        collect = _total if m.summed else _joined
        result |= m.finish(jax.tree.map(collect, *map(pool.all, found)))
    give_back_freed_memory()
    return result


def _total(*parts: np.ndarray) -> np.ndarray:
    """[devices, ...] of each batch → their sum, in 64 bits."""
    return total(*(row for part in parts for row in part))


def _joined(*parts: np.ndarray) -> np.ndarray:
    """[devices, images a device, ...] of each batch → [images, ...]."""
    return np.concatenate([x.reshape(-1, *x.shape[2:]) for x in parts])


@functools.lru_cache(maxsize=4)
def make_step(
    inference: Inference,
    held_out: int | None,
    parts: tuple[tuple[Callable[[Seen], Any], bool], ...],
) -> Callable:
    """step(variables, batch) → what each (step, summed) of `parts` found: a sum, or every image's.

    The same arguments give the same function, so that measuring again compiles nothing. Devices
    never wait for each other: one image may take minutes, and XLA ends a process whose CPU devices
    meet 40 seconds apart.
    """

    def step(variables, batch):
        def look(image):
            batch, output = image
            labels, size = batch["label"][None], batch["size"][None]
            labels = shrink_labels(labels, size, output.features.shape[:2])[0]
            labels = jnp.where(batch["index"] >= 0, labels, VOID)
            judged = labels != VOID
            if held_out is not None:
                judged &= labels != held_out
            key = jax.random.fold_in(jax.random.key(_SEED), batch["index"])
            seen = Seen(inference, variables, batch, output, labels, judged, key)
            return [function(seen) for function, _ in parts]

        found = jax.lax.map(look, (batch, inference(variables, batch["image"])))
        return [
            jax.tree.map(lambda x: x.sum(0), tree) if summed else tree
            for (_, summed), tree in zip(parts, found, strict=True)
        ]

    return step
