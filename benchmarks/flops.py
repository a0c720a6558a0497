"""FLOPs of the compiled train steps of the published network, beside one forward pass.

    python -m benchmarks.flops [--out benchmarks/results/flops.md]

DeepLabv2-ResNet-101, 321² crops, 21 classes × 10 prototypes, one image, no accumulation; whole
steps (losses, optimiser), as train.py maps them. Counted by XLA, of the program that a GPU would be
given; nothing is compiled or run.
"""

import argparse
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from benchmarks import machine
from protoseg_jax import config as configs
from protoseg_jax import inference as inferences
from protoseg_jax import losses, models
from protoseg_jax.devices import AXIS
from protoseg_jax.models.prototypes import equal_blocks
from protoseg_jax.run import phases
from protoseg_jax.training import step as steps

CLASSES, PROTOTYPES, SIZE, POINTS = 21, 210, 321, 41
PHASES = ("warmup", "joint", "finetune")


def config() -> ml_collections.ConfigDict:
    """The published network, its losses and phases: the defaults, with torchvision's weights."""
    c = configs.default()
    c.eval_size = (SIZE, SIZE)
    c.model.update({"stride_in": "3x3", "preprocessing": "imagenet"})
    return c


def for_gpu(function: Callable, *arguments: Any) -> jax.stages.Lowered:
    """What a GPU would be given of a function that one device runs, of arrays or their shapes.

    `DevicePool.map`'s pmap lowers for devices that are there only.
    """
    mesh, everywhere = Mesh(jax.local_devices()[:1], (AXIS,)), PartitionSpec()
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    return jax.jit(mapped).trace(*arguments).lower(lowering_platforms=("cuda",))


def flops(function: Callable, *arguments: Any) -> float:
    """As XLA counts them, of what a GPU would be given.

    Of a CPU's program it counts too few: the gradients of kernels are loops there, whose body it
    counts once.
    """
    return for_gpu(function, *arguments).cost_analysis()["flops"]


def count(names: Iterable[str] = PHASES) -> dict[str, float]:
    """FLOPs by name: "forward" and the step of each named phase."""
    published, owners = config(), equal_blocks(PROTOTYPES, CLASSES)
    inference = inferences.from_config(published, CLASSES, owners)
    terms, rules = losses.terms(published.loss, owners, CLASSES), models.decay(published.model)
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.uint8)
    labels = jax.ShapeDtypeStruct((1, SIZE, SIZE), np.uint8)
    variables = jax.eval_shape(
        lambda: inference.model.init(jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), np.float32))
    )
    result = {"forward": flops(inference.__call__, variables, images)}
    for phase in (p for p in phases.from_config(published) if p.name in names):
        step = steps.make_step(
            inference, phase, terms, rules, accumulate=1, feature_sizes=[(POINTS, POINTS)]
        )
        state = jax.eval_shape(
            lambda p, phase=phase: steps.init_state(p, phase, rules), variables["params"]
        )
        _, frozen = steps.split(variables["params"], phase)
        arguments = (
            state,
            frozen,
            {"frozen": variables["frozen"]},
            {"image": images, "label": labels},
        )
        result[phase.name] = flops(step, *arguments)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    counted = count()
    lines = [
        "# What a step computes",
        "",
        f"`python -m benchmarks.flops`, {machine.describe()}",
        "",
        "ResNet-101, 321², one image, whole steps; FLOPs as XLA counts them.",
        "",
        "| program | GFLOP | of a forward pass |",
        "| --- | --- | --- |",
    ]
    for name, value in counted.items():
        lines.append(f"| {name} | {value / 1e9:.1f} | {value / counted['forward']:.3f} |")
    machine.report(lines, arguments.out)


if __name__ == "__main__":
    main()
