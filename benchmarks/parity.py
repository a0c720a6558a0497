"""Our network beside PyTorch's on the same weights and inputs: the worst relative error by case.

    python -m benchmarks.parity [--full] [--out benchmarks/results/parity.md]

The cases are those of tests/models/test_torch_parity.py. Needs PyTorch and torchvision. `--full`
adds 1024×2048.
"""

import argparse
import pathlib
import sys
import tempfile

import numpy as np
import torch

from benchmarks import machine
from tests.models import parity_cases as cases

RATES = (6, 12, 18, 24)
SIZES = ((321, 321), (200, 512), (513, 513))
FULL = (1024, 2048)


def by_largest(pairs) -> float:
    """The worst error over the largest value, of the worst of several arrays."""
    errors = []
    for _, ours, theirs in pairs:
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        errors.append(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return max(errors)


def by_norm(pairs) -> float:
    """‖ours − theirs‖ / ‖theirs‖, of the worst of several tensors."""
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    rows, over = [], []

    def add(name: str, error: float, allowed: float) -> None:
        if error > allowed:
            over.append(name)
        rows.append(f"| {name} | {error:.1e} | {allowed:.0e} |")
        print(rows[-1], file=sys.stderr, flush=True)

    joint = cases.joint_phase()
    for group, pairs in joint.gradients.items():
        add(f"gradient of eq. 7, {group} (65², depth 26)", by_norm(pairs), 1e-3)
    worst = max(abs(a - b) / abs(b) for a, b in joint.losses)
    add("loss, ten Adam steps of the joint phase", worst, 1e-3)
    for group, pairs in joint.moved.items():
        add(f"what ten steps changed, {group}", by_norm(pairs), 1e-3)
    with tempfile.TemporaryDirectory() as folder:
        for size in ((128, 224), (321, 321)):
            pairs = cases.torchvision_resnet(size, pathlib.Path(folder))
            add(f"torchvision's ResNet-101, {size[0]}×{size[1]}", by_largest(pairs), 1e-4)
    add("MSC, ResNet-101, 321×321", by_largest(cases.multi_scale((321, 321))), 1e-4)
    sizes = [(s, size) for size in SIZES for s in ("3x3", "1x1")]
    for stride_in, size in [*sizes, *[("1x1", FULL)] * arguments.full]:
        pairs = cases.whole_network(stride_in, 101, 64, RATES, size)
        name = f"DeepLabv2-ResNet-101 to logits, stride in {stride_in}, {size[0]}×{size[1]}"
        add(name, by_largest(pairs), 1e-4)
    lines = [
        "# Beside PyTorch",
        "",
        f"`python {' '.join(['-m', 'benchmarks.parity', *['--full'] * arguments.full])}`, "
        f"{machine.describe()} PyTorch {torch.__version__}.",
        "",
        "Random weights, BatchNorm statistics that are not trivial, float32. Arrays: largest error "
        "over largest value, worst of features, distances and logits. Gradients and changes: norm "
        "of the difference over norm, worst tensor of the group.",
        "",
        "| case | worst relative error | allowed |",
        "| --- | --- | --- |",
        *rows,
    ]
    machine.report(lines, arguments.out)
    if over:
        sys.exit(f"over their bounds: {', '.join(over)}")


if __name__ == "__main__":
    main()
