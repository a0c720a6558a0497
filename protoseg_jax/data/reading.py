"""How the files of a data set are read: what their own bytes leave open, a config decides."""

import dataclasses
from pathlib import Path

import cv2
import ml_collections
import numpy as np
from jaxtyping import UInt8

from protoseg_jax import decoding, images
from protoseg_jax.errors import Fault, UserError, reason

_EXIF = ("apply", "ignore")


@dataclasses.dataclass(frozen=True)
class Reading:
    """What `data.exif` and `data.white` say of images and masks; part of the fingerprint.

    Attributes:
      exif: "apply" if masks fit images as shown, "ignore" if as stored, "" where undecided.
      white: the value that is white in images of 16 bits, in 1–65535; None where not known.

    Raises:
      UserError: another value.
    """

    exif: str = ""
    white: int | None = None

    def __post_init__(self):
        if self.exif and self.exif not in _EXIF:
            raise UserError(f"data.exif={self.exif!r} is unknown; choose one of {', '.join(_EXIF)}")
        if self.white is not None and not 0 < self.white <= 65535:
            raise UserError(
                f"data.white={self.white} must lie in 1–65535; set --config.data.white to the "
                "value that is white in 16-bit images"
            )

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> "Reading":
        """That of a run's config."""
        return cls(config.data.exif or "", config.data.white)

    def image(self, data: bytes, where: object) -> tuple[bytes, UInt8[np.ndarray, "h w 3"]]:
        """An encoded image as (bytes that decode to the same anywhere, RGB).

        The bytes are those given where these have 8 bits and no orientation, else a PNG.

        Raises:
          Fault: it is none (see `decoding.decode_file`), or needs a setting that is not there;
            `where` names it.
        """
        pixels, header = decoding.decode_file(data, where)
        plain = self.white_at_255(pixels, where)
        plain = self.upright(plain, header.orientation, f"image {where}")
        as_found = header.orientation == 1 and pixels.dtype == np.uint8 and header.mode != "CMYK"
        return data if as_found else images.encode(plain), plain

    def picture(self, image: decoding.ImageLike) -> UInt8[np.ndarray, "h w 3"]:
        """Any image to be looked at as those that trained are (see `decoding.read`).

        Raises:
          UserError: it is none.
        """
        return decoding.read(image, self.white, as_shown=self.exif != "ignore")

    def white_at_255(self, pixels: np.ndarray, where: object) -> UInt8[np.ndarray, "h w *c"]:
        """Pixels of an image with 8 bits.

        Raises:
          Fault: they have 16 and `white` is not known.
        """
        return decoding.eight_bits(
            pixels,
            self.white,
            where,
            "set --config.data.white=VALUE (65535 where all bits are used, 4095 for 12 of them)",
        )

    def mask(self, data: bytes, where: object) -> decoding.Mask:
        """An encoded mask, turned as images are.

        Raises:
          Fault: it is none (see `decoding.decode_mask`), or has an orientation and `exif` is
            undecided; `where` names it.
        """
        mask = decoding.decode_mask(data, where)

        def upright(array: np.ndarray) -> np.ndarray:
            return self.upright(array, mask.orientation, f"mask {where}")

        opacity = None if mask.opacity is None else upright(mask.opacity)
        return mask._replace(values=upright(mask.values), opacity=opacity, orientation=1)

    def upright(self, array: np.ndarray, orientation: int, what: str) -> np.ndarray:
        """[h w *c] as stored → as images and masks fit each other.

        Raises:
          Fault: `exif` is undecided and that matters; `what` names the file.
        """
        if orientation == 1 or self.exif == "ignore":
            return array
        if not self.exif:
            raise Fault(
                "file that is stored turned",
                f"{what} has EXIF orientation {orientation}, so it is not stored as it is shown, "
                "and which of the two masks belong to is not known",
                "set --config.data.exif=apply (as shown) or --config.data.exif=ignore (as stored)",
            )
        return decoding.turned(array, orientation)


def colours_used(mask: decoding.Mask) -> dict[int, bytes]:
    """Red, green and blue of each value of a mask that its palette has; none of a grey mask."""
    if not mask.palette:
        return {}
    counts = cv2.calcHist([mask.values], [0], None, [256], [0, 256])
    used = np.flatnonzero(counts[: len(mask.palette) // 3]).tolist()
    return {value: mask.palette[3 * value : 3 * value + 3] for value in used}


def lines_in(path: Path) -> list[str]:
    """Lines of a UTF-8 text (see `text_in`), stripped, without the empty ones."""
    return [line.strip() for line in text_in(path).splitlines() if line.strip()]


def text_in(path: Path) -> str:
    """A UTF-8 text without a byte-order mark.

    Raises:
      UserError: it cannot be read, is text of another encoding, or none.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"text {path} cannot be read ({reason(error)})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        kind = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"not UTF-8 (line {line})"
        raise UserError(f"text {path} is {kind}; save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"text {path} is UTF-16 or no text; save it as UTF-8")
    return text
