"""Reading pairs of image and mask files, with one line for whatever is wrong with them."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from protoseg_jax.data.builders.base import Example, decode_image
from protoseg_jax.data.label_sets import VOID
from protoseg_jax.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def require_folder(path: Path, name: str, layout: str) -> Path:
    """The folder, which must exist and not be empty.

    Raises:
      UserError: it does not.
    """
    if not path.is_dir():
        raise UserError(f"{name}: folder {path} does not exist; data.dir must hold {layout}")
    if not any(path.iterdir()):
        raise UserError(f"{name}: folder {path} is empty; data.dir must hold {layout}")
    return path


def images_in(folder: Path) -> dict[str, Path]:
    """Image files of a folder by stem, sorted.

    Raises:
      UserError: two images share a stem.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if path.stem in found:
                raise UserError(
                    f"{found[path.stem]} and {path} have the same name; remove one of them"
                )
            found[path.stem] = path
    return found


def read_mask(path: Path) -> np.ndarray:
    """Values of an indexed or grey 8-bit mask, [h w]; palette indices, never their colours.

    Raises:
      UserError: the file does not decode or is neither indexed nor grey.
    """
    return decode_mask(path.read_bytes(), path)


def decode_mask(data: bytes, where: object) -> np.ndarray:
    """As `read_mask`, of encoded bytes; `where` names them in messages."""
    try:
        with Image.open(io.BytesIO(data)) as mask:
            if mask.mode not in ("P", "L", "1"):
                raise UserError(
                    f"mask {where} has mode {mask.mode}; save it as 8-bit grey or indexed PNG"
                )
            return np.array(mask).astype(np.uint8)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"mask {where} does not decode; replace the file") from error


def read_image(data: bytes, where: object) -> UInt8[np.ndarray, "h w 3"]:
    """An encoded image as RGB; `where` names it in messages.

    Raises:
      UserError: it does not decode.
    """
    try:
        return decode_image(data)
    except ValueError as error:
        raise UserError(f"image {where} does not decode; replace the file") from error


def read_unlabelled(stem: str, image: Path) -> Example:
    """An image without labels: all of it is void.

    Raises:
      UserError: the file does not decode.
    """
    data = image.read_bytes()
    return Example(stem, data, np.full(read_image(data, image).shape[:2], VOID, np.uint8))


def read_pair(
    stem: str, image: Path, mask: Path, values: Mapping[int, int], classes: int
) -> Example:
    """An image with its mask, checked.

    Args:
      stem: becomes the image's id.
      image: PNG or JPEG.
      mask: indexed or grey PNG.
      values: mask values that do not stand for themselves, e.g. {11: VOID}.
      classes: C; after `values`, a mask holds 0 … C−1 and VOID.

    Raises:
      UserError: a file is missing, does not decode, has another size, or a strange value.
    """
    if not mask.is_file():
        raise UserError(f"image {image} has no mask {mask}; add it or remove the image")
    data = image.read_bytes()
    size = read_image(data, image).shape[:2]
    raw = read_mask(mask)
    if raw.shape != size:
        raise UserError(
            f"image {image} is {size[0]}×{size[1]} but its mask {mask} is "
            f"{raw.shape[0]}×{raw.shape[1]} (height×width); make them equal"
        )
    table = np.full(256, 254, np.uint8)
    table[:classes] = np.arange(classes)
    for value, label in values.items():
        table[value] = label
    label = table[raw]
    if (label == 254).any():
        value = int(raw[label == 254][0])
        raise UserError(
            f"mask {mask} holds the value {value}, which is neither a class (0–{classes - 1}) nor "
            f"void ({', '.join(str(v) for v, to in values.items() if to == VOID)}); "
            "correct the mask, the classes or data.void"
        )
    return Example(stem, data, label)
