"""How fast one core feeds training with 2048×1024 images, by the form in which they are stored.

    python -m benchmarks.decoding [--image=FILE] [--out=FILE.md]

Without --image on a made street: shapes in all sizes, with a camera's noise. Decoding alone, and
decoding of image and labels with the augmentation of configs/cityscapes.py (scale, crop to 513²,
flip).
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable

import cv2
import numpy as np

from benchmarks import machine
from protoseg_jax import config as configs
from protoseg_jax import decoding, images
from protoseg_jax.data.augment import Augment

SIZE = (1024, 2048)
SECONDS = 5.0
FORMS = {
    "PNG as OpenCV writes it": (".png", []),
    "PNG, zlib level 6": (".png", [cv2.IMWRITE_PNG_COMPRESSION, 6]),
    "PNG, zlib level 9": (".png", [cv2.IMWRITE_PNG_COMPRESSION, 9]),
    "WebP, lossless": (".webp", [cv2.IMWRITE_WEBP_QUALITY, 101]),
    "BMP, not compressed": (".bmp", []),
}


def street(
    rng: np.random.Generator,
    size: tuple[int, int] = SIZE,
    classes: int = 19,
    noise: float = 2.0,
) -> tuple[np.ndarray, np.ndarray]:
    """(image, labels): discs of falling size, each of one class and colour, and noise."""
    image = np.full((*size, 3), 90, np.uint8)
    labels = np.zeros(size, np.uint8)
    for n in range(600):
        centre = tuple(int(rng.integers(0, s)) for s in size[::-1])
        radius = int(300 * size[0] / SIZE[0] / (1 + n / 20))
        cv2.circle(image, centre, radius, rng.integers(0, 256, 3).tolist(), -1)
        cv2.circle(labels, centre, radius, int(rng.integers(0, classes)), -1)
    noisy = cv2.GaussianBlur(image, (5, 5), 0) + rng.normal(0, noise, image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), labels


def rate(work: Callable[[], object]) -> float:
    """Calls a second, over five seconds."""
    work()
    count, start = 0, time.monotonic()
    while time.monotonic() - start < SECONDS:
        work()
        count += 1
    return count / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    image, labels = street(np.random.default_rng(0))
    if arguments.image:
        image = cv2.resize(decoding.decode(arguments.image.read_bytes()), SIZE[::-1])
    config = configs.load("cityscapes")
    augment = Augment(tuple(config.crop_size), tuple(config.augment.scale), (124, 116, 104))
    stored_labels, rng = images.encode_labels(labels), np.random.default_rng(0)
    option = f" --image={arguments.image.name}" if arguments.image else ""
    lines = [
        "# Decoding 2048×1024 images",
        "",
        f"`python -m benchmarks.decoding{option}`, {machine.describe()} "
        f"One thread, OpenCV {cv2.__version__}.",
        "",
        "| stored as | MB | decoded, images/s | examples/s, augmented to 513² |",
        "| --- | --- | --- | --- |",
    ]
    for name, (suffix, options) in FORMS.items():
        _, stored = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
        stored = stored.tobytes()
        np.testing.assert_array_equal(decoding.decode(stored), image)

        def example(stored=stored):
            label = decoding.decode(stored_labels, grey=True)
            return augment.random_map({"image": decoding.decode(stored), "label": label}, rng)

        decoded = rate(lambda stored=stored: decoding.decode(stored))
        lines.append(f"| {name} | {len(stored) / 1e6:.1f} | {decoded:.1f} | {rate(example):.1f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    machine.report(lines, arguments.out)


if __name__ == "__main__":
    main()
