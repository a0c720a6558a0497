"""Pictures as arrays: all decoding, encoding, resizing and cropping of the package."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from protoseg_jax.errors import UserError, reason

# Surroundings shown on each side of a patch: cells, and at least this share of the image.
_CONTEXT_CELLS = 2
_CONTEXT_SHARE = 1 / 12

ImageLike = "str | os.PathLike | np.ndarray | Image.Image"

Box = tuple[int, int, int, int]
"""(top, left, height, width)."""


def decode(data: bytes, *, grey: bool = False) -> UInt8[np.ndarray, "h w *c"]:
    """An encoded image as RGB [h w 3], turned as its EXIF orientation says; or as `grey` [h w].

    Raises:
      ValueError: the bytes do not decode.
    """
    flag = cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR_RGB
    array = cv2.imdecode(np.frombuffer(data, np.uint8), flag) if data else None
    if array is None:
        raise ValueError("not an image")
    return array


@contextlib.contextmanager
def _opened(file: Path | io.BytesIO, problem: str, *, why: bool = False) -> Iterator[Image.Image]:
    """A file opened by Pillow; a UserError of a problem, and `why`, if it is not what it should."""
    try:
        with Image.open(file) as image:
            yield image
    except (UnidentifiedImageError, OSError, EOFError, SyntaxError, ValueError) as error:
        told = f" ({reason(error)})" if why else ""
        raise UserError(f"{problem}{told}; replace the file") from error


def decode_mask(data: bytes, where: object) -> UInt8[np.ndarray, "h w"]:
    """Values of an indexed or grey 8-bit mask; palette indices, never their colours.

    Raises:
      UserError: it does not decode or is neither indexed nor grey; `where` names it.
    """
    with _opened(io.BytesIO(data), f"mask {where} does not decode") as mask:
        if mask.mode not in ("P", "L", "1"):
            raise UserError(
                f"mask {where} has mode {mask.mode}; save it as 8-bit grey or indexed PNG"
            )
        return np.array(mask).astype(np.uint8)


def count_pages(path: Path) -> int:
    """Pages of a TIFF stack.

    Raises:
      UserError: it is none.
    """
    with _opened(path, f"{path} is no TIFF stack", why=True) as stack:
        return getattr(stack, "n_frames", 1)


def read_page(path: Path, page: int, where: str) -> tuple[str, np.ndarray]:
    """(Pillow's mode, values) of a page of a file, a palette resolved.

    Raises:
      UserError: it does not decode; `where` names it.
    """
    with _opened(path, f"{where} does not decode") as stack:
        stack.seek(page)
        frame = stack.convert("RGB") if stack.mode == "P" else stack
        return frame.mode, np.array(frame)


def read(image: ImageLike) -> UInt8[np.ndarray, "h w 3"]:
    """An image as RGB bytes.

    Args:
      image: a path, a PIL image, or uint8 [h w 3] RGB or [h w] grey.

    Raises:
      UserError: it does not exist, does not decode, or is neither RGB nor grey with 8 bits.
    """
    if isinstance(image, np.ndarray):
        pixels = image[..., None] if image.ndim == 2 else image
        if image.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
            raise UserError(
                f"an image array is {image.dtype} {list(image.shape)}; give uint8 [h, w, 3] RGB or "
                "[h, w] grey"
            )
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy()
    if isinstance(image, Image.Image):
        _check_mode(image, "the image")
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    try:
        with Image.open(image) as opened:
            _check_mode(opened, image)
        return decode(Path(image).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"image {image} does not exist; check the path") from error
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise UserError(f"image {image} does not decode ({reason(error)}); replace it") from error


def _check_mode(image: Image.Image, name: object) -> None:
    if image.mode not in ("1", "L", "P", "RGB"):
        raise UserError(
            f"image {name} is {image.mode}, neither RGB nor grey with 8 bits; convert it"
        )


def encode(
    array: UInt8[np.ndarray, "h w *c"], suffix: str = ".png", quality: int | None = None
) -> bytes:
    """8-bit grey [h w] or RGB [h w 3] as PNG, ".bmp", or ".jpg" of a quality in 0–100."""
    if array.ndim == 3:
        array = cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
    options = [] if quality is None else [cv2.IMWRITE_JPEG_QUALITY, quality]
    return cv2.imencode(suffix, array, options)[1].tobytes()


def palette_png(
    labels: UInt8[np.ndarray, "h w"], colours: Sequence[tuple[int, int, int]] = ()
) -> bytes:
    """Labels as PNG: indexed with their colours, or 8-bit grey without any."""
    image = Image.fromarray(labels)
    if colours:
        image = image.convert("P")
        image.putpalette([channel for colour in colours for channel in colour])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h w *c] → a (height, width), bilinear, half-pixel centres, no antialiasing, aspect ignored
    (docs/method.md#evaluation)."""
    return _resize(image, size, cv2.INTER_LINEAR)


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h w *c] → a (height, width), nearest at cell centres."""
    return _resize(labels, size, cv2.INTER_NEAREST_EXACT)


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
