"""Image files of any kind as arrays: what a file holds, with all its bits, and what is wrong."""

import contextlib
import dataclasses
import io
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image, UnidentifiedImageError

from protoseg_jax.errors import Fault, UserError, reason

# What does not decode is told here.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

_ORIENTATION = 0x0112  # the EXIF and TIFF tag
# What Pillow raises of a file that is cut short or of another kind.
_BROKEN = (UnidentifiedImageError, OSError, EOFError, SyntaxError, ValueError, TypeError, KeyError)
_BROKEN += (struct.error, RuntimeError, Image.DecompressionBombError)
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}  # that EXIF data, and a TIFF, begin with
_TIFFS = (*_BYTE_ORDERS, b"II+\0", b"MM\0+")  # and one beyond 4 GiB

_OTHER_NUMBERS = "image of another kind of numbers"

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")
"""Endings of image files, in lower case."""

ImageLike = "str | os.PathLike | np.ndarray | Image.Image"


def decode(data: bytes, *, grey: bool = False) -> UInt8[np.ndarray, "h w *c"]:
    """An encoded image as RGB [h w 3] or as `grey` [h w], as stored, whatever its orientation.

    Raises:
      ValueError: the bytes do not decode.
    """
    return _decode(data, cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR_RGB)


def decode_file(
    data: bytes, where: object
) -> tuple[UInt8[np.ndarray, "h w 3"] | UInt16[np.ndarray, "h w 3"], "Header"]:
    """(RGB as stored, with all the bits that a file has (see `eight_bits`); what else it says).

    CMYK becomes RGB as 255·(1 − c)(1 − k), without a colour profile.

    Raises:
      Fault: it is no single opaque picture, or too large; `where` names it.
    """
    if not data:
        raise Fault("empty image", f"image {where} is empty (0 bytes)", "copy it anew")
    about = header(data)
    _check_size(about, "image", where)
    if about.frames > 1:
        raise Fault(
            "image of several pictures",
            f"image {where} is {about.several}",
            "save the one that is meant",
        )
    if about.transparent:
        raise Fault(
            "transparent image",
            f"image {where} has transparent pixels, whose colour is not known",
            "save it without transparency",
        )
    if about.mode in ("F", "I"):
        raise Fault(_OTHER_NUMBERS, f"image {where} has 32-bit values", "convert it to 8 bits")
    try:
        if about.mode == "CMYK":
            with _quietly_opened(data) as image:
                return np.array(image.convert("RGB")), about
        pixels = _decode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH)
    except (*_BROKEN, cv2.error) as error:
        why = "cut short, or damaged" if about.mode else "of no known format"
        raise Fault(
            "image that does not decode", f"image {where} does not decode ({why})", "replace it"
        ) from error
    if not about.mode:  # what Pillow does not know nobody has looked at: alpha, pages, bits
        raise Fault(
            _OTHER_NUMBERS,
            f"image {where} is neither grey nor RGB with 8 or 16 bits",
            "convert it to such a one",
        )
    return pixels, about


def _check_size(about: "Header", what: str, where: object) -> None:
    if about.pixels > (Image.MAX_IMAGE_PIXELS or np.inf) * 2:
        raise Fault(
            f"{what} that is too large",
            f"{what} {where} has {about.pixels / 1e6:.0f} million pixels, more than are read",
            "cut it into pieces",
        )


def _decode(data: bytes, flags: int) -> np.ndarray:
    flags |= cv2.IMREAD_IGNORE_ORIENTATION
    if data[:4] == b"\x89PNG" and b"IEND" not in data:
        raise ValueError("cut short")  # libpng would tell it, too
    array = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if array is None:
        raise ValueError("not an image")
    if data[:4] in _TIFFS:  # a TIFF, which OpenCV turns nevertheless
        array = _turned_back(array, header(data).orientation)
    return array


def eight_bits(
    array: np.ndarray, white: int | None, where: object, advice: str
) -> UInt8[np.ndarray, "h w *c"]:
    """Pixels with 8 bits: 16-bit ones as round(min(v, white) · 255 / white), 8-bit ones as given.

    Args:
      array: uint8 or uint16 [h w *c].
      white: the 16-bit value that is white, in 1–65535; None where that is not known.
      where: names the image.
      advice: what to do where `white` is not known.

    Raises:
      Fault: `white` is needed and not known, or the values are of another kind.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype != np.uint16:
        raise Fault(_OTHER_NUMBERS, f"image {where} has {array.dtype} values", "use 8 bits")
    if not white:
        raise Fault(
            "image of 16 bits",
            f"image {where} has 16 bits a channel, its largest value is {array.max()}, and which "
            "value is white is not known",
            advice,
        )
    values = np.minimum(np.arange(2**16), white)
    return ((510 * values + white) // (2 * white)).astype(np.uint8)[array]


@dataclasses.dataclass(frozen=True)
class Header:
    """What an encoded image says beside its pixels.

    Attributes:
      orientation: EXIF's, 1–8 (see `turned`); 1 without one, or with one that makes no sense.
      frames: pictures of an animation or a stack; 1 of anything else.
      transparent: whether any pixel is, wholly or in part.
      format, mode: Pillow's; "" of what it does not know.
      pixels: height times width; 0 where that is not known.
    """

    orientation: int = 1
    frames: int = 1
    transparent: bool = False
    format: str = ""
    mode: str = ""
    pixels: int = 0

    @property
    def several(self) -> str:
        """More than one frame, in words."""
        kind = "a stack of {} pages" if self.format == "TIFF" else "an animation of {} frames"
        return kind.format(self.frames)


def header(data: bytes) -> Header:
    """The header of an encoded image; of what Pillow does not know, a plain one."""
    about = Header()
    try:
        with _quietly_opened(data) as image:
            # A phone's JPEG may hold a second picture (MPO), a preview.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            # TIFFs that pack 12 bits come to OpenCV's hands as other numbers.
            mode = "" if "I;12" in _raw_modes(image) else image.mode
            about = Header(1, frames, False, image.format, mode, image.width * image.height)
            if image.format == "PNG" and b"eXIf" in data:
                image.load()  # that chunk may come after the pixels
            orientation = _orientation(image)
            return dataclasses.replace(
                about, orientation=orientation, transparent=_transparent(image)
            )
    except Image.DecompressionBombError as error:
        size = re.search(r"\((\d+) pixels\)", str(error))
        return Header(pixels=int(size[1]) if size else 2**40)
    except _BROKEN:
        return about


@contextlib.contextmanager
def _quietly_opened(data: bytes) -> Iterator[Image.Image]:
    with _quiet, Image.open(io.BytesIO(data)) as image:
        yield image


class _Quiet:
    """Without the warnings of Pillow, of EXIF data that are broken and of large images.

    `warnings.catch_warnings` alone would not do for several threads: the first to leave would give
    the others' warnings back, or the last one's filter would stay.
    """

    def __init__(self):
        self._inside, self._lock = 0, threading.Lock()
        self._catch = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._catch = warnings.catch_warnings()
                self._catch.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._catch.__exit__(None, None, None)


_quiet = _Quiet()


def _transparent(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    if image.mode.startswith("I"):  # which Pillow does not convert
        return bool((np.array(image) == image.info["transparency"]).any())
    return image.convert("RGBA").getchannel("A").getextrema()[0] < 255


def _orientation(image: Image.Image) -> int:
    if hasattr(image, "tag_v2"):
        value = image.tag_v2.get(_ORIENTATION)
    else:
        value = _tagged(image.info.get("exif") or b"")
    return value if value in range(1, 9) else 1


def _tagged(exif: bytes) -> int | None:
    """The orientation that EXIF data hold, if they do and are whole so far."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = _BYTE_ORDERS.get(exif[:4])
    if order:
        with contextlib.suppress(struct.error):
            (start,) = struct.unpack_from(f"{order}I", exif, 4)
            (count,) = struct.unpack_from(f"{order}H", exif, start)
            for at in range(start + 2, start + 2 + 12 * count, 12):
                tag, kind = struct.unpack_from(f"{order}HH", exif, at)
                if tag == _ORIENTATION and kind in (3, 4):  # a short or a long
                    return struct.unpack_from(f"{order}{'HI'[kind - 3]}", exif, at + 8)[0]
    return None


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """[h w *c] as stored → as shown with an EXIF orientation, contiguous."""
    if orientation in (3, 4, 6, 7):
        array = array[::-1]
    if orientation in (2, 3, 7, 8):
        array = array[:, ::-1]
    if orientation > 4:
        array = array.swapaxes(0, 1)
    return np.ascontiguousarray(array)


def _turned_back(array: np.ndarray, orientation: int) -> np.ndarray:
    return turned(array, {6: 8, 8: 6}.get(orientation, orientation))


@contextlib.contextmanager
def _opened(file: Path | io.BytesIO, problem: str, *, why: bool = False) -> Iterator[Image.Image]:
    """A file opened by Pillow; a UserError of a problem, and `why`, if it is not what it should."""
    try:
        # Not by its path, by which Pillow maps a plain TIFF and garbles one that is to be turned.
        opened = file.open("rb") if isinstance(file, Path) else file
        with _quiet, opened, Image.open(opened) as image:
            yield image
    except _BROKEN as error:
        told = f" ({reason(error)})" if why else ""
        raise Fault("file that does not decode", f"{problem}{told}", "replace the file") from error


class Mask(NamedTuple):
    """A decoded mask.

    Attributes:
      values: as stored, whatever the bits: grey, palette indices (never their colours), or RGB.
      palette: red, green, blue of each index; b"" of a mask without.
      orientation: EXIF's (see `turned`).
      opacity: alpha of each pixel, also by PNG's transparent colour; None where all are opaque.
      bits: 1 of a mask of one bit, else 8 or 16.
    """

    values: UInt8[np.ndarray, "h w *c"] | UInt16[np.ndarray, "h w"]
    palette: bytes = b""
    orientation: int = 1
    opacity: UInt8[np.ndarray, "h w"] | None = None
    bits: int = 8


def decode_mask(data: bytes, where: object) -> Mask:
    """A mask as PNG, TIFF, BMP or lossless WebP: grey, indexed, or in colour.

    Raises:
      Fault: it does not decode, is none of these, or is stored such that values are not kept
        exactly; `where` names it.
    """
    if not data:
        raise Fault("empty mask", f"mask {where} is empty (0 bytes)", "write it again")
    _check_size(header(data), "mask", where)
    with _opened(io.BytesIO(data), f"mask {where} does not decode") as mask:
        if _lossy(mask, data):
            raise Fault(
                "mask with lossy compression",
                f"mask {where} is a {mask.format} with lossy compression, which changes values at "
                "edges",
                "export it again as PNG (converting this file does not bring them back)",
            )
        _check_still(mask, f"mask {where}")
        if told := _garbled(mask, data):
            raise Fault("mask of another mode", f"mask {where} is {told}", "save it as 8-bit PNG")
        orientation, turns = _orientation(mask), mask.format == "TIFF"
        kept = _mask_arrays(mask, where)
        if turns:  # Pillow has turned it
            kept = {name: _turned_back(array, orientation) for name, array in kept.items()}
        palette = bytes(mask.getpalette("RGB") or ()) if mask.mode in ("P", "PA") else b""
        bits = {"1": 1}.get(mask.mode, 8 * kept["values"].itemsize)
        return Mask(palette=palette, orientation=orientation, bits=bits, **kept)


def _garbled(mask: Image.Image, data: bytes) -> str | None:
    """What a mask is whose values Pillow does not give as they are stored."""
    if _crushed(mask):
        return "in colour, or with alpha, with 16 bits a channel"
    if mask.format == "BMP":
        bits = int.from_bytes(data[28:30], "little")
        if bits not in (1, 8, 24, 32) or (mask.mode == "1") != (bits == 1):
            return f"a BMP of {bits} bits in a few greys"  # read as single bits, or as brighter
    if mask.format == "TIFF" and mask.mode in ("1", "L") and mask.tag_v2.get(262) == 0:
        return "a TIFF in which 0 is shown as white"
    return None


def _mask_arrays(mask: Image.Image, where: object) -> dict[str, np.ndarray]:
    """{"values", and "opacity" where any pixel is not opaque} of an opened mask."""
    raw = _raw_modes(mask)
    if mask.mode in ("1", "P", "L", "RGB") or mask.mode.startswith("I"):
        values, alpha = np.array(mask), None
    elif mask.mode in ("LA", "PA", "RGBA"):
        *bands, alpha = (np.array(band) for band in mask.split())
        values = bands[0] if len(bands) == 1 else np.stack(bands, -1)
    else:
        raise Fault(
            "mask of another mode",
            f"mask {where} has mode {mask.mode}, and a mask is grey, indexed or RGB",
            "save it as such a PNG",
        )
    if values.dtype not in (np.uint8, np.uint16):
        if values.dtype != bool and not (0 <= values.min() and values.max() <= 65535):
            raise Fault(
                "mask of other numbers",
                f"mask {where} has values from {values.min()} to {values.max()}, and they must lie "
                "in 0–65535",
                "write it anew with others",
            )
        values = values.astype(np.uint8 if values.dtype == bool else np.uint16)
    if alpha is None and mask.has_transparency_data:
        alpha = _alpha_of(values, mask.info["transparency"])
    for bits in (2, 4):  # of grey, which Pillow spreads over 0–255
        if f"L;{bits}" in raw:
            values = values // (255 // (2**bits - 1))
    opaque = alpha is None or (alpha == 255).all()
    return {"values": values, **({} if opaque else {"opacity": alpha})}


def _alpha_of(values: np.ndarray, transparent: bytes | int | tuple) -> UInt8[np.ndarray, "h w"]:
    """Alpha by PNG's tRNS: of each palette index, or 0 for one value or colour."""
    if isinstance(transparent, bytes):
        table = np.full(256, 255, np.uint8)
        table[: len(transparent)] = np.frombuffer(transparent, np.uint8)
        return table[values]
    clear = values == np.array(transparent)
    return np.where(clear.all(-1) if values.ndim == 3 else clear, 0, 255).astype(np.uint8)


def _webp_chunks(data: bytes) -> set[bytes]:
    """Names of the chunks of a WebP file (RFC 9649): "VP8 " is lossy, "VP8L" is not."""
    found, at = set(), 12
    while at + 8 <= len(data):
        found.add(data[at : at + 4])
        at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        at += at % 2
    return found


def _lossy(image: Image.Image, data: bytes) -> bool:
    """Whether an image's compression changes pixels."""
    if image.format == "WEBP":
        return b"VP8 " in _webp_chunks(data)
    if image.format == "TIFF":
        return "jpeg" in str(image.info.get("compression", ""))
    return image.format in ("JPEG", "MPO", "JPEG2000", "AVIF")


def _check_still(image: Image.Image, what: str) -> None:
    about = Header(frames=getattr(image, "n_frames", 1), format=image.format)
    if about.frames > 1:
        raise Fault(
            "file of several pictures", f"{what} is {about.several}", "save the one that is meant"
        )


def count_pages(path: Path) -> int:
    """Pages of a TIFF stack.

    Raises:
      UserError: it is none.
    """
    with _opened(path, f"{path} is no TIFF stack", why=True) as stack:
        return getattr(stack, "n_frames", 1)


def read_page(path: Path, page: int, where: str) -> tuple[str, np.ndarray, int]:
    """(Pillow's mode, values as stored, EXIF orientation) of a page, a palette resolved.

    Raises:
      UserError: it does not decode, or is RGB with 16 bits; `where` names it.
    """
    with _opened(path, f"{where} does not decode") as stack:
        if stack.format != "TIFF":
            _check_still(stack, where)
            if _transparent(stack):
                raise UserError(f"{where} has transparent pixels; save it without transparency")
        stack.seek(page)
        if _crushed(stack):
            raise UserError(
                f"{where} has 16 bits a channel, not grey alone; convert it to 8-bit grey"
            )
        orientation = _orientation(stack)
        frame = stack.convert("RGB") if stack.mode == "P" else stack
        values = np.array(frame)
        if stack.format == "TIFF":  # which Pillow has turned
            values = _turned_back(values, orientation)
        return frame.mode, values, orientation


def read(
    image: ImageLike, white: int | None = None, *, as_shown: bool = True
) -> UInt8[np.ndarray, "h w 3"]:
    """An image as RGB bytes.

    Args:
      image: a path, a PIL image, or uint8 or uint16 [h w 3] RGB or [h w] grey.
      white: the value that is white in 16-bit images, if that is known (see `eight_bits`).
      as_shown: whether an orientation is followed.

    Raises:
      UserError: it does not exist, does not decode, is neither RGB nor grey, is transparent, or has
        16 bits without a `white`, or that Pillow has cut to 8.
    """
    if isinstance(image, np.ndarray):
        pixels = image[..., None] if image.ndim == 2 else image
        if (
            image.dtype not in (np.uint8, np.uint16)
            or pixels.ndim != 3
            or pixels.shape[2] not in (1, 3)
        ):
            raise UserError(
                f"an image array is {image.dtype} {list(image.shape)}; give uint8 [h, w, 3] RGB or "
                "[h, w] grey"
            )
        pixels = eight_bits(pixels, white, "array", _NO_WHITE)
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy()
    if isinstance(image, Image.Image):
        _check_mode(image)
        if _crushed(image):
            raise UserError(
                "the image has 16 bits a channel, of which Pillow keeps 8; give its path"
            )
        deep, orientation = image.mode.startswith("I;16"), _orientation(image)
        pixels = np.array(image).astype(np.uint16) if deep else np.array(image.convert("RGB"))
        pixels = read(pixels, white)
        if image.format == "TIFF":  # which Pillow has turned
            return pixels if as_shown else _turned_back(pixels, orientation)
        return turned(pixels, orientation) if as_shown else pixels
    try:
        data = Path(image).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"image {image} does not exist; check the path") from error
    except (OSError, ValueError) as error:
        raise UserError(f"image {image} cannot be read ({reason(error)})") from error
    pixels, about = decode_file(data, image)
    pixels = eight_bits(pixels, white, image, _NO_WHITE)
    return turned(pixels, about.orientation) if as_shown else pixels


_NO_WHITE = "the run has no data.white, so convert the image to 8 bits"


def _check_mode(image: Image.Image) -> None:
    known = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")
    if image.mode not in known and not image.mode.startswith("I;16"):
        raise UserError(f"the image is {image.mode}, neither RGB nor grey with 8 bits; convert it")
    if _transparent(image):
        raise UserError("the image has transparent pixels; save it without transparency")


def _crushed(image: Image.Image) -> bool:
    """Whether Pillow, which has not yet read the pixels, will drop 8 of their 16 bits."""
    return not image.mode.startswith("I") and any(";16" in kind for kind in _raw_modes(image))


def _raw_modes(image: Image.Image) -> list[str]:
    """How a file's pixels are packed, in Pillow's words, of an image that is not read yet."""
    packed = [tile[3] for tile in getattr(image, "tile", ())]
    return [kind if isinstance(kind, str) else str(kind[0]) for kind in packed if kind]
