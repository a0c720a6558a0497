"""What projection and pruning leave to look at: where each prototype comes from and fires."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.patches import Rectangle

from protoseg_jax import images, models
from protoseg_jax.files import write_atomically
from protoseg_jax.models.prototypes import EPSILON
from protoseg_jax.progress import Progress
from protoseg_jax.run.checkpoints import Checkpoint
from protoseg_jax.run.experiment import Experiment
from protoseg_jax.run.prototypes import FOLDER, Prototype, write_record

_COLUMNS = 10
_SOURCE_SIDE, _SOURCE_QUALITY = 1024, 90
_PANEL_SIDE = 512  # of images in a class's picture


@dataclasses.dataclass(frozen=True)
class _Panels:
    """What is drawn of one prototype.

    Attributes:
      prototype: whose.
      crop: its patch with surroundings.
      inner: the patch within, [top, left, bottom, right].
      source: the image that it comes from, shrunk.
      box: the patch in that.
      activation: its similarity (eq. 1) over the image, at feature-map resolution.
    """

    prototype: Prototype
    crop: UInt8[np.ndarray, "h w 3"]
    inner: Sequence[int]
    source: UInt8[np.ndarray, "h w 3"]
    box: Sequence[float]
    activation: Float[np.ndarray, "h w"]


def write(path: Path, experiment: Experiment, checkpoint: Checkpoint) -> None:
    """prototypes.json, the source crops, the source images and one picture a class.

    Args:
      path: the run's folder.
      experiment: its examples.
      checkpoint: of projected prototypes.
    """
    names, inference = experiment.labels.names, experiment.inference(checkpoint.prototypes)
    source = experiment.examples(experiment.config.data.projection_split)
    folder = path / FOLDER
    folder.mkdir(exist_ok=True)
    for old in (*folder.glob("*.png"), *folder.glob("sources/*.jpg")):
        old.unlink()
    homes = {}
    projected = [p for p in checkpoint.prototypes if p.projected]  # a bias is no patch
    for number in sorted({p.image for p in projected}):
        example = source[number]
        name = f"{number:06d}_{images.file_name(example['image_id'])}.jpg"
        shrunk = images.shrink(example["image"], _SOURCE_SIDE)
        write_atomically(
            folder / "sources" / name, images.encode(shrunk, ".jpg", quality=_SOURCE_QUALITY)
        )
        homes[number] = {"source_file": name, "source_size": example["image"].shape[:2]}
    prototypes = [dataclasses.replace(p, **homes[p.image]) for p in projected]
    write_record(
        path,
        prototypes,
        phase=checkpoint.phase,
        eval_size=inference.eval_size,
        feature_size=inference.feature_size,
        classes=names,
    )
    infer = jax.jit(lambda v, image: inference(v, image[None]).similarities[0])
    for c, name in enumerate(Progress.over(names, "drawing prototypes", "class")):
        own = [(j, p) for j, p in enumerate(prototypes) if p.class_ == c]  # the bias is last
        if not own:
            continue
        panels = []
        for j, p in own:
            image = source[p.image]["image"]  # one at a time: it may be huge
            crop, inner = images.crop_with_context(image, p.box)
            crop = crop.copy()  # a view would keep the whole image
            write_atomically(folder / f"{p.index:03d}.png", images.encode(crop))
            activation = np.asarray(infer(checkpoint.variables, inference.prepare(image))[..., j])
            small = images.shrink(image, _PANEL_SIDE)
            scale = np.array(small.shape[:2] * 2) / (image.shape[:2] * 2)
            panels.append(_Panels(p, crop, inner, small, list(p.box * scale), activation))
        kind, top = models.kind(experiment.config.model), np.log(1 / EPSILON)
        if kind == "direction":
            top = max(1e-9, *(x.activation.max() for x in panels))
        drawn = _class_picture(kind, name, panels, top)
        write_atomically(folder / f"class_{c:02d}_{images.file_name(name)}.png", drawn)


def _class_picture(kind: str, class_name: str, panels: Sequence[_Panels], top: float) -> bytes:
    """A PNG of one class's prototypes: patch with surroundings, source image, activation over it.

    Args:
      kind: "prototype" or "direction".
      class_name: shown in the title.
      panels: of the class's prototypes.
      top: activations are drawn on one scale, 0 … top: log(1/ε), that of a patch and itself;
        colour and opacity go by its square root, as most similarities are small beside that.
    """
    columns = min(len(panels), _COLUMNS)
    bands = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        3 * bands,
        columns,
        figsize=(1.7 * columns + 0.3, 1.75 * 3 * bands + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.axis("off")
    for n, of in enumerate(panels):
        p, image = of.prototype, of.source
        band, column = divmod(n, columns)
        patch, source, heat = axes[3 * band : 3 * band + 3, column]
        patch.imshow(of.crop, interpolation="nearest")
        patch.add_patch(outline(of.inner))
        patch.set_title(f"{kind} {p.index}", fontsize=8)
        source.imshow(image)
        source.add_patch(outline(of.box))
        source.set_title(_short(p.image_id), fontsize=6)
        heat.imshow(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cmap="gray")
        size = (image.shape[1], image.shape[0])
        activation = cv2.resize(of.activation.astype(np.float32), size)  # bilinear
        strength = np.sqrt((activation / top).clip(0, 1))
        heat.imshow(strength, cmap="inferno", alpha=0.9 * strength, vmin=0.0, vmax=1.0)
        heat.add_patch(outline(of.box))
    figure.suptitle(f"{class_name}: patch · source image · activation", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def outline(box: Sequence[float]) -> Rectangle:
    """A white frame around a box of pixels, for an axis that shows the image."""
    top, left, bottom, right = box
    corner = (left - 0.5, top - 0.5)
    return Rectangle(corner, right - left, bottom - top, fill=False, edgecolor="white", lw=1.2)


def _short(text: str, length: int = 22) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]
