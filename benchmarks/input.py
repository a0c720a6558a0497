"""How fast training is fed, from the prepared data to batches on the device, and by which stage.

    python -m benchmarks.input [--sets=pascal,cityscapes] [--workers=0,1,2,4] [--seconds=20]
        [--out=FILE.md]

Made images of Pascal's and Cityscapes' size and file size, in their official folders, prepared and
read as `train.py` does with configs/pascal.py and configs/cityscapes.py. Cores are counted by CPU
time, of this process and its workers, so that a machine of few cores says what one of many needs;
what waits for a disk does not show, as the images lie in memory.
"""

import argparse
import collections
import contextlib
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from unittest import mock

import cv2
import jax
import numpy as np
from PIL import Image

from benchmarks import machine
from benchmarks.decoding import street
from protoseg_jax import config as configs
from protoseg_jax import images
from protoseg_jax.data import augment
from protoseg_jax.data.sets import cityscapes, voc
from protoseg_jax.devices import DevicePool
from protoseg_jax.run.experiment import Experiment

TARGET = 10 / 0.030  # examples a second: what an H100 takes, at 10 images a step of 30 ms
STAGES = (
    "read the record",
    "decode the image",
    "decode the labels",
    "scale the image",
    "scale the labels",
    "cut, pad, flip",
    "stack a batch",
    "to the device",
)


def make_pascal(root: pathlib.Path) -> None:
    """48 images of 375×500 in JPEG, 100 kB each, with palette masks; 2 of them validation."""
    stems = [f"2008_{n:06d}" for n in range(48)]
    for folder in ("JPEGImages", "SegmentationClassAug", "SegmentationClass"):
        (root / folder).mkdir()
    rng = np.random.default_rng(0)
    for n, stem in enumerate(stems):
        image, labels = street(rng, (375, 500), len(voc.LABELS), noise=4.0)
        Image.fromarray(image).save(root / "JPEGImages" / f"{stem}.jpg", quality=95)
        folder = "SegmentationClass" if n < 2 else "SegmentationClassAug"
        mask = images.palette_png(labels, voc.LABELS.colours)
        (root / folder / f"{stem}.png").write_bytes(mask)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("\n".join(stems[:2]))
    for name in ("train", "train_aug"):
        (lists / f"{name}.txt").write_text("\n".join(stems[2:]))


def make_cityscapes(root: pathlib.Path) -> None:
    """18 images of 1024×2048 in PNG, 2.3 MB each, with label ids; 2 of them validation."""
    rng = np.random.default_rng(0)
    for n in range(18):
        split, name = ("val" if n < 2 else "train"), f"town_{n:06d}_000019"
        image, labels = street(rng, (1024, 2048), len(cityscapes.LABELS), noise=0.5)
        ids = np.array(cityscapes.IDS, np.uint8)[labels]
        for top, kind, pixels in (
            ("leftImg8bit", "leftImg8bit", image),
            ("gtFine", "gtFine_labelIds", ids),
        ):
            folder = root / top / split / "town"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{name}_{kind}.png")


SETS = {"pascal": make_pascal, "cityscapes": make_cityscapes}


def cpu_seconds() -> float:
    """CPU time of this process and its workers, of all their threads."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = pathlib.Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def rates(experiment: Experiment, workers: int, seconds: float) -> tuple[float, float]:
    """(examples a second, examples a second of CPU time) of batches on the device."""
    experiment.config.data.workers = workers
    batches = experiment.pool.prefetch(experiment.train_batches(0))
    for _ in range(10 * max(workers, 1)):  # beyond what was made ahead while workers started
        next(batches)
    count, begun, cpu = 0, time.monotonic(), cpu_seconds()
    while time.monotonic() - begun < seconds:
        jax.block_until_ready(next(batches))
        count += experiment.config.batch_size
    result = count / (time.monotonic() - begun), count / (cpu_seconds() - cpu)
    batches.close()
    for worker in multiprocessing.active_children():
        worker.terminate()
        worker.join()
    return result


class Clock:
    """Adds up the CPU seconds, of all threads, spent in what it watches, by name."""

    def __init__(self):
        self.seconds = collections.Counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = time.process_time()
        yield
        self.seconds[name] += time.process_time() - begun

    def watch(self, owner: object, function: str, name: Callable[..., str]):
        """A patch of a function, whose calls count as what `name` says of their arguments."""
        original = getattr(owner, function)

        def watched(*args, **kwargs):
            with self(name(*args, **kwargs)):
                return original(*args, **kwargs)

        return mock.patch.object(owner, function, watched)


def stages(experiment: Experiment, seconds: float) -> dict[str, float]:
    """CPU milliseconds an example of each stage, one after another."""
    clock, batch_size = Clock(), experiment.config.batch_size
    source = experiment.source(experiment.config.data.train_split)
    change, rng = experiment.augmentation, np.random.default_rng(0)
    threads, order = cv2.getNumThreads(), np.random.default_rng(1)
    cv2.setNumThreads(1)
    count, end = 0, time.monotonic() + seconds
    with (
        clock.watch(
            images, "decode", lambda _, grey: f"decode the {'labels' if grey else 'image'}"
        ),
        clock.watch(augment, "resize_image", lambda *_: "scale the image"),
        clock.watch(augment, "resize_labels", lambda *_: "scale the labels"),
    ):
        while time.monotonic() < end or count < 3 * batch_size:
            if count == batch_size:  # the first batch was for warming up
                clock.seconds.clear()
            batch = []
            for index in order.integers(len(source), size=batch_size):
                with clock("example"):
                    example = source[int(index)]
                with clock("augmented"):
                    batch.append(change.random_map(example, rng))
            with clock("stack a batch"):
                stacked = {k: np.stack([e[k] for e in batch]) for k in batch[0]}
            with clock("to the device"):
                jax.block_until_ready(experiment.pool.shard(stacked))
            count += batch_size
    cv2.setNumThreads(threads)
    found = clock.seconds
    decoded = found["decode the image"] + found["decode the labels"]
    scaled = found["scale the image"] + found["scale the labels"]
    found["read the record"] = found["example"] - decoded
    found["cut, pad, flip"] = found["augmented"] - scaled
    return {name: 1e3 * found[name] / (count - batch_size) for name in STAGES}


def open_experiment(name: str, folder: pathlib.Path) -> Experiment:
    """A config's experiment with made images, which are prepared."""
    root = folder / name
    root.mkdir()
    SETS[name](root)
    config = configs.load(name)
    config.data.update({"dir": str(root), "cache": str(folder / f"{name}_cache")})
    config.model.preprocessing = "imagenet"
    experiment = Experiment(config, DevicePool(jax.local_devices()[:1]))
    experiment.data  # noqa: B018
    return experiment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--workers", default="0,1,2,4")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    names = arguments.sets.split(",")
    lines = [
        "# Feeding training",
        "",
        f"`python -m benchmarks.input --sets={arguments.sets} --workers={arguments.workers} "
        f"--seconds={arguments.seconds:g}`, {machine.describe()} OpenCV {cv2.__version__}.",
        "",
        f"Cores needed: for {TARGET:.0f} examples a second, 10 each 30 ms.",
        "",
        "| set | workers | examples/s | examples/s and core | cores needed |",
        "| --- | --- | --- | --- | --- |",
    ]
    spent = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            experiment = open_experiment(name, pathlib.Path(folder))
            spent[name] = stages(experiment, arguments.seconds)
            for workers in map(int, arguments.workers.split(",")):
                rate, of_core = rates(experiment, workers, arguments.seconds)
                lines.append(
                    f"| {name} | {workers or '0 (threads)'} | {rate:.1f} | {of_core:.1f} "
                    f"| {TARGET / of_core:.1f} |"
                )
                print(lines[-1], file=sys.stderr, flush=True)
    lines += ["", f"| ms an example | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for stage in STAGES:
        values = " | ".join(f"{spent[name][stage]:.2f}" for name in names)
        lines.append(f"| {stage} | {values} |")
    values = " | ".join(f"{sum(spent[name].values()):.2f}" for name in names)
    lines.append(f"| all | {values} |")
    machine.report(lines, arguments.out)


if __name__ == "__main__":
    main()
