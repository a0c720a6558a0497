"""FLOPs of the compiled train steps of the published network, beside one forward pass.

    python benchmarks/flops.py [--out benchmarks/results/flops.md]

DeepLabv2-ResNet-101, 321² crops, 21 classes × 10 prototypes, one image, no accumulation; whole
steps (losses, optimiser), as train.py maps them. Counted by XLA; nothing is run.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterable

import jax
import ml_collections
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import machine  # noqa: E402

from protoseg_jax import inference as inferences  # noqa: E402
from protoseg_jax.devices import DevicePool  # noqa: E402
from protoseg_jax.models.prototypes import equal_blocks  # noqa: E402
from protoseg_jax.training import phases  # noqa: E402
from protoseg_jax.training import step as steps  # noqa: E402

CLASSES, PROTOTYPES, SIZE, POINTS = 21, 210, 321, 41
NEW = {"aspp": 2.5e-4, "prototypes": 2.5e-4}
PHASES = {
    "warmup": phases.Phase("warmup", "train", 30000, NEW),
    "joint": phases.Phase("joint", "train", 30000, {"backbone": 2.5e-5, **NEW}, "poly"),
    "finetune": phases.Phase("finetune", "train", 2000, {"head": 1e-5}, l1=True),
}


def config() -> ml_collections.ConfigDict:
    """The published network and its losses."""
    model = {
        "backbone": "resnet",
        "depth": 101,
        "width": 64,
        "norm": "frozen_batch",
        "stride_in": "3x3",
        "output_stride": 8,
        "aspp_rates": (6, 12, 18, 24),
        "head": "prototypes",
        "features": 64,
        "preprocessing": "imagenet",
        "msc": (),
        "remat": False,
    }
    loss = {"diversity": 0.25, "l1": 1e-4, "diversity_reduction": "present"}
    return ml_collections.ConfigDict(
        {"model": model, "loss": loss, "compute_dtype": "float32", "eval_size": (SIZE, SIZE)}
    )


def flops(lowered) -> float:
    return lowered.compile().cost_analysis()["flops"]


def count(names: Iterable[str] = tuple(PHASES)) -> dict[str, float]:
    """FLOPs by name: "forward" and the step of each named phase."""
    inference = inferences.from_config(config(), CLASSES, PROTOTYPES)
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.uint8)
    labels = jax.ShapeDtypeStruct((1, SIZE, SIZE), np.uint8)
    variables = jax.eval_shape(
        lambda: inference.model.init(jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), np.float32))
    )
    result = {"forward": flops(jax.jit(inference.__call__).lower(variables, images))}
    pool = DevicePool(jax.local_devices()[:1])

    def on_device(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), tree)

    for phase in (PHASES[name] for name in names):
        step = steps.make_step(
            inference,
            phase,
            prototype_classes=equal_blocks(PROTOTYPES, CLASSES),
            num_classes=CLASSES,
            loss_config=config().loss,
            accumulate=1,
            feature_sizes=[(POINTS, POINTS)],
        )
        state = jax.eval_shape(
            lambda p, phase=phase: steps.init_state(p, phase), variables["params"]
        )
        _, frozen = steps.split(variables["params"], phase)
        arguments = (
            state,
            frozen,
            {"frozen": variables["frozen"]},
            {"image": images, "label": labels},
        )
        result[phase.name] = flops(pool.map(step).lower(*map(on_device, arguments)))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    counted = count()
    lines = [
        "# What a step computes",
        "",
        f"`python benchmarks/flops.py`, {machine.describe()}",
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
