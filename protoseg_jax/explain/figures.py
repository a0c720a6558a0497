"""Pictures of prototypes: where each comes from and where it fires."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.patches import Rectangle

from protoseg_jax.data.builders.base import encode_png
from protoseg_jax.data.label_sets import LabelSet
from protoseg_jax.workdir import write_atomically

# Surroundings shown on each side of a patch: cells, and at least this share of the image.
_CONTEXT_CELLS = 2
_CONTEXT_SHARE = 1 / 12
_COLUMNS = 10
_SOURCE_SIDE = 1024


def crop_with_context(
    image: UInt8[np.ndarray, "h w 3"], box: list[int]
) -> tuple[np.ndarray, list[int]]:
    """A patch with its surroundings, and the patch's box inside the crop."""
    top, left, bottom, right = box
    dy, dx = _context(box, image.shape[:2])
    crop = image[max(top - dy, 0) : bottom + dy, max(left - dx, 0) : right + dx]
    return crop, inner_box(box, image.shape[:2])


def inner_box(box: list[int], size: tuple[int, int]) -> list[int]:
    """A patch's box inside its crop (`crop_with_context`) of an image of a (height, width)."""
    top, left, bottom, right = box
    y, x = (min(n, d) for n, d in zip((top, left), _context(box, size), strict=True))
    return [y, x, y + bottom - top, x + right - left]


def _context(box: list[int], size: tuple[int, int]) -> tuple[int, int]:
    """Pixels of surroundings above and below, left and right."""
    top, left, bottom, right = box
    least = int(min(size) * _CONTEXT_SHARE)
    return tuple(max(_CONTEXT_CELLS * n, least) for n in (bottom - top, right - left))


def save_png(path: Path, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Write an RGB image as PNG."""
    write_atomically(path, encode_png(image))


def file_name(text: str) -> str:
    """Text with all but letters and digits replaced, for a file's name."""
    return "".join(ch if ch.isalnum() else "_" for ch in text)


def source_name(number: int, image_id: str) -> str:
    """File of a prototype's source image, from its number in the split and its id."""
    return f"{number:06d}_{file_name(image_id)}.jpg"


def save_source(path: Path, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Write a source image as JPEG, no longer than 1024 pixels."""
    write_atomically(path, encode_jpeg(shrink(image, _SOURCE_SIDE), 90))


def encode_jpeg(image: UInt8[np.ndarray, "h w 3"], quality: int) -> bytes:
    """RGB as JPEG of a quality in 0–100."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def shrink(image: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "H W 3"]:
    """The image with its longer side at most `side` pixels, its aspect kept."""
    scale = side / max(image.shape[:2])
    if scale >= 1:
        return image
    size = tuple(max(1, round(n * scale)) for n in image.shape[1::-1])
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def prototype_colours(
    prototype_classes: Sequence[int], classes: LabelSet
) -> list[tuple[int, int, int]]:
    """A colour of each prototype: shades of its class's, so that lightness tells them apart.

    Args:
      prototype_classes: [M].
      classes: names and colours.
    """
    counts = np.bincount(prototype_classes, minlength=len(classes))
    seen = np.zeros(len(classes), int)
    colours = []
    for c in prototype_classes:
        base = np.array(classes.colours[c], float)
        place = (seen[c] + 0.5) / counts[c]  # from dark to light
        dark, light = 0.35 * base, base + 0.75 * (255 - base)
        colours.append(tuple(np.rint(dark + place * (light - dark)).astype(int).tolist()))
        seen[c] += 1
    return colours


def class_picture(
    path: Path,
    class_name: str,
    prototypes: list[dict[str, Any]],
    images: list[UInt8[np.ndarray, "h w 3"]],
    activations: list[Float[np.ndarray, "h w"]],
) -> None:
    """One class's prototypes: patch with its surroundings, source image, activation over it.

    Args:
      path: PNG to write.
      class_name: shown in the title.
      prototypes: entries of prototypes.json ("index", "box", "image_id").
      images: each prototype's source image.
      activations: similarity (eq. 1) of each prototype over its source image, at feature-map
        resolution; drawn on one scale, 0 … log(1/ε).
    """
    columns = min(len(prototypes), _COLUMNS)
    bands = -(-len(prototypes) // columns)
    figure, axes = plt.subplots(
        3 * bands,
        columns,
        figsize=(1.7 * columns + 0.3, 1.75 * 3 * bands + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.axis("off")
    for n, (prototype, image, activation) in enumerate(
        zip(prototypes, images, activations, strict=True)
    ):
        crop, inner = crop_with_context(image, prototype["box"])
        band, column = divmod(n, columns)
        patch, source, heat = axes[3 * band : 3 * band + 3, column]
        patch.imshow(crop, interpolation="nearest")
        patch.add_patch(outline(inner, "white"))
        patch.set_title(f"prototype {prototype['index']}", fontsize=8)
        source.imshow(image)
        source.add_patch(outline(prototype["box"], "white"))
        source.set_title(_short(prototype["image_id"]), fontsize=6)
        heat.imshow(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cmap="gray")
        size = (image.shape[1], image.shape[0])
        heat.imshow(
            cv2.resize(activation.astype(np.float32), size, interpolation=cv2.INTER_LINEAR),
            cmap="viridis",
            alpha=0.65,
            vmin=0.0,
            vmax=np.log(1e4),
        )
        heat.add_patch(outline(prototype["box"], "white"))
    figure.suptitle(f"{class_name}: patch · source image · activation", fontsize=10)
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(path)


def outline(box: list[int], colour: str) -> Rectangle:
    top, left, bottom, right = box
    return Rectangle(
        (left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=colour, lw=1.2
    )


def _short(text: str, length: int = 22) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]
