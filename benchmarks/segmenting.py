"""What `protoseg segment` costs beside the bare forward pass, and what one huge image takes.

    python -m benchmarks.segmenting --run=DIR [--count=200] [--repeats=3] [--side=10000]
        [--out=FILE]

Images of mixed sizes (200 to 2000 pixels a side, JPEG, scenes of `parts`) are segmented into files
with the run, in turns with its network alone on as many images that are at hand; then one image of
side × side pixels, in a process of its own whose peak memory is read at its end.
"""

import argparse
import functools
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import cv2
import jax
import numpy as np

from benchmarks import machine
from protoseg_jax import devices, images
from protoseg_jax.data.sets import parts
from protoseg_jax.explain.model import Model
from protoseg_jax.explain.segment import Segmenter, find
from protoseg_jax.inference import Inference


def make_images(folder: pathlib.Path, count: int) -> None:
    """`count` JPEGs of mixed sizes."""
    rng = np.random.default_rng(0)
    for n in range(count):
        height, width = np.exp(rng.uniform(np.log(200), np.log(2000), 2)).astype(int).tolist()
        picture = cv2.resize(parts.scene(0, 0, n)[0], (width, height))
        (folder / f"{n:03d}.jpg").write_bytes(images.encode(picture, ".jpg", 90))


@functools.lru_cache
def network(inference: Inference):
    """step(variables, batch) → logits, compiled once."""
    return lambda variables, batch: inference(variables, batch["image"]).logits


def forward(model: Model, count: int) -> float:
    """Seconds of the network alone on so many images."""
    experiment, inference = model.experiment, model.inference
    batch = experiment.eval_batch_size
    blank = {"image": np.zeros((batch, *inference.eval_size, 3), np.uint8)}
    blanks = [blank] * -(-count // batch)
    step, variables = network(inference), model.checkpoint.variables
    started = time.monotonic()
    outputs = experiment.pool.outputs(step, variables, blanks)
    for _, logits in outputs:
        jax.block_until_ready(logits)
    return time.monotonic() - started


def alone(path: str, image: str) -> None:
    """In a process of its own: one image; prints seconds and peak MB."""
    model, out = Model.load(path), pathlib.Path(image).with_suffix("")
    started = time.monotonic()
    Segmenter(model, out).run(find([image], out))
    took = time.monotonic() - started
    print(took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", type=int, default=10_000)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    devices.split_cpu(None)
    devices.keep_compiled_programs()
    devices.keep_freed_memory()
    if arguments.alone:
        return alone(arguments.run, arguments.alone)
    model, seconds = Model.load(arguments.run), {"segment": [], "forward": []}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_images(folder, arguments.count)
        for n in range(arguments.repeats + 1):  # the first compiles
            out = folder / f"out{n}"
            started = time.monotonic()
            Segmenter(model, out).run(find([str(folder / "*.jpg")], out))
            seconds["segment"].append(time.monotonic() - started)
            seconds["forward"].append(forward(model, arguments.count))
        huge = cv2.resize(parts.scene(0, 0, 0)[0], (arguments.side, arguments.side))
        (folder / "huge.jpg").write_bytes(images.encode(huge, ".jpg", 90))
        line = [sys.executable, "-m", "benchmarks.segmenting", f"--run={arguments.run}"]
        line.append(f"--alone={folder / 'huge.jpg'}")
        told = subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()
    took, peak = map(float, told[-2:])
    found = {key: values[1:] for key, values in seconds.items()}
    of_least, of_middle = (f(found["segment"]) / f(found["forward"]) for f in (min, np.median))
    rows = [
        f"| {key} | {', '.join(f'{s:.1f}' for s in values)} | {arguments.count / min(values):.1f} |"
        for key, values in found.items()
    ]
    size = " × ".join(map(str, model.inference.eval_size))
    machine.report(
        [
            "# Segmenting images into files",
            "",
            f"`python -m benchmarks.segmenting --run=DIR --count={arguments.count} "
            f"--repeats={arguments.repeats} --side={arguments.side}`, {machine.describe()}",
            "",
            f"{arguments.count} JPEGs of 200 to 2000 pixels a side, by a network that sees {size} "
            f"and knows {len(model.classes)} classes ({model.experiment.config.model.backbone}).",
            "",
            "| | seconds, in turns | images a second |",
            "| --- | --- | --- |",
            *rows,
            "",
            f"The least of each: {of_least:.2f}, the medians: {of_middle:.2f}, for reading, "
            "decoding, bringing to full size and writing PNGs. Before, the first time, "
            f"{seconds['segment'][0]:.1f} s with what had to be compiled. One image of "
            f"{arguments.side}²: {took:.1f} s, peak memory of its process {peak:.0f} MB, "
            "compiling included.",
        ],
        arguments.out,
    )


if __name__ == "__main__":
    main()
