"""How long it takes to explain an image, and how large the explorer's page is.

    python benchmarks/explaining.py [--out=FILE.md]

The paper's networks with made-up weights (what they cost does not depend on them) and images; the
page holds ten images of 512² with 65×65 points, and 210 prototypes from as many training images.
"""

import argparse
import pathlib
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "explain")]

import browser  # noqa: E402
import cv2  # noqa: E402
import machine  # noqa: E402

from configs import cityscapes, pascal  # noqa: E402
from protoseg_jax import api  # noqa: E402
from protoseg_jax.data import label_sets  # noqa: E402
from protoseg_jax.explain import explorer, figures  # noqa: E402
from protoseg_jax.inference import from_config  # noqa: E402
from protoseg_jax.models.prototypes import equal_blocks  # noqa: E402
from protoseg_jax.workdir import Checkpoint, Workdir, write_json  # noqa: E402

REPEATS = 3
IMAGES, PROTOTYPES, CLASSES, FEATURES, POINTS = 10, 210, 21, 64, (65, 65)


def picture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Discs of falling size on a slope, and a camera's noise: compresses as photographs do."""
    image = np.full((*size, 3), 90, np.uint8)
    for n in range(300):
        centre = tuple(int(rng.integers(0, s)) for s in size[::-1])
        radius = int(min(size) / (4 + n / 5))
        cv2.circle(image, centre, radius, rng.integers(0, 256, 3).tolist(), -1)
    noisy = cv2.GaussianBlur(image, (5, 5), 0) + rng.normal(0, 3, image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def made_up_run(folder: pathlib.Path, config, classes: label_sets.LabelSet) -> api.Model:
    """A run that has come to its joint phase, with random weights."""
    config.model.stride_in, config.model.preprocessing = "3x3", "imagenet"
    count = len(classes) * config.model.prototypes_per_class
    inference = from_config(config, len(classes), count)
    image = np.zeros((1, 65, 65, 3), np.uint8)
    image = inference.preprocessing.normalise(jnp.array(image))
    variables = jax.device_get(jax.jit(inference.model.init)(jax.random.key(0), image))
    arrays = {"params": variables["params"], "frozen": variables.get("frozen", {})}
    owners = equal_blocks(count, len(classes)).tolist()
    prototypes = [{"index": j, "class": c} for j, c in enumerate(owners)]
    workdir = Workdir(folder)
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json())
    write_json(folder / "classes.json", vars(classes))
    workdir.save(Checkpoint("joint", 1, True, arrays, prototypes))
    workdir.wait()
    return api.load(folder)


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
        ("Pascal (MSC, 513²)", pascal.get_config(), label_sets.VOC, (512, 512)),
        ("Cityscapes", cityscapes.get_config(), label_sets.CITYSCAPES, (1024, 2048)),
    ):
        model = made_up_run(scratch / classes.names[0], config, classes)
        image = picture(rng, size)
        explain = seconds(lambda model=model, image=image: model.explain(image))
        segment = seconds(lambda model=model, image=image: model.segment(image))
        forward = seconds(
            lambda model=model, image=image: jax.block_until_ready(
                model._infer(model._variables, model.inference.prepare(image)).logits
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
    """The largest page the limits are set for."""
    rng = np.random.default_rng(0)
    vectors = rng.random((PROTOTYPES, FEATURES), np.float32)
    kernel = rng.normal(0, 0.3, (PROTOTYPES, CLASSES)).astype(np.float32)
    owners = equal_blocks(PROTOTYPES, CLASSES).tolist()
    cards = []
    for j, c in enumerate(owners):
        image, box = picture(rng, (375, 500)), [96, 104, 104, 112]
        figures.save_source(folder / "sources" / f"{j}.jpg", image)
        patch, inner = figures.crop_with_context(image, box)
        card = explorer.PrototypeCard(
            index=j, class_=c, image_id=f"2008_{j:06d}", box=box, source_size=image.shape[:2],
            patch=patch, patch_box=inner, source=folder / "sources" / f"{j}.jpg", share=1 / 210,
            nearest=[(patch, c, f"2008_{k:06d}") for k in range(6)],
        )  # fmt: skip
        cards.append(card)
    shown = []
    for n in range(IMAGES):
        image = picture(rng, (512, 512))
        coarse = rng.integers(0, CLASSES, (12, 12), np.uint8)
        labels = cv2.resize(coarse, (512, 512), interpolation=cv2.INTER_NEAREST)
        features = rng.random((*POINTS, FEATURES), np.float32)
        similarities = np.zeros((*POINTS, PROTOTYPES), np.float32)
        shown.append(
            explorer.Shown(f"image {n}", image, labels, labels, features, similarities, [])
        )
    explorer.write(
        folder / "explain", title="benchmark", facts=[], notes=[], classes=label_sets.VOC,
        vectors=vectors, kernel=kernel, similarity="log", cards=cards, images=shown,
    )  # fmt: skip
    return folder / "explain" / "index.html"


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
            f"`python benchmarks/explaining.py`, {machine.describe()}",
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
