"""How long it takes to explain an image, and how large the explorer's page is.

    python -m benchmarks.explaining [--out=FILE.md]

The paper's networks with made-up weights (what they cost does not depend on them) and images; the
page holds ten images of 512² with 65×65 points, and 210 prototypes from as many training images.
"""

import argparse
import dataclasses
import pathlib
import tempfile
import time

import cv2
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from benchmarks import browser, machine
from protoseg_jax import config as configs
from protoseg_jax import images
from protoseg_jax.data.labels import LabelSet
from protoseg_jax.data.sets import cityscapes, voc
from protoseg_jax.explain.model import Model, infer, load
from protoseg_jax.explain.page import Shown, Standing, write
from protoseg_jax.files import write_atomically, write_json
from protoseg_jax.inference import from_config
from protoseg_jax.models.prototypes import equal_blocks
from protoseg_jax.run import prototypes as records
from protoseg_jax.run.checkpoints import Checkpoint
from protoseg_jax.run.workdir import Workdir

REPEATS = 3
IMAGES, POINTS = 10, (65, 65)


def picture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Discs of falling size on a slope, and a camera's noise: compresses as photographs do."""
    image = np.full((*size, 3), 90, np.uint8)
    for n in range(300):
        centre = tuple(int(rng.integers(0, s)) for s in size[::-1])
        radius = int(min(size) / (4 + n / 5))
        cv2.circle(image, centre, radius, rng.integers(0, 256, 3).tolist(), -1)
    noisy = cv2.GaussianBlur(image, (5, 5), 0) + rng.normal(0, 3, image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def made_up_run(
    folder: pathlib.Path, config: ml_collections.ConfigDict, classes: LabelSet
) -> Model:
    """A run that has come to its joint phase, with random weights."""
    config.model.stride_in, config.model.preprocessing = "3x3", "imagenet"
    owners = equal_blocks(len(classes) * config.model.prototypes_per_class, len(classes))
    inference = from_config(config, len(classes), tuple(owners.tolist()))
    image = np.zeros((1, 65, 65, 3), np.uint8)
    image = inference.preprocessing.normalise(jnp.array(image))
    variables = jax.device_get(jax.jit(inference.model.init)(jax.random.key(0), image))
    arrays = {"params": variables["params"], "frozen": variables.get("frozen", {})}
    workdir = Workdir(folder)
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json())
    write_json(folder / "classes.json", vars(classes))
    workdir.checkpoints.save(Checkpoint("joint", 1, True, arrays, records.new(owners)))
    workdir.checkpoints.wait()
    return load(folder)


def seconds(work) -> float:
    """Least of some calls, the first, which compiles, left out."""
    work()
    took = []
    for _ in range(REPEATS):
        begun = time.monotonic()
        work()
        took.append(time.monotonic() - begun)
    return min(took)


def explain_rows(scratch: pathlib.Path) -> list[str]:
    """Seconds to explain an image, and to ask for a pixel of it."""
    rng, rows = np.random.default_rng(0), []
    for name, config, classes, size in (
        ("Pascal (MSC, 513²)", configs.load("pascal"), voc.LABELS, (512, 512)),
        ("Cityscapes", configs.load("cityscapes"), cityscapes.LABELS, (1024, 2048)),
    ):
        model = made_up_run(scratch / classes.names[0], config, classes)
        image = picture(rng, size)
        explain = seconds(lambda model=model, image=image: model.explain(image))
        segment = seconds(lambda model=model, image=image: model.segment(image))
        forward = seconds(
            lambda model=model, image=image: jax.block_until_ready(
                infer(model.inference, model.checkpoint.variables, model.inference.prepare(image))
            )
        )
        why = model.explain(image)
        pixel = seconds(lambda why=why: why.at(100, 100))
        shape = "×".join(map(str, size))
        rows.append(
            f"| {name} | {shape} | {explain:.2f} | {segment:.2f} | {forward:.2f} "
            f"| {1000 * pixel:.1f} |"
        )
    return rows


def page(folder: pathlib.Path) -> pathlib.Path:
    """The largest page the limits are set for: of a narrow network, which does not show."""
    rng = np.random.default_rng(0)
    config = configs.load("pascal")
    config.model.update({"depth": 14, "width": 8, "norm": "group", "msc": ()})
    model = made_up_run(folder / "benchmark", config, voc.LABELS)
    where = folder / "benchmark" / "prototypes"
    prototypes, nearest = [], []
    for p in model.prototypes:
        image, box = picture(rng, (375, 500)), [96, 104, 104, 112]
        patch, _ = images.crop_with_context(image, box)
        write_atomically(where / "sources" / f"{p.index}.jpg", images.encode(image, ".jpg", 90))
        write_atomically(where / f"{p.index:03d}.png", images.encode(patch))
        home = {"source_file": f"{p.index}.jpg", "source_size": image.shape[:2]}
        p = dataclasses.replace(p, image_id=f"2008_{p.index:06d}", box=box, **home)
        prototypes.append(p)
        nearest.append([(patch, p.class_, f"2008_{k:06d}") for k in range(6)])
    model.prototypes = prototypes
    features, count = config.model.features, len(prototypes)
    shown = []
    for n in range(IMAGES):
        image = picture(rng, (512, 512))
        coarse = rng.integers(0, len(voc.LABELS), (12, 12), np.uint8)
        labels = cv2.resize(coarse, (512, 512), interpolation=cv2.INTER_NEAREST)
        points = rng.random((*POINTS, features), np.float32)
        similarities = np.zeros((*POINTS, count), np.float32)
        shown.append(Shown(f"image {n}", image, labels, labels, points, similarities, []))
    out, standings = folder / "explain", [Standing(1 / count, 0.25, ("wheel", 0.5, 0.1))] * count
    write(out, model, facts=[], notes=[], standings=standings, nearest=nearest, shown=shown)
    return out / "index.html"


def page_rows(folder: pathlib.Path) -> list[str]:
    """Megabytes and, where there are browsers, seconds until a pixel's numbers are there."""
    index = page(folder)
    size = sum(p.stat().st_size for p in index.parent.rglob("*") if p.is_file())
    rows = [f"{size / 1e6:.1f} MB for ten 512² images and 210 prototypes."]
    for kind in (browser.Chromium, browser.Firefox):
        if not kind.find():
            rows.append(f"No {kind.name} on this machine.")
            continue
        took = []
        for _ in range(REPEATS):
            with kind() as opened:
                took.append(opened.open(index))
        times = ", ".join(f"{t:.2f} s" for t in took)
        rows.append(f"Ready (a pixel's numbers and the layer shown) after {times} in {kind.name}.")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        lines = page_rows(scratch)
        rows = explain_rows(scratch)
    table = "| network | image | explain, s | segment, s | forward pass alone, s | a pixel, ms |"
    machine.report(
        [
            "# Explaining",
            "",
            f"`python -m benchmarks.explaining`, {machine.describe()}",
            "",
            "## An image, after loading",
            "",
            f"Best of {REPEATS} calls after the first, which compiles.",
            "",
            table,
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            "## The explorer's page",
            "",
            *lines,
        ],
        arguments.out,
    )


if __name__ == "__main__":
    main()
