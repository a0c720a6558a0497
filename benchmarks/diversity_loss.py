"""The diversity loss (eqs 2–6), forward and backward: ours against a literal PyTorch version.

    python -m benchmarks.diversity_loss [--out benchmarks/results/diversity_loss.md]

The literal version takes each image, each class and each pair of prototypes in turn, as the
equations read; it runs on the CPU. Values and gradients must agree to 1e-5, or the program fails.
"""

import argparse
import functools
import itertools
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from protoseg_jax.data.labels import VOID
from protoseg_jax.devices import cores
from protoseg_jax.losses import diversity

SHAPES = {  # (images, height, width, classes, prototypes per class)
    "Pascal, 321² crops": (10, 41, 41, 21, 10),
    "Cityscapes, 513² crops": (10, 65, 65, 19, 10),
}
FULL_RESOLUTION = (1, 512, 512, 2, 10)


def blobs(images: int, height: int, width: int, classes: int, seed: int = 0) -> np.ndarray:
    """Label maps like a scene's: 40 Voronoi cells an image, some 12 classes, a tenth void."""
    rng = np.random.default_rng(seed)
    labels = np.empty((images, height, width), np.int32)
    for image in labels:
        seen = rng.choice(classes, min(12, classes), replace=False)
        nearest = np.full((height, width), np.inf)
        for _ in range(40):
            y, x = rng.uniform(0, height), rng.uniform(0, width)
            distance = (np.arange(height)[:, None] - y) ** 2 + (np.arange(width) - x) ** 2
            label = VOID if rng.random() < 0.1 else rng.choice(seen)
            image[distance < nearest] = label
            nearest = np.minimum(nearest, distance)
    return labels


def squared_distances(labels: np.ndarray, prototypes: int, seed: int = 0) -> np.ndarray:
    """Distances of smooth features in (0, 1)^64 to uniform prototypes, as early in training."""
    rng = np.random.default_rng(seed)
    b, h, w = labels.shape
    coarse = rng.uniform(size=(b, -(-h // 8), -(-w // 8), 64)).astype(np.float32)
    z = np.repeat(np.repeat(coarse, 8, 1), 8, 2)[:, :h, :w]
    z = 0.8 * z + 0.2 * rng.uniform(size=z.shape).astype(np.float32)
    vectors = rng.uniform(size=(prototypes, 64)).astype(np.float32)
    return np.stack([((z - p) ** 2).sum(-1) for p in vectors], axis=-1)


def literal(distances, labels, prototype_classes, num_classes):
    """Eq. 6 as it reads, over the (image, class) pairs with two points and two prototypes."""
    import torch

    similarities = []
    for image, label in zip(distances, labels, strict=True):
        for c in range(num_classes):
            points = image[label == c]
            if len(points) < 2:
                continue
            own = [j for j, owner in enumerate(prototype_classes) if owner == c]
            log_v = [torch.log_softmax(points[:, j], dim=0) for j in own]
            pairs = []
            for u, v in itertools.combinations(log_v, 2):
                kl_uv = (u.exp() * (u - v)).sum()
                kl_vu = (v.exp() * (v - u)).sum()
                pairs.append(torch.exp(-0.5 * kl_uv - 0.5 * kl_vu))
            similarities.append(torch.stack(pairs).mean())
    return torch.stack(similarities).mean()


def ours(distances, labels, prototype_classes, num_classes):
    similarity = diversity.diversity(distances, labels, prototype_classes, num_classes)
    present = diversity.present(labels, prototype_classes, num_classes)
    return similarity.sum() / present.sum()


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def compiled(distances, labels, prototype_classes, num_classes):
    loss = functools.partial(ours, prototype_classes=prototype_classes, num_classes=num_classes)
    return jax.jit(jax.value_and_grad(loss)).lower(distances, labels).compile()


def compare(shape: tuple[int, ...]) -> tuple[float, float, float]:
    """(seconds literal, seconds ours, largest gradient error relative to the largest gradient)."""
    import torch

    b, h, w, classes, k = shape
    prototype_classes = np.repeat(np.arange(classes), k)
    labels = blobs(b, h, w, classes)
    distances = squared_distances(labels, classes * k)

    leaf = torch.tensor(distances, requires_grad=True)
    torch_labels = torch.tensor(labels)

    def run_literal():
        leaf.grad = None
        value = literal(leaf, torch_labels, prototype_classes, classes)
        value.backward()
        return value

    expected = run_literal().item()
    expected_gradient = leaf.grad.numpy()
    slow = seconds(run_literal, 3)

    arrays = jnp.asarray(distances), jnp.asarray(labels)
    step = compiled(*arrays, prototype_classes, classes)
    value, gradient = step(*arrays)
    fast = seconds(lambda: jax.block_until_ready(step(*arrays)), 20)

    scale = np.abs(expected_gradient).max()
    error = float(np.abs(np.asarray(gradient) - expected_gradient).max() / scale)
    assert abs(float(value) - expected) <= 1e-5, (float(value), expected)
    assert np.abs(np.asarray(gradient) - expected_gradient).max() <= 1e-5
    assert error <= 1e-4, f"gradients differ by {error} of the largest"
    return slow, fast, error


def full_resolution() -> tuple[float, int, int]:
    """(seconds, peak bytes of the step's own arrays, bytes of the distances) at 512²."""
    b, h, w, classes, k = FULL_RESOLUTION
    labels = jnp.asarray(blobs(b, h, w, classes))
    rng = np.random.default_rng(0)
    distances = jnp.asarray(rng.uniform(0, 8, (b, h, w, classes * k)), jnp.float32)
    step = compiled(distances, labels, np.repeat(np.arange(classes), k), classes)
    jax.block_until_ready(step(distances, labels))
    took = seconds(lambda: jax.block_until_ready(step(distances, labels)), 10)
    memory = step.memory_analysis()
    return took, memory.temp_size_in_bytes + memory.output_size_in_bytes, distances.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="also write the table to this .md file")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("the comparison needs PyTorch: pip install torch", file=sys.stderr)
        sys.exit(2)
    torch.set_num_threads(cores())

    lines = [
        "# The diversity loss, forward and backward",
        "",
        f"`python -m benchmarks.diversity_loss`, {machine.describe()} PyTorch {torch.__version__}.",
        "",
        "| labels | images × points | classes × prototypes | literal PyTorch (CPU) | ours | ratio "
        "| gradient error¹ |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, shape in SHAPES.items():
        b, h, w, classes, k = shape
        slow, fast, error = compare(shape)
        lines.append(
            f"| {name} | {b} × {h}×{w} | {classes} × {k} | {slow * 1e3:.0f} ms | "
            f"{fast * 1e3:.1f} ms | {slow / fast:.0f} | {error:.0e} |"
        )
    took, peak, given = full_resolution()
    b, h, w, classes, k = FULL_RESOLUTION
    lines += [
        "",
        "Values and gradients agree to 1e-5 (asserted). ¹ largest difference over the largest "
        "entry of the gradient. Medians of 3 (literal) and 20 (ours) runs.",
        "",
        f"At full resolution ({b} × {h}×{w}, {classes} × {k}), ours alone: {took * 1e3:.0f} ms, "
        f"{peak / 2**20:.0f} MiB at its peak, gradient included, beside the distances' own "
        f"{given / 2**20:.0f} MiB.",
    ]
    machine.report(lines, arguments.out)


if __name__ == "__main__":
    main()
