"""Pictures as arrays: encoding, resizing and cropping; files are read by `decoding`."""

import io
import zlib
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

# Surroundings shown on each side of a patch: cells, and at least this share of the image.
_CONTEXT_CELLS = 2
_CONTEXT_SHARE = 1 / 12

Box = tuple[int, int, int, int]
"""(top, left, height, width)."""


def encode(
    array: UInt8[np.ndarray, "h w *c"], suffix: str = ".png", quality: int | None = None
) -> bytes:
    """8-bit grey [h w] or RGB [h w 3] as PNG, ".bmp", or ".jpg" of a quality in 0–100."""
    if array.ndim == 3:
        array = cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
    options = [] if quality is None else [cv2.IMWRITE_JPEG_QUALITY, quality]
    done, data = cv2.imencode(suffix, array, options)
    if not done:
        raise ValueError(f"{array.shape[1]}×{array.shape[0]} pixels do not fit a {suffix} file")
    return data.tobytes()


def encode_labels(labels: UInt8[np.ndarray, "h w"]) -> bytes:
    """Labels as 8-bit grey PNG, its rows not filtered: they decode three times as fast as those of
    `encode`, and are smaller (benchmarks/results/input.md)."""
    options = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE, cv2.IMWRITE_PNG_COMPRESSION, 6]
    return cv2.imencode(".png", labels, options)[1].tobytes()


def palette_png(
    labels: UInt8[np.ndarray, "h w"], colours: Sequence[tuple[int, int, int]] = ()
) -> bytes:
    """Labels as PNG: indexed with their colours, or 8-bit grey without any.

    Compressed by runs of one value: labels take about as many bytes as by zlib's default, which
    needs longer.
    """
    image = Image.fromarray(labels)
    if colours:
        image = image.convert("P")
        image.putpalette([channel for colour in colours for channel in colour])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def resize_image(image: np.ndarray, size: tuple[int, int], box: Box | None = None) -> np.ndarray:
    """[h w *c] → a (height, width), bilinear, half-pixel centres, no antialiasing, aspect ignored
    (docs/method.md#evaluation).

    With a `box`, what of it lies within that size: to the bit the same, without the rest.
    """
    if box is None or image.shape[:2] == tuple(size):
        whole = _resize(image, size, cv2.INTER_LINEAR)
        return whole if box is None else whole[_within(box, size)]
    rows, cols = _within(box, size)
    # From the image's corner on: OpenCV rounds its weights by where it was told that pixels lie.
    bottom, right = (
        min(n, -(-end * n // scaled) + 2)
        for n, end, scaled in zip(image.shape[:2], (rows.stop, cols.stop), size, strict=True)
    )
    fy, fx = size[0] / image.shape[0], size[1] / image.shape[1]
    part = image[:bottom, :right]
    if (round(bottom * fy), round(right * fx)) == part.shape[:2]:  # OpenCV would copy it as it is
        return _resize(image, size, cv2.INTER_LINEAR)[rows, cols]
    return cv2.resize(part, None, fx=fx, fy=fy, interpolation=cv2.INTER_LINEAR)[rows, cols]


def resize_labels(labels: np.ndarray, size: tuple[int, int], box: Box | None = None) -> np.ndarray:
    """[h w *c] → a (height, width), nearest at cell centres; with a `box` as `resize_image`."""
    if box is None:
        return _resize(labels, size, cv2.INTER_NEAREST_EXACT)
    rows, cols = (
        _resize(np.arange(n, dtype=np.int32)[:, None], (scaled, 1), cv2.INTER_NEAREST_EXACT)[:, 0]
        for n, scaled in zip(labels.shape[:2], size, strict=True)
    )
    wanted = _within(box, size)
    return labels[rows[wanted[0]]].take(cols[wanted[1]], 1)


def _within(box: Box, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of what of a box lies within a size."""
    top, left, height, width = box
    return slice(top, min(top + height, size[0])), slice(left, min(left + width, size[1]))


def shrink(image: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "H W 3"]:
    """The image with its longer side at most `side` pixels, its aspect kept."""
    scale = side / max(image.shape[:2])
    if scale >= 1:
        return image
    return _resize(image, [max(1, round(n * scale)) for n in image.shape[:2]], cv2.INTER_AREA)


def _resize(array: np.ndarray, size: Sequence[int], interpolation: int) -> np.ndarray:
    if array.shape[:2] == tuple(size):
        return array
    return cv2.resize(array, (size[1], size[0]), interpolation=interpolation)


def pad_and_crop(array: np.ndarray, box: Box, fill: int | tuple[int, int, int]) -> np.ndarray:
    """Cut a box out of an array; what lies beyond its bottom or right edge is filled."""
    top, left, height, width = box
    cut = array[top : top + height, left : left + width]
    bottom, right = height - cut.shape[0], width - cut.shape[1]
    if not (bottom or right):
        return cut
    return cv2.copyMakeBorder(cut, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=fill)


def crop_with_context(
    image: UInt8[np.ndarray, "h w 3"], box: Sequence[int]
) -> tuple[np.ndarray, list[int]]:
    """A patch, [top, left, bottom, right], with its surroundings; its box inside the crop."""
    top, left, bottom, right = box
    dy, dx = _context(box, image.shape[:2])
    crop = image[max(top - dy, 0) : bottom + dy, max(left - dx, 0) : right + dx]
    return crop, inner_box(box, image.shape[:2])


def inner_box(box: Sequence[int], size: tuple[int, int]) -> list[int]:
    """A patch's box inside its crop (`crop_with_context`) of an image of a (height, width)."""
    top, left, bottom, right = box
    y, x = (min(n, d) for n, d in zip((top, left), _context(box, size), strict=True))
    return [y, x, y + bottom - top, x + right - left]


def _context(box: Sequence[int], size: tuple[int, int]) -> tuple[int, int]:
    """Pixels of surroundings above and below, left and right."""
    top, left, bottom, right = box
    least = int(min(size) * _CONTEXT_SHARE)
    return tuple(max(_CONTEXT_CELLS * n, least) for n in (bottom - top, right - left))


def file_name(text: str) -> str:
    """Text with all but letters and digits replaced, for a file's name."""
    return "".join(ch if ch.isalnum() else "_" for ch in text)
